"""Figures against brute force and scipy, comparisons worked by hand, and whole evaluations of tiny random models."""

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
from src.errors import InputError
from src.evaluation import bootstrap, compare, ks_up_to, pass_at_k, values_per_question, wilson
from src.math_verifier import MathVerifier
from src.sampler import Samples
from tests.conftest import ROOT, as_flags, make_policy, run_command

# ---------------------------------------------------------------------------------------------------------------- pass@k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 40), st.floats(0.001, 0.999))
def test_pass_at_k_is_unbiased(n, p):
    """Its mean over the number of right samples, binomial with chance p, is 1 - (1 - p)^k."""
    k = max(1, n // 2)
    mean = sum(stats.binom.pmf(right, n, p) * pass_at_k(n, right, k) for right in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


def test_pass_at_k_of_many_samples_neither_overflows_nor_leaves_0_to_1():
    values = [pass_at_k(2000, right, 1024) for right in range(0, 2001, 50)]
    assert values[0] == 0.0 and values[-1] == 1.0 and values == sorted(values)


def test_pass_at_1_and_n_are_the_mean_and_the_share_with_any():
    samples = np.array([[True, False, False], [False, False, False], [True, True, True]])
    values = values_per_question(np.array([[True], [False], [True]]), samples)
    assert list(values) == ["greedy", "pass@1", "pass@2", "pass@3"]
    np.testing.assert_allclose(values["pass@1"], [1 / 3, 0, 1])
    np.testing.assert_allclose(values["pass@2"], [2 / 3, 0, 1])
    np.testing.assert_allclose(values["pass@3"], [1, 0, 1])
    assert list(values_per_question(np.array([[True]]), None)) == ["greedy"]
    assert ks_up_to(6) == [1, 2, 4, 6]


# -------------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("right", "n"), [(0, 16), (1, 16), (56, 200), (169, 200), (200, 200), (1, 1)])
def test_wilson_is_its_closed_form(right, n):
    z, p = stats.norm.ppf(0.975), right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    estimate = wilson(np.arange(n) < right)
    assert estimate.value == p
    assert estimate.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert estimate.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)


def test_the_bootstrap_is_close_to_the_normal_interval_and_the_same_each_time():
    values = np.random.default_rng(1).choice([0.0, 0.25, 0.5, 1.0], 400)
    estimate = bootstrap(values)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / math.sqrt(400))
    assert estimate.low == pytest.approx(low, abs=0.004) and estimate.high == pytest.approx(high, abs=0.004)
    assert estimate.value == values.mean() and bootstrap(values) == estimate


def test_equal_values_have_an_interval_all_the_same():
    none = wilson(np.zeros(16, dtype=bool)).high
    assert bootstrap(np.zeros(16)) == (0.0, 0.0, none)
    assert bootstrap(np.ones(16)) == (1.0, 1.0 - none, 1.0)
    assert bootstrap(np.zeros(16), least=-1.0) == (0.0, -none, none)


# ------------------------------------------------------------------------------------------------------------- comparison


def test_a_comparison_by_hand():
    ours = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 1], dtype=bool)
    theirs = np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 1], dtype=bool)
    compared = compare({"greedy": ours, "pass@1": ours * 0.5}, {"greedy": theirs, "pass@1": theirs * 0.5})
    assert compared.gained == [0, 1, 2, 3, 4] and compared.lost == [8]
    # 6 flips, 5 of them gains: at least 5 or at most 1 heads in 6 throws of a coin, (1 + 6 + 6 + 1) / 64.
    assert compared.p_value == pytest.approx(14 / 64)
    assert compared.differences["greedy"].value == pytest.approx(0.4)
    assert compared.differences["pass@1"].value == pytest.approx(0.2)
    assert compared.differences["greedy"].low < 0.4 < compared.differences["greedy"].high
    back = compare({"greedy": theirs}, {"greedy": ours})
    assert (back.gained, back.lost, back.p_value) == (compared.lost, compared.gained, compared.p_value)
    assert back.differences["greedy"].value == pytest.approx(-0.4)


def test_a_policy_against_itself_differs_by_nothing():
    greedy = np.array([True, False, True])
    compared = compare({"greedy": greedy}, {"greedy": greedy})
    assert compared.gained == compared.lost == [] and compared.p_value == 1.0
    assert compared.differences["greedy"].value == 0.0 and compared.differences["greedy"].low < 0


# ----------------------------------------------------------------------------------------------------- judged completions


def scripted(texts: list[str]):
    """A `sample` that gives these completions in turn, as byte tokens of the tests' tokenizer plus the stop token."""
    rest = iter(texts)

    def sample(policy, prompt_ids, n, **sampling):
        ids = [[3] * (len(next(rest)) + 1) for _ in range(len(prompt_ids) * n)]
        return Samples(None, None, None, None, torch.tensor([True, False] * len(ids))[: len(ids)], ids)

    return sample


def test_completions_are_judged_strictly_and_leniently_and_kept_beside_their_question(monkeypatch):
    texts = ["it is 8", "so \\boxed{8}", "12 - 7 = 4", "I do not know", "\\boxed{24}", "24"]
    monkeypatch.setattr(evaluation, "sample", scripted(texts))
    batches = iter([texts[:4], texts[4:]])
    monkeypatch.setattr(evaluation, "decode", lambda tokenizer, samples: next(batches))
    done = []
    with MathVerifier() as verifier:
        answered = evaluation.answer(
            None, None, verifier, ["What is 5 + 3?", "What is 12 - 7?", "What is 6 * 4?"], ["8", "5", "24"], [[1]] * 3, 2, 4,
            done.append, generator=None,
        )  # fmt: skip
        assert verifier.metrics()["verifier/fast"] == 0  # the counts are the training's
    assert done == [4, 2]
    assert answered.completions == texts
    assert answered.right["lenient"].tolist() == [[True, True], [False, False], [True, True]]
    assert answered.right["strict"].tolist() == [[False, True], [False, False], [True, False]]
    assert answered.parsed["lenient"] == ["8", "8", "4", None, "24", "24"]
    assert answered.tokens.tolist() == [len(t) + 1 for t in texts]
    assert answered.finished.tolist() == [True, False] * 3

    greedy = evaluation.Answered(
        texts[::2], answered.tokens[::2], answered.finished[::2], {k: v[::2] for k, v in answered.parsed.items()},
        {k: v[:, :1] for k, v in answered.right.items()},
    )  # fmt: skip
    metrics = evaluation.answer_metrics(greedy, "flexible")
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3) and metrics["eval/strict_accuracy"] == pytest.approx(1 / 3)
    assert (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]) == wilson(np.array([True, False, True]))[1:]
    assert metrics["eval/extracted_frac"] == 1.0 and metrics["eval/truncated_frac"] == 0.0
    assert evaluation.answer_metrics(greedy, "strict")["eval/accuracy"] == pytest.approx(1 / 3)
    assert evaluation.answer_metrics(greedy, "strict")["eval/extracted_frac"] == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------ whole evaluations


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


def test_eval_only_from_the_command_line_writes_what_it_prints(policy_folder, other_folder, data, tmp_path):
    flags = dict(
        model_name=policy_folder, eval_against=other_folder, eval_data=data, eval_samples=4, max_new_tokens=12,
        output=tmp_path / "output", run_name="eval", data="/nowhere", reward_model_name="/nowhere",
    )  # fmt: skip
    done = run_command("train.py", "--eval-only", *as_flags(flags))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout and "reward model" not in done.stdout
    folder = tmp_path / "output" / "eval"
    assert sorted(p.name for p in folder.iterdir()) == ["evaluation.json", "evaluation.jsonl"]
    assert done.stdout.splitlines()[-1] == f"done: see {folder}"

    # The figures are those of the completions on record.
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().split("\n") if line]
    result = json.loads((folder / "evaluation.json").read_text())
    assert len(rows) == 2 * 6 * (1 + 4) and result["questions"] == 6
    assert result["hyperparameters"]["eval_samples"] == 4 and "git_commit" in result and "versions" in result
    for name, of_model in ((str(policy_folder), result), (str(other_folder), result["against"])):
        mine = [row for row in rows if row["model"] == name]
        samples = [row for row in mine if row["kind"] == "sample"]
        for method in ("lenient", "strict"):
            greedy = [row[method] for row in mine if row["kind"] == "greedy"]
            assert of_model[method]["greedy"]["value"] == pytest.approx(sum(greedy) / 6)
            assert of_model[method]["pass@1"]["value"] == pytest.approx(sum(row[method] for row in samples) / 24)
            any_right = [any(row[method] for row in samples[i : i + 4]) for i in range(0, 24, 4)]
            assert of_model[method]["pass@4"]["value"] == pytest.approx(sum(any_right) / 6)
            assert of_model[method]["any_right_frac"] == pytest.approx(sum(any_right) / 6)
    for line in ("greedy", r"pass@1", r"pass@2", r"pass@4 \(any sample right\)"):
        assert len(re.findall(rf"^ {line} +\d", done.stdout, re.MULTILINE)) == 2, line
    assert "exact McNemar p = " in done.stdout


def test_flips_are_listed_in_both_directions(tmp_path, capsys):
    def of(name, right):
        right = np.array([[r] for r in right])
        parsed = ["8" if r else "9" for r in right[:, 0]]
        both = {"lenient": right, "strict": right}
        answered = evaluation.Answered(["…"] * 3, np.ones(3), np.ones(3, bool), {"lenient": parsed, "strict": parsed}, both)
        return evaluation.Evaluated(name, answered, None)

    ours, theirs = of("ours", [True, True, False]), of("theirs", [False, True, True])
    questions = ["What is\x1b[31m 5 + 3?", "b", "What is 4 + 4?"]
    evaluation.report_evaluation(tmp_path, {}, questions, ["8"] * 3, [ours, theirs])
    out = capsys.readouterr().out
    assert "gained q='What is\\x1b[31m 5 + 3?', a='8', model '8', against '9'" in out and "\x1b" not in out
    assert "lost q='What is 4 + 4?', a='8', model '9', against '8'" in out
    lenient = json.loads((tmp_path / "evaluation.json").read_text())["comparison"]["lenient"]
    assert [flip["question"] for flip in lenient["gained"]] == questions[:1]
    assert [flip["question"] for flip in lenient["lost"]] == questions[2:]
    assert lenient["p_value"] == 1.0 and lenient["differences"]["greedy"]["value"] == 0.0


def test_eval_only_draws_the_same_samples_each_time_and_greedy_answers_are_those_of_training(policy_folder, data, tmp_path):
    settings = dict(
        model_name=str(policy_folder), device="cpu", eval_data=str(data), max_new_tokens=12, output=str(tmp_path / "output"),
    )  # fmt: skip
    folders = [train.main(**settings, eval_only=True, eval_samples=3, run_name=name) for name in ("a", "b")]
    assert (folders[0] / "evaluation.jsonl").read_bytes() == (folders[1] / "evaluation.jsonl").read_bytes()
    greedy_alone = json.loads((train.main(**settings, eval_only=True, eval_samples=0) / "evaluation.json").read_text())
    assert set(greedy_alone["lenient"]) == {"greedy"}
    run = train.main(
        **settings, reward_model_name="none", rollouts_per_step=2, group_size=2, train_batch_size=4, max_steps=1, run_name="c"
    )
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    result = json.loads((folders[0] / "evaluation.json").read_text())
    assert first["eval/accuracy"] == result["lenient"]["greedy"]["value"] == greedy_alone["lenient"]["greedy"]["value"]
    assert first["eval/len_mean"] == result["greedy_len_mean"]


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
def test_evaluations_that_cannot_work_are_refused(tiny, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        train.main(**tiny | dict(eval_data=tiny["data"]) | change)
    assert not os.path.exists(tiny["output"])
