"""What a run says: plain lines, and on a terminal a bar below them with the phase, the speed and the time that is left.

Text from models and data is printed by its repr, which escapes whatever is not printable: control characters, ANSI codes and
marks of writing direction reach no terminal. There is one standard output, so there is one bar, kept by this module.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from src.run_log import Scores

PLAIN_WIDTH = 120  # columns of a table that is not on a terminal
ROOM_FOR_BAR, ROOM_FOR_SPEED = 80, 60  # columns that a terminal needs to show them beside phase and time left
SAMPLES_SHOWN = 3
SAMPLE_CHARS = 300  # of a completion that is shown as a sample; its middle is left out
FIRST_AND_LAST = 5  # steps that the summary takes the means of

_quiet = False
_bar: Progress | None = None


def configure(quiet: bool) -> None:
    """Whether `say` and the bar are silent from now on. Warnings and results are printed in either case."""
    global _quiet
    _quiet = quiet


def say(line: str) -> None:
    """Print a line of information."""
    if not _quiet:
        print(line, flush=True)


def on_terminal() -> bool:
    """Whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


# ----------------------------------------------------------------------------------------------------------------------
# The bar


def start(total: int, unit: str, done: int = 0) -> None:
    """Show a bar, on a terminal; to be taken away by `stop` whatever happens.

    Args:
        total: Of what `advance` counts.
        unit: Its name, such as "step".
        done: How many are done already.
    """
    global _bar
    stop()
    if _quiet or not on_terminal():
        return
    console = Console(file=sys.stdout)
    columns = [
        SpinnerColumn("line"),
        _Shown(lambda task: f"{unit} {min(int(task.completed) + 1, total)}/{total}"),
        *([BarColumn(bar_width=20)] if console.width >= ROOM_FOR_BAR else []),
        _Shown(lambda task: task.description),
        *([_Shown(lambda task: task.fields["speed"])] if console.width >= ROOM_FOR_SPEED else []),
        _Shown(_time_left),
    ]
    _bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    _bar.add_task("", total=total, completed=done, speed="", done_before=done)
    _bar.start()
    console.show_cursor(True)  # a run that is killed leaves the terminal as it was


def phase(name: str) -> None:
    """Show what is being done."""
    if _bar:
        _bar.update(_bar.task_ids[0], description=name)


def advance(n: int = 1, tokens_per_s: float | None = None) -> None:
    """Count `n` more as done."""
    if _bar:
        if tokens_per_s is not None:
            _bar.update(_bar.task_ids[0], speed=f"{tokens_per_s:.0f} tokens/s")
        _bar.update(_bar.task_ids[0], advance=n)


def stop() -> None:
    """Take the bar away."""
    global _bar
    if _bar:
        _bar.stop()
        _bar = None


class _Shown(ProgressColumn):
    """A column of the bar: what a function makes of its task."""

    def __init__(self, value: Callable[[Task], str]):
        super().__init__(Column(no_wrap=True))
        self.value = value

    def render(self, task: Task) -> Text:
        return Text(self.value(task))


def _time_left(task: Task) -> str:
    """By the mean over all that is done: steps of many seconds leave rich's own estimate, over the last 30, without any."""
    done = task.completed - task.fields["done_before"]
    if not done or task.start_time is None or task.total is None:
        return ""
    seconds = round((time.monotonic() - task.start_time) / done * (task.total - task.completed))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


# ----------------------------------------------------------------------------------------------------------------------
# Lines and tables


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, framed on a terminal and plain otherwise; its first column holds names, the others values."""
    terminal = on_terminal()
    console = Console(file=sys.stdout, width=None if terminal else PLAIN_WIDTH, force_terminal=terminal)
    shown = Table(box=box.ROUNDED if terminal else None)
    for i, name in enumerate(columns):
        shown.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def say_rollouts(questions: list[str], answers: list[str], scores: Scores, group_size: int, step: int) -> None:
    """One line a question, then the sum of the step's rewards, in the words that users of this script know."""
    for start in range(0, len(questions), group_size):
        group = slice(start, start + group_size)
        right = int(scores.rule_rewards[group].sum())
        say(
            f"rollout q={questions[start]!r}, a={answers[start]!r}, returns={scores.rewards[group].sum():.2f}, "
            f"replay_buffer_size={start + group_size}, right={right}/{group_size}"
        )
    say(f"returns of step {step}: {scores.rewards.sum():.4f}")


def say_samples(rows: list[dict]) -> None:
    """Some completions of a step with each part of their reward: the highest, the middle and the lowest reward.

    Args:
        rows: From `run_log.rollout_rows`.
    """
    ranked = sorted(rows, key=lambda row: row["reward"], reverse=True)
    for i in range(min(SAMPLES_SHOWN, len(ranked))):
        row = ranked[i * (len(ranked) - 1) // (SAMPLES_SHOWN - 1)]
        text, half = row["completion"], SAMPLE_CHARS // 2
        shown = repr(text) if len(text) <= SAMPLE_CHARS else f"{text[:half]!r} ... {text[-half:]!r}"
        say(
            f"sample q={row['question']!r}, a={row['answer']!r}, {'right' if row['correct'] else 'wrong'}, "
            f"rm={row['rm_score']:.2f}, r_hat={row['r_hat']:.2f}, weight={row['weight']:.2f}, reward={row['reward']:.2f}, "
            f"advantage={row['advantage']:+.2f}: {shown}"
        )


def say_step(step: int, total_steps: int, metrics: dict[str, float]) -> None:
    """The line of one step, in the words that users of this script know."""
    say(
        f"{step}: kl={metrics['policy/kl']:.4f}, grad_norm={metrics['policy/grad_norm']:.4f}, "
        f"right={100 * metrics['reward/rule_mean']:.0f}%, tokens={metrics['completion/len_mean']:.0f}, "
        f"truncated={100 * metrics['completion/truncated_frac']:.0f}%, {metrics['time/step_s']:.1f} s, "
        f"{metrics['time/tokens_per_s']:.0f} tokens/s (step {step + 1} of {total_steps})"
    )


def say_summary(run_folder: Path) -> None:
    """A table of what changed from the first steps of a run to its last, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "policy/loss" in line]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    if _quiet or not steps:
        return
    n = min(FIRST_AND_LAST, len(steps))

    def row(name: str, metric: str, form: Callable[[float], str]) -> list[str]:
        values = [[line[metric] for line in part if line[metric] is not None] for part in (steps[:n], steps[-n:])]
        return [name, *(form(sum(of_part) / len(of_part)) if of_part else "-" for of_part in values)]

    rows = [
        row("right answers", "reward/rule_mean", _percent),
        row("reward", "reward/mean", "{:.2f}".format),
        row("groups without an advantage", "reward/zero_std_frac", _percent),
        row("tokens of a completion", "completion/len_mean", "{:.0f}".format),
        row("completions cut off", "completion/truncated_frac", _percent),
        row("KL divergence to the reference", "policy/kl", "{:.4f}".format),
        row("entropy, nats per token", "policy/entropy", "{:.2f}".format),
        row("seconds of a step", "time/step_s", "{:.1f}".format),
        row("  rollout", "time/rollout_s", "{:.1f}".format),
        row("  score", "time/score_s", "{:.1f}".format),
        row("  update", "time/update_s", "{:.1f}".format),
        row("tokens per second", "time/tokens_per_s", "{:.0f}".format),
    ]
    if evaluated:
        shown = [_percent(line["eval/accuracy"]) + _interval(line) for line in (evaluated[0], evaluated[-1])]
        rows.insert(0, ["held-out accuracy (95 % interval), before and after", *shown])
    table(["mean of", f"the first {n} steps", f"the last {n}"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(line: dict) -> str:
    return f" ({100 * line['eval/accuracy_low']:.1f} to {100 * line['eval/accuracy_high']:.1f})"
