"""One token for every row of a batch: what the sampler steps, whatever the model.

`GeneralDecoder` is any Hugging Face causal language model with its own cache. `LlamaDecoder` computes the same with the
modules of a Llama-like model on a CPU, where the general forward spends most of a step outside of the matrix products: it
grows its cache by copying it, expands key and value heads, lets oneDNN lay every weight out again for every product, and
builds a mask in every layer.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel

LLAMA_LIKE = ("llama", "mistral", "qwen2")  # RMSNorm, rotary positions, grouped heads, SwiGLU, and nothing else
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


class Decoder(Protocol):
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
    return LlamaDecoder(model, rows, columns) if LlamaDecoder.fits(model) else GeneralDecoder(model)


class GeneralDecoder:
    """Any causal language model, through its own forward."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        self.cache, logits, mask = _read(self.model, prompt_ids, pad_id)
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
    """A Llama-like model on a CPU, weights laid out once for the matrix products of many steps, cache allocated once.

    The weights are read when it is made: make another after the model has changed. Where they are bfloat16 it holds a copy
    of them. Equal to the general forward up to rounding (tests/test_decoder.py).
    """

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the model is one that this class computes, down to plain linear layers."""
        config = model.config
        if model.device.type != "cpu" or config.model_type not in LLAMA_LIKE or config.hidden_act != "silu":
            return False
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
            return False
        if config.model_type == "mistral" and config.sliding_window is not None:
            return False
        if config.rope_parameters["rope_type"] not in FIXED_ROTARY:
            return False
        projections = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
        return all(type(m) is nn.Linear for m in projections)  # an adapter, added to rounded weights, would mostly be lost

    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        config, inner = model.config, model.model
        self.model, self.rows, self.columns = model, rows, columns
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = inner.layers[0].self_attn.head_dim
        self.layers = [
            (
                layer.input_layernorm,
                _linear(rows, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                _linear(rows, layer.self_attn.o_proj),
                layer.post_attention_layernorm,
                _linear(rows, layer.mlp.gate_proj, layer.mlp.up_proj),
                _linear(rows, layer.mlp.down_proj),
            )
            for layer in inner.layers
        ]
        self.head = _linear(rows, model.lm_head)
        cos, sin = inner.rotary_emb(torch.empty(0, dtype=model.dtype), torch.arange(columns)[None])  # (1, columns, D) each
        half = self.head_dim // 2
        # x cos + rotate_half(x) sin, with the minus of rotate_half moved into the sine.
        self.cos, self.sin = cos[0, :, None], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]  # (columns, 1, D)
        # Pages of it are taken as they are first written to.
        shape = (len(self.layers), 2, rows, self.kv_heads, columns, self.head_dim)
        self.cache = torch.empty(shape, dtype=model.dtype)  # of each layer, keys and values

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        cache, logits, mask = _read(self.model, prompt_ids, pad_id)
        self.filled = mask.shape[1]  # columns in use
        for own, layer in zip(self.cache, cache.layers, strict=True):
            own[0, :, :, : self.filled] = layer.keys.repeat_interleave(group_size, 0)
            own[1, :, :, : self.filled] = layer.values.repeat_interleave(group_size, 0)
        mask = mask.repeat_interleave(group_size, 0)
        self.positions = mask.sum(dim=1)  # (B,) where the next token goes
        self.bias = None  # (n, 1, 1, columns), added to the attention scores, where prompts are padded
        if not mask.all():
            self.bias = torch.zeros(self.rows, 1, 1, self.columns, dtype=self.model.dtype)
            self.bias[:, 0, 0, : self.filled].masked_fill_(mask == 0, -torch.inf)
        return logits.repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        n, column = len(token), self.filled
        self.filled += 1
        cos, sin = self.cos[self.positions], self.sin[self.positions]  # (n, 1, D)
        self.positions = self.positions + 1
        bias = None if self.bias is None else self.bias[..., : self.filled]
        rotated = self.heads + self.kv_heads
        hidden = self.model.model.embed_tokens(token)  # (n, hidden_size)
        for (norm, qkv, out, mlp_norm, gate_up, down), (keys, values) in zip(self.layers, self.cache, strict=True):
            heads = qkv(norm(hidden)).view(n, rotated + self.kv_heads, self.head_dim)
            qk = heads[:, :rotated]
            front, back = qk.chunk(2, dim=-1)
            qk = torch.addcmul(qk * cos, torch.cat([back, front], dim=-1), sin)
            keys[:n, :, column] = qk[:, self.heads :]
            values[:n, :, column] = heads[:, rotated:]
            attended = F.scaled_dot_product_attention(
                qk[:, : self.heads, None],
                keys[:n, :, : self.filled],
                values[:n, :, : self.filled],
                attn_mask=bias,
                enable_gqa=True,
            )  # (n, heads, 1, D)
            hidden = hidden + out(attended.reshape(n, -1))
            gate, up = gate_up(mlp_norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + down(F.silu(gate) * up)
        return self.head(self.model.model.norm(hidden))

    def keep(self, rows: torch.Tensor) -> None:
        self.cache[:, :, : len(rows), :, : self.filled] = self.cache[:, :, rows, :, : self.filled]
        self.positions = self.positions[rows]
        if self.bias is not None:
            self.bias = self.bias[rows]


def _read(model: PreTrainedModel, prompt_ids: list[list[int]], pad_id: int) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
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

    In bfloat16 the weights are joined and brought into the layout that oneDNN's kernel wants, the operation that
    torch.compile's CPU backend uses too: plain bfloat16 products do that again in every call, 1.5 times the time at 1 to 64
    rows. In float32 it gains nothing and the model's own weights serve.
    """
    bias = torch.cat([p.bias for p in parts]) if parts[0].bias is not None else None
    if parts[0].weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([p.weight for p in parts]).detach(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if len(parts) == 1:
        return parts[0]
    return lambda x: torch.cat([p(x) for p in parts], dim=-1)
