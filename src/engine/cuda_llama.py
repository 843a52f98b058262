"""A forward pass over packed sequences for Llama-like models in bfloat16 on an NVIDIA GPU.

Training uses it, and `cuda_decoder.GraphDecoder` runs the same layers one token at a time, so that sampling
and training round at the same points. All tokens lie in one flat list without padding. A completion attends
to its question's prompt, which the list contains only once, and to itself, through PyTorch's
FlashAttention kernels for sequences of varying length (arXiv:2307.08691). torch.compile fuses each operation
between matrix products and attention into a single kernel. The residual stream is float32, as on a CPU
(`llama.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from transformers import PreTrainedModel

from src.engine import architecture, llama
from src.engine.fused import fused
from src.engine.linear import cat_weights

# Shapes: N tokens in all sequences, D hidden size, I inner size of the MLP, H query heads, K key-value heads,
# E head dimension, M keys of all sequences, in which a prompt counts once for each sequence that reads it.

Attend = Callable[[int, torch.Tensor], torch.Tensor]  # (layer, qkv) -> (N, H, E); qkv are not rotated yet


def is_supported(model: PreTrainedModel) -> bool:
    """Whether this module can run a model: Llama-like, in bfloat16, on a GPU with FlashAttention."""
    if model.device.type != "cuda" or model.dtype != torch.bfloat16 or not architecture.is_llama_like(model):
        return False
    head_dim = architecture.head_dim(model.config)
    return head_dim % 8 == 0 and head_dim <= 256 and _has_flash_attention()


def activation_bytes(model: PreTrainedModel) -> tuple[float, float, float, float]:
    """Bytes per token of the activations.

    Returns:
        What a forward pass keeps for the backward pass; the inputs of all layers, which it keeps with
        gradient checkpointing; what the backward pass of one layer adds; and what a forward pass without
        gradients has in memory at a time.
    """
    config = model.config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = architecture.head_dim(config)
    qkv = 2 * (heads + 2 * config.num_key_value_heads) * head_dim
    norms = 2 * (4 + 2) * hidden  # both norms' input in float32, and their result
    attention = qkv + 2 * heads * head_dim + 4 * heads
    mlp = 2 * (2 * inner + inner)  # gate and up, and their product
    layer = norms + attention + mlp
    inputs = (4 + 2) * hidden  # the stream, and what will be added to it
    layers = config.num_hidden_layers
    return float(layers * layer), float(layers * inputs), float(inputs + mlp), float(2 * inputs + mlp)


@functools.lru_cache
def _has_flash_attention() -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)


# ----------------------------------------------------------------------------------------------------------
# The layout of a pass


@dataclass(frozen=True)
class Layout:
    """The sequences in a flat list of tokens: all prompts, followed by all completions."""

    positions: torch.Tensor  # (N,) int64, the position of each token in its own sequence
    sources: torch.Tensor  # (M,) int64, the index of the token whose key and value each entry holds
    query_ends: torch.Tensor  # (S + 1,) int32: 0, and then the end of each sequence among the N tokens
    key_ends: torch.Tensor  # (S + 1,) int32: the same among the M keys
    longest: int  # tokens in the longest sequence, without its prompt
    longest_keys: int  # tokens that the longest sequence attends to

    @staticmethod
    def of(prompt_lengths: list[int], completion_lengths: list[list[int]], device: torch.device) -> Layout:
        """Lay out all prompts, and then all completions, prompt by prompt. Empty completions are left out."""
        starts = [0, *accumulate(prompt_lengths)]
        end = starts[-1]
        prompts = [torch.arange(start, start + n) for start, n in zip(starts, prompt_lengths, strict=False)]
        positions = [torch.arange(n) for n in prompt_lengths]
        sources, lengths = list(prompts), list(prompt_lengths)
        key_lengths = list(prompt_lengths)
        for prompt, completions in zip(prompts, completion_lengths, strict=True):
            for n in filter(None, completions):
                sources += [prompt, torch.arange(end, end + n)]
                positions.append(torch.arange(len(prompt), len(prompt) + n))
                lengths.append(n)
                key_lengths.append(len(prompt) + n)
                end += n
        query_ends, key_ends = (torch.tensor([0, *accumulate(n)]) for n in (lengths, key_lengths))
        return Layout(
            torch.cat(positions).to(device),
            torch.cat(sources).to(device),
            query_ends.to(device, torch.int32),
            key_ends.to(device, torch.int32),
            max(lengths),
            max(key_lengths),
        )


# ----------------------------------------------------------------------------------------------------------
# Operations between matrix products, each of which torch.compile makes a single kernel


@fused
def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream x (N, D) float32 plus delta (N, D), and the sum's RMSNorm (N, D), rounded once."""
    total = x if delta is None else x + delta.float()
    scale = torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    return total, (total * scale * weight.float()).to(weight.dtype)


@fused
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up (N, 2 I), with gate and up side by side -> silu(gate) * up (N, I)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def apply_rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Apply the rotary embedding to the queries and keys of qkv (N, H + 2K, E).

    Args:
        cos, sin: (N, E) float32, from `llama.rotary`.
        kv_heads: K.
    """
    x = qkv.float()
    swapped = x.unflatten(2, (2, -1)).flip(2).flatten(2)  # both halves of each head
    turned = x * cos[:, None] + swapped * sin[:, None]
    is_value = torch.arange(qkv.shape[1], device=qkv.device) >= qkv.shape[1] - kv_heads
    return torch.where(is_value[:, None], qkv, turned.to(qkv.dtype))


rotate = fused(apply_rotary)


@fused
def rotate_into(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_heads: int,
    out: torch.Tensor,
    at: torch.Tensor,
) -> None:
    """Like `apply_rotary`, but write each head's result (E,) into `out` (..., E), at entries (N, H + 2K)."""
    out.index_put_((at,), apply_rotary(qkv, cos, sin, kv_heads))


# ----------------------------------------------------------------------------------------------------------
# Attention


def flash_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    causal: bool,
    used: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """FlashAttention of sequences of varying length, without a gradient.

    Args:
        q: (N, H, E).
        keys, values: (M, K, E) each.
        ends: Where the queries and the keys of each sequence end, as in `Layout`.
        longest: Number of queries and of keys in the longest sequence, or more.
        causal: The last query of a sequence sees all its keys, and each query before it sees one key less.
        used: (S,) int32, how many keys each sequence has. If given, `ends` only says where its keys start.

    Returns:
        The attended values (N, H, E), and what the gradient needs besides the arguments.
    """
    out, *saved, _ = torch.ops.aten._flash_attention_forward(
        q, keys, values, *ends, *longest, 0.0, causal, False, seqused_k=used
    )
    return out, *saved


def flash_attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of causal `flash_attention`, with all of its results as `saved`: d_q, d_kv."""
    out, log_sum_exp, *random_state = saved
    keys, values = kv.chunk(2, dim=1)
    d_q, d_keys, d_values = torch.ops.aten._flash_attention_backward(
        d_out, q, keys, values, out, log_sum_exp, *ends, *longest, 0.0, True, *random_state
    )
    return d_q, torch.cat([d_keys, d_values], dim=1)


class _Attention(torch.autograd.Function):
    """Attention of each sequence to itself and its prompt: rotated qkv (N, H + 2K, E) -> (N, H, E)."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, kv_heads: int, layout: Layout) -> torch.Tensor:
        q, kv = qkv.split([qkv.shape[1] - 2 * kv_heads, 2 * kv_heads], dim=1)
        shape = (layout.query_ends, layout.key_ends), (layout.longest, layout.longest_keys)
        keys, values = kv.index_select(0, layout.sources).chunk(2, dim=1)
        saved = flash_attention(q, keys, values, *shape, causal=True)
        ctx.save_for_backward(qkv, *saved)
        ctx.kv_heads, ctx.layout, ctx.shape = kv_heads, layout, shape
        return saved[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, *saved = ctx.saved_tensors
        sources = ctx.layout.sources
        q, kv = qkv.split([d_out.shape[1], 2 * ctx.kv_heads], dim=1)
        gathered = kv.index_select(0, sources)
        d_q, d_gathered = flash_attention_backward(d_out.contiguous(), q, gathered, tuple(saved), *ctx.shape)
        # In float32, because a prompt's gradient is a sum over all its completions.
        d_kv = torch.zeros(kv.shape, device=kv.device).index_add_(0, sources, d_gathered.float())
        return torch.cat([d_q, d_kv.to(d_q.dtype)], dim=1), None, None


# ----------------------------------------------------------------------------------------------------------
# The forward pass


class _JoinedLinear(torch.autograd.Function):
    """Linear layers with the same input as a single product: x (N, in) -> (N, sum of the outputs)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        return x @ cat_weights(*weights).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        d_weights: tuple[torch.Tensor | None, ...] = (None,) * len(weights)
        if any(ctx.needs_input_grad[1:]):
            d_weights = (d_out.T @ x).split([len(w) for w in weights])
        return d_out @ cat_weights(*weights), *d_weights


def project(x: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
    """The outputs of linear layers with the same input, side by side."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len(plain) < len(layers):  # LoRA
        return torch.cat([layer(x) for layer in layers], dim=-1)
    out = _JoinedLinear.apply(x, *(layer.weight for layer in plain))
    biases: list[torch.Tensor] = [layer.bias for layer in plain if layer.bias is not None]
    return out + torch.cat(biases) if biases else out


def packed_hidden(
    model: PreTrainedModel, ids: torch.Tensor, layout: Layout, keep_cache: list | None = None
) -> torch.Tensor:
    """Hidden states after the last norm.

    Args:
        model: A model for which `is_supported` is true.
        ids: (N,) int64, token ids in the order of `layout`.
        keep_cache: If given, each layer's keys and values (N, 2K, E) are appended to it.

    Returns:
        (N, D) in the model's dtype, differentiable with respect to the weights that require gradients.
    """
    cos, sin = llama.rotary(model, layout.positions)
    kv_heads = model.config.num_key_value_heads

    def attend(_: int, qkv: torch.Tensor) -> torch.Tensor:
        qkv = rotate(qkv, cos, sin, kv_heads)
        if keep_cache is not None:
            keep_cache.append(qkv[:, -2 * kv_heads :])
        return _Attention.apply(qkv, kv_heads, layout)

    return hidden_states(model, ids, attend)


def hidden_states(model: PreTrainedModel, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Hidden states (N, D) after the last norm, with any attention, for token ids (N,) int64."""
    x = model.model.embed_tokens(ids).float()  # (N, D), the residual stream
    delta = None  # (N, D), what the next norm will add to the stream
    run: Callable[..., Any] = _layer
    if model.is_gradient_checkpointing and torch.is_grad_enabled():
        run = functools.partial(torch.utils.checkpoint.checkpoint, _layer, use_reentrant=False)
    for i, layer in enumerate(model.model.layers):
        x, delta = run(x, delta, layer, model.config, functools.partial(attend, i))
    return add_norm(x, delta, model.model.norm.weight, model.config.rms_norm_eps)[1]


def _layer(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    layer: Any,
    config: Any,
    attend: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one layer on the residual stream x (N, D), to which delta (N, D) has not been added yet."""
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    attention, mlp = layer.self_attn, layer.mlp
    x, y = add_norm(x, delta, layer.input_layernorm.weight, eps)
    qkv = project(y, attention.q_proj, attention.k_proj, attention.v_proj)
    attended = attend(qkv.view(len(x), heads + 2 * kv_heads, -1)).flatten(1)
    x, y = add_norm(x, attention.o_proj(attended), layer.post_attention_layernorm.weight, eps)
    return x, mlp.down_proj(swiglu(project(y, mlp.gate_proj, mlp.up_proj)))
