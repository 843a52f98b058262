"""A decoder for any Hugging Face causal language model, using the model's own forward pass and cache."""

from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel

from src.engine.decoder import CHECK_EVERY


class GeneralDecoder:
    """A decoder for any causal language model; see `decoder.Decoder` for its methods."""

    can_drop_rows = True

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.check_every = 1 if model.device.type == "cpu" else CHECK_EVERY

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        self.cache, logits, mask = prefill_cache(self.model, prompt_ids, pad_id)
        self._select(torch.arange(len(prompt_ids), device=logits.device).repeat_interleave(group_size))
        self.mask = mask.repeat_interleave(group_size, 0)  # (B, P), one column wider after each step
        self.positions = self.mask.sum(dim=1)  # (B,), of each row's next token
        return logits.repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        out = self.model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        self._select(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _select(self, rows: torch.Tensor) -> None:
        """Make a cache of these rows, each of which may occur any number of times."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))  # recurrent layers have no other method


def prefill_cache(
    model: PreTrainedModel, prompt_ids: list[list[int]], pad_id: int
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Read Q prompts.

    The prompts are padded on the left to P tokens, so that all completions start in the same column.
    Positions count only real tokens.

    Returns:
        The prompts' cache, the logits (Q, V) for the first completion token, and the mask (Q, P) int64 of
        real tokens.
    """
    longest = max(map(len, prompt_ids))
    padded = [[pad_id] * (longest - len(ids)) + ids for ids in prompt_ids]
    prompts = torch.tensor(padded, device=model.device)  # (Q, P)
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()  # (Q, P)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=prompts,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache, out.logits[:, -1], mask
