r"""The final answer of a completion: what it commits to last.

Each module reads with those above it:

    answer_text.py        characters, LaTeX and markdown around an answer
    answer_numbers.py     an answer as an exact number, and whether two are the same
    answer_marks.py       where `<answer>`, `\boxed{}` and `####` are
    answer_statements.py  the value that one statement gives
    answer_prose.py       the answer of text without marks
    answers.py            all of a completion, and what marks agree on

Text is parsed, never evaluated. Every regular expression in them takes time linear in the text, or works on a piece whose length
is limited first.
"""

import re
from dataclasses import dataclass

from src.answer_marks import find_marks
from src.answer_numbers import NUMBER, PARTS_OF_ONE, alike, read_number
from src.answer_prose import unmarked_answer
from src.answer_statements import ALTERNATIVES, ANSWER_IS, HEDGE, WRONG, statement_value
from src.answer_text import MAX_ANSWER_CHARS, WRAPPERS, clean

MAX_TEXT_CHARS = 20_000  # what is read of a completion: its end
MAX_CONTEXT_CHARS = 1500  # of it, what Math-Verify may read for an answer that is no number

_SPELLED_SIGN = re.compile(r"(^|[:=]\s?|\b(?:is|was|be|equals|to|of)\s)(?:negative|minus) (?=\W{0,2}\d)", re.IGNORECASE)
_TURN = re.compile(
    r"<\|[a-z_]{2,20}\|>|</s>|<s>|\[/?INST\]|<(?:start|end)_of_turn>|"
    r"(?:^|\n)[ \t]*(?:#{2,4}[ \t]*)?(?:\*\*)?(?:user|human|question|new question|next question|q|problem|instruction|exercise)"
    r"(?:[ \t]*\d{0,3})(?:\*\*)?[ \t]*:",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:actually|wait|sorry|correction|corrected|mistake|incorrect|wrong|instead|rather|i meant|kidding|joking|should be|"
    r"or (?:maybe|perhaps|possibly|could|it|is it)|maybe|perhaps|alternatively|another (?:possible )?answer|also be|no,|not)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FinalAnswer:
    """What a completion commits to. `values` holds more than one answer only where several boxes differ."""

    values: tuple[str, ...] = ()
    marked: bool = False  # in <answer>, \boxed{} or ####
    context: str = ""  # where Math-Verify may look for an answer that is no number: the marks, or the end of unmarked text

    @property
    def text(self) -> str | None:
        return ", ".join(self.values) if self.values else None


def final_answer(text: str, method: str, question: str = "") -> FinalAnswer:
    r"""The answer that a completion commits to last; empty where it commits to none, or to several.

    A marked answer goes before any other: the last complete `<answer>`, then `\boxed{}`, then `####`. In unmarked text
    ("flexible" only): what is called the answer; the value that the question's own expression is given; the last value that
    is stated ("= 8", "has 8"); the last number.

    Args:
        text: A completion, any text.
        method: "strict" for marked answers only, or "flexible".
        question: Its question, whose expression the completion may evaluate.

    >>> final_answer("I think 3 + 5 is <answer>8</answer>", "strict")
    FinalAnswer(values=('8',), marked=True, context='$\\boxed{8}$')
    >>> final_answer("The answer is 1,000.", "flexible").text, final_answer("The answer is 1,000.", "strict").text
    ('1,000', None)
    >>> final_answer("It is 7 or 8.", "flexible").text
    """
    text = _own_turn(text)[-MAX_TEXT_CHARS:]
    # Runs of spaces are shortened, or patterns that begin with some would try each of them as the beginning.
    text = re.sub(r"\s{3,}", lambda run: "\n\n" if "\n" in run[0] else "  ", clean(text))
    text = _SPELLED_SIGN.sub(lambda m: m[1] + "-", text)
    text = re.sub(r"-\s?(\$|\*\*)(?=\d)", r"\1-", text)
    text = re.sub(r"\b(\d{1,9}) and (?:a|one)[ -](half|quarter)\b", lambda m: f"{m[1]} 1/{PARTS_OF_ONE[m[2]]}", text)
    text = re.sub(r"\$?\b(\d{1,9}) dollars? and (\d\d) cents?\b", r"$\1.\2", text)
    marks = find_marks(text)
    if marks:
        answer = _marked(text, marks)
        behind = text[marks[-1][1] :]
        if not answer.values and method == "flexible" and len(marks) > 1 and ANSWER_IS.search(behind):
            value = unmarked_answer(behind, "")  # a box for each step, and then the answer
            return FinalAnswer((value,), True) if value and read_number(value) else answer
        return answer
    if method == "strict":
        return FinalAnswer()
    value = unmarked_answer(text, clean(question[:2000]))
    values = (value,) if value and re.search(r"\w", value) else ()
    return FinalAnswer(values, context="" if ALTERNATIVES.search(text[-200:]) else text[-MAX_CONTEXT_CHARS:])


def _own_turn(text: str) -> str:
    """The completion up to where it goes on to speak for the user or to put another question."""
    answered = re.search(r"\d|</answer>|\\boxed", text, re.IGNORECASE)
    turn = _TURN.search(text, answered.end()) if answered else None
    return text[: turn.start()] if turn else text


def _marked(text: str, marks: list[tuple[str, int]]) -> FinalAnswer:
    """The answer that marks agree on and the text behind them does not take back."""
    values: list[str] = []
    for content, _ in marks[-20:]:
        if len(content) > MAX_ANSWER_CHARS:
            return FinalAnswer(marked=True)
        value = _committed(content)
        if value is None:
            return FinalAnswer((), True, rf"$\boxed{{{content}}}$" if len(marks) == 1 else "")
        if not any(alike(value, v) for v in values):
            values.append(value)
    behind = text[marks[-1][1] :][:2000]
    if len(values) == 1 and _taken_back(values[0], behind):
        return FinalAnswer(marked=True)
    if len(values) > 1 and ("boxed" not in text or len(values) > 8):
        return FinalAnswer(marked=True)  # several answers are none
    context = " and ".join(rf"$\boxed{{{content}}}$" for content, _ in marks[-8:])
    if len(values) > 1 and ANSWER_IS.search(behind):
        return FinalAnswer(marked=True)
    return FinalAnswer(tuple(values), True, context if len(context) <= MAX_CONTEXT_CHARS else "")


def _committed(content: str) -> str | None:
    """The one value of the content of a mark; None where it weighs several."""
    nested = find_marks(content)
    if nested:
        if any(not alike(nested[-1][0], other) for other, _ in nested):
            return None
        content = nested[-1][0]
    content = content.strip()
    if read_number(content) is not None:
        return content
    if (
        len(NUMBER.findall(content)) == 1
        and re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", WRAPPERS.sub("", content))
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
    if re.search(r"\b(?:or|either|maybe|perhaps)\b", content, re.IGNORECASE) and len(NUMBER.findall(content)) > 1:
        return None
    return content or None


def _taken_back(value: str, behind: str) -> bool:
    """Whether the text behind a marked answer gives another one."""
    for cue in ANSWER_IS.finditer(behind):
        if re.search(r"\b(?:is|was) (?:the|my|our|your) (?:final |correct |right )?$", behind[: cue.start()], re.IGNORECASE):
            continue  # "is the answer: ..." speaks of the mark
        other = statement_value(cue["rest"])
        if other and read_number(value) is None and other in value:
            continue  # a part of it: "between 12 and 13"
        if other and read_number(other) and not alike(value, other):
            return True
    for content, _ in find_marks(behind):
        if read_number(content) and not alike(value, content):
            return True
    if re.search(rf"\b(?:that|this|it)(?:'s| is| was) {WRONG.pattern}", behind, re.IGNORECASE):
        return True
    correction = _CORRECTION.search(behind)
    if correction:
        return any(not alike(value, m[0]) for m in NUMBER.finditer(behind[correction.end() :][:200]))
    return False
