"""Llama-like models on a CPU, computed by hand: packed sequences with their gradient, for training and for reading prompts.

The general forward spends more than half of its time there outside of matrix products: attention computes the blocks that a
packed mask forbids, and its backward is slow for short rows; each elementwise step is a pass over memory and is remembered. Here
tokens lie in one flat list without padding, only a question's own completions meet its prompt, and what is cheap to compute again
is not kept. The residual stream is float32: in bfloat16, rounding it 60 times is half of the log-probs' error.

`decoder.LlamaDecoder` steps the same model one token at a time with the same roundings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from src import kernels

LLAMA_LIKE = ("llama", "mistral", "qwen2")  # RMSNorm, rotary positions, grouped heads, SwiGLU, and nothing else
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
PIECE = 512  # of the tokens of a long sequence at once
BLOCK_PAIRS = 2**17  # of tokens in attention at once: with 9 heads their scores take 2 MB in bfloat16, a core's cache

# Shapes: N tokens of all sequences, D hidden size, H heads of E entries, K heads of keys and of values, share = H / K;
# c sequences of at most l tokens in a block, m keys of each.


def fits(model: PreTrainedModel) -> bool:
    """Whether a model is one that this module computes, down to plain linear layers, and on a CPU."""
    config = model.config
    if model.device.type != "cpu" or config.model_type not in LLAMA_LIKE or config.hidden_act != "silu":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return False
    if config.model_type == "mistral" and config.sliding_window is not None:
        return False
    if config.rope_parameters["rope_type"] not in FIXED_ROTARY:
        return False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim not in kernels.HEAD_SIZES or model.dtype not in (torch.float32, torch.bfloat16) or kernels.libraries() is None:
        return False
    projections = {name: m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    if any(type(m) is not nn.Linear for m in projections.values()):
        return False  # an adapter, added to rounded weights, would mostly be lost
    return all(m.bias is None or name.endswith(("q_proj", "k_proj", "v_proj", "lm_head")) for name, m in projections.items())


@dataclass
class Layout:
    """Where the tokens of prompts, and then of their completions, lie in one flat list."""

    positions: torch.Tensor  # (N,) int64, of each token in its own sequence
    blocks: list["Block"]  # every sequence is in one; those of the prompts come first

    @staticmethod
    def of(prompt_lengths: list[int], completion_lengths: list[list[int]]) -> "Layout":
        """All prompts, then the completions of the first, of the second, and so on."""
        blocks, place = _cut(prompt_lengths, 0, [])
        positions = [torch.arange(length) for length in prompt_lengths]
        start = 0
        for length, own in zip(prompt_lengths, completion_lengths, strict=True):
            more, place = _cut(own, place, [slice(start, start + length)])
            blocks += more
            positions += [torch.arange(length, length + n) for n in own]
            start += length
        return Layout(torch.cat(positions), blocks)


class Block:
    """Sequences that lie one after the other, whose attention is computed together: padded to the longest, behind one prefix."""

    def __init__(self, start: int, lengths: list[int], prefix: list[slice]):
        # Places of what they all see: their prompt, or what came before this piece of a long sequence.
        self.prefix = torch.tensor([i for part in prefix for i in range(part.start, part.stop)], dtype=torch.long)
        self.lengths = torch.tensor(lengths)
        self.starts = start + self.lengths.cumsum(0) - self.lengths
        self.longest = max(lengths)

    def native(self, heads: int, kv_heads: int, e: int) -> kernels.Block:
        """As the kernels take it; it lives as long as this."""
        before = len(self.prefix)
        keys = -(-(before + self.longest) // 32) * 32  # whole vectors
        pointers = (x.data_ptr() for x in (self.starts, self.lengths, self.prefix))
        return kernels.Block(*pointers, len(self.lengths), self.longest, before, keys, heads, kv_heads, e)


def _cut(lengths: list[int], place: int, prompt: list[slice]) -> tuple[list[Block], int]:
    """Blocks of at most BLOCK_PAIRS for sequences that lie from `place` on, and where the last ends."""
    before = sum(part.stop - part.start for part in prompt)
    together: list[list[int]] = []
    for length in filter(None, lengths):
        longest = max([length, *together[-1]]) if together else 0
        if not together or (len(together[-1]) + 1) * longest * (before + longest) > BLOCK_PAIRS:
            together.append([])
        together[-1].append(length)
    blocks = []
    for own in together:
        if len(own) > 1:
            blocks.append(Block(place, own, prompt))
        else:  # in pieces: nothing of what comes after a piece is computed for it
            for piece in range(0, own[0], PIECE):
                earlier = [slice(place, place + piece)] if piece else []
                blocks.append(Block(place + piece, [min(PIECE, own[0] - piece)], prompt + earlier))
        place += sum(own)
    return blocks, place


def packed_hidden(model: PreTrainedModel, ids: torch.Tensor, layout: Layout, keep_cache: list | None = None) -> torch.Tensor:
    """Hidden states (N, D) after the last norm, in the model's dtype; differentiable in its weights where gradients are on.

    Args:
        model: One that `fits`.
        ids: (N,) int64, in the order of `layout`.
        keep_cache: Takes, of each layer, the (N, 2K, E) keys and values.
    """
    weights = _weights(model)
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return _PackedHidden.apply(model, ids, layout, *weights)
    return _forward(model, ids, layout, weights, None, keep_cache)[0]


def _weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """Embedding, 9 of each layer and its 3 biases where it has them, last norm."""
    weights = [model.model.embed_tokens.weight]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights += [layer.input_layernorm.weight, *(part.weight for part in inputs)]
        weights += [part.bias for part in inputs if part.bias is not None]
        weights += [attention.o_proj.weight, layer.post_attention_layernorm.weight]
        weights += [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    return [*weights, model.model.norm.weight]


def _of_layers(weights: Sequence[torch.Tensor], layers: int) -> list[slice]:
    """Where each layer's lie in what `_weights` gives."""
    n = (len(weights) - 2) // layers
    return [slice(1 + n * i, 1 + n * (i + 1)) for i in range(layers)]


def join_weights(model: PreTrainedModel) -> None:
    """Lay the weights of products that have one input side by side in memory, so that `joined` need not copy them."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            whole = torch.cat([part.weight.detach() for part in parts])
            for part, weight in zip(parts, whole.split([len(part.weight) for part in parts]), strict=True):
                part.weight.data = weight


def joined(*weights: torch.Tensor) -> torch.Tensor:
    """Weights (n, D) below each other as one; no copy where they lie so in memory."""
    first, place = weights[0], weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != place or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(weights)
        place += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


def product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer (n, in) -> (n, out), with the very products of a decode step where the machine has them."""
    if kernels.PackedWeight.fits(weight):
        return kernels.PackedWeight(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def rotary(model: PreTrainedModel, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (N, E) float32 for `kernels.rotate_`; the minus of rotate_half is moved into the sine."""
    cos, sin = model.model.rotary_emb(torch.empty(0), positions[None])
    half = cos.shape[-1] // 2
    return cos[0].contiguous(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)


def _forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    layout: Layout,
    weights: Sequence[torch.Tensor],
    keep: list[tuple[torch.Tensor, ...]] | None,
    keep_cache: list | None,
) -> tuple[torch.Tensor, list[kernels.Block]]:
    """Hidden states after the last norm; `keep` takes what the gradient needs."""
    config = model.config
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    cos, sin = rotary(model, layout.positions)
    blocks = [block.native(heads, kv_heads, cos.shape[1]) for block in layout.blocks]
    x, delta = F.embedding(ids, weights[0]).float(), None  # (N, D), the residual stream, and what is still to be added
    for of_layer in _of_layers(weights, config.num_hidden_layers):
        delta, parts = _layer(x, delta, weights[of_layer], blocks, cos, sin, eps)
        x = parts[-1]
        if keep is not None:
            keep.append(parts[:1] if model.is_gradient_checkpointing else parts[:-1])
        if keep_cache is not None:
            keep_cache.append(parts[2][:, heads:])
    x, hidden, scale = kernels.add_norm(x, delta, weights[-1], eps)
    if keep is not None:
        keep.append((x, scale, cos, sin))
    return hidden, blocks


def _layer(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    blocks: list[kernels.Block],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """What a layer's MLP adds to the residual stream (N, D); what its gradient needs, and the stream to which it is added."""
    norm, q, k, v, *biases, out, mlp_norm, gate, up, down = weights
    x, y, scale = kernels.add_norm(x, delta, norm, eps)
    bias = torch.cat(biases) if biases else None
    qkv = product(joined(q, k, v), bias)(y).view(len(x), -1, cos.shape[1])
    heads = blocks[0].heads
    kernels.rotate_(qkv, heads + blocks[0].kv_heads, cos, sin)
    attended = kernels.attend(blocks, qkv, heads)
    after, y, mlp_scale = kernels.add_norm(x, product(out)(attended), mlp_norm, eps)
    gate_up = product(joined(gate, up))(y)
    return product(down)(kernels.swiglu(gate_up)), (x, scale, qkv, attended, mlp_scale, gate_up, after)


class _PackedHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: PreTrainedModel, ids: torch.Tensor, layout: Layout, *weights: torch.Tensor) -> torch.Tensor:
        ctx.keep = []
        hidden, ctx.blocks = _forward(model, ids, layout, weights, ctx.keep, None)
        ctx.layout = layout  # the blocks point into it
        ctx.ids, ctx.weights, ctx.eps = ids, weights, model.config.rms_norm_eps
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, blocks = ctx.weights, ctx.blocks
        x, scale, cos, sin = ctx.keep.pop()
        grads: list[torch.Tensor | None] = [None] * len(weights)
        of_x = torch.zeros_like(x)  # (N, D) float32, of the residual stream; of_out is the same, rounded
        of_out, _, grads[-1] = kernels.norm_backward(grad.contiguous(), x, None, scale, weights[-1], of_x)
        heads, kv_heads = blocks[0].heads, blocks[0].kv_heads
        for of_layer in reversed(_of_layers(weights, len(ctx.keep))):
            norm, q, k, v, *biases, out, mlp_norm, gate, up, down = weights[of_layer]
            parts = ctx.keep.pop()  # and free it when it is used
            if len(parts) == 1:  # gradient checkpointing
                parts = _layer(parts[0], None, weights[of_layer], blocks, cos, sin, ctx.eps)[1][:-1]
            x, scale, qkv, attended, mlp_scale, gate_up = parts
            # down(swiglu(gate_up(y))), y = norm(x + delta)
            of_gate_up, gated = kernels.swiglu_backward(of_out @ down, gate_up)
            grad_down = of_out.T @ gated
            delta = product(out)(attended)  # a product in 60; kept, it would be a sixth of the memory
            of_y = of_gate_up @ joined(gate, up)
            of_out, y, grad_mlp_norm = kernels.norm_backward(of_y, x, delta, mlp_scale, mlp_norm, of_x)
            grad_gate, grad_up = (of_gate_up.T @ y).chunk(2)
            # out(attention(qkv(y))), y = norm(x)
            grad_out = of_out.T @ attended
            of_qkv = kernels.attend_backward(blocks, of_out @ out, qkv, heads)
            kernels.rotate_(of_qkv, heads + kv_heads, cos, sin, back=True)
            of_qkv = of_qkv.flatten(1)
            of_out, y, grad_norm = kernels.norm_backward(of_qkv @ joined(q, k, v), x, None, scale, norm, of_x)
            grad_qkv = (of_qkv.T @ y).split([len(q), len(k), len(v)])
            grad_biases = of_qkv.sum(dim=0).split([len(q), len(k), len(v)]) if biases else ()
            grads[of_layer] = [grad_norm, *grad_qkv, *grad_biases, grad_out, grad_mlp_norm, grad_gate, grad_up, grad_down]
        grads[0] = torch.zeros_like(weights[0]).index_add_(0, ctx.ids, of_out)
        return None, None, None, *grads
