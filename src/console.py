"""What a run says: plain lines, and on a terminal a bar below them with the phase, the speed and the time that is left.

Text from models and data is printed by its repr, which escapes whatever is not printable: control characters, ANSI codes and
marks of writing direction reach no terminal. There is one standard output, so there is one bar, kept by this module.
"""

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

PLAIN_WIDTH = 120  # columns of a table that is not on a terminal
NARROW = 80  # columns below which a terminal shows no bar, only its figures

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


@contextmanager
def restored_terminal() -> Iterator[None]:
    """Take the bar away when the block ends, however it ends; also a decorator."""
    try:
        yield
    finally:
        stop()


def start(total: int, unit: str) -> None:
    """Show a bar on a terminal.

    Args:
        total: Of what `advance` counts.
        unit: Its name, such as "step".
    """
    global _bar
    stop()
    if _quiet or not on_terminal():
        return
    console = Console(file=sys.stdout)
    columns = [
        SpinnerColumn(),
        _Shown(lambda task: f"{unit} {min(int(task.completed) + 1, total)}/{total}"),
        *([BarColumn(bar_width=20)] if console.width >= NARROW else []),
        _Shown(lambda task: task.description),
        _Shown(lambda task: task.fields["speed"]),
        _Shown(_time_left),
    ]
    _bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    _bar.add_task("", total=total, speed="")
    _bar.start()


def phase(name: str) -> None:
    """Show what is being done."""
    if _bar:
        _bar.update(_bar.task_ids[0], description=name)


def advance(n: int = 1, tokens_per_s: float | None = None) -> None:
    """Count `n` more as done."""
    if _bar:
        speed = {} if tokens_per_s is None else {"speed": f"{tokens_per_s:.0f} tokens/s"}
        _bar.update(_bar.task_ids[0], advance=n, **speed)


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
    if not task.completed or task.total is None:
        return ""
    seconds = round((time.monotonic() - task.start_time) / task.completed * (task.total - task.completed))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def table(columns: list[str], rows: list[list[str]], title: str = "") -> None:
    """Print a table, framed on a terminal and plain otherwise; its first column holds names, the others values."""
    terminal = on_terminal()
    console = Console(file=sys.stdout, width=None if terminal else PLAIN_WIDTH, force_terminal=terminal)
    shown = Table(title=Text(title) if title else None, title_justify="left", box=box.ROUNDED if terminal else None)
    for i, name in enumerate(columns):
        shown.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
