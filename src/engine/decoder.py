"""Decoders compute the next token's logits for every row of a batch; the sampler calls them in a loop.

`GeneralDecoder` supports any Hugging Face causal language model and uses the model's own cache.
`LlamaDecoder` computes the same logits faster for Llama-like models on a CPU. There, the general forward pass
spends most of each step outside the matrix products: it copies the prompt's cache for every completion,
copies the cache again whenever it grows, expands the key and value heads, makes oneDNN rearrange every weight
for every product, and builds a mask in every layer. On a GPU, `static_decoder` replays a captured step.
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from src.engine import kernels, llama
from src.engine.linear import Linear, PackedWeight, cat_biases, cat_weights, make_head, make_linear

CHECK_EVERY = 16  # tokens between checks for finished rows, for each of which the host waits for a GPU
PREFILL_TOKENS = 4096  # prompts are read in batches of about this many tokens


class Decoder(Protocol):
    """Computes the logits of the next token for every row of a batch."""

    check_every: int  # steps between checks for finished rows; on a GPU, a check waits for the device
    can_drop_rows: bool  # whether `keep` is supported

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        """Read each of Q prompts once, and start a batch in which each row has its prompt's cache.

        Returns:
            The logits (Q x group_size, V) of each completion's first token, with the rows of a prompt next to
            each other.
        """

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Append a token (n,) int64 to every row, and return the logits (n, V) of the next token."""

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows: (m,) int64, in increasing order."""


class _Layer(NamedTuple):
    norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class LlamaDecoder:
    """A decoder for Llama-like models on a CPU, with compiled kernels and weights laid out for many steps.

    It copies the weights when it is created, so create a new decoder after they change. Its logits equal
    those of the general forward pass up to rounding (tests/test_decoder.py). It rounds at the same points as
    `llama.packed_hidden`, so training computes the same log-probs that the tokens were sampled from.

    Args:
        model: A model for which `llama.is_supported` is true.
        rows: Maximum number of rows in a batch.
        columns: Maximum number of tokens in a row, including its prompt.
    """

    check_every, can_drop_rows = 1, True

    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        self.model, self.columns, self.eps = model, columns, model.config.rms_norm_eps
        self.layers = [
            _Layer(
                norm=layer.input_layernorm.weight,
                qkv=_linear(rows, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                out=_linear(rows, layer.self_attn.o_proj),
                mlp_norm=layer.post_attention_layernorm.weight,
                gate_up=_linear(rows, layer.mlp.gate_proj, layer.mlp.up_proj),
                down=_linear(rows, layer.mlp.down_proj),
            )
            for layer in model.model.layers
        ]
        self.head = make_head(model.lm_head.weight, model.lm_head.bias)
        self.cos, self.sin = llama.rotary(model, torch.arange(columns))  # (columns, E)

    def prefill(self, prompt_ids: list[list[int]], group_size: int, pad_id: int) -> torch.Tensor:
        lengths = [len(ids) for ids in prompt_ids]
        self.cache = kernels.Cache(
            layers=len(self.layers),
            kv_heads=self.model.config.num_key_value_heads,
            head_dim=self.model.model.layers[0].self_attn.head_dim,
            prompt_lengths=lengths,
            group_size=group_size,
            columns=self.columns - max(lengths),
            dtype=self.model.dtype,
        )
        at_once = max(1, PREFILL_TOKENS // max(lengths))
        hidden = [
            self._read_prompts(prompt_ids[first : first + at_once], first)
            for first in range(0, len(prompt_ids), at_once)
        ]
        self.positions = torch.tensor(lengths).repeat_interleave(group_size)  # (n,), of each row's next token
        return self.head(torch.cat(hidden)).repeat_interleave(group_size, 0)

    def _read_prompts(self, prompt_ids: list[list[int]], first: int) -> torch.Tensor:
        """Read some of the prompts into the cache.

        Args:
            prompt_ids: q prompts.
            first: Index of the first of these prompts in the batch.

        Returns:
            The hidden states (q, D) of the prompts' last tokens.
        """
        lengths = [len(ids) for ids in prompt_ids]
        layout = llama.Layout.of(lengths, [[] for _ in lengths])
        flat = torch.tensor([i for ids in prompt_ids for i in ids])
        cache: list[torch.Tensor] = []  # each layer's keys and values
        with torch.no_grad():
            hidden = llama.packed_hidden(self.model, flat, layout, cache)
        for layer, keys_values in enumerate(cache):
            for prompt, part in enumerate(keys_values.split(lengths), start=first):
                self.cache.put_prompt(layer, prompt, part)
        return hidden[torch.tensor(lengths).cumsum(0) - 1]

    def step(self, token: torch.Tensor) -> torch.Tensor:
        n = len(token)
        x, delta = self.model.model.embed_tokens(token).float(), None  # (n, D), the residual stream
        for i, layer in enumerate(self.layers):
            x, y, _ = kernels.add_norm(x, delta, layer.norm, self.eps)
            qkv = layer.qkv(y).view(n, -1, self.cache.head_dim)
            attended = self.cache.attend(i, qkv, self.cos, self.sin, self.positions)
            x, y, _ = kernels.add_norm(x, layer.out(attended), layer.mlp_norm, self.eps)
            delta = layer.down(kernels.swiglu(layer.gate_up(y)))
        self.cache.advance()
        self.positions = self.positions + 1
        return self.head(kernels.add_norm(x, delta, self.model.model.norm.weight, self.eps)[1])

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows]


def _linear(rows: int, *parts: nn.Linear) -> Linear:
    """Combine linear layers with the same input into one function, with their outputs side by side.

    The weights are joined and laid out once, by `PackedWeight` if it can. Otherwise, bfloat16 weights are
    laid out for oneDNN's kernel, with the operation that torch.compile's CPU backend also uses. Ordinary
    bfloat16 products lay out the weights again in every call, which takes 1.5 times as long for 1 to 64 rows.
    """
    weight = cat_weights(*(p.weight.detach() for p in parts))
    bias = cat_biases(*(p.bias for p in parts))
    onednn = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if PackedWeight.supports(weight) or not onednn:
        return make_linear(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
