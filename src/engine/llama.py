"""A hand-written forward and backward pass over packed sequences, for Llama-like models on a CPU.

Training uses it, and so does the decoder when it reads prompts. On a CPU, the general forward pass spends
more than half of its time outside the matrix products. Its attention also computes the blocks that a packed
mask forbids, and the backward pass of its attention is slow for short rows. Each elementwise step makes its
own pass over memory, and autograd keeps the result. Here, all tokens lie in one flat list without padding,
completions attend only to their own question's prompt, and anything that is cheap to recompute is not kept.
The residual stream is float32, because rounding it to bfloat16 60 times causes half of the error in the
log-probs.

`decoder.LlamaDecoder` runs the same model one token at a time and rounds at the same points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from src.engine import architecture, kernels
from src.engine.linear import cat_biases, cat_weights, make_linear

CHUNK_TOKENS = 512  # a sequence that has a block to itself is cut into chunks of this many tokens
# Maximum number of token pairs in a block's attention. With 9 heads, their scores take 2 MB in bfloat16,
# which is the size of a core's cache.
BLOCK_PAIRS = 2**17

# Shapes: N tokens in all sequences, D hidden size, I inner size of the MLP, H query heads, K key-value heads,
# E head dimension, share = H / K. A block has c sequences of at most l tokens, with m keys each.


def is_supported(model: PreTrainedModel) -> bool:
    """Whether this module can run a model: Llama-like, with plain linear layers, on a CPU with kernels."""
    return model.device.type == "cpu" and has_kernels_for(model)


def has_kernels_for(model: PreTrainedModel) -> bool:
    """Whether this module could run a model on a CPU, wherever it is now."""
    if not architecture.is_llama_like(model):
        return False
    head_dim = architecture.head_dim(model.config)
    if head_dim not in kernels.HEAD_SIZES or model.dtype not in (torch.float32, torch.bfloat16):
        return False
    # With an adapter, whose sum with rounded weights would mostly be rounded away, the layers are not plain.
    return kernels.are_compiled() and architecture.has_plain_layers(model)


@dataclass
class Layout:
    """The layout of a flat list of tokens: all prompts, followed by all completions."""

    positions: torch.Tensor  # (N,) int64, the position of each token in its own sequence
    blocks: list["SequenceBlock"]  # each sequence is in one or more; the prompts' blocks come first

    @staticmethod
    def of(prompt_lengths: list[int], completion_lengths: list[list[int]]) -> "Layout":
        """Lay out all prompts, and then all completions, prompt by prompt."""
        blocks, end = _make_blocks(prompt_lengths, 0, [])
        positions = [torch.arange(length) for length in prompt_lengths]
        start = 0
        for length, completions in zip(prompt_lengths, completion_lengths, strict=True):
            more, end = _make_blocks(completions, end, [slice(start, start + length)])
            blocks += more
            positions += [torch.arange(length, length + n) for n in completions]
            start += length
        return Layout(torch.cat(positions), blocks)


class SequenceBlock:
    """Consecutive sequences with a common prefix, whose attention is computed together.

    Args:
        start: Index of the first token in the flat list.
        lengths: Number of tokens in each sequence.
        prefix: Earlier tokens that all of these sequences attend to: their prompt and, if this is a chunk of
            a longer sequence, that sequence's earlier tokens.
    """

    def __init__(self, start: int, lengths: list[int], prefix: list[slice]):
        tokens = [i for part in prefix for i in range(part.start, part.stop)]
        self.prefix = torch.tensor(tokens, dtype=torch.long)
        self.lengths = torch.tensor(lengths)
        self.starts = start + self.lengths.cumsum(0) - self.lengths
        self.longest = max(lengths)

    def to_native(self, heads: int, kv_heads: int, head_dim: int) -> kernels.NativeBlock:
        """The struct that the kernels read. It points into this object, which must outlive it."""
        count, prefix_length = len(self.lengths), len(self.prefix)
        padded_keys = -(-(prefix_length + self.longest) // 32) * 32  # a multiple of the vector size
        pointers = (x.data_ptr() for x in (self.starts, self.lengths, self.prefix))
        sizes = (count, self.longest, prefix_length, padded_keys, heads, kv_heads, head_dim)
        return kernels.NativeBlock(*pointers, *sizes)


def _make_blocks(lengths: list[int], start: int, prompt: list[slice]) -> tuple[list[SequenceBlock], int]:
    """Divide consecutive sequences into blocks of at most BLOCK_PAIRS token pairs.

    Args:
        lengths: Number of tokens in each sequence; empty sequences are skipped.
        start: Index of the first token.
        prompt: Location of the prompt that they share; empty if they share none.

    Returns:
        The blocks, and the index after the last token.
    """
    prompt_length = sum(part.stop - part.start for part in prompt)
    groups: list[list[int]] = []
    for length in filter(None, lengths):
        longest = max([length, *groups[-1]]) if groups else 0
        if not groups or (len(groups[-1]) + 1) * longest * (prompt_length + longest) > BLOCK_PAIRS:
            groups.append([])
        groups[-1].append(length)
    blocks = []
    for group in groups:
        if len(group) > 1:
            blocks.append(SequenceBlock(start, group, prompt))
        else:  # cut into chunks, so that a chunk's attention skips the tokens after it
            for chunk in range(0, group[0], CHUNK_TOKENS):
                earlier = [slice(start, start + chunk)] if chunk else []
                length = min(CHUNK_TOKENS, group[0] - chunk)
                blocks.append(SequenceBlock(start + chunk, [length], prompt + earlier))
        start += sum(group)
    return blocks, start


# ----------------------------------------------------------------------------------------------------------
# Weights


class _LayerWeights(NamedTuple):
    """The weights of one layer, or their gradients."""

    norm: torch.Tensor  # (D,)
    qkv: tuple[torch.Tensor, ...]  # queries (H E, D), keys and values (K E, D) each
    qkv_biases: tuple[torch.Tensor, ...]  # the same without D; empty if the layer has no biases
    out: torch.Tensor  # (D, H E)
    mlp_norm: torch.Tensor  # (D,)
    gate_up: tuple[torch.Tensor, ...]  # (I, D) each
    down: torch.Tensor  # (D, I)

    @staticmethod
    def from_flat(weights: Sequence[torch.Tensor]) -> "_LayerWeights":
        norm, q, k, v, *biases, out, mlp_norm, gate, up, down = weights
        return _LayerWeights(norm, (q, k, v), tuple(biases), out, mlp_norm, (gate, up), down)

    def flat(self) -> list[torch.Tensor]:
        return [self.norm, *self.qkv, *self.qkv_biases, self.out, self.mlp_norm, *self.gate_up, self.down]


def _flat_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """All weights except the output head's: embedding, each layer's `_LayerWeights`, and last norm."""
    weights = [model.model.embed_tokens.weight]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights += _LayerWeights(
            norm=layer.input_layernorm.weight,
            qkv=tuple(part.weight for part in inputs),
            qkv_biases=tuple(part.bias for part in inputs if part.bias is not None),
            out=attention.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=(mlp.gate_proj.weight, mlp.up_proj.weight),
            down=mlp.down_proj.weight,
        ).flat()
    return [*weights, model.model.norm.weight]


def _layer_slices(weights: Sequence[torch.Tensor], layers: int) -> list[slice]:
    """The slice of the list from `_flat_weights` that belongs to each layer."""
    n = (len(weights) - 2) // layers
    return [slice(1 + n * i, 1 + n * (i + 1)) for i in range(layers)]


# ----------------------------------------------------------------------------------------------------------
# The forward pass and its gradient


def packed_hidden(
    model: PreTrainedModel, ids: torch.Tensor, layout: Layout, keep_cache: list | None = None
) -> torch.Tensor:
    """Hidden states after the last norm.

    Args:
        model: A model for which `is_supported` is true.
        ids: (N,) int64, token ids in the order of `layout`.
        keep_cache: If given, each layer's keys and values (N, 2K, E) are appended to it.

    Returns:
        (N, D) in the model's dtype, differentiable with respect to the weights if gradients are enabled.
    """
    weights = _flat_weights(model)
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return _PackedHidden.apply(model, ids, layout, *weights)
    return _forward(model, ids, layout, weights, None, keep_cache)[0]


def rotary(model: PreTrainedModel, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (N, E) float32 for `kernels.rotate_`. The sine includes rotate_half's minus sign."""
    cos, sin = model.model.rotary_emb(torch.empty(0, device=positions.device), positions[None])
    half = cos.shape[-1] // 2
    return cos[0].contiguous(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)


@dataclass
class _Pass:
    """The values that all layers of one pass share."""

    layout: Layout  # kept alive, because the native blocks point into it
    blocks: list[kernels.NativeBlock]
    cos: torch.Tensor  # (N, E) float32
    sin: torch.Tensor  # (N, E) float32
    heads: int
    kv_heads: int
    eps: float  # of the norms


class _Activations(NamedTuple):
    """The results of a layer's forward pass that its gradient needs."""

    x: torch.Tensor  # (N, D) float32, the residual stream that enters the layer
    scale: torch.Tensor  # (N,) float32, 1 / root mean square of x
    qkv: torch.Tensor  # (N, H + 2K, E), rotated
    attended: torch.Tensor  # (N, H E)
    mlp_x: torch.Tensor | None  # (N, D) float32, the residual stream that enters the MLP, in a float32 model
    mlp_scale: torch.Tensor  # (N,) float32, 1 / root mean square of the residual stream that enters the MLP
    gate_up: torch.Tensor  # (N, 2 I)


def _forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    layout: Layout,
    weights: Sequence[torch.Tensor],
    saved: list | None,
    keep_cache: list | None,
) -> tuple[torch.Tensor, _Pass]:
    """Hidden states (N, D) after the last norm.

    Args:
        saved: If given, everything that the gradient needs is appended to it: each layer's `_Activations`
            (with gradient checkpointing, only their x), and then the input and the scale of the last norm.
        keep_cache: As in `packed_hidden`.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    cos, sin = rotary(model, layout.positions)
    blocks = [block.to_native(heads, kv_heads, cos.shape[1]) for block in layout.blocks]
    shared = _Pass(layout, blocks, cos, sin, heads, kv_heads, config.rms_norm_eps)
    x = F.embedding(ids, weights[0]).float()  # (N, D), the residual stream
    delta = None  # (N, D), what the next norm will add to the stream
    for part in _layer_slices(weights, config.num_hidden_layers):
        x, delta, activations = _layer(x, delta, _LayerWeights.from_flat(weights[part]), shared)
        if saved is not None:
            saved.append((activations.x,) if model.is_gradient_checkpointing else activations)
        if keep_cache is not None:
            keep_cache.append(activations.qkv[:, heads:])
    x, hidden, scale = kernels.add_norm(x, delta, weights[-1], shared.eps)
    if saved is not None:
        saved.append((x, scale))
    return hidden, shared


def _layer(
    x: torch.Tensor, delta: torch.Tensor | None, weights: _LayerWeights, shared: _Pass
) -> tuple[torch.Tensor, torch.Tensor, _Activations]:
    """Run one layer.

    Args:
        x: (N, D) float32, the residual stream, to which `delta` has not been added yet.
        delta: (N, D), the output of the previous layer's MLP; None for the first layer.

    Returns:
        x and delta after this layer, and the activations that the layer's gradient needs.
    """
    x, y, scale = kernels.add_norm(x, delta, weights.norm, shared.eps)
    qkv = make_linear(cat_weights(*weights.qkv), cat_biases(*weights.qkv_biases))(y)
    qkv = qkv.view(len(x), -1, shared.cos.shape[1])
    kernels.rotate_(qkv, shared.heads + shared.kv_heads, shared.cos, shared.sin)
    attended = kernels.attend(shared.blocks, qkv, shared.heads)
    mlp_x, y, mlp_scale = kernels.add_norm(
        x, make_linear(weights.out)(attended), weights.mlp_norm, shared.eps
    )
    gate_up = make_linear(cat_weights(*weights.gate_up))(y)
    delta = make_linear(weights.down)(kernels.swiglu(gate_up))
    # In bfloat16, the product that computes it again is cheap, and keeping it would take a sixth more memory.
    kept = mlp_x if qkv.dtype == torch.float32 else None
    return mlp_x, delta, _Activations(x, scale, qkv, attended, kept, mlp_scale, gate_up)


class _PackedHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: PreTrainedModel, ids: torch.Tensor, layout: Layout, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.saved = []
        hidden, ctx.shared = _forward(model, ids, layout, weights, ctx.saved, None)
        ctx.ids, ctx.weights = ids, weights
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, shared = ctx.weights, ctx.shared
        d_weights: list[torch.Tensor | None] = [None] * len(weights)
        x, scale = ctx.saved.pop()
        d_x = torch.zeros_like(x)  # (N, D) float32, the gradient of the residual stream
        # d_delta is d_x in the model's dtype: the gradient of the tensor that was last added to the stream.
        d_delta, _, d_weights[-1] = kernels.norm_backward(
            d_hidden.contiguous(), x, None, scale, weights[-1], d_x
        )
        del x
        for part in reversed(_layer_slices(weights, len(ctx.saved))):
            layer = _LayerWeights.from_flat(weights[part])
            activations = ctx.saved.pop()  # popped, so that they are freed after use
            if not isinstance(activations, _Activations):  # gradient checkpointing kept only x
                activations = _layer(activations[0], None, layer, shared)[2]
            d_delta, d_layer = _layer_backward(d_x, d_delta, layer, activations, shared)
            d_weights[part] = d_layer.flat()
        d_weights[0] = torch.zeros_like(weights[0]).index_add_(0, ctx.ids, d_delta)
        return None, None, None, *d_weights


def _layer_backward(
    d_x: torch.Tensor, d_delta: torch.Tensor, weights: _LayerWeights, saved: _Activations, shared: _Pass
) -> tuple[torch.Tensor, _LayerWeights]:
    """The gradient of `_layer`.

    Args:
        d_x: (N, D) float32, the gradient of the residual stream after the layer. It is replaced in place by
            the gradient of the stream that enters the layer.
        d_delta: (N, D), d_x in the model's dtype.

    Returns:
        The new d_x in the model's dtype, and the gradients of the weights.
    """
    # Forward: delta = down(swiglu(gate_up(y))), with y = norm(x + attention).
    d_gate_up, gated = kernels.swiglu_backward(make_linear(weights.down.T)(d_delta), saved.gate_up)
    d_down = d_delta.T @ gated
    mlp_x, attention = saved.mlp_x, None
    if mlp_x is None:
        mlp_x, attention = saved.x, make_linear(weights.out)(saved.attended)
    d_y = make_linear(cat_weights(*weights.gate_up).T)(d_gate_up)
    d_delta, y, d_mlp_norm = kernels.norm_backward(
        d_y, mlp_x, attention, saved.mlp_scale, weights.mlp_norm, d_x
    )
    d_gate_up_weights = (d_gate_up.T @ y).chunk(2)
    # Forward: attention = out(attend(qkv(y))), with y = norm(x).
    d_out = d_delta.T @ saved.attended
    d_attended = make_linear(weights.out.T)(d_delta)
    d_qkv = kernels.attend_backward(shared.blocks, d_attended, saved.qkv, shared.heads)
    kernels.rotate_(d_qkv, shared.heads + shared.kv_heads, shared.cos, shared.sin, backward=True)
    d_qkv = d_qkv.flatten(1)
    d_y = make_linear(cat_weights(*weights.qkv).T)(d_qkv)
    d_delta, y, d_norm = kernels.norm_backward(d_y, saved.x, None, saved.scale, weights.norm, d_x)
    sizes = [len(w) for w in weights.qkv]
    d_qkv_weights = (d_qkv.T @ y).split(sizes)
    d_qkv_biases = d_qkv.sum(dim=0).split(sizes) if weights.qkv_biases else ()
    gradients = _LayerWeights(
        d_norm, d_qkv_weights, d_qkv_biases, d_out, d_mlp_norm, d_gate_up_weights, d_down
    )
    return d_delta, gradients
