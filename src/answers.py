r"""Reading answers: the final one of a completion, and the exact number that an answer stands for.

Text is parsed, never evaluated. Every regular expression here takes time linear in the text, or works on a piece whose
length is limited first.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER_CHARS = 300  # a longer "final answer" is not one
MAX_TEXT_CHARS = 20_000  # what is read of a completion: its end
MAX_CONTEXT_CHARS = 1500  # of it, what Math-Verify may read for an answer that is no number

# ----------------------------------------------------------------------------------------------------------------------
# Characters

_VULGAR = {chr(c): unicodedata.normalize("NFKC", chr(c)).replace("⁄", "/") for c in [*range(0xBC, 0xBF), *range(0x2150, 0x215F)]}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_CHARACTERS = {
    **{ord(c): "-" for c in "−–—﹣－‐‑‒"},
    **{ord(c): " " for c in "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\x00"},
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"), None),
    **{c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    ord("’"): "'",
    ord("⁄"): "/",
    ord("∕"): "/",
    ord("÷"): "/",
    ord("√"): r"\sqrt",
    ord("π"): r"\pi ",
    ord("∞"): r"\infty ",
}


def clean(text: str) -> str:
    """A text with the many ways to type one character made one: minus signs, spaces, digits, fractions, exponents.

    >>> clean("−½ m², １２")
    '-1/2 m^2, 12'
    """
    if text.isascii():
        return text.replace("\x00", " ")
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates can be neither printed nor sent
    text = re.sub(r"(\d?)([¼-¾⅐-⅞])", lambda m: f"{m[1]} {_VULGAR[m[2]]}" if m[1] else _VULGAR[m[2]], text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: "^" + _braced(m[0].translate(_SUPERSCRIPTS)), text)
    text = text.translate(_CHARACTERS)
    if text.isascii():
        return text
    return "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)


def _braced(exponent: str) -> str:
    return exponent if len(exponent) == 1 else f"{{{exponent}}}"


# ----------------------------------------------------------------------------------------------------------------------
# Numbers

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SMALL += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
NUMBER_WORDS = rf"\b(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD})\b){{0,24}}"

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


@dataclass(frozen=True)
class Number:
    value: Fraction
    percent: bool = False
    unit: str = ""  # singular, "" for none
    divided: bool = False  # written a/b


def _value(match: re.Match) -> Fraction | None:
    """What a match of NUMBER stands for; None for a division by zero."""
    negative = (match["sign"] or "").strip() == "-" or match["sign2"] == "-"
    if match["latex"]:
        top, bottom = [int(g) for g in re.search(_FRACTION, match["latex"]).groups() if g is not None]
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


_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}


def read_words(text: str) -> tuple[Fraction, int] | None:
    """The number in English words that a text begins with, and where it ends.

    >>> read_words("two and a half hours"), read_words("minus seven"), read_words("three quarters"), read_words("apples")
    ((Fraction(5, 2), 14), (Fraction(-7, 1), 11), (Fraction(3, 4), 14), None)
    """
    text = text.lower()
    part = re.match(
        rf"(?P<sign>(?:negative|minus) )?(?:(?P<whole>{NUMBER_WORDS}) and )?(?P<count>an? |one[ -]|two[ -]|three[ -]|four[ -])?"
        rf"(?P<part>{'|'.join(_PARTS)})s?\b",
        text,
    )
    if part and (part["count"] or part["part"] == "half"):
        counted = {"a": 1, "an": 1, "": 1} | _WORDS
        value = Fraction(counted[(part["count"] or "").strip(" -")], _PARTS[part["part"]])
        whole = words_to_number(part["whole"]) if part["whole"] else 0
        if whole is None:
            return None
        value, end = value + whole, part.end()
    else:
        part = re.match(rf"(?P<sign>(?:negative|minus) )?(?P<whole>{NUMBER_WORDS})\b", text)
        whole = words_to_number(part["whole"]) if part else None
        if whole is None:
            return None
        value, end = Fraction(whole), part.end()
    return (-value if part["sign"] else value), end


def words_to_number(words: str) -> int | None:
    """The value of a whole number in English words, None where they are in no order that names one.

    >>> words_to_number("two hundred and thirty-one"), words_to_number("one two")
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


# Behind a number they make another of it: 8 tenths, 8 squared, 8 lakh.
_OTHER_QUANTITY = (
    r"factorial|over|doubled|tripled|squared|cubed|lakh|crore|bn|mil|halves|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth"
    r"|tenth|hundredth|thousandth)s?"
)
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_ALIASES = {
    "hr": "hour", "hrs": "hour", "h": "hour", "min": "minute", "mins": "minute", "sec": "second", "secs": "second", "s": "second",
    "usd": "dollar", "eur": "euro", "buck": "dollar", "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m",
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilogram": "kg", "gram": "g", "liter": "l",
    "litre": "l", "milliliter": "ml", "millilitre": "ml", "feet": "foot", "ft": "foot", "inches": "inch", "in": "inch",
    "lb": "pound", "lbs": "pound", "oz": "ounce", "yd": "yard",
}  # fmt: skip
# Units that measure one quantity in different sizes: a wrong one makes a right number wrong.
_MEASURES = [
    {"second", "minute", "hour", "day", "week", "month", "year", "decade"},
    {"mm", "cm", "m", "km", "inch", "foot", "yard", "mile"},
    {"mg", "g", "kg", "ounce", "pound", "ton"},
    {"ml", "l"},
    {"cent", "dollar", "euro", "yen", "rupee"},
]
_WRAPPERS = re.compile(
    r"\\(?:text|textnormal|textrm|textsf|emph|mathrm|mathbf|textbf|mbox|operatorname|mathit|textit)\s?\{([^{}]{0,200})\}"
)
_MARKS = re.compile(r"\\[!,;: ]|\\left|\\right|\\displaystyle|\\(?=[$%#&_])|\*\*|__|`|\\\(|\\\)|\\\[|\\\]|~")
_UNIT = re.compile(
    r"\s?(?P<percent>%|percent\b|per cent\b)|"
    r"(?P<degree>\s?(?:°|\^\s?\{?\\?circ\s?\}?|\\degree|degrees?\b)(?:\s?[CF]\b)?)|"
    r"[ \t-]?(?P<unit>[A-Za-z]+)(?:\^\{?[23]\}?|[ \t./-]{1,2}[A-Za-z']+){0,5}\.?"
)


def unwrap(answer: str) -> str:
    r"""An answer without what only dresses it: LaTeX text and spacing commands, dollars around it, markdown, a full stop.

    >>> unwrap(r"$\text{8 apples}.$"), unwrap("**8**.")
    ('8 apples', '8')
    """
    answer = _WRAPPERS.sub(r" \1 ", re.sub(r",\s{0,3}\\!\s{0,3}", ",", answer))
    answer = _MARKS.sub("", answer).strip()
    previous = None
    while answer != previous:
        previous = answer
        answer = answer.strip().strip("*_`\"'").rstrip(".,;:? ").lstrip(":= ").strip()
        if len(answer) > 1 and answer[0] == answer[-1] == "$" and "$" not in answer.strip("$"):
            answer = answer.strip("$")
        elif answer.endswith("$") and answer.count("$") == 1:
            answer = answer[:-1]
        for left, right in ("()", "{}", "[]"):
            inner = answer[1:-1]
            if answer[:1] == left and answer[-1:] == right and not set("(){}[],") & set(inner):
                answer = inner
    return answer


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
            if re.search(
                r"\b(or|and|to|not|maybe|perhaps|but|than|times|plus|minus|versus|vs|if|out|is|are|was|were|has|have|equals?|gives?|makes?|"
                rf"into|divided|multiplied|{_OTHER_QUANTITY}|below|above|remainder|r|more|less|because|so|which|that)\b",
                rest,
                re.IGNORECASE,
            ):
                return None
            word = after["unit"].lower()
            if len(word) == 1 and word not in _ALIASES and word not in "mglc":
                return None  # 2x
            if end and answer[end - 1].isdigit() and answer[end : end + 1].isalpha() and len(rest) == 1 and rest not in "mglhscL":
                return None
            unit = currency or _ALIASES.get(word) or _ALIASES.get(word.rstrip("s")) or (word[:-1] if word.endswith("s") else word)
    return Number(Fraction(value), percent, unit, divided)


def same_number(answer: Number, truth: Number) -> bool:
    """Whether an answer is the true number as a careful person would judge it.

    50 % is 50 and 0.5; a decimal of at least five places may be rounded; hours are not minutes. A division that is left to
    do, 20/4 for 5, is the question and no answer.
    """
    if answer.unit != truth.unit and any({answer.unit, truth.unit} <= measure for measure in _MEASURES):
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


# ----------------------------------------------------------------------------------------------------------------------
# The final answer of a completion

_SPELLED_SIGN = re.compile(r"(^|[:=]\s?|\b(?:is|was|be|equals|to|of)\s)(?:negative|minus) (?=\W{0,2}\d)", re.IGNORECASE)
_TURN = re.compile(
    r"<\|[a-z_]{2,20}\|>|</s>|<s>|\[/?INST\]|<(?:start|end)_of_turn>|"
    r"(?:^|\n)[ \t]*(?:#{2,4}[ \t]*)?(?:\*\*)?(?:user|human|question|new question|next question|q|problem|instruction|exercise)"
    r"(?:[ \t]*\d{0,3})(?:\*\*)?[ \t]*:",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,2}\{|\\?[{}]")
_HASHES = re.compile(r"####[ \t]*([^\n]{0,400})")
_HEADING = re.compile(
    r"(?:\*\*)?\s?(?:step|solution|explanation|note|check|given|part|example|calculat|verif|conclusion|problem|question|method"
    r"|approach|analysis|how|let|to |first|second|next|the problem)",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:actually|wait|sorry|correction|corrected|mistake|incorrect|wrong|instead|rather|i meant|kidding|joking|should be|"
    r"or (?:maybe|perhaps|possibly|could|it|is it)|maybe|perhaps|alternatively|another (?:possible )?answer|also be|no,|not)\b",
    re.IGNORECASE,
)
_RECONSIDERED = re.compile(r"\b(?:wait|actually|sorry|correction|mistake|recalculate|recompute)\b", re.IGNORECASE)
_WRONG = re.compile(r"(?:wrong|incorrect|not (?:right|correct)|a mistake|false|do(?:n't| not) know)\b", re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"\b(?P<word>answer|result|solution|option|choice)s?\b[*_]{0,3}"
    r"(?P<what>[^.\n=:\d]{0,80}?)"
    r"(?P<is>\*{0,2}(?::|=)\*{0,2}|\b(?:is|are|equals|would be|will be|must be|was|becomes|comes to)\b)"
    r"[ \t]*:?(?=(?P<rest>[^\n]{0,300}(?:\n{1,2}(?=\s*[\d$\\*-])[^\n]{0,300})?))",
    re.IGNORECASE,
)
_IS_ANSWER = re.compile(
    r"(?P<rest>[^\s,;:]{1,60})(?:\s[a-z]{1,20})?,?\s(?:is|was|would be)\s(?:(?!not\b|n't)[a-z]{1,12}\s){0,2}?"
    r"(?:final |correct |right |only |exact )?(?:answer|result|solution)\b",
    re.IGNORECASE,
)
_UNIT_POWER = re.compile(r"(?<=[a-z])\s?\^\s?\{?[23]\}?(?![\w^+-])")  # of cm^2
_DENIED = re.compile(
    r"\b(?:is|was)(?:\s?n't|\snot)\s(?:the |a |my )?(?:final |correct |right )?(?:answer|result|solution)\b", re.IGNORECASE
)
_HEDGE = re.compile(r"\beither\b|\b(?:or|and/or)\b|\bbetween\b.{0,40}\band\b|\bnot sure\b|\bone of\b", re.IGNORECASE)
_FILLERS = (
    r"(?:\s(?:a|the|an|total|sum|of|about|around|approximately|exactly|only|just|now|also|equal|to|indeed|actually|therefore|"
    r"simply|still|left|with|be|been|at|least|then|thus|all|together|altogether|us|you|him|her|them|up|out|back|in|always|"
    r"equivalent|worth|over|for|(?:an?|the)\s[a-z]{3,12}\sof|"
    r"(?-i:[A-Z][a-z]{1,15}))\b){0,5}"
)
_VERBS = (
    "is|are|was|were|been|equals?|gives?|gets|got|makes|made|leaves?|leaving|left|has|had|becomes?|totals?|remains?|costs?|"
    "pays|paid|earns?|earned|needs?|spends|spent|saves?|saved|receives?|received|eats?|ate|sells?|sold|takes?|took|owns?|contains?|"
    "produces?|weighs?|travels?|walks?|runs?|reads?|buys|bought|obtains?|finds?|yields?|yielding|giving|making|totall?ing|"
    "equall?ing|so|therefore|thus|hence|total"
)
_STATED = re.compile(
    r"(?:=|≈|->|→|\\approx|\\Rightarrow|(?<=[A-Za-z)])\*{0,2}:\*{0,2}|\b(?:pay|spend)\b|(?<!\bto )\b(?:have|be|get|make|buy)\b|"
    r"\b(?:profit|loss|cost|price|value|amount|average|area|perimeter|speed|length) of\b|"
    rf"(?<!\bto )\b(?:{_VERBS}|comes? to|adds? up to|amounts? to|result(?:s|ing) in|(?:in|de)creas(?:es|ed) by|"
    r"(?:ends?|starts?|arrives?|leaves?|finish(?:es)?) at)\b[,:]?|"
    r"\b(?:it|that|there)'s\b)"
    + _FILLERS
    + r"\s{0,3}(?=(?P<rest>(?=[^a-zA-Z\n]{0,12}[\d\\])[^\n]{0,200}|"
    + rf"(?:(?:negative|minus) )?(?:{NUMBER_WORDS}|half|a half|a quarter)\b[^\n]{{0,60}}))",
    re.IGNORECASE,
)
_ASIDE = re.compile(  # what follows explains or checks an answer that has been given
    r"(?:^|[\n.!(])\s{0,3}(?:"
    r"(?:(?:now,? )?(?:to|let's|let us|we can|you can|i can|i will|i'll)[ ]+)(?:also )?(?:check|verify|confirm|double[- ]check)|"
    r"check(?:ing)?\s*:|verification\b|double[- ]check|(?:this|it|that) is because\b|explanation\b|"
    r"here(?:'s| is) (?:why|how|the)\b|reason(?:ing)?:|note:|note that\b|by the way\b|remember\b|in other words\b|fun fact\b)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(r"(?:^|[.!\n])[\s*]{0,3}(?:so|therefore|thus|hence|in total|in conclusion|finally)\b", re.IGNORECASE)
_SUPPOSED = re.compile(r"^\W{0,4}(?:suppose|had)\b|\bif\b|\b(?:would|could|might)\b", re.IGNORECASE)
_NOT_IT = re.compile(
    r"(?:\bnot|n't|\b(?:less|more|greater|fewer) than|\bat (?:least|most)|\bhalf of|\bdouble|\btwice|\broot(?: of)?|±|\\pm)"
    r"[\s$*]*$",
    re.IGNORECASE,
)
_TURNED = re.compile(  # 8 = 5 + 3
    r"(?<![-+*/=×x][ ])(?<!\S)(\d[\d.,]{0,20}) ?= ?(\d{1,20}(?: ?[-+*/×x] ?\d{1,20}){1,5})(?![\d]| ?[-+*/=×x])"
)
_NO_UNIT = re.compile(rf"\s({_OTHER_QUANTITY})\b", re.IGNORECASE)
_PAIR = re.compile(r"\W{0,3}[\d.,]{1,20}(?:\s[a-z]{1,20}){0,2}\sand\s\W?\d")
_GOES_ON = re.compile(
    r"=|\b(?:then|after|afterwards|now|next|finally|left|leaving|remain\w*|total\w*|altogether|so|answer|result|must|need\w*)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(r"\((?:[^()\n\d=]{0,60}\b[A-Za-z]{2,}\b){3}[^()\n]{0,200}\)")  # three words and more in brackets
_COMPARED = re.compile(
    rf"(?P<rest>{NUMBER_WORDS}|[-\d.,/]{{1,20}}) (?:is|was) (?:the )?"
    r"(?:larger|greater|bigger|higher|more|smaller|less|lower|fewer)\b",
    re.IGNORECASE,
)
_OPERATOR_AFTER = re.compile(
    r"[ \t]{0,3}(?:[A-Za-z]{1,20}[ \t]{0,2})?(?:[-+*/^=×·]|\\times|\\cdot|\\div|\\pm|\*\*|x(?=[ \t]?\d))[ \t]{0,2}[\d\\({$]"
)
_JOINED_AFTER = re.compile(r"\^|\\(?!\)|\]|[ $,;%]|text|mathrm|%|circ)|[a-z](?![a-z])(?!\w)|\(")


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

    A marked answer goes before any other: the last complete `<answer>`, then `\\boxed{}`, then `####`. In unmarked text
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
    text = re.sub(r"\b(\d{1,9}) and (?:a|one)[ -](half|quarter)\b", lambda m: f"{m[1]} 1/{_PARTS[m[2]]}", text)
    text = re.sub(r"\$?\b(\d{1,9}) dollars? and (\d\d) cents?\b", r"$\1.\2", text)
    marks = _marks(text)
    if marks:
        answer = _marked(text, marks)
        behind = text[marks[-1][1] :]
        if not answer.values and method == "flexible" and len(marks) > 1 and _ANSWER_IS.search(behind):
            value = _unmarked(behind, "")  # a box for each step, and then the answer
            return FinalAnswer((value,), True) if value and read_number(value) else answer
        return answer
    if method == "strict":
        return FinalAnswer()
    value = _unmarked(text, clean(question[:2000]))
    values = (value,) if value and re.search(r"\w", value) else ()
    return FinalAnswer(values, context="" if _ALTERNATIVES.search(text[-200:]) else text[-MAX_CONTEXT_CHARS:])


def _own_turn(text: str) -> str:
    """The completion up to where it goes on to speak for the user or to put another question."""
    answered = re.search(r"\d|</answer>|\\boxed", text, re.IGNORECASE)
    turn = _TURN.search(text, answered.end()) if answered else None
    return text[: turn.start()] if turn else text


def _marks(text: str) -> list[tuple[str, int]]:
    """Contents and end positions of the marked answers of the first kind that the text has."""
    found, start = [], None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found.append((text[start : tag.start()], tag.end()))
            start = None
    found = [(content, end) for content, end in found if content.strip()]
    if found:
        return found
    found = boxed(text)
    if found:
        return found
    for line in _HASHES.finditer(text):
        content, end = line[1].strip(), line.end()
        labelled = re.match(
            r"(?:\*\*)?(?:the )?(?:final )?(?:answer|result)(?:\*\*)?(?: is)?\s*:?(?:\*\*)?", content, re.IGNORECASE
        )
        if labelled:
            content = content[labelled.end() :].strip()
            if not content:  # the value is on the line below its heading
                below = re.match(r"\s{0,4}([^\n]{1,200})", text[end : end + 210])
                content = below[1].strip() if below else ""
        if content and not (_HEADING.match(content) or content.endswith(":")):
            found.append((content, end))
    return found


def boxed(text: str) -> list[tuple[str, int]]:
    r"""Contents of the complete `\boxed{...}` of a text that are not empty, and where each ends; braces matched.

    >>> boxed(r"so \boxed{\frac{1}{2}}. \boxed{unclosed")
    [('\\frac{1}{2}', 22)]
    """
    found = []
    open_braces: list[int | None] = []  # for each brace that is open: where its box's content starts, None for a plain one
    for brace in _BRACES.finditer(text):  # one pass: looking for the end of each box in turn would be quadratic
        if brace[0].endswith("{"):
            open_braces.append(brace.end() if "boxed" in brace[0] or "fbox" in brace[0] else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and text[start : brace.start()].strip():
                found.append((text[start : brace.start()], brace.end()))
    return sorted(found, key=lambda f: f[1])


def _marked(text: str, marks: list[tuple[str, int]]) -> FinalAnswer:
    """The answer that marks agree on and the text behind them does not take back."""
    values: list[str] = []
    for content, _ in marks[-20:]:
        if len(content) > MAX_ANSWER_CHARS:
            return FinalAnswer(marked=True)
        value = _committed(content)
        if value is None:
            return FinalAnswer((), True, rf"$\boxed{{{content}}}$" if len(marks) == 1 else "")
        if not any(_alike(value, v) for v in values):
            values.append(value)
    behind = text[marks[-1][1] :][:2000]
    if len(values) == 1 and _taken_back(values[0], behind):
        return FinalAnswer(marked=True)
    if len(values) > 1 and ("boxed" not in text or len(values) > 8):
        return FinalAnswer(marked=True)  # several answers are none
    context = " and ".join(rf"$\boxed{{{content}}}$" for content, _ in marks[-8:])
    if len(values) > 1 and _ANSWER_IS.search(behind):
        return FinalAnswer(marked=True)
    return FinalAnswer(tuple(values), True, context if len(context) <= MAX_CONTEXT_CHARS else "")


def _committed(content: str) -> str | None:
    """The one value of the content of a mark; None where it weighs several."""
    nested = _marks(content)
    if nested:
        if any(not _alike(nested[-1][0], other) for other, _ in nested):
            return None
        content = nested[-1][0]
    content = content.strip()
    if read_number(content) is not None:
        return content
    if (
        len(NUMBER.findall(content)) == 1
        and re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", _WRAPPERS.sub("", content))
        and not _HEDGE.search(content)
    ):
        value = _statement_value(content)  # Tom has 8 apples.
        if value and read_number(value):
            return value
    label = _ANSWER_IS.search(content)
    if label and label.end("rest") == len(content):
        content = label["rest"].strip()
    sides = re.split(r"(?<![<>!\\=])=(?!=)", content)
    if len(sides) > 1 and not re.search(r"\\(?:le|ge|ne|in|cup|text\{ ?or)\b|[<>,;]", content):
        content = sides[-1].strip()
    if re.search(r"\b(?:or|either|maybe|perhaps)\b", content, re.IGNORECASE) and len(NUMBER.findall(content)) > 1:
        return None
    return content or None


def _alike(a: str, b: str) -> bool:
    x, y = read_number(a), read_number(b)
    return x.value == y.value if x and y else normalised(a) == normalised(b)


def _taken_back(value: str, behind: str) -> bool:
    """Whether the text behind a marked answer gives another one."""
    for cue in _ANSWER_IS.finditer(behind):
        if re.search(r"\b(?:is|was) (?:the|my|our|your) (?:final |correct |right )?$", behind[: cue.start()], re.IGNORECASE):
            continue  # "is the answer: ..." speaks of the mark
        other = _statement_value(cue["rest"])
        if other and read_number(value) is None and other in value:
            continue  # a part of it: "between 12 and 13"
        if other and read_number(other) and not _alike(value, other):
            return True
    for content, _ in _marks(behind):
        if read_number(content) and not _alike(value, content):
            return True
    if re.search(rf"\b(?:that|this|it)(?:'s| is| was) {_WRONG.pattern}", behind, re.IGNORECASE):
        return True
    correction = _CORRECTION.search(behind)
    if correction:
        return any(not _alike(value, m[0]) for m in NUMBER.finditer(behind[correction.end() :][:200]))
    return False


def _unmarked(text: str, question: str) -> str | None:
    """The answer of text without marks: what it calls the answer, else what it states last."""
    text = _without_asides(text, question)
    bare = _bare(text)
    if bare:
        return bare
    value, rest = _called_the_answer(text, question)
    return value if rest is None else _last_stated(rest, question)


def _without_asides(text: str, question: str) -> str:
    """A text without the question's echo, what it asks itself, what only explains or checks, and remarks in brackets."""
    if question.rstrip().endswith(("?", ".")):
        text = text.replace(question.strip(), " ")
    text = re.sub(r"[^.!?\n]{0,400}\?(?=\s|$)", " ", _TAG.sub(" ", text))
    text = _WRAPPERS.sub(r" \1 ", text)
    text = _TURNED.sub(r"\2 = \1", text)
    first_number = NUMBER.search(text)
    if first_number is None or _bare(text):
        return text
    aside = _ASIDE.search(text, first_number.end())
    if aside and not _ANSWER_IS.search(text, aside.start()) and not _CONCLUSION.search(text, aside.start()):
        text = text[: aside.start() + 1]
    return text[: first_number.end()] + _REMARK.sub(" ", text[first_number.end() :])


def _called_the_answer(text: str, question: str) -> tuple[str | None, str | None]:
    """The value that is called the answer, and None; or None and the text in which to look for what is stated."""
    called = [
        (m.end(), m["rest"], m["what"]) for m in _ANSWER_IS.finditer(text) if m["word"].lower() == "answer" or _soon(m["rest"])
    ]
    called += [(m.end(), m["rest"], "") for m in _IS_ANSWER.finditer(text) if read_number(m["rest"])]
    denied = max((m.end() for m in _DENIED.finditer(text)), default=0)
    values: list[str | None] = []
    place = 0  # behind the last of them
    for end, rest, what in sorted(called):
        sentence = _sentence(rest)
        if re.match(r"\s*(?:not|n't|wrong|incorrect)\b", sentence):
            denied = max(denied, end + len(sentence))
        elif not re.search(r"\b(?:not|n't|if|whether|check|wrong|incorrect)\b", what, re.IGNORECASE):
            value = None if _weighs_several(sentence) else _statement_value(sentence, whole=True)
            if value or _weighs_several(sentence):
                values.append(value)
                place = end
    if not values:
        return None, text[denied:]
    if len({normalised(v or "") for v in values}) > 2:
        return None, None  # it tries one after the other
    if denied > place:
        return _last_stated(text[denied:], question), None
    corrections = list(_RECONSIDERED.finditer(text, place))
    if corrections and values[-1]:
        after = text[corrections[-1].end() :]
        restated = _last_stated(after, question)
        if restated and not _alike(restated, values[-1]):
            return restated, None
        if restated is None and _WRONG.search(after):
            return None, None
    return values[-1], None


def _soon(rest: str) -> bool:
    """Whether a value follows at once: "the result is 8", not "the result is essential to ..."."""
    return bool(re.match(rf"[^\d\n]{{0,25}}(?:[\d\\$]|{NUMBER_WORDS}\b)", rest, re.IGNORECASE))


def _bare(text: str) -> str | None:
    """A text that is an answer and nothing else: a number, a ratio, a formula without words."""
    text = text.strip().rstrip("!").strip()
    if not 0 < len(text) <= 100 or "\n" in text:
        return None
    if read_number(text) is not None or re.fullmatch(r"\W{0,3}\d{1,9}\s?:\s?\d{1,9}(?:\s?[AaPp]\.?[Mm]\.?)?\W{0,3}", text):
        return text
    formula = not re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}|=|\bor\b", text) and re.search(r"\d|\\", text)
    return unwrap(text) if formula else None


def _last_stated(text: str, question: str) -> str | None:
    """The value given to the question's own expression, else the last value stated, else the last number."""
    if re.search(r"\b(?:which|larger|greater|bigger|smaller|more|less)\b", question, re.IGNORECASE):
        compared = list(_COMPARED.finditer(text))
        if compared:
            return compared[-1]["rest"].strip(".,")
    own = _values_of_expression(text, question_expression(question))
    if own:
        return own[-1] or None if len({normalised(v) for v in own}) <= 2 else None
    text = re.sub(r"(=\s{0,3}[^=\n≈]{1,40}?)\s{0,3}(?:≈|\\approx)\s{0,3}[-\d.,]+", r"\1", text)  # the exact of two
    stated = []  # what counts more, place, text behind the verb, the sentence up to it
    for m in _STATED.finditer(text):
        if re.search(r"\b(?:sum|product|difference|quotient|total) of$", m[0].rstrip()) and _PAIR.match(m["rest"]):
            continue  # "which is the sum of 10 boys and 14 girls"
        near = max(0, m.start() - 300)  # a sentence that is longer is not looked at whole, or the time would be quadratic
        begins = max(text.rfind(". ", near, m.start()) + 1, text.rfind("\n", near, m.start()) + 1, near)
        clause = text[begins : m.end()]
        stated.append((not _SUPPOSED.search(clause), m.end(), m["rest"], clause))
    stated.sort(key=lambda s: s[:2], reverse=True)
    # The last one, unless it only adds to a conclusion: "So she has 9 left. Her friend has 6." What would be so under a
    # condition counts only where nothing else is stated.
    concluded = next((s for s in stated if s[0] and re.search(r"\b(?:so|therefore|thus|hence)\b", s[3], re.IGNORECASE)), None)
    if concluded and not _GOES_ON.search(text[concluded[1] + len(_sentence(concluded[2])) :]):
        last = _statement_value(_sentence(stated[0][2]), first=True)
        if not (last and _alike(last, _statement_value(_sentence(concluded[2]), first=True) or "")):
            stated.insert(0, concluded)
    if re.search(r"\b(?:might|could|may) (?:also |possibly |rather )?be\b[^.\n]{0,20}\d", text[-200:]) and len(stated) > 1:
        return None
    for _, _, rest, _ in stated[:6]:
        sentence = _sentence(rest)
        if _weighs_several(sentence):
            return None
        value = _statement_value(sentence, first=True)
        if value:
            return value
    if _HEDGE.search(text) and len({m[0] for m in NUMBER.finditer(text[-200:])}) == 2 and len(text) < 100:
        return None
    tail = text[-4000:]
    numbers = [m for m in NUMBER.finditer(tail) if not re.search(r"[\^_]\{?$|\d:$", tail[max(0, m.start() - 2) : m.start()])]
    numbers = [m for m in numbers if not _NOT_IT.search(tail[max(0, m.start() - 20) : m.start()])]
    if numbers and not _is_list(text):
        return _with_unit(tail, numbers[-1])
    if not numbers:
        return _last_math(text) or (text.strip() if len(text.split()) <= 3 and len(text) <= 80 else None)
    return None


def _values_of_expression(text: str, expression: list[str]) -> list[str]:
    """What a text says that the question's expression is, each time; "" where it weighs several values."""
    if not expression:
        return []
    pattern = r"\s{0,2}".join(_operator_or_term(term) for term in expression)
    values = []
    for m in re.finditer(rf"(?<![\d.*/+^-])(?<![*/+-]\s){pattern}(?![\d/*^]|\s{{0,2}}[-+*/x×]\s?\d)", text):
        stated = re.match(
            r"[^\n.=\d]{0,40}?(?:=|\bis\b|\bequals?\b|\bgives\b)(?!\s*(?:not|n't)\b)(?P<rest>[^\n]{0,200})",
            text[m.end() : m.end() + 260],
            re.IGNORECASE,
        )
        if stated:
            sentence = _sentence(stated["rest"])
            value = "" if _weighs_several(sentence) else _statement_value("=" + sentence)
            if value is not None:
                values.append(value)
    return values


def _operator_or_term(term: str) -> str:
    return {
        "*": r"(?:\*|×|x|\\times|\\cdot|·|times|multiplied by)",
        "/": r"(?:/|\\div|divided by)",
        "-": "(?:-|minus)",
        "+": r"(?:\+|plus)",
    }.get(term, re.escape(term))


def question_expression(question: str) -> list[str]:
    """Terms and signs of the one arithmetic expression of a question, none where it has no or several.

    >>> question_expression("What is 12 + 7 * 2?"), question_expression("Tom has 4 apples and buys 9 more.")
    (['12', '+', '7', '*', '2'], [])
    """
    for words, sign in (("divided by", "/"), ("multiplied by", "*"), ("times", "*"), ("plus", "+"), ("minus", "-")):
        question = re.sub(rf"(?<=\d) {words} (?=\d)", f" {sign} ", question)
    found = re.findall(r"\d{1,15}(?:\.\d{1,15})?(?:\s?(?:[-+*/×x]|\\times|\\div)\s?\d{1,15}(?:\.\d{1,15})?){1,9}", question)
    if len(found) != 1:
        return []
    terms = re.findall(r"\d+(?:\.\d+)?|[-+*/×x]|\\times|\\div", found[0])
    return [{"×": "*", "x": "*", "\\times": "*", "\\div": "/"}.get(t, t) for t in terms]


def _sentence(rest: str) -> str:
    """Up to the end of the sentence: a full stop that ends no number, a question or exclamation mark, a blank line."""
    rest = rest.lstrip("\n* ")
    end = re.search(r"[.!?](?=\s|$|[*\"'])|\n\s*\n|;\s", rest)
    rest = rest[: end.start()] if end else rest
    return _UNIT_POWER.sub(" ", rest)


_ALTERNATIVES = re.compile(
    rf"({NUMBER_WORDS}|[\d.)$%*}}])[ *$\\)]{{0,4}}(?:[a-z]{{2,15}} )?,?\s?(?:or|and/or)\s"
    rf"(?:[a-z]{{2,12}} ){{0,2}}[(\\$*]{{0,4}}(?:\d|(?:{NUMBER_WORDS})\b)",
    re.IGNORECASE,
)


def _weighs_several(sentence: str) -> bool:
    """7 or 8; a list of three or more numbers. 0.5 or 50 % is one value."""
    sides = re.split(r",?\s(?:or|and/or)\s", sentence)
    if len(sides) == 2:
        left, right = list(NUMBER.finditer(sides[0])), NUMBER.match(unwrap(sides[1]))
        if left and right:
            a, b = read_number(_with_unit(sides[0], left[-1])), read_number(_with_unit(unwrap(sides[1]), right))
            if a and b and same_number(a, b):
                return False
    return bool(_ALTERNATIVES.search(sentence)) or _is_list(sentence)


def _is_list(sentence: str) -> bool:
    return bool(
        re.search(
            r"(?<![\d(\[{])\d{1,9}\s?(?:,\s|/\s|;\s?|,?\sand\s)\s?\d{1,9}\s?(?:(?:,|;|,?\sand|,?\sor)\s?\d{1,9}\b)", sentence
        )
    )


def _statement_value(sentence: str, whole: bool = False, first: bool = False) -> str | None:
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
        sentence, first = sides[-1], True
    else:
        tail = None
        opening = re.match(r"[^A-Za-z\d\\]{0,6}(?=[\d\\])", sentence)
        if opening and not first:
            number = NUMBER.search(sentence)
            first = bool(number) and not _OPERATOR_AFTER.match(sentence, number.end())
        if not first:
            for m in re.finditer(r"\b(?:is|equals|equal to|which is|gives|are)\b(?=[^\d\n]{0,20}\d)", sentence):
                tail = m
            if tail is not None:
                sentence, first = sentence[tail.end() :], True
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
    matches = list(NUMBER.finditer(sentence))
    spelled = re.match(
        rf"[^A-Za-z\d]{{0,5}}((?:negative |minus )?{NUMBER_WORDS})\b(?! and (?:a|one|two|three)\b)", sentence, re.IGNORECASE
    )
    if matches and spelled and read_words(spelled[1]):
        return spelled[1]  # nine (9)
    if matches:
        m = matches[0]
        if _NOT_IT.search(sentence[: m.start()]):
            return None
        if _OPERATOR_AFTER.match(sentence, m.end()):
            return unwrap(sentence)[:MAX_ANSWER_CHARS] or None  # arithmetic that is left to do
        thousands = re.match(r"[kK]\b", sentence[m.end() :])
        if (_JOINED_AFTER.match(sentence, m.end()) and not thousands) or re.search(
            r"[\\^(]\w*[{(]?$|[a-zA-Z]\s?[-+*/]\s?$", sentence[max(0, m.start() - 8) : m.start()]
        ):
            end = re.search(r"\$|,\s|\s(?=[a-z]{2,})", sentence[m.start() :])
            piece = sentence[: m.start() + end.start()] if end else sentence
            return unwrap(piece) or None
        return _with_unit(sentence, m)
    bare = re.sub(r"^[^a-zA-Z]{0,5}", "", sentence)
    words = read_words(bare)
    if words:
        return bare[: words[1]]
    if whole:
        bare = unwrap(sentence)
        return bare if 0 < len(bare) <= 100 else None
    return None


def _with_unit(sentence: str, match: re.Match) -> str:
    """The number with the percent sign or the unit of measure behind it."""
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
    if unit and any({_ALIASES.get(unit[1]) or unit[1].rstrip("s")} & measure for measure in _MEASURES):
        return f"{number} {unit[1]}"
    return number


def _last_math(text: str) -> str | None:
    found = re.findall(r"\$([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", text[-4000:])
    return next(filter(None, found[-1])).strip() if found else None


# ----------------------------------------------------------------------------------------------------------------------
# Text


def normalised(answer: str) -> str:
    r"""An answer's text without what does not change it, to compare letter by letter.

    >>> normalised(r"$\left( 3, 4 \right)$.") == normalised("(3,4)")
    True
    """
    answer = unwrap(answer)
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer)
    answer = re.sub(r"\\(?:%|\$)", lambda m: m[0][1], answer)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer).casefold()
