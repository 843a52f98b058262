"""Problems: read from a file or the hub, checked, and put into the policy's chat template."""

import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from src.errors import InputError
from src.math_verifier import MathVerifier, ground_truth_of


@dataclass
class Problem:
    question: str
    answer: str  # the ground truth; a GSM8K solution is reduced to what follows its ####
    source: str  # where it stands, for messages


def texts_of(problems: list[Problem]) -> tuple[list[str], list[str]]:
    """Their questions, and their answers."""
    return [p.question for p in problems], [p.answer for p in problems]


def read_prompts(data: str, flag: str) -> list[Problem]:
    """Read problems from a JSONL file or, as hf:NAME[:CONFIG[:SPLIT]], a data set of the Hugging Face hub.

    Raises:
        InputError: No such file or data set, a line that is not a JSON object, a record without question or answer, no
            record at all.
    """
    if data.startswith("hf:"):
        records = [(f"{data}, row {i}", row) for i, row in enumerate(load_hub_data(data, flag), start=1)]
    else:
        try:
            lines = Path(data).read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON strings may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{flag} {data}: cannot be read ({reason}); give a JSONL file of {{'question', 'answer'}} records"
            ) from None
        records = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    records.append((f"{data}, line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:  # not JSON, or more digits or brackets than Python reads
                    raise InputError(
                        f"{data}, line {number}: not JSON ({error}); each line must be one {{'question', 'answer'}} object"
                    ) from None
    problems = []
    for source, record in records:
        values = [record.get(key) if isinstance(record, dict) else None for key in ("question", "answer")]
        for key, value in zip(("question", "answer"), values, strict=True):
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
                raise InputError(f"{source}: no {key!r}; each record must have a question and an answer, both text or numbers")
        truth = ground_truth_of(str(values[1]))
        if not truth:
            raise InputError(f"{source}: nothing follows the #### of the answer; put the final answer behind it")
        problems.append(Problem(str(values[0]), truth, source))
    if not problems:
        raise InputError(f"{flag} {data}: no problems in it; it must have at least one {{'question', 'answer'}} record")
    return problems


def check_answers(verifier: MathVerifier, problems: list[Problem]) -> None:
    """Refuse problems whose answer no completion could ever equal.

    Raises:
        InputError: There is one.
    """
    reasons = verifier.prepare([p.answer for p in problems])
    for problem, reason in zip(problems, reasons, strict=True):
        if reason:
            raise InputError(f"{problem.source}: its answer {problem.answer[:80]!r} cannot be compared with any: {reason}")


def load_hub_data(data: str, flag: str) -> list[dict]:
    """Rows of hf:NAME[:CONFIG[:SPLIT]]; the config named "main" where there are several and none is given; split train."""
    import datasets

    parts = data.removeprefix("hf:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise InputError(f"{flag} {data}: must be hf:NAME[:CONFIG[:SPLIT]], for example hf:openai/gsm8k:main:train")
    name, config, split = parts + [""] * (3 - len(parts))
    try:
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train")
        except ValueError as error:
            if config or "Config name is missing" not in str(error):
                raise
            rows = datasets.load_dataset(name, "main", split=split or "train")
    except Exception as error:  # datasets raises whatever its storage backend of the day raises
        raise InputError(
            f"{flag} {data}: could not be loaded ({type(error).__name__}: {error}); check the name and the network, "
            "or give a JSONL file"
        ) from None
    return list(rows)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], system_prompt: str | None, max_length: int
) -> list[list[int]]:
    """Token ids of each question in the policy's chat template, ready for its answer.

    Raises:
        InputError: A prompt leaves no room for a completion.
    """
    head = [{"role": "system", "content": system_prompt}] if system_prompt else []
    encoded = []
    for problem in problems:
        messages = [*head, {"role": "user", "content": problem.question}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the conversation ({error}); leave --system-prompt out") from None
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written the special tokens
        if len(ids) >= max_length:
            raise InputError(
                f"{problem.source}: the prompt has {len(ids)} tokens, which leaves no room within --max-length {max_length}; "
                "raise it or remove the problem"
            )
        encoded.append(ids)
    return encoded
