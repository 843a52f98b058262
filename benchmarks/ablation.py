"""What each part of the reward contributes: python benchmarks/ablation.py [--help]

Trains the bundled model on sums (easy), or on two-digit sums, products and three terms (hard), once per
method, advantage scale and seed, with everything else equal. Reports held-out accuracy, the share of right
answers at the end of training, and the share of groups that carry a gradient. Uses the GPU if there is one.

The runs go to output/ablation/, and the figures of each finished run to benchmarks/ablation.json. The script
can be stopped at any time: when it is started again, it skips the runs in that file, and resumes one that was
interrupted from its last checkpoint.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from src.run.log import environment  # noqa: E402

METHODS = {
    "verifier": ["--reward-mode", "verifier"],
    "rm": ["--reward-mode", "rm"],
    "sigmoid": ["--reward-scorer", "sigmoid"],
    "tanh": ["--reward-scorer", "tanh"],
    "unweighted": ["--w-min", "1", "--w-max", "1"],  # hybrid, with every weight 1
}
Method = Literal["verifier", "rm", "sigmoid", "tanh", "unweighted"]
Scale = Literal["batch", "group", "none"]
FILES = {"easy": "arithmetic", "hard": "arithmetic_hard"}
STEPS = {"easy": 20, "hard": 40}  # 20 are enough to learn sums; longer runs would differ less
COLORS = {"batch": "#2a78d6", "group": "#d9822b", "none": "#5b8c5a"}
SHARES = ("gradient_frac_first_half", "gradient_frac", "clamped_frac")
Results = dict[str, dict]  # by name of a run, its figures from `summarize`


def train_one(run: Path, data: str, method: str, scale: str, steps: int, seed: int, threads: int) -> None:
    """Train a run from its beginning, or resume it."""
    flags = f"""--model-name embedded --data data/{FILES[data]}_train.jsonl
        --eval-data data/{FILES[data]}_test.jsonl --eval-interval {max(steps // 2, 1)} --max-steps {steps}
        --train-batch-size 32 --micro-batch-size 32 --max-new-tokens 48 --temperature 1.0 --kl-weight 0
        --lr 2e-5 --lr-schedule linear --checkpoint-interval 20 --keep-checkpoints 1 --sample-interval 0
        --advantage-scale {scale} --seed {seed} --output {run.parent} --run-name {run.name}""".split()
    command = ["--resume", str(run)] if (run / "config.json").exists() else [*flags, *METHODS[method]]
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("a") as log:
        subprocess.run(
            [sys.executable, "train.py", *command],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    for checkpoint in run.glob("step_*"):  # 1.8 GB each, which are not needed
        shutil.rmtree(checkpoint)


def summarize(run: Path) -> dict:
    """The figures of a finished run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/zero_std_frac" in row]
    last_quarter = steps[-max(len(steps) // 4, 1) :]
    mean = lambda name, part: statistics.mean(row[name] for row in part)  # noqa: E731
    return {
        "accuracy": {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row},
        "right_at_the_end": mean("reward/rule_mean", last_quarter),
        "gradient_frac": 1 - mean("reward/zero_std_frac", steps),
        "gradient_frac_first_half": 1 - mean("reward/zero_std_frac", steps[: len(steps) // 2]),
        "clamped_frac": mean("reward/rm_clamped_frac", steps),
        "length_at_the_end": mean("completion/len_mean", last_quarter),
        "minutes": sum(row["time/step_s"] for row in steps) / 60,
        "device": json.loads((run / "config.json").read_text())["hyperparameters"]["run_device"],
        **environment(),
    }


def show(results: Results) -> None:
    """Print a row per data set, method and scale: means over the seeds, with their std (n - 1)."""
    table = Table(
        "data", "method", "scale", "seeds", "before", "middle", "after",
        "right in the last quarter of training", "groups with gradient: first half", "all", "scores clamped",
        "minutes",
    )  # fmt: skip
    for key, runs in grouped(results).items():
        mean = lambda name: statistics.mean(run[name] for run in runs)  # noqa: B023, E731
        accuracies = [[100 * value for value in run["accuracy"].values()] for run in runs]
        before, middle = (statistics.mean(a[i] for a in accuracies) for i in (0, len(accuracies[0]) // 2))
        table.add_row(
            *key,
            str(len(runs)),
            f"{before:.1f} %",
            f"{middle:.1f} %",
            f"{spread([a[-1] for a in accuracies])} %",
            f"{spread([100 * run['right_at_the_end'] for run in runs])} %",
            *(f"{100 * mean(name):.0f} %" for name in SHARES),
            f"{mean('minutes'):.1f}",
        )
    Console(width=140).print(table)


def grouped(results: Results) -> dict[tuple[str, str, str], list[dict]]:
    """The runs by data set, method and scale, in the order of FILES, METHODS and COLORS."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for name, row in sorted(results.items()):
        data, method, scale, _ = name.split("-", 3)
        groups.setdefault((data, method, scale), []).append(row)
    order = [*product(FILES, METHODS, COLORS)]
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0])))


def spread(values: list[float]) -> str:
    """The mean, and ± the std (n - 1) if there are several values."""
    std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{std}"


def draw(results: Results, target: Path) -> None:
    """Draw held-out accuracy after training by method and scale, with one panel per data set.

    Each seed is a dot, and their mean is a bar.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(results)
    shown = [data for data in FILES if any(key[0] == data for key in groups)]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2 + 5 * len(shown), 3.6), layout="constrained", squeeze=False
    )
    for axis, data in zip(axes[0], shown, strict=True):
        panel = {key: runs for key, runs in groups.items() if key[0] == data}
        methods = [method for method in METHODS if any(key[1] == method for key in panel)]
        for (_, method, scale), runs in panel.items():
            x = methods.index(method) + 0.24 * (list(COLORS).index(scale) - 1)
            last = [100 * list(run["accuracy"].values())[-1] for run in runs]
            axis.plot([x] * len(last), last, "o", color=COLORS[scale], ms=4, alpha=0.6)
            axis.hlines(statistics.mean(last), x - 0.1, x + 0.1, color=COLORS[scale], lw=2.5)
        axis.set_xticks(range(len(methods)), methods)
        axis.set_xlim(-0.5, len(methods) - 0.5)
        axis.set_title(f"{data} arithmetic", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out accuracy, %")
    handles = [plt.Line2D([], [], color=color, lw=2.5, label=scale) for scale, color in COLORS.items()]
    figure.legend(
        handles=handles,
        frameon=False,
        fontsize=8,
        loc="outside right upper",
        title="--advantage-scale",
        title_fontsize=8,
    )
    plt.rcParams["svg.hashsalt"] = "ablation"
    figure.savefig(target, metadata={"Date": None})


def main(
    data: tuple[Literal["easy", "hard"], ...] = ("hard", "easy"),
    methods: tuple[Method, ...] = ("verifier", "rm", "sigmoid", "tanh"),
    scales: tuple[Scale, ...] = ("batch", "group", "none"),
    seeds: tuple[int, ...] = (42, 43, 44),
    steps: int = 0,
    at_once: int = 1,
    output: Path = ROOT / "output" / "ablation",
    result: Path = ROOT / "benchmarks" / "ablation.json",
    picture: Path = ROOT / "benchmarks" / "ablation.svg",
) -> None:
    """Do the runs that are missing, then print the table and draw the figure.

    Args:
        data: The arithmetic files to train on.
        methods: verifier; rm; hybrid with the sigmoid weight, with the tanh weight, or with every weight 1
            (unweighted).
        scales: Values of --advantage-scale.
        seeds: Seeds of train.py; each is a run.
        steps: Steps per run, each with 8 x 8 completions and two optimizer steps; 0 means 20 on easy and 40
            on hard data.
        at_once: Number of concurrent runs, which share the CPU's cores and need 5 GB of memory each. With
            more than one, `minutes` are not comparable.
        output: Folder of the runs.
        result: File for their figures as JSON.
        picture: File for the figure.
    """
    writing = threading.Lock()
    results: Results = json.loads(result.read_text()) if result.exists() else {}
    threads = max(1, torch.get_num_threads() // at_once)

    def train_if_missing(seed: int, data: str, scale: str, method: str) -> None:
        run_steps = steps or STEPS[data]
        name = f"{data}-{method}-{scale}-{run_steps}-{seed}"
        if name in results:
            return
        print(f"{name}: training...", flush=True)
        run = output.resolve() / name
        train_one(run, data, method, scale, run_steps, seed, threads)
        with writing:
            results[name] = summarize(run)
            partial = result.with_suffix(".partial")  # renamed, so that the file is always complete
            partial.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            partial.rename(result)

    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(train_if_missing, *run) for run in product(seeds, data, scales, methods)]
        for run in runs:
            run.result()
    show(results)
    draw(results, picture)


if __name__ == "__main__":
    tyro.cli(main)
