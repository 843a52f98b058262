"""What a run prints: plain lines and, on a terminal, a bar below them with phase, speed and time left.

Text from models and data is printed as its repr, which escapes everything that is not printable, so control
characters, ANSI codes and bidirectional marks never reach a terminal. There is only one standard output and
therefore only one bar, which is a global of this module.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.table import Column, Table
from rich.text import Text

PLAIN_WIDTH = 120  # columns of a table that is not printed on a terminal
ROOM_FOR_BAR, ROOM_FOR_SPEED = 80, 60  # minimum terminal width for the bar, and for the speed

_quiet = False
_bar: Progress | None = None


def configure(quiet: bool) -> None:
    """Turn off `say` and the bar if `quiet`, else turn them on. Warnings and results are always printed."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def say(line: str) -> None:
    """Print a line of information."""
    if not _quiet:
        print(line, flush=True)


def warn(message: str) -> None:
    """Print a warning, even if quiet."""
    print(f"warning: {message}", flush=True)


def on_terminal() -> bool:
    """Whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table of names (first column) and values, framed on a terminal and plain otherwise."""
    terminal = on_terminal()
    console = Console(file=sys.stdout, width=None if terminal else PLAIN_WIDTH, force_terminal=terminal)
    shown = Table(box=box.ROUNDED if terminal else None)
    for i, name in enumerate(columns):
        shown.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


# ----------------------------------------------------------------------------------------------------------
# The bar


def start(total: int, unit: str, done: int = 0) -> None:
    """Show the bar if the output is a terminal. Always call `stop` at the end, even after an error.

    Args:
        total: How many units there are.
        unit: Name of what `advance` counts, such as "step".
        done: How many are already done.
    """
    global _bar
    stop()
    if _quiet or not on_terminal():
        return
    console = Console(file=sys.stdout)
    columns = [
        SpinnerColumn("line"),
        _TextColumn(lambda task: f"{unit} {min(int(task.completed) + 1, total)}/{total}"),
        *([BarColumn(bar_width=20)] if console.width >= ROOM_FOR_BAR else []),
        _TextColumn(lambda task: task.description),
        *([_TextColumn(lambda task: task.fields["speed"])] if console.width >= ROOM_FOR_SPEED else []),
        _TextColumn(_time_left),
    ]
    _bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    _bar.add_task("", total=total, completed=done, speed="", done_before=done)
    _bar.start()
    console.show_cursor(True)  # otherwise a killed run would leave the terminal without a cursor


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Show a phase on the bar while it lasts, then show the previous phase again."""
    before = _bar.tasks[0].description if _bar else ""
    _describe(name)
    try:
        yield
    finally:
        _describe(before)


def _describe(name: str) -> None:
    if _bar:
        _bar.update(_bar.task_ids[0], description=name)


def advance(n: int = 1, tokens_per_s: float | None = None) -> None:
    """Count `n` more units as done."""
    if _bar:
        if tokens_per_s is not None:
            _bar.update(_bar.task_ids[0], speed=f"{tokens_per_s:.0f} tokens/s")
        _bar.update(_bar.task_ids[0], advance=n)


def stop() -> None:
    """Remove the bar."""
    global _bar
    if _bar:
        _bar.stop()
        _bar = None


class _TextColumn(ProgressColumn):
    """A column of the bar, with a function that computes its text from the task."""

    def __init__(self, text: Callable[[Task], str]):
        super().__init__(Column(no_wrap=True))
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(self.text(task))


def _time_left(task: Task) -> str:
    """Estimate the time left from the mean over all units done.

    rich's own estimate covers only the last 30 s, which is less than one long step.
    """
    done = task.completed - task.fields["done_before"]
    if not done or task.start_time is None or task.total is None:
        return ""
    seconds = round((time.monotonic() - task.start_time) / done * (task.total - task.completed))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
