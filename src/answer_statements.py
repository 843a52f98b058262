r"""What one statement says: the value in "the answer is 8 apples", in "= 5 + 3 = 8", or that it weighs several.

Between answer_numbers.py, which reads a number that stands alone, and answer_prose.py, which chooses among the statements of a
text. Here are also the cues that text behind a mark (answers.py) and text without one share.
"""

import re

from src.answer_numbers import MEASURES, NUMBER, NUMBER_WORDS, OTHER_QUANTITY, UNIT_ALIASES, read_number, read_words, same_number
from src.answer_text import MAX_ANSWER_CHARS, unwrap

# Cues, of a completion's text or of one statement in it.
ANSWER_IS = re.compile(
    r"\b(?P<word>answer|result|solution|option|choice)s?\b[*_]{0,3}"
    r"(?P<what>[^.\n=:\d]{0,80}?)"
    r"(?P<is>\*{0,2}(?::|=)\*{0,2}|\b(?:is|are|equals|would be|will be|must be|was|becomes|comes to)\b)"
    r"[ \t]*:?(?=(?P<rest>[^\n]{0,300}(?:\n{1,2}(?=\s*[\d$\\*-])[^\n]{0,300})?))",
    re.IGNORECASE,
)
WRONG = re.compile(r"(?:wrong|incorrect|not (?:right|correct)|a mistake|false|do(?:n't| not) know)\b", re.IGNORECASE)
HEDGE = re.compile(r"\beither\b|\b(?:or|and/or)\b|\bbetween\b.{0,40}\band\b|\bnot sure\b|\bone of\b", re.IGNORECASE)
ALTERNATIVES = re.compile(
    rf"({NUMBER_WORDS}|[\d.)$%*}}])[ *$\\)]{{0,4}}(?:[a-z]{{2,15}} )?,?\s?(?:or|and/or)\s"
    rf"(?:[a-z]{{2,12}} ){{0,2}}[(\\$*]{{0,4}}(?:\d|(?:{NUMBER_WORDS})\b)",
    re.IGNORECASE,
)
NOT_IT = re.compile(  # before a number that is not the value itself
    r"(?:\bnot|n't|\b(?:less|more|greater|fewer) than|\bat (?:least|most)|\bhalf of|\bdouble|\btwice|\broot(?: of)?|±|\\pm)"
    r"[\s$*]*$",
    re.IGNORECASE,
)
_OPERATOR_AFTER = re.compile(
    r"[ \t]{0,3}(?:[A-Za-z]{1,20}[ \t]{0,2})?(?:[-+*/^=×·]|\\times|\\cdot|\\div|\\pm|\*\*|x(?=[ \t]?\d))[ \t]{0,2}[\d\\({$]"
)
_JOINED_AFTER = re.compile(r"\^|\\(?!\)|\]|[ $,;%]|text|mathrm|%|circ)|[a-z](?![a-z])(?!\w)|\(")
_NO_UNIT = re.compile(rf"\s({OTHER_QUANTITY})\b", re.IGNORECASE)
_UNIT_POWER = re.compile(r"(?<=[a-z])\s?\^\s?\{?[23]\}?(?![\w^+-])")  # of cm^2


def first_sentence(rest: str) -> str:
    """Up to the end of the sentence: a full stop that ends no number, a question or exclamation mark, a blank line.

    >>> first_sentence("8.5 cm^2. That is all.")
    '8.5 cm '
    """
    rest = rest.lstrip("\n* ")
    end = re.search(r"[.!?](?=\s|$|[*\"'])|\n\s*\n|;\s", rest)
    rest = rest[: end.start()] if end else rest
    return _UNIT_POWER.sub(" ", rest)


def statement_value(sentence: str, whole: bool = False, first: bool = False) -> str | None:
    """The value that a statement ends in.

    Args:
        sentence: What follows "the answer is", "=" or another verb.
        whole: A sentence without a number may be the answer itself: "yes", "$x + 1$".
        first: The number is the first one: "11 pens, one for each box of 2".
    """
    exact = re.split(r"≈|\\approx", sentence)[0]  # = 1/3 ≈ 0.33
    if exact != sentence and NUMBER.search(re.split("=", exact)[-1]):
        sentence = exact
    sides = re.split(r"(?<![<>!=\\])=(?!=)|≈|\\approx|\\Rightarrow", sentence)
    if len(sides) > 1:
        first_side = sides[0].strip()
        left_to_do = re.fullmatch(r"[\s\d.]*\d\s?[-+*/×x]\s?[\s\d.+*/×x-]*[\s.]*", sides[-1])
        if left_to_do and len(sides) == 2 and read_number(first_side):  # 8 = 5 + 3
            return first_side
        sentence = sides[-1]
    elif not first:
        sentence = _behind_last_verb(sentence)
    if whole and re.match(r"[\s*]{0,4}\(?[A-J]\)(?:\s|\W*$)", sentence):
        return unwrap(sentence)
    bracketed = re.match(r"[^\w(\[\\]{0,6}([(\[][^()\[\]=]{1,80},[^()\[\]=]{1,80}[)\]])", sentence)
    if bracketed:
        return bracketed[1]  # a point, an interval
    formula = re.fullmatch(r"[^$]{0,40}\$+([^$]{1,200})\$+[^$\d]{0,100}", sentence.strip())
    if formula and not re.match(r"\s?[\d,.]+\s", formula[1]) and read_number(formula[1]) is None:
        return formula[1].strip()
    if formula and read_number(formula[1]) is not None and "\\" not in sentence[:1]:
        return formula[1].strip()
    number = NUMBER.search(sentence)
    spelled = re.match(
        rf"[^A-Za-z\d]{{0,5}}((?:negative |minus )?{NUMBER_WORDS})\b(?! and (?:a|one|two|three)\b)", sentence, re.IGNORECASE
    )
    if number and spelled and read_words(spelled[1]):
        return spelled[1]  # nine (9)
    if number:
        return _around_number(sentence, number)
    bare = re.sub(r"^[^a-zA-Z]{0,5}", "", sentence)
    words = read_words(bare)
    if words:
        return bare[: words[1]]
    if whole:
        bare = unwrap(sentence)
        return bare if 0 < len(bare) <= 100 else None
    return None


def _behind_last_verb(sentence: str) -> str:
    """What follows the last "is" before a number: of "the sum of 3 and 5 is 8". All of a sentence that opens with its value."""
    if re.match(r"[^A-Za-z\d\\]{0,6}(?=[\d\\])", sentence):
        number = NUMBER.search(sentence)
        if number and not _OPERATOR_AFTER.match(sentence, number.end()):
            return sentence
    verbs = list(re.finditer(r"\b(?:is|equals|equal to|which is|gives|are)\b(?=[^\d\n]{0,20}\d)", sentence))
    return sentence[verbs[-1].end() :] if verbs else sentence


def _around_number(sentence: str, number: re.Match) -> str | None:
    """The value that the first number of a sentence is or is a part of: arithmetic, a formula, a number with its unit."""
    if NOT_IT.search(sentence[: number.start()]):
        return None
    if _OPERATOR_AFTER.match(sentence, number.end()):
        return unwrap(sentence)[:MAX_ANSWER_CHARS] or None  # arithmetic that is left to do
    thousands = re.match(r"[kK]\b", sentence[number.end() :])
    if (_JOINED_AFTER.match(sentence, number.end()) and not thousands) or re.search(
        r"[\\^(]\w*[{(]?$|[a-zA-Z]\s?[-+*/]\s?$", sentence[max(0, number.start() - 8) : number.start()]
    ):
        end = re.search(r"\$|,\s|\s(?=[a-z]{2,})", sentence[number.start() :])
        piece = sentence[: number.start() + end.start()] if end else sentence
        return unwrap(piece) or None
    return with_unit(sentence, number)


def with_unit(sentence: str, match: re.Match) -> str:
    """The number with the percent sign or the unit of measure behind it.

    Args:
        match: Of NUMBER, in `sentence`.

    >>> [with_unit(s, NUMBER.match(s)) for s in ("3 hours later", "8 apples", "50% off", "3:30 pm")]
    ['3 hours', '8', '50%', '3:30 pm']
    """
    number = match[0].strip().rstrip(",")
    after = sentence[match.end() : match.end() + 24]
    no_unit = _NO_UNIT.match(after)
    if no_unit:
        return f"{number} {no_unit[1]}"
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


def weighs_several(sentence: str) -> bool:
    """Whether a statement leaves the choice: 7 or 8; a list of three or more numbers. 0.5 or 50 % is one value.

    >>> [weighs_several(s) for s in ("7 or 8", "2, 3 and 5", "0.5 or 50%", "8 apples")]
    [True, True, False, False]
    """
    sides = re.split(r",?\s(?:or|and/or)\s", sentence)
    if len(sides) == 2:
        left, right = list(NUMBER.finditer(sides[0])), NUMBER.match(unwrap(sides[1]))
        if left and right:
            a, b = read_number(with_unit(sides[0], left[-1])), read_number(with_unit(unwrap(sides[1]), right))
            if a and b and same_number(a, b):
                return False
    return bool(ALTERNATIVES.search(sentence)) or is_list(sentence)


def is_list(sentence: str) -> bool:
    """Whether it lists three or more whole numbers; a point or an interval in brackets is no list."""
    return bool(
        re.search(
            r"(?<![\d(\[{])\d{1,9}\s?(?:,\s|/\s|;\s?|,?\sand\s)\s?\d{1,9}\s?(?:(?:,|;|,?\sand|,?\sor)\s?\d{1,9}\b)", sentence
        )
    )
