"""The fast decoders against the general one, which runs the model's own forward pass, on many models."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config, Qwen3Config

import train
from src.engine import decoder, kernels, llama, sampler
from src.engine.decoder import LlamaDecoder
from src.engine.general_decoder import GeneralDecoder
from src.engine.sampler import make_decoder
from tests.conftest import make_policy
from tests.test_sampler import PROMPTS, run

SMALL = dict(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.2,
)


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # These are initialized to zeros and ones, so forgetting one would not show.
            if name.endswith("bias") or "norm" in name:
                p.normal_()
    return model


MODELS = {
    "grouped heads": lambda: make_policy(),
    "several key heads": lambda: make_policy(num_attention_heads=8, num_key_value_heads=2, head_dim=16),
    "as many key heads": lambda: make_policy(num_key_value_heads=2),
    "tied": lambda: make_policy(tie_word_embeddings=True),
    "wide heads": lambda: make_policy(head_dim=32),
    "llama3 positions": lambda: make_policy(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "qwen2": lambda: build(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "mistral": lambda: build(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)),
}


@torch.no_grad()
def both(model, prompts=PROMPTS, group_size=3, steps=6, drop_at=3):
    """Logits of both decoders, step by step, for the same tokens.

    Some rows are dropped at step `drop_at`, and all rows of some prompts two steps later.
    """
    if os.environ.get("HYBRID_GRPO_KERNELS") == "0":
        pytest.skip("the fast decoder needs the compiled kernels")
    torch.manual_seed(1)
    rows = len(prompts) * group_size
    decoders = [GeneralDecoder(model), LlamaDecoder(model, rows, max(map(len, prompts)) + steps)]
    pairs = [tuple(d.prefill(prompts, group_size, 2) for d in decoders)]
    for step in range(steps):
        if step in (drop_at, drop_at + 2):
            keep = torch.tensor([0, 3, 4, 7, 8] if step == drop_at else [1, 2])[: max(1, rows // 2)]
            rows = len(keep)
            for d in decoders:
                d.keep(keep)
        token = torch.randint(3, 80, (rows,))
        pairs.append(tuple(d.step(token) for d in decoders))
    return pairs


@pytest.mark.parametrize("kind", MODELS)
def test_the_fast_decoder_equals_the_general_one(kind):
    model = MODELS[kind]()
    for general, fast in both(model):
        torch.testing.assert_close(fast, general, atol=1e-4, rtol=1e-5)
    assert isinstance(make_decoder(model, 1, 1), LlamaDecoder)


def test_completions_may_be_longer_than_a_block_of_keys():
    for general, fast in both(make_policy(), steps=40, drop_at=17):
        torch.testing.assert_close(fast, general, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 8])
def test_a_key_head_may_have_any_number_of_query_heads(heads):
    model = make_policy(num_attention_heads=heads, hidden_size=16 * heads)
    for general, fast in both(model, steps=3, drop_at=1):
        torch.testing.assert_close(fast, general, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head_dim", kernels.HEAD_SIZES)
def test_every_head_size_that_the_kernels_are_compiled_for_is_correct(head_dim):
    for general, fast in both(make_policy(head_dim=head_dim), steps=3, drop_at=1):
        torch.testing.assert_close(fast, general, atol=1e-4, rtol=1e-5)


def test_long_prompts_may_be_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 2 * max(map(len, PROMPTS)))
    for general, fast in both(make_policy()):
        torch.testing.assert_close(fast, general, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["grouped heads", "tied", "qwen2"])
def test_in_bfloat16_the_fast_decoder_is_about_as_close_to_float32_as_the_general_one(kind):
    """Both round. The fast one, with packed weights if possible, may have at most twice the error."""
    exact = [general for general, _ in both(MODELS[kind]())]
    errors = [
        [(logits.float() - expected).abs().mean() for logits in pair]
        for pair, expected in zip(both(MODELS[kind]().bfloat16()), exact, strict=True)
    ]
    general, fast = torch.tensor(errors).mean(dim=0)
    assert 0 < fast < 2 * general


def test_models_that_compute_something_else_use_the_general_decoder():
    others = {
        "another family": build(GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4)),
        "norms on queries and keys": build(Qwen3Config(**SMALL, num_key_value_heads=2)),
        "a sliding window": build(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)),
        "some sliding windows": build(
            Qwen2Config(
                **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
            )
        ),
        "biases everywhere": make_policy(attention_bias=True, mlp_bias=True),
        "another activation": make_policy(hidden_act="gelu"),
        "positions that depend on the length": make_policy(
            rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
        ),
    }
    others["heads of 8"] = make_policy(head_dim=8)
    adapted = make_policy()
    adapted.model.layers[1].mlp.up_proj = nn.Sequential(adapted.model.layers[1].mlp.up_proj)
    others["a layer around a projection"] = adapted
    from src.models import add_lora

    others["a LoRA adapter"] = make_policy()
    add_lora(others["a LoRA adapter"], 2)
    for kind, model in others.items():
        assert isinstance(make_decoder(model, 1, 1), GeneralDecoder), kind
        out = run(model, group_size=2, max_length=14, temperature=1.0)
        assert out.action_mask.any(), kind


def test_the_sampler_returns_the_same_with_either_decoder(policy, monkeypatch):
    policy.lm_head.weight.data[2] += 0.3  # rows finish at different times
    fast = run(policy, group_size=8)
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    general = run(policy, group_size=8)
    assert fast.completion_ids() == general.completion_ids()
    torch.testing.assert_close(fast.log_probs, general.log_probs, atol=1e-5, rtol=0)


def test_the_general_decoder_replaces_the_fast_one_without_a_compiler(policy, monkeypatch):
    fast = run(policy, group_size=2)
    monkeypatch.setattr(kernels, "libraries", lambda: None)
    assert isinstance(make_decoder(policy, 1, 1), GeneralDecoder)
    general = run(policy, group_size=2)
    assert fast.completion_ids() == general.completion_ids()
    torch.testing.assert_close(fast.log_probs, general.log_probs, atol=1e-5, rtol=0)


@torch.no_grad()
def static_logits(model, prompts=PROMPTS, group_size=3, steps=6, compiled=False):
    """Logits of the general and the static decoder, step by step, for the same tokens, in two batches."""
    from src.engine.static_decoder import StaticDecoder

    static, pairs = StaticDecoder(model, len(prompts) * group_size, 64), []
    if not compiled:
        static._step, static.compiled = static._forward, True
    for batch in range(2):
        torch.manual_seed(batch)
        decoders = [GeneralDecoder(model), static]
        pairs.append(tuple(d.prefill(prompts, group_size, 2) for d in decoders))
        for _ in range(steps):
            token = torch.randint(3, 80, (len(prompts) * group_size,))
            pairs.append(tuple(d.step(token) for d in decoders))
        model.lm_head.weight.data *= 1.1  # in place, as in training
        prompts = prompts[::-1]
    return pairs


@pytest.mark.parametrize("kind", ["grouped heads", "tied", "qwen2", "another family"])
def test_the_decoder_for_gpus_equals_the_general_one(kind):
    """Tested on a CPU, where it is not used otherwise. A graph replays the same step."""
    model = (
        build(GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4))
        if kind == "another family"
        else MODELS[kind]()
    )
    for general, static in static_logits(model):
        torch.testing.assert_close(static, general, atol=1e-4, rtol=1e-5)


def test_the_step_for_gpus_compiles_once_and_as_one_graph(capsys):
    """Two batches with different prompts and weights share one compilation.

    It uses fullgraph, so no part of the step returns to Python.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for general, static in static_logits(make_policy(), compiled=True):
        torch.testing.assert_close(static, general, atol=1e-4, rtol=1e-5)
    out = capsys.readouterr().out
    assert out.count("Compiling the decode step for 9 rows of 64 tokens") == 1
    assert "could not be compiled" not in out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_sampler_returns_the_same_with_the_decoder_for_gpus(policy, monkeypatch):
    """Finished rows stay in the batch, and the sampler checks for them only every few tokens."""
    from src.engine import static_decoder

    policy.lm_head.weight.data[2] += 0.3
    expected = run(policy, group_size=8)
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    monkeypatch.setattr(static_decoder, "can_compile", lambda model: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for _ in range(2):
        static = run(policy, group_size=8)
        assert static.completion_ids() == expected.completion_ids()
        assert torch.equal(static.finished, expected.finished)
        torch.testing.assert_close(static.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def test_the_decoder_for_gpus_is_reused_for_smaller_batches_and_replaced_only_for_larger_ones(
    policy, monkeypatch
):
    """Otherwise the last batch of every evaluation, and the batch after it, would wait for a compilation."""
    from src.engine import static_decoder

    policy.lm_head.weight.data[2] += 0.3
    group_sizes = [8, 2, 8, 9, 1]
    expected = [run(policy, group_size=group_size) for group_size in group_sizes]
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    monkeypatch.setattr(static_decoder, "can_compile", lambda model: True)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    for group_size, general in zip(group_sizes, expected, strict=True):
        static = run(policy, group_size=group_size)
        assert static.completion_ids() == general.completion_ids()
        torch.testing.assert_close(static.log_probs, general.log_probs, atol=1e-5, rtol=0)
    assert len(compiled) == 2
    assert static_decoder._saved_decoders[policy].max_rows == 9 * len(PROMPTS)
    longer = static_decoder.static_decoder(policy, 1, 1000)
    assert (longer.max_rows, longer.max_columns) == (9 * len(PROMPTS), 1024)


def test_the_warmup_compiles_the_decoder_that_the_rollouts_use(tiny, reward_model_folder, monkeypatch):
    """Otherwise a run would compile one for the few completions of the warmup, and soon another."""
    from src.engine import static_decoder

    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    monkeypatch.setattr(static_decoder, "can_compile", lambda model: True)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    settings = dict(reward_model_name=str(reward_model_folder), warmup_samples=3, max_steps=1)
    train.main(**tiny | settings)
    assert len(compiled) == 1


def test_the_general_decoder_checks_less_often_where_a_check_waits_for_a_device(policy, monkeypatch):
    policy.lm_head.weight.data[2] += 0.3
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    expected = run(policy, group_size=8)
    for device, every in (("cpu", 1), ("mps", 16), ("cuda", 16)):
        assert GeneralDecoder(SimpleNamespace(device=torch.device(device))).check_every == every

    class Rarely(GeneralDecoder):
        def __init__(self, model):
            super().__init__(model)
            self.check_every = 16

    monkeypatch.setattr(sampler, "GeneralDecoder", Rarely)
    ours = run(policy, group_size=8)
    assert ours.completion_ids() == expected.completion_ids()
    assert torch.equal(ours.finished, expected.finished)


def test_the_decoder_for_gpus_frees_its_cache_if_memory_runs_out_and_the_next_one_is_smaller(policy):
    from src.engine import static_decoder
    from src.engine.memory import fit_memory

    rows = []

    def attempt(size):
        rows.append(static_decoder.static_decoder(policy, size, 64).max_rows)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    assert fit_memory(attempt, 16) == (4, 4)
    assert rows == [16, 8, 4]


def test_can_compile_works_for_models_on_a_gpu(policy):
    """Tested without a GPU too: torch once moved a function that this calls, which broke all GPU runs."""
    from src.engine import static_decoder

    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, config=policy.config)
    assert static_decoder.can_compile(on_gpu) == torch.utils._triton.has_triton()
    assert not static_decoder.can_compile(policy)
