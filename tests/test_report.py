"""report.html: what it reads and what it says.

No state of a run keeps a report from being drawn, and no failure to draw stops a run.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from src.errors import InputError
from src.report import page as report_page
from src.report import reader, score_figures
from src.report.__main__ import main
from src.report.page import browser_data, concerns, headline, meanings, page, renew_report
from tests.conftest import ROOT, run_command
from tests.tools.synthetic_run import BOUNDS, write_run


def read_run(folder: Path, max_completions: int = 20_000) -> reader.Run:
    return reader.read_run(folder, max_completions)


def data_of(html: str) -> dict:
    """The data of the completion browser, as the page's script reads it."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    )


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


# --------------------------------------------------------------------------------------- every state of a run


def test_the_page_has_every_completion_with_each_part_of_its_reward(tmp_path):
    run = write_run(tmp_path / "run", steps=3, questions=2, group_size=4)
    rows = read_lines(run / "rollouts.jsonl")
    data = data_of(page([read_run(run)]))
    columns = data["columns"]
    assert len(columns["step"]) == len(rows) == 24
    for i, row in enumerate(rows):
        for name in ("step", "tokens", "rm_score", "n", "sigma_u", "r_hat", "weight", "reward", "advantage"):
            assert columns[name][i] == pytest.approx(row[name], rel=1e-4, abs=1e-9), name
        assert data["questions"][columns["question"][i]] == row["question"]
        assert data["answers"][columns["question"][i]] == row["answer"]
        assert (columns["completion"][i], columns["parsed"][i]) == (row["completion"], row["parsed_answer"])
        assert columns["flags"][i] == row["correct"] + 2 * row["finished"] + 4 * row["rm_clamped"]
    assert columns["group"] == [i // 4 for i in range(24)]
    assert data["runs"][0]["bounds"] == list(BOUNDS)


def test_two_groups_with_the_same_question_stay_separate(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=1, questions=2, group_size=4))
    for row in run.rollouts:
        row["question"], row["answer"] = "the same", "1"
    assert browser_data([run])["columns"]["group"] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("settings", "sentence", "sections"),
    [
        (
            {},
            r"Held-out accuracy rose from 10\.0% to 75\.0% \(95% interval 68\.5% to 80\.5%\) over 6 steps "
            r"and 0\.6 minutes on cpu\.$",
            5,
        ),
        (
            dict(evaluate=False),
            r"10% of the sampled answers were right in the first step and 77% in the last \(6 steps, 0\.6 ",
            5,
        ),
        (dict(scores=False), r"Held-out accuracy rose", 4),
        (dict(total_steps=20), r"10% of .* \(the first 6 of 20 steps, 0\.6 minutes", 5),
        (dict(steps=1, evaluate=False), r"10% of the sampled answers were right \(1 step, ", 5),
        (
            dict(steps=10, evaluate=False),
            r"14% of .* right in the first 2 steps and 78% in the last 2 \(10 steps, ",
            5,
        ),
        (dict(reward_mode="verifier", scores=False), r"Held-out", 4),
        (dict(reward_scorer="tanh"), r"Held-out", 5),
        (dict(rm_bounds="group"), r"Held-out", 5),
    ],
    ids=[
        "complete",
        "no evaluation",
        "no reward model",
        "unfinished",
        "one step",
        "ten steps",
        "verifier",
        "tanh",
        "group bounds",
    ],
)
def test_every_kind_of_run_has_its_sentence_and_sections(tmp_path, settings, sentence, sections):
    run = read_run(write_run(tmp_path / "run", **settings))
    assert re.match(sentence, headline(run))
    html = page([run])
    assert ("This run was not finished when the page was drawn" in html) == ("total_steps" in settings)
    assert len(re.findall(r'<section id="section-', html)) == sections
    assert ("Scores of right and wrong answers" in html) == settings.get("scores", True)
    assert ("Held-out accuracy</h3>" in html) == settings.get("evaluate", True)
    text = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL).lower()
    assert "nan" not in text.replace("finance", "")


def test_an_incomplete_last_line_is_skipped_and_mentioned(tmp_path):
    run = write_run(tmp_path / "run", total_steps=20)
    append(run / "metrics.jsonl", '{"step": 6, "reward/me')
    with (run / "rollouts.jsonl").open("ab") as file:
        file.write('{"step": 6, "question": "what\u00e9'.encode()[:-1])  # ends within a character
    read = read_run(run)
    assert (read.incomplete_lines, read.steps, len(read.rollouts)) == (2, 6, 72)
    assert "2 incomplete lines were skipped" in page([read])


def test_a_run_without_a_finished_step_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "rollouts.jsonl").unlink()
    assert "No step has finished yet." in page([read_run(run)])


def test_a_run_killed_before_its_first_line_of_metrics_has_a_page(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").unlink()
    monkeypatch.setattr(score_figures, "tanh_weight", None)  # the other scorer's formula may not be drawn
    html = page([read_run(run)])
    assert "Weight by difficulty</h3>" in html and ">last sigma_bar</text>" not in html
    assert len(data_of(html)["columns"]["step"]) == 12


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    run = write_run(tmp_path / "run", steps=3, questions=1)
    rows = read_lines(run / "rollouts.jsonl")
    rows[0]["advantage"] = math.nan
    write_lines(run / "rollouts.jsonl", rows)
    metrics = read_lines(run / "metrics.jsonl")
    metrics[0]["policy/kl"] = metrics[1]["reward/mean"] = None
    for record in metrics:
        record["policy/grad_norm"] = None
    write_lines(run / "metrics.jsonl", metrics)
    html = page([read_run(run)])
    assert data_of(html)["columns"]["advantage"][0] is None
    assert "Gradient norm</h3>" not in html and "KL to the reference</h3>" in html


def test_a_run_made_before_bounds_were_recorded_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["hyperparameters"]["total_steps"]
    (run / "config.json").write_text(json.dumps(config))
    newer = ("reward/rm_min", "reward/rm_max", "eval/accuracy_low", "eval/accuracy_high")
    metrics = read_lines(run / "metrics.jsonl")
    older = [{name: value for name, value in record.items() if name not in newer} for record in metrics]
    write_lines(run / "metrics.jsonl", older)
    read = read_run(run)
    assert read.bounds is None
    assert headline(read).startswith("Held-out accuracy rose from 10.0% to 75.0% over 6 steps")
    assert data_of(page([read]))["runs"][0]["bounds"] is None


def test_complete_steps_at_equal_distances_are_read_from_a_long_run(tmp_path):
    folder = write_run(tmp_path / "run", steps=50, questions=2, group_size=2, words=1)
    run = read_run(folder, max_completions=60)
    steps = sorted({row["step"] for row in run.rollouts})
    assert len(run.rollouts) == 60 == 4 * len(steps)
    assert steps[-1] == 49 and set(np.diff(steps)) == {3, 4}
    settings = browser_data([run])["runs"][0]
    assert (settings["steps"], settings["kept"]) == (50, 15)
    assert len(read_run(folder, max_completions=200).rollouts) == 200
    assert {row["step"] for row in read_run(folder, max_completions=1).rollouts} == {49}
    append(folder / "rollouts.jsonl", '{"step": 50, "question": "wh')
    assert read_run(folder, max_completions=60).incomplete_lines == 1
    assert read_run(folder).sampled_steps == 50


def test_several_runs_share_their_figures(tmp_path):
    folders = [
        write_run(tmp_path / name, scores=scores, k=k)
        for name, scores, k in (("a", True, 5.0), ("b", False, 1.0))
    ]
    html = page([read_run(folder) for folder in folders])
    data = data_of(html)
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert data["columns"]["run"] == [0] * 72 + [1] * 72
    assert max(data["columns"]["group"]) == 35
    kl = re.search(r"data-hover='([^']+)'>\s*<h3>KL", html)[1]
    assert [curve["label"] for curve in json.loads(kl)["curves"]] == ["a KL", "b KL"]
    assert re.search(r"The runs differ in:\s.*<code>k</code>", html)


# -------------------------------------------------------------------------------------------------- the words


def test_every_line_of_the_table_of_metrics_is_complete_and_has_a_valid_range():
    lines = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    assert len(lines) == len(meanings()) > 40  # every line is parsed, and no metric appears twice
    for name, meaning in meanings().items():
        assert re.fullmatch(r"any|at (most|least) [\d.]+|[\d.]+ to [\d.]+", meaning.healthy), name
        assert meaning.low < meaning.high and all((meaning.definition, meaning.unit, meaning.advice)), name
        assert meaning.unit != "share" or (meaning.low < 1 and meaning.high > 0), name
    flags = set(re.findall(r"`--([a-z0-9-]+)", (ROOT / "docs/metrics.md").read_text()))
    parameters = {name.replace("_", "-") for name in train.main.__annotations__}
    assert flags <= parameters, flags - parameters


def test_metrics_outside_their_range_are_listed_with_the_advice(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=8))
    assert [c["metric"] for c in concerns(run)] == []
    for row in run.metrics[-3:]:  # the very last one is the evaluation's
        row["completion/truncated_frac"] = 0.5
    run.metrics[0]["policy/kl"] = 9.0  # before the last quarter
    (concern,) = concerns(run)
    assert (concern["metric"], concern["value"]) == ("completion/truncated_frac", "0.5")
    assert "--max-new-tokens" in page([run])


SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_the_area_under_the_curve_counts_pairs(right, wrong):
    pairs = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    area = score_figures.area_under_curve(np.array(right), np.array(wrong))
    assert area == pytest.approx(sum(pairs) / len(pairs))


def test_figures_get_their_colors_from_the_page_and_share_no_id(tmp_path):
    html = page([read_run(write_run(tmp_path / "run", steps=70))])
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svgs)) <= {"#ffffff", "#000000"}
    assert "var(--right)" in svgs and "var(--ink)" in svgs
    ids = re.findall(r' id="([^"]+)"', svgs)
    assert len(ids) == len(set(ids))
    for variable in set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--c"}:
        assert f"{variable}:" in (ROOT / "src/report/style.css").read_text(), variable


# -------------------------------------------------------------------------------------------- hostile content


def test_text_cannot_become_markup(tmp_path):
    hostile = "</script><script>alert(1)</script><!-- \u2028 & ' \" <b>"
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", model_name=hostile)
    rows = read_lines(run / "rollouts.jsonl")
    for row in rows:
        row |= dict(question=hostile, answer=hostile, completion=hostile + "\ud800", parsed_answer=hostile)
    write_lines(run / "rollouts.jsonl", rows)
    lines = (run / "metrics.jsonl").read_text().replace('"policy/kl"', '"<script>alert(2)</script>"')
    (run / "metrics.jsonl").write_text(lines)
    renew_report(run)
    html = (run / "report.html").read_text()
    # Only the data and the page's own script are scripts.
    assert len(re.findall(r"<script", html)) == len(re.findall(r"</script", html)) == 2
    assert "<img" not in html and "<!--" not in html and "<b>" not in html.replace("<b>0", "")
    assert data_of(html)["columns"]["completion"][0] == hostile + "\ud800"
    assert not re.search(r"""(src|href|action|data)=["']?(https?:|//)""", html)


# ------------------------------------------------------------ drawing during a run, and from the command line


def test_a_report_that_cannot_be_drawn_costs_only_one_warning(tiny, monkeypatch, capsys):
    def fail(run):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_page, "headline", fail)
    monkeypatch.setattr(train, "renew_report", renew_report)
    run = train.main(**tiny | dict(checkpoint_interval=1))
    out = capsys.readouterr().out
    assert out.count("could not be drawn (RuntimeError: no ink)") == 1 and "done: 2 steps" in out
    assert not list(run.glob("*report*"))


def test_a_run_draws_its_report_at_each_checkpoint_and_at_its_end(tiny, monkeypatch):
    drawn = []
    write_report = report_page.write_report

    def record_and_write(runs, file):
        drawn.append(len(runs[0].metrics))
        write_report(runs, file)

    monkeypatch.setattr(report_page, "write_report", record_and_write)
    monkeypatch.setattr(train, "renew_report", renew_report)
    run = train.main(**tiny | dict(max_steps=3, checkpoint_interval=2, eval_data=tiny["data"]))
    assert drawn == [2, 3, 4]
    assert "Held-out accuracy" in (run / "report.html").read_text()


@pytest.mark.slow
def test_train_does_not_import_matplotlib_before_it_needs_it():
    done = run_command("-c", "import sys, train; assert 'matplotlib' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_line_draws_one_run_or_several(tmp_path):
    for name in "ab":
        write_run(tmp_path / name)
    done = run_command("-m", "src.report", str(tmp_path / "a"))
    assert done.stdout == f"wrote {tmp_path / 'a/report.html'}\n", done.stderr
    assert main([tmp_path / "a", tmp_path / "b"]) == tmp_path / "report.html"
    assert main([tmp_path / "b"], output=tmp_path / "c.html").exists()
    done = run_command("-m", "src.report", str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "not a run's folder" in done.stderr
    with pytest.raises(InputError, match="no run given"):
        main([])
    with pytest.raises(InputError, match="cannot be written"):
        main([tmp_path / "a"], output=tmp_path / "nowhere/report.html")
