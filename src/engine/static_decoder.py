"""A decoder for GPUs, whose step is compiled once and then replayed as a CUDA graph.

Replaying is possible because every step has the same shapes and addresses. On a GPU, a decode step of a small
model consists of a thousand kernel launches. Each kernel runs for only microseconds, so the launches limit
the speed. A graph launches all kernels at once (torch.compile's mode "reduce-overhead"). A step reads nothing
back from the GPU: finished rows stay in the batch, and the sampler checks only every CHECK_EVERY tokens
whether any row is unfinished.
"""

import functools
import weakref

import torch
from transformers import PreTrainedModel, StaticCache

from src.console import say, warn
from src.engine import cuda_llama
from src.engine.architecture import can_pack
from src.engine.cuda_decoder import GraphDecoder
from src.engine.decoder import CHECK_EVERY
from src.engine.general_decoder import prefill_cache
from src.errors import first_line

COLUMNS = 256  # the cache's length is a multiple of this, so one compilation serves many lengths

# One decoder per model. It is kept, because a captured step only works at the addresses of its cache.
_saved_decoders: "weakref.WeakKeyDictionary[PreTrainedModel, StaticDecoder | GraphDecoder]" = (
    weakref.WeakKeyDictionary()
)


def cache_columns(columns: int) -> int:
    """The length of a cache that holds `columns` tokens per row."""
    return -(-columns // COLUMNS) * COLUMNS


def static_decoder(model: PreTrainedModel, rows: int, columns: int) -> "StaticDecoder | GraphDecoder":
    """The model's decoder, for a batch of `rows` with at most `columns` tokens each, including padding.

    Every call returns the same decoder until a batch does not fit. Then a new decoder that is large enough
    for both the old and the new batch is created and compiled. A smaller batch, such as the last one of an
    evaluation, uses only some of the rows.
    """
    saved = _saved_decoders.get(model)
    if saved is None or rows > saved.max_rows or columns > saved.max_columns:
        if saved is not None:
            rows, columns = max(rows, saved.max_rows), max(columns, saved.max_columns)
            del _saved_decoders[model], saved  # free its cache before allocating the next one
        kind = GraphDecoder if cuda_llama.is_supported(model) else StaticDecoder
        _saved_decoders[model] = kind(model, rows, cache_columns(columns))
    return _saved_decoders[model]


def release() -> None:
    """Free the caches of all models. Call this when memory has run out, before trying smaller batches."""
    _saved_decoders.clear()


def can_compile(model: PreTrainedModel) -> bool:
    """Whether the model is on a GPU, every layer attends to all earlier tokens, and Triton is available."""
    return cuda_llama.is_supported(model) or (
        model.device.type == "cuda" and can_pack(model) and _has_triton()
    )


@functools.lru_cache
def _has_triton() -> bool:
    from torch.utils._triton import has_triton  # torch.compile itself makes this check on a GPU

    return has_triton()


class StaticDecoder:
    """A decoder for any causal language model with full attention, using a cache that is allocated once.

    See `decoder.Decoder` for its methods.

    Args:
        model: Its weights may change in place between batches.
        max_rows: Maximum number of rows in a batch. Smaller batches are padded with rows whose results are
            ignored.
        max_columns: The length of the cache.
    """

    check_every, can_drop_rows = CHECK_EVERY, False

    def __init__(self, model: PreTrainedModel, max_rows: int, max_columns: int):
        self.model, self.max_rows, self.max_columns = weakref.ref(model), max_rows, max_columns
        self.cache = StaticCache(model.config, max_cache_len=max_columns)
        self.column = torch.arange(max_columns, device=model.device)
        self.compiled = False

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        model = self.model()
        assert model is not None  # the caller samples from it, so it is alive
        prompt_cache, logits, mask = prefill_cache(model, prompt_ids, pad_id)
        self.cache.reset()
        self.spare_rows = self.max_rows - len(prompt_ids) * group_size
        for layer, (keys, values, _) in enumerate(prompt_cache):
            keys = self._fill(keys.repeat_interleave(group_size, 0))
            values = self._fill(values.repeat_interleave(group_size, 0))
            self.cache.update(keys, values, layer)
        mask = self._fill(mask.repeat_interleave(group_size, 0), 1)  # (max_rows, P)
        later = mask.new_ones(self.max_rows, self.max_columns - mask.shape[1])
        # (max_rows, max_columns): false for padding on the left. Each step also excludes the columns after
        # `last`.
        self.real = torch.cat([mask.bool(), later.bool()], dim=1)
        self.last = torch.full((1,), mask.shape[1] - 1, device=mask.device)  # the last filled column
        self.positions = mask.sum(dim=1)  # (max_rows,), of each row's next token
        return logits.repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.last = self.last + 1
        arguments = (self._fill(token), self.positions, self.real, self.last)
        self.positions = self.positions + 1
        if not self.compiled:
            self._compile(arguments)
        logits = self._step(*arguments)[: len(token)]
        return logits.clone()  # the graph's next replay overwrites its own result

    def _fill(self, batch: torch.Tensor, value: int = 0) -> torch.Tensor:
        """Append the spare rows to a batch (B, ...), filled with `value`."""
        if not self.spare_rows:
            return batch
        return torch.cat([batch, batch.new_full((self.spare_rows, *batch.shape[1:]), value)])

    def keep(self, rows: torch.Tensor) -> None:
        raise AssertionError("a static batch cannot drop rows")

    def _compile(self, arguments: tuple[torch.Tensor, ...]) -> None:
        size = f"{self.max_rows} rows of {self.max_columns} tokens"
        say(f"Compiling the decode step for {size} (once for this size)...")
        # Every decoder compiles the same code, and Dynamo would give up after eight of them.
        torch._dynamo.reset_code(StaticDecoder._forward.__code__)
        self._step = torch.compile(self._forward, mode="reduce-overhead", dynamic=False, fullgraph=True)
        # The declared type covers every kind of cache, but this kind counts its filled columns in a tensor.
        filled: list[torch.Tensor] = [layer.cumulative_length for layer in self.cache.layers]  # type: ignore[misc, union-attr]
        lengths = [length.clone() for length in filled]
        try:
            self._step(*arguments)
        except Exception as error:  # compilers raise all kinds of errors; an uncompiled step is only slower
            reason = f"{type(error).__name__}: {first_line(error)}"
            warn(f"the decode step could not be compiled ({reason}); sampling continues, more slowly")
            self._step = self._forward
        for length, before in zip(filled, lengths, strict=True):  # the actual step writes this column again
            length.copy_(before)
        self.compiled = True

    def _forward(
        self, token: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        visible = real & (self.column <= last)  # (max_rows, max_columns)
        model = self.model()
        assert model is not None
        blocked = torch.finfo(model.dtype).min
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
        mask = mask.masked_fill(~visible, blocked)[:, None, None]
        out = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]
