"""The rule verifier: is a completion's final answer right?

`answers.final_answer` finds the answer, and `answers.comparison` compares it as an exact number or as text.
That settles nearly all grade-school answers in microseconds. The rest goes to Math-Verify, in a process that
can be killed (`symbolic.SymbolicWorker`). Text is parsed, never evaluated.
"""

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypedDict

from src.answers.comparison import as_latex, compare, is_too_large, is_words, symbolic_candidates
from src.answers.final_answer import final_answer
from src.answers.marks import find_boxes
from src.answers.numerals import read_number
from src.answers.text import MAX_ANSWER_CHARS
from src.symbolic import ITEM_SECONDS, Outcome, SymbolicWorker, renew_lock_after_fork

MAX_CACHED = 100_000  # outcomes of symbolic comparisons to keep
BATCH_SECONDS = 60.0  # time limit for all symbolic comparisons of one batch


class Verdict(TypedDict):
    """A verifier's judgment of one completion."""

    correct: bool
    reward: float
    parsed_answer: str | None  # None if the completion has no final answer


class FailedVerdict(Verdict):
    """The verdict on a completion that the verifier failed to judge."""

    error: str


@dataclass
class VerifierCounts:
    """Counts since the last call of `MathVerifier.metrics`."""

    judged: int = 0  # completions
    extracted: int = 0  # completions with a final answer
    fast: int = 0  # answers settled without Math-Verify
    symbolic: int = 0  # answers settled by Math-Verify
    # Answers that broke a limit of Math-Verify, or that the batch had no time left for; they count as wrong.
    timeouts: int = 0
    errors: int = 0  # completions on which the verifier itself failed


def ground_truth_of(answer: str) -> str:
    r"""The final answer in the answer field of a data record.

    This is the text after the last `####` of a GSM8K solution, or the content of the `\boxed{}` of a MATH
    solution if all its boxes agree, or else the field itself.

    >>> ground_truth_of("She has 3 + 5 = 8 apples. #### 8"), ground_truth_of(r"so it is $\boxed{8}$.")
    ('8', '8')
    """
    if "####" in answer:
        return answer.rsplit("####", 1)[-1].strip()
    boxes = find_boxes(answer)
    return boxes[-1][0].strip() if len({content for content, _ in boxes}) == 1 else answer.strip()


class MathVerifier:
    """Judges completions against the ground truth. Safe to use from several threads and after a fork.

    Args:
        method: "strict" accepts only a marked final answer (`<answer>`, `\\boxed{}`, `####`); "flexible" also
            reads unmarked text.
        correct_reward: Reward of a right answer.
        format_reward: Reward of a wrong answer that is marked.
        item_seconds: Time limit of one symbolic comparison. An answer that exceeds it counts as wrong.

    Raises:
        ValueError: `method` is neither "flexible" nor "strict".
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
        self._lock = threading.Lock()  # protects counts and cache
        renew_lock_after_fork(self)

    def __reduce__(self) -> tuple:
        return MathVerifier, (self.method, self.correct_reward, self.format_reward, self._worker.item_seconds)

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process of the symbolic comparison. Verifying again would start a new one."""
        self._worker.close()

    def prepare(self, ground_truths: list[str]) -> list[str | None]:
        """Start the symbolic stage in the background, and find the truths that no answer could equal.

        Returns:
            For each truth, the reason why it cannot be read, or None if it can.

        Raises:
            RuntimeError: A truth needs Math-Verify, which does not start.
        """
        self._worker.start()
        return [self._why_unreadable(ground_truth_of(truth)) for truth in ground_truths]

    def _why_unreadable(self, truth: str) -> str | None:
        """The reason why a truth cannot be read, worded to follow a colon; None if it can."""
        if not truth:
            return "it is empty"
        if len(truth) > MAX_ANSWER_CHARS:
            return f"it has {len(truth)} characters; an answer has at most {MAX_ANSWER_CHARS}"
        if read_number(truth) is not None or is_words(truth):
            return None
        if is_too_large(truth):
            return "it is too large to compute"
        if not re.search(r"[\\^{}_]", truth) and re.search(r"\w|[<>=+-]", truth):
            return None  # compared as text if Math-Verify cannot read it, such as U.S., true/false, <
        deadline = time.monotonic() + BATCH_SECONDS
        readable = self._worker.ask("", as_latex(truth), deadline) is Outcome.EQUAL
        if readable:
            return None
        if self._worker.ask("$1$", "$1$", deadline) is not Outcome.EQUAL:
            raise RuntimeError(
                "Math-Verify does not start; run: pip install -r requirements.txt -c constraints.txt"
            )
        return "it is neither a number, nor plain words, nor an expression that Math-Verify can read"

    def verify(self, prompt: str, response: str, ground_truth: str) -> Verdict:
        """Judge one completion.

        Args:
            prompt: The question. Repeating an expression from it does not count as an answer.
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
        """Judge a batch of completions. If judging one fails, its verdict is a `FailedVerdict`.

        Args:
            prompts, responses, ground_truths: As for `verify`, three lists of the same length.
            method: Replaces the verifier's own method.

        Returns:
            The verdicts, in order.
        """
        items = list(zip(prompts, responses, ground_truths, strict=True))
        try:
            return self._verify_batch(prompts, responses, ground_truths, method or self.method)
        except Exception as error:  # completions can be any text, and none of them may stop a run
            if len(items) > 1:
                return [self.verify_batch([p], [r], [t], method)[0] for p, r, t in items]
            with self._lock:
                self.counts.errors += 1
            reason = f"{type(error).__name__}: {error}"
            return [FailedVerdict(correct=False, reward=0.0, parsed_answer=None, error=reason)]

    def _verify_batch(
        self, prompts: list[str], responses: list[str], ground_truths: list[str], method: str
    ) -> list[Verdict]:
        finals = [final_answer(r, method, p) for p, r in zip(prompts, responses, strict=True)]
        truths = [ground_truth_of(t) for t in ground_truths]
        correct: list[bool | None] = [
            compare(final, truth, prompt)
            for final, truth, prompt in zip(finals, truths, prompts, strict=True)
        ]
        undecided = [i for i, verdict in enumerate(correct) if verdict is None]
        # Shortest first: if the batch's time runs out, the texts left are those least like an answer.
        deadline = time.monotonic() + BATCH_SECONDS
        for i in sorted(undecided, key=lambda i: len(finals[i].text or finals[i].context)):
            correct[i] = self._compare_symbolically(
                symbolic_candidates(finals[i], truths[i]), truths[i], deadline
            )
        with self._lock:
            extracted = sum(bool(f.values) for f in finals)
            self.counts.judged += len(finals)
            self.counts.extracted += extracted
            self.counts.fast += extracted - sum(bool(finals[i].values) for i in undecided)
        verdicts: list[Verdict] = []
        for final, right in zip(finals, correct, strict=True):
            wrong_reward = self.format_reward if final.marked and final.values else 0.0
            reward = self.correct_reward if right else wrong_reward
            verdicts.append({"correct": bool(right), "reward": reward, "parsed_answer": final.text})
        return verdicts

    def _compare_symbolically(self, answers: list[str], truth: str, deadline: float) -> bool:
        """Whether Math-Verify finds one of the answers equal to the truth. Stops if one breaks a limit.

        Args:
            answers: From `symbolic_candidates`. Outcomes are cached.
            truth: The right answer.
            deadline: Value of `time.monotonic()` at which the batch's time is up.
        """
        outcome = Outcome.DIFFERENT
        for answer in answers:
            key = (answer, truth)
            with self._lock:
                known = self._cache.get(key)
            if known is not None:
                outcome = known
            elif time.monotonic() < deadline:
                outcome = self._worker.ask(as_latex(answer), as_latex(truth), deadline)
                if time.monotonic() < deadline:  # otherwise it may have had less time than its limit
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
        """The verifier/... metrics: how the answers since the last call were settled. Resets the counts."""
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
