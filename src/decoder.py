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

from src import llama
from src.logprobs import head_logits, head_weight

PREFILL_TOKENS = 4096  # of prompts read at once
# Sharing prompts pays where it saves more columns of the cache than joining two parts of attention costs, in columns:
SHARED_COST, SHARED_COST_OF_A_ROW = 1800, 50


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
    return LlamaDecoder(model, rows, columns) if llama.fits(model) else GeneralDecoder(model)


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
    of them. Equal to the general forward up to rounding (tests/test_decoder.py), and rounded where `llama.packed_hidden` is, so
    that training finds the log-probs that were sampled from.

    While many rows share a prompt, so do they its keys and values: attention to the prompt and to the completion are two
    calls, whose results are joined by their logsumexps.
    """

    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        config, inner = model.config, model.model
        self.model, self.columns = model, columns
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = inner.layers[0].self_attn.head_dim
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
        self.eps = config.rms_norm_eps
        self.head = head_weight(model.lm_head.weight)
        self.cos, self.sin = llama.rotary(model, torch.arange(columns))  # (columns, 1, D)

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        lengths = [len(ids) for ids in prompt_ids]
        longest, together = max(lengths), max(1, PREFILL_TOKENS // max(lengths))
        # Of each layer, keys and values of the Q prompts, which end in one column; left of them is what masks leave out.
        prompts = self._new_cache(len(lengths), longest)
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
                for cache, keys_values in zip(prompts, read, strict=True):
                    kv = keys_values[end - length : end].view(length, 2, self.kv_heads, self.head_dim)
                    cache[:, q, :, longest - length :] = kv.permute(1, 2, 0, 3)
                    cache[:, q, :, : longest - length] = 0  # masked, but 0 x nan would be nan
        self.prompt_of = torch.arange(len(lengths)).repeat_interleave(group_size)  # (B,)
        self.positions = torch.tensor(lengths)[self.prompt_of]  # (B,) where the next token goes
        padding = longest - torch.tensor(lengths)
        # Added to the attention scores where prompts are padded: (Q, 1, 1, P) while they are shared, then (n, 1, 1, columns).
        self.bias = None
        if int(padding.max()):
            padded = torch.arange(longest) < padding[:, None]
            self.bias = torch.zeros(len(lengths), 1, 1, longest, dtype=self.model.dtype)
            self.bias[:, 0, 0].masked_fill_(padded, -torch.inf)
        self.cache, self.filled, self.prompts = self._new_cache(len(self.prompt_of), self.columns - longest), 0, prompts
        self._share_prompts()
        return self._logits(torch.stack(last)).repeat_interleave(group_size, 0)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        n, column = len(token), self.filled
        self.filled += 1
        cos, sin = self.cos[self.positions], self.sin[self.positions]  # (n, 1, D)
        self.positions = self.positions + 1
        rotated = self.heads + self.kv_heads
        x = self.model.model.embed_tokens(token).float()  # (n, hidden_size), the residual stream
        for i, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self.layers):
            heads = qkv(llama.normed(x, llama.rms_scale(x, self.eps), norm)).view(n, rotated + self.kv_heads, self.head_dim)
            qk = llama.rotate(heads[:, :rotated], cos, sin)
            self.cache[i, 0, :n, :, column] = qk[:, self.heads :]
            self.cache[i, 1, :n, :, column] = heads[:, rotated:]
            x = x + out(self._attend(i, qk[:, : self.heads]).reshape(n, -1))
            gate, up = gate_up(llama.normed(x, llama.rms_scale(x, self.eps), mlp_norm)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        return self._logits(llama.normed(x, llama.rms_scale(x, self.eps), self.model.model.norm.weight))

    def keep(self, rows: torch.Tensor) -> None:
        self.cache[:, :, : len(rows), :, : self.filled] = self.cache[:, :, rows, :, : self.filled]
        self.positions, self.prompt_of = self.positions[rows], self.prompt_of[rows]
        if self.prompts is None:
            self.bias = None if self.bias is None else self.bias[rows]
        else:
            self._share_prompts()

    def _new_cache(self, rows: int, columns: int) -> torch.Tensor:
        """Of each layer, keys and values; its pages are taken as they are first written to."""
        return torch.empty(len(self.layers), 2, rows, self.kv_heads, columns, self.head_dim, dtype=self.model.dtype)

    def _share_prompts(self) -> None:
        """Arrange the rows by prompt, or give each a copy of its prompt's cache where sharing does not pay any longer."""
        n, longest = len(self.prompt_of), self.prompts.shape[-2]
        found, prompt_of, counts = self.prompt_of.unique_consecutive(return_inverse=True, return_counts=True)
        if (n - len(found)) * longest > SHARED_COST + SHARED_COST_OF_A_ROW * n:
            slot = torch.arange(n) - (counts.cumsum(0) - counts)[prompt_of]  # of each row among those of its prompt
            width = int(counts.max())
            self.slots = prompt_of * width + slot  # (n,), its place in (Q x width)
            self.rows = torch.zeros(len(found) * width, dtype=torch.long)  # the row of each place; 0 where there is none
            self.rows[self.slots] = torch.arange(n)
            if len(found) < self.prompts.shape[2]:
                self.prompts, self.prompt_of = self.prompts[:, :, found], prompt_of
                self.bias = None if self.bias is None else self.bias[found]
            return
        whole = self._new_cache(n, self.columns)
        whole[..., :longest, :] = self.prompts[:, :, self.prompt_of]
        whole[..., longest : longest + self.filled, :] = self.cache[:, :, :n, :, : self.filled]
        self.cache, self.filled, self.prompts = whole, longest + self.filled, None
        if self.bias is not None:
            zeros = self.bias.new_zeros(n, 1, 1, self.columns - longest)
            self.bias = torch.cat([self.bias[self.prompt_of], zeros], dim=-1)

    def _attend(self, i: int, q: torch.Tensor) -> torch.Tensor:
        """Attention of layer i for queries (n, H, E) -> (n, H, E)."""
        n, share = len(q), self.heads // self.kv_heads
        keys, values = self.cache[i, :, :n, :, : self.filled]
        if self.prompts is None:
            bias = None if self.bias is None else self.bias[..., : self.filled]
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=bias, enable_gqa=True)[:, :, 0]
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what the above calls; it returns logsumexps too
        own, own_sum = attention(q[:, :, None], keys, values)
        prompt_keys, prompt_values = self.prompts[i]
        # A prompt's queries lie below each other: (Q, K, width x share, E).
        stacked = q[self.rows].view(len(prompt_keys), -1, self.kv_heads, share, self.head_dim).transpose(1, 2).flatten(2, 3)
        front, front_sum = (
            x.unflatten(2, (-1, share)).transpose(1, 2).reshape(len(self.rows), self.heads, -1)[self.slots]
            for x in attention(stacked, prompt_keys, prompt_values, attn_mask=self.bias)
        )
        return torch.lerp(own[:, :, 0].float(), front.float(), (front_sum - own_sum).sigmoid_()).to(q.dtype)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_logits(hidden, self.head, self.model.lm_head.bias)


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
