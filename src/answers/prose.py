"""The answer of text without marks.

It is the value that the text calls the answer, else the last value that it states, else its last number.
final_answer.py calls `unmarked_answer` if marks.py finds nothing. statements.py reads each single statement.
"""

import re
from typing import NamedTuple

from src.answers.marks import ANSWER_TAG
from src.answers.numerals import NUMBER, NUMBER_WORDS, read_number, same_answer
from src.answers.statements import (
    ANSWER_IS,
    HEDGE,
    NOT_THE_VALUE,
    WRONG,
    first_sentence,
    is_ambiguous,
    lists_numbers,
    number_with_unit,
    statement_value,
)
from src.answers.text import TEXT_COMMAND, normalize_answer, strip_markup

_VALUE_IS_ANSWER = re.compile(  # 8 is the answer
    r"(?P<rest>[^\s,;:]{1,60})(?:\s[a-z]{1,20})?,?\s(?:is|was|would be)\s(?:(?!not\b|n't)[a-z]{1,12}\s){0,2}?"
    r"(?:final |correct |right |only |exact )?(?:answer|result|solution)\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:is|was)(?:\s?n't|\snot)\s(?:the |a |my )?(?:final |correct |right )?(?:answer|result|solution)\b",
    re.IGNORECASE,
)
_RECONSIDERATION = re.compile(
    r"\b(?:wait|actually|sorry|correction|mistake|recalculate|recompute)\b", re.IGNORECASE
)
_FILLERS = (
    r"(?:\s(?:a|the|an|total|sum|of|about|around|approximately|exactly|only|just|now|also|equal|to|indeed|"
    r"actually|therefore|simply|still|left|with|be|been|at|least|then|thus|all|together|altogether|us|you|"
    r"him|her|them|up|out|back|in|always|equivalent|worth|over|for|(?:an?|the)\s[a-z]{3,12}\sof|"
    r"(?-i:[A-Z][a-z]{1,15}))\b){0,5}"
)
_VERBS = (
    "is|are|was|were|been|equals?|gives?|gets|got|makes|made|leaves?|leaving|left|has|had|becomes?|"
    "totals?|remains?|costs?|pays|paid|earns?|earned|needs?|spends|spent|saves?|saved|receives?|received|"
    "eats?|ate|sells?|sold|takes?|took|owns?|contains?|produces?|weighs?|travels?|walks?|runs?|reads?|"
    "buys|bought|obtains?|finds?|yields?|yielding|giving|making|totall?ing|equall?ing|so|"
    "therefore|thus|hence|total"
)
_STATED = re.compile(
    r"(?:=|≈|->|→|\\approx|\\Rightarrow|(?<=[A-Za-z)])\*{0,2}:\*{0,2}|\b(?:pay|spend)\b|"
    r"(?<!\bto )\b(?:have|be|get|make|buy)\b|"
    r"\b(?:profit|loss|cost|price|value|amount|average|area|perimeter|speed|length) of\b|"
    rf"(?<!\bto )\b(?:{_VERBS}|comes? to|adds? up to|amounts? to|result(?:s|ing) in|"
    r"(?:in|de)creas(?:es|ed) by|(?:ends?|starts?|arrives?|leaves?|finish(?:es)?) at)\b[,:]?|"
    r"\b(?:it|that|there)'s\b)"
    + _FILLERS
    + r"\s{0,3}(?=(?P<rest>(?=[^a-zA-Z\n]{0,12}[\d\\])[^\n]{0,200}|"
    + rf"(?:(?:negative|minus) )?(?:{NUMBER_WORDS}|half|a half|a quarter)\b[^\n]{{0,60}}))",
    re.IGNORECASE,
)
_ASIDE = re.compile(  # the text from here on explains or checks the answer
    r"(?:^|[\n.!(])\s{0,3}(?:"
    r"(?:(?:now,? )?(?:to|let's|let us|we can|you can|i can|i will|i'll)[ ]+)(?:also )?"
    r"(?:check|verify|confirm|double[- ]check)|"
    r"check(?:ing)?\s*:|verification\b|double[- ]check|(?:this|it|that) is because\b|explanation\b|"
    r"here(?:'s| is) (?:why|how|the)\b|reason(?:ing)?:|note:|note that\b|by the way\b|remember\b|"
    r"in other words\b|fun fact\b)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"(?:^|[.!\n])[\s*]{0,3}(?:so|therefore|thus|hence|in total|in conclusion|finally)\b", re.IGNORECASE
)
_CONCLUDING_WORD = re.compile(r"\b(?:so|therefore|thus|hence)\b", re.IGNORECASE)
_HYPOTHETICAL = re.compile(r"^\W{0,4}(?:suppose|had)\b|\bif\b|\b(?:would|could|might)\b", re.IGNORECASE)
_REVERSED_EQUATION = re.compile(  # 8 = 5 + 3
    r"(?<![-+*/=×x][ ])(?<!\S)(\d[\d.,]{0,20}) ?= ?"
    r"(\d{1,20}(?: ?[-+*/×x] ?\d{1,20}){1,5})(?![\d]| ?[-+*/=×x])"
)
_PAIR = re.compile(r"\W{0,3}[\d.,]{1,20}(?:\s[a-z]{1,20}){0,2}\sand\s\W?\d")
_CONTINUATION = re.compile(
    r"=|\b(?:then|after|afterwards|now|next|finally|left|leaving|remain\w*|total\w*|altogether|so|answer|"
    r"result|must|need\w*)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(  # three or more words in brackets
    r"\((?:[^()\n\d=]{0,60}\b[A-Za-z]{2,}\b){3}[^()\n]{0,200}\)"
)
_COMPARISON = re.compile(
    rf"(?P<rest>{NUMBER_WORDS}|[-\d.,/]{{1,20}}) (?:is|was) (?:the )?"
    r"(?:larger|greater|bigger|higher|more|smaller|less|lower|fewer)\b",
    re.IGNORECASE,
)


def unmarked_answer(text: str, question: str) -> str | None:
    """The answer of text without marks, or None if there is none or the text leaves it open."""
    text = _without_asides(text, question)
    bare = _bare_answer(text)
    if bare:
        return bare
    value, rest = _named_answer(text, question)
    return value if rest is None else _last_stated_value(rest, question)


def _without_asides(text: str, question: str) -> str:
    """Remove what is not part of the answer.

    That is a repetition of the question, any other questions, explanations and checks after the answer,
    and remarks in brackets.
    """
    if question.rstrip().endswith(("?", ".")):
        text = text.replace(question.strip(), " ")
    text = re.sub(r"[^.!?\n]{0,400}\?(?=\s|$)", " ", ANSWER_TAG.sub(" ", text))
    text = TEXT_COMMAND.sub(r" \1 ", text)
    text = _REVERSED_EQUATION.sub(r"\2 = \1", text)
    first_number = NUMBER.search(text)
    if first_number is None or _bare_answer(text):
        return text
    aside = _ASIDE.search(text, first_number.end())
    if aside and not ANSWER_IS.search(text, aside.start()) and not _CONCLUSION.search(text, aside.start()):
        text = text[: aside.start() + 1]
    return text[: first_number.end()] + _REMARK.sub(" ", text[first_number.end() :])


def _named_answer(text: str, question: str) -> tuple[str | None, str | None]:
    """The value that the text calls the answer.

    Returns:
        (value, None); the value is None if the text leaves its answer open or retracts it.
        (None, text) if nothing is called the answer: the text to search for stated values.
    """
    named = [
        (m.end(), m["rest"], m["qualifier"])
        for m in ANSWER_IS.finditer(text)
        if m["word"].lower() == "answer" or _starts_with_value(m["rest"])
    ]
    named += [(m.end(), m["rest"], "") for m in _VALUE_IS_ANSWER.finditer(text) if read_number(m["rest"])]
    denied = max((m.end() for m in _DENIAL.finditer(text)), default=0)
    values: list[str | None] = []
    values_end = 0  # position after the last value
    for end, rest, qualifier in sorted(named):
        sentence = first_sentence(rest)
        if re.match(r"\s*(?:not|n't|wrong|incorrect)\b", sentence):
            denied = max(denied, end + len(sentence))
        elif not re.search(r"\b(?:not|n't|if|whether|check|wrong|incorrect)\b", qualifier, re.IGNORECASE):
            value = None if is_ambiguous(sentence) else statement_value(sentence, allow_text=True)
            if value or is_ambiguous(sentence):
                values.append(value)
                values_end = end
    if not values:
        return None, text[denied:]
    if len({normalize_answer(v or "") for v in values}) > 2:
        return None, None  # it tries one answer after another
    if denied > values_end:
        return _last_stated_value(text[denied:], question), None
    corrections = list(_RECONSIDERATION.finditer(text, values_end))
    if corrections and values[-1]:
        after = text[corrections[-1].end() :]
        restated = _last_stated_value(after, question)
        if restated and not same_answer(restated, values[-1]):
            return restated, None
        if restated is None and WRONG.search(after):
            return None, None
    return values[-1], None


def _starts_with_value(rest: str) -> bool:
    """Whether a text starts with a value: "the result is 8", but not "the result is essential to ..."."""
    return bool(re.match(rf"[^\d\n]{{0,25}}(?:[\d\\$]|{NUMBER_WORDS}\b)", rest, re.IGNORECASE))


def _bare_answer(text: str) -> str | None:
    """The text itself if it is nothing but an answer: a number, a ratio, or a formula without words."""
    text = text.strip().rstrip("!").strip()
    if not 0 < len(text) <= 100 or "\n" in text:
        return None
    if read_number(text) is not None or re.fullmatch(
        r"\W{0,3}\d{1,9}\s?:\s?\d{1,9}(?:\s?[AaPp]\.?[Mm]\.?)?\W{0,3}", text
    ):
        return text
    formula = not re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}|=|\bor\b", text) and re.search(r"\d|\\", text)
    return strip_markup(text) if formula else None


def _last_stated_value(text: str, question: str) -> str | None:
    """The value given for the question's own expression, else the last value stated, else the last number."""
    if re.search(r"\b(?:which|larger|greater|bigger|smaller|more|less)\b", question, re.IGNORECASE):
        compared = list(_COMPARISON.finditer(text))
        if compared:
            return compared[-1]["rest"].strip(".,")
    own = _values_of_expression(text, _question_expression(question))
    if own:
        return own[-1] or None if len({normalize_answer(v) for v in own}) <= 2 else None
    # Of two values joined by an approximation sign, the exact one counts.
    text = re.sub(r"(=\s{0,3}[^=\n≈]{1,40}?)\s{0,3}(?:≈|\\approx)\s{0,3}[-\d.,]+", r"\1", text)
    statements = _statements(text)
    maybe_another = r"\b(?:might|could|may) (?:also |possibly |rather )?be\b[^.\n]{0,20}\d"
    if len(statements) > 1 and re.search(maybe_another, text[-200:]):
        return None
    for statement in statements[:6]:
        sentence = first_sentence(statement.rest)
        if is_ambiguous(sentence):
            return None
        value = statement_value(sentence, number_first=True)
        if value:
            return value
    if HEDGE.search(text) and len({m[0] for m in NUMBER.finditer(text[-200:])}) == 2 and len(text) < 100:
        return None
    return _last_number(text)


class _Statement(NamedTuple):
    """A verb or an equals sign with a value after it."""

    factual: bool  # not conditional or hypothetical
    end: int  # position right after the verb
    rest: str  # the text after the verb
    clause: str  # the sentence up to and including the verb


def _statements(text: str) -> list[_Statement]:
    """The statements of a text, sorted so that the one that counts the most comes first.

    Hypothetical statements count only if there are no others. Among the rest, the last one counts the most,
    unless it only adds to a conclusion: "So she has 9 left. Her friend has 6."
    """
    statements = []
    for m in _STATED.finditer(text):
        of_a_pair = re.search(r"\b(?:sum|product|difference|quotient|total) of$", m[0].rstrip())
        if of_a_pair and _PAIR.match(m["rest"]):
            continue  # "which is the sum of 10 boys and 14 girls"
        # Search at most 300 characters of the sentence; otherwise the time is quadratic in the text.
        near = max(0, m.start() - 300)
        begins = max(text.rfind(". ", near, m.start()) + 1, text.rfind("\n", near, m.start()) + 1, near)
        clause = text[begins : m.end()]
        statements.append(_Statement(not _HYPOTHETICAL.search(clause), m.end(), m["rest"], clause))
    statements.sort(key=lambda s: (s.factual, s.end), reverse=True)
    conclusion = next((s for s in statements if s.factual and _CONCLUDING_WORD.search(s.clause)), None)
    if conclusion:
        sentence = first_sentence(conclusion.rest)
        if not _CONTINUATION.search(text[conclusion.end + len(sentence) :]):
            last = statement_value(first_sentence(statements[0].rest), number_first=True)
            if not (last and same_answer(last, statement_value(sentence, number_first=True) or "")):
                statements.insert(0, conclusion)
    return statements


def _last_number(text: str) -> str | None:
    """The last number of a text that states no value.

    If the text has no number either, this is its last formula, or the text itself if it has at most three
    words.
    """
    tail = text[-4000:]
    numbers = [
        m
        for m in NUMBER.finditer(tail)
        if not re.search(r"[\^_]\{?$|\d:$", tail[max(0, m.start() - 2) : m.start()])
        and not NOT_THE_VALUE.search(tail[max(0, m.start() - 20) : m.start()])
    ]
    if not numbers:
        return _last_formula(text) or (text.strip() if len(text.split()) <= 3 and len(text) <= 80 else None)
    return None if lists_numbers(text) else number_with_unit(tail, numbers[-1])


def _values_of_expression(text: str, expression: list[str]) -> list[str]:
    """Each value that a text gives for the question's expression; "" if a statement is ambiguous.

    Args:
        text: A completion without asides.
        expression: From `_question_expression`.
    """
    if not expression:
        return []
    pattern = r"\s{0,2}".join(_term_pattern(term) for term in expression)
    values = []
    for m in re.finditer(rf"(?<![\d.*/+^-])(?<![*/+-]\s){pattern}(?![\d/*^]|\s{{0,2}}[-+*/x×]\s?\d)", text):
        stated = re.match(
            r"[^\n.=\d]{0,40}?(?:=|\bis\b|\bequals?\b|\bgives\b)(?!\s*(?:not|n't)\b)(?P<rest>[^\n]{0,200})",
            text[m.end() : m.end() + 260],
            re.IGNORECASE,
        )
        if stated:
            sentence = first_sentence(stated["rest"])
            value = "" if is_ambiguous(sentence) else statement_value("=" + sentence)
            if value is not None:
                values.append(value)
    return values


def _term_pattern(term: str) -> str:
    """A regular expression for a term or an operator in the notations that models use."""
    return {
        "*": r"(?:\*|×|x|\\times|\\cdot|·|times|multiplied by)",
        "/": r"(?:/|\\div|divided by)",
        "-": "(?:-|minus)",
        "+": r"(?:\+|plus)",
    }.get(term, re.escape(term))


def _question_expression(question: str) -> list[str]:
    """Terms and operators of a question's arithmetic expression; [] unless there is exactly one.

    >>> _question_expression("What is 12 + 7 * 2?"), _question_expression("Tom has 4 apples and buys 9 more.")
    (['12', '+', '7', '*', '2'], [])
    """
    operators = {"divided by": "/", "multiplied by": "*", "times": "*", "plus": "+", "minus": "-"}
    for words, sign in operators.items():
        question = re.sub(rf"(?<=\d) {words} (?=\d)", f" {sign} ", question)
    found = re.findall(
        r"\d{1,15}(?:\.\d{1,15})?(?:\s?(?:[-+*/×x]|\\times|\\div)\s?\d{1,15}(?:\.\d{1,15})?){1,9}", question
    )
    if len(found) != 1:
        return []
    terms = re.findall(r"\d+(?:\.\d+)?|[-+*/×x]|\\times|\\div", found[0])
    return [{"×": "*", "x": "*", "\\times": "*", "\\div": "/"}.get(t, t) for t in terms]


def _last_formula(text: str) -> str | None:
    r"""The last formula between dollar signs, `\(...\)` or `\[...\]`."""
    found = re.findall(r"\$([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", text[-4000:])
    return next(filter(None, found[-1])).strip() if found else None
