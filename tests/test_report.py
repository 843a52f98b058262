"""report.html: what is read, what is said of it, and that no state of a run and no failure to draw can stop anything."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from src import report, report_figures, run_reader
from src.errors import InputError
from src.report import browser_data, concerns, main, meanings, page, renew_report, result
from tests.conftest import ROOT, run_command
from tests.synthetic_run import BOUNDS, write_run


def read_run(folder: Path, most: int = 20_000) -> run_reader.Run:
    return run_reader.read_run(folder, most)


def data_of(html: str) -> dict:
    """The browser's data, as the page's script reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


# -------------------------------------------------------------------------------------------------- every state of a run


def test_the_page_holds_every_completion_with_each_part_of_its_reward(tmp_path):
    run = write_run(tmp_path / "run", steps=3, questions=2, group_size=4)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
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


def test_two_groups_of_one_question_stay_two(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=1, questions=2, group_size=4))
    for row in run.rollouts:
        row["question"], row["answer"] = "the same", "1"
    assert browser_data([run])["columns"]["group"] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("change", "sentence", "sections"),
    [
        ({}, r"Held-out accuracy rose from 10\.0 % to 75\.0 % \(95 % interval 68\.5 % to 80\.5 %\) in 6 steps and 0\.6 ", 5),
        (dict(evaluate=False), r"10 % of the sampled answers were right in the first step, 77 % in the last, in 6 steps", 5),
        (dict(scores=False), r"Held-out accuracy rose", 4),
        (dict(total_steps=20), r"10 % of .* in the first 6 of 20 steps and 0\.6 minutes", 5),
        (dict(steps=1, evaluate=False), r"10 % of the sampled answers were right in 1 step and", 5),
        (dict(reward_mode="verifier", scores=False), r"Held-out", 4),
        (dict(reward_scorer="tanh"), r"Held-out", 5),
        (dict(rm_bounds="group"), r"Held-out", 5),
    ],
    ids=["whole", "no evaluation", "no reward model", "unfinished", "one step", "verifier", "tanh", "group bounds"],
)  # fmt: skip
def test_every_kind_of_run_has_its_sentence_and_sections(tmp_path, change, sentence, sections):
    run = read_run(write_run(tmp_path / "run", **change))
    assert re.match(sentence, result(run))
    html = page([run])
    assert ("Not finished when this page was drawn" in html) == ("total_steps" in change)
    assert len(re.findall(r'<section id="section-', html)) == sections
    assert ("Scores of right and wrong answers" in html) == change.get("scores", True)
    assert ("Held-out accuracy</h3>" in html) == change.get("evaluate", True)
    assert "nan" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL).lower().replace("finance", "")


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    run = write_run(tmp_path / "run", total_steps=20)
    append(run / "metrics.jsonl", '{"step": 6, "reward/me')
    with (run / "rollouts.jsonl").open("ab") as file:
        file.write('{"step": 6, "question": "what\u00e9'.encode()[:-1])  # within a character
    read = read_run(run)
    assert (read.torn, read.steps, len(read.rollouts)) == (2, 6, 72)
    assert "2 lines of its files are not whole" in page([read])


def test_a_run_that_has_finished_no_step_yet_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "rollouts.jsonl").unlink()
    assert "No step has been finished yet." in page([read_run(run)])


def test_values_that_are_not_finite_are_gaps(tmp_path):
    run = write_run(tmp_path / "run", steps=3, questions=1)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    rows[0]["advantage"] = math.nan
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["policy/kl"] = lines[1]["reward/mean"] = None
    for line in lines:
        line["policy/grad_norm"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = page([read_run(run)])
    assert data_of(html)["columns"]["advantage"][0] is None
    assert "Gradient norm</h3>" not in html and "KL to the reference</h3>" in html


def test_a_run_from_before_the_bounds_were_recorded_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["hyperparameters"]["total_steps"]
    (run / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    new = ("reward/rm_min", "reward/rm_max", "eval/accuracy_low", "eval/accuracy_high")
    kept = [{k: v for k, v in line.items() if k not in new} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    read = read_run(run)
    assert read.bounds is None and result(read).startswith("Held-out accuracy rose from 10.0 % to 75.0 % in 6 steps")
    assert data_of(page([read]))["runs"][0]["bounds"] is None


def test_of_a_long_run_whole_steps_at_equal_distances_are_read(tmp_path):
    folder = write_run(tmp_path / "run", steps=50, questions=2, group_size=2, words=1)
    run = read_run(folder, most=60)
    steps = sorted({row["step"] for row in run.rollouts})
    assert len(run.rollouts) == 60 == 4 * len(steps)
    assert steps[-1] == 49 and set(np.diff(steps)) == {3, 4}
    about = browser_data([run])["runs"][0]
    assert (about["steps"], about["kept"]) == (50, 15)
    assert len(read_run(folder, most=200).rollouts) == 200
    assert {row["step"] for row in read_run(folder, most=1).rollouts} == {49}
    append(folder / "rollouts.jsonl", '{"step": 50, "question": "wh')
    assert read_run(folder, most=60).torn == 1 and read_run(folder).sampled_steps == 50


def test_several_runs_lie_over_each_other(tmp_path):
    folders = [write_run(tmp_path / name, scores=scores, k=k) for name, scores, k in (("a", True, 5.0), ("b", False, 1.0))]
    html = page([read_run(folder) for folder in folders])
    data = data_of(html)
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert data["columns"]["run"] == [0] * 72 + [1] * 72
    assert max(data["columns"]["group"]) == 35
    kl = re.search(r"data-hover='([^']+)'>\s*<h3>KL", html)[1]
    assert [curve["label"] for curve in json.loads(kl)["curves"]] == ["a KL", "b KL"]
    assert re.search(r"The runs differ in: .*<code>k</code>", html)


# --------------------------------------------------------------------------------------------------------- what is said


def test_every_line_of_the_table_is_whole_and_its_range_is_one():
    lines = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    assert len(lines) == len(meanings()) > 40  # each parsed, none twice
    for name, meaning in meanings().items():
        assert re.fullmatch(r"any|at (most|least) [\d.]+|[\d.]+ to [\d.]+", meaning.healthy), name
        assert meaning.low < meaning.high and all((meaning.definition, meaning.unit, meaning.advice)), name
        assert meaning.unit != "share" or (meaning.low < 1 and meaning.high > 0), name
    flags = set(re.findall(r"`--([a-z0-9-]+)", (ROOT / "docs/metrics.md").read_text()))
    parameters = {name.replace("_", "-") for name in train.main.__annotations__}
    assert flags <= parameters, flags - parameters


def test_what_lies_outside_its_range_is_listed_with_the_advice(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=8))
    assert [c["metric"] for c in concerns(run)] == []
    for row in run.metrics[-3:]:  # the last of them is the evaluation's
        row["completion/truncated_frac"] = 0.5
    run.metrics[0]["policy/kl"] = 9.0  # long over
    (concern,) = concerns(run)
    assert (concern["metric"], concern["value"]) == ("completion/truncated_frac", "0.5")
    assert "--max-new-tokens" in page([run])


scores_of = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(scores_of, scores_of)
def test_the_area_under_the_curve_counts_pairs(right, wrong):
    pairs = [1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]
    assert report_figures.area_under_curve(np.array(right), np.array(wrong)) == pytest.approx(sum(pairs) / len(pairs))


def test_figures_take_their_colours_from_the_page_and_share_no_id(tmp_path):
    html = page([read_run(write_run(tmp_path / "run", steps=70))])
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svgs)) <= {"#ffffff", "#000000"}
    assert "var(--right)" in svgs and "var(--ink)" in svgs
    ids = re.findall(r' id="([^"]+)"', svgs)
    assert len(ids) == len(set(ids))
    for variable in set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--c"}:
        assert f"{variable}:" in (ROOT / "src/report_page/style.css").read_text(), variable


# ----------------------------------------------------------------------------------------------------- hostile content


def test_text_cannot_become_markup(tmp_path):
    hostile = "</script><script>alert(1)</script><!-- \u2028 & ' \" <b>"
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", model_name=hostile)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        row |= dict(question=hostile, answer=hostile, completion=hostile + "\ud800", parsed_answer=hostile)
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (run / "metrics.jsonl").read_text().replace('"policy/kl"', '"<script>alert(2)</script>"')
    (run / "metrics.jsonl").write_text(lines)
    renew_report(run)
    html = (run / "report.html").read_text()
    assert len(re.findall(r"<script", html)) == len(re.findall(r"</script", html)) == 2  # the data and the page's own
    assert "<img" not in html and "<!--" not in html and "<b>" not in html.replace("<b>0", "")
    assert data_of(html)["columns"]["completion"][0] == hostile + "\ud800"
    assert not re.search(r"""(src|href|action|data)=["']?(https?:|//)""", html)


# ---------------------------------------------------------------------------------------------- drawing never stops a run


def test_a_report_that_cannot_be_drawn_costs_one_warning(tiny, monkeypatch, capsys):
    def fail(run):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "result", fail)
    monkeypatch.setattr(train, "renew_report", renew_report)
    run = train.main(**tiny | dict(checkpoint_interval=1))
    out = capsys.readouterr().out
    assert out.count("could not be drawn (RuntimeError: no ink)") == 1 and "done: 2 steps" in out
    assert not list(run.glob("*report*"))


def test_a_run_draws_its_report_at_each_checkpoint_and_at_its_end(tiny, monkeypatch):
    drawn = []
    write = report.write_report
    monkeypatch.setattr(report, "write_report", lambda runs, file: (drawn.append(len(runs[0].metrics)), write(runs, file)))
    monkeypatch.setattr(train, "renew_report", renew_report)
    run = train.main(**tiny | dict(max_steps=3, checkpoint_interval=2, eval_data=tiny["data"]))
    assert drawn == [2, 3, 4]
    assert "Held-out accuracy" in (run / "report.html").read_text()


@pytest.mark.slow
def test_train_does_not_import_matplotlib_before_it_is_needed():
    done = run_command("-c", "import sys, train; assert 'matplotlib' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_line_draws_one_run_and_several(tmp_path):
    for name in "ab":
        write_run(tmp_path / name)
    done = run_command("-m", "src.report", str(tmp_path / "a"))
    assert done.stdout == f"wrote {tmp_path / 'a/report.html'}\n", done.stderr
    assert main([tmp_path / "a", tmp_path / "b"]) == tmp_path / "report.html"
    assert main([tmp_path / "b"], output=tmp_path / "c.html").exists()
    done = run_command("-m", "src.report", str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "no run's folder" in done.stderr
    with pytest.raises(InputError, match="no run given"):
        main([])
    with pytest.raises(InputError, match="cannot be written"):
        main([tmp_path / "a"], output=tmp_path / "nowhere/report.html")
