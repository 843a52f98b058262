"""How a step's time grows, here and in a plain loop: python benchmarks/scaling.py [--help]

The programs `ours` and `plain` of step.py take turns in one process. Starting from 2 questions with prompts
of 64 tokens and 8 completions of 32 tokens each, one size grows at a time: prompt length, group size,
completion length, or the number of questions. Prompts are random token ids, and the end token is suppressed.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import step  # noqa: E402

BASE = {"prompt": 64, "group": 8, "tokens": 32, "questions": 2}
AXES = {"prompt": (64, 256, 512), "group": (4, 8, 16, 32), "tokens": (32, 64, 128), "questions": (2, 4, 8)}
LABELS = {
    "prompt": "prompt, tokens",
    "group": "completions per question",
    "tokens": "completion, tokens",
    "questions": "questions",
}


def measure(size: dict[str, int], model: str, repetitions: int) -> dict[str, float]:
    """The median seconds of a step, by program."""
    task = step.Task(
        data=str(ROOT / "data" / "dummy_math_tasks.jsonl"),
        model=model,
        tokens=size["tokens"],
        questions=size["questions"],
        group_size=size["group"],
        prompt_ids=torch.randint(100, 40_000, (size["questions"], size["prompt"])).tolist(),
    )
    programs = {"ours": step.ours(task), "plain": step.plain(task)}
    for program in programs.values():
        next(program)  # sets it up
    timed = step.in_turns({name: program.__next__ for name, program in programs.items()}, repetitions)
    return {name: statistics.median(seconds for seconds, _ in rounds) for name, rounds in timed.items()}


def draw(results: list[dict], path: Path) -> None:
    """Draw the speedup over the plain loop, with one panel for each size that grows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "scaling", "font.size": 9}
    shown = [axis for axis in AXES if any(r["axis"] == axis for r in results)]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(2.4 * len(shown), 2.4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels[0], shown, strict=True):
        points = [(r["size"][axis], r["plain"] / r["ours"]) for r in results if r["axis"] == axis]
        panel.plot(*zip(*points, strict=True), marker="o")
        panel.set_xscale("log", base=2)
        panel.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        panel.minorticks_off()
        panel.set_xlabel(LABELS[axis])
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("speedup over\na plain loop")
    panels[0][0].set_ylim(bottom=0)
    figure.savefig(path, metadata={"Date": None})


def show(results: list[dict]) -> None:
    """Print a row per measurement."""
    table = Table("grows", "prompt", "group", "tokens", "questions", "ours, s", "plain, s", "times")
    for r in results:
        sizes = [str(r["size"][name]) for name in BASE]
        seconds = (f"{r['ours']:.1f}", f"{r['plain']:.1f}", f"{r['plain'] / r['ours']:.1f}")
        table.add_row(r["axis"], *sizes, *seconds)
    Console(width=120).print(table)


def main(
    axes: tuple[str, ...] = tuple(AXES),
    repetitions: int = 2,
    model: str = "embedded",
    output: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Grow one size after another, and print a table.

    Args:
        axes: The sizes to grow: prompt, group, tokens, questions.
        repetitions: Steps per program and size, after a warm-up step.
        model: A model, named as for train.py's --model-name.
        output: File for the figures as JSON.
        picture: SVG file for a figure.
    """
    torch.manual_seed(0)
    results: list[dict] = []
    for axis in axes:
        for value in AXES[axis]:
            size = BASE | {axis: value}
            known = next((r for r in results if r["size"] == size), None)
            seconds = measure(size, model, repetitions) if known is None else known
            results.append({"axis": axis, "size": size, "ours": seconds["ours"], "plain": seconds["plain"]})
            print(f"{axis} {value}: ours {seconds['ours']:.1f} s, plain {seconds['plain']:.1f} s", flush=True)
    show(results)
    if output:
        output.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")
    if picture:
        draw(results, picture)


if __name__ == "__main__":
    tyro.cli(main)
