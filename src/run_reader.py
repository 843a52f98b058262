"""Reads what a run has left on disk, whatever state it is in: finished, running, or killed in mid-line."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from src.errors import InputError

STEP = re.compile(rb'\{"step": (\d+),')  # how a line of rollouts.jsonl begins


@dataclass
class Run:
    """What a run's folder holds."""

    name: str
    config: dict  # of config.json
    settings: dict  # its hyperparameters
    metrics: list[dict]  # by step, each step once
    rollouts: list[dict]  # of all steps, or of a long run of as many as were asked for
    sampled_steps: int  # that rollouts.jsonl has
    torn: int  # lines that are not whole: a run that was killed in mid-line
    written: datetime  # when the last line was

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; nan where it was not finite."""
        rows = [row for row in self.metrics if metric in row]
        return [row["step"] for row in rows], [math.nan if row[metric] is None else row[metric] for row in rows]

    def last_quarter(self, metric: str) -> float | None:
        """Mean over the last quarter of the steps; None where there is no finite value."""
        values = self.series(metric)[1]
        values = [v for v in values[3 * len(values) // 4 :] if math.isfinite(v)]
        return sum(values) / len(values) if values else None

    @property
    def steps(self) -> int:
        """Steps that were trained; the last line may be of an evaluation alone."""
        return len(self.series("time/step_s")[0])

    @property
    def total_steps(self) -> int | None:
        return self.settings.get("total_steps")  # runs from before it was recorded have none

    @property
    def device(self) -> str:
        return self.settings.get("run_device") or self.settings.get("device") or "an unknown device"

    @property
    def minutes(self) -> float:
        return sum(v for v in self.series("time/step_s")[1] if math.isfinite(v)) / 60

    @property
    def has_scores(self) -> bool:
        """Whether a reward model told completions apart; without one every score is 0."""
        return any(row["rm_score"] for row in self.rollouts)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The warmup's bounds of the scores; None where they are not on record or were not used."""
        low, high = self.series("reward/rm_min")[1], self.series("reward/rm_max")[1]
        if not low or not self.has_scores or self.settings.get("rm_bounds") != "warmup":
            return None
        return low[-1], high[-1]


def read_run(folder: Path, most: int) -> Run:
    """Read a run's files, whatever state it is in.

    Args:
        folder: The run's.
        most: Completions to read. Of more than that, whole steps are read at equal distances, the last one among them: a
            report is drawn while the run trains, and may take neither long nor much memory.

    Raises:
        InputError: There is no run in the folder.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: no run's folder, config.json cannot be read ({reason}); give output/<run>") from None
    metrics, torn_metrics = _read_lines(folder / "metrics.jsonl")
    rollouts, torn_rollouts, sampled_steps = _read_rollouts(folder / "rollouts.jsonl", most)
    by_step = {row["step"]: row for row in metrics}
    log = folder / "metrics.jsonl"
    written = datetime.fromtimestamp((log if log.exists() else folder / "config.json").stat().st_mtime)
    return Run(
        folder.resolve().name, config, config["hyperparameters"], [by_step[step] for step in sorted(by_step)], rollouts,
        sampled_steps, torn_metrics + torn_rollouts, written,
    )  # fmt: skip


def _read_rollouts(path: Path, most: int) -> tuple[list[dict], int, int]:
    """Completions of whole steps, how many of their lines were torn, and how many steps there are to take them from."""
    if not path.exists():
        return [], 0, 0
    with path.open("rb") as file:
        lines = Counter(int(match[1]) for line in file if (match := STEP.match(line)))
    steps, total = sorted(lines), sum(lines.values())
    count = min(len(steps), max(1, len(steps) * most // max(total, 1)))
    kept = {steps[-1 - i * len(steps) // count] for i in range(count)}
    rows, torn = _read_lines(path, kept)
    return rows, torn, len({row["step"] for row in rows}) + len(steps) - len(kept)


def _read_lines(path: Path, steps: set[int] | None = None) -> tuple[list[dict], int]:
    """The records of a JSONL file, all or those of some steps, and how many lines were torn: a killed run leaves one."""
    if not path.exists():
        return [], 0
    rows, torn = [], 0
    with path.open("rb") as file:  # bytes: JSON strings may hold U+2028, and a torn line may end within a character
        for line in file:
            if not line.strip() or (steps is not None and (match := STEP.match(line)) and int(match[1]) not in steps):
                continue
            try:
                rows.append(json.loads(line))
            except ValueError:
                torn += 1
    return rows, torn
