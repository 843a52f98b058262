"""The CUDA path for Llama-like models, run on a CPU with naive attention in place of FlashAttention."""

import pytest
import torch

from src import models
from src.engine import architecture, cuda_llama, llama, static_decoder
from src.engine.cuda_decoder import GraphDecoder
from src.engine.general_decoder import GeneralDecoder
from src.engine.logprobs import completion_log_probs, micro_batches
from tests.conftest import all_log_probs, as_samples, make_policy
from tests.test_decoder import MODELS
from tests.test_llama import LENGTHS, compare_with_each_sequence
from tests.test_logprobs import batch, naive
from tests.test_sampler import PROMPTS, run


def naive_attention(q, keys, values, ends, longest, causal, used=None):
    """One sequence at a time, from the definition."""
    outs = []
    query_ends, key_ends = (e.tolist() for e in ends)
    for i in range(len(query_ends) - 1):
        queries = q[query_ends[i] : query_ends[i + 1]].transpose(0, 1)  # (H, n, E)
        end = key_ends[i + 1] if used is None else key_ends[i] + int(used[i])
        k, v = (x[key_ends[i] : end].transpose(0, 1) for x in (keys, values))  # (K, m, E) each
        n, m, share = queries.shape[1], k.shape[1], len(queries) // len(k)
        assert n <= longest[0] and m <= longest[1]
        scores = queries @ k.repeat_interleave(share, 0).transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf)
        outs.append((scores.softmax(-1) @ v.repeat_interleave(share, 0)).transpose(0, 1))
    return torch.cat(outs), torch.zeros(1), torch.zeros(1), torch.zeros(1)


def naive_backward(d_out, q, kv, saved, ends, longest):
    with torch.enable_grad():
        q, kv = q.detach().requires_grad_(), kv.detach().requires_grad_()
        out = naive_attention(q, *kv.chunk(2, dim=1), ends, longest, True)[0]
        return torch.autograd.grad(out, (q, kv), d_out)


@pytest.fixture(autouse=True)
def on_a_pretended_gpu(monkeypatch):
    monkeypatch.setattr(cuda_llama, "flash_attention", naive_attention)
    monkeypatch.setattr(cuda_llama, "flash_attention_backward", naive_backward)
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    monkeypatch.setattr(cuda_llama, "is_supported", architecture.is_llama_like)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients_equal_those_of_each_sequence_by_itself(kind, lengths):
    model = MODELS[kind]()
    layout = cuda_llama.Layout.of(*lengths, torch.device("cpu"))
    compare_with_each_sequence(cuda_llama.packed_hidden, model, layout, lengths)


@pytest.mark.parametrize("variant", ["plain", "checkpointed", "lora"])
def test_log_probs_and_gradients_equal_the_plain_ones(variant):
    policy = make_policy()
    if variant == "lora":
        models.add_lora(policy, 2)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:  # zero at first, so the adapter would change nothing
                torch.nn.init.normal_(weight, std=0.2)
    ids, mask, actions = batch()
    plain = naive(policy, ids, mask, actions, 0.7)
    trained = [p for p in policy.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain.square().sum(), trained)
    if variant == "checkpointed":
        models.checkpoint_activations(policy)
    ours = all_log_probs(policy, as_samples(ids, mask, actions, 2), 0.7, 3)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), trained), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "llama3 positions", "qwen2", "lora"])
@torch.no_grad()
def test_the_graph_decoder_computes_the_logits_of_the_general_one(kind):
    model = make_policy() if kind in ("plain", "lora") else MODELS[kind]()
    if kind == "lora":
        models.add_lora(model, 2)
    general, ours = GeneralDecoder(model), GraphDecoder(model, 3 * len(PROMPTS) + 2, 32)
    for _ in range(2):  # the second batch finds the cache filled
        torch.testing.assert_close(
            ours.prefill(PROMPTS, 3, 0), general.prefill(PROMPTS, 3, 0), atol=1e-4, rtol=1e-4
        )
        for token in range(5, 12):
            tokens = torch.arange(token, token + 3 * len(PROMPTS))
            torch.testing.assert_close(ours.step(tokens), general.step(tokens), atol=1e-4, rtol=1e-4)


def test_the_log_probs_of_sampling_are_those_of_training(policy, monkeypatch):
    monkeypatch.setattr(static_decoder, "can_compile", lambda model: True)
    samples = run(policy, max_new_tokens=12)
    ours = all_log_probs(policy, samples, 0.8)
    torch.testing.assert_close(ours, samples.log_probs, atol=1e-4, rtol=1e-4)


def test_a_pass_reads_the_prompt_once_and_no_padding(policy, monkeypatch):
    seen = []
    original = cuda_llama.packed_hidden
    monkeypatch.setattr(
        cuda_llama,
        "packed_hidden",
        lambda model, ids, layout: seen.append(ids) or original(model, ids, layout),
    )
    ids, mask, actions = batch()
    samples = as_samples(ids, mask, actions, 2)
    (part,) = micro_batches(policy, samples, torch.arange(2), 64)
    completion_log_probs(policy, samples, part, 1.0)
    assert seen[0].tolist() == [*ids[0, :3].tolist(), *ids[1, 3:4].tolist(), *ids[0, 3:8].tolist()]
