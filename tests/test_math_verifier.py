"""The rule verifier: a table of good, bad and hostile answers."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.math_verifier import MathVerifier, extract_answer, ground_truth_of, last_boxed, parse_number

RIGHT = [
    ("8", "8"),
    ("8.", "8"),
    ("8.00", "8"),
    ("The answer is 8.", "8"),
    ("**8**", "8"),
    ("The answer is **8**.", "8"),
    ("5 + 3 = 8", "8"),
    ("#### 8", "8"),
    ("#### 8.", "8"),
    ("She has 8 apples.", "8"),
    ("8 apples", "8"),
    (r"\boxed{8}", "8"),
    (r"so it is $\boxed{8}$.", "8"),
    (r"first \boxed{7}, then rather \boxed{8}", "8"),
    ("<answer>8</answer>", "8"),
    ("<answer> 8 </answer> and 9 more words", "8"),
    (r"<answer>\boxed{8}</answer>", "8"),
    ("I had 3, so 4. <answer>7</answer> no: <answer>8</answer>", "8"),
    ("1,000", "1000"),
    ("It costs $1,000.", "1000"),
    (r"\$1,000.50", "1000.5"),
    ("1000", "1,000"),
    ("-3", "-3"),
    ("−3", "-3"),
    ("the result is -3.", "-3"),
    ("0.5", "1/2"),
    ("1/2", "0.5"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac{3}{4}}", "3/4"),
    (r"\boxed{8\text{ apples}}", "8"),
    ("50%", "50"),
    ("The answer is .5", "0.5"),
    (r"\boxed{x^2+1}", "x^2 + 1"),
    (r"\boxed{\left(3, 4\right)}", "(3,4)"),
    ("#### 1,234,567", "1234567"),
    ("<answer>3 1/2</answer>", "3.5"),
    ("<answer>-3 1/2</answer>", "-7/2"),
    ("<answer>1 / 2</answer>", "0.5"),
    ("<answer>- 3</answer>", "-3"),
    ("8", "She has 3 + 5 = 8 apples.\n#### 8"),
]

WRONG = [
    ("", "8"),
    ("no number here", "8"),
    ("9", "8"),
    ("The answer is 18.", "8"),
    ("-8", "8"),
    ("8.5", "8"),
    ("0.8", "8"),
    ("8 or 9", "8"),
    ("<answer>7 or 8</answer>", "8"),
    (r"8, no: \boxed{9}", "8"),
    (r"\boxed{}", "8"),
    (r"\boxed{8", "9"),
    ("#### 8 and then #### 9", "8"),
    ("1,000,8", "1000"),
    ("1/0", "0"),
    ("<answer>7 8</answer>", "78"),
    ("<answer>31/2</answer>", "3 1/2"),
    (r"\boxed{\frac{1}{0}}", "0"),
    ("9^9^9^9", "8"),
    ("__import__('os').system('true')", "0"),
    (r"\boxed{__import__('os')}", "0"),
    ("eight", "8"),
    (r"\boxed{x}", "8"),
    (r"\boxed{8}", "x"),
]


@pytest.mark.parametrize(("response", "truth"), RIGHT)
def test_right_answers(response, truth):
    assert MathVerifier().verify("q", response, truth)["correct"], extract_answer(response, "flexible")


@pytest.mark.parametrize(("response", "truth"), WRONG)
def test_wrong_answers(response, truth):
    assert not MathVerifier().verify("q", response, truth)["correct"], extract_answer(response, "flexible")


def test_strict_takes_marked_answers_only():
    strict = MathVerifier("strict")
    assert not strict.verify("q", "The answer is 8.", "8")["correct"]
    for marked in ("#### 8", r"\boxed{8}", "<answer>8</answer>"):
        assert strict.verify("q", marked, "8")["correct"]


def test_rewards():
    verifier = MathVerifier(correct_reward=2.0, format_reward=0.25)
    assert verifier.verify("q", "#### 8", "8") == {"correct": True, "reward": 2.0, "parsed_answer": "8"}
    assert verifier.verify("q", "#### 9", "8") == {"correct": False, "reward": 0.25, "parsed_answer": "9"}
    assert verifier.verify("q", "9", "8") == {"correct": False, "reward": 0.0, "parsed_answer": "9"}
    assert verifier.verify("q", "none", "8") == {"correct": False, "reward": 0.0, "parsed_answer": None}


def test_batch_is_verify_one_by_one_and_keeps_lengths_honest():
    responses, truths = zip(*RIGHT, *WRONG, strict=True)
    verifier = MathVerifier()
    one_by_one = [verifier.verify("q", r, t) for r, t in zip(responses, truths, strict=True)]
    assert verifier.verify_batch(["q"] * len(responses), list(responses), list(truths)) == one_by_one
    with pytest.raises(ValueError, match="zip"):
        verifier.verify_batch(["q"], ["8", "9"], ["8", "9"])


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"'fuzzy'.*flexible.*strict"):
        MathVerifier("fuzzy")


def test_ground_truth_of_a_gsm8k_solution():
    assert ground_truth_of("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72") == "72"
    assert ground_truth_of(" 72 ") == "72"


def test_last_boxed_matches_braces():
    assert last_boxed(r"\boxed{a{b}{c}} \boxed{unclosed") == "a{b}{c}"
    assert last_boxed("nothing") is None


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${:,}", "{}.0", "{} apples", "**{}**", "= {}"]))
def test_every_integer_in_every_dress_is_read(number, dress):
    assert parse_number(dress.format(number)) == number


@given(st.text(max_size=300))
def test_any_text_is_judged_without_an_exception(text):
    assert MathVerifier().verify("q", text, "8")["correct"] in (True, False)


@pytest.mark.parametrize(
    "hostile",
    ["9" * 100_000, "\n" * 1_000_000, "\\boxed{" * 50_000, "<answer>" * 50_000, "1," * 100_000, "1/" * 100_000, " 1" * 200_000,
     "8" + " a" * 100_000, "{" * 100_000],
)  # fmt: skip
def test_hostile_texts_cost_seconds_at_most(hostile):
    started = time.process_time()
    for text in (hostile, f"<answer>{hostile}</answer>", f"#### {hostile}", f"\\boxed{{{hostile}}}"):
        MathVerifier().verify("q", text, "8")
    assert time.process_time() - started < 20  # not a timing: quadratic patterns take hours here
