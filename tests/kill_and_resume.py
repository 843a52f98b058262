"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with a run that was never stopped.

    python tests/kill_and_resume.py                    10 kills in 12 steps of a tiny random model, about 2 minutes on a CPU
    python tests/kill_and_resume.py --kills 30 --seed 1 --dtype bfloat16

Every other kill comes while a checkpoint is being written. Exits with status 1 unless weights, AdamW's moments, the state of the
random generators, metrics.jsonl (times aside) and rollouts.jsonl are equal bit for bit.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import ROOT, as_flags, byte_tokenizer, make_policy, make_reward_model
from tests.test_resume import assert_same_run
from tests.test_train import metrics_of


def main(kills: int = 10, steps: int = 12, seed: int = 0, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Args:
    kills: SIGKILLs.
    steps: Of the whole run.
    seed: Of the moments.
    dtype: That the model computes in.
    """
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in (("policy", make_policy(num_hidden_layers=4, hidden_size=64)), ("reward", make_reward_model())):
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
        settings = dict(
            model_name=folder / "policy", reward_model_name=folder / "reward", device="cpu", dtype=dtype, max_steps=steps,
            group_size=8, rollouts_per_step=4, train_batch_size=8, max_length=256, max_new_tokens=96, lr=1e-3, kl_weight=0.1,
            data=ROOT / "data/dummy_math_tasks.jsonl", eval_data=ROOT / "data/dummy_math_tasks.jsonl", eval_interval=5,
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
            print(f"kill {kill + 1}: {moment}, {done} steps on record, half written: {partial or 'nothing'}, status {status}")
            assert status == -9, (folder / "lines").read_text()[-2000:]
            if (killed / "config.json").exists():
                flags = ["--resume", str(killed)]
        status = start(flags, folder / "lines").wait()
        assert status == 0, (folder / "lines").read_text()[-2000:]
        assert_same_run(straight, killed, steps)
    print(f"after {kills} kills: weights, moments, generators, metrics and rollouts are those of the straight run, bit for bit")


def start(flags: list[str], output: Path) -> subprocess.Popen:
    with output.open("w") as file:
        return subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stdout=file, stderr=file, env=dict(os.environ))


def wait_for_moment(process: subprocess.Popen, lines: Path, run: Path, moments: random.Random, in_write: bool) -> str:
    """Return at a random moment of the training, or of the writing of a checkpoint."""
    started, files = time.time(), moments.randrange(1, 14)
    if not in_write:
        # Until the first step is over the process is loading; sometimes the moment is there.
        while moments.random() < 0.9999 and process.poll() is None and ": kl=" not in lines.read_text():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.8))
        return f"{time.time() - started:.1f} s after its start"
    while process.poll() is None:
        with contextlib.suppress(OSError):  # renamed while it is looked at
            new = [f for hidden in run.glob(".step_*.partial") for f in hidden.rglob("*") if f.stat().st_mtime > started]
            if len(new) >= files:
                return f"{time.time() - started:.1f} s after its start, with {len(new)} files of a checkpoint written"
    return "after its end"


if __name__ == "__main__":
    tyro.cli(main)
