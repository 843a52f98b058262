r"""The exact number that an answer stands for, read from digits, words, units and LaTeX, and whether two answers are the same.

Built on answer_text.py. What is read here is one number, all of an answer; where it stands in a completion is for
answer_statements.py and above.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from src.answer_text import MAX_ANSWER_CHARS, clean, normalised, unwrap

# ----------------------------------------------------------------------------------------------------------------------
# Digits and words

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SMALL += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
NUMBER_WORDS = rf"\b(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD})\b){{0,24}}"
PARTS_OF_ONE = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}

_UNSIGNED = (
    r"(?:"
    r"(?<!\d[ ])\d{1,3}(?:[ ]\d{3}){1,9}(?![\d.,]?\d|[ ]\d)"  # 1 000 000
    r"|(?<![(\[{,])\d{1,30},\d{1,2}(?![\d,])|(?<![(\[{,])0,\d{1,30}(?![\d,])"  # 2,75
    r"|\d{1,3}(?:(?:,|[ ]?\{,[ ]?\}|\\,)\d{3})+(?![\d,])"  # 1,000,000
    r"|\d{1,60})(?:\.\d{1,60})?(?!\d)|\.\d{1,60}(?!\d)"
)
_FRACTION = r"\\[dtc]?frac\s{0,3}(?:\{\s{0,3}(-?\d{1,30})\s{0,3}\}\s{0,3}\{\s{0,3}(-?\d{1,30})\s{0,3}\}|(\d)\s{0,3}(\d))"
NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}.])[-+]\s?)?                        # a sign is one where no number or bracket stands before it
    (?:\\?[$€£¥₹]\s?)?
    (?P<sign2>(?<=[$€£¥₹])-)?
    (?:
        (?P<whole>\d{{1,30}})?\s?(?P<latex>{_FRACTION})
      | (?P<mixed>(?<![\d.,/])\d{{1,30}})[ ](?P<mixed_of>\d{{1,9}}/\d{{1,9}})(?![\d/]|\.\d)
      | (?<![\w.])(?P<number>{_UNSIGNED})
        (?:\s?/\s?(?P<over>\d{{1,30}}(?:\.\d{{1,30}})?)(?![\d/]))?
        (?:[eE](?P<e>[+-]?\d{{1,3}})(?!\w)|\s?(?:\\times|\\cdot|[x×*·])\s?10\s?(?:\^|\*\*)\s?\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?
    )
    """,
    re.VERBOSE,
)


def _value(match: re.Match) -> Fraction | None:
    """What a match of NUMBER stands for; None for a division by zero."""
    negative = (match["sign"] or "").strip() == "-" or match["sign2"] == "-"
    if match["latex"]:
        fraction = re.search(_FRACTION, match["latex"])
        assert fraction is not None  # it is a part of NUMBER
        top, bottom = [int(g) for g in fraction.groups() if g is not None]
        if bottom == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(top, bottom)
    elif match["mixed"]:
        top, bottom = map(int, match["mixed_of"].split("/"))
        if bottom == 0:
            return None
        value = int(match["mixed"]) + Fraction(top, bottom)
    else:
        digits = re.sub(r"[{} \\]", "", match["number"])
        if re.fullmatch(r"\d+,\d{1,2}|0,\d+", digits):
            digits = digits.replace(",", ".")  # a decimal comma
        value = Fraction(digits.replace(",", ""))
        if match["over"]:
            if Fraction(match["over"]) == 0:
                return None
            value /= Fraction(match["over"])
        value *= Fraction(10) ** int(match["e"] or match["power"] or 0)
    return -value if negative else value


def read_words(text: str) -> tuple[Fraction, int] | None:
    """The number in English words that a text begins with, and where it ends.

    >>> read_words("two and a half hours"), read_words("minus seven"), read_words("three quarters"), read_words("apples")
    ((Fraction(5, 2), 14), (Fraction(-7, 1), 11), (Fraction(3, 4), 14), None)
    """
    text = text.lower()
    part = re.match(
        rf"(?P<sign>(?:negative|minus) )?(?:(?P<whole>{NUMBER_WORDS}) and )?(?P<count>an? |one[ -]|two[ -]|three[ -]|four[ -])?"
        rf"(?P<part>{'|'.join(PARTS_OF_ONE)})s?\b",
        text,
    )
    if part and (part["count"] or part["part"] == "half"):
        counted = {"a": 1, "an": 1, "": 1} | _WORDS
        value = Fraction(counted[(part["count"] or "").strip(" -")], PARTS_OF_ONE[part["part"]])
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
    """The value of a whole number in English words, None where they are in no order that names one.

    >>> _words_to_number("two hundred and thirty-one"), _words_to_number("one two")
    (231, None)
    """
    total = group = 0
    highest = math.inf  # scale so far: thousands come before ones
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


# ----------------------------------------------------------------------------------------------------------------------
# A whole answer: a number and its unit

# Behind a number they make another of it: 8 tenths, 8 squared, 8 lakh.
OTHER_QUANTITY = (
    r"factorial|over|doubled|tripled|squared|cubed|lakh|crore|bn|mil|halves|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth"
    r"|tenth|hundredth|thousandth)s?"
)
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
UNIT_ALIASES = {
    "hr": "hour", "hrs": "hour", "h": "hour", "min": "minute", "mins": "minute", "sec": "second", "secs": "second", "s": "second",
    "usd": "dollar", "eur": "euro", "buck": "dollar", "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m",
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilogram": "kg", "gram": "g", "liter": "l",
    "litre": "l", "milliliter": "ml", "millilitre": "ml", "feet": "foot", "ft": "foot", "inches": "inch", "in": "inch",
    "lb": "pound", "lbs": "pound", "oz": "ounce", "yd": "yard",
}  # fmt: skip
# Units that measure one quantity in different sizes: a wrong one makes a right number wrong.
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
_NO_UNIT_IN = re.compile(  # words that make more of a number than one with a unit: "8 or 9", "8 more than 3"
    r"\b(or|and|to|not|maybe|perhaps|but|than|times|plus|minus|versus|vs|if|out|is|are|was|were|has|have|equals?|gives?|makes?|"
    rf"into|divided|multiplied|{OTHER_QUANTITY}|below|above|remainder|r|more|less|because|so|which|that)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """An exact number and how it was written."""

    value: Fraction
    percent: bool = False
    unit: str = ""  # singular, "" for none
    divided: bool = False  # written a/b


def read_number(answer: str) -> Number | None:
    r"""The exact value of an answer that is one number with nothing but a unit, a currency or marks around it, else None.

    >>> [str(read_number(a).value) for a in ("$1,000.50", r"\frac{3}{4}", "3 1/2", "8 apples", "1.2e3", "twenty-one")]
    ['2001/2', '3/4', '7/2', '8', '1200', '21']
    >>> read_number("7 or 8")
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    answer = unwrap(answer)
    if not answer.isascii():
        answer = unwrap(clean(answer))
    power = re.fullmatch(r"10\s?\^\s?(?:(\d{1,2})|\{(-?\d{1,2})\})", answer)
    if power:
        return Number(Fraction(10) ** int(power[1] or power[2]))
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3}){1,5}(?:[.,]\d{1,9})?", answer):
        answer = answer.replace(" ", "")  # 1 000 000
    currency = next((name for sign, name in _CURRENCY.items() if sign in answer[:4]), "")
    match = NUMBER.match(answer)
    if match is None:
        value, end = read_words(answer) or (None, 0)
        divided = False
    else:
        value, end = _value(match), match.end()
        divided = bool(match["over"] or match["latex"])
    if value is None:
        return None
    rest = answer[end:].strip(" $")
    percent = False
    unit = currency
    if rest:
        scale = re.match(r"(dozen|hundred|thousand|million|billion|trillion)\b\s*", rest)
        if scale:
            value, rest = value * {**_SCALES, "dozen": 12, "trillion": 10**12}[scale[1]], rest[scale.end() :]
        elif re.match(r"[kK]\b", answer[end:]):
            value, rest = value * 1000, answer[end + 1 :].strip(" $")
    if rest:
        after = _UNIT.fullmatch(rest)
        if after is None:
            return None
        percent = bool(after["percent"])
        if after["unit"]:
            if _NO_UNIT_IN.search(rest):
                return None
            word = after["unit"].lower()
            if len(word) == 1 and word not in UNIT_ALIASES and word not in "mglc":
                return None  # 2x
            if end and answer[end - 1].isdigit() and answer[end : end + 1].isalpha() and len(rest) == 1 and rest not in "mglhscL":
                return None
            unit = (
                currency
                or UNIT_ALIASES.get(word)
                or UNIT_ALIASES.get(word.rstrip("s"))
                or (word[:-1] if word.endswith("s") else word)
            )
    return Number(Fraction(value), percent, unit, divided)


def same_number(answer: Number, truth: Number) -> bool:
    """Whether an answer is the true number as a careful person would judge it.

    50 % is 50 and 0.5; a decimal of at least five places may be rounded; hours are not minutes. A division that is left to
    do, 20/4 for 5, is the question and no answer.
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
    return any(a == b or _rounded(a, b) or _rounded(b, a) for a, b in pairs)


def _rounded(a: Fraction, b: Fraction) -> bool:
    """Whether a is b rounded to five or more decimal places."""
    if (a * 10**4).denominator == 1 or abs(a - b) > min(Fraction(1, 10**5), abs(b) / 10**4):
        return False
    for places in range(5, 31):
        if (a * 10**places).denominator == 1:
            return abs(a - b) * 10**places <= Fraction(1, 2)
    return False


def alike(a: str, b: str) -> bool:
    """Whether two answers of one completion are the same number, whatever their units, or the same text.

    >>> alike("1,000 m", "1000"), alike("x + 1", "x+1"), alike("7", "8")
    (True, True, False)
    """
    x, y = read_number(a), read_number(b)
    return x.value == y.value if x and y else normalised(a) == normalised(b)
