"""Llama-like models on a CPU, computed by hand: packed sequences with their gradient, for training and for reading prompts.

The general forward spends more than half of its time there outside of matrix products: attention computes the blocks that a
packed mask forbids, and its backward is slow for short rows; each elementwise step is a pass over memory and is remembered. Here
tokens lie in one flat list without padding, only a question's own completions meet its prompt, and what is cheap to compute again
is not kept. The residual stream is float32: in bfloat16, rounding it 60 times is half of the log-probs' error.

`decoder.LlamaDecoder` steps the same model one token at a time with the same roundings.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

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
        self.prefix = prefix  # places of what they all see: their prompt, or what came before this piece of a long sequence
        self.before = sum(part.stop - part.start for part in prefix)  # tokens
        self.count, self.length = len(lengths), max(lengths)
        self.span = slice(start, start + sum(lengths))
        self.real = self.unreal = None  # of the count x length entries, where some are not real
        if min(lengths) < self.length:
            real = torch.arange(self.length) < torch.tensor(lengths)[:, None]
            self.places = real.flatten().cumsum(0) - 1  # within the span; what is not real repeats a neighbour
            self.real, self.unreal = real.flatten().nonzero()[:, 0], (~real).flatten().nonzero()[:, 0]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x (N, ...) as (count, length, ...)."""
        own = x[self.span]
        return (own if self.real is None else own[self.places]).view(self.count, self.length, *x.shape[1:])

    def put(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows (count, length, ...) into out (N, ...)."""
        if self.real is None:
            out[self.span].view(rows.shape).copy_(rows)
        else:
            torch.index_select(rows.flatten(0, 1), 0, self.real, out=out[self.span])


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
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights if w is not None):
        return _PackedHidden.apply(model, ids, layout, *weights)
    return _forward(model, ids, layout, weights, None, keep_cache)[0]


def _weights(model: PreTrainedModel) -> list[torch.Tensor | None]:
    """Embedding, 12 of each layer, last norm."""
    weights = [model.model.embed_tokens.weight]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        weights += [layer.input_layernorm.weight, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias, attention.o_proj.weight]
        weights += [layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    return [*weights, model.model.norm.weight]


PER_LAYER = 12


def rotary(model: PreTrainedModel, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (N, 1, E) float32 for `rotate`; the minus of rotate_half is moved into the sine."""
    cos, sin = model.model.rotary_emb(torch.empty(0, device=positions.device), positions[None])
    half = cos.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys (N, heads, E) turned to their positions, rounded once."""
    return torch.addcmul(x * cos, swap(x).float(), sin).to(x.dtype)


def swap(x: torch.Tensor) -> torch.Tensor:
    """The halves of the last dimension exchanged."""
    front, back = x.chunk(2, dim=-1)
    return torch.cat([back, front], dim=-1)


def rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / root mean square of the rows (n, D) float32, (n, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normed(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of the residual stream (n, D) float32, rounded to the weight's dtype once."""
    return (x * scale).mul_(weight.float()).to(weight.dtype)


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `normed` in x (n, D) float32 and in the weight.

    Layer norm's own kernel, told that the mean is 0; what it takes off for the mean's gradient is given back.
    """
    grad, wide = grad.float(), weight.float()
    of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], torch.zeros_like(scale), scale, wide, wide, [True, True, False]
    )
    return of_x.addcmul_(scale, (grad @ wide)[:, None], value=1 / x.shape[1]), of_weight.to(weight.dtype)


class _Attention:
    """Causal attention of prompts, and of completions to their prompt and to themselves, written out with its gradient.

    Scores are computed a head of keys at a time: its queries lie below each other.
    """

    def __init__(self, layout: Layout, heads: int, kv_heads: int, dtype: torch.dtype):
        self.blocks, self.heads, self.kv_heads = layout.blocks, heads, kv_heads
        self.share = heads // kv_heads
        self.biases = [self._bias(block, dtype) for block in self.blocks]

    def _bias(self, block: Block, dtype: torch.dtype) -> torch.Tensor:
        """(share x l, m), added to the scores; m a whole number of vectors, since softmax of 125 takes 2.5 times that of 128."""
        keys = -(-(block.before + block.length) // 32) * 32
        bias = torch.full((block.length, keys), torch.finfo(dtype).min, dtype=dtype)
        return bias.triu(block.before + 1).repeat(self.share, 1)

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """(N, H + 2K, E) rotated queries, keys and values -> (N, H E)."""
        out = qkv.new_empty(len(qkv), self.heads, qkv.shape[-1])
        for block, bias in zip(self.blocks, self.biases, strict=True):
            q, k, v = self._split(block, qkv, bias.shape[1])
            attended = self._probs(bias, q, k) @ v
            block.put(out, attended.view(block.count, self.heads, block.length, -1).transpose(1, 2))
        return out.flatten(1)

    def backward(self, grad: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Gradient (N, H E) of the output -> (N, H + 2K, E)."""
        out, size = torch.empty_like(qkv), qkv.shape[-1]
        for block, bias in zip(self.blocks, self.biases, strict=True):
            q, k, v = self._split(block, qkv, bias.shape[1])
            probs = self._probs(bias, q, k)
            of_attended = block.take(grad.view(len(grad), self.heads, size))
            if block.unreal is not None:
                of_attended.view(-1, self.heads, size).index_fill_(0, block.unreal, 0)
            of_attended = of_attended.transpose(1, 2).reshape(q.shape)
            of_scores = torch._softmax_backward_data(of_attended @ v.transpose(1, 2), probs, -1, probs.dtype).mul_(size**-0.5)
            of_k, of_v = of_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ of_attended
            of_q = (of_scores @ k).view(block.count, self.heads, block.length, size)
            of_k, of_v = (x.view(block.count, self.kv_heads, -1, size) for x in (of_k, of_v))
            own = slice(block.before, block.before + block.length)
            block.put(out, torch.cat([of_q, of_k[:, :, own], of_v[:, :, own]], dim=1).transpose(1, 2))
            place = 0
            for part in block.prefix:  # written by blocks before this one; its keys and values serve all its completions
                seen = slice(place, place := place + part.stop - part.start)
                of_part = torch.cat([of_k[:, :, seen], of_v[:, :, seen]], dim=1).sum(dim=0)
                out[part, self.heads :] += of_part.transpose(0, 1)
        return out

    def _split(self, block: Block, qkv: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (c K, share x l, E), keys and values (c K, m, E) of a block."""
        own, size, count, length, before = block.take(qkv), qkv.shape[-1], block.count, block.length, block.before
        kv = qkv.new_empty(2, count, self.kv_heads, keys, size)
        if before:
            prefix = torch.cat([qkv[part, self.heads :] for part in block.prefix])
            kv[..., :before, :] = prefix.view(before, 2, 1, self.kv_heads, size).permute(1, 2, 3, 0, 4)
        kv[..., before : before + length, :] = (
            own[:, :, self.heads :].view(count, length, 2, self.kv_heads, size).permute(2, 0, 3, 1, 4)
        )
        kv[..., before + length :, :] = 0
        q = own[:, :, : self.heads].transpose(1, 2).reshape(count * self.kv_heads, self.share * length, size)
        return q, *kv.flatten(1, 2).unbind()

    def _probs(self, bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(dim=-1)


def _forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    layout: Layout,
    weights: list[torch.Tensor | None],
    keep: list[tuple[torch.Tensor, ...]] | None,
    keep_cache: list | None,
) -> tuple[torch.Tensor, _Attention]:
    """Hidden states after the last norm; `keep` takes what the gradient needs."""
    config, dtype = model.config, weights[0].dtype
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    attention = _Attention(layout, heads, kv_heads, dtype)
    cos, sin = rotary(model, layout.positions)
    x = F.embedding(ids, weights[0]).float()  # (N, D), the residual stream
    checkpointed = model.is_gradient_checkpointing
    for i in range(config.num_hidden_layers):
        before = x
        x, parts = _layer(x, _of_layer(weights, i), attention, cos, sin, eps)
        if keep is not None:
            keep.append((before,) if checkpointed else parts)
        if keep_cache is not None:
            keep_cache.append(parts[2][:, heads:])
    scale = rms_scale(x, eps)
    if keep is not None:
        keep.append((x, scale, cos, sin))
    return normed(x, scale, weights[-1]), attention


def _of_layer(weights: list[torch.Tensor | None], i: int) -> list[torch.Tensor | None]:
    return weights[1 + PER_LAYER * i : 1 + PER_LAYER * (i + 1)]


def _layer(
    x: torch.Tensor, weights: list[torch.Tensor | None], attention: _Attention, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The residual stream (N, D) after a layer, and what its gradient needs."""
    norm, q, k, v, *biases, out, mlp_norm, gate, up, down = weights
    rotated = attention.heads + attention.kv_heads
    scale = rms_scale(x, eps)
    bias = torch.cat(biases) if biases[0] is not None else None
    qkv = F.linear(normed(x, scale, norm), torch.cat([q, k, v]), bias).view(len(x), rotated + attention.kv_heads, -1)
    qkv[:, :rotated] = rotate(qkv[:, :rotated], cos, sin)
    attended = attention.forward(qkv)
    after = x + F.linear(attended, out)
    mlp_scale = rms_scale(after, eps)
    gated_upped = F.linear(normed(after, mlp_scale, mlp_norm), torch.cat([gate, up]))
    gated, upped = gated_upped.chunk(2, dim=1)
    return after + F.linear(F.silu(gated).mul_(upped), down), (x, scale, qkv, attended, mlp_scale, gated_upped)


class _PackedHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, ids, layout, *weights):
        ctx.keep = []
        hidden, ctx.attention = _forward(model, ids, layout, weights, ctx.keep, None)
        ctx.ids, ctx.weights, ctx.eps = ids, weights, model.config.rms_norm_eps
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weights, dtype, attention = ctx.weights, grad.dtype, ctx.attention
        x, scale, cos, sin = ctx.keep.pop()
        grads: list[torch.Tensor | None] = [None] * len(weights)
        of_x, grads[-1] = _norm_backward(grad, x, scale, weights[-1])  # (N, D) float32, of the residual stream
        rotated = attention.heads + attention.kv_heads
        for i in reversed(range(len(ctx.keep))):
            norm, q, k, v, *biases, out, mlp_norm, gate, up, down = _of_layer(weights, i)
            parts = ctx.keep.pop()  # and free it when it is used
            if len(parts) == 1:  # gradient checkpointing
                parts = _layer(*parts, _of_layer(weights, i), attention, cos, sin, ctx.eps)[1]
            x, scale, qkv, attended, mlp_scale, gated_upped = parts
            after = x + F.linear(attended, out)  # a product in 60; kept, it would be a sixth of the memory
            gated, upped = gated_upped.chunk(2, dim=1)
            # down(silu(gate(y)) * up(y)), y = normed(after)
            of_out = of_x.to(dtype)
            silu = F.silu(gated)
            of_product = of_out @ down
            of_gate_up = torch.empty_like(gated_upped)
            of_gate, of_up = of_gate_up.chunk(2, dim=1)
            torch.mul(of_product, silu, out=of_up)
            torch.ops.aten.silu_backward(of_product.mul_(upped), gated, grad_input=of_gate)
            grad_down = of_out.T @ silu.mul_(upped)
            grad_gate, grad_up = (of_gate_up.T @ normed(after, mlp_scale, mlp_norm)).chunk(2)
            of_y = of_gate_up @ torch.cat([gate, up])
            of_after, grad_mlp_norm = _norm_backward(of_y, after, mlp_scale, mlp_norm)
            of_x += of_after
            # out(attention(qkv(normed(x))))
            of_out = of_x.to(dtype)
            grad_out = of_out.T @ attended
            of_qkv = attention.backward(of_out @ out, qkv)
            of_qk = of_qkv[:, :rotated].float()
            of_qkv[:, :rotated] = (of_qk * cos).add_(swap(of_qk.mul_(sin)))
            of_qkv = of_qkv.flatten(1)
            grad_qkv = (of_qkv.T @ normed(x, scale, norm)).split([len(q), len(k), len(v)])
            grad_biases = [None] * 3
            if biases[0] is not None:
                grad_biases = of_qkv.sum(dim=0).split([len(q), len(k), len(v)])
            before, grad_norm = _norm_backward(of_qkv @ torch.cat([q, k, v]), x, scale, norm)
            of_x += before
            of_layer = [grad_norm, *grad_qkv, *grad_biases, grad_out, grad_mlp_norm, grad_gate, grad_up, grad_down]
            grads[1 + PER_LAYER * i : 1 + PER_LAYER * (i + 1)] = of_layer
        grads[0] = torch.zeros_like(weights[0]).index_add_(0, ctx.ids, of_x.to(dtype))
        return None, None, None, *grads
