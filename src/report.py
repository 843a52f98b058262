"""report.html: what a run has done so far as one page that opens from disk, with no server and no network.

    python -m src.report output/<run>                       draw it (again), finished or not
    python -m src.report output/<run> output/<another>      several runs, their curves over each other

Everything on it comes from the run's config.json, metrics.jsonl and rollouts.jsonl, and the meaning of each metric from
docs/metrics.md. The page is src/report_page/; src/report_figures.py draws the curves.
"""

import base64
import functools
import hashlib
import math
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import tyro
from markupsafe import Markup, escape

from src.errors import InputError
from src.run_reader import Run, read_run

PAGE = Path(__file__).parent / "report_page"
MOST_COMPLETIONS = 20_000  # of all runs on a page
METRICS = Path(__file__).parent.parent / "docs" / "metrics.md"


# ----------------------------------------------------------------------------------------------------------------------
# What is said in words


@dataclass
class Meaning:
    """A metric's line in docs/metrics.md."""

    definition: str
    unit: str
    healthy: str
    advice: str
    low: float
    high: float


@functools.cache
def meanings() -> dict[str, Meaning]:
    """Every metric's line in docs/metrics.md.

    >>> meanings()["completion/truncated_frac"].high
    0.3
    """
    found = {}
    for line in METRICS.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `([\w/]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", line):
            name, definition, unit, healthy, advice = match.groups()
            numbers = [float(n) for n in re.findall(r"[\d.]+", healthy)]
            low = numbers[0] if numbers and not healthy.startswith("at most") else -math.inf
            high = numbers[-1] if numbers and not healthy.startswith("at least") else math.inf
            found[name] = Meaning(definition, unit, healthy, advice, low, high)
    return found


def result(run: Run) -> str:
    """The run in one sentence."""
    if not run.steps:
        return "No step has been finished yet."
    done = f"{run.steps} step{'s' * (run.steps > 1)}"
    if run.total_steps and run.steps < run.total_steps:
        done = f"the first {run.steps} of {run.total_steps} steps"
    took = f"in {done} and {run.minutes:.1f} minutes on {run.device}"
    _, held_out = run.series("eval/accuracy")
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
        moved = "stayed at" if first == last else f"{'rose' if last > first else 'fell'} from {percent(first)} to"
        low, high = (run.series(f"eval/accuracy_{end}")[1] for end in ("low", "high"))
        interval = f" (95 % interval {percent(low[-1])} to {percent(high[-1])})" if low else ""
        return f"Held-out accuracy {moved} {percent(last)}{interval} {took}."
    _, right = run.series("reward/rule_mean")
    if len(right) == 1:
        return f"{percent(right[0], 0)} of the sampled answers were right {took}."
    few = max(1, len(right) // 5)
    first, last = sum(right[:few]) / few, sum(right[-few:]) / few
    window = "step" if few == 1 else f"{few} steps"
    return f"{percent(first, 0)} of the sampled answers were right in the first {window}, {percent(last, 0)} in the last, {took}."


def percent(share: float, digits: int = 1) -> str:
    """A share for people.

    >>> percent(0.285)
    '28.5 %'
    """
    return f"{100 * share:.{digits}f} %"


def concerns(run: Run) -> list[dict]:
    """Metrics whose mean over the last quarter of the steps lies outside of their healthy range, with the advice."""
    found = []
    for name, meaning in meanings().items():
        value = run.last_quarter(name)
        if value is not None and not meaning.low <= value <= meaning.high:
            found.append(dict(metric=name, value=f"{value:.3g}", meaning=meaning))
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """What ran, in pairs of a name and a value."""
    s, total = run.settings, run.total_steps
    done = f"{run.steps} of {total}" if total else str(run.steps)
    return [
        ("policy", str(s.get("model_name"))),
        ("reward model", str(s.get("reward_model_name")) + ("" if run.has_scores else " (no scores)")),
        ("reward", f"{s.get('reward_mode')}, {s.get('reward_scorer')} weight"),
        ("problems", str(s.get("data"))),
        ("steps", done),
        ("a step", f"{s.get('rollouts_per_step')} questions x {s.get('group_size')} completions"),
        ("time", f"{run.minutes:.1f} minutes of steps"),
        ("device", f"{run.device}, {str(s.get('compute_dtype', '')).removeprefix('torch.')}"),
        ("started", str(run.config.get("started", "")).replace("T", " ")),
        ("last line written", run.written.isoformat(sep=" ", timespec="seconds")),
        ("commit", str(run.config.get("git_commit") or "unknown")[:10]),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The rollout browser's data

COLUMNS = ("step", "tokens", "rm_score", "n", "sigma_u", "r_hat", "weight", "reward", "advantage")
SETTINGS = ("reward_mode", "reward_scorer", "rm_bounds", "advantage_scale", "alpha", "beta", "w_min", "w_max")


def browser_data(runs: list[Run]) -> dict:
    """What page.js lists, by columns: a value for each completion in each. Questions are said once."""
    texts: dict[tuple[str, str], int] = {}
    columns: dict[str, list] = {name: [] for name in (*COLUMNS, "run", "group", "question", "flags", "parsed", "completion")}
    group, about = -1, []
    for index, run in enumerate(runs):
        previous, in_group = None, 0
        for row in run.rollouts:
            asked = (row["question"], row["answer"])
            if (row["step"], asked) != previous or in_group == run.settings.get("group_size"):
                previous, in_group, group = (row["step"], asked), 0, group + 1
            in_group += 1
            for name in COLUMNS:
                columns[name].append(_short(row[name]))
            columns["run"].append(index)
            columns["group"].append(group)
            columns["question"].append(texts.setdefault(asked, len(texts)))
            columns["flags"].append(row["correct"] + 2 * row["finished"] + 4 * row["rm_clamped"])
            columns["parsed"].append(row["parsed_answer"])
            columns["completion"].append(row["completion"])
        sigma_bar = dict(zip(*run.series("reward/sigma_bar"), strict=True))
        about.append(
            {name: run.settings.get(name) for name in SETTINGS}
            | dict(name=run.name, scores=run.has_scores, bounds=run.bounds and [_short(bound) for bound in run.bounds])
            | dict(steps=run.sampled_steps, kept=len({row["step"] for row in run.rollouts}))
            | dict(sigma_bar={step: _short(value) for step, value in sigma_bar.items()})
        )
    return dict(runs=about, questions=[q for q, _ in texts], answers=[a for _, a in texts], columns=columns)


def _short(value: float) -> float | None:
    """Five significant digits; null for what JSON has no word for."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------------------
# The page


def page(runs: list[Run]) -> str:
    """The page of one run or several as HTML."""
    from src import report_figures  # matplotlib, which a run does not need before its first checkpoint

    script = (PAGE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= dict(prose=_prose, sentence=lambda text: _prose(text[0].upper() + text[1:]))
    environment.policies["json.dumps_kwargs"] = dict(separators=(",", ":"), allow_nan=False)
    names = sorted({name for run in runs for name in run.settings})
    values = [(name, [run.settings.get(name) for run in runs]) for name in names]
    differing = [name for name, of_runs in values if any(value != of_runs[0] for value in of_runs)]
    return environment.get_template("template.html").render(
        title=" and ".join(run.name for run in runs),
        runs=[
            dict(name=run.name, result=result(run), facts=facts(run), concerns=concerns(run), torn=run.torn, steps=run.steps,
                 unfinished=bool(run.total_steps and run.steps < run.total_steps))
            for run in runs
        ],
        sections=report_figures.sections(runs),
        meanings=meanings(),
        settings=values,
        differing=[name for name in differing if name not in ("run_name", "output")],
        data=browser_data(runs),
        drawn=datetime.now().isoformat(sep=" ", timespec="seconds"),
        style=Markup((PAGE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def _prose(text: str) -> Markup:
    """Text of docs/metrics.md as HTML."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def write_report(runs: list[Run], file: Path) -> None:
    """Write the page, in one movement: whoever has it open never loads half of it."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(page(runs), encoding="utf-8", errors="backslashreplace")
    aside.replace(file)


def renew_report(folder: Path) -> None:
    """Draw a run's report.html from what is on disk. Whatever goes wrong there is said once and never stops the run."""
    try:
        write_report([read_run(folder, MOST_COMPLETIONS)], folder / "report.html")
    except Exception as error:  # a full disk, a matplotlib of another version: nothing in here may cost a training run
        _warn(f"warning: {folder / 'report.html'} could not be drawn ({type(error).__name__}: {error}); training goes on")


@functools.cache
def _warn(message: str) -> None:
    print(message, flush=True)


def main(runs: tyro.conf.Positional[list[Path]], output: Path | None = None) -> Path:
    """Draw the report of a run, finished or not, or of several with their curves over each other.

    Args:
        runs: Folders of runs: output/<run> ...
        output: File to write. By default report.html in the run's folder; of several runs, in the folder above the first.

    Returns:
        The file.

    Raises:
        InputError: A folder holds no run, or the file cannot be written.
    """
    if not runs:
        raise InputError("no run given; give at least one output/<run>")
    file = output or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    try:
        write_report([read_run(folder, MOST_COMPLETIONS // len(runs)) for folder in runs], file)
    except OSError as error:
        raise InputError(f"--output {file}: cannot be written ({error.strerror}); name another file") from None
    print(f"wrote {file}")
    return file


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)  # as for a flag that is not one
