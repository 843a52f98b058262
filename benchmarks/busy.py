"""A training step on a busy CPU: python benchmarks/busy.py [--help]

Times a short step of train.py's own functions (`ours` in step.py) on an idle machine, next to a busy loop at
low priority (nice 10), and next to a second run, for each way in which threads can wait for each other. For
one way of waiting, the three cases take turns, so that a slow moment of the machine does not hit only one.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step import Task, start, take_step  # noqa: E402
from src.threads import COUNT_VARIABLES, WAITING_VARIABLES  # noqa: E402

# How threads wait: environment variables. Without any, the default of src/threads.py applies.
WAITING: dict[str, dict[str, str]] = {
    "spinning briefly (the default)": {},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning 300,000 times (OpenMP's default)": {"GOMP_SPINCOUNT": "300000"},
}


@contextmanager
def busy_loop() -> Iterator[None]:
    """Another program, at low priority."""
    other = subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def seconds(workers: list[subprocess.Popen]) -> float:
    """Let workers take a step at the same time. Returns the seconds of the slowest."""
    with ThreadPoolExecutor() as pool:
        return max(sum(answer["phases"].values()) for answer in pool.map(take_step, workers))


def main(repetitions: int = 3, tokens: int = 16, dtype: str | None = None) -> None:
    """Print the median seconds of each case, and its ratio to the idle machine.

    Args:
        repetitions: Steps per case, after a warm-up step.
        tokens: Tokens of each completion; a step has 4 x 8 completions.
        dtype: What the model computes in; by default what train.py would choose.
    """
    import torch

    from src.models import pick_dtype

    dtype = dtype or str(pick_dtype(torch.device("cpu"), "auto")).removeprefix("torch.")
    task = Task(str(ROOT / "data/dummy_math_tasks.jsonl"), "embedded", tokens, dtype, questions=4)
    for name in (*COUNT_VARIABLES, *WAITING_VARIABLES):
        os.environ.pop(name, None)
    table = Table("threads wait by", "idle, s", "busy loop, s", "times", "two runs, s", "times")
    for how, environment in WAITING.items():
        os.environ.update(environment)
        workers = [start("ours", task) for _ in range(2)]
        for name in environment:
            del os.environ[name]
        times: dict[str, list[float]] = {"idle": [], "loop": [], "two": []}
        for repetition in range(repetitions + 1):
            idle = seconds(workers[:1])
            with busy_loop():
                loop = seconds(workers[:1])
            two = seconds(workers)
            if repetition:
                for case, value in zip(times, (idle, loop, two), strict=True):
                    times[case].append(value)
        for worker in workers:
            worker.kill()
        idle, loop, two = (statistics.median(values) for values in times.values())
        table.add_row(
            how, f"{idle:.1f}", f"{loop:.1f}", f"{loop / idle:.1f}", f"{two:.1f}", f"{two / idle:.1f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    tyro.cli(main)
