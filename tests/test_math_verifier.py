"""The rule verifier: labeled answers, hostile texts, and the process that it may kill."""

import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src import math_verifier
from src.answers import comparison
from src.answers.final_answer import final_answer
from src.answers.marks import find_boxes
from src.answers.numerals import read_number
from src.math_verifier import MathVerifier, ground_truth_of
from src.symbolic import Outcome, SymbolicWorker
from tests.answer_table import RIGHT, WRONG
from tests.conftest import ROOT

POISON = r"\boxed{9^{9^{9^{9}}}}"
EXPRESSION = r"\boxed{(x+1)^2}", "x^2+2x+1"  # completion and truth that only Math-Verify can compare


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        yield verifier


def judge(verifier, completion, truth, question=""):
    return verifier.verify(question, completion, truth)["correct"]


@pytest.mark.parametrize("row", RIGHT, ids=lambda row: row[0][:40])
def test_right_answers_are_accepted(verifier, row):
    assert judge(verifier, *row), final_answer(row[0], "flexible", *row[2:])


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[0][:40])
def test_wrong_answers_are_rejected(verifier, row):
    assert not judge(verifier, *row), final_answer(row[0], "flexible", *row[2:])


@pytest.mark.parametrize(
    ("file", "category", "count"),
    [
        # Completions of SmolLM2-135M-Instruct in training, labeled by hand.
        ("generated_answers", None, 200),
        # Written and labeled before the verifier saw them, in three rounds.
        ("labelled_answers", "numeric", 336),
        ("labelled_answers", "chat", 350),
        ("labelled_answers", "symbolic", 264),
    ],
)
def test_verdicts_agree_with_a_human_reader(verifier, file, category, count):
    rows = [json.loads(line) for line in (ROOT / f"tests/{file}.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("category") == category]
    verdicts = [judge(verifier, r["response"], r["truth"], r["question"]) for r in rows]
    agree = sum(v == r["right"] for v, r in zip(verdicts, rows, strict=True))
    right = sum(v and r["right"] for v, r in zip(verdicts, rows, strict=True))
    assert len(rows) == count
    assert agree >= 0.97 * count
    assert right >= 0.99 * sum(verdicts)


def test_the_strict_method_accepts_only_marked_answers():
    strict = MathVerifier("strict")
    for unmarked in ("The answer is 8.", "8", "5 + 3 = 8"):
        assert strict.verify("q", unmarked, "8") == {"correct": False, "reward": 0.0, "parsed_answer": None}
    for marked in ("#### 8", r"\boxed{8}", "<answer>8</answer>"):
        assert judge(strict, marked, "8")


def test_correct_and_format_rewards():
    verifier = MathVerifier(correct_reward=2.0, format_reward=0.25)
    none = {"correct": False, "reward": 0.0, "parsed_answer": None}
    assert verifier.verify("q", "#### 8", "8") == {"correct": True, "reward": 2.0, "parsed_answer": "8"}
    assert verifier.verify("q", "#### 9", "8") == {"correct": False, "reward": 0.25, "parsed_answer": "9"}
    assert verifier.verify("q", "9", "8") == {"correct": False, "reward": 0.0, "parsed_answer": "9"}
    assert verifier.verify("q", "there is nothing in here", "8") == none
    assert verifier.verify("q", "<answer>7 or 8</answer>", "8") == none


def test_a_batch_gives_the_same_verdicts_as_single_calls_and_needs_lists_of_one_length(verifier):
    rows = [(*row, "")[:3] for row in RIGHT[::3] + WRONG[::3]]
    responses, truths, questions = map(list, zip(*rows, strict=True))
    one_by_one = [verifier.verify(q, r, t) for r, t, q in rows]
    assert verifier.verify_batch(questions, responses, truths) == one_by_one
    with pytest.raises(ValueError, match="zip"):
        verifier.verify_batch(["q"], ["8", "9"], ["8", "9"])


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"'fuzzy'.*flexible.*strict"):
        MathVerifier("fuzzy")


def test_ground_truth_of_gsm8k_and_math_solutions():
    assert ground_truth_of("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72") == "72"
    assert ground_truth_of(r"Hence the sum is $\boxed{\frac{1}{2}}$, as claimed.") == r"\frac{1}{2}"
    assert ground_truth_of(" 72 ") == "72"


def test_braces_inside_boxes_are_matched():
    assert [content for content, _ in find_boxes(r"\boxed{a{b}{c}} \boxed{} \boxed{unclosed")] == ["a{b}{c}"]
    assert find_boxes("nothing") == []


def test_truths_that_no_answer_could_equal_are_found(verifier):
    truths = [
        "8", "$1,000", "yes", "(B)", r"\frac{\sqrt{2}}{2}", "[1, 2)", "x^2 + 1", "3:30", "Paris, France",
        "U.S.", "true/false", "<",
    ]  # fmt: skip
    assert verifier.prepare(truths) == [None] * len(truths)
    for bad in ("", "$", r"\frac{", "9^9^9^9", "7" * 400):
        assert verifier.prepare([bad])[0], bad


def test_metrics_count_how_answers_were_settled_and_then_reset():
    with MathVerifier() as verifier:
        completions = ["8", "The answer is 9.", "there is nothing in here", *[EXPRESSION[0]] * 2]
        verifier.verify_batch([""] * 5, completions, ["8", "8", "8", *[EXPRESSION[1]] * 2])
        expected = {
            "fast": 2,
            "symbolic": 2,
            "timeouts": 0,
            "restarts": 0,
            "errors": 0,
            "extracted_frac": 0.8,
        }
        assert verifier.metrics() == {f"verifier/{name}": value for name, value in expected.items()}
        assert set(verifier.metrics().values()) == {0.0}


# ------------------------------------------------------------------------------------------------- properties


DECORATIONS = [
    "{}",
    "{:,}",
    "${:,}",
    "{}.0",
    "{} apples",
    "**{}**",
    "$ {} $",
    r"\({}\)",
    r"\text{{{} apples}}",
    "`{}`",
]
SENTENCES = [
    "The answer is {}.", "The final answer is {}", "Answer: {}", "**Answer:** {}", "So the answer is {}!",
    "It is {}.", "x = {}", "<answer>{}</answer>", r"\boxed{{{}}}", "#### {}", "We get {}. Check: 1 + 1 = 2.",
    "Therefore, the total is {}.\n\nQuestion: 1 + 1?",
]  # fmt: skip


@given(st.integers(-(10**9), 10**9), st.sampled_from(DECORATIONS), st.sampled_from(SENTENCES))
def test_every_integer_is_accepted_in_every_decoration_and_sentence(number, decoration, sentence):
    text = sentence.format(decoration.format(number))
    assert MathVerifier().verify("q", text, str(number))["correct"], text
    assert not MathVerifier().verify("q", text, str(number + 1))["correct"], text


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=500), st.sampled_from(SENTENCES))
def test_every_fraction_is_accepted_in_every_notation(value, sentence):
    top, bottom = value.numerator, value.denominator
    truth = f"{top}/{bottom}" if bottom > 1 else str(top)
    notations = [truth]
    if bottom > 1:
        notations += [rf"\frac{{{top}}}{{{bottom}}}", rf"$\dfrac{{{top}}}{{{bottom}}}$"]
    if bottom > 1 and abs(value) > 1:
        whole, rest = divmod(abs(top), bottom)
        notations.append(f"{'-' if value < 0 else ''}{whole} {rest}/{bottom}")
    for notation in notations:
        text = sentence.format(notation)
        assert MathVerifier().verify("q", text, truth)["correct"], text


@given(st.decimals(min_value=-(10**6), max_value=10**6, places=2), st.sampled_from(SENTENCES))
def test_every_amount_of_money_is_accepted(amount, sentence):
    sign = "-" if amount < 0 else ""
    text = sentence.format(f"{sign}${abs(amount):,}")
    assert MathVerifier().verify("q", text, str(amount))["correct"], text


@given(st.text(max_size=300))
def test_any_text_is_judged_without_an_exception(text):
    assert MathVerifier().verify(text[:50], text, "8")["correct"] in (True, False)


PIECES = [
    "8", "\\boxed{", "}", "<answer>", "</answer>", "#### ", "answer is ", " = ", " or ", "/", "^", "{", "(",
    ".", "\n", "$", "\\frac", "-", ",", "½",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_mixture_of_marks_and_cues_is_judged_without_an_exception(pieces):
    MathVerifier().verify("What is 5 + 3?", "".join(pieces), "8")


@given(st.integers(0, 999_999_999))
def test_numbers_in_words_are_read(number):
    def words(n):
        small = (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
        )
        small = [*small.split(), "sixteen", "seventeen", "eighteen", "nineteen"]
        tens = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
        if n < 20:
            return small[n]
        if n < 100:
            return tens[n // 10] + (f"-{small[n % 10]}" if n % 10 else "")
        for scale, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
            if n >= scale:
                return f"{words(n // scale)} {name}" + (f" {words(n % scale)}" if n % scale else "")

    assert read_number(words(number)).value == number


# ---------------------------------------------------------------------------------------------------- hostile


HOSTILE = {
    "tower": "9**9**9**9", "latex tower": POISON,
    "issue 65": r"$1 + 2 \cdot 3^{4 \cdot 3^{4 \cdot 3^{4 \cdot 3^{4}}}}$",
    "ten": r"\boxed{10^{10^{10}}}", "factorial": r"\boxed{100000000!}", "factorials": r"\boxed{((3!)!)!}",
    "power": r"\boxed{(10^9)!}",
    "braces": "{" * 100_000, "boxes of braces": "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
    "digits": "9" * 1_000_000, "box of digits": "\\boxed{" + "9" * 1_000_000 + "}", "nul": "\x00" * 10_000,
    "surrogates": "\ud800\udfff" * 1000,
    "injection": "__import__('os').system('exit 1')",
    "injection in a box": r"\boxed{__import__('os').system('exit 1')}",
    "boxes": "".join(rf"\boxed{{{i}}}" for i in range(10_000)), "lines": "\n" * 1_000_000,
    "spaces": " " * 1_000_000, "open boxes": "\\boxed{" * 50_000, "open tags": "<answer>" * 50_000,
    "commas": "1," * 100_000, "slashes": "1/" * 100_000, "ones": " 1" * 200_000, "statements": "a:1 " * 5000,
    "equations": "= 1 " * 5000, "verbs": "1 is " * 4000, "turns": "</s>" * 50_000,
    "question marks": "\nq: " * 15_000, "words": "8" + " a" * 100_000, "equals": "=" * 300_000,
    "cues": "the answer is " * 60_000, "or": "7 or " * 100_000, "dashes": "-" * 300_000,
    "dollars": "$" * 300_000, "backslashes": "\\" * 300_000,
    "fractions": "\\frac" * 100_000, "hashes": "#### " * 100_000, "questions": "Question: " * 100_000,
    "number words": "one " * 100_000,
    "superscripts": "²" * 200_000, "halves": "½" * 200_000, "powers": "2^" * 100_000, "marks": "?" * 200_000,
    "brackets": "(a b c " * 50_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_wrong_and_cost_little_time_and_memory(verifier, name):
    """Each is compared with a number and with an expression. A quadratic pattern would take minutes here."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mark in ("{}", "<answer>{}</answer>", "The answer is {}", "#### {}", r"\boxed{{{}}}"):
        for truth in ("8", "x^2 + 1"):
            started = time.monotonic()
            assert not judge(verifier, mark.format(HOSTILE[name]), truth, "What is 5 + 3?")
            assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 * 1024  # kB
    assert judge(verifier, *EXPRESSION)


def test_ten_poisons_past_the_gate_and_then_a_good_answer(monkeypatch):
    monkeypatch.setattr(comparison, "is_too_large", lambda answer: False)
    with MathVerifier(item_seconds=0.5) as verifier:
        poisons = [rf"\boxed{{{base}^{{9^{{9^9}}}}}}" for base in range(2, 12)]
        for poison in poisons:
            assert not judge(verifier, poison, r"\pi")
        assert judge(verifier, *EXPRESSION)
        metrics = verifier.metrics()
        assert metrics["verifier/timeouts"] == metrics["verifier/restarts"] == 10
        for poison in poisons:  # their outcomes are cached
            assert not judge(verifier, poison, r"\pi")
        assert verifier.metrics()["verifier/restarts"] == 0


def test_the_reply_to_an_interrupted_comparison_is_not_taken_for_the_next(monkeypatch):
    """A past bug: Ctrl-C between write and read left the reply in the pipe, and later verdicts lagged."""
    worker = SymbolicWorker()
    try:
        assert worker.ask("$1$", "$1$", time.monotonic() + 60) is Outcome.EQUAL
        read = SymbolicWorker._read_line

        def interrupted(self, deadline):
            monkeypatch.setattr(SymbolicWorker, "_read_line", read)
            raise KeyboardInterrupt

        monkeypatch.setattr(SymbolicWorker, "_read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.ask("$x+1$", "$1+x$", time.monotonic() + 60)
        assert worker.ask("$1$", "$2$", time.monotonic() + 60) is Outcome.DIFFERENT
        assert worker.ask("$x+3$", "$3+x$", time.monotonic() + 60) is Outcome.EQUAL
        assert worker.ask("$x$", "$x$", time.monotonic() - 1) is Outcome.BROKE_LIMIT
        assert worker.restarts == 0  # a deadline in the past is not the fault of the process
    finally:
        worker.close()


def test_a_batch_has_a_deadline_and_compares_short_answers_first(monkeypatch):
    monkeypatch.setattr(comparison, "is_too_large", lambda answer: False)
    monkeypatch.setattr(math_verifier, "BATCH_SECONDS", 2.0)
    with MathVerifier(item_seconds=1.0) as verifier:
        verifier.prepare(["x"])
        assert judge(verifier, *EXPRESSION)  # by now it has started
        poisons = [rf"\boxed{{{base}^{{9^{{9^{{9^9}}}}}}}}" for base in range(2, 12)]
        verdicts = verifier.verify_batch([""] * 11, [*poisons, r"\boxed{x+x}"], ["2x"] * 11)
        assert [v["correct"] for v in verdicts] == [False] * 10 + [True]
        assert verifier.metrics()["verifier/timeouts"] == 10


# -------------------------------------------------------------------------------------------------- processes


def verdicts_here(_=None):
    with MathVerifier() as verifier:
        rows = [EXPRESSION, (r"\boxed{(x-1)^2}", EXPRESSION[1]), ("The answer is 8.", "8"), ("9", "8")]
        return [judge(verifier, *row) for row in rows]


def test_a_thread_and_a_spawned_process_give_the_same_verdicts():
    expected = [True, False, True, False]
    assert verdicts_here() == expected
    results = []
    threads = [threading.Thread(target=lambda: results.append(verdicts_here())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(verdicts_here, (None,)) == expected


def test_several_threads_can_share_a_verifier_and_a_fork_gets_its_own_process(verifier):
    assert judge(verifier, *EXPRESSION)
    answers = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(judge(verifier, rf"\boxed{{x+{i}}}", f"{i}+x")))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    child = os.fork()
    if child == 0:  # pytest knows nothing of this process: only its exit status counts
        try:
            good = judge(verifier, r"\boxed{y+1}", "1+y") and not judge(verifier, r"\boxed{y+2}", "1+y")
            verifier.close()
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert judge(verifier, r"\boxed{z+1}", "1+z")  # the parent's process is still alive


def test_a_pickled_copy_gives_the_same_verdicts():
    with pickle.loads(pickle.dumps(MathVerifier("strict", format_reward=0.5))) as copy:
        assert copy.verify("", r"\boxed{9}", "8")["reward"] == 0.5
        assert judge(copy, *EXPRESSION)


def children() -> set[int]:
    """Ids of the child processes that this thread started."""
    return {
        int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_no_child_process_is_left_after_closing():
    before = children()
    with MathVerifier(item_seconds=3.0) as verifier:
        assert judge(verifier, *EXPRESSION)
        assert len(children() - before) == 1
        assert verifier._worker.ask("$9^{9^{9^{9}}}$", "$8$", time.monotonic() + 9) is Outcome.BROKE_LIMIT
        assert len(children() - before) == 1  # its replacement
    assert children() == before


def test_the_process_ends_by_itself_if_the_trainer_is_killed_during_a_comparison():
    """It computes a tower, which holds Python's global lock: only the alarm's default action can end it."""
    script = (
        "import os, sys, threading, time\n"
        "from src.symbolic import SymbolicWorker\n"
        "worker = SymbolicWorker(1.0)\n"
        "assert worker.ask('$1$', '$1$', time.monotonic() + 60).value == 'true'\n"
        "print(worker._process.pid, flush=True)\n"
        "threading.Timer(0.3, lambda: os._exit(9)).start()\n"
        "worker.ask('$9^{9^{9^{9}}}$', '$8$', time.monotonic() + 60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return  # a zombie: it has ended, but no parent in this container collects it
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still alive")


def test_the_process_does_not_import_torch_and_has_a_memory_limit():
    worker = SymbolicWorker()
    try:
        assert worker.ask("$x+1$", "$1+x$", time.monotonic() + 60) is Outcome.EQUAL
        maps = Path(f"/proc/{worker._process.pid}/maps").read_text()
        assert "sympy" in maps or "python" in maps
        assert "torch" not in maps
        limits = Path(f"/proc/{worker._process.pid}/limits").read_text()
        assert str(2 * 2**30) in next(
            line for line in limits.splitlines() if line.startswith("Max address space")
        )
    finally:
        worker.close()


def test_answers_that_need_no_symbolic_comparison_start_no_process():
    verifier = MathVerifier()
    verifier.verify_batch([""] * 3, ["The answer is 8.", "9", "yes"], ["8", "8", "8"])
    assert verifier._worker._process is None
