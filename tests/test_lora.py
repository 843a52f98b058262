"""LoRA: only the adapter changes and is saved, and the reference is the base. Also the reward modes."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import train
from src.engine.master_weights import MasterWeights
from src.errors import InputError
from src.models import add_lora, base_of, frozen_copy, load_policy
from tests.conftest import make_policy
from tests.test_train import metrics_of, rollouts_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_saves_its_adapter_and_finally_a_merged_model(
    tiny, policy_folder, reward_model_folder, capsys, dtype
):
    settings = dict(lora_rank=4, lr=1e-2, dtype=dtype, reward_model_name=str(reward_model_folder))
    run = train.main(**tiny | settings)
    assert "LoRA of rank 4" in capsys.readouterr().out
    assert not (run / "step_2/model.safetensors").exists()
    assert metrics_of(run)[0]["policy/updates"] == 2
    base = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    ids = torch.tensor([[1, 20, 21, 22]])
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run / "step_2")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    tolerance = dict(atol=1e-4, rtol=1e-4) if dtype == "float32" else dict(atol=0.1, rtol=0.05)
    torch.testing.assert_close(merged, adapted, **tolerance)
    assert json.loads((run / "config.json").read_text())["hyperparameters"]["lora_rank"] == 4


def test_a_lora_checkpoint_can_be_evaluated_and_trained_like_its_merged_model(
    tiny, policy_folder, reward_model_folder, recwarn
):
    rewarded = tiny | dict(reward_model_name=str(reward_model_folder))
    run = train.main(**rewarded | dict(lora_rank=4, lr=1e-2, dtype="float32"))
    checkpoint, merged = str(run / "step_2"), str(run / "merged")
    ids = torch.tensor([[1, 20, 21, 22]])
    a, b = (load_policy(folder, torch.device("cpu"))(ids).logits for folder in (checkpoint, merged))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (a - load_policy(str(policy_folder), torch.device("cpu"))(ids).logits).abs().max() > 1e-3
    settings = dict(eval_only=True, eval_data=tiny["data"], eval_samples=1, dtype="float32", run_name="eval")
    folder = train.main(**tiny | settings | dict(model_name=checkpoint, eval_against=merged))
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    a, b = ([row["completion"] for row in rows if row["model"] == name] for name in (checkpoint, merged))
    assert len(a) == 2 * 16 and a == b
    run = train.main(**rewarded | dict(model_name=checkpoint, lora_rank=2, run_name="more"))
    assert json.loads((run / "step_2/adapter_config.json").read_text())["r"] == 2
    assert (run / "merged/model.safetensors").exists()
    assert not [w for w in recwarn if "second time" in str(w.message)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"base_model_name_or_path": "/gone"},
            "--model-name /gone: no such folder.*is the base model of the LoRA adapter .*/adapter; merged/",
        ),
        ({}, "adapter: adapter_config.json names no base model"),
    ],
)
def test_an_adapter_without_its_base_is_refused(tmp_path, config, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        base_of(str(folder), "--model-name")


def test_only_the_adapter_is_trained_and_has_master_weights():
    policy = make_policy()
    untouched = frozen_copy(policy)
    add_lora(policy, 2)
    master = MasterWeights(policy, torch.bfloat16)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert len(master.parameters) == len(trained)
    assert all(p.dtype == torch.bfloat16 for p in policy.parameters())
    weights = dict(policy.named_parameters())
    for name, p in untouched.named_parameters():
        now = weights.get(name, weights.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(now, p.bfloat16()), name


def test_the_reference_is_the_policy_without_its_adapter(tiny, reward_model_folder):
    """In the first step the adapter changes nothing yet, so the KL term is 0. Later it is not."""
    settings = dict(lora_rank=4, lr=5e-2, max_steps=3, dtype="float32", train_batch_size=8)
    run = train.main(**tiny | settings | dict(reward_model_name=str(reward_model_folder)))
    kl = [row["policy/kl"] for row in metrics_of(run)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-4


def test_a_negative_rank_is_refused(tiny):
    with pytest.raises(InputError, match="--lora-rank -1: must be at least 0"):
        train.main(**tiny | dict(lora_rank=-1))


# ----------------------------------------------------------------------------------------------------------
# Reward modes


@pytest.mark.parametrize("rm_bounds", ["warmup", "group"])
def test_reward_mode_rm_uses_the_normalized_score(tiny, reward_model_folder, rm_bounds):
    settings = dict(reward_model_name=str(reward_model_folder), reward_mode="rm", rm_bounds=rm_bounds)
    run = train.main(**tiny | settings)
    rows = rollouts_of(run)
    assert all(row["reward"] == row["r_hat"] == row["n"] and row["weight"] == 1 for row in rows)
    assert all(0 <= row["n"] <= 1 for row in rows)
    assert len({row["n"] for row in rows}) > 2
    if rm_bounds == "group":
        for start in range(0, len(rows), 4):
            scores = [row["rm_score"] for row in rows[start : start + 4]]
            spread = max(scores) - min(scores) + 0.01
            expected = [(s - min(scores)) / spread for s in scores]
            assert [row["n"] for row in rows[start : start + 4]] == pytest.approx(expected, abs=1e-5)


def test_reward_mode_verifier_uses_the_verdict_and_loads_no_reward_model(tiny, capsys):
    run = train.main(**tiny | dict(reward_model_name="/nowhere", reward_mode="verifier"))
    assert "only the verifier decides (--reward-mode verifier)" in capsys.readouterr().out
    assert all(row["reward"] == float(row["correct"]) for row in rollouts_of(run))


def test_reward_mode_rm_without_a_reward_model_is_refused(tiny):
    with pytest.raises(InputError, match="--reward-mode rm: there is no reward model"):
        train.main(**tiny | dict(reward_mode="rm"))


def test_a_failed_score_becomes_neutral_and_the_run_continues(tiny, reward_model_folder, monkeypatch):
    from src.reward_model import AceRewardModel

    forward = AceRewardModel._forward

    def one_bad(self, encoded):
        scores = forward(self, encoded)
        scores[0] = torch.nan if len(encoded) % 2 else torch.inf
        return scores

    monkeypatch.setattr(AceRewardModel, "_forward", one_bad)
    run = train.main(**tiny | dict(reward_model_name=str(reward_model_folder)))
    assert metrics_of(run)[-1]["reward/rm_failed"] > 0
    neutral = [row for row in rollouts_of(run) if abs(row["n"] - 0.5) < 0.05]
    assert neutral
    in_the_middle = [min(abs(row["r_hat"]), abs(row["r_hat"] - 1)) < 0.05 for row in neutral]  # of a band
    assert all(in_the_middle)
