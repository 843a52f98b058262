"""The CUDA path on the meta device: no numbers, but the same blocks of memory as on a GPU."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from src import models
from src.engine import architecture, cuda_llama, llama, token_log_probs
from src.engine.sampler import Samples

META = torch.device("meta")


# What torch.compile makes of `cuda_llama`'s operations: a single kernel, of which only these tensors remain.


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, delta, weight, eps):
        total = x if delta is None else torch.empty_like(x)
        ctx.save_for_backward(total, weight)
        return total, torch.empty_like(x, dtype=weight.dtype)

    @staticmethod
    def backward(ctx: Any, d_total, d_y):
        total, weight = ctx.saved_tensors
        d_delta = torch.empty_like(d_y) if ctx.needs_input_grad[1] else None
        return torch.empty_like(total), d_delta, torch.empty_like(weight), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up):
        ctx.save_for_backward(gate_up)
        return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)

    @staticmethod
    def backward(ctx: Any, d_out):
        return torch.empty_like(ctx.saved_tensors[0])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, cos, sin, kv_heads):
        return torch.empty_like(qkv)

    @staticmethod
    def backward(ctx: Any, d_out):
        return torch.empty_like(d_out), None, None, None


def attention(q, keys, values, ends, longest, causal, used=None):
    """FlashAttention's results and the log-sum-exp that it keeps."""
    return torch.empty_like(q), torch.empty(q.shape[1], len(q), device=META), torch.empty(2), torch.empty(0)


def attention_backward(d_out, q, kv, saved, ends, longest):
    """FlashAttention 2's gradients.

    It sums those of the queries in float32 and, if several query heads share a key, computes the keys' and
    values' for each query head (flash_api.cpp, mha_varlen_bwd: dq_accum, dk_expanded, dv_expanded).
    """
    keys, heads, head_dim = len(kv), q.shape[1], q.shape[2]
    sums = torch.empty(len(q), heads, head_dim, device=META)
    expanded = torch.empty(2, keys, heads, head_dim, dtype=q.dtype, device=META)
    d_q, d_keys, d_values = torch.empty_like(q), *torch.empty_like(kv).chunk(2, dim=1)
    del sums, expanded
    return d_q, torch.cat([d_keys, d_values], dim=1)


def joined(*weights: torch.Tensor) -> torch.Tensor:
    """`linear.cat_weights` of weights that `architecture.join_weights` has made adjacent."""
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), (weights[0].shape[1], 1))


def head(weight: torch.Tensor, bias: torch.Tensor | None):
    return lambda hidden: torch.empty(len(hidden), len(weight), device=META)


@pytest.fixture
def meta_gpu(monkeypatch):
    """Make `cuda_llama` run models on the meta device."""
    monkeypatch.setattr(cuda_llama, "add_norm", _AddNorm.apply)
    monkeypatch.setattr(cuda_llama, "swiglu", _SwiGLU.apply)
    monkeypatch.setattr(cuda_llama, "rotate", _Rotate.apply)
    monkeypatch.setattr(cuda_llama, "flash_attention", attention)
    monkeypatch.setattr(cuda_llama, "flash_attention_backward", attention_backward)
    monkeypatch.setattr(cuda_llama, "cat_weights", joined)
    monkeypatch.setattr(token_log_probs, "make_head", head)
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    monkeypatch.setattr(cuda_llama, "is_supported", architecture.is_llama_like)


def make_policy(config: LlamaConfig, lora_rank: int, checkpointing: bool) -> PreTrainedModel:
    """A policy on the meta device, in float32."""
    with META:
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if lora_rank:
        models.add_lora(policy, lora_rank)
    if checkpointing:
        models.checkpoint_activations(policy)
    return policy


def on_meta(samples: Samples) -> Samples:
    """The samples on the meta device, which remember their copy in host memory."""
    moved = samples.to(META)
    vars(moved)["_copy_on_host"] = samples
    return moved
