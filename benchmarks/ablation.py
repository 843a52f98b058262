"""What each part of the reward does: python benchmarks/ablation.py [--help]

Trains the embedded model on sums (easy) or on two-digit sums, products and three terms (hard), once per method, advantage
scale and seed, all else equal, and reports held-out accuracy, the share of right answers at the end of training, and the share
of groups that carry a gradient. Runs go to output/ablation/. The figures of each that has ended are kept in
benchmarks/ablation.json, and what is in there is not run again; a run that was stopped midway goes on from its last checkpoint.
So the script can be stopped at any time and be left alone. It takes the GPU where there is one.
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

from src.run_log import environment  # noqa: E402

METHODS = {
    "verifier": ["--reward-mode", "verifier"],
    "rm": ["--reward-mode", "rm"],
    "sigmoid": ["--reward-scorer", "sigmoid"],
    "tanh": ["--reward-scorer", "tanh"],
    "unweighted": ["--w-min", "1", "--w-max", "1"],  # hybrid, and every weight is 1
}
Method = Literal["verifier", "rm", "sigmoid", "tanh", "unweighted"]
Scale = Literal["batch", "group", "none"]
FILES = {"easy": "arithmetic", "hard": "arithmetic_hard"}
STEPS = {"easy": 20, "hard": 40}  # sums are learnt in 20: longer runs would differ less
COLORS = {"batch": "#2a78d6", "group": "#d9822b", "none": "#5b8c5a"}
Results = dict[str, dict]


def train_one(run: Path, data: str, method: str, scale: str, steps: int, seed: int, threads: int) -> None:
    """Train what is not trained yet of a run."""
    flags = f"""--model-name embedded --data data/{FILES[data]}_train.jsonl --eval-data data/{FILES[data]}_test.jsonl
        --eval-interval {max(steps // 2, 1)} --max-steps {steps} --train-batch-size 32 --micro-batch-size 32 --max-new-tokens 48
        --temperature 1.0 --kl-weight 0 --lr 2e-5 --lr-schedule linear --checkpoint-interval 20 --keep-checkpoints 1
        --sample-interval 0 --advantage-scale {scale} --seed {seed} --output {run.parent} --run-name {run.name}""".split()
    command = ["--resume", str(run)] if (run / "config.json").exists() else [*flags, *METHODS[method]]
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("a") as log:
        subprocess.run(
            [sys.executable, "train.py", *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    for checkpoint in run.glob("step_*"):  # 1.8 GB that nobody reads
        shutil.rmtree(checkpoint)


def summary(run: Path) -> dict:
    """Figures of one finished run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/zero_std_frac" in row]
    mean = lambda name, part: statistics.mean(row[name] for row in part)  # noqa: E731
    return {
        "accuracy": {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row},
        "right_at_the_end": mean("reward/rule_mean", steps[-max(len(steps) // 4, 1) :]),
        "gradient_frac": 1 - mean("reward/zero_std_frac", steps),
        "gradient_frac_first_half": 1 - mean("reward/zero_std_frac", steps[: len(steps) // 2]),
        "clamped_frac": mean("reward/rm_clamped_frac", steps),
        "length_at_the_end": mean("completion/len_mean", steps[-max(len(steps) // 4, 1) :]),
        "minutes": sum(row["time/step_s"] for row in steps) / 60,
        "device": json.loads((run / "config.json").read_text())["hyperparameters"]["run_device"],
        **environment(),
    }


def show(results: Results) -> None:
    """One row for each data set, method and scale: means over seeds, and their std (n - 1)."""
    shown = Table(
        "data", "method", "scale", "seeds", "before", "middle", "after", "right in the last quarter of training",
        "groups with gradient: first half", "all", "scores clamped", "minutes",
    )  # fmt: skip
    for (data, method, scale), rows in grouped(results).items():
        accuracies = [[100 * value for value in row["accuracy"].values()] for row in rows]
        before, middle = (statistics.mean(a[i] for a in accuracies) for i in (0, len(accuracies[0]) // 2))
        percent = lambda name: f"{100 * statistics.mean(row[name] for row in rows):.0f} %"  # noqa: B023, E731
        shown.add_row(
            data, method, scale, str(len(rows)), f"{before:.1f} %", f"{middle:.1f} %", f"{spread([a[-1] for a in accuracies])} %",
            f"{spread([100 * row['right_at_the_end'] for row in rows])} %", percent("gradient_frac_first_half"),
            percent("gradient_frac"), percent("clamped_frac"), f"{statistics.mean(row['minutes'] for row in rows):.1f}",
        )  # fmt: skip
    Console(width=140).print(shown)


def grouped(results: Results) -> dict[tuple[str, str, str], list[dict]]:
    """The runs of each data set, method and scale."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for name, row in sorted(results.items()):
        data, method, scale, _ = name.split("-", 3)
        groups.setdefault((data, method, scale), []).append(row)
    order = [*product(FILES, METHODS, COLORS)]
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0])))


def spread(values: list[float]) -> str:
    """Mean ± std (n - 1)."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def draw(results: Results, target: Path) -> None:
    """Held-out accuracy after training, a dot a seed and a bar for their mean, by method and scale; a panel a data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(results)
    shown = [data for data in FILES if any(key[0] == data for key in groups)]
    figure, axes = plt.subplots(1, len(shown), figsize=(2 + 5 * len(shown), 3.6), layout="constrained", squeeze=False)
    for axis, data in zip(axes[0], shown, strict=True):
        of_data = {key: rows for key, rows in groups.items() if key[0] == data}
        methods = [method for method in METHODS if any(key[1] == method for key in of_data)]
        for (_, method, scale), rows in of_data.items():
            at = methods.index(method) + 0.24 * (list(COLORS).index(scale) - 1)
            last = [100 * list(row["accuracy"].values())[-1] for row in rows]
            axis.plot([at] * len(last), last, "o", color=COLORS[scale], ms=4, alpha=0.6)
            axis.hlines(statistics.mean(last), at - 0.1, at + 0.1, color=COLORS[scale], lw=2.5)
        axis.set_xticks(range(len(methods)), methods)
        axis.set_xlim(-0.5, len(methods) - 0.5)
        axis.set_title(f"{data} arithmetic", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out accuracy, %")
    handles = [plt.Line2D([], [], color=color, lw=2.5, label=scale) for scale, color in COLORS.items()]
    figure.legend(
        handles=handles, frameon=False, fontsize=8, loc="outside right upper", title="--advantage-scale", title_fontsize=8
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
    """Train what is not there yet, then print the table and draw the figure.

    Args:
        data: Which arithmetic files.
        methods: verifier; rm; hybrid with the sigmoid weight, with the tanh weight, and without weights.
        scales: Values of --advantage-scale.
        seeds: Of train.py.
        steps: Of each run, 8 x 8 completions and two optimizer steps each; 0 for 20 on easy and 40 on hard data.
        at_once: Runs side by side, which share the CPU's cores; 5 GB of memory each. One, where `minutes` are to mean something.
        output: Folder of the runs.
        result: File for their figures.
        picture: File for the figure.
    """
    writing = threading.Lock()
    results: Results = json.loads(result.read_text()) if result.exists() else {}
    threads = max(1, torch.get_num_threads() // at_once)

    def one(seed: int, of_data: str, scale: str, method: str) -> None:
        of_steps = steps or STEPS[of_data]
        name = f"{of_data}-{method}-{scale}-{of_steps}-{seed}"
        if name in results:
            return
        print(f"{name}: training...", flush=True)
        run = output.resolve() / name
        train_one(run, of_data, method, scale, of_steps, seed, threads)
        with writing:
            results[name] = summary(run)
            aside = result.with_suffix(".partial")
            aside.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            aside.rename(result)

    with ThreadPoolExecutor(at_once) as pool:
        for finished in [pool.submit(one, *what) for what in product(seeds, data, scales, methods)]:
            finished.result()
    show(results)
    draw(results, picture)


if __name__ == "__main__":
    tyro.cli(main)
