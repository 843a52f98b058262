"""Reads a run's files, whether the run has finished, is still running, or was killed while writing a line."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from src.errors import InputError

ROW_START = re.compile(rb'\{"step": (\d+),')  # how each line of rollouts.jsonl begins


@dataclass
class Run:
    """The contents of a run's folder."""

    name: str
    config: dict  # all of config.json
    settings: dict  # its hyperparameters
    metrics: list[dict]  # sorted by step, one record per step
    rollouts: list[dict]  # the completions of all steps, or of some steps if the run is long
    sampled_steps: int  # number of steps in rollouts.jsonl
    incomplete_lines: int  # number of lines skipped; a run that is killed while writing leaves one
    last_written: datetime

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; values that were not finite are nan."""
        rows = [row for row in self.metrics if metric in row]
        values = [math.nan if row[metric] is None else row[metric] for row in rows]
        return [row["step"] for row in rows], values

    def last_quarter(self, metric: str) -> float | None:
        """Mean over the last quarter of the steps, or None if there is no finite value."""
        values = self.series(metric)[1]
        values = [v for v in values[3 * len(values) // 4 :] if math.isfinite(v)]
        return sum(values) / len(values) if values else None

    @property
    def steps(self) -> int:
        """Number of steps trained. The last record may hold only an evaluation, which is not a step."""
        return len(self.series("time/step_s")[0])

    @property
    def total_steps(self) -> int | None:
        """Number of steps planned, or None for runs made before this was recorded."""
        return self.settings.get("total_steps")

    @property
    def device(self) -> str:
        return self.settings.get("run_device") or self.settings.get("device") or "an unknown device"

    @property
    def minutes(self) -> float:
        return sum(v for v in self.series("time/step_s")[1] if math.isfinite(v)) / 60

    @property
    def has_scores(self) -> bool:
        """Whether any score differs from 0. Without a reward model, all of them are 0."""
        return any(row["rm_score"] for row in self.rollouts)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The warmup's lower and upper bounds, or None if they were not recorded or are not used."""
        low, high = self.series("reward/rm_min")[1], self.series("reward/rm_max")[1]
        if not low or not self.has_scores or self.settings.get("rm_bounds") != "warmup":
            return None
        return low[-1], high[-1]


def read_run(folder: Path, max_completions: int) -> Run:
    """Read a run's files, whatever state the run is in.

    Args:
        folder: The run's folder.
        max_completions: Approximate limit on the number of completions to read. If the run has more, only
            some evenly spaced steps are read completely, including the last one. A report is drawn while the
            run trains, so drawing it must be quick and need little memory.

    Raises:
        InputError: The folder does not hold a run.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: not a run's folder, because config.json cannot be read ({reason}); pass output/<run>"
        ) from None
    metrics_file = folder / "metrics.jsonl"
    metrics, incomplete_metrics = _read_lines(metrics_file)
    rollouts, incomplete_rollouts, sampled_steps = _read_rollouts(folder / "rollouts.jsonl", max_completions)
    by_step = {row["step"]: row for row in metrics}
    newest = metrics_file if metrics_file.exists() else folder / "config.json"
    return Run(
        name=folder.resolve().name,
        config=config,
        settings=config["hyperparameters"],
        metrics=[by_step[step] for step in sorted(by_step)],
        rollouts=rollouts,
        sampled_steps=sampled_steps,
        incomplete_lines=incomplete_metrics + incomplete_rollouts,
        last_written=datetime.fromtimestamp(newest.stat().st_mtime),
    )


def _read_rollouts(path: Path, max_completions: int) -> tuple[list[dict], int, int]:
    """Read complete steps of rollouts.jsonl.

    Returns:
        The completions, the number of incomplete lines among them, and the number of steps in the file.
    """
    if not path.exists():
        return [], 0, 0
    with path.open("rb") as file:
        lines = Counter(int(match[1]) for line in file if (match := ROW_START.match(line)))
    steps, total = sorted(lines), sum(lines.values())
    count = min(len(steps), max(1, len(steps) * max_completions // max(total, 1)))
    chosen = {steps[-1 - i * len(steps) // count] for i in range(count)}
    rows, incomplete = _read_lines(path, chosen)
    return rows, incomplete, len({row["step"] for row in rows}) + len(steps) - len(chosen)


def _read_lines(path: Path, steps: set[int] | None = None) -> tuple[list[dict], int]:
    """The records of a JSONL file, for all steps or only for some, and the number of incomplete lines."""
    if not path.exists():
        return [], 0
    rows, incomplete = [], 0
    # The file is read as bytes, because JSON strings may contain U+2028, and an incomplete line may end in
    # the middle of a character.
    with path.open("rb") as file:
        for line in file:
            match = ROW_START.match(line)
            if not line.strip() or (steps is not None and match and int(match[1]) not in steps):
                continue
            try:
                rows.append(json.loads(line))
            except ValueError:
                incomplete += 1
    return rows, incomplete
