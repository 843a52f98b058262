"""The decoder for GPUs: every step has the same shapes and addresses, so that it is compiled once and replayed as one CUDA graph.

On a GPU a decode step of a small model is a thousand launches of kernels that each take microseconds: the launches are what it
waits for. A graph launches them all at once (torch.compile's mode "reduce-overhead"). Nothing of a step is read back: finished
rows stay in the batch, and the sampler looks only every LOOK_EVERY tokens whether any is left.
"""

import functools
import weakref

import torch
from transformers import PreTrainedModel, StaticCache

from src.console import say
from src.logprobs import can_pack

COLUMNS = 256  # the cache's length is a multiple of this: one compilation serves many lengths
LOOK_EVERY = 16

_decoders: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # one of each model: its addresses must stay


def cache_columns(columns: int) -> int:
    """Columns of the cache that a batch of so many takes."""
    return -(-columns // COLUMNS) * COLUMNS


def static_decoder(model: PreTrainedModel, rows: int, columns: int) -> "StaticDecoder":
    """The model's decoder for a batch of `rows`, each at most `columns` tokens with its padding.

    It is the same one in every call until a batch does not fit: then it is made anew, as large as either wants, and compiled.
    A smaller batch, such as the last of an evaluation, takes a part of its rows.
    """
    had = _decoders.get(model)
    if had is None or rows > had.rows or columns > had.columns:
        if had is not None:
            rows, columns = max(rows, had.rows), max(columns, had.columns)
            del _decoders[model], had  # one cache at a time
        _decoders[model] = StaticDecoder(model, rows, cache_columns(columns))
    return _decoders[model]


def release() -> None:
    """Give back the caches of all models: memory has run out, and smaller batches are to come."""
    _decoders.clear()


def fits(model: PreTrainedModel) -> bool:
    """Whether a model is on a GPU, all its layers attend to all tokens before, and it can be compiled here."""
    return model.device.type == "cuda" and can_pack(model) and _can_compile()


@functools.lru_cache
def _can_compile() -> bool:
    from torch.utils._triton import has_triton  # what torch.compile itself asks on a GPU

    return has_triton()


class StaticDecoder:
    """Any causal language model with full attention, its cache allocated once; see `decoder.Decoder` for what is computed.

    Args:
        model: Whose weights may change in place between batches.
        rows: Of a batch, at most.
        columns: Of the cache.
    """

    look_every, shrinks = LOOK_EVERY, False

    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        self.model, self.rows, self.columns = weakref.ref(model), rows, columns
        self.cache = StaticCache(model.config, max_cache_len=columns)
        self.column = torch.arange(columns, device=model.device)
        self.compiled = False

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        from src.decoder import read_prompts

        model = self.model()
        assert model is not None  # whoever samples holds it
        read, logits, mask = read_prompts(model, prompt_ids, pad_id)
        self.cache.reset()
        self.spare = self.rows - len(prompt_ids) * group_size  # rows that nobody reads; they take zeros along
        for layer, (keys, values, _) in enumerate(read):
            keys, values = (self._fill(read_once.repeat_interleave(group_size, 0)) for read_once in (keys, values))
            self.cache.update(keys, values, layer)
        mask = self._fill(mask.repeat_interleave(group_size, 0), 1)  # (rows, P)
        # (rows, columns): what is not left-hand padding; columns that are not filled yet lie behind the last.
        self.real = torch.cat([mask.bool(), mask.new_ones(self.rows, self.columns - mask.shape[1]).bool()], dim=1)
        self.last = torch.full((1,), mask.shape[1] - 1, device=mask.device)  # filled column
        self.positions = mask.sum(dim=1)  # (rows,) where the next token goes
        return logits.repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.last = self.last + 1
        arguments = (self._fill(token), self.positions, self.real, self.last)
        self.positions = self.positions + 1
        if not self.compiled:
            self._compile(arguments)
        return self._step(*arguments)[: len(token)].clone()  # the graph's own result is overwritten by its next replay

    def _fill(self, batch: torch.Tensor, value: int = 0) -> torch.Tensor:
        """(B, ...) with as many rows behind it as the decoder has."""
        return torch.cat([batch, batch.new_full((self.spare, *batch.shape[1:]), value)]) if self.spare else batch

    def keep(self, rows: torch.Tensor) -> None:
        raise AssertionError("rows of a static batch do not leave")

    def _compile(self, arguments: tuple[torch.Tensor, ...]) -> None:
        say(f"Compiling the decode step for {self.rows} rows of {self.columns} tokens (once for this size)...")
        self._step = torch.compile(self._forward, mode="reduce-overhead", dynamic=False, fullgraph=True)
        # transformers declares the numbers that all caches have, and counts in a tensor here.
        filled: list[torch.Tensor] = [layer.cumulative_length for layer in self.cache.layers]  # type: ignore[misc, union-attr]
        lengths = [length.clone() for length in filled]
        try:
            self._step(*arguments)
        except Exception as error:  # whatever the compiler of the day raises: the step is slower without it, not wrong
            print(f"warning: the decode step could not be compiled, so it goes on without ({type(error).__name__})", flush=True)
            self._step = self._forward
        for now, before in zip(filled, lengths, strict=True):  # the step proper writes the same column again
            now.copy_(before)
        self.compiled = True

    def _forward(self, token: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        seen = real & (self.column <= last)  # (rows, columns)
        model = self.model()
        assert model is not None
        blocked = torch.finfo(model.dtype).min
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, blocked)[:, None, None]
        out = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=positions[:, None], past_key_values=self.cache,
            use_cache=True,
        )  # fmt: skip
        return out.logits[:, -1]
