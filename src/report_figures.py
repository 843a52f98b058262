"""The figures of report.html: SVG that takes its colours from the page's style sheet, and so is light or dark with it."""

import math
import re
from collections.abc import Iterable
from io import StringIO

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.hybrid_reward import difficulty_weight, tanh_weight
from src.report_panels import PANELS, SCORES, Panel
from src.run_reader import Run

# matplotlib draws in placeholders, which become variables of style.css.
VARIABLES = ("ink", "faint", "right", "wrong", "s1", "s2", "s3", "s4", "s5", "s6")
PLACEHOLDER = {name: "#" + f"{i:02x}" * 3 for i, name in enumerate(VARIABLES, start=1)}
INK, FAINT, RIGHT, WRONG, *SERIES = PLACEHOLDER.values()
Dash = str | tuple[float, tuple[float, ...]]  # matplotlib's
DASHES: list[Dash] = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))]
STYLE = {
    "svg.fonttype": "none", "font.size": 8.5, "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True,
    "grid.color": FAINT, "grid.alpha": 0.35, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.5, "axes.formatter.useoffset": False, "xtick.major.size": 2.5,
    "ytick.major.size": 0, "axes.unicode_minus": False, "axes.linewidth": 0.7,
}  # fmt: skip
SMOOTH_FROM = 60  # points of a curve from which on a running mean lies over it


def sections(runs: list[Run]) -> list[dict]:
    """The page's sections of figures: a title and its figures, each with what the template needs to show it."""
    with matplotlib.rc_context(STYLE):
        found: list[dict] = [dict(title=name, figures=[curves(p, runs) for p in panels]) for name, panels in PANELS.items()]
        found[0]["figures"].insert(0, held_out(runs))
        of_scores = [figure for run in runs for figure in reward_model(run, len(runs) > 1)]
        found.insert(1, dict(title="Is the reward model any good?", figures=of_scores))
        found[1]["figures"] += [curves(SCORES, runs)] if found[1]["figures"] else []
        found[2]["figures"] += [weight(run, len(runs) > 1) for run in runs]
        drawn = {metric for panels in PANELS.values() for panel in panels for metric in panel.curves.values()}
        drawn |= {
            "step",
            "eval/accuracy",
            "eval/accuracy_low",
            "eval/accuracy_high",
            "reward/rm_min",
            "reward/rm_max",
            *SCORES.curves.values(),
        }
        others = sorted({name for run in runs for row in run.metrics for name in row} - drawn)
        found.append(dict(title="Every other metric", figures=[curves(Panel(name, {"": name}, ""), runs) for name in others]))
    for section in found:
        section["figures"] = [figure for figure in section["figures"] if figure]
        section["folded"] = section is found[-1]
    return [section for section in found if section["figures"]]


# ----------------------------------------------------------------------------------------------------------------------
# Curves over the steps


def curves(panel: Panel, runs: list[Run]) -> dict | None:
    """A panel as a figure; None where no run has its metrics."""
    figure, axes = _canvas()
    key: list[dict] = []
    hover: list[dict] = []
    several = len(runs) > 1
    lines = [(label, metric) for label, metric in panel.curves.items() if any(run.series(metric)[0] for run in runs)]
    for i, run in enumerate(runs):
        floor = np.zeros(1)
        for j, (label, metric) in enumerate(lines):
            steps, values = run.series(metric)
            if not any(map(math.isfinite, values)):
                continue
            name, dash = (f"s{i % 6 + 1}", j) if several else (panel.colours[j], int(panel.colours[j] == "ink"))
            colour = PLACEHOLDER[name]
            if panel.stacked and not several:
                ceiling = floor + np.nan_to_num(values)
                axes.fill_between(steps, np.broadcast_to(floor, ceiling.shape), ceiling, color=colour, alpha=0.75, linewidth=0)
                floor = ceiling
            else:
                _line(axes, steps, values, colour, DASHES[dash])
            hover.append(dict(label=f"{run.name} {label}".strip() if several else label, steps=steps, values=_clean(values)))
    for j, (label, _) in enumerate(lines):
        colour = "ink" if several else panel.colours[j]
        key.append(dict(label=label, colour=colour, dash=j if several else int(colour == "ink")))
    if not hover:
        return None
    values = [value for curve in hover for value in curve["values"] if value is not None]
    if panel.share:
        _percent(axes, max(values))
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)
    _steps_axis(axes, runs)
    metrics = [metric for _, metric in lines]
    return _finish(figure, axes, panel.title, panel.reading, key if len(key) > 1 else [], hover, metrics, panel.share)


def held_out(runs: list[Run]) -> dict | None:
    """Held-out accuracy with its 95 % confidence band."""
    figure, axes = _canvas()
    hover = []
    for i, run in enumerate(runs):
        steps, values = run.series("eval/accuracy")
        if not steps:
            continue
        colour = SERIES[i % len(SERIES)]
        low, high = run.series("eval/accuracy_low")[1], run.series("eval/accuracy_high")[1]
        if len(low) == len(steps):
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.vlines(steps, low, high, color=colour, alpha=0.5, linewidth=1)
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5)
        for end, side in [(0, "left"), (-1, "right")][: len(steps)] if len(runs) == 1 else []:
            below = len(steps) > 1 and (values[0] < values[-1]) == (end == 0)
            place, text = (5 if end == 0 else 0, -12 if below else 6), f"{100 * values[end]:.1f} %"
            axes.annotate(text, (steps[end], values[end]), place, textcoords="offset points", ha=side, weight="bold")
        hover.append(dict(label=run.name if len(runs) > 1 else "accuracy", steps=steps, values=_clean(values)))
    if not hover:
        return None
    _percent(axes, 1.0)
    _steps_axis(axes, runs)
    reading = "Share of problems never trained on that are answered right, greedily, after so many steps."
    if any(run.series("eval/accuracy_low")[0] for run in runs):
        reading += " The band is the 95 % confidence interval that their number allows: what lies within it may be luck."
    return _finish(
        figure, axes, "Held-out accuracy", reading, [], hover, ["eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"], True
    )


def _line(axes: Axes, steps: list[int], values: list[float], colour: str, dash: Dash = "-") -> None:
    """A curve; of a long one a running mean, with the values themselves faint behind it."""
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linestyle=dash, marker="o" if len(steps) < 4 else None, markersize=3.5)
        return
    width = len(steps) // 20 | 1
    window = np.ones(width)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    smooth = total / np.maximum(np.convolve(known, window, "same"), 1)
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.7)
    axes.plot(steps, smooth, color=colour, linestyle=dash)


# ----------------------------------------------------------------------------------------------------------------------
# The reward model


def reward_model(run: Run, several: bool) -> list[dict | None]:
    """Scores of right and of wrong answers: over the steps, at both ends of the run, and how well they tell them apart."""
    rows = [row for row in run.rollouts if math.isfinite(row["rm_score"])] if run.has_scores else []
    if not rows:
        return []
    of = f" ({run.name})" if several else ""
    steps = np.array([row["step"] for row in rows])
    scores = np.array([row["rm_score"] for row in rows])
    right = np.array([row["correct"] for row in rows])
    figures = [_score_fan(run, of, steps, scores, right), _auc(run, of, steps, scores, right)]
    cuts = np.unique(steps)
    quarter = max(1, len(cuts) // 4)
    ends = {"first": cuts[:quarter], "last": cuts[-quarter:]} if len(cuts) > 1 else {"only": cuts}
    for name, end in ends.items():
        part = np.isin(steps, end)
        figures.append(_histogram(run, of, name, end, scores[part], right[part], (scores.min(), scores.max())))
    return figures


def _bins(steps: np.ndarray, most: int = 24) -> list[np.ndarray]:
    """Neighbouring steps put together, so that no more than `most` points are drawn."""
    return np.array_split(np.unique(steps), min(most, len(np.unique(steps))))


def _score_fan(run: Run, of: str, steps: np.ndarray, scores: np.ndarray, right: np.ndarray) -> dict:
    figure, axes = _canvas()
    hover = []
    for verdict, colour, label in ((False, WRONG, "wrong"), (True, RIGHT, "right")):
        xs, quantiles = [], []
        for some in _bins(steps):
            part = scores[np.isin(steps, some) & (right == verdict)]
            if len(part) >= 3:
                xs.append(float(np.mean(some)))
                quantiles.append(np.quantile(part, (0.1, 0.25, 0.5, 0.75, 0.9)))
        if xs:
            q = np.array(quantiles).T
            axes.fill_between(xs, q[0], q[4], color=colour, alpha=0.12, linewidth=0)
            axes.fill_between(xs, q[1], q[3], color=colour, alpha=0.22, linewidth=0)
            axes.plot(xs, q[2], color=colour, marker="o" if len(xs) < 4 else None, markersize=3.5)
            hover.append(dict(label=f"{label}, median", steps=[round(x) for x in xs], values=_clean(q[2])))
    _bounds(axes, run, horizontal=True)
    _steps_axis(axes, [run])
    reading = (
        "Median, middle half and middle 80 % of the raw scores. Good: right answers lie above wrong ones and stay there. Hacked: "
        "wrong answers climb to the right ones while accuracy does not."
    )
    if run.bounds:
        reading += " Dashed: the warmup's bounds, outside of which scores are held."
    key = [dict(label=f"{v} answers", colour=v, dash=0) for v in ("right", "wrong")]
    return _finish(
        figure, axes, f"Scores of right and wrong answers{of}", reading, key, hover, ["reward/rm_mean", "reward/rm_std"]
    )


def _auc(run: Run, of: str, steps: np.ndarray, scores: np.ndarray, right: np.ndarray) -> dict | None:
    figure, axes = _canvas()
    xs, values = [], []
    for some in _bins(steps, 12):
        part = np.isin(steps, some)
        auc = area_under_curve(scores[part & right], scores[part & ~right])
        if auc is not None:
            xs.append(float(np.mean(some)))
            values.append(auc)
    if not xs:
        return None
    axes.plot(xs, values, color=SERIES[0], marker="o", markersize=3.5)
    axes.axhline(0.5, color=FAINT, linestyle="--", linewidth=0.9)
    axes.text(0.99, 0.5, "no better than a coin", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=7.5)
    axes.set_ylim(min(0.4, min(values) - 0.05), 1.02)
    _percent(axes)
    _steps_axis(axes, [run])
    reading = (
        "How often a right answer scores above a wrong one of the same steps (AUC; ties count half). A fall towards 50 % says "
        "that the policy has found what pleases the reward model without being right."
    )
    hover = [dict(label="AUC", steps=[round(x) for x in xs], values=_clean(values))]
    return _finish(figure, axes, f"Does it tell right from wrong?{of}", reading, [], hover, [], True)


def area_under_curve(right: np.ndarray, wrong: np.ndarray) -> float | None:
    """Probability that a right answer scores above a wrong one, ties counted half; None where there is no pair.

    >>> area_under_curve(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    if not len(right) or not len(wrong):
        return None
    ordered = np.sort(wrong)
    below, up_to = np.searchsorted(ordered, right, "left"), np.searchsorted(ordered, right, "right")
    return float((below + up_to).sum() / 2 / len(right) / len(wrong))


def _histogram(
    run: Run, of: str, name: str, steps: np.ndarray, scores: np.ndarray, right: np.ndarray, limits: tuple[float, float]
) -> dict:
    figure, axes = _canvas()
    edges = np.linspace(limits[0], limits[1] if limits[1] > limits[0] else limits[0] + 1, 25).tolist()
    for verdict, colour in ((False, WRONG), (True, RIGHT)):
        part = scores[right == verdict]
        if len(part):
            axes.hist(part, edges, color=colour, alpha=0.45, weights=np.full(len(part), 1 / len(scores)))
            axes.hist(part, edges, color=colour, histtype="step", linewidth=1, weights=np.full(len(part), 1 / len(scores)))
    _bounds(axes, run, horizontal=False)
    _percent(axes)
    axes.set_xlabel("score of the reward model")
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    reading = f"Share of the {len(scores)} completions of {span} by their score; the two colours together are all of them."
    key = [dict(label=f"right answers ({right.mean():.0%})", colour="right", dash=0),
           dict(label=f"wrong answers ({1 - right.mean():.0%})", colour="wrong", dash=0)]  # fmt: skip
    title = "Scores" if name == "only" else f"Scores in the {name} steps"
    return _finish(figure, axes, f"{title}{of}", reading, key, [], [])


def _bounds(axes: Axes, run: Run, horizontal: bool) -> None:
    for bound, name in zip(run.bounds or (), ("rm_min", "rm_max"), strict=False):
        if horizontal:
            axes.axhline(bound, color=INK, linestyle="--", linewidth=0.9)
            axes.text(0.995, bound, name, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=7.5)
        else:
            axes.axvline(bound, color=INK, linestyle="--", linewidth=0.9)


# ----------------------------------------------------------------------------------------------------------------------
# The weight


def weight(run: Run, several: bool, most: int = 700) -> dict | None:
    """What the weight followed: the group's sigma_u (sigmoid) or the completion's own r_hat (tanh); late steps darker."""
    s = run.settings
    if not run.rollouts or s.get("reward_mode") != "hybrid" or not run.has_scores:
        return None
    by_sigma = s["reward_scorer"] == "sigmoid"
    x_name = "sigma_u" if by_sigma else "r_hat"
    points = list(dict.fromkeys((row["step"], row[x_name], row["weight"]) for row in run.rollouts))
    points = points[:: math.ceil(len(points) / most)]
    steps, xs, ys = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    figure, axes = _canvas()
    grid = np.linspace(xs.min(), xs.max() if xs.max() > xs.min() else xs.min() + 1, 200)
    sigma_bar = run.series("reward/sigma_bar")[1]
    if by_sigma and sigma_bar:
        line = [difficulty_weight(sigma_bar[-1], x, s["w_min"], s["w_max"], s["k"]) for x in grid]
        axes.axvline(sigma_bar[-1], color=INK, linestyle="--", linewidth=0.9)
        side = "right" if sigma_bar[-1] > grid.mean() else "left"
        axes.text(sigma_bar[-1], 0.5, " last sigma_bar ", ha=side, transform=axes.get_xaxis_transform(), fontsize=7.5)
    else:
        line = [tanh_weight(x, s["w_min"], s["w_max"]) for x in grid]
    axes.plot(grid, line, color=FAINT, linewidth=1)
    late = (steps - steps.min()) / np.ptp(steps) if np.ptp(steps) else np.ones_like(steps)
    for low in np.linspace(0, 0.8, 5):  # five shades
        part = (late >= low) & (late < low + 0.2 + (low == 0.8))
        axes.plot(xs[part], ys[part], "o", color=SERIES[0], alpha=0.15 + 0.8 * low, markersize=3.5, markeredgewidth=0)
    axes.set(xlabel="sigma_u of the question" if by_sigma else "r_hat of the completion", ylabel="weight")
    reading = (
        "A point for each question and step, late steps darker. Right of sigma_bar the scores spread more than usual and the "
        "question counts for more. The line is the weight at the last sigma_bar; points off it had another."
        if by_sigma
        else "A point for each completion, late steps darker. The experimental weight grows with the completion's own r_hat."
    )
    of = f" ({run.name})" if several else ""
    return _finish(
        figure, axes, f"Weight by {'difficulty' if by_sigma else 'score'}{of}", reading, [], [], ["reward/weight_mean"]
    )


# ----------------------------------------------------------------------------------------------------------------------
# What all figures share


def _canvas() -> tuple[Figure, Axes]:
    """A small figure, so that three stand beside each other on a desk and one fills a phone."""
    figure = Figure(figsize=(3.8, 2.15))
    FigureCanvasSVG(figure)
    return figure, figure.add_axes((0.125, 0.185, 0.86, 0.775))


def _steps_axis(axes: Axes, runs: Iterable[Run]) -> None:
    last = max((row["step"] for run in runs for row in run.metrics), default=0)
    axes.set_xlim(-0.5 if last < 2 else -0.02 * last, max(last * 1.02, 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    axes.set_xlabel("step")


def _percent(axes: Axes, most: float | None = None) -> None:
    """A vertical axis of shares; the whole of 0 to 100 % unless all that there is lies far below (`most`)."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if most is not None:
        axes.set_ylim(-0.002, 1.04 if most > 0.2 else max(1.3 * most, 0.05))


def _clean(values: Iterable[float]) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]


def _finish(
    figure: Figure,
    axes: Axes,
    title: str,
    reading: str,
    key: list[dict],
    hover: list[dict],
    metrics: list[str],
    share: bool = False,
) -> dict:
    """The figure as SVG with the page's variables for colours, and where its steps lie for the pointer to find."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', svg)
    svg = re.sub(r"#0[1-9a]0[1-9a]0[1-9a]\b", lambda m: f"var(--{VARIABLES[int(m[0][1:3], 16) - 1]})", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    name = re.sub(r"\W+", "-", title)
    svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)  # no two figures may share an id
    svg = re.sub(r"\n\s*", "\n", svg)
    box, low, high = axes.get_position(), *axes.get_xlim()
    about = dict(left=round(box.x0, 4), right=round(box.x1, 4), low=low, high=high, share=share, curves=hover)
    return dict(title=title, reading=reading, key=key, svg=Markup(svg), hover=about if hover else None, metrics=metrics)
