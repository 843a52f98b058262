"""The rule verifier: is a completion's final answer right?

The final answer is, in this order: what the last complete `<answer>` holds, the last `\\boxed{}`, what follows the last
`####`, and (method "flexible" only) the last number. Answers are parsed, never evaluated.
"""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 200  # a longer "final answer" is not one

_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####([^\n]*)")
_NUMBER = re.compile(
    r"(?<![\w.])"  # not the tail of a word or of another number
    r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))"  # 1,234.5  12  .5
    r"(?:/\d+(?:\.\d+)?)?"  # 3/4
)
_LATEX_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{(-?\d+)\}\s*\{(-?\d+)\}")
_BRACES = re.compile(r"\\boxed\{|\{|\}")
_UNIT_AFTER = re.compile(r"(?<=\d)\s*(?:\\?%|[A-Za-z°][A-Za-z° .]*)$")  # "8 apples", "50 %"; no nested repeats: linear
_UNICODE_MINUS = str.maketrans({"−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-"})


def ground_truth_of(answer: str) -> str:
    """The answer that a data record stands for: what follows the last `####` of a GSM8K solution, else all of it.

    >>> ground_truth_of("She has 3 + 5 = 8 apples. #### 8")
    '8'
    """
    return answer.rsplit("####", 1)[-1].strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` of a text, braces matched.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    last = None  # (start, end) of the content
    open_braces: list[int | None] = []  # for each brace that is open: where its box's content starts, None for a plain one
    for match in _BRACES.finditer(text):  # one pass: looking for the end of each box in turn would be quadratic
        if match[0] != "}":
            open_braces.append(match.end() if match[0] != "{" else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    return text[slice(*last)] if last else None


def extract_answer(text: str, method: str) -> tuple[str | None, bool]:
    """The final answer in a text, and whether it was marked as such (`<answer>`, `\\boxed{}` or `####`).

    >>> extract_answer("I think 3 + 5 is <answer>8</answer>", "strict")
    ('8', True)
    >>> extract_answer("The answer is 1,000.", "flexible")
    ('1,000', False)
    >>> extract_answer("The answer is 1,000.", "strict")
    (None, False)
    """
    text = text.translate(_UNICODE_MINUS)
    tags = _ANSWER_TAG.findall(text)
    if tags:
        inside = tags[-1].strip()
        return (last_boxed(inside) or inside), True
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip(), True
    hashes = _HASHES.findall(text)
    if hashes and hashes[-1].strip():
        return hashes[-1].strip(), True
    if method == "flexible":
        numbers = [m for m in _NUMBER.findall(text) if any(c.isdigit() for c in m)]
        if numbers:
            return numbers[-1], False
    return None, False


def parse_number(answer: str) -> Fraction | None:
    r"""The exact value of an answer that is a number with nothing but a unit or marks around it, else None.

    >>> parse_number("$1,000.50"), parse_number(r"\frac{3}{4}"), parse_number("3 1/2"), parse_number("7 or 8")
    (Fraction(2001, 2), Fraction(3, 4), Fraction(7, 2), None)
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    answer = answer.translate(_UNICODE_MINUS)
    answer = _LATEX_FRACTION.sub(r"\g<1>\g<2>/\g<3>", answer.strip())
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer)
    answer = answer.replace("\\$", "").replace("\\!", "").replace("\\,", "").strip("$*`_ \n\t=")
    answer = _UNIT_AFTER.sub("", answer.rstrip(".,;:! ")).rstrip("$* ")
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer).replace("$", "")
    answer = re.sub(r"\s*/\s*", "/", re.sub(r"^([+-])\s+", r"\1", answer.strip()))
    match = re.fullmatch(r"([+-]?)(?:(\d+)\s+(?=\d+/))?(\d+\.?\d*|\.\d+)(?:/(\d+\.?\d*|\.\d+))?", answer)
    if match is None:
        return None
    sign, whole, numerator, denominator = match.groups()
    if denominator is not None and Fraction(denominator.rstrip(".")) == 0:
        return None
    value = Fraction(whole or 0) + Fraction(numerator.rstrip(".")) / Fraction((denominator or "1").rstrip("."))
    return -value if sign == "-" else value


def same_answer(answer: str, truth: str) -> bool:
    """Whether two final answers agree: as exact numbers where both are, else as text after verl's LaTeX normalisation."""
    a, b = parse_number(answer), parse_number(truth)
    if a is not None and b is not None:
        return a == b
    if answer.strip() == truth.strip():
        return bool(truth.strip())
    if a is not None or b is not None:
        return False  # a number against something that is none
    # Imported where it is used: importing verl takes 3 s and brings in Ray.
    from verl.utils.reward_score.math_reward import is_equiv

    return bool(truth.strip()) and is_equiv(answer, truth)


class MathVerifier:
    """Judges completions against the ground truth.

    Args:
        method: "strict" accepts a marked final answer only; "flexible" also takes the last number of unmarked text.
        correct_reward: What a right answer earns.
        format_reward: What a wrong answer earns that was marked as one.

    Raises:
        ValueError: `method` is neither of the two.
    """

    def __init__(self, method: str = "flexible", correct_reward: float = 1.0, format_reward: float = 0.0):
        if method not in ("flexible", "strict"):
            raise ValueError(f"method={method!r}: must be 'flexible' or 'strict'")
        self.method = method
        self.correct_reward = correct_reward
        self.format_reward = format_reward

    def prepare(self, ground_truths: list[str]) -> None:
        """Import what judging answers to these needs, so that a broken installation shows before training.

        Raises:
            ImportError: verl is missing, and an answer is not a number.
        """
        if any(parse_number(truth) is None for truth in ground_truths):
            import verl.utils.reward_score.math_reward  # noqa: F401

    def verify(self, prompt: str, response: str, ground_truth: str) -> dict:
        """Judge one completion.

        Args:
            prompt: The question. Not read today; part of the interface so that a check may use it.
            response: The completion.
            ground_truth: The right answer, or a solution that ends in `#### answer`.

        Returns:
            {"correct": bool, "reward": float, "parsed_answer": str | None}

        >>> MathVerifier().verify("What is 5 + 3?", "5 + 3 = 8.", "8")
        {'correct': True, 'reward': 1.0, 'parsed_answer': '8'}
        """
        answer, marked = extract_answer(response, self.method)
        if answer is not None and len(answer) > MAX_ANSWER_CHARS:
            answer, marked = None, False
        correct = answer is not None and same_answer(answer, ground_truth_of(ground_truth))
        reward = self.correct_reward if correct else self.format_reward if marked else 0.0
        return {"correct": correct, "reward": reward, "parsed_answer": answer}

    def verify_batch(self, prompts: list[str], responses: list[str], ground_truths: list[str]) -> list[dict]:
        """`verify` for each of three lists of one length, in order."""
        return [self.verify(p, r, g) for p, r, g in zip(prompts, responses, ground_truths, strict=True)]
