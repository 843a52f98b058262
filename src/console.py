"""What a run prints: plain lines and, on a terminal or in a notebook, a bar with phase and progress.

Text from models and data is printed as its repr, which escapes everything that is not printable, so control
characters, ANSI codes and bidirectional marks never reach a terminal. There is only one standard output and
therefore only one bar, which is a global of this module.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

PLAIN_WIDTH = 120  # columns of a table that is not printed on a terminal
# Minimum terminal widths for the bar, for the speed, and for how far a phase is.
ROOM_FOR_BAR, ROOM_FOR_SPEED, ROOM_FOR_COUNTS = 110, 90, 60
NOTEBOOK_REFRESH_S = 0.5
T = TypeVar("T")

_quiet = False
_bar: Progress | None = None
_counts = ""  # how far the loops of the current phase are


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


def _can_replace() -> bool:
    """Whether a line can be replaced: on a terminal, and in a notebook."""
    return on_terminal() or Console(file=sys.stdout).is_jupyter


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
    stop()
    if _quiet or not _can_replace():
        return
    console = Console(file=sys.stdout)
    columns = [
        SpinnerColumn("line"),
        _TextColumn(lambda task: f"{unit} {min(int(task.completed) + 1, total)}/{total}"),
        *([BarColumn(bar_width=20)] if console.width >= ROOM_FOR_BAR else []),
        *_phase_columns(console),
        *([_TextColumn(lambda task: task.fields["speed"])] if console.width >= ROOM_FOR_SPEED else []),
        _TextColumn(_time_left),
    ]
    _show(console, columns, total, done)


def _phase_columns(console: Console) -> list[ProgressColumn]:
    counts = [_TextColumn(lambda task: task.fields["counts"])] if console.width >= ROOM_FOR_COUNTS else []
    return [_TextColumn(lambda task: task.description), *counts]


def _show(console: Console, columns: list[ProgressColumn], total: int | None = None, done: int = 0) -> None:
    global _bar
    if console.is_jupyter:
        _bar = _NotebookBar(*columns)
    else:
        _bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    _bar.add_task("", total=total, completed=done, speed="", counts="", done_before=done)
    _bar.start()
    if on_terminal():
        console.show_cursor(True)  # otherwise a killed run would leave the terminal without a cursor


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Show a phase on the bar while it lasts, then show the previous phase again.

    Outside of `start` and `stop`, the phase has a line of its own, with the time that it has taken.
    """
    own = _bar is None and not _quiet and _can_replace()
    if own:
        console = Console(file=sys.stdout)
        _show(console, [SpinnerColumn("line"), *_phase_columns(console), TimeElapsedColumn()])
    before, counts_before = _bar.tasks[0].description if _bar else "", _counts
    _describe(name, "")
    try:
        yield
    finally:
        _describe(before, counts_before)
        if own:
            stop()


def counted(items: Sequence[T]) -> Iterator[T]:
    """Iterate over items, and show on the bar which one of how many it is."""
    before = _counts
    try:
        for number, item in enumerate(items, start=1):
            if len(items) > 1:
                _count(f"{before} {number}/{len(items)}".strip())
            yield item
    finally:
        _count(before)


def detail(text: str) -> None:
    """Show how far the current phase is, such as "12 left", after what `counted` shows."""
    if _bar:
        _bar.update(_bar.task_ids[0], counts=f"{_counts} {text}".strip())


def _count(counts: str) -> None:
    global _counts
    _counts = counts
    detail("")


def _describe(name: str, counts: str) -> None:
    if _bar:
        _bar.update(_bar.task_ids[0], description=name)
    _count(counts)


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


class _NotebookBar(Progress):
    """The bar in a notebook: one line of text below the cell, which is updated in place.

    rich's own bar for notebooks needs ipywidgets, and leaves its place empty without them.
    """

    def __init__(self, *columns: ProgressColumn):
        super().__init__(*columns, disable=True)
        self._handle: Any = None
        self._next = 0.0  # when the line may be replaced again

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + NOTEBOOK_REFRESH_S
            texts = [column.text(self.tasks[0]) for column in self.columns if isinstance(column, _TextColumn)]
            self._replace("  ".join(filter(None, texts)))

    def stop(self) -> None:
        super().stop()
        if self._handle:
            self._replace("")

    def _replace(self, text: str) -> None:
        from IPython.display import display  # type: ignore[import-not-found]  # there is one in a notebook

        if self._handle:
            self._handle.update({"text/plain": text}, raw=True)
        else:
            self._handle = display({"text/plain": text}, raw=True, display_id=True)


def _time_left(task: Task) -> str:
    """Estimate the time left from the mean over all units done.

    rich's own estimate covers only the last 30 s, which is less than one long step.
    """
    done = task.completed - task.fields["done_before"]
    if not done or task.start_time is None or task.total is None:
        return ""
    seconds = round((time.monotonic() - task.start_time) / done * (task.total - task.completed))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
