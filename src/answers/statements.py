r"""The value that one statement gives, such as "the answer is 8 apples" or "= 5 + 3 = 8".

numerals.py reads a number on its own; prose.py chooses among the statements of a text. The cues defined first
are used both for the text after a mark (final_answer.py) and for text without marks (prose.py).
"""

import re

from src.answers.numerals import (
    MEASURES,
    NUMBER,
    NUMBER_WORDS,
    UNIT_ALIASES,
    VALUE_CHANGING_WORDS,
    read_number,
    read_number_words,
    same_number,
)
from src.answers.text import MAX_ANSWER_CHARS, strip_markup

# Cues in the text of a completion, or in one of its statements.
ANSWER_IS = re.compile(
    r"\b(?P<word>answer|result|solution|option|choice)s?\b[*_]{0,3}"
    r"(?P<qualifier>[^.\n=:\d]{0,80}?)"
    r"(?:\*{0,2}(?::|=)\*{0,2}|\b(?:is|are|equals|would be|will be|must be|was|becomes|comes to)\b)"
    r"[ \t]*:?(?=(?P<rest>[^\n]{0,300}(?:\n{1,2}(?=\s*[\d$\\*-])[^\n]{0,300})?))",
    re.IGNORECASE,
)
WRONG = re.compile(
    r"(?:wrong|incorrect|not (?:right|correct)|a mistake|false|do(?:n't| not) know)\b", re.IGNORECASE
)
HEDGE = re.compile(
    r"\beither\b|\b(?:or|and/or)\b|\bbetween\b.{0,40}\band\b|\bnot sure\b|\bone of\b", re.IGNORECASE
)
ALTERNATIVES = re.compile(
    rf"({NUMBER_WORDS}|[\d.)$%*}}])[ *$\\)]{{0,4}}(?:[a-z]{{2,15}} )?,?\s?(?:or|and/or)\s"
    rf"(?:[a-z]{{2,12}} ){{0,2}}[(\\$*]{{0,4}}(?:\d|(?:{NUMBER_WORDS})\b)",
    re.IGNORECASE,
)
NOT_THE_VALUE = re.compile(  # right before a number that is not the value
    r"(?:\bnot|n't|\b(?:less|more|greater|fewer) than|\bat (?:least|most)|\bhalf of|\bdouble|\btwice|"
    r"\broot(?: of)?|±|\\pm)[\s$*]*$",
    re.IGNORECASE,
)
_OPERATOR_AFTER = re.compile(
    r"[ \t]{0,3}(?:[A-Za-z]{1,20}[ \t]{0,2})?"
    r"(?:[-+*/^=×·]|\\times|\\cdot|\\div|\\pm|\*\*|x(?=[ \t]?\d))[ \t]{0,2}[\d\\({$]"
)
_FORMULA_AFTER = re.compile(r"\^|\\(?!\)|\]|[ $,;%]|text|mathrm|%|circ)|[a-z](?![a-z])(?!\w)|\(")
_VALUE_CHANGED_AFTER = re.compile(rf"\s({VALUE_CHANGING_WORDS})\b", re.IGNORECASE)
_UNIT_POWER = re.compile(r"(?<=[a-z])\s?\^\s?\{?[23]\}?(?![\w^+-])")  # the ^2 in cm^2


def first_sentence(rest: str) -> str:
    """The text up to the end of its first sentence.

    The sentence ends at a period outside a number, a question or exclamation mark, a semicolon or an empty
    line.

    >>> first_sentence("8.5 cm^2. That is all.")
    '8.5 cm '
    """
    rest = rest.lstrip("\n* ")
    end = re.search(r"[.!?](?=\s|$|[*\"'])|\n\s*\n|;\s", rest)
    rest = rest[: end.start()] if end else rest
    return _UNIT_POWER.sub(" ", rest)


def statement_value(sentence: str, allow_text: bool = False, number_first: bool = False) -> str | None:
    """The value that a statement gives, or None.

    Args:
        sentence: The text after "the answer is", "=" or another verb.
        allow_text: Whether the text of a sentence without a number may be the answer: "yes", "$x + 1$".
        number_first: Whether the value is the first number, as in "11 pens, one for each box of 2". If not,
            the value follows the last verb, as in "the sum of 3 and 5 is 8".
    """
    exact = re.split(r"≈|\\approx", sentence)[0]  # = 1/3 ≈ 0.33
    if exact != sentence and NUMBER.search(re.split("=", exact)[-1]):
        sentence = exact
    sides = re.split(r"(?<![<>!=\\])=(?!=)|≈|\\approx|\\Rightarrow", sentence)
    if len(sides) > 1:
        first_side = sides[0].strip()
        unevaluated = re.fullmatch(r"[\s\d.]*\d\s?[-+*/×x]\s?[\s\d.+*/×x-]*[\s.]*", sides[-1])
        if unevaluated and len(sides) == 2 and read_number(first_side):  # 8 = 5 + 3
            return first_side
        sentence = sides[-1]
    elif not number_first:
        sentence = _after_last_verb(sentence)
    if allow_text and re.match(r"[\s*]{0,4}\(?[A-J]\)(?:\s|\W*$)", sentence):
        return strip_markup(sentence)
    bracketed = re.match(r"[^\w(\[\\]{0,6}([(\[][^()\[\]=]{1,80},[^()\[\]=]{1,80}[)\]])", sentence)
    if bracketed:
        return bracketed[1]  # a point or an interval
    formula = re.fullmatch(r"[^$]{0,40}\$+([^$]{1,200})\$+[^$\d]{0,100}", sentence.strip())
    if formula and not re.match(r"\s?[\d,.]+\s", formula[1]) and read_number(formula[1]) is None:
        return formula[1].strip()
    if formula and read_number(formula[1]) is not None and "\\" not in sentence[:1]:
        return formula[1].strip()
    number = NUMBER.search(sentence)
    words = re.match(
        rf"[^A-Za-z\d]{{0,5}}((?:negative |minus )?{NUMBER_WORDS})\b(?! and (?:a|one|two|three)\b)",
        sentence,
        re.IGNORECASE,
    )
    if number and words and read_number_words(words[1]):
        return words[1]  # nine (9)
    if number:
        return _expand_number(sentence, number)
    bare = re.sub(r"^[^a-zA-Z]{0,5}", "", sentence)
    spelled_number = read_number_words(bare)
    if spelled_number:
        return bare[: spelled_number[1]]
    if allow_text:
        bare = strip_markup(sentence)
        return bare if 0 < len(bare) <= 100 else None
    return None


def _after_last_verb(sentence: str) -> str:
    """What follows the last verb before a number, as in "the sum of 3 and 5 is 8".

    A sentence that begins with its value is returned unchanged, and so is one without such a verb.
    """
    if re.match(r"[^A-Za-z\d\\]{0,6}(?=[\d\\])", sentence):
        number = NUMBER.search(sentence)
        if number and not _OPERATOR_AFTER.match(sentence, number.end()):
            return sentence
    verbs = list(re.finditer(r"\b(?:is|equals|equal to|which is|gives|are)\b(?=[^\d\n]{0,20}\d)", sentence))
    return sentence[verbs[-1].end() :] if verbs else sentence


def _expand_number(sentence: str, number: re.Match) -> str | None:
    """The value that a sentence's first number is part of: arithmetic, a formula, a number with its unit."""
    if NOT_THE_VALUE.search(sentence[: number.start()]):
        return None
    if _OPERATOR_AFTER.match(sentence, number.end()):
        return strip_markup(sentence)[:MAX_ANSWER_CHARS] or None  # arithmetic that has not been carried out
    thousands = re.match(r"[kK]\b", sentence[number.end() :])
    if (_FORMULA_AFTER.match(sentence, number.end()) and not thousands) or re.search(
        r"[\\^(]\w*[{(]?$|[a-zA-Z]\s?[-+*/]\s?$", sentence[max(0, number.start() - 8) : number.start()]
    ):
        end = re.search(r"\$|,\s|\s(?=[a-z]{2,})", sentence[number.start() :])
        piece = sentence[: number.start() + end.start()] if end else sentence
        return strip_markup(piece) or None
    return number_with_unit(sentence, number)


def number_with_unit(sentence: str, match: re.Match) -> str:
    """A number together with the percent sign, time, scale or unit of measure after it.

    Args:
        sentence: The text that contains the number.
        match: The match of NUMBER in it.

    >>> [number_with_unit(s, NUMBER.match(s)) for s in ("3 hours later", "8 apples", "50% off", "3:30 pm")]
    ['3 hours', '8', '50%', '3:30 pm']
    """
    number = match[0].strip().rstrip(",")
    after = sentence[match.end() : match.end() + 24]
    changed = _VALUE_CHANGED_AFTER.match(after)
    if changed:
        return f"{number} {changed[1]}"
    percent = re.match(r"\s?(?:\\?%|percent\b|per cent\b)", after)
    if percent:
        return number + "%"
    time = re.match(r"(?::\d\d(?!\d))?\s?(?:[ap]\.?m\b\.?)|:\d\d(?!\d)", after, re.IGNORECASE)
    if time:
        return number + time[0]
    ratio = re.match(r"\s?:\s?\d{1,9}\b", after)
    if ratio:
        return number + ratio[0]
    scale = re.match(r"\s(?:thousand|million|billion)\b", after)
    if scale:
        return number + scale[0]
    if re.match(r"[kK]\b", after):
        return number + "k"
    unit = re.match(r"\s([a-z]{1,12})\b", after)
    if unit and any({UNIT_ALIASES.get(unit[1]) or unit[1].rstrip("s")} & measure for measure in MEASURES):
        return f"{number} {unit[1]}"
    return number


def is_ambiguous(sentence: str) -> bool:
    """Whether a statement leaves its value open: "7 or 8" or a list of three does; "0.5 or 50%" does not.

    >>> [is_ambiguous(s) for s in ("7 or 8", "2, 3 and 5", "0.5 or 50%", "8 apples")]
    [True, True, False, False]
    """
    sides = re.split(r",?\s(?:or|and/or)\s", sentence)
    if len(sides) == 2:
        left, right = list(NUMBER.finditer(sides[0])), NUMBER.match(strip_markup(sides[1]))
        if left and right:
            a = read_number(number_with_unit(sides[0], left[-1]))
            b = read_number(number_with_unit(strip_markup(sides[1]), right))
            if a and b and same_number(a, b):
                return False
    return bool(ALTERNATIVES.search(sentence)) or lists_numbers(sentence)


def lists_numbers(sentence: str) -> bool:
    """Whether a sentence lists three or more integers; a point or an interval in brackets does not count."""
    listed = re.search(
        r"(?<![\d(\[{])\d{1,9}\s?(?:,\s|/\s|;\s?|,?\sand\s)\s?\d{1,9}"
        r"\s?(?:(?:,|;|,?\sand|,?\sor)\s?\d{1,9}\b)",
        sentence,
    )
    return listed is not None
