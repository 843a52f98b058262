"""The decoder for GPUs: every step has the same shapes and addresses, so that it is compiled once and replayed as one CUDA graph.

On a GPU a decode step of a small model is a thousand launches of kernels that each take microseconds: the launches are what it
waits for. A graph launches them all at once (torch.compile's mode "reduce-overhead"). Nothing of a step is read back: finished
rows stay in the batch, and the sampler looks only every LOOK_EVERY tokens whether any is left.
"""

import functools
import weakref

import torch
from transformers import PreTrainedModel, StaticCache

from src.logprobs import can_pack

COLUMNS = 256  # the cache's length is a multiple of this: one compilation serves many lengths
LOOK_EVERY = 16

_decoders: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of each model, by rows and columns: addresses must stay


def static_decoder(model: PreTrainedModel, rows: int, columns: int) -> "StaticDecoder":
    """The model's decoder for a batch of `rows`, each at most `columns` tokens with its padding; the same one in every call."""
    shape = (rows, -(-columns // COLUMNS) * COLUMNS)
    of_model = _decoders.setdefault(model, {})
    if shape not in of_model:
        of_model.clear()  # one cache at a time
        of_model[shape] = StaticDecoder(model, *shape)
    return of_model[shape]


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
        rows: Of every batch.
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
        for layer, (keys, values, _) in enumerate(read):
            self.cache.update(keys.repeat_interleave(group_size, 0), values.repeat_interleave(group_size, 0), layer)
        mask = mask.repeat_interleave(group_size, 0)  # (B, P)
        # (B, columns): what is not left-hand padding; columns that are not filled yet lie behind the last.
        self.real = torch.cat([mask.bool(), mask.new_ones(self.rows, self.columns - mask.shape[1]).bool()], dim=1)
        self.last = torch.full((1,), mask.shape[1] - 1, device=mask.device)  # filled column
        self.positions = mask.sum(dim=1)  # (B,) where the next token goes
        return logits.repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.last = self.last + 1
        arguments = (token, self.positions, self.real, self.last)
        self.positions = self.positions + 1
        if not self.compiled:
            self._compile(arguments)
        return self._step(*arguments).clone()  # the graph's own result is overwritten by its next replay

    def keep(self, rows: torch.Tensor) -> None:
        raise AssertionError("rows of a static batch do not leave")

    def _compile(self, arguments: tuple[torch.Tensor, ...]) -> None:
        print(f"Compiling the decode step for {self.rows} rows of {self.columns} tokens (a minute, once)...", flush=True)
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
        seen = real & (self.column <= last)  # (B, columns)
        model = self.model()
        assert model is not None
        blocked = torch.finfo(model.dtype).min
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, blocked)[:, None, None]
        out = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=positions[:, None], past_key_values=self.cache,
            use_cache=True,
        )  # fmt: skip
        return out.logits[:, -1]
