"""The final answer of a completion: the last one it commits to, in a mark or in prose."""

import re
from dataclasses import dataclass
from functools import lru_cache

from src.answers.marks import find_marks
from src.answers.numerals import DENOMINATOR_WORDS, NUMBER, read_number, same_answer
from src.answers.prose import unmarked_answer
from src.answers.statements import ALTERNATIVES, ANSWER_IS, HEDGE, WRONG, statement_value
from src.answers.text import MAX_ANSWER_CHARS, TEXT_COMMAND, normalize_characters

MAX_TEXT_CHARS = 20_000  # read at the end of a completion; the rest is ignored
MAX_CONTEXT_CHARS = 1500  # at most this much is searched by Math-Verify for an answer that is not a number
# The judge asks for answers after the verifier has read all completions of a step, so the cache should hold
# all completions of a step; if a step has more, its completions are parsed twice. The cache keeps their
# texts, which take about 4 MB at 1,000 tokens each.
CACHED_COMPLETIONS = 1024

_SPELLED_SIGN = re.compile(
    r"(^|[:=]\s?|\b(?:is|was|be|equals|to|of)\s)(?:negative|minus) (?=\W{0,2}\d)", re.IGNORECASE
)
_NEXT_TURN = re.compile(
    r"<\|[a-z_]{2,20}\|>|</s>|<s>|\[/?INST\]|<(?:start|end)_of_turn>|"
    r"(?:^|\n)[ \t]*(?:#{2,4}[ \t]*)?(?:\*\*)?"
    r"(?:user|human|question|new question|next question|q|problem|instruction|exercise)"
    r"(?:[ \t]*\d{0,3})(?:\*\*)?[ \t]*:",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:actually|wait|sorry|correction|corrected|mistake|incorrect|wrong|instead|rather|i meant|kidding|"
    r"joking|should be|or (?:maybe|perhaps|possibly|could|it|is it)|maybe|perhaps|alternatively|"
    r"another (?:possible )?answer|also be|no,|not)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FinalAnswer:
    """The answer that a completion commits to."""

    values: tuple[str, ...] = ()  # several only if the completion has several boxes that differ
    marked: bool = False  # in <answer>, \boxed{} or ####
    context: str = ""  # where Math-Verify may look for a formula: the marks, or the end of unmarked text

    @property
    def text(self) -> str | None:
        return ", ".join(self.values) if self.values else None


# Cached because the verifier and the judge both ask for the answer of each completion. They must pass all
# three arguments by position: lru_cache would treat keywords as a different call.
@lru_cache(CACHED_COMPLETIONS)
def final_answer(text: str, method: str, question: str = "") -> FinalAnswer:
    r"""The last answer that a completion commits to; no values if it commits to none or leaves it open.

    A marked answer takes precedence: the last complete `<answer>`, then `\boxed{}`, then `####`. In unmarked
    text, "flexible" uses the first of these that exists: a value called the answer, the value given for the
    question's own expression, the last value stated ("= 8", "has 8"), or the last number.

    Args:
        text: A completion, any text.
        method: "strict" reads only marked answers; "flexible" reads unmarked text too.
        question: The question. The completion may evaluate an expression in it.

    >>> final_answer("I think 3 + 5 is <answer>8</answer>", "strict")
    FinalAnswer(values=('8',), marked=True, context='$\\boxed{8}$')
    >>> [final_answer("The answer is 1,000.", method).text for method in ("flexible", "strict")]
    ['1,000', None]
    >>> final_answer("It is 7 or 8.", "flexible").text
    """
    text = _cut_at_next_turn(text)[-MAX_TEXT_CHARS:]
    # Shorten runs of spaces, because a pattern that starts with spaces would be tried at each space.
    text = re.sub(r"\s{3,}", lambda run: "\n\n" if "\n" in run[0] else "  ", normalize_characters(text))
    text = _SPELLED_SIGN.sub(lambda m: m[1] + "-", text)
    text = re.sub(r"-\s?(\$|\*\*)(?=\d)", r"\1-", text)
    text = re.sub(
        r"\b(\d{1,9}) and (?:a|one)[ -](half|quarter)\b",
        lambda m: f"{m[1]} 1/{DENOMINATOR_WORDS[m[2]]}",
        text,
    )
    text = re.sub(r"\$?\b(\d{1,9}) dollars? and (\d\d) cents?\b", r"$\1.\2", text)
    marks = find_marks(text)
    if marks:
        answer = _marked_answer(text, marks)
        rest = text[marks[-1][1] :]
        if not answer.values and method == "flexible" and len(marks) > 1 and ANSWER_IS.search(rest):
            value = unmarked_answer(rest, "")  # one box for each step, and then the answer in prose
            return FinalAnswer((value,), True) if value and read_number(value) else answer
        return answer
    if method == "strict":
        return FinalAnswer()
    value = unmarked_answer(text, normalize_characters(question[:2000]))
    values = (value,) if value and re.search(r"\w", value) else ()
    return FinalAnswer(values, context="" if ALTERNATIVES.search(text[-200:]) else text[-MAX_CONTEXT_CHARS:])


def _cut_at_next_turn(text: str) -> str:
    """The completion up to the point where it speaks for the user or asks another question."""
    answered = re.search(r"\d|</answer>|\\boxed", text, re.IGNORECASE)
    turn = _NEXT_TURN.search(text, answered.end()) if answered else None
    return text[: turn.start()] if turn else text


def _marked_answer(text: str, marks: list[tuple[str, int]]) -> FinalAnswer:
    """The answer that the marks agree on, unless the text after them retracts it."""
    values: list[str] = []
    for content, _ in marks[-20:]:
        if len(content) > MAX_ANSWER_CHARS:
            return FinalAnswer(marked=True)
        value = _value_in_mark(content)
        if value is None:
            return FinalAnswer((), True, rf"$\boxed{{{content}}}$" if len(marks) == 1 else "")
        if not any(same_answer(value, v) for v in values):
            values.append(value)
    rest = text[marks[-1][1] :][:2000]
    if len(values) == 1 and _is_retracted(values[0], rest):
        return FinalAnswer(marked=True)
    if len(values) > 1 and ("boxed" not in text or len(values) > 8):
        return FinalAnswer(marked=True)  # several different answers count as none
    context = " and ".join(rf"$\boxed{{{content}}}$" for content, _ in marks[-8:])
    if len(values) > 1 and ANSWER_IS.search(rest):
        return FinalAnswer(marked=True)
    return FinalAnswer(tuple(values), True, context if len(context) <= MAX_CONTEXT_CHARS else "")


def _value_in_mark(content: str) -> str | None:
    """The value in the content of a mark; None if the content offers several values."""
    nested = find_marks(content)
    if nested:
        if any(not same_answer(nested[-1][0], other) for other, _ in nested):
            return None
        content = nested[-1][0]
    content = content.strip()
    if read_number(content) is not None:
        return content
    if (
        len(NUMBER.findall(content)) == 1
        and re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", TEXT_COMMAND.sub("", content))
        and not HEDGE.search(content)
    ):
        value = statement_value(content)  # Tom has 8 apples.
        if value and read_number(value):
            return value
    label = ANSWER_IS.search(content)
    if label and label.end("rest") == len(content):
        content = label["rest"].strip()
    sides = re.split(r"(?<![<>!\\=])=(?!=)", content)
    if len(sides) > 1 and not re.search(r"\\(?:le|ge|ne|in|cup|text\{ ?or)\b|[<>,;]", content):
        content = sides[-1].strip()
    if (
        re.search(r"\b(?:or|either|maybe|perhaps)\b", content, re.IGNORECASE)
        and len(NUMBER.findall(content)) > 1
    ):
        return None
    return content or None


def _is_retracted(value: str, rest: str) -> bool:
    """Whether the text after a marked answer gives a different answer or calls the marked one wrong."""
    for cue in ANSWER_IS.finditer(rest):
        if re.search(
            r"\b(?:is|was) (?:the|my|our|your) (?:final |correct |right )?$",
            rest[: cue.start()],
            re.IGNORECASE,
        ):
            continue  # "is the answer: ..." refers to the mark
        other = statement_value(cue["rest"])
        if other and read_number(value) is None and other in value:
            continue  # part of the marked answer: "between 12 and 13"
        if other and read_number(other) and not same_answer(value, other):
            return True
    for content, _ in find_marks(rest):
        if read_number(content) and not same_answer(value, content):
            return True
    if re.search(rf"\b(?:that|this|it)(?:'s| is| was) {WRONG.pattern}", rest, re.IGNORECASE):
        return True
    correction = _CORRECTION.search(rest)
    if correction:
        return any(not same_answer(value, m[0]) for m in NUMBER.finditer(rest[correction.end() :][:200]))
    return False
