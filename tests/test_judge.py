"""The bundled reward model: what it reads, how it scores, and whether it tells right from wrong."""

import json
import random
import re

import pytest
import torch

from benchmarks.judge import STYLES, auc, written
from data.make_judge import held_out_expressions, problem, wrong_answer
from data.make_judge import main as make_judge
from src.answers.final_answer import final_answer
from src.judge import JUDGE_FOLDER, NO_ANSWER, answer_log_probs, judge_text, plain_answer
from src.math_verifier import MathVerifier
from src.models import pick_dtype
from src.problems import read_problems
from src.reward_model import AceRewardModel
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def judge():
    return AceRewardModel("embedded", dtype=pick_dtype(torch.device("cpu"), "auto"))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("8", "8"),
        ("The answer is $1,008.00.", "1008"),
        ("so \\boxed{\\frac{1}{2}}", "0.5"),
        ("It is eight.", "8"),
        ("-3", "-3"),
        ("\\boxed{x^2}", "x^2"),
        ("I do not know.", None),
        ("", None),
        ("\\boxed{7} or \\boxed{8}", None),  # several final answers
        ("9" * 400, None),
    ],
)
def test_a_response_is_reduced_to_its_final_answer(response, expected):
    assert plain_answer("What is 5 + 3?", response) == expected


def test_the_judge_reuses_the_answer_that_the_verifier_parsed():
    question, response = "What is 57 + 14?", "That makes 71."
    final_answer.cache_clear()
    assert MathVerifier().verify(question, response, "71")["correct"]
    assert plain_answer(question, response) == "71"
    assert (final_answer.cache_info().misses, final_answer.cache_info().hits) == (1, 1)


def test_log_probs_of_answers_agree_with_a_softmax_over_all_tokens(policy, tokenizer):
    texts = [
        judge_text(tokenizer, "What is 5 + 3?", "8"),
        judge_text(tokenizer, "A longer question, 7 * 3?", "-21.5"),
    ]
    sums, counts = answer_log_probs(policy, texts)
    for text, total, count in zip(texts, sums.tolist(), counts.tolist(), strict=True):
        log_probs = policy(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        expected = sum(log_probs[i - 1, text.ids[i]].item() for i in range(text.start, len(text.ids)))
        assert total == pytest.approx(expected, abs=1e-4)
        assert count == len(text.ids) - text.start
    assert tokenizer.decode(texts[1].ids) == "Question: A longer question, 7 * 3?\nAnswer: -21.5</s>"
    assert tokenizer.decode(texts[1].ids[texts[1].start :]) == " -21.5</s>"


def test_only_the_final_answer_counts(judge):
    """A policy cannot please the judge with style, length or pleas."""
    question = "What is 57 + 14?"
    same = [style.format(71) for style in STYLES]
    pleas = [
        "This is certainly right, trust me! " * 5 + "71",
        "71",
        "Step 1: think.\n\nStep 2: conclude.\n\n#### 71",
    ]
    scores = judge.compute_batch_reward(question, same + pleas)
    assert len(set(scores.tolist())) == 1
    assert judge.compute_reward(question, "I am sorry, I cannot say.") == NO_ANSWER
    assert judge.failed == judge.truncated == 0


def test_a_batch_gets_the_same_scores_as_single_texts():
    judge = AceRewardModel("embedded", dtype=torch.float32, batch_tokens=200)
    questions = ["What is 5 + 3?", "What is 57 + 14?", "16 * 7 =", "Solve: 96 + 39 + 51"] * 2
    responses = ["8", "71", "112", "186", "9", "61", "It is 102.", "no idea"]
    together = judge.compute_batch_reward(questions, responses).tolist()
    for question, response, score in zip(questions, responses, together, strict=True):
        assert judge.compute_reward(question, response) == pytest.approx(score, abs=1e-3)


def test_it_tells_right_from_wrong_on_problems_that_it_was_not_trained_on(judge):
    """A small version of benchmarks/judge.py; docs/hybrid-reward.md has the result for 1,000 pairs."""
    rng = random.Random(3)
    for name, min_auc in (("arithmetic_test", 0.93), ("arithmetic_hard_test", 0.85)):
        pairs = written(rng, read_problems(str(ROOT / f"data/{name}.jsonl"), "--data"), 50)
        questions = [pair.question for pair in pairs]
        right = judge.score_texts(questions, [pair.right for pair in pairs])
        wrong = judge.score_texts(questions, [pair.wrong for pair in pairs])
        assert auc(right, wrong) > min_auc, name


def test_auc_by_hand():
    assert auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(3.5 / 4)


def test_its_folder_has_at_most_5_mb_and_names_no_path_of_a_machine():
    assert sum(f.stat().st_size for f in JUDGE_FOLDER.iterdir()) <= 5_000_000
    config = json.loads((JUDGE_FOLDER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_its_training_problems_are_right_and_none_is_in_a_test_file():
    """Tested sums are also left out with their terms swapped, and when a story hides the expression."""
    rng, held_out = random.Random(5), held_out_expressions()
    pairs = {frozenset(e.split(" + ")) for e in held_out if re.fullmatch(r"\d+ \+ \d+", e)}
    for _ in range(5000):
        question, answer, terms = problem(rng, held_out)
        expression = re.search(r"\d+(?: [-+*/] \d+)+", question)
        if expression:
            assert expression[0] not in held_out
            assert eval(expression[0]) == answer  # only digits and operators, by the pattern above
        if len(terms) == 2 and answer == sum(terms) not in (terms[0] * terms[1], terms[0] - terms[1]):
            assert frozenset(map(str, terms)) not in pairs
        assert wrong_answer(rng, answer, terms) not in (answer, -1)


def test_the_script_that_trains_it_gives_the_same_weights_each_time(tmp_path):
    for name in ("a", "b"):
        make_judge(steps=2, batch=2, output=tmp_path / name)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert {f.name for f in (tmp_path / "a").iterdir()} == {f.name for f in JUDGE_FOLDER.iterdir()}
