"""Problems: read from a file or the hub, checked, and rendered as prompts in the policy's chat template."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from src.console import phase
from src.errors import InputError, first_line
from src.math_verifier import MathVerifier, ground_truth_of
from src.models import conversation


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the ground truth; for a GSM8K solution, the part after ####
    source: str  # where the problem was read from, for messages
    prompt_ids: tuple[int, ...] = ()  # the question in the policy's chat template; from `with_prompts`


def load_problems(args: SimpleNamespace, verifier: MathVerifier) -> tuple[list[Problem], list[Problem]]:
    """Read and check the problems to train on, and the held-out ones.

    Args:
        args: main()'s parameters. With --eval-only there are no problems to train on, and without --eval-data
            no held-out ones.
        verifier: Must be able to read every answer.

    Raises:
        InputError: A file cannot be read, an answer cannot be compared, or there are too few problems for a
            step.
    """
    problems = [] if args.eval_only else read_problems(args.data, "--data")
    eval_problems = read_problems(args.eval_data, "--eval-data") if args.eval_data else []
    if len(problems) < args.rollouts_per_step and not args.eval_only:
        raise InputError(
            f"--data {args.data}: {len(problems)} problems, but --rollouts-per-step is "
            f"{args.rollouts_per_step}; add problems or lower --rollouts-per-step"
        )
    check_answers(verifier, problems + eval_problems)
    return problems, eval_problems


def read_problems(data: str, flag: str) -> list[Problem]:
    """Read problems from a JSONL file or, with hf:NAME[:CONFIG[:SPLIT]], from the Hugging Face hub.

    Raises:
        InputError: There is no such file or data set, a line is not a JSON object, a record lacks its
            question or answer, or there are no records.
    """
    if data.startswith("hf:"):
        records = [(f"{data}, row {i}", row) for i, row in enumerate(_load_hub_data(data, flag), start=1)]
    else:
        records = read_records(find_file(data), ("question", "answer"), flag)
    problems = []
    for source, record in records:
        question, answer = _texts(record, ("question", "answer"), source)
        truth = ground_truth_of(answer)
        if not truth:
            raise InputError(f"{source}: nothing follows the #### of the answer; put the final answer there")
        problems.append(Problem(question, truth, source))
    if not problems:
        raise InputError(
            f"{flag} {data}: it contains no problems; add at least one {{'question', 'answer'}} record"
        )
    return problems


def read_records(
    file: Path, keys: tuple[str, str], flag: str, allow_blank: bool = False
) -> list[tuple[str, dict]]:
    """Read the records of a JSONL file, each with its file and line, and check the values of two keys.

    Args:
        keys: The keys that must have text or numbers.
        allow_blank: Accept blank text, such as an empty completion.

    Raises:
        InputError: The file cannot be read, a line is not JSON, or a record lacks text or a number for a key.
    """
    form = f"{{{keys[0]!r}, {keys[1]!r}}}"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{flag} {file}: cannot be read ({reason}); pass a JSONL file of {form} records"
        ) from None
    if text.lstrip().startswith("[{"):
        raise InputError(f"{flag} {file}: it is a JSON array; write each {form} object on a line of its own")
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings can have U+2028
        if not line.strip():
            continue
        source = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or too many digits or brackets
            raise InputError(f"{source}: not JSON ({error}); each line must be one {form} object") from None
        _texts(record, keys, source, allow_blank)
        records.append((source, record))
    return records


def _texts(record: object, keys: tuple[str, str], source: str, allow_blank: bool = False) -> list[str]:
    """The values of two keys of a record, as text."""
    values = [record.get(key) if isinstance(record, dict) else None for key in keys]
    for key, value in zip(keys, values, strict=True):
        invalid = isinstance(value, bool) or not isinstance(value, str | int | float)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{source}: {key!r} is {value}, which no answer can equal; give a finite number")
        if isinstance(value, str) and not is_text(value):
            raise InputError(
                f"{source}: {key!r} has half of a character ({value[:80]!a}), which cannot be encoded; "
                "remove it, or write the whole character"
            )
        if invalid or not (allow_blank or str(value).strip()):
            present = f"; this one has {', '.join(map(repr, record))}" if isinstance(record, dict) else ""
            raise InputError(
                f"{source}: no {key!r}; each record must have {' and '.join(map(repr, keys))}, both text or "
                f"numbers{present}"
            )
    return list(map(str, values))


def is_text(value: str) -> bool:
    """Whether a string can be encoded: it has no lone surrogates, such as half of an emoji's escape."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_file(name: str) -> Path:
    """A data file: as named, or, if it is not there, in the repository, so that any folder will do."""
    in_repository = Path(__file__).parent.parent / name
    return in_repository if not os.path.exists(name) and os.path.isfile(in_repository) else Path(name)


def _load_hub_data(data: str, flag: str) -> list[dict]:
    """Rows of hf:NAME[:CONFIG[:SPLIT]]. SPLIT defaults to train, and CONFIG to main if there are several."""
    import datasets

    parts = data.removeprefix("hf:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise InputError(
            f"{flag} {data}: must be hf:NAME[:CONFIG[:SPLIT]], for example hf:openai/gsm8k:main:train"
        )
    name, config, split = parts + [""] * (3 - len(parts))
    try:
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train")
        except ValueError as error:
            if config or "Config name is missing" not in str(error):
                raise
            rows = datasets.load_dataset(name, "main", split=split or "train")
    except Exception as error:  # datasets raises whatever its storage backend raises
        raise InputError(
            f"{flag} {data}: could not be loaded ({type(error).__name__}: {error}); check the name and the "
            "network, or pass a JSONL file"
        ) from None
    return list(rows)


@phase("check the answers")
def check_answers(verifier: MathVerifier, problems: list[Problem]) -> None:
    """Reject problems whose answers no completion could ever equal.

    Raises:
        InputError: An answer cannot be read; the message names the first one.
    """
    reasons = verifier.prepare([p.answer for p in problems])
    for problem, reason in zip(problems, reasons, strict=True):
        if reason:
            raise InputError(
                f"{problem.source}: its answer {problem.answer[:80]!r} cannot be compared: {reason}"
            )


@phase("render the prompts")
def with_prompts(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, max_length: int
) -> list[Problem]:
    """Add prompts to problems: each question rendered in the policy's chat template.

    Raises:
        InputError: The template rejects the conversation, or a prompt leaves no room for a completion.
    """
    if system_prompt and not is_text(system_prompt):
        raise InputError(f"--system-prompt {system_prompt!a}: has half of a character; remove it")
    prompted = []
    for problem in problems:
        messages = conversation(problem.question, system_prompt)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template made elsewhere can raise anything
            way_out = "leave --system-prompt out" if system_prompt else "set another one with --model-name"
            raise InputError(
                f"the model's chat template rejects the conversation ({first_line(error)}); {way_out}"
            ) from None
        if not str(text).strip():
            raise InputError(
                f"{problem.source}: the model's chat template renders this question as nothing; use another "
                "model, or set tokenizer.chat_template and save the tokenizer with save_pretrained"
            )
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template already added special tokens
        if len(ids) >= max_length:
            raise InputError(
                f"{problem.source}: the prompt has {len(ids)} tokens, which leaves no room within "
                f"--max-length {max_length}; raise the limit or remove the problem"
            )
        prompted.append(replace(problem, prompt_ids=tuple(ids)))
    return prompted
