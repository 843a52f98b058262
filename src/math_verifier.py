"""The rule verifier: is a completion's final answer right?

`answers.final_answer` finds what the completion commits to. It is compared as an exact number or as text, which settles nearly
all grade-school answers in microseconds; what is left goes to Math-Verify, in a process that can be killed
(`symbolic.SymbolicWorker`). Text is parsed, never evaluated.
"""

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypedDict

from src.answer_marks import boxed
from src.answer_numbers import Number, read_number, same_number
from src.answer_text import MAX_ANSWER_CHARS, clean, normalised, unwrap
from src.answers import FinalAnswer, final_answer
from src.symbolic import ITEM_SECONDS, Outcome, SymbolicWorker, renew_lock_after_fork

MAX_CACHED = 100_000  # comparisons that are remembered
BATCH_SECONDS = 60.0  # what the symbolic comparisons of one batch may take together


class Verdict(TypedDict):
    """What a verifier says of one completion."""

    correct: bool
    reward: float
    parsed_answer: str | None  # None: it found no final answer


class FailedVerdict(Verdict):
    """On a completion that it could not judge."""

    error: str


@dataclass
class VerifierCounts:
    """What a verifier has done so far."""

    judged: int = 0  # completions
    extracted: int = 0  # of them, those with a final answer
    fast: int = 0  # answers that were settled without Math-Verify
    symbolic: int = 0  # answers that it settled
    timeouts: int = 0  # answers on which it broke a limit, or that the batch's time did not reach; they count as wrong
    errors: int = 0  # completions on which the verifier itself failed


def ground_truth_of(answer: str) -> str:
    r"""The answer that a data record stands for.

    What follows the last `####` of a GSM8K solution, what the last `\boxed{}` of a MATH solution holds, else all of it.

    >>> ground_truth_of("She has 3 + 5 = 8 apples. #### 8"), ground_truth_of(r"so it is $\boxed{8}$.")
    ('8', '8')
    """
    if "####" in answer:
        return answer.rsplit("####", 1)[-1].strip()
    boxes = boxed(answer)
    return boxes[-1][0].strip() if len({content for content, _ in boxes}) == 1 else answer.strip()


class MathVerifier:
    """Judges completions against the ground truth. Safe to use from several threads and after a fork.

    Args:
        method: "strict" accepts a marked final answer only (`<answer>`, `\\boxed{}`, `####`); "flexible" reads unmarked text
            too.
        correct_reward: What a right answer earns.
        format_reward: What a wrong answer earns that was marked as one.
        item_seconds: Limit of one symbolic comparison. An answer that breaks it is wrong.

    Raises:
        ValueError: `method` is neither of the two.
    """

    def __init__(
        self,
        method: str = "flexible",
        correct_reward: float = 1.0,
        format_reward: float = 0.0,
        item_seconds: float = ITEM_SECONDS,
    ):
        if method not in ("flexible", "strict"):
            raise ValueError(f"method={method!r}: must be 'flexible' or 'strict'")
        self.method = method
        self.correct_reward = correct_reward
        self.format_reward = format_reward
        self.counts = VerifierCounts()
        self._worker = SymbolicWorker(item_seconds)
        self._cache: OrderedDict[tuple[str, str], Outcome] = OrderedDict()
        self._lock = threading.Lock()  # of counts and cache
        renew_lock_after_fork(self)

    def __reduce__(self) -> tuple:
        return MathVerifier, (self.method, self.correct_reward, self.format_reward, self._worker.item_seconds)

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process of the symbolic comparison. Verifying on would start another."""
        self._worker.close()

    def prepare(self, ground_truths: list[str]) -> list[str | None]:
        """Start the symbolic stage in the background, and find the truths that no answer could ever equal.

        Returns:
            Of each truth, why it cannot be read, or None where it can.

        Raises:
            RuntimeError: Math-Verify does not start, and a truth needs it.
        """
        self._worker.start()
        return [self._unreadable(ground_truth_of(truth)) for truth in ground_truths]

    def _unreadable(self, truth: str) -> str | None:
        if not truth:
            return "it is empty"
        if len(truth) > MAX_ANSWER_CHARS:
            return f"it has {len(truth)} characters; an answer has at most {MAX_ANSWER_CHARS}"
        if read_number(truth) is not None or _is_words(truth):
            return None
        if _too_large(truth):
            return "it is too large to be computed with"
        if not re.search(r"[\\^{}_]", truth) and re.search(r"\w|[<>=+-]", truth):
            return None  # text that is compared as it stands, if Math-Verify should not read it: U.S., true/false, <
        deadline = time.monotonic() + BATCH_SECONDS
        readable = self._worker.ask("", _as_latex(truth), deadline) is Outcome.EQUAL
        if not readable and self._worker.ask("$1$", "$1$", deadline) is not Outcome.EQUAL:
            raise RuntimeError("Math-Verify does not start; run: pip install -r requirements.txt -c constraints.txt")
        return None if readable else "it is neither a number, nor words, nor an expression that Math-Verify reads"

    def verify(self, prompt: str, response: str, ground_truth: str) -> Verdict:
        """Judge one completion.

        Args:
            prompt: The question. An answer that only repeats an expression of it is none.
            response: The completion, any text.
            ground_truth: The right answer, or a solution that ends in `#### answer`.

        Returns:
            A `Verdict`, which is a plain dict.

        >>> MathVerifier().verify("What is 5 + 3?", "5 + 3 = 8.", "8")
        {'correct': True, 'reward': 1.0, 'parsed_answer': '8'}
        """
        return self.verify_batch([prompt], [response], [ground_truth])[0]

    def verify_batch(
        self, prompts: list[str], responses: list[str], ground_truths: list[str], method: str | None = None
    ) -> list[Verdict]:
        """`verify` for each of three lists of one length, in order; a `FailedVerdict` where judging fails.

        `method` replaces the verifier's own.
        """
        items = list(zip(prompts, responses, ground_truths, strict=True))
        try:
            return self._verify_batch(prompts, responses, ground_truths, method or self.method)
        except Exception as error:  # a completion can be any text: none may stop a run
            if len(items) > 1:
                return [self.verify_batch([p], [r], [t], method)[0] for p, r, t in items]
            with self._lock:
                self.counts.errors += 1
            reason = f"{type(error).__name__}: {error}"
            return [FailedVerdict(correct=False, reward=0.0, parsed_answer=None, error=reason)]

    def _verify_batch(self, prompts: list[str], responses: list[str], ground_truths: list[str], method: str) -> list[Verdict]:
        finals = [final_answer(r, method, p) for p, r in zip(prompts, responses, strict=True)]
        truths = [ground_truth_of(t) for t in ground_truths]
        correct: list[bool | None] = [
            _compare(final, truth, prompt) for final, truth, prompt in zip(finals, truths, prompts, strict=True)
        ]
        open_items = [i for i, verdict in enumerate(correct) if verdict is None]
        # Short ones first: should the batch's time run out, then on the answers that look least like one.
        deadline = time.monotonic() + BATCH_SECONDS
        for i in sorted(open_items, key=lambda i: len(finals[i].text or finals[i].context)):
            correct[i] = self._symbolic(_to_ask(finals[i], truths[i]), truths[i], deadline)
        with self._lock:
            self.counts.judged += len(finals)
            self.counts.extracted += sum(bool(f.values) for f in finals)
            self.counts.fast += sum(bool(f.values) for f in finals) - sum(bool(finals[i].values) for i in open_items)
        verdicts: list[Verdict] = []
        for final, right in zip(finals, correct, strict=True):
            reward = self.correct_reward if right else self.format_reward if final.marked and final.values else 0.0
            verdicts.append({"correct": bool(right), "reward": reward, "parsed_answer": final.text})
        return verdicts

    def _symbolic(self, answers: list[str], truth: str, deadline: float) -> bool:
        """Whether Math-Verify finds one of the answers equal; each is asked once, and none after one that broke a limit."""
        outcome = Outcome.DIFFERENT
        for answer in answers:
            key = (answer, truth)
            with self._lock:
                known = self._cache.get(key)
            if known is not None:
                outcome = known
            elif time.monotonic() < deadline:
                outcome = self._worker.ask(_as_latex(answer), _as_latex(truth), deadline)
                if time.monotonic() < deadline:  # otherwise it had less time than it is due
                    with self._lock:
                        self._cache[key] = outcome
                        if len(self._cache) > MAX_CACHED:
                            self._cache.popitem(last=False)
            else:
                outcome = Outcome.BROKE_LIMIT
            if outcome is not Outcome.DIFFERENT:
                break
        with self._lock:
            self.counts.symbolic += bool(answers) and outcome is not Outcome.BROKE_LIMIT
            self.counts.timeouts += outcome is Outcome.BROKE_LIMIT
        return outcome is Outcome.EQUAL

    def metrics(self) -> dict[str, float]:
        """verifier/... : how the answers since the last call were settled. The counts begin again at zero."""
        with self._lock:
            counts, self.counts = self.counts, VerifierCounts()
        restarts, self._worker.restarts = self._worker.restarts, 0
        return {
            "verifier/fast": float(counts.fast),
            "verifier/symbolic": float(counts.symbolic),
            "verifier/timeouts": float(counts.timeouts),
            "verifier/restarts": float(restarts),
            "verifier/errors": float(counts.errors),
            "verifier/extracted_frac": counts.extracted / max(counts.judged, 1),
        }


def _compare(final: FinalAnswer, truth: str, prompt: str) -> bool | None:
    """Whether an answer is the truth, where numbers and text can tell; None where an expression has to be compared."""
    if not truth:
        return False
    if _is_words(truth) and not final.marked and _ends_in(final.context, truth):
        return True
    plain = _true_number(truth) is not None or _time(truth) or _is_words(truth) or _choice(truth)
    expression = not plain
    if len(final.values) != 1:
        return None if expression and final.context else False
    verdict = _compare_one(final.values[0], truth, prompt)
    return None if verdict is False and expression and final.context else verdict


def _compare_one(answer: str, truth: str, prompt: str) -> bool | None:
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    time_of_day, true_time = _time(answer), _time(truth)
    if time_of_day is not None and true_time is not None:
        return _same_time(time_of_day, true_time)
    b = _true_number(truth)
    if b is not None:  # B) 12
        answer = re.sub(r"^\(?[A-J][).:]\s{1,3}(?=\S)", "", answer)
    a = read_number(answer)
    if a is not None and b is not None:
        return same_number(a, b) and not _repeats(answer, truth, prompt)
    if a is not None and (decimal := read_number(truth)) is not None and same_number(a, decimal):
        return True  # 1,22 is 1.22 after all
    if normalised(answer) == normalised(truth):
        return b is None or not _repeats(answer, truth, prompt)
    choice = _choice(truth)
    if choice:
        return _choice(answer) == choice
    if _is_words(answer) or _is_words(truth):
        return False
    if re.search(r"\d\s+\d", unwrap(answer)):
        return False  # several numbers, which Math-Verify would join to one
    if b is not None and (_unevaluated(answer) or _not_closed(answer)):
        return False
    return None


def _to_ask(final: FinalAnswer, truth: str) -> list[str]:
    """What Math-Verify compares with the truth: the answer, then, where the truth is no number, what it finds by itself."""
    asked = list(final.values) if len(final.values) == 1 and not _is_words(final.values[0]) else []
    if final.context and _true_number(truth) is None:
        asked.append(final.context)
    return [a for a in asked if not _too_large(a) and not _too_large(truth)]


def _true_number(truth: str) -> Number | None:
    """The number that a truth is. 2,3 is two numbers here: a data set writes a list like that, and a decimal with a point."""
    return None if re.search(r"\d,\d{1,2}(?!\d)", truth) else read_number(truth)


def _time(answer: str) -> tuple[int, int, str] | None:
    """Hour, minute and a, p or nothing of a time of day."""
    found = re.fullmatch(r"(\d{1,2})(?::(\d\d))?\s?(?:([ap])\.?m\.?)?", unwrap(answer).lower())
    if not found or not (found[2] or found[3]):
        return None
    return int(found[1]), int(found[2] or 0), found[3] or ""


def _same_time(a: tuple[int, int, str], b: tuple[int, int, str]) -> bool:
    return a[:2] == b[:2] and (not a[2] or not b[2] or a[2] == b[2])


def _ends_in(text: str, word: str) -> bool:
    """Whether unmarked text concludes with a word: "Therefore f is odd." """
    last = re.escape(unwrap(word))
    return bool(
        re.search(rf"\b(?:is|are|be|was|on|:)\s(?:an?\s|the\s)?\W{{0,8}}{last}\W{{0,5}}$", text.strip()[-200:], re.IGNORECASE)
    )


def _repeats(answer: str, truth: str, prompt: str) -> bool:
    """Whether an answer with a sign of calculation stands in the question like that, and is not how the truth is written.

    20/4 for "What is 20 / 4?".
    """
    squeezed = re.sub(r"\\[dtc]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", re.sub(r"\s", "", clean(answer)))
    if squeezed == re.sub(r"\s", "", clean(truth)):
        return False
    return bool(re.search(r"\d[-+*/^]\d", squeezed)) and squeezed in re.sub(r"\s", "", clean(prompt[:10_000]))


def _unevaluated(answer: str) -> bool:
    """Whether an answer is arithmetic that is left to do: 5 + 3, 2 \\times 4, 2^3 - 1."""
    bare = re.sub(r"\\(?:times|cdot|div)", "*", unwrap(answer))
    return bool(re.fullmatch(r"[\d\s.,+*/x×()^{}-]+", bare)) and bool(re.search(r"[\d)]\s*[-+*/x×^]\s*[\d({]", bare))


def _not_closed(answer: str) -> bool:
    """Whether an answer has anything that a number is not written with: Math-Verify reads what it knows and drops the rest."""
    formula = re.sub(r"^[A-Za-z]\s?(?:=|\\approx|≈)\s?", "", unwrap(answer))
    formula = re.sub(r"\\(?:[dtc]?frac|sqrt(?:\[\d\])?|pi|cdot|times|div|left|right|[,!; ])", " ", formula)
    return not re.fullmatch(r"[\d\s.+*/^(){}-]*", formula) or bool(re.search(r"\^\s?-|//|\.\.|\^\s?\^", formula))


def _is_words(answer: str) -> bool:
    """Plain words, with neither digits nor LaTeX: yes, Tuesday, north-east."""
    return bool(re.fullmatch(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+){0,12}", unwrap(answer)))


def _choice(answer: str) -> str | None:
    """The letter of a multiple-choice answer: B, (B), B) 12."""
    found = re.match(r"\(?([A-J])(?:[).:]*$|[).:]\s)", unwrap(answer))
    return found[1] if found and not re.search(r"\b[A-J]\)", unwrap(answer)[found.end() :]) else None


def _too_large(answer: str) -> bool:
    """Towers, factorials and numbers that no honest answer has and that can take for ever to compute."""
    if re.search(r"\d{60}", answer) or answer.count("^") + answer.count("**") > 8 or answer.count("{") > 60:
        return True
    nested = 0
    open_braces: list[bool] = []  # whether each begins an exponent
    for brace in re.findall(r"\^\s?\{|\{|\}", answer):
        if brace == "}":
            if open_braces:
                nested -= open_braces.pop()
        else:
            open_braces.append(brace[0] == "^")
            nested += open_braces[-1]
            if nested > 2:
                return True  # an exponent of an exponent of an exponent
    squeezed = re.sub(r"[\s{}()]|\\left|\\right", "", answer)
    return bool(
        re.search(r"\d{4,}!|!!|\d!\^|\^\d+!", squeezed)
        or re.search(r"(?:\^|\*\*)[+-]?\d{5,}", squeezed)
        or re.search(r"\d(?:\^|\*\*)\d+(?:\^|\*\*)\d", squeezed)
        or re.search(r"\d+(?:\^|\*\*)\d{4,}", squeezed)
    )


def _as_latex(answer: str) -> str:
    """Delimited, as Math-Verify wants it: a bare expression it mostly does not find."""
    answer = clean(answer).strip()
    if "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer:
        return answer
    return f"${answer}$"
