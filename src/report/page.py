"""report.html: a run's results so far, on one page that opens from disk without a server or a network.

    python -m src.report output/<run>                     draw the report of a run, finished or not
    python -m src.report output/<run> output/<another>    several runs, with their curves in the same figures

Everything on the page comes from the run's config.json, metrics.jsonl and rollouts.jsonl, except for the
meaning of each metric, which comes from docs/metrics.md. drawing.py draws the figures; template.html,
style.css and the scripts make the page around them.
"""

import base64
import functools
import hashlib
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from src.files import write_text
from src.report.formats import percent, rounded
from src.report.reader import Run, read_run

HERE = Path(__file__).parent
SCRIPTS = ("page.js", "explanation.js", "completions.js")  # joined in this order into one script
METRICS_TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"
MAX_COMPLETIONS = 20_000  # maximum on a page, over all of its runs


# ------------------------------------------------------------------------------------------------------------
# Results in words


@dataclass
class Meaning:
    """A metric's row in docs/metrics.md."""

    definition: str
    unit: str
    healthy: str  # the range in words: "any", "at most 0.3", "at least 2", "0.02 to 0.98"
    advice: str
    low: float  # the same range in numbers, which may be infinite
    high: float


@functools.cache
def meanings() -> dict[str, Meaning]:
    """Every metric's row in docs/metrics.md, by the metric's name.

    >>> meanings()["completion/truncated_frac"].high
    0.3
    """
    found = {}
    for line in METRICS_TABLE.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `([\w/]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", line):
            name, definition, unit, healthy, advice = match.groups()
            numbers = [float(n) for n in re.findall(r"[\d.]+", healthy)]
            low = numbers[0] if numbers and not healthy.startswith("at most") else -math.inf
            high = numbers[-1] if numbers and not healthy.startswith("at least") else math.inf
            found[name] = Meaning(definition, unit, healthy, advice, low, high)
    return found


def headline(run: Run) -> str:
    """The run's result in one sentence."""
    if not run.steps:
        return "No step has finished yet."
    steps = f"{run.steps} step{'s' * (run.steps > 1)}"
    if run.total_steps and run.steps < run.total_steps:
        steps = f"the first {run.steps} of {run.total_steps} steps"
    time = f"{run.minutes:.1f} minutes on {run.device}"
    _, held_out = run.series("eval/accuracy")
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
        verb = "rose" if last > first else "fell"
        change = "stayed at" if first == last else f"{verb} from {percent(first)} to"
        low, high = (run.series(f"eval/accuracy_{end}")[1] for end in ("low", "high"))
        interval = f" (95% interval {percent(low[-1])} to {percent(high[-1])})" if low else ""
        return f"Held-out accuracy {change} {percent(last)}{interval} over {steps} and {time}."
    _, right = run.series("reward/rule_mean")
    if len(right) == 1:
        return f"{percent(right[0], 0)} of the sampled answers were right ({steps}, {time})."
    window = max(1, len(right) // 5)
    first, last = sum(right[:window]) / window, sum(right[-window:]) / window
    start = "step" if window == 1 else f"{window} steps"
    end = "in the last" if window == 1 else f"in the last {window}"
    return (
        f"{percent(first, 0)} of the sampled answers were right in the first {start} and {percent(last, 0)} "
        f"{end} ({steps}, {time})."
    )


def concerns(run: Run) -> list[dict]:
    """The metrics whose mean over the last quarter of the steps is outside the healthy range, with advice."""
    found = []
    for name, meaning in meanings().items():
        value = run.last_quarter(name)
        if value is not None and not meaning.low <= value <= meaning.high:
            found.append(dict(metric=name, value=f"{value:.3g}", meaning=meaning))
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """The settings that matter most, as pairs of a label and a value."""
    s, total = run.settings, run.total_steps
    return [
        ("policy", str(s.get("model_name"))),
        ("reward model", str(s.get("reward_model_name")) + ("" if run.has_scores else " (no scores)")),
        ("reward", f"{s.get('reward_mode')}, {s.get('reward_scorer')} weight"),
        ("problems", str(s.get("data"))),
        ("steps", f"{run.steps} of {total}" if total else str(run.steps)),
        ("per step", f"{s.get('rollouts_per_step')} questions x {s.get('group_size')} completions"),
        ("time in steps", f"{run.minutes:.1f} minutes"),
        ("device", f"{run.device}, {str(s.get('compute_dtype', '')).removeprefix('torch.')}"),
        ("started", str(run.config.get("started", "")).replace("T", " ")),
        ("last written", run.last_written.isoformat(sep=" ", timespec="seconds")),
        ("commit", str(run.config.get("git_commit") or "unknown")[:10]),
    ]


# ------------------------------------------------------------------------------------------------------------
# The data of the completion browser

NUMBERS = ("step", "tokens", "rm_score", "n", "sigma_u", "r_hat", "weight", "reward", "advantage")
SETTINGS = ("reward_mode", "reward_scorer", "rm_bounds", "advantage_scale", "alpha", "beta", "w_min", "w_max")
DIGITS = 5  # significant digits of each number


def browser_data(runs: list[Run]) -> dict:
    """The data for completions.js: columns with one value per completion. Each question is stored once."""
    question_ids: dict[tuple[str, str], int] = {}  # (question, answer) -> its index in the list of questions
    names = (*NUMBERS, "run", "group", "question", "flags", "parsed", "completion")
    columns: dict[str, list] = {name: [] for name in names}
    group = -1
    for index, run in enumerate(runs):
        previous, in_group = None, 0
        for row in run.rollouts:
            problem = (row["question"], row["answer"])
            if (row["step"], problem) != previous or in_group == run.settings.get("group_size"):
                previous, in_group, group = (row["step"], problem), 0, group + 1
            in_group += 1
            for name in NUMBERS:
                columns[name].append(rounded(row[name], DIGITS))
            columns["run"].append(index)
            columns["group"].append(group)
            columns["question"].append(question_ids.setdefault(problem, len(question_ids)))
            columns["flags"].append(row["correct"] + 2 * row["finished"] + 4 * row["rm_clamped"])
            columns["parsed"].append(row["parsed_answer"])
            columns["completion"].append(row["completion"])
    return dict(
        runs=[_browser_settings(run) for run in runs],
        questions=[question for question, _ in question_ids],
        answers=[answer for _, answer in question_ids],
        columns=columns,
    )


def _browser_settings(run: Run) -> dict:
    """What explanation.js needs to know about a run to explain its rewards."""
    sigma_bar = dict(zip(*run.series("reward/sigma_bar"), strict=True))
    return {name: run.settings.get(name) for name in SETTINGS} | dict(
        name=run.name,
        scores=run.has_scores,
        bounds=run.bounds and [rounded(bound, DIGITS) for bound in run.bounds],
        steps=run.sampled_steps,
        kept=len({row["step"] for row in run.rollouts}),
        sigma_bar={step: rounded(value, DIGITS) for step, value in sigma_bar.items()},
    )


# ------------------------------------------------------------------------------------------------------------
# The page


def page(runs: list[Run]) -> str:
    """The report of one or more runs, as HTML."""
    # This module imports matplotlib, which a run does not need before its first checkpoint.
    from src.report import drawing

    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    names = sorted({name for run in runs for name in run.settings})
    settings = [(name, [run.settings.get(name) for run in runs]) for name in names]
    differing = [name for name, values in settings if any(value != values[0] for value in values)]
    return _template().render(
        title=" and ".join(run.name for run in runs),
        runs=[
            dict(
                name=run.name,
                headline=headline(run),
                facts=facts(run),
                concerns=concerns(run),
                incomplete_lines=run.incomplete_lines,
                steps=run.steps,
                unfinished=bool(run.total_steps and run.steps < run.total_steps),
            )
            for run in runs
        ],
        sections=drawing.sections(runs),
        meanings=meanings(),
        settings=settings,
        differing=[name for name in differing if name not in ("run_name", "output")],
        data=browser_data(runs),
        drawn=datetime.now().isoformat(sep=" ", timespec="seconds"),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= dict(prose=_prose, sentence=lambda text: _prose(text[0].upper() + text[1:]))
    environment.policies["json.dumps_kwargs"] = dict(separators=(",", ":"), allow_nan=False)
    return environment.get_template("template.html")


def _prose(text: str) -> Markup:
    """Text from docs/metrics.md as HTML."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def write_report(runs: list[Run], file: Path) -> None:
    """Write the page atomically, so that a reload never sees a partial file."""
    write_text(file, page(runs), errors="backslashreplace")


def renew_report(folder: Path) -> None:
    """Redraw a run's report.html. If that fails, print one warning, because it must not stop the training."""
    file = folder / "report.html"
    try:
        write_report([read_run(folder, MAX_COMPLETIONS)], file)
    except Exception as error:  # of any kind, such as a full disk or an incompatible matplotlib
        _warn_once(
            f"warning: {file} could not be drawn ({type(error).__name__}: {error}); training continues"
        )


@functools.cache
def _warn_once(message: str) -> None:
    print(message, flush=True)
