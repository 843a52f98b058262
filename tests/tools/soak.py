"""Train a tiny random model for 300 steps with faults at random, and watch for leaks.

    python tests/tools/soak.py                    a few minutes on a CPU
    python tests/tools/soak.py --steps 1000 --seed 3

Exits with status 1 if memory grows by 5 % or more after step 50, if a process, thread or open file is left at
the end, if a step is not recorded exactly once, or if a fault ends the run.
"""

import contextlib
import gc
import os
import random
import resource
import signal
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from src import math_verifier
from src.engine import rollout
from src.math_verifier import MathVerifier
from src.reward_model import AceRewardModel
from src.run.checkpoint import checkpoints_of, find_checkpoint, is_resumable
from src.run.signals import Stopped
from tests.conftest import ROOT, byte_tokenizer, make_policy, make_reward_model
from tests.test_train import metrics_of, rollouts_of


class Faults:
    """Which faults occur in which steps. Each kind of fault has its own random set of steps."""

    def __init__(self, steps: int, seed: int):
        chance = random.Random(seed)
        counts = dict.fromkeys(("nan", "reward_model", "verifier", "worker", "disk"), steps // 15)
        counts |= dict(update_memory=2, sampling_memory=2, sigterm=6, damage=3)
        # Each occurs once early on, which loads the code that handles it. Memory is compared from step 50 on.
        self.plan = {
            name: set(chance.sample(range(5, 45), 1) + chance.sample(range(50, steps - 3), count - 1))
            for name, count in counts.items()
        }
        self.seen: Counter[str] = Counter()
        self.step = 0
        self.armed: set[str] = set()
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def begin(self, step: int) -> None:
        self.step, self.armed = step, {name for name, steps in self.plan.items() if step in steps}
        for steps in self.plan.values():
            steps.discard(step)
        self.fill_disk(self.occurs("disk"))

    def occurs(self, name: str) -> bool:
        """Whether the fault occurs now; at most once per step."""
        if name not in self.armed:
            return False
        self.armed.discard(name)
        self.seen[name] += 1
        return True

    def fill_disk(self, full: bool) -> None:
        """Make writes of more than 1,000 bytes fail, or work again."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else self.limits[0], self.limits[1]))


def inject(faults: Faults, memory: list[tuple[int, int]]) -> None:
    """Patch the faults into the functions in which they occur in practice.

    Args:
        memory: Gets the step and the resident memory in bytes at the start of each step.
    """
    inject_into_steps(faults, memory)
    inject_into_scoring(faults)
    inject_into_update(faults)


def inject_into_steps(faults: Faults, memory: list[tuple[int, int]]) -> None:
    process, roll_out, sample = psutil.Process(), train.roll_out, rollout.sample

    def new_roll_out(*args, **kwargs):
        faults.begin(faults.step + 1)
        gc.collect()
        memory.append((faults.step, process.memory_info().rss))
        result = roll_out(*args, **kwargs)
        if faults.occurs("sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def new_sample(*args, **kwargs):
        if faults.occurs("sampling_memory"):
            torch.empty(2**62, dtype=torch.uint8)
        return sample(*args, **kwargs)

    train.roll_out, rollout.sample = new_roll_out, new_sample


def inject_into_scoring(faults: Faults) -> None:
    forward, final_answer = AceRewardModel._forward, math_verifier.final_answer
    verify_batch = MathVerifier.verify_batch

    def new_forward(*args, **kwargs):
        if faults.occurs("reward_model"):
            raise RuntimeError("the device is gone")
        return forward(*args, **kwargs)

    def new_final_answer(*args, **kwargs):
        if faults.occurs("verifier"):
            raise RecursionError("maximum recursion depth exceeded")
        return final_answer(*args, **kwargs)

    def new_verify_batch(self, *args, **kwargs):
        if faults.occurs("worker"):
            self._worker._process.kill()
        return verify_batch(self, *args, **kwargs)

    AceRewardModel._forward, math_verifier.final_answer = new_forward, new_final_answer
    MathVerifier.verify_batch = new_verify_batch


def inject_into_update(faults: Faults) -> None:
    log_probs, policy_loss = train.completion_log_probs, train.policy_loss

    def new_log_probs(*args, **kwargs):
        result = log_probs(*args, **kwargs)
        if torch.is_grad_enabled() and faults.occurs("update_memory"):
            torch.empty(2**62, dtype=torch.uint8)
        return result

    def new_policy_loss(*args, **kwargs):
        losses, clipped = policy_loss(*args, **kwargs)
        return (losses * torch.nan if faults.occurs("nan") else losses), clipped

    train.completion_log_probs, train.policy_loss = new_log_probs, new_policy_loss


def open_resources() -> dict[str, int]:
    """How many files, threads and child processes this process has."""
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "processes": len(psutil.Process().children(recursive=True)),
    }


def main(steps: int = 300, seed: int = 0, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Train with faults and print what happened.

    Args:
        steps: Length of the run.
        seed: Random seed of the faults.
        dtype: What the model computes in. With bfloat16 on a CPU, memory rises for about 100 steps, and then
            stays flat.
    """
    torch.set_num_threads(1)
    faults, memory = Faults(steps, seed), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in (("policy", make_policy()), ("reward", make_reward_model())):
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
        settings = dict(
            model_name=str(folder / "policy"), reward_model_name=str(folder / "reward"), device="cpu",
            data=str(ROOT / "data/dummy_math_tasks.jsonl"), epochs=10_000, rollouts_per_step=4, group_size=4,
            train_batch_size=8, max_length=200, max_new_tokens=40, lr=1e-4, checkpoint_interval=5,
            output=str(folder), run_name="run", dtype=dtype,
        )  # fmt: skip
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            # Without faults: some files that libraries open stay open.
            train.main(**settings | dict(run_name="first", max_steps=2))
            before = open_resources()
            inject(faults, memory)
            train_to_the_end(faults, folder / "run", settings | dict(max_steps=steps))
        faults.fill_disk(False)
        after = open_resources()
        steps_recorded = [row["step"] for row in metrics_of(folder / "run")]
        completions = Counter(row["step"] for row in rollouts_of(folder / "run"))
    after_50 = [rss for step, rss in memory if step >= 50]
    growth = max(after_50) / after_50[0] - 1
    every_50 = [round(rss / 1e6) for step, rss in memory if step % 50 == 0]
    print(f"faults: {dict(faults.seen)}")
    print(f"memory: {after_50[0] / 1e6:.0f} MB at step 50, at most {growth:+.1%} later")
    print(f"memory every 50 steps, in MB: {every_50}")
    print(f"open before: {before}, after: {after}", flush=True)
    assert steps_recorded == list(range(steps))
    assert completions == dict.fromkeys(range(steps), 16)
    assert all(faults.seen[name] for name in faults.plan), "a fault did not occur"
    assert growth < 0.05
    assert all(after[name] <= before[name] for name in after)
    print(f"{steps} steps, each recorded once")


def train_to_the_end(faults: Faults, run: Path, settings: dict) -> None:
    """Train, and resume after each signal, sometimes with a damaged checkpoint."""
    while not ended(settings):
        faults.fill_disk(False)
        if faults.plan["damage"]:
            faults.plan["damage"].pop()
            faults.seen["damage"] += 1
            newest = [path for path in checkpoints_of(run) if is_resumable(path)][-1]
            os.truncate(newest / "training_state/exp_avg.safetensors", 100)
        checkpoint = find_checkpoint(run)[1]
        faults.step = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
        settings = dict(resume=str(run))


def ended(arguments: dict) -> bool:
    """Train, and return whether training reached its end before a signal stopped it."""
    try:
        train.main(**arguments)
        return True
    except Stopped:
        return False


if __name__ == "__main__":
    tyro.cli(main)
