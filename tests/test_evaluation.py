"""Held-out accuracy: figures checked by brute force, by scipy and by hand, and evaluations of tiny models."""

import itertools
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import train
from src import evaluation
from src.engine.sampler import Samples
from src.errors import InputError
from src.intervals import bootstrap, compare, ks_up_to, pass_at_k, values_per_question, wilson
from src.math_verifier import MathVerifier
from src.problems import Problem
from tests.conftest import ROOT, as_flags, make_policy, run_command

# ----------------------------------------------------------------------------------------------------------
# pass@k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 40), st.floats(0.001, 0.999))
def test_pass_at_k_is_unbiased(n, p):
    """If each sample is right with probability p, its mean is 1 - (1 - p)^k."""
    k = max(1, n // 2)
    mean = sum(stats.binom.pmf(right, n, p) * pass_at_k(n, right, k) for right in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


def test_pass_at_k_of_many_samples_does_not_overflow_and_stays_between_0_and_1():
    values = [pass_at_k(2000, right, 1024) for right in range(0, 2001, 50)]
    assert values[0] == 0.0 and values[-1] == 1.0 and values == sorted(values)


def test_pass_at_1_is_the_mean_and_pass_at_n_whether_any_sample_is_right():
    samples = np.array([[True, False, False], [False, False, False], [True, True, True]])
    values = values_per_question(np.array([[True], [False], [True]]), samples)
    assert list(values) == ["greedy", "pass@1", "pass@2", "pass@3"]
    np.testing.assert_allclose(values["pass@1"], [1 / 3, 0, 1])
    np.testing.assert_allclose(values["pass@2"], [2 / 3, 0, 1])
    np.testing.assert_allclose(values["pass@3"], [1, 0, 1])
    assert list(values_per_question(np.array([[True]]), None)) == ["greedy"]
    assert ks_up_to(6) == [1, 2, 4, 6]


# ----------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize(("right", "n"), [(0, 16), (1, 16), (56, 200), (169, 200), (200, 200), (1, 1)])
def test_the_wilson_interval_agrees_with_its_closed_form(right, n):
    z, p = stats.norm.ppf(0.975), right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    estimate = wilson(np.arange(n) < right)
    assert estimate.value == p
    assert estimate.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert estimate.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)


def test_the_bootstrap_is_close_to_the_normal_interval_and_deterministic():
    values = np.random.default_rng(1).choice([0.0, 0.25, 0.5, 1.0], 400)
    estimate = bootstrap(values)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / math.sqrt(400))
    assert estimate.low == pytest.approx(low, abs=0.004) and estimate.high == pytest.approx(high, abs=0.004)
    assert estimate.value == values.mean() and bootstrap(values) == estimate


def test_equal_values_have_an_interval_too():
    none = wilson(np.zeros(16, dtype=bool)).high
    assert bootstrap(np.zeros(16)) == (0.0, 0.0, none)
    assert bootstrap(np.ones(16)) == (1.0, 1.0 - none, 1.0)
    assert bootstrap(np.zeros(16), minimum=-1.0) == (0.0, -none, none)


# ----------------------------------------------------------------------------------------------------------
# Comparison


def test_a_comparison_agrees_with_a_calculation_by_hand():
    ours = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 1], dtype=bool)
    theirs = np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 1], dtype=bool)
    compared = compare({"greedy": ours, "pass@1": ours * 0.5}, {"greedy": theirs, "pass@1": theirs * 0.5})
    assert compared.gained == [0, 1, 2, 3, 4] and compared.lost == [8]
    # 6 flips, 5 of them gains: the chance of at least 5 or at most 1 heads in 6 tosses, (1 + 6 + 6 + 1) / 64.
    assert compared.p_value == pytest.approx(14 / 64)
    assert compared.differences["greedy"].value == pytest.approx(0.4)
    assert compared.differences["pass@1"].value == pytest.approx(0.2)
    assert compared.differences["greedy"].low < 0.4 < compared.differences["greedy"].high
    back = compare({"greedy": theirs}, {"greedy": ours})
    assert (back.gained, back.lost, back.p_value) == (compared.lost, compared.gained, compared.p_value)
    assert back.differences["greedy"].value == pytest.approx(-0.4)


def test_a_policy_does_not_differ_from_itself():
    greedy = np.array([True, False, True])
    compared = compare({"greedy": greedy}, {"greedy": greedy})
    assert compared.gained == compared.lost == [] and compared.p_value == 1.0
    assert compared.differences["greedy"].value == 0.0 and compared.differences["greedy"].low < 0


# ----------------------------------------------------------------------------------------------------------
# Judging completions


def scripted(texts: list[str]):
    """A stand-in for `sample`: completions of one token per character of these texts, plus the stop token."""
    remaining = iter(texts)

    def sample(policy, prompt_ids, n, sampling, generator):
        lengths = torch.tensor([len(next(remaining)) + 1 for _ in range(len(prompt_ids) * n)])
        action_mask = torch.arange(lengths.max()) < lengths[:, None]
        return Samples(None, None, action_mask, None, torch.arange(len(lengths)) % 2 == 0, n)

    return sample


@pytest.fixture
def judged(monkeypatch) -> evaluation.Answers:
    """Two completions of each of three questions, sampled in batches of two questions and one."""
    texts = ["it is 8", "so \\boxed{8}", "12 - 7 = 4", "I do not know", "\\boxed{24}", "24"]
    monkeypatch.setattr(evaluation, "sample", scripted(texts))
    batches = iter([texts[:4], texts[4:]])
    monkeypatch.setattr(evaluation, "decode", lambda tokenizer, samples: next(batches))
    done = []
    with MathVerifier() as verifier:
        asked = (("What is 5 + 3?", "8"), ("What is 12 - 7?", "5"), ("What is 6 * 4?", "24"))
        problems = [Problem(question, answer, "here", (1,)) for question, answer in asked]
        answers = evaluation.answer_questions(None, None, verifier, problems, 2, None, None, 4, done.append)
        assert verifier.metrics()["verifier/fast"] == 0  # its counts cover only training
    assert done == [4, 2]
    assert answers.completions == texts
    return answers


def test_completions_are_judged_strictly_and_leniently_in_the_order_of_the_questions(judged):
    assert judged.right["lenient"].tolist() == [[True, True], [False, False], [True, True]]
    assert judged.right["strict"].tolist() == [[False, True], [False, False], [True, False]]
    assert judged.parsed["lenient"] == ["8", "8", "4", None, "24", "24"]
    assert judged.tokens.tolist() == [len(text) + 1 for text in judged.completions]
    assert judged.finished.tolist() == [True, False] * 3


def test_accuracy_is_that_of_the_chosen_method(judged):
    parsed = {method: answers[::2] for method, answers in judged.parsed.items()}
    right = {method: verdicts[:, :1] for method, verdicts in judged.right.items()}
    completions, tokens, finished = judged.completions[::2], judged.tokens[::2], judged.finished[::2]
    first = evaluation.Answers(completions, tokens, finished, parsed, right)
    metrics = evaluation.answer_metrics(first, "flexible")
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval/strict_accuracy"] == pytest.approx(1 / 3)
    interval = (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"])
    assert interval == wilson(np.array([True, False, True]))[1:]
    assert metrics["eval/extracted_frac"] == 1.0 and metrics["eval/truncated_frac"] == 0.0
    strict = evaluation.answer_metrics(first, "strict")
    assert strict["eval/accuracy"] == pytest.approx(1 / 3)
    assert strict["eval/extracted_frac"] == pytest.approx(1 / 3)


# ----------------------------------------------------------------------------------------------------------
# Complete evaluations


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "held_out.jsonl"
    lines = (ROOT / "data/dummy_math_tasks.jsonl").read_text().splitlines()[:6]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def other_folder(tmp_path, tokenizer):
    folder = tmp_path / "other"
    make_policy(seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_eval_only_on_the_command_line_prints_and_writes_figures(policy_folder, other_folder, data, tmp_path):
    flags = dict(
        model_name=policy_folder, eval_against=other_folder, eval_data=data, eval_samples=4,
        max_new_tokens=12, output=tmp_path / "output", run_name="eval", data="/nowhere",
        reward_model_name="/nowhere",
    )  # fmt: skip
    done = run_command("train.py", "--eval-only", *as_flags(flags))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout and "reward model" not in done.stdout
    folder = tmp_path / "output" / "eval"
    assert sorted(p.name for p in folder.iterdir()) == ["evaluation.json", "evaluation.jsonl"]
    assert done.stdout.splitlines()[-1] == f"done: see {folder}"

    # The figures agree with the recorded completions.
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().split("\n") if line]
    result = json.loads((folder / "evaluation.json").read_text())
    assert len(rows) == 2 * 6 * (1 + 4) and result["questions"] == 6
    assert result["hyperparameters"]["eval_samples"] == 4 and "git_commit" in result and "versions" in result
    for name, summary in ((str(policy_folder), result), (str(other_folder), result["against"])):
        mine = [row for row in rows if row["model"] == name]
        for method in ("lenient", "strict"):
            figures = summary[method]
            greedy = [row[method] for row in mine if row["kind"] == "greedy"]
            samples = [row[method] for row in mine if row["kind"] == "sample"]
            any_right = [any(samples[i : i + 4]) for i in range(0, 24, 4)]
            assert len(greedy) == 6 and len(samples) == 24
            assert figures["greedy"]["value"] == pytest.approx(sum(greedy) / 6)
            assert figures["pass@1"]["value"] == pytest.approx(sum(samples) / 24)
            assert figures["pass@4"]["value"] == pytest.approx(sum(any_right) / 6)
            assert figures["any_right_frac"] == pytest.approx(sum(any_right) / 6)
    for line in ("greedy", r"pass@1", r"pass@2", r"pass@4 \(any sample right\)"):
        assert len(re.findall(rf"^ {line} +\d", done.stdout, re.MULTILINE)) == 2, line
    assert "exact McNemar p = " in done.stdout


def test_flips_are_listed_in_both_directions(tmp_path, capsys):
    def answering(name, right):
        parsed = {method: ["8" if r else "9" for r in right] for method in ("lenient", "strict")}
        verdicts = {method: np.array([[r] for r in right]) for method in ("lenient", "strict")}
        answers = evaluation.Answers(["…"] * 3, np.ones(3), np.ones(3, bool), parsed, verdicts)
        return evaluation.Evaluation(name, answers, None)

    ours, theirs = answering("ours", [True, True, False]), answering("theirs", [False, True, True])
    questions = ["What is\x1b[31m 5 + 3?", "b", "What is 4 + 4?"]
    evaluation.report_evaluation(tmp_path, {}, [Problem(q, "8", "here") for q in questions], [ours, theirs])
    out = capsys.readouterr().out
    assert "gained q='What is\\x1b[31m 5 + 3?', a='8', model '8', against '9'" in out and "\x1b" not in out
    assert "lost q='What is 4 + 4?', a='8', model '9', against '8'" in out
    lenient = json.loads((tmp_path / "evaluation.json").read_text())["comparison"]["lenient"]
    assert [flip["question"] for flip in lenient["gained"]] == questions[:1]
    assert [flip["question"] for flip in lenient["lost"]] == questions[2:]
    assert lenient["p_value"] == 1.0 and lenient["differences"]["greedy"]["value"] == 0.0


def test_eval_only_is_reproducible_and_its_greedy_accuracy_is_that_of_training(tiny, data):
    settings = tiny | dict(eval_data=str(data))
    eval_only = settings | dict(eval_only=True)
    folders = [train.main(**eval_only | dict(eval_samples=3, run_name=name)) for name in ("a", "b")]
    assert (folders[0] / "evaluation.jsonl").read_bytes() == (folders[1] / "evaluation.jsonl").read_bytes()
    sampled = json.loads((folders[0] / "evaluation.json").read_text())
    folder = train.main(**eval_only | dict(eval_samples=0, run_name="greedy"))
    greedy = json.loads((folder / "evaluation.json").read_text())
    assert set(greedy["lenient"]) == {"greedy"}
    run = train.main(**settings | dict(group_size=2, max_steps=1, run_name="trained"))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval/accuracy"] == sampled["lenient"]["greedy"]["value"]
    assert first["eval/accuracy"] == greedy["lenient"]["greedy"]["value"]
    assert first["eval/len_mean"] == sampled["greedy_len_mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eval_only=True, eval_data=None), "--eval-only: needs --eval-data"),
        (dict(eval_only=True, eval_samples=-1), "--eval-samples -1: must be at least 0"),
        (dict(eval_against="x"), "--eval-against x: needs --eval-only"),
        (dict(eval_only=True, eval_against="./nowhere"), "--eval-against ./nowhere: no such folder"),
        (dict(eval_only=True, max_length=513), "--max-length 513: must be at most"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused(tiny, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        train.main(**tiny | dict(eval_data=tiny["data"]) | change)
    assert not os.path.exists(tiny["output"])
