"""The check of a model before training, on models that once trained on wrong log-probs without a word."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    MptConfig,
    Phi3Config,
    RwkvConfig,
)

import train
from benchmarks.models import ARCHITECTURES, try_out
from src import console_lines
from src.engine import architecture, kernels, llama, self_check
from src.engine.general_decoder import GeneralDecoder
from src.engine.master_weights import MasterWeights
from src.engine.self_check import check_model, compare, make_up, special_lengths
from src.errors import InputError
from src.models import frozen_copy
from tests.conftest import ROOT, make_policy

ARGS = SimpleNamespace(
    model_name="x", temperature=0.8, max_length=160, max_new_tokens=None, rollouts_per_step=2, group_size=4
)
MODELS_PAGE = (ROOT / "docs/models.md").read_text()
PROMPTS = [tuple(range(5, 30)), tuple(range(40, 60))]
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8,
    original_max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "GPT-Neo": GPTNeoConfig(
        vocab_size=259, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, window_size=64,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=512, eos_token_id=2,
        bos_token_id=1,
    ),
    "MPT": MptConfig(vocab_size=259, d_model=64, n_heads=4, n_layers=2, max_seq_len=512),
    "BLOOM": BloomConfig(vocab_size=259, hidden_size=64, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=1),
    "Falcon": FalconConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False, eos_token_id=2, bos_token_id=1,
    ),
    "LongRoPE": Phi3Config(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=64,
        pad_token_id=0, eos_token_id=2, bos_token_id=1, rope_parameters=LONGROPE,
    ),
    "RWKV": RwkvConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=2, context_length=512, eos_token_id=2,
        bos_token_id=1,
    ),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """A random model whose distributions are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 5
    return model


def save(name: str, tokenizer, folder) -> str:
    model = build(name)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["GPT-Neo", "MPT", "BLOOM", "Falcon"])
def test_a_model_that_cannot_be_packed_is_trained_without_packing(name, tiny, tokenizer, tmp_path, capsys):
    """GPT-Neo and MPT once trained on log-probs that were 4 nats off; the other two ended in a ValueError."""
    model = build(name)
    assert architecture.can_pack(model)
    packed = compare(model, PROMPTS, ARGS)
    assert max(packed.trainer) > 0.5 and max(packed.sampler) < 2e-5
    check_model(model, PROMPTS, ARGS)
    assert not architecture.can_pack(model) and not architecture.can_pack(frozen_copy(model))
    alone = compare(model, PROMPTS, ARGS)
    assert max(alone.trainer + alone.sampler) < 2e-5
    capsys.readouterr()
    run = train.main(**tiny | dict(model_name=save(name, tokenizer, tmp_path / "model"), max_steps=1))
    out = capsys.readouterr().out
    assert "each completion is computed in a row of its own: packed, they differ by" in out
    gap = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["policy/sampler_gap"]
    assert gap < 0.05


def test_angles_that_depend_on_the_length_are_refused_with_the_length_up_to_which_they_agree():
    """The cache keeps keys that were rotated for short sequences, so log-probs were up to 9 nats wrong."""
    message = r"^--model-name x: its log-probs differ .* nats in sampling .*wrong numbers; up to 64 tokens"
    with pytest.raises(InputError, match=message + " they agree: use --max-length 64, or another model"):
        check_model(build("LongRoPE"), PROMPTS, ARGS)
    check_model(build("LongRoPE"), PROMPTS, SimpleNamespace(**vars(ARGS) | {"max_length": 64}))


def test_a_model_that_cannot_be_sampled_from_is_refused_before_training(tiny, tokenizer, tmp_path):
    folder = save("RWKV", tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match=rf"^--model-name {re.escape(folder)}: .*use another model$"):
        train.main(**tiny | dict(model_name=folder))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_healthy_model_passes_and_keeps_its_fast_paths(dtype, capsys):
    model = make_policy()
    MasterWeights(model, dtype)
    supported = llama.is_supported(model)
    check_model(model, PROMPTS, ARGS)
    assert architecture.can_pack(model) and llama.is_supported(model) == supported
    assert "log-probs differ from the model's own forward pass by" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["sampler", "trainer", "both", "nan"])
def test_a_fault_of_either_side_is_found(fault, monkeypatch):
    model = make_policy()
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    if fault in ("sampler", "both", "nan"):
        real = GeneralDecoder.step
        wrong = torch.nan if fault == "nan" else torch.linspace(0, 1, 259)
        monkeypatch.setattr(GeneralDecoder, "step", lambda self, token: real(self, token) + wrong)
    if fault in ("trainer", "both"):
        real_log_probs = self_check.completion_log_probs
        monkeypatch.setattr(self_check, "completion_log_probs", lambda *a: real_log_probs(*a) - 0.01)
    with pytest.raises(InputError, match="use another model"):
        check_model(model, PROMPTS, ARGS)
    gaps = compare(model, PROMPTS, ARGS)
    assert (max(gaps.sampler) > gaps.tolerance) == (fault != "trainer")
    assert (max(gaps.trainer) > gaps.tolerance) == (fault in ("trainer", "both"))


@pytest.mark.parametrize("tried", ARCHITECTURES, ids=lambda tried: tried.name)
def test_each_architecture_is_trained_or_refused_as_the_documents_say(tried):
    (line,) = re.findall(rf"^\| {re.escape(tried.name)} \| .*$", MODELS_PAGE, re.M)
    how, why, gap = try_out(tried)
    if how == "packed rows" and not kernels.are_compiled():
        how = "compiled kernels" if "compiled kernels" in line else how
    assert line.split(" | ")[2].startswith(how)
    assert (gap is None) == (how == "refused") == bool(why)
    assert gap is None or gap < 2e-5


def test_every_number_in_a_configuration_may_be_a_length():
    config = SimpleNamespace(
        to_dict=lambda: {"window": 64, "sub": {"sizes": [100, 3]}, "flag": True, "rate": 50.0, "big": 10**6}
    )
    assert special_lengths(SimpleNamespace(config=config), 512) == [64, 100]
    assert special_lengths(SimpleNamespace(config=config), 100) == [64]


def test_made_up_completions_differ_and_end_where_they_should():
    samples = make_up([[1, 2, 3], [4]], list(range(10, 40)), [8, 5])
    assert samples.sequence_ids.shape == (4, 8) and samples.group_size == 2
    assert samples.lengths.tolist() == [5, 4, 4, 3]
    assert samples.attention_mask.sum(1).tolist() == [8, 7, 5, 4]
    assert samples.sequence_ids[0].tolist() == [1, 2, 3, 10, 11, 12, 13, 14]
    assert samples.sequence_ids[1, 3] == 11


def test_a_large_sampler_gap_is_a_warning_that_says_what_to_do(capsys):
    for dtype, way_out in (("bfloat16", "use --dtype float32"), ("float32", "please report")):
        console_lines._said_gap = False
        console_lines.warn_if_gap(3, {"policy/sampler_gap": 0.099}, dtype)
        assert capsys.readouterr().out == ""
        for _ in range(2):
            console_lines.warn_if_gap(3, {"policy/sampler_gap": 0.31}, dtype)
        out = capsys.readouterr().out
        assert out.count("warning") == 1 and "0.31 nats in step 3" in out and way_out in out
