"""A decoder for Llama-like models on an NVIDIA GPU, whose step is captured once and replayed as a CUDA graph.

A decode step consists of hundreds of kernels that run for microseconds each, so launching them one by one
would limit its speed. A CUDA graph launches them all at once. The step reads each weight once, and of each
row's cache only the columns that are filled.
"""

import weakref

import torch
from transformers import PreTrainedModel

from src.console import warn
from src.engine import architecture, cuda_llama, llama
from src.engine.decoder import CHECK_EVERY, PREFILL_TOKENS
from src.engine.linear import make_head
from src.errors import first_line


class GraphDecoder:
    """A decoder for models that `cuda_llama` supports, with a cache that is allocated once.

    See `decoder.Decoder` for its methods.

    Args:
        model: Its weights may change in place between batches.
        max_rows: Maximum number of rows in a batch. The step always computes this many rows.
        max_columns: Maximum number of tokens in a row, including its prompt.
    """

    check_every, can_drop_rows = CHECK_EVERY, False

    def __init__(self, model: PreTrainedModel, max_rows: int, max_columns: int):
        if architecture.has_plain_layers(model):
            architecture.join_weights(model)
        self.model, self.max_rows, self.max_columns = weakref.ref(model), max_rows, max_columns
        config, device = model.config, model.device
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        columns = torch.arange(max_columns, device=device)
        self.cos, self.sin = llama.rotary(model, columns)  # (max_columns, E)
        # Each layer's buffer holds the queries of all rows, and then 2K lists of max_columns keys or values
        # for each row. `first_entries` says where the entries (E,) of each row's heads start.
        first_queries = torch.arange(max_rows * heads, device=device).view(max_rows, heads)
        lists = torch.arange(max_rows * 2 * kv_heads, device=device).view(max_rows, 2 * kv_heads)
        starts = first_queries.numel() + lists * max_columns  # (max_rows, 2K)
        self.first_entries = torch.cat([first_queries, starts], dim=1)  # (max_rows, H + 2K)
        size = (first_queries.numel() + lists.numel() * max_columns, self.cos.shape[1])
        self.buffers = [
            torch.zeros(size, dtype=model.dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        # Each key-value head of each row is a sequence of its own, and the query heads that share it are its
        # queries. FlashAttention then reads each key once, without copying or expanding anything.
        self.heads, self.kv_heads = heads, kv_heads
        sequences = torch.arange(max_rows * kv_heads + 1, device=device, dtype=torch.int32)
        key_starts = torch.cat([starts[:, :kv_heads].flatten(), starts.new_zeros(1)]).int()
        self.ends = (sequences * (heads // kv_heads), key_starts)
        self.token = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(max_rows, dtype=torch.long, device=device)  # of each row's next token
        self.graph: torch.cuda.CUDAGraph | None = None
        self.can_capture = device.type == "cuda"  # tests run on a CPU

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        model = self.model()
        assert model is not None  # the caller samples from it, so it is alive
        at_once = max(1, PREFILL_TOKENS // max(map(len, prompt_ids)))
        hidden = [
            self._read_prompts(model, prompt_ids[first : first + at_once], first * group_size, group_size)
            for first in range(0, len(prompt_ids), at_once)
        ]
        lengths = torch.tensor([len(ids) for ids in prompt_ids]).repeat_interleave(group_size)
        self.positions.zero_()
        self.positions[: len(lengths)] = lengths.to(self.positions.device)
        self.head = make_head(model.lm_head.weight, model.lm_head.bias)
        return self.head(torch.cat(hidden)).repeat_interleave(group_size, 0)

    def _read_prompts(
        self, model: PreTrainedModel, prompt_ids: list[list[int]], first_row: int, group_size: int
    ) -> torch.Tensor:
        """Read q prompts into the cache of their rows, and return the hidden states (q, D) of their ends."""
        device = self.positions.device
        lengths = [len(ids) for ids in prompt_ids]
        ids = torch.tensor([i for ids in prompt_ids for i in ids], device=device)
        cache: list[torch.Tensor] = []  # each layer's keys and values
        layout = cuda_llama.Layout.of(lengths, [[] for _ in lengths], device)
        hidden = cuda_llama.packed_hidden(model, ids, layout, cache)
        ends = torch.tensor(lengths).cumsum(0)
        # For each token of each row: where it is among all prompts' tokens, its row, and its column
        prompts = torch.arange(len(lengths)).repeat_interleave(group_size)  # of each row
        repeated = torch.tensor(lengths)[prompts]
        rows = torch.arange(len(prompts)).repeat_interleave(repeated)
        columns = torch.arange(len(rows)) - (repeated.cumsum(0) - repeated)[rows]
        tokens = (ends[prompts] - repeated)[rows] + columns
        entries = (
            self.first_entries[(first_row + rows).to(device), self.heads :] + columns.to(device)[:, None]
        )
        for buffer, keys_values in zip(self.buffers, cache, strict=True):
            buffer.index_put_((entries,), keys_values.index_select(0, tokens.to(device)))
        return hidden[(ends - 1).to(device)]

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.token[: len(token)].copy_(token)
        if self.graph is None and self.can_capture:
            self._capture()
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.logits[: len(token)]

    def keep(self, rows: torch.Tensor) -> None:
        raise AssertionError("a captured batch cannot drop rows")

    def _capture(self) -> None:
        """Capture the step. A run on another stream comes first, because it compiles and allocates."""
        positions = self.positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self.positions.copy_(positions)  # the actual step writes this token again
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # without a graph, a step is only slower
            warn(f"the decode step could not be captured ({first_line(error)}); sampling continues, slower")
            self.can_capture = False
            self.positions.copy_(positions)

    def _step(self) -> None:
        """Compute `logits` (max_rows, V) for `token`, and move on to the next position."""
        model = self.model()
        assert model is not None
        cos, sin = self.cos[self.positions], self.sin[self.positions]
        entries = self.first_entries.clone()
        entries[:, self.heads :] += self.positions[:, None]
        used = (self.positions + 1).int().repeat_interleave(self.kv_heads)
        queries, value_offset = self.max_rows * self.heads, self.kv_heads * self.max_columns

        def attend(i: int, qkv: torch.Tensor) -> torch.Tensor:
            buffer = self.buffers[i][:, None]  # (entries, 1, E)
            cuda_llama.rotate_into(qkv, cos, sin, self.kv_heads, self.buffers[i], entries)
            keys, values = buffer[:-value_offset], buffer[value_offset:]
            longest = (self.heads // self.kv_heads, self.max_columns)
            q = buffer[:queries]
            attended, *_ = cuda_llama.flash_attention(q, keys, values, self.ends, longest, False, used)
            return attended.view(self.max_rows, self.heads, -1)

        self.logits = self.head(cuda_llama.hidden_states(model, self.token, attend))
        self.positions.add_(1)
