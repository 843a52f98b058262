r"""The exact number that an answer stands for, and whether two answers are the same.

A number may be written in digits, in words or in LaTeX, with a unit or a currency. This module reads answers
that consist of one number; statements.py and prose.py find such answers in a completion.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from src.answers.text import MAX_ANSWER_CHARS, normalize_answer, normalize_characters, strip_markup

# ----------------------------------------------------------------------------------------------------------
# Digits and words

_BELOW_20 = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_BELOW_20)} | {
    word: 10 * i for i, word in enumerate(_TENS, start=2)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
NUMBER_WORDS = rf"\b(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD})\b){{0,24}}"
DENOMINATOR_WORDS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8,
    "tenth": 10,
}  # fmt: skip

_UNSIGNED = (
    r"(?:"
    r"(?<!\d[ ])\d{1,3}(?:[ ]\d{3}){1,9}(?![\d.,]?\d|[ ]\d)"  # 1 000 000
    r"|(?<![(\[{,])\d{1,30},\d{1,2}(?![\d,])|(?<![(\[{,])0,\d{1,30}(?![\d,])"  # 2,75
    r"|\d{1,3}(?:(?:,|[ ]?\{,[ ]?\}|\\,)\d{3})+(?![\d,])"  # 1,000,000
    r"|\d{1,60})(?:\.\d{1,60})?(?!\d)|\.\d{1,60}(?!\d)"
)
_FRACTION = (
    r"\\[dtc]?frac\s{0,3}"
    r"(?:\{\s{0,3}(-?\d{1,30})\s{0,3}\}\s{0,3}\{\s{0,3}(-?\d{1,30})\s{0,3}\}|(\d)\s{0,3}(\d))"
)
NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}.])[-+]\s?)?                        # after a number or a bracket, it is an operator
    (?:\\?[$€£¥₹]\s?)?
    (?P<sign2>(?<=[$€£¥₹])-)?
    (?:
        (?P<whole>\d{{1,30}})?\s?(?P<latex>{_FRACTION})
      | (?P<mixed>(?<![\d.,/])\d{{1,30}})[ ](?P<mixed_fraction>\d{{1,9}}/\d{{1,9}})(?![\d/]|\.\d)
      | (?<![\w.])(?P<number>{_UNSIGNED})
        (?:\s?/\s?(?P<denominator>\d{{1,30}}(?:\.\d{{1,30}})?)(?![\d/]))?
        (?:[eE](?P<exponent>[+-]?\d{{1,3}})(?!\w)
          |\s?(?:\\times|\\cdot|[x×*·])\s?10\s?(?:\^|\*\*)\s?\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?
    )
    """,
    re.VERBOSE,
)


def _value_of_match(match: re.Match) -> Fraction | None:
    """The value of a match of NUMBER; None for a division by zero."""
    negative = (match["sign"] or "").strip() == "-" or match["sign2"] == "-"
    if match["latex"]:
        fraction = re.search(_FRACTION, match["latex"])
        assert fraction is not None  # NUMBER contains the same pattern
        top, bottom = [int(g) for g in fraction.groups() if g is not None]
        if bottom == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(top, bottom)
    elif match["mixed"]:
        top, bottom = map(int, match["mixed_fraction"].split("/"))
        if bottom == 0:
            return None
        value = int(match["mixed"]) + Fraction(top, bottom)
    else:
        digits = re.sub(r"[{} \\]", "", match["number"])
        if re.fullmatch(r"\d+,\d{1,2}|0,\d+", digits):
            digits = digits.replace(",", ".")  # a decimal comma
        value = Fraction(digits.replace(",", ""))
        if match["denominator"]:
            if Fraction(match["denominator"]) == 0:
                return None
            value /= Fraction(match["denominator"])
        value *= Fraction(10) ** int(match["exponent"] or match["power"] or 0)
    return -value if negative else value


def read_number_words(text: str) -> tuple[Fraction, int] | None:
    """The number in English words that a text starts with, and where it ends; None if there is none.

    >>> [read_number_words(text) for text in ("two and a half hours", "minus seven", "three quarters", "pen")]
    [(Fraction(5, 2), 14), (Fraction(-7, 1), 11), (Fraction(3, 4), 14), None]
    """
    text = text.lower()
    part = re.match(
        rf"(?P<sign>(?:negative|minus) )?(?:(?P<whole>{NUMBER_WORDS}) and )?"
        r"(?P<count>an? |one[ -]|two[ -]|three[ -]|four[ -])?"
        rf"(?P<part>{'|'.join(DENOMINATOR_WORDS)})s?\b",
        text,
    )
    if part and (part["count"] or part["part"] == "half"):
        counted = {"a": 1, "an": 1, "": 1} | _WORDS
        value = Fraction(counted[(part["count"] or "").strip(" -")], DENOMINATOR_WORDS[part["part"]])
        whole = _words_to_number(part["whole"]) if part["whole"] else 0
        if whole is None:
            return None
        value, end = value + whole, part.end()
    else:
        part = re.match(rf"(?P<sign>(?:negative|minus) )?(?P<whole>{NUMBER_WORDS})\b", text)
        if part is None or (whole := _words_to_number(part["whole"])) is None:
            return None
        value, end = Fraction(whole), part.end()
    return (-value if part["sign"] else value), end


def _words_to_number(words: str) -> int | None:
    """The value of an integer in English words; None if the words do not form a number.

    >>> _words_to_number("two hundred and thirty-one"), _words_to_number("one two")
    (231, None)
    """
    total = group = 0
    highest = math.inf  # later scales must be below this one: millions come before thousands
    for word in re.split(r"[ -]+", words.lower()):
        if word in _WORDS:
            below_hundred = group % 100
            after_tens = below_hundred >= 20 and below_hundred % 10 == 0 and 0 < _WORDS[word] < 10
            if below_hundred and not after_tens:
                return None
            group += _WORDS[word]
        elif word == "hundred":
            if not 0 < group < 10:
                return None
            group *= 100
        elif word in _SCALES:
            if not group or _SCALES[word] >= highest:
                return None
            highest = _SCALES[word]
            total, group = total + group * highest, 0
        elif word != "and":
            return None
    return total + group


# ----------------------------------------------------------------------------------------------------------
# A complete answer: a number and its unit

# Words after a number that change its value: 8 tenths, 8 squared, 8 lakh.
VALUE_CHANGING_WORDS = (
    r"factorial|over|doubled|tripled|squared|cubed|lakh|crore|bn|mil|halves|"
    r"(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?"
)
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
UNIT_ALIASES = {
    "hr": "hour", "hrs": "hour", "h": "hour", "min": "minute", "mins": "minute",
    "sec": "second", "secs": "second", "s": "second",
    "usd": "dollar", "eur": "euro", "buck": "dollar",
    "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m",
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm",
    "feet": "foot", "ft": "foot", "inches": "inch", "in": "inch", "yd": "yard",
    "kilogram": "kg", "gram": "g", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml",
}  # fmt: skip
# Units of the same quantity in different sizes: the right number with the wrong unit is a wrong answer.
MEASURES = [
    {"second", "minute", "hour", "day", "week", "month", "year", "decade"},
    {"mm", "cm", "m", "km", "inch", "foot", "yard", "mile"},
    {"mg", "g", "kg", "ounce", "pound", "ton"},
    {"ml", "l"},
    {"cent", "dollar", "euro", "yen", "rupee"},
]
_UNIT = re.compile(
    r"\s?(?P<percent>%|percent\b|per cent\b)|"
    r"(?P<degree>\s?(?:°|\^\s?\{?\\?circ\s?\}?|\\degree|degrees?\b)(?:\s?[CF]\b)?)|"
    r"[ \t-]?(?P<unit>[A-Za-z]+)(?:\^\{?[23]\}?|[ \t./-]{1,2}[A-Za-z']+){0,5}\.?"
)
_NOT_A_UNIT = re.compile(  # words that are never part of a unit: "8 or 9", "8 more than 3"
    r"\b(or|and|to|not|maybe|perhaps|but|than|times|plus|minus|versus|vs|if|out|is|are|was|were|has|have|"
    rf"equals?|gives?|makes?|into|divided|multiplied|{VALUE_CHANGING_WORDS}|below|above|remainder|r|more|"
    r"less|because|so|which|that)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """An exact number and how it was written."""

    value: Fraction
    percent: bool = False
    unit: str = ""  # singular; "" if there is none
    divided: bool = False  # written as a/b


def read_number(answer: str) -> Number | None:
    r"""Read an answer as a number; None if it contains anything besides one number, its unit and markup.

    >>> answers = "$1,000.50", r"\frac{3}{4}", "3 1/2", "8 apples", "1.2e3", "twenty-one"
    >>> [str(read_number(answer).value) for answer in answers]
    ['2001/2', '3/4', '7/2', '8', '1200', '21']
    >>> read_number("7 or 8")
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    answer = strip_markup(answer)
    if not answer.isascii():
        answer = strip_markup(normalize_characters(answer))
    power = re.fullmatch(r"10\s?\^\s?(?:(\d{1,2})|\{(-?\d{1,2})\})", answer)
    if power:
        return Number(Fraction(10) ** int(power[1] or power[2]))
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3}){1,5}(?:[.,]\d{1,9})?", answer):
        answer = answer.replace(" ", "")  # 1 000 000
    currency = next((name for sign, name in _CURRENCY.items() if sign in answer[:4]), "")
    match = NUMBER.match(answer)
    if match is None:
        value, end = read_number_words(answer) or (None, 0)
        divided = False
    else:
        value, end = _value_of_match(match), match.end()
        divided = bool(match["denominator"] or match["latex"])
    if value is None:
        return None
    value, rest = _apply_scale(value, answer, end)
    unit, percent = "", False
    if rest:
        attached = end > 0 and answer[end - 1].isdigit() and answer[end : end + 1].isalpha()
        found = _read_unit(rest, attached)
        if found is None:
            return None
        unit, percent = found
    return Number(value, percent, currency or unit, divided)


def _apply_scale(value: Fraction, answer: str, end: int) -> tuple[Fraction, str]:
    """Apply the scale after a number that ends at `end`: 8 million, 8k. Also return the rest of the text."""
    rest = answer[end:].strip(" $")
    scale = re.match(r"(dozen|hundred|thousand|million|billion|trillion)\b\s*", rest)
    if scale:
        factor = {**_SCALES, "dozen": 12, "trillion": 10**12}[scale[1]]
        return value * factor, rest[scale.end() :]
    if re.match(r"[kK]\b", answer[end:]):
        return value * 1000, answer[end + 1 :].strip(" $")
    return value, rest


def _read_unit(text: str, attached: bool) -> tuple[str, bool] | None:
    """The unit after a number, in the singular, and whether it is percent; None if the text is not a unit.

    Args:
        text: What follows the number, not empty.
        attached: Whether no space separates the text from the number's digits.
    """
    match = _UNIT.fullmatch(text)
    if match is None:
        return None
    if not match["unit"]:
        return "", bool(match["percent"])
    if _NOT_A_UNIT.search(text):
        return None
    word = match["unit"].lower()
    if len(word) == 1 and word not in UNIT_ALIASES and word not in "mglc":
        return None  # 2x
    if attached and len(text) == 1 and text not in "mglhscL":
        return None
    singular = word[:-1] if word.endswith("s") else word
    return UNIT_ALIASES.get(word) or UNIT_ALIASES.get(word.rstrip("s")) or singular, False


def same_number(answer: Number, truth: Number) -> bool:
    """Whether an answer equals the true number, as a careful person would judge it.

    50% equals both 50 and 0.5. A decimal with at least five places may be rounded. Hours are not minutes.
    A division that has not been carried out, such as 20/4 for 5, repeats the question and is not an answer.
    """
    if answer.unit != truth.unit and any({answer.unit, truth.unit} <= measure for measure in MEASURES):
        return False
    if answer.divided and truth.value.denominator == 1:
        return False
    pairs = [(answer.value, truth.value)]
    if answer.percent and not truth.percent:
        pairs.append((answer.value / 100, truth.value))
    if truth.percent and not answer.percent:
        pairs.append((answer.value, truth.value / 100))
    return any(a == b or _is_rounded(a, b) or _is_rounded(b, a) for a, b in pairs)


def _is_rounded(a: Fraction, b: Fraction) -> bool:
    """Whether a is b rounded to five or more decimal places."""
    if (a * 10**4).denominator == 1 or abs(a - b) > min(Fraction(1, 10**5), abs(b) / 10**4):
        return False
    for places in range(5, 31):
        if (a * 10**places).denominator == 1:
            return abs(a - b) * 10**places <= Fraction(1, 2)
    return False


def same_answer(a: str, b: str) -> bool:
    """Whether two answers in one completion are the same number, regardless of their units, or the same text.

    >>> same_answer("1,000 m", "1000"), same_answer("x + 1", "x+1"), same_answer("7", "8")
    (True, True, False)
    """
    x, y = read_number(a), read_number(b)
    return x.value == y.value if x and y else normalize_answer(a) == normalize_answer(b)
