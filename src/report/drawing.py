"""The sections of report.html with their figures. Figures about the reward model are in score_figures.py."""

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from src.report.canvas import (
    PLACEHOLDERS,
    SERIES,
    STYLE,
    Drawing,
    finish,
    hover_curve,
    key_entry,
    new_axes,
    percent_axis,
    percent_limits,
    steps_axis,
)
from src.report.figures import LEARNING, PANELS, REWARD_MODEL, SIGNAL, Panel
from src.report.formats import percent
from src.report.reader import Run
from src.report.score_figures import score_figures, weight

Dash = str | tuple[float, tuple[float, ...]]  # matplotlib's type of a line style
DASHES: list[Dash] = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))]
SMOOTH_FROM = 60  # curves with at least this many points get a running mean
ACCURACY_METRICS = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
BOUND_METRICS = ("reward/rm_min", "reward/rm_max")  # drawn as lines among the scores
OTHERS = "All other metrics"


@dataclass
class Section:
    """A heading of the page with the figures below it."""

    title: str
    figures: list[Drawing]
    folded: bool = False  # whether it is collapsed until the reader opens it


def sections(runs: list[Run]) -> list[Section]:
    """All sections of the page that have a figure, in order."""
    # With several runs, a figure about a single run has the run's name in its title.
    suffixes = [f" ({run.name})" if len(runs) > 1 else "" for run in runs]
    with matplotlib.rc_context(STYLE):
        figures = {title: [curves(panel, runs) for panel in panels] for title, panels in PANELS.items()}
        figures[LEARNING].insert(0, held_out_accuracy(runs))
        scores: list[Drawing | None] = []
        for run, suffix in zip(runs, suffixes, strict=True):
            scores += score_figures(run, suffix)
            figures[SIGNAL].append(weight(run, suffix))
        figures[REWARD_MODEL] = scores + figures[REWARD_MODEL] if scores else []
        panels = [Panel(metric, {"": metric}, reading="") for metric in _metrics_without_panel(runs)]
        figures[OTHERS] = [curves(panel, runs) for panel in panels]
    found = [
        Section(title, [drawing for drawing in drawings if drawing], folded=title == OTHERS)
        for title, drawings in figures.items()
    ]
    return [section for section in found if section.figures]


def _metrics_without_panel(runs: list[Run]) -> list[str]:
    drawn = {metric for panels in PANELS.values() for panel in panels for metric in panel.curves.values()}
    drawn |= {"step", *ACCURACY_METRICS, *BOUND_METRICS}
    return sorted({name for run in runs for row in run.metrics for name in row} - drawn)


# ------------------------------------------------------------------------------------------------------------
# Curves over the steps


def curves(panel: Panel, runs: list[Run]) -> Drawing | None:
    """A panel as a figure, or None if no run has its metrics.

    In the report of one run, each metric has its own color. With several runs, each run has its own color and
    each metric its own pattern of dashes.
    """
    axes = new_axes()
    several = len(runs) > 1
    lines = [
        (label, metric)
        for label, metric in panel.curves.items()
        if any(run.series(metric)[0] for run in runs)
    ]
    dashes = [j if several else int(panel.colors[j] == "ink") for j in range(len(lines))]
    hover = []
    for i, run in enumerate(runs):
        top: np.ndarray = np.zeros(1)  # the upper edge of the stack so far
        for j, (label, metric) in enumerate(lines):
            steps, values = run.series(metric)
            if not any(map(math.isfinite, values)):
                continue
            color = SERIES[i % len(SERIES)] if several else PLACEHOLDERS[panel.colors[j]]
            if panel.stacked and not several:
                bottom, top = top, top + np.nan_to_num(values)
                bottom = np.broadcast_to(bottom, top.shape)
                axes.fill_between(steps, bottom, top, color=color, alpha=0.75, linewidth=0)
            else:
                _draw_line(axes, steps, values, color, DASHES[dashes[j]])
            name = f"{run.name} {label}".strip() if several else label
            hover.append(hover_curve(name, steps, values))
    if not hover:
        return None
    _set_limits(axes, hover, panel.share)
    steps_axis(axes, runs)
    key = [
        key_entry(label, "ink" if several else panel.colors[j], dashes[j])
        for j, (label, _) in enumerate(lines)
    ]
    metrics = [metric for _, metric in lines]
    return finish(axes, panel.title, panel.reading, key if len(key) > 1 else [], hover, metrics, panel.share)


def _set_limits(axes: Axes, hover: list[dict], share: bool) -> None:
    """Start the vertical axis at 0 unless a value is negative; shares are shown in percent."""
    values = [value for curve in hover for value in curve["values"] if value is not None]
    if share:
        percent_axis(axes)
        percent_limits(axes, max(values))
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)


def _draw_line(axes: Axes, steps: list[int], values: list[float], color: str, dash: Dash) -> None:
    """Draw a curve. A long curve is drawn as a running mean, with the values themselves faint behind it."""
    if len(steps) < SMOOTH_FROM:
        marker = "o" if len(steps) < 4 else None
        axes.plot(steps, values, color=color, linestyle=dash, marker=marker, markersize=3.5)
        return
    window = np.ones(len(steps) // 20 | 1)  # an odd number of steps
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    mean = total / np.maximum(np.convolve(known, window, "same"), 1)
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.7)
    axes.plot(steps, mean, color=color, linestyle=dash)


def held_out_accuracy(runs: list[Run]) -> Drawing | None:
    """Held-out accuracy with its 95% confidence band, or None if no run was evaluated."""
    axes = new_axes()
    hover = []
    for i, run in enumerate(runs):
        color = SERIES[i % len(SERIES)]
        steps, values = run.series("eval/accuracy")
        if not steps:
            continue
        low, high = run.series("eval/accuracy_low")[1], run.series("eval/accuracy_high")[1]
        if len(low) == len(steps):
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            axes.vlines(steps, low, high, color=color, alpha=0.5, linewidth=1)
        axes.plot(steps, values, color=color, marker="o", markersize=3.5)
        if len(runs) == 1:
            _label_ends(axes, steps, values)
        hover.append(hover_curve(run.name if len(runs) > 1 else "accuracy", steps, values))
    if not hover:
        return None
    percent_axis(axes)
    percent_limits(axes, 1.0)
    steps_axis(axes, runs)
    reading = "Share of the held-out problems that the policy answers correctly with greedy decoding."
    if any(run.series("eval/accuracy_low")[0] for run in runs):
        reading += (
            " The band is the 95% confidence interval for this number of problems; changes within it may be "
            "luck."
        )
    return finish(axes, "Held-out accuracy", reading, hover=hover, metrics=ACCURACY_METRICS, share=True)


def _label_ends(axes: Axes, steps: list[int], values: list[float]) -> None:
    """Write the first and the last value next to their points, on the side that the curve does not cross."""
    rises = values[0] < values[-1]
    for end, side, x in [(0, "left", 5), (-1, "right", 0)][: len(steps)]:
        below = len(steps) > 1 and rises == (end == 0)
        point, offset = (steps[end], values[end]), (x, -12 if below else 6)
        axes.annotate(percent(values[end]), point, offset, textcoords="offset points", ha=side, weight="bold")
