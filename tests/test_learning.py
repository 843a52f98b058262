"""Does it learn? One step of the bundled model in the test suite, and a real run with -m slow."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from src.models import load_policy
from tests.conftest import as_flags, run_command


def share_changed(checkpoint) -> float:
    """The share of the bundled model's float32 weights that training has changed.

    Embeddings are left out: the gradients of tokens that never occur are too small to change them.
    """
    before = dict(load_policy("embedded", torch.device("cpu")).named_parameters())
    after = load_file(checkpoint / "training_state/weights.safetensors")
    assert before.keys() == after.keys()
    layers = {name: weight for name, weight in after.items() if "embed_tokens" not in name}
    changed = sum((before[name] != weight).sum().item() for name, weight in layers.items())
    return changed / sum(weight.numel() for weight in layers.values())


def test_one_step_of_the_bundled_model_from_the_command_line(tmp_path):
    settings = dict(
        model_name="embedded", output=tmp_path, run_name="run", max_steps=1, rollouts_per_step=2,
        group_size=2, train_batch_size=4, max_new_tokens=8,
    )  # fmt: skip
    done = run_command("train.py", *as_flags(settings), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "reward model: embedded" in done.stdout
    low, high = map(float, re.search(r"RM bounds: min=(\S+), max=(\S+)", done.stdout).groups())
    assert -30 <= low < high <= 0
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    if metrics["reward/zero_std_frac"] < 1:  # if all rewards are equal, there is nothing to learn from
        assert share_changed(tmp_path / "run/step_1") > 0.99
    assert metrics["policy/sampler_gap"] < 0.1
    assert (tmp_path / "run/step_1/model.safetensors").stat().st_size > 2 * 134_515_008


@pytest.mark.slow
def test_25_steps_double_the_held_out_accuracy(tmp_path):
    """Half of the longer run in the README: 50 steps of 16 x 8."""
    settings = dict(
        model_name="embedded", reward_model_name="none", output=tmp_path, run_name="run",
        data="data/arithmetic_train.jsonl", eval_data="data/arithmetic_test.jsonl", max_steps=25,
        rollouts_per_step=16, train_batch_size=64, micro_batch_size=64, max_new_tokens=48,
        temperature=1.0, kl_weight=0, lr=2e-5, lr_schedule="linear",
    )  # fmt: skip
    done = run_command("train.py", *as_flags(settings), timeout=3600)
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(r"held-out accuracy after \d+ steps: ([\d.]+) %", done.stdout)
    first, last = map(float, accuracies)
    assert 10 <= first <= 30
    assert last >= 2 * first
