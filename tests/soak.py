"""Train a tiny random model for 300 steps with faults at random, and watch what the process holds.

    python tests/soak.py                    a few minutes on a CPU
    python tests/soak.py --steps 1000 --seed 3

Exits with status 1 if memory grows by 5 % or more after step 50, if a process, thread or open file is left at the end, if a step
is not on record exactly once, or if a fault ends the run.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from src import math_verifier, rollout
from src.checkpoint import checkpoints_of, find_checkpoint, is_resumable
from src.reward_model import AceRewardModel
from src.signals import Stopped
from tests.conftest import ROOT, byte_tokenizer, make_policy, make_reward_model
from tests.test_train import metrics_of, rollouts_of


class Faults:
    """What can go wrong, each made to happen in the n-th step of a set of its own."""

    def __init__(self, steps: int, seed: int):
        chance = random.Random(seed)
        counts = dict.fromkeys(("nan", "reward_model", "verifier", "worker", "disk"), steps // 15)
        counts |= dict(update_memory=2, sampling_memory=2, sigterm=6, damage=3)
        # Each once early on: what handles it is then loaded, and memory is looked at after step 50.
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
        self.disk(full=self.take("disk"))

    def take(self, name: str) -> bool:
        if name not in self.armed:
            return False
        self.armed.discard(name)
        self.seen[name] += 1
        return True

    def disk(self, full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else self.limits[0], self.limits[1]))


def inject(faults: Faults, memory: list[tuple[int, int]]) -> None:
    """Put the faults where they come from in life."""
    process = psutil.Process()
    roll_out, log_probs, policy_loss = train.roll_out, train.completion_log_probs, train.policy_loss
    sample, forward, final_answer = rollout.sample, AceRewardModel._forward, math_verifier.final_answer
    verify_batch = math_verifier.MathVerifier.verify_batch

    def new_roll_out(*args, **kwargs):
        faults.begin(faults.step + 1)
        gc.collect()
        memory.append((faults.step, process.memory_info().rss))
        result = roll_out(*args, **kwargs)
        if faults.take("sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def new_sample(model, prompts, group, **kwargs):
        if faults.take("sampling_memory"):
            torch.empty(2**62, dtype=torch.uint8)
        return sample(model, prompts, group, **kwargs)

    def new_forward(self, texts):
        if faults.take("reward_model"):
            raise RuntimeError("the device is gone")
        return forward(self, texts)

    def new_final_answer(*args):
        if faults.take("verifier"):
            raise RecursionError("maximum recursion depth exceeded")
        return final_answer(*args)

    def new_verify_batch(self, *args, **kwargs):
        if faults.take("worker"):
            self._worker._process.kill()
        return verify_batch(self, *args, **kwargs)

    def new_log_probs(*args):
        result = log_probs(*args)
        if torch.is_grad_enabled() and faults.take("update_memory"):
            torch.empty(2**62, dtype=torch.uint8)
        return result

    def new_policy_loss(*args):
        losses, clipped = policy_loss(*args)
        return (losses * torch.nan if faults.take("nan") else losses), clipped

    train.roll_out, train.completion_log_probs, train.policy_loss = new_roll_out, new_log_probs, new_policy_loss
    rollout.sample, AceRewardModel._forward = new_sample, new_forward
    math_verifier.final_answer, math_verifier.MathVerifier.verify_batch = new_final_answer, new_verify_batch


def held() -> dict[str, int]:
    """What this process holds open."""
    files = len(os.listdir("/proc/self/fd"))
    return {"files": files, "threads": threading.active_count(), "processes": len(psutil.Process().children(recursive=True))}


def main(steps: int = 300, seed: int = 0, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Args:
    steps: Of the run.
    seed: Of the faults.
    dtype: That the model computes in. With bfloat16 on a CPU memory rises for about 100 steps before it is flat.
    """
    torch.set_num_threads(1)
    faults, memory = Faults(steps, seed), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in (("policy", make_policy()), ("reward", make_reward_model())):
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
        settings = dict(
            model_name=str(folder / "policy"), reward_model_name=str(folder / "reward"), device="cpu", epochs=10_000,
            data=str(ROOT / "data/dummy_math_tasks.jsonl"), rollouts_per_step=4, group_size=4, train_batch_size=8, max_length=200,
            max_new_tokens=40, lr=1e-4, checkpoint_interval=5, output=str(folder), run_name="run", dtype=dtype,
        )  # fmt: skip
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train.main(**settings | dict(run_name="first", max_steps=2))  # what libraries open once stays open
            before, run = held(), folder / "run"
            inject(faults, memory)
            arguments = settings | dict(max_steps=steps)
            while not ended(arguments):
                faults.disk(full=False)
                if faults.plan["damage"]:
                    faults.plan["damage"].pop()
                    faults.seen["damage"] += 1
                    newest = [path for path in checkpoints_of(run) if is_resumable(path)][-1]
                    os.truncate(newest / "training_state/exp_avg.safetensors", 100)
                checkpoint = find_checkpoint(run)[1]
                faults.step = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
                arguments = dict(resume=str(run))
        faults.disk(full=False)
        after = held()
        rows = metrics_of(run)
        lines = Counter(row["step"] for row in rollouts_of(run))
    after_50 = [rss for step, rss in memory if step >= 50]
    growth = max(after_50) / after_50[0] - 1
    print(f"faults: {dict(faults.seen)}")
    print(f"memory: {after_50[0] / 1e6:.0f} MB at step 50, at most {growth:+.1%} after it; then every 50 steps", end=" ")
    print([round(rss / 1e6) for step, rss in memory if step % 50 == 0])
    print(f"held before: {before}, after: {after}", flush=True)
    assert [row["step"] for row in rows] == list(range(steps)) and set(lines.values()) == {16} and len(lines) == steps
    assert all(faults.seen[name] for name in faults.plan), "a fault did not come"
    assert growth < 0.05 and all(after[name] <= before[name] for name in after)
    print(f"{steps} steps, each on record once")


def ended(arguments: dict) -> bool:
    """Train; whether to the end, or until a signal."""
    try:
        train.main(**arguments)
        return True
    except Stopped:
        return False


if __name__ == "__main__":
    tyro.cli(main)
