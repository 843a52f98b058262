"""What all figures of report.html share: their colors, their axes, and their conversion to SVG.

Instead of fixed colors, the SVG uses variables of the page's style sheet, so that it follows the light or
dark theme.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.report.formats import rounded
from src.report.reader import Run

# matplotlib draws with placeholder colors, which `finish` replaces with variables of style.css.
VARIABLES = ("ink", "faint", "right", "wrong", "s1", "s2", "s3", "s4", "s5", "s6")
PLACEHOLDERS = {name: "#" + f"{i:02x}" * 3 for i, name in enumerate(VARIABLES, start=1)}
INK, FAINT, RIGHT, WRONG, *SERIES = PLACEHOLDERS.values()
DIGITS = 4  # significant digits of the values that page.js shows
SMALL = 7.5  # font size of labels inside a figure, in points
STYLE = {
    "svg.fonttype": "none", "font.size": 8.5, "text.color": INK, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.35,
    "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "lines.linewidth": 1.5, "axes.formatter.useoffset": False, "xtick.major.size": 2.5, "ytick.major.size": 0,
    "axes.unicode_minus": False, "axes.linewidth": 0.7,
}  # fmt: skip


@dataclass
class Drawing:
    """A finished figure, as template.html shows it."""

    title: str
    reading: str  # how to read the figure
    svg: Markup
    key: Sequence[dict]  # one entry per line, from `key_entry`
    hover: dict | None  # for page.js: the extent of the horizontal axis, and the curves' values
    metrics: Sequence[str]  # names of the metrics to explain below the figure


def new_axes() -> Axes:
    """Empty axes for a small figure. A desktop screen fits three side by side, and a phone fits one."""
    figure = Figure(figsize=(3.8, 2.15))
    FigureCanvasSVG(figure)
    return figure.add_axes((0.125, 0.185, 0.86, 0.775))


def steps_axis(axes: Axes, runs: Iterable[Run]) -> None:
    """Make the horizontal axis show all steps of the runs."""
    last = max((row["step"] for run in runs for row in run.metrics), default=0)
    axes.set_xlim(-0.5 if last < 2 else -0.02 * last, max(last * 1.02, 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    axes.set_xlabel("step")


def percent_axis(axes: Axes) -> None:
    """Label the vertical axis, which shows shares, in percent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def percent_limits(axes: Axes, highest: float) -> None:
    """Make the vertical axis run from 0 to 100%, or only as far as needed if no value exceeds 20%."""
    axes.set_ylim(-0.002, 1.04 if highest > 0.2 else max(1.3 * highest, 0.05))


def key_entry(label: str, color: str, dash: int = 0) -> dict:
    """A line's entry in the key: its label, the style.css variable of its color, and its dash pattern."""
    return dict(label=label, color=color, dash=dash)


def hover_curve(label: str, steps: list[int], values: Iterable[float]) -> dict:
    """A curve's values, of which page.js shows the one at the step under the pointer."""
    return dict(label=label, steps=steps, values=[rounded(value, DIGITS) for value in values])


def finish(
    axes: Axes,
    title: str,
    reading: str,
    key: Sequence[dict] = (),
    hover: Sequence[dict] = (),
    metrics: Sequence[str] = (),
    share: bool = False,
) -> Drawing:
    """Turn axes into a figure of the page.

    Args:
        axes: From `new_axes`, drawn with the colors of this module.
        title: The figure's title, which must be unique on the page.
        reading: How to read the figure.
        key: From `key_entry`.
        hover: From `hover_curve`. If empty, the figure shows no values under the pointer.
        metrics: Names of metrics to explain below the figure.
        share: Whether the values under the pointer are shares, shown in percent.
    """
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    box, (low, high) = axes.get_position(), axes.get_xlim()
    extent = dict(left=round(box.x0, 4), right=round(box.x1, 4), low=low, high=high, share=share)
    return Drawing(
        title=title,
        reading=reading,
        svg=_as_svg(axes, prefix=re.sub(r"\W+", "-", title)),
        key=key,
        hover=extent | dict(curves=list(hover)) if hover else None,
        metrics=metrics,
    )


def _as_svg(axes: Axes, prefix: str) -> Markup:
    """The figure as an SVG element. Its ids start with the prefix, so that no two figures share an id."""
    out = StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure = axes.figure
    assert isinstance(figure, Figure)  # not a subfigure, which cannot be saved
    figure.savefig(out, format="svg", metadata=no_metadata, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', svg
    )
    svg = re.sub(r"#0[1-9a]0[1-9a]0[1-9a]\b", lambda m: f"var(--{VARIABLES[int(m[0][1:3], 16) - 1]})", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", svg)
    return Markup(re.sub(r"\n\s*", "\n", svg))
