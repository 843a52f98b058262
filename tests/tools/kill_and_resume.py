"""Kill a run at random moments, resume it each time, and compare it with a run that was never stopped.

    python tests/tools/kill_and_resume.py                    10 kills in 12 steps, 2 minutes on a CPU
    python tests/tools/kill_and_resume.py --kills 30 --seed 1 --dtype bfloat16

The model is tiny and random, and the signal is SIGKILL. Every other kill happens while a checkpoint is being
written. Exits with status 1 unless weights, AdamW's moments, the state of the random generators,
metrics.jsonl (except times) and rollouts.jsonl are equal bit for bit.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import ROOT, as_flags, byte_tokenizer, make_policy, make_reward_model
from tests.test_resume import assert_same_run
from tests.test_train import metrics_of


def main(
    kills: int = 10, steps: int = 12, seed: int = 0, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Train one run straight through and another with kills, and compare them.

    Args:
        kills: Number of SIGKILLs.
        steps: Length of each run.
        seed: Random seed of the moments.
        dtype: What the model computes in.
    """
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = make_policy(num_hidden_layers=4, hidden_size=64)
        for name, model in (("policy", policy), ("reward", make_reward_model())):
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
        data = ROOT / "data/dummy_math_tasks.jsonl"
        settings = dict(
            model_name=folder / "policy", reward_model_name=folder / "reward", device="cpu", dtype=dtype,
            max_steps=steps, group_size=8, rollouts_per_step=4, train_batch_size=8, max_length=256,
            max_new_tokens=96, lr=1e-3, kl_weight=0.1, data=data, eval_data=data, eval_interval=5,
            checkpoint_interval=1, output=folder,
        )  # fmt: skip
        start(as_flags(settings | dict(run_name="straight")), folder / "lines").wait()
        straight, killed = folder / "straight", folder / "killed"
        print(f"straight: {len(metrics_of(straight))} lines of metrics")
        flags = as_flags(settings | dict(run_name="killed"))
        for kill in range(kills):
            process = start(flags, folder / "lines")
            moment = wait_for_moment(process, folder / "lines", killed, moments, in_write=kill % 2 == 1)
            process.kill()
            status = process.wait()
            done = len(metrics_of(killed)) if (killed / "metrics.jsonl").exists() else 0
            partial = [path.name for path in killed.glob(".*")]
            written = f"{done} steps recorded, half written: {partial or 'nothing'}"
            print(f"kill {kill + 1}: {moment}, {written}, status {status}")
            assert status == -9, (folder / "lines").read_text()[-2000:]
            if (killed / "config.json").exists():
                flags = ["--resume", str(killed)]
        status = start(flags, folder / "lines").wait()
        assert status == 0, (folder / "lines").read_text()[-2000:]
        assert_same_run(straight, killed, steps)
    print(f"after {kills} kills: weights, moments, generators, metrics and rollouts equal the straight run's")


def start(flags: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", *flags]
    with output.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=dict(os.environ))


def wait_for_moment(
    process: subprocess.Popen, lines: Path, run: Path, moments: random.Random, in_write: bool
) -> str:
    """Wait for a random moment of training, or of writing a checkpoint, and return its description."""
    started, files = time.time(), moments.randrange(1, 14)
    if not in_write:
        # Mostly after the first step, and sometimes earlier, while the process is still loading.
        while moments.random() < 0.9999 and process.poll() is None and ": kl=" not in lines.read_text():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.8))
        return f"{time.time() - started:.1f} s after its start"
    while process.poll() is None:
        with contextlib.suppress(OSError):  # the checkpoint was renamed meanwhile
            written = [path for partial in run.glob(".step_*.partial") for path in partial.rglob("*")]
            new = sum(path.stat().st_mtime > started for path in written)
            if new >= files:
                return f"{time.time() - started:.1f} s after its start, {new} files of a checkpoint written"
    return "after its end"


if __name__ == "__main__":
    tyro.cli(main)
