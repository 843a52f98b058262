"""The CUDA path without a GPU: what its kernels move and compute, and when the host waits for the device."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from benchmarks import counting
from benchmarks.counting import Allocations, count_traffic
from benchmarks.fake_gpu import fake_cuda, fake_model, load_guard, on_device
from benchmarks.gpu_counts import count_decode, count_update
from benchmarks.memory import TINYLLAMA
from src.engine import cuda_llama, static_decoder
from src.engine.cuda_decoder import GraphDecoder
from src.engine.logprobs import completion_log_probs, micro_batches
from src.engine.sampler import Sampling, sample
from src.engine.static_decoder import StaticDecoder
from src.reward_model import AceRewardModel
from tests.conftest import as_samples

META, CUDA = torch.device("meta"), torch.device("cuda")
TINY = dict(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


@pytest.fixture(scope="module", autouse=True)
def guard():
    try:
        load_guard()
    except RuntimeError as error:
        pytest.skip(f"fake tensors cannot be on the device cuda: {error}")


# ----------------------------------------------------------------------------------------------------------
# The counting itself, against hand-worked cases


def test_a_product_is_counted_by_hand():
    a, b = torch.empty(4, 8, device=META), torch.empty(8, 16, device=META)
    with count_traffic("meta") as traffic:
        (a.view(2, 2, 8)[0:1].flatten(0, 1) @ b).t()  # only the product runs a kernel
    assert list(traffic.kernels) == ["mm"]
    assert traffic.total.launches == 1
    assert traffic.total.bytes == 4 * (2 * 8 + 8 * 16 + 2 * 16)
    assert traffic.total.operations == 2 * 2 * 8 * 16
    assert traffic.total.seconds == pytest.approx(traffic.total.bytes / counting.MEMORY_RATE)


def test_a_lookup_reads_only_the_rows_that_it_selects():
    weight, ids = torch.empty(1000, 10, device=META), torch.zeros(3, dtype=torch.long, device=META)
    with count_traffic("meta") as traffic:
        torch.nn.functional.embedding(ids, weight)
        weight[ids] = torch.empty(3, 10, device=META)
    assert traffic.kernels["embedding"].bytes == 3 * 8 + 2 * 120
    assert traffic.kernels["index_put_"].bytes == 2 * (3 * 8 + 120)


def test_each_wait_of_the_host_is_counted_and_host_tensors_have_values():
    with fake_cuda(), count_traffic("cuda", answers=7) as traffic:
        on_host = torch.tensor([1, 2])
        assert on_host.tolist() == [1, 2] and int(on_host.sum()) == 3
        there = on_host.to("cuda")
        assert there.device.type == "cuda"
        assert int(there.max()) == 7 and bool((there > 0).any())
        there.cpu()
        with pytest.raises(RuntimeError, match="two devices"):
            there + on_host
    assert (traffic.reads, traffic.uploads) == (3, 1)


def test_allocations_are_counted_until_they_are_freed():
    existing = torch.empty(1000, device=META)
    with Allocations([existing]) as allocations:
        a = torch.empty(10, device=META)
        b = (existing[:50] + 1).view(5, 10)
        assert allocations.now == 40 + 200
        del b
        assert allocations.now == 40
        c = a[:5]
        del a
        assert allocations.now == 40
        del c
    assert (allocations.now, allocations.peak) == (0, 240)


# ----------------------------------------------------------------------------------------------------------
# TinyLlama at its real size


def test_a_decode_step_moves_little_more_than_the_weights_and_the_cache():
    """64 rows of 512 columns. An earlier decoder moved 5.9 times as much, because it expanded the keys."""
    traffic, weights_and_cache = count_decode(rows=64, columns=512)
    assert 1.0 < traffic.total.bytes / weights_and_cache < 1.05
    # FlashAttention divides the keys among blocks of threads and combines them in a second kernel.
    attention = traffic.kernels["_flash_attention_forward"].launches
    assert attention == TINYLLAMA.num_hidden_layers
    assert traffic.total.launches + attention < 250
    assert traffic.reads == traffic.uploads == 0


@pytest.mark.parametrize("completions", [8, 16])
def test_an_update_pass_is_limited_by_its_products(completions):
    """With the default settings, a pass has 8 completions, and each takes an optimizer step."""
    traffic, utilization = count_update(completions, completions, prompt=42, completion=470)
    assert utilization > 0.5
    assert traffic.kernels["mm"].seconds > 0.7 * traffic.total.seconds
    assert traffic.reads == 0


# ----------------------------------------------------------------------------------------------------------
# Where the host waits for the device


@pytest.mark.parametrize("sampling", ["sampled", "top_p", "greedy"])
def test_a_rollout_reads_back_once_for_every_16_tokens(sampling):
    """Greedy decoding is what an evaluation does."""
    settings = {"sampled": (0.8, 1.0), "top_p": (0.8, 0.9), "greedy": (0.0, 1.0)}[sampling]
    reads = {}
    with fake_cuda():
        model = fake_model(LlamaConfig(**TINY), AutoModelForCausalLM)
        assert cuda_llama.is_supported(model)
        for tokens in (16, 32):
            limits = Sampling(*settings, 100, tokens, [2])
            with count_traffic("cuda", answers=tokens) as traffic:
                samples = sample(model, PROMPTS, 2, limits, None)
            assert samples.sequence_ids.shape[0] == 4
            reads[tokens] = traffic.reads
            static_decoder.release()
    assert reads[32] - reads[16] == 1
    assert reads[32] <= 32 / 16 + 4


def test_a_decode_step_of_any_model_reads_nothing_back():
    with fake_cuda(), torch.no_grad():
        llama = fake_model(LlamaConfig(**TINY), AutoModelForCausalLM)
        graph = GraphDecoder(llama, 4, 64)
        other = fake_model(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4), AutoModelForCausalLM)
        static = StaticDecoder(other, 4, 64)
        static._compile = lambda arguments: setattr(static, "_step", static._forward)
        for decoder in (graph, static):
            decoder.prefill(PROMPTS, 2, 0)
            token = torch.zeros(4, dtype=torch.long, device="cuda")
            decoder.step(token)
            with count_traffic("cuda") as traffic:
                logits = decoder.step(token)
            assert logits.shape == (4, 300)
            assert traffic.reads == traffic.uploads == 0


def test_a_pass_of_the_reference_reads_nothing_back():
    rows, length = 16, 30
    actions = torch.arange(length - 1).expand(rows, -1) >= 9
    ids, real = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.bool)
    with fake_cuda(), torch.no_grad():
        model = fake_model(LlamaConfig(**TINY), AutoModelForCausalLM)
        samples = on_device(as_samples(ids, real, actions, 8), CUDA)
        with count_traffic("cuda") as traffic:
            for part in micro_batches(model, samples, torch.arange(rows), 8):
                log_probs = completion_log_probs(model, samples, part, 0.8)
                assert log_probs.shape == (8, length - 1)
    assert traffic.reads == 0


def test_a_batch_of_the_reward_model_reads_back_only_its_scores():
    with fake_cuda(), torch.no_grad():
        reward_model = AceRewardModel.__new__(AceRewardModel)
        config = Qwen2Config(**TINY, num_labels=1)
        reward_model.model = fake_model(config, AutoModelForSequenceClassification)
        reward_model.config, reward_model.judges, reward_model.device = config, False, CUDA
        with count_traffic("cuda") as traffic:
            scores = reward_model._forward([(1, 2, 3), (4, 5)])
        assert scores.shape == (2,) and scores.device.type == "cpu"
    assert traffic.reads == 1


def test_the_reward_models_attention_needs_no_mask(reward_model_folder, monkeypatch):
    """With a mask, PyTorch could not use FlashAttention."""
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    AceRewardModel(str(reward_model_folder), dtype=torch.float32).score_texts("q", ["1", "a longer text"])
    assert masks == [(None, True)] * 2
