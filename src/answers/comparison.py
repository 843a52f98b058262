"""Whether a final answer is right, as far as numbers and text can tell, and what is left for Math-Verify."""

import re

from src.answers.final_answer import FinalAnswer
from src.answers.numerals import Number, read_number, same_number
from src.answers.text import MAX_ANSWER_CHARS, normalize_answer, normalize_characters, strip_markup


def compare(final: FinalAnswer, truth: str, question: str) -> bool | None:
    """Whether an answer equals the truth; None if only a comparison of expressions could tell."""
    if not truth:
        return False
    if is_words(truth) and not final.marked and _concludes_with(final.context, truth):
        return True
    plain = _number_of_truth(truth) is not None or _time_of_day(truth) or is_words(truth) or _choice(truth)
    may_be_expression = bool(not plain and final.context)
    if len(final.values) != 1:
        return None if may_be_expression else False
    verdict = _compare_value(final.values[0], truth, question)
    return None if verdict is False and may_be_expression else verdict


def _compare_value(answer: str, truth: str, question: str) -> bool | None:
    """`compare` for a single value."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    time, true_time = _time_of_day(answer), _time_of_day(truth)
    if time is not None and true_time is not None:
        return _same_time(time, true_time)
    true_number = _number_of_truth(truth)
    if true_number is not None:  # such as B) 12
        answer = re.sub(r"^\(?[A-J][).:]\s{1,3}(?=\S)", "", answer)
    number = read_number(answer)
    if number is not None and true_number is not None:
        return same_number(number, true_number) and not repeats_question(answer, truth, question)
    if number is not None and (decimal := read_number(truth)) is not None and same_number(number, decimal):
        return True  # the truth 1,22 is the decimal 1.22 after all
    if normalize_answer(answer) == normalize_answer(truth):
        return true_number is None or not repeats_question(answer, truth, question)
    choice = _choice(truth)
    if choice:
        return _choice(answer) == choice
    if is_words(answer) or is_words(truth):
        return False
    if re.search(r"\d\s+\d", strip_markup(answer)):
        return False  # several numbers, which Math-Verify would join into one
    if true_number is not None and (_is_unevaluated(answer) or not _is_arithmetic(answer)):
        return False
    return None


def symbolic_candidates(final: FinalAnswer, truth: str) -> list[str]:
    """The texts in which Math-Verify looks for the truth, one after the other: the answer, then its context.

    The context is left out if the truth is a number.
    """
    candidates = list(final.values) if len(final.values) == 1 and not is_words(final.values[0]) else []
    if final.context and _number_of_truth(truth) is None:
        candidates.append(final.context)
    return [c for c in candidates if not is_too_large(c) and not is_too_large(truth)]


def is_words(answer: str) -> bool:
    """Whether an answer is plain words, without digits or LaTeX: yes, Tuesday, north-east."""
    return bool(re.fullmatch(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+){0,12}", strip_markup(answer)))


def is_too_large(answer: str) -> bool:
    """Whether an answer has powers, factorials or numbers that take forever. No honest answer has them."""
    if re.search(r"\d{60}", answer) or answer.count("^") + answer.count("**") > 8 or answer.count("{") > 60:
        return True
    nested = 0
    open_braces: list[bool] = []  # for each open brace, whether it opens an exponent
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


def as_latex(answer: str) -> str:
    """Put an expression between dollar signs, without which Math-Verify rarely finds it."""
    answer = normalize_characters(answer).strip()
    if "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer:
        return answer
    return f"${answer}$"


def _number_of_truth(truth: str) -> Number | None:
    """The truth as a number. 2,3 is not one: data sets write lists like this, and decimals with a point."""
    return None if re.search(r"\d,\d{1,2}(?!\d)", truth) else read_number(truth)


def _time_of_day(answer: str) -> tuple[int, int, str] | None:
    """Hour, minute, and "a", "p" or "" of a time of day; None if the answer is not one."""
    found = re.fullmatch(r"(\d{1,2})(?::(\d\d))?\s?(?:([ap])\.?m\.?)?", strip_markup(answer).lower())
    if not found or not (found[2] or found[3]):
        return None
    return int(found[1]), int(found[2] or 0), found[3] or ""


def _same_time(a: tuple[int, int, str], b: tuple[int, int, str]) -> bool:
    """Whether two times are equal; 3:30 equals both 3:30 am and 3:30 pm."""
    return a[:2] == b[:2] and (not a[2] or not b[2] or a[2] == b[2])


def _concludes_with(text: str, word: str) -> bool:
    """Whether unmarked text concludes with a word: "Therefore f is odd." """
    conclusion = (
        rf"\b(?:is|are|be|was|on|:)\s(?:an?\s|the\s)?\W{{0,8}}{re.escape(strip_markup(word))}\W{{0,5}}$"
    )
    return bool(re.search(conclusion, text.strip()[-200:], re.IGNORECASE))


def repeats_question(answer: str, truth: str, question: str) -> bool:
    """Whether an answer is arithmetic copied from the question, such as 20/4 for "What is 20 / 4?".

    An answer written exactly like the truth does not count as a copy.
    """
    squeezed = re.sub(r"\\[dtc]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", _squeeze(answer))
    if squeezed == _squeeze(truth):
        return False
    return bool(re.search(r"\d[-+*/^]\d", squeezed)) and squeezed in _squeeze(question[:10_000])


def _squeeze(text: str) -> str:
    """A text without spaces."""
    return re.sub(r"\s", "", normalize_characters(text))


def _is_unevaluated(answer: str) -> bool:
    r"""Whether an answer is arithmetic that has not been carried out: 5 + 3, 2 \times 4, 2^3 - 1."""
    bare = re.sub(r"\\(?:times|cdot|div)", "*", strip_markup(answer))
    return bool(re.fullmatch(r"[\d\s.,+*/x×()^{}-]+", bare)) and bool(
        re.search(r"[\d)]\s*[-+*/x×^]\s*[\d({]", bare)
    )


def _is_arithmetic(answer: str) -> bool:
    """Whether an answer has only digits, operators and roots. Math-Verify would ignore anything else."""
    formula = re.sub(r"^[A-Za-z]\s?(?:=|\\approx|≈)\s?", "", strip_markup(answer))
    formula = re.sub(r"\\(?:[dtc]?frac|sqrt(?:\[\d\])?|pi|cdot|times|div|left|right|[,!; ])", " ", formula)
    return bool(re.fullmatch(r"[\d\s.+*/^(){}-]*", formula)) and not re.search(
        r"\^\s?-|//|\.\.|\^\s?\^", formula
    )


def _choice(answer: str) -> str | None:
    """The letter of a multiple-choice answer: B, (B), B) 12."""
    answer = strip_markup(answer)
    found = re.match(r"\(?([A-J])(?:[).:]*$|[).:]\s)", answer)
    return found[1] if found and not re.search(r"\b[A-J]\)", answer[found.end() :]) else None
