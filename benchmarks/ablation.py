"""What each part of the reward does: python benchmarks/ablation.py [--help]

Trains the embedded model once per method and seed, all else equal, and prints held-out accuracy and the share of groups that
carry a gradient. Runs go to output/ablation/. One that is there is not repeated; one that was stopped midway is moved aside and
started again, so that the script can be stopped at any time.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
METHODS = {
    "verifier": ["--reward-mode", "verifier"],
    "rm": ["--reward-mode", "rm"],
    "sigmoid": ["--reward-scorer", "sigmoid"],
    "tanh": ["--reward-scorer", "tanh"],
    "sigmoid-group": ["--reward-scorer", "sigmoid", "--rm-bounds", "group"],
}
Method = Literal["verifier", "rm", "sigmoid", "tanh", "sigmoid-group"]
FILES = {"easy": "arithmetic", "hard": "arithmetic_hard"}


def rows_of(run: Path) -> list[dict]:
    """A run's metrics.jsonl."""
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def finished(run: Path, steps: int) -> bool:
    rows = rows_of(run)
    return bool(rows) and rows[-1]["step"] == steps and "eval/accuracy" in rows[-1]


def train_one(run: Path, flags: list[str], steps: int) -> None:
    if finished(run, steps):
        return
    if run.exists():
        aside = next(p for i in range(1, 1000) if not (p := run.with_name(f"{run.name}.stopped-{i}")).exists())
        run.rename(aside)
    print(f"{run.name}: training...", flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("w") as log:
        command = [sys.executable, "train.py", "--output", str(run.parent), "--run-name", run.name, *flags]
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def summary(run: Path) -> dict[str, float]:
    """Figures of one finished run."""
    rows = rows_of(run)
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "reward/zero_std_frac" in row]
    mean = lambda name, part: statistics.mean(row[name] for row in part)  # noqa: E731
    half = len(steps) // 2
    return {
        "before": accuracies[0],
        "middle": accuracies[len(accuracies) // 2],
        "after": accuracies[-1],
        "gradient_frac": 1 - mean("reward/zero_std_frac", steps),
        "clamped_frac": mean("reward/rm_clamped_frac", steps),
        "gradient_frac_first_half": 1 - mean("reward/zero_std_frac", steps[:half]),
        "minutes": sum(row["time/step_s"] for row in steps) / 60,
        "score_share": sum(row["time/score_s"] for row in steps) / sum(row["time/step_s"] for row in steps),
    }


def main(
    data: Literal["easy", "hard"] = "hard",
    methods: tuple[Method, ...] = ("verifier", "rm", "sigmoid", "tanh", "sigmoid-group"),
    scales: tuple[Literal["group", "batch", "none"], ...] = ("batch",),
    seeds: tuple[int, ...] = (42,),
    steps: int = 50,
    output: Path = ROOT / "output" / "ablation",
) -> None:
    """Train what is not there yet, then print the table and write it as JSON beside the runs.

    Args:
        data: Which arithmetic files.
        methods: verifier, rm, hybrid with the sigmoid weight, hybrid with the tanh weight, sigmoid with each group's own bounds.
        scales: Values of --advantage-scale.
        seeds: Of train.py.
        steps: Of each run.
        output: Folder of the runs.
    """
    table: list[dict] = []
    for seed in seeds:
        for scale in scales:
            for method in methods:
                run = output.resolve() / f"{data}-{method}-{scale}-{steps}-{seed}"
                files = [f"data/{FILES[data]}_train.jsonl", "--eval-data", f"data/{FILES[data]}_test.jsonl"]
                flags = f"""--model-name embedded --max-steps {steps} --rollouts-per-step 16 --train-batch-size 64
                    --micro-batch-size 64 --max-new-tokens 48 --temperature 1.0 --kl-weight 0 --lr 2e-5 --lr-schedule linear
                    --checkpoint-interval {steps} --eval-interval {max(steps // 2, 1)} --advantage-scale {scale} --seed {seed}"""
                train_one(run, ["--data", *files, *flags.split(), *METHODS[method]], steps)
                table.append({"method": method, "scale": scale, "seed": seed, **summary(run)})
                (output / f"{data}-{steps}.json").write_text(json.dumps(table, indent=2) + "\n")
    shown = Table(
        "method",
        "scale",
        "seeds",
        "before",
        "middle",
        "after",
        "groups with gradient: first half",
        "all",
        "scores clamped",
        "minutes",
    )
    for method, scale in dict.fromkeys((row["method"], row["scale"]) for row in table):
        rows = [row for row in table if (row["method"], row["scale"]) == (method, scale)]
        mean = {name: statistics.mean(row[name] for row in rows) for name in summary(run)}
        spread = f" ± {100 * statistics.stdev(row['after'] for row in rows):.1f}" if len(rows) > 1 else ""
        shown.add_row(
            method, scale, str(len(rows)), f"{100 * mean['before']:.1f} %", f"{100 * mean['middle']:.1f} %",
            f"{100 * mean['after']:.1f}{spread} %", f"{100 * mean['gradient_frac_first_half']:.0f} %",
            f"{100 * mean['gradient_frac']:.0f} %", f"{100 * mean['clamped_frac']:.0f} %", f"{mean['minutes']:.1f}",
        )  # fmt: skip
    Console(width=130).print(shown)


if __name__ == "__main__":
    tyro.cli(main)
