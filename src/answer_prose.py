r"""The answer of text without marks: what it calls the answer, else what it states last, else its last number.

answers.py asks `unmarked_answer` where answer_marks.py finds nothing; each single statement is read by answer_statements.py.
"""

import re

from src.answer_marks import ANSWER_TAG
from src.answer_numbers import NUMBER, NUMBER_WORDS, alike, read_number
from src.answer_statements import (
    ANSWER_IS,
    HEDGE,
    NOT_IT,
    WRONG,
    first_sentence,
    is_list,
    statement_value,
    weighs_several,
    with_unit,
)
from src.answer_text import WRAPPERS, normalised, unwrap

_IS_ANSWER = re.compile(
    r"(?P<rest>[^\s,;:]{1,60})(?:\s[a-z]{1,20})?,?\s(?:is|was|would be)\s(?:(?!not\b|n't)[a-z]{1,12}\s){0,2}?"
    r"(?:final |correct |right |only |exact )?(?:answer|result|solution)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:is|was)(?:\s?n't|\snot)\s(?:the |a |my )?(?:final |correct |right )?(?:answer|result|solution)\b", re.IGNORECASE
)
_RECONSIDERED = re.compile(r"\b(?:wait|actually|sorry|correction|mistake|recalculate|recompute)\b", re.IGNORECASE)
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
_TURNED = re.compile(  # 8 = 5 + 3
    r"(?<![-+*/=×x][ ])(?<!\S)(\d[\d.,]{0,20}) ?= ?(\d{1,20}(?: ?[-+*/×x] ?\d{1,20}){1,5})(?![\d]| ?[-+*/=×x])"
)
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


def unmarked_answer(text: str, question: str) -> str | None:
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
    text = re.sub(r"[^.!?\n]{0,400}\?(?=\s|$)", " ", ANSWER_TAG.sub(" ", text))
    text = WRAPPERS.sub(r" \1 ", text)
    text = _TURNED.sub(r"\2 = \1", text)
    first_number = NUMBER.search(text)
    if first_number is None or _bare(text):
        return text
    aside = _ASIDE.search(text, first_number.end())
    if aside and not ANSWER_IS.search(text, aside.start()) and not _CONCLUSION.search(text, aside.start()):
        text = text[: aside.start() + 1]
    return text[: first_number.end()] + _REMARK.sub(" ", text[first_number.end() :])


def _called_the_answer(text: str, question: str) -> tuple[str | None, str | None]:
    """The value that is called the answer, and None; or None and the text in which to look for what is stated."""
    called = [
        (m.end(), m["rest"], m["what"]) for m in ANSWER_IS.finditer(text) if m["word"].lower() == "answer" or _soon(m["rest"])
    ]
    called += [(m.end(), m["rest"], "") for m in _IS_ANSWER.finditer(text) if read_number(m["rest"])]
    denied = max((m.end() for m in _DENIED.finditer(text)), default=0)
    values: list[str | None] = []
    place = 0  # behind the last of them
    for end, rest, what in sorted(called):
        sentence = first_sentence(rest)
        if re.match(r"\s*(?:not|n't|wrong|incorrect)\b", sentence):
            denied = max(denied, end + len(sentence))
        elif not re.search(r"\b(?:not|n't|if|whether|check|wrong|incorrect)\b", what, re.IGNORECASE):
            value = None if weighs_several(sentence) else statement_value(sentence, whole=True)
            if value or weighs_several(sentence):
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
        if restated and not alike(restated, values[-1]):
            return restated, None
        if restated is None and WRONG.search(after):
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
    own = _values_of_expression(text, _question_expression(question))
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
    if concluded and not _GOES_ON.search(text[concluded[1] + len(first_sentence(concluded[2])) :]):
        last = statement_value(first_sentence(stated[0][2]), first=True)
        if not (last and alike(last, statement_value(first_sentence(concluded[2]), first=True) or "")):
            stated.insert(0, concluded)
    if re.search(r"\b(?:might|could|may) (?:also |possibly |rather )?be\b[^.\n]{0,20}\d", text[-200:]) and len(stated) > 1:
        return None
    for _, _, rest, _ in stated[:6]:
        sentence = first_sentence(rest)
        if weighs_several(sentence):
            return None
        value = statement_value(sentence, first=True)
        if value:
            return value
    if HEDGE.search(text) and len({m[0] for m in NUMBER.finditer(text[-200:])}) == 2 and len(text) < 100:
        return None
    tail = text[-4000:]
    numbers = [m for m in NUMBER.finditer(tail) if not re.search(r"[\^_]\{?$|\d:$", tail[max(0, m.start() - 2) : m.start()])]
    numbers = [m for m in numbers if not NOT_IT.search(tail[max(0, m.start() - 20) : m.start()])]
    if numbers and not is_list(text):
        return with_unit(tail, numbers[-1])
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
            sentence = first_sentence(stated["rest"])
            value = "" if weighs_several(sentence) else statement_value("=" + sentence)
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


def _question_expression(question: str) -> list[str]:
    """Terms and signs of the one arithmetic expression of a question, none where it has no or several.

    >>> _question_expression("What is 12 + 7 * 2?"), _question_expression("Tom has 4 apples and buys 9 more.")
    (['12', '+', '7', '*', '2'], [])
    """
    for words, sign in (("divided by", "/"), ("multiplied by", "*"), ("times", "*"), ("plus", "+"), ("minus", "-")):
        question = re.sub(rf"(?<=\d) {words} (?=\d)", f" {sign} ", question)
    found = re.findall(r"\d{1,15}(?:\.\d{1,15})?(?:\s?(?:[-+*/×x]|\\times|\\div)\s?\d{1,15}(?:\.\d{1,15})?){1,9}", question)
    if len(found) != 1:
        return []
    terms = re.findall(r"\d+(?:\.\d+)?|[-+*/×x]|\\times|\\div", found[0])
    return [{"×": "*", "x": "*", "\\times": "*", "\\div": "/"}.get(t, t) for t in terms]


def _last_math(text: str) -> str | None:
    found = re.findall(r"\$([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", text[-4000:])
    return next(filter(None, found[-1])).strip() if found else None
