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

# Shapes: N tokens of all sequences, D hidden size, H heads of E entries, K heads of keys and of values;
# R prompts of at most P tokens, C completions of at most L tokens.


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
    """Where the tokens of prompts and of their completions lie in one flat list."""

    positions: torch.Tensor  # (N,) int64, of each token in its own sequence
    prompts: torch.Tensor  # (R, P) int64, places of the prompts' tokens, 0 beyond their end
    prompt_real: torch.Tensor  # (R, P) bool
    completions: torch.Tensor  # (C, L) int64; L is 0 where there are none
    completion_real: torch.Tensor  # (C, L) bool
    prompt_of: torch.Tensor  # (C,) int64, the prompt of each completion

    @staticmethod
    def of(prompt_lengths: list[int], completion_lengths: list[list[int]]) -> "Layout":
        """Each prompt followed by its completions."""
        positions, prompts, completions, prompt_of, place = [], [], [], [], 0
        for row, (length, own) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
            prompts.append(list(range(place, place + length)))
            positions += range(length)
            place += length
            for n in own:
                completions.append(list(range(place, place + n)))
                positions += range(length, length + n)
                prompt_of.append(row)
                place += n
        prompt_places, prompt_real = _table(prompts)
        places, real = _table(completions)
        return Layout(
            torch.tensor(positions), prompt_places, prompt_real, places, real, torch.tensor(prompt_of, dtype=torch.long)
        )


def _table(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of places as the rows of a tensor, 0 where a list is shorter, and which entries are real."""
    longest = max(map(len, rows), default=0)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    places = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long).view(len(rows), longest)
    return places, torch.arange(longest) < lengths[:, None]


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
    """Gradients of `normed` in x (n, D) float32 and in the weight."""
    unit = x * scale
    grad_weight = (grad * unit).sum(dim=0).to(weight.dtype)
    grad_unit = grad * weight.float()  # float32
    along = torch.linalg.vecdot(grad_unit, unit)[:, None].div_(x.shape[-1])
    return grad_unit.addcmul_(unit, along, value=-1).mul_(scale), grad_weight


class _Attention:
    """Causal attention of prompts, and of completions to their prompt and to themselves, written out with its gradient.

    Scores are computed a head of keys at a time: its queries lie below each other.
    """

    def __init__(self, layout: Layout, heads: int, kv_heads: int, dtype: torch.dtype):
        self.layout, self.heads, self.kv_heads = layout, heads, kv_heads
        self.share = heads // kv_heads
        self.real = [mask.flatten().nonzero()[:, 0] for mask in (layout.completion_real, layout.prompt_real)]
        self.tables = [layout.completions, layout.prompts]  # (b, l) places each
        lowest = torch.finfo(dtype).min
        (rows, prompt), (count, length) = layout.prompts.shape, layout.completions.shape
        before = torch.zeros(count, length, prompt + length, dtype=dtype, device=layout.positions.device)
        before[:, :, :prompt].masked_fill_(~layout.prompt_real[layout.prompt_of][:, None], lowest)
        before[:, :, prompt:] = torch.full((length, length), lowest, dtype=dtype, device=before.device).triu(1)
        causal = torch.full((prompt, prompt), lowest, dtype=dtype, device=before.device).triu(1).expand(rows, prompt, prompt)
        self.biases = [
            bias[:, None, None]
            .expand(-1, kv_heads, self.share, -1, -1)
            .reshape(len(bias) * kv_heads, self.share * bias.shape[1], bias.shape[2])
            for bias in (before, causal)
        ]

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """(N, H + 2K, E) rotated queries, keys and values -> (N, H E)."""
        out = qkv.new_empty(len(qkv), self.heads, qkv.shape[-1])
        for i, (q, k, v) in enumerate(self._split(qkv)):
            self._place(out, i, self._probs(i, q, k) @ v)
        return out.flatten(1)

    def backward(self, grad: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Gradient (N, H E) of the output -> (N, H + 2K, E)."""
        layout, size = self.layout, qkv.shape[-1]
        grads = []
        for i, (q, k, v) in enumerate(self._split(qkv)):
            probs = self._probs(i, q, k)
            own = grad.view(len(grad), self.heads, size)[self.tables[i].flatten()]  # what is not real repeats token 0
            if len(self.real[i]) < len(own):
                own = torch.zeros_like(own).index_copy_(0, self.real[i], own[self.real[i]])
            own = self._stack(own, i)
            of_probs = own @ v.transpose(1, 2)
            of_scores = torch._softmax_backward_data(of_probs, probs, -1, probs.dtype).mul_(size**-0.5)
            grads.append((of_scores @ k, of_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ own))
        (rows, prompt), (count, length) = layout.prompts.shape, layout.completions.shape
        out = qkv.new_empty(qkv.shape)
        (q, *kv), (prompt_q, *prompt_kv) = grads
        kv = [x.view(count, self.kv_heads, prompt + length, size) for x in kv]
        # A prompt's keys and values serve its own tokens and those of all its completions.
        prompt_kv = [
            x.view(rows, self.kv_heads, prompt, size).index_add(0, layout.prompt_of, of_completions[:, :, :prompt])
            for x, of_completions in zip(prompt_kv, kv, strict=True)
        ]
        self._place(out, 0, torch.cat([q.view(count, self.heads, length, size), *(x[:, :, prompt:] for x in kv)], dim=1))
        self._place(out, 1, torch.cat([prompt_q.view(rows, self.heads, prompt, size), *prompt_kv], dim=1))
        return out

    def _split(self, qkv: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Queries (b K, share x l, E), keys and values (b K, m, E) of the completions, and of the prompts."""
        size, heads = qkv.shape[-1], self.heads
        own, front = (qkv[table].transpose(1, 2) for table in self.tables)  # (b, heads, l, E)
        behind = torch.cat([front[self.layout.prompt_of, heads:], own[:, heads:]], dim=2)  # (C, 2K, P + L, E)
        split = []
        for x, kv in ((own, behind), (front, front[:, heads:])):
            k, v = (part.reshape(-1, part.shape[2], size) for part in kv.chunk(2, dim=1))
            split.append((x[:, :heads].reshape(len(k), self.share * x.shape[2], size), k, v))
        return split

    def _stack(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """(b l, H, E) of table i -> (b K, share x l, E), as the queries lie."""
        table = self.tables[i]
        x = x.view(*table.shape, self.heads, x.shape[-1]).transpose(1, 2)
        return x.reshape(len(table) * self.kv_heads, self.share * table.shape[1], x.shape[-1])

    def _probs(self, i: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.biases[i], q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(dim=-1)

    def _place(self, out: torch.Tensor, i: int, x: torch.Tensor) -> None:
        """Write (b, heads, l, E) of table i, stacked or not, into (N, heads, E)."""
        table = self.tables[i]
        rows = x.reshape(len(table), out.shape[1], table.shape[1], out.shape[2]).transpose(1, 2).flatten(0, 1)[self.real[i]]
        out.index_copy_(0, table.flatten()[self.real[i]], rows)


def _forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    layout: Layout,
    weights: list[torch.Tensor | None],
    keep: list[torch.Tensor] | None,
    keep_cache: list | None,
) -> tuple[torch.Tensor, _Attention]:
    """Hidden states after the last norm; `keep` takes what the gradient needs."""
    config, dtype = model.config, weights[0].dtype
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    attention = _Attention(layout, heads, kv_heads, dtype)
    cos, sin = rotary(model, layout.positions)
    x = F.embedding(ids, weights[0]).float()  # (N, D), the residual stream
    for i in range(config.num_hidden_layers):
        norm, q, k, v, *biases, out, mlp_norm, gate, up, down = weights[1 + PER_LAYER * i : 1 + PER_LAYER * (i + 1)]
        scale = rms_scale(x, eps)
        bias = torch.cat(biases) if biases[0] is not None else None
        qkv = F.linear(normed(x, scale, norm), torch.cat([q, k, v]), bias).view(len(x), heads + 2 * kv_heads, -1)
        qkv[:, : heads + kv_heads] = rotate(qkv[:, : heads + kv_heads], cos, sin)
        attended = attention.forward(qkv)
        after = x + F.linear(attended, out)
        mlp_scale = rms_scale(after, eps)
        y = normed(after, mlp_scale, mlp_norm)
        gated, upped = F.linear(y, gate), F.linear(y, up)
        if keep is not None:
            keep += [x, scale, qkv, attended, after, mlp_scale, gated, upped]
        if keep_cache is not None:
            keep_cache.append(qkv[:, heads:])
        x = after + F.linear(F.silu(gated).mul_(upped), down)
    scale = rms_scale(x, eps)
    if keep is not None:
        keep += [x, scale, cos, sin]
    return normed(x, scale, weights[-1]), attention


class _PackedHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, ids, layout, *weights):
        keep: list[torch.Tensor] = []
        hidden, ctx.attention = _forward(model, ids, layout, weights, keep, None)
        ctx.ids, ctx.weights = ids, weights
        ctx.save_for_backward(*keep)
        return hidden

    @staticmethod
    def backward(ctx, grad):
        weights, dtype, attention = ctx.weights, grad.dtype, ctx.attention
        *saved, x, scale, cos, sin = ctx.saved_tensors
        grads: list[torch.Tensor | None] = [None] * len(weights)
        of_x, grads[-1] = _norm_backward(grad, x, scale, weights[-1])  # (N, D) float32, of the residual stream
        rotated = attention.heads + attention.kv_heads
        for i in reversed(range(len(saved) // 8)):
            norm, q, k, v, *biases, out, mlp_norm, gate, up, down = weights[1 + PER_LAYER * i : 1 + PER_LAYER * (i + 1)]
            x, scale, qkv, attended, after, mlp_scale, gated, upped = saved[8 * i : 8 * (i + 1)]
            # down(silu(gate(y)) * up(y)), y = normed(after)
            of_out = of_x.to(dtype)
            silu = F.silu(gated)
            of_product = of_out @ down
            of_gate_up = torch.empty(len(x), 2 * gated.shape[1], dtype=dtype, device=x.device)
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
