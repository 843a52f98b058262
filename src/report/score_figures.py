"""Figures of report.html about the reward model: its scores for right and wrong answers, and the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from src.hybrid_reward import difficulty_weight, tanh_weight
from src.report.canvas import (
    FAINT,
    INK,
    PLACEHOLDERS,
    SERIES,
    SMALL,
    Drawing,
    finish,
    hover_curve,
    key_entry,
    new_axes,
    percent_axis,
    steps_axis,
)
from src.report.reader import Run

FAN_POINTS = 24  # maximum number of points per curve
AUC_POINTS = 12
HISTOGRAM_EDGES = 25
WEIGHT_POINTS = 700
SHADES = 5  # shades of the points in the weight's figure, from early to late steps


@dataclass
class _Scores:
    """The reward model's scores of N completions."""

    steps: np.ndarray  # (N,)
    values: np.ndarray  # (N,) raw scores, finite
    right: np.ndarray  # (N,) bool, the verdicts

    def at(self, steps: np.ndarray) -> _Scores:
        """The scores of some steps."""
        chosen = np.isin(self.steps, steps)
        return _Scores(self.steps[chosen], self.values[chosen], self.right[chosen])

    def bins(self, max_bins: int) -> list[np.ndarray]:
        """The steps, in at most `max_bins` bins of consecutive steps."""
        steps = np.unique(self.steps)
        return np.array_split(steps, min(max_bins, len(steps)))


def score_figures(run: Run, suffix: str) -> list[Drawing | None]:
    """Figures of the scores: over the steps, how well they tell right from wrong, and at the run's ends.

    Args:
        suffix: Appended to each title.

    Returns:
        The figures, with None for a figure without data. The list is empty if the run has no reward model.
    """
    rows = [row for row in run.rollouts if math.isfinite(row["rm_score"])] if run.has_scores else []
    if not rows:
        return []
    scores = _Scores(*(np.array([row[name] for row in rows]) for name in ("step", "rm_score", "correct")))
    figures = [_fan(run, scores, suffix), _auc_curve(run, scores, suffix)]
    steps = np.unique(scores.steps)
    quarter = max(1, len(steps) // 4)
    ends = {"Scores": steps}
    if len(steps) > 1:
        ends = {"Scores in the first steps": steps[:quarter], "Scores in the last steps": steps[-quarter:]}
    limits = (scores.values.min(), scores.values.max())
    figures += [_histogram(run, scores.at(end), limits, title + suffix) for title, end in ends.items()]
    return figures


def _fan(run: Run, scores: _Scores, suffix: str) -> Drawing:
    """Quantiles of the scores over the steps."""
    axes = new_axes()
    hover = []
    for right, name in ((False, "wrong"), (True, "right")):
        xs, quantiles = [], []
        for steps in scores.bins(FAN_POINTS):
            some = scores.at(steps)
            values = some.values[some.right == right]
            if len(values) >= 3:
                xs.append(float(np.mean(steps)))
                quantiles.append(np.quantile(values, (0.1, 0.25, 0.5, 0.75, 0.9)))
        if xs:
            color, q = PLACEHOLDERS[name], np.array(quantiles).T
            axes.fill_between(xs, q[0], q[4], color=color, alpha=0.12, linewidth=0)
            axes.fill_between(xs, q[1], q[3], color=color, alpha=0.22, linewidth=0)
            axes.plot(xs, q[2], color=color, marker="o" if len(xs) < 4 else None, markersize=3.5)
            hover.append(hover_curve(f"{name}, median", [round(x) for x in xs], q[2]))
    for bound, metric in zip(run.bounds or (), ("rm_min", "rm_max"), strict=False):
        axes.axhline(bound, color=INK, linestyle="--", linewidth=0.9)
        _label_at_right(axes, bound, metric)
    steps_axis(axes, [run])
    reading = (
        "Median, middle 50% and middle 80% of the raw scores. A good sign: right answers keep scoring higher "
        "than wrong ones. A sign of reward hacking: wrong answers climb to the level of right ones while "
        "accuracy does not rise."
    )
    if run.bounds:
        reading += " The dashed lines are the warmup's bounds; scores beyond them are clamped."
    key = [key_entry("right answers", "right"), key_entry("wrong answers", "wrong")]
    metrics = ("reward/rm_mean", "reward/rm_std")
    return finish(axes, f"Scores of right and wrong answers{suffix}", reading, key, hover, metrics)


def _auc_curve(run: Run, scores: _Scores, suffix: str) -> Drawing | None:
    """How well the scores separate right from wrong answers; None if no bin has both."""
    axes = new_axes()
    xs, values = [], []
    for steps in scores.bins(AUC_POINTS):
        some = scores.at(steps)
        auc = area_under_curve(some.values[some.right], some.values[~some.right])
        if auc is not None:
            xs.append(float(np.mean(steps)))
            values.append(auc)
    if not xs:
        return None
    axes.plot(xs, values, color=SERIES[0], marker="o", markersize=3.5)
    axes.axhline(0.5, color=FAINT, linestyle="--", linewidth=0.9)
    _label_at_right(axes, 0.5, "no better than a coin flip")
    axes.set_ylim(min(0.4, min(values) - 0.05), 1.02)
    percent_axis(axes)
    steps_axis(axes, [run])
    reading = (
        "How often a right answer scores higher than a wrong one from the same steps (AUC; a tie counts "
        "half). A fall toward 50% means that the policy has learned to please the reward model without "
        "being right."
    )
    hover = [hover_curve("AUC", [round(x) for x in xs], values)]
    return finish(axes, f"Does it tell right from wrong?{suffix}", reading, hover=hover, share=True)


def area_under_curve(right: np.ndarray, wrong: np.ndarray) -> float | None:
    """Probability that a right answer scores higher than a wrong one, or None if either kind is missing.

    Args:
        right: (R,) scores of right answers.
        wrong: (W,) scores of wrong answers. A tie counts half.

    >>> area_under_curve(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    if not len(right) or not len(wrong):
        return None
    wrong = np.sort(wrong)
    lower, lower_or_tied = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((lower + lower_or_tied).sum() / 2 / len(right) / len(wrong))


def _histogram(run: Run, scores: _Scores, limits: tuple[float, float], title: str) -> Drawing:
    """The distribution of the scores of some steps.

    Args:
        limits: Lowest and highest score of the whole run, so that histograms can be compared.
    """
    axes = new_axes()
    low, high = limits
    edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_EDGES).tolist()
    for right, name in ((False, "wrong"), (True, "right")):
        color, values = PLACEHOLDERS[name], scores.values[scores.right == right]
        if len(values):
            weights = np.full(len(values), 1 / len(scores.values))
            axes.hist(values, edges, color=color, alpha=0.45, weights=weights)
            axes.hist(values, edges, color=color, histtype="step", linewidth=1, weights=weights)
    for bound in run.bounds or ():
        axes.axvline(bound, color=INK, linestyle="--", linewidth=0.9)
    percent_axis(axes)
    axes.set_xlabel("score of the reward model")
    first, last = scores.steps.min(), scores.steps.max()
    span = f"step {first}" if first == last else f"steps {first} to {last}"
    reading = (
        f"Distribution of the reward model's scores of {len(scores.values)} completions ({span}). The bars "
        "of both colors together add up to 100%."
    )
    share = scores.right.mean()
    key = [
        key_entry(f"right answers ({share:.0%})", "right"),
        key_entry(f"wrong answers ({1 - share:.0%})", "wrong"),
    ]
    return finish(axes, title, reading, key)


def weight(run: Run, suffix: str) -> Drawing | None:
    """The weight, plotted against the quantity that it depends on.

    That quantity is the group's sigma_u for the sigmoid scorer, and the completion's own r_hat for the tanh
    scorer.

    Args:
        suffix: Appended to the title.

    Returns:
        None if the run's rewards were not weighted.
    """
    if not run.rollouts or run.settings.get("reward_mode") != "hybrid" or not run.has_scores:
        return None
    if run.settings["reward_scorer"] == "sigmoid":
        by, x_name, x_label = "difficulty", "sigma_u", "sigma_u of the question"
        reading = (
            "One point per question and step, darker for later steps. To the right of sigma_bar, the scores "
            "spread more than usual and the question counts more. The line is the weight at the last "
            "sigma_bar; points off the line were weighted with an earlier one."
        )
    else:
        by, x_name, x_label = "score", "r_hat", "r_hat of the completion"
        reading = (
            "One point per completion, darker for later steps. The experimental weight grows with the "
            "completion's own r_hat."
        )
    points = list(dict.fromkeys((row["step"], row[x_name], row["weight"]) for row in run.rollouts))
    points = points[:: math.ceil(len(points) / WEIGHT_POINTS)]
    steps, xs, ys = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    axes = new_axes()
    grid = np.linspace(xs.min(), xs.max() if xs.max() > xs.min() else xs.min() + 1, 200)
    _draw_weight_line(axes, run, grid)
    _draw_shaded(axes, steps, xs, ys)
    axes.set(xlabel=x_label, ylabel="weight")
    return finish(axes, f"Weight by {by}{suffix}", reading, metrics=["reward/weight_mean"])


def _draw_weight_line(axes: Axes, run: Run, grid: np.ndarray) -> None:
    """Draw the formula of the weight at the points of a grid, and sigma_bar if the formula uses it.

    The sigmoid scorer's formula is not drawn if no sigma_bar has been recorded yet.
    """
    s, sigma_bar = run.settings, run.series("reward/sigma_bar")[1]
    if s["reward_scorer"] == "sigmoid":
        if not sigma_bar:
            return
        last = sigma_bar[-1]
        line = [difficulty_weight(last, x, s["w_min"], s["w_max"], s["k"]) for x in grid]
        axes.axvline(last, color=INK, linestyle="--", linewidth=0.9)
        side = "right" if last > grid.mean() else "left"
        axes.annotate(
            "last sigma_bar",
            (last, 0.5),
            (-4 if side == "right" else 4, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha=side,
            fontsize=SMALL,
        )
    else:
        line = [tanh_weight(x, s["w_min"], s["w_max"]) for x in grid]
    axes.plot(grid, line, color=FAINT, linewidth=1)


def _draw_shaded(axes: Axes, steps: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> None:
    """Draw points, darker for later steps."""
    late = (steps - steps.min()) / np.ptp(steps) if np.ptp(steps) else np.ones_like(steps)
    for low in np.linspace(0, 0.8, SHADES):
        part = (late >= low) & (late < low + 0.2 + (low == 0.8))
        style = dict(color=SERIES[0], alpha=0.15 + 0.8 * low, markersize=3.5, markeredgewidth=0)
        axes.plot(xs[part], ys[part], "o", **style)


def _label_at_right(axes: Axes, y: float, text: str) -> None:
    """Write a label above the right end of a horizontal line."""
    place = axes.get_yaxis_transform()
    axes.text(0.995, y, text, transform=place, ha="right", va="bottom", fontsize=SMALL)
