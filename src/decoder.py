"""One token for every row of a batch: what the sampler steps, whatever the model.

`GeneralDecoder` is any Hugging Face causal language model with its own cache. `LlamaDecoder` computes the same with the
modules of a Llama-like model on a CPU, where the general forward spends most of a step outside of the matrix products: it
copies the prompt's cache for every completion and grows it by copying it, expands key and value heads, lets oneDNN lay every
weight out again for every product, and builds a mask in every layer. On a GPU `static_decoder` replays a captured step.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from src import kernels, llama, static_decoder
from src.logprobs import head_product

PREFILL_TOKENS = 4096  # of prompts read at once


class Decoder(Protocol):
    look_every: int  # steps after which the sampler may look which rows go on; a look makes a GPU wait
    shrinks: bool  # whether rows may leave

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        """Read Q prompts once and give every row its prompt's cache.

        Returns:
            Logits (Q x group_size, V) of the first token of each completion, the rows of a prompt side by side.
        """

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Take the last token (n,) int64 of every row, return the logits (n, V) of the next."""

    def keep(self, rows: torch.Tensor) -> None:
        """Let the other rows leave: rows (m,) int64, increasing."""


def make_decoder(model: PreTrainedModel, rows: int, columns: int) -> Decoder:
    """The fastest decoder that the model has, for a batch of `rows`, each at most `columns` tokens with its padding."""
    if llama.fits(model):
        return LlamaDecoder(model, rows, columns)
    if static_decoder.fits(model):
        return static_decoder.static_decoder(model, rows, columns)
    return GeneralDecoder(model)


class GeneralDecoder:
    """Any causal language model, through its own forward."""

    look_every, shrinks = 1, True

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        self.cache, logits, mask = read_prompts(self.model, prompt_ids, pad_id)
        self.cache.batch_repeat_interleave(group_size)
        self.mask = mask.repeat_interleave(group_size, 0)  # (B, P), then a column more for each step
        self.positions = self.mask.sum(dim=1)  # (B,) where the next token goes
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
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class LlamaDecoder:
    """A Llama-like model on a CPU: weights laid out once for the products of many steps, the rest in compiled kernels.

    The weights are read when it is made: make another after the model has changed. Where they are bfloat16 it holds a copy
    of them. Equal to the general forward up to rounding (tests/test_decoder.py), and rounded where `llama.packed_hidden` is, so
    that training finds the log-probs that were sampled from.
    """

    look_every, shrinks = 1, True

    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        inner = model.model
        self.model, self.columns, self.eps = model, columns, model.config.rms_norm_eps
        self.layers = [
            (
                layer.input_layernorm.weight,
                _linear(rows, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                _linear(rows, layer.self_attn.o_proj),
                layer.post_attention_layernorm.weight,
                _linear(rows, layer.mlp.gate_proj, layer.mlp.up_proj),
                _linear(rows, layer.mlp.down_proj),
            )
            for layer in inner.layers
        ]
        self.head = head_product(model.lm_head.weight, model.lm_head.bias)
        self.cos, self.sin = llama.rotary(model, torch.arange(columns))  # (columns, E)

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        lengths = [len(ids) for ids in prompt_ids]
        together = max(1, PREFILL_TOKENS // max(lengths))
        kv_heads, e = self.model.config.num_key_value_heads, self.model.model.layers[0].self_attn.head_dim
        self.cache = kernels.Cache(
            len(self.layers), kv_heads, e, lengths, group_size, self.columns - max(lengths), self.model.dtype
        )
        last = []  # hidden states of the prompts' last tokens
        for start in range(0, len(lengths), together):
            part = range(start, min(start + together, len(lengths)))
            layout = llama.Layout.of([lengths[q] for q in part], [[] for _ in part])
            read: list[torch.Tensor] = []
            with torch.no_grad():
                hidden = llama.packed_hidden(self.model, torch.tensor([i for q in part for i in prompt_ids[q]]), layout, read)
            end = 0
            for q in part:
                end, length = end + lengths[q], lengths[q]
                last.append(hidden[end - 1])
                for layer, keys_values in enumerate(read):
                    self.cache.put_prompt(layer, q, keys_values[end - length : end])
        self.positions = torch.tensor(lengths).repeat_interleave(group_size)  # (n,) where the next token goes
        return self.head(torch.stack(last)).repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        n, e = len(token), self.cache.e
        x, delta = self.model.model.embed_tokens(token).float(), None  # (n, D), the residual stream
        for i, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self.layers):
            x, y, _ = kernels.add_norm(x, delta, norm, self.eps)
            attended = self.cache.attend(i, qkv(y).view(n, -1, e), self.cos, self.sin, self.positions)
            x, y, _ = kernels.add_norm(x, out(attended), mlp_norm, self.eps)
            delta = down(kernels.swiglu(gate_up(y)))
        self.cache.advance()
        self.positions = self.positions + 1
        return self.head(kernels.add_norm(x, delta, self.model.model.norm.weight, self.eps)[1])

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows]


def read_prompts(
    model: PreTrainedModel, prompt_ids: list[list[int]], pad_id: int
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Read Q prompts: their cache, the logits (Q, V) of the first token of a completion, and the mask (Q, P) of real tokens.

    Padded on the left, so that all completions grow from one column; positions count real tokens only.
    """
    longest = max(map(len, prompt_ids))
    prompts = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompt_ids], device=model.device)  # (Q, P)
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()  # (Q, P)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=prompts, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return cache, out.logits[:, -1], mask


def _linear(rows: int, *parts: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Linear layers of one input as one function, their outputs side by side.

    In bfloat16 the weights are joined and laid out once: for the matrix units where the machine has them, otherwise as oneDNN's
    kernel wants them, by the operation that torch.compile's CPU backend uses too; plain bfloat16 products do that again in every
    call, 1.5 times the time at 1 to 64 rows. In float32 it gains nothing and the model's own weights serve.
    """
    if parts[0].weight.dtype == torch.float32:
        return parts[0] if len(parts) == 1 else lambda x: torch.cat([p(x) for p in parts], dim=-1)
    weight = llama.joined(*(p.weight.detach() for p in parts))
    bias = torch.cat([p.bias.detach() for p in parts]) if parts[0].bias is not None else None
    if kernels.PackedWeight.fits(weight) or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return llama.product(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
