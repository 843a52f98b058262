"""How a step grows, and the gain over a plain loop with it: python benchmarks/scaling.py [--help]

The programs `ours` and `plain` of step.py in turns in one process, with 2 questions, 32 tokens a completion and the end token
suppressed, while one size grows: prompt length, group size, completion length, questions. Prompts are random token ids.
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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import step  # noqa: E402

import train  # noqa: E402

BASE = {"prompt": 64, "group": 8, "tokens": 32, "questions": 2}
AXES = {"prompt": (64, 256, 512), "group": (4, 8, 16, 32), "tokens": (32, 64, 128), "questions": (2, 4, 8)}


def measure(size: dict[str, int], model: str, repetitions: int) -> dict[str, float]:
    """Median seconds of a step of each program."""
    step.Q, step.G = size["questions"], size["group"]
    prompts = torch.randint(100, 40_000, (size["questions"], size["prompt"])).tolist()
    train.encode_prompts = lambda *_: prompts
    data = str(ROOT / "data" / "dummy_math_tasks.jsonl")
    programs = {"ours": step.ours(data, model, size["tokens"]), "plain": step.plain(data, model, size["tokens"])}
    for program in programs.values():
        next(program)
    timed = step.in_turns({name: program.__next__ for name, program in programs.items()}, repetitions)
    return {name: statistics.median(seconds for seconds, _ in rounds) for name, rounds in timed.items()}


def figure(results: list[dict], path: Path) -> None:
    """Times faster than the plain loop, a panel for each size that grows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "scaling", "font.size": 9}
    names = {
        "prompt": "prompt, tokens",
        "group": "completions of a question",
        "tokens": "completion, tokens",
        "questions": "questions",
    }
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
        panel.set_xlabel(names[axis])
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("times faster than\na plain loop")
    panels[0][0].set_ylim(bottom=0)
    figure.savefig(path, metadata={"Date": None})


def main(
    axes: tuple[str, ...] = tuple(AXES),
    repetitions: int = 2,
    model: str = "embedded",
    output: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Grow one size after the other and print a table.

    Args:
        axes: Sizes to grow: prompt, group, tokens, questions.
        repetitions: Steps of each program and size, after one to warm up.
        model: As --model-name of train.py takes it.
        output: File for the figures as JSON.
        picture: SVG file for a figure.
    """
    torch.manual_seed(0)
    results: list[dict] = []
    for axis in axes:
        for value in AXES[axis]:
            size = BASE | {axis: value}
            known = next((r for r in results if r["size"] == size), None)
            measured = {k: known[k] for k in ("ours", "plain")} if known else measure(size, model, repetitions)
            results.append({"axis": axis, "size": size, **measured})
            print(f"{axis} {value}: ours {measured['ours']:.1f} s, plain {measured['plain']:.1f} s", flush=True)
    table = Table("grows", "prompt", "group", "tokens", "questions", "ours, s", "plain, s", "times")
    for r in results:
        sizes = [str(r["size"][name]) for name in BASE]
        table.add_row(r["axis"], *sizes, f"{r['ours']:.1f}", f"{r['plain']:.1f}", f"{r['plain'] / r['ours']:.1f}")
    Console(width=120).print(table)
    if output:
        output.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")
    if picture:
        figure(results, picture)


if __name__ == "__main__":
    tyro.cli(main)
