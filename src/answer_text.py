r"""The text of an answer: the many ways to type and to dress one thing made one.

The lowest of the modules that read answers (see answers.py): it knows characters and LaTeX commands, nothing of what they mean.
"""

import re
import unicodedata

MAX_ANSWER_CHARS = 300  # a longer "final answer" is not one

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
WRAPPERS = re.compile(
    r"\\(?:text|textnormal|textrm|textsf|emph|mathrm|mathbf|textbf|mbox|operatorname|mathit|textit)\s?\{([^{}]{0,200})\}"
)
_MARKUP = re.compile(r"\\[!,;: ]|\\left|\\right|\\displaystyle|\\(?=[$%#&_])|\*\*|__|`|\\\(|\\\)|\\\[|\\\]|~")


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


def unwrap(answer: str) -> str:
    r"""An answer without what only dresses it: LaTeX text and spacing commands, dollars around it, markdown, a full stop.

    >>> unwrap(r"$\text{8 apples}.$"), unwrap("**8**.")
    ('8 apples', '8')
    """
    answer = WRAPPERS.sub(r" \1 ", re.sub(r",\s{0,3}\\!\s{0,3}", ",", answer))
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


def normalised(answer: str) -> str:
    r"""An answer's text without what does not change it, to compare letter by letter.

    >>> normalised(r"$\left( 3, 4 \right)$.") == normalised("(3,4)")
    True
    """
    answer = unwrap(answer)
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer)
    answer = re.sub(r"\\(?:%|\$)", lambda m: m[0][1], answer)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer).casefold()
