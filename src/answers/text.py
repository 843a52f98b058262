r"""The characters and markup of an answer: many ways to write the same thing, reduced to one form.

This module knows characters, LaTeX commands and markdown, but not what they mean.
"""

import re
import unicodedata

MAX_ANSWER_CHARS = 300  # a longer text is not a final answer

_VULGAR_FRACTIONS = {  # "½": "1/2"
    chr(c): unicodedata.normalize("NFKC", chr(c)).replace("⁄", "/")
    for c in [*range(0xBC, 0xBF), *range(0x2150, 0x215F)]
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_REPLACEMENTS = {
    **{ord(c): "-" for c in "−–—﹣－‐‑‒"},
    **dict.fromkeys([0x00, 0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " "),
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
TEXT_COMMAND = re.compile(
    r"\\(?:text|textnormal|textrm|textsf|emph|mathrm|mathbf|textbf|mbox|operatorname|mathit|textit)"
    r"\s?\{([^{}]{0,200})\}"
)
_MARKUP = re.compile(r"\\[!,;: ]|\\left|\\right|\\displaystyle|\\(?=[$%#&_])|\*\*|__|`|\\\(|\\\)|\\\[|\\\]|~")


def normalize_characters(text: str) -> str:
    """Replace typographic minus signs, spaces, digits, fractions and exponents with plain ones.

    >>> normalize_characters("−½ m², １２")
    '-1/2 m^2, 12'
    """
    if text.isascii():
        return text.replace("\x00", " ")
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates can be neither printed nor piped
    text = re.sub(
        r"(\d?)([¼-¾⅐-⅞])",
        lambda m: (f"{m[1]} " if m[1] else "") + _VULGAR_FRACTIONS[m[2]],
        text,
    )
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: "^" + _braced(m[0].translate(_SUPERSCRIPTS)), text)
    text = text.translate(_REPLACEMENTS)
    if text.isascii():
        return text
    return "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)


def _braced(exponent: str) -> str:
    """An exponent as LaTeX needs it: in braces if it has several characters."""
    return exponent if len(exponent) == 1 else f"{{{exponent}}}"


def strip_markup(answer: str) -> str:
    r"""Strip what only decorates an answer.

    That is LaTeX commands for text and spacing, surrounding dollars or brackets, markdown and a final period.

    >>> strip_markup(r"$\text{8 apples}.$"), strip_markup("**8**.")
    ('8 apples', '8')
    """
    answer = TEXT_COMMAND.sub(r" \1 ", re.sub(r",\s{0,3}\\!\s{0,3}", ",", answer))
    answer = _MARKUP.sub("", answer).strip()
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


def normalize_answer(answer: str) -> str:
    r"""Reduce an answer to a form in which two spellings of the same text are equal strings.

    >>> normalize_answer(r"$\left( 3, 4 \right)$.") == normalize_answer("(3,4)")
    True
    """
    answer = strip_markup(answer)
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer)
    answer = re.sub(r"\\(?:%|\$)", lambda m: m[0][1], answer)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer).casefold()
