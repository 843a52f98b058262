"""Does it learn? On the embedded model: one step in the suite, and a real run under -m slow."""

import json
import re

import pytest

from tests.conftest import run_command


def test_one_step_of_the_embedded_model_from_the_command_line(tmp_path):
    done = run_command(
        "train.py", "--model-name", "embedded", "--output", str(tmp_path), "--run-name", "run", "--max-steps", "1",
        "--rollouts-per-step", "2", "--group-size", "2", "--train-batch-size", "4", "--max-new-tokens", "8",
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reward model: embedded" in done.stdout
    low, high = map(float, re.search(r"RM bounds: min=(\S+), max=(\S+)", done.stdout).groups())
    assert -30 <= low < high <= 0
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert metrics["policy/moved_frac"] > 0.99 or metrics["reward/zero_std_frac"] == 1  # all wrong: nothing to learn from
    assert metrics["policy/sampler_gap"] < 0.1
    assert (tmp_path / "run/step_1/model.safetensors").stat().st_size > 2 * 134_515_008


@pytest.mark.slow
def test_25_steps_double_the_held_out_accuracy(tmp_path):
    """Half of the learning run in the README."""
    done = run_command(
        "train.py", "--model-name", "embedded", "--reward-model-name", "none", "--output", str(tmp_path), "--run-name", "run",
        "--data", "data/arithmetic_train.jsonl", "--eval-data", "data/arithmetic_test.jsonl", "--max-steps", "25",
        "--rollouts-per-step", "16", "--train-batch-size", "64", "--micro-batch-size", "64", "--max-new-tokens", "48",
        "--temperature", "1.0", "--kl-weight", "0", "--lr", "2e-5", "--lr-schedule", "linear",
        timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last = (float(a) for a in re.findall(r"held-out accuracy after \d+ steps: ([\d.]+) %", done.stdout))
    assert 10 <= first <= 30
    assert last >= 2 * first
