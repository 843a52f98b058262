"""Hundreds of generated bad settings and data files: each run ends with one message and writes nothing."""

import json
import math
import random
import re
import string
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from src.errors import InputError
from src.hyperparameters import choices_in
from tests.conftest import as_flags

CASES = 500
KINDS = ("number", "word", "combination", "line", "bytes", "path", "resume")


def bad_number(draw: random.Random) -> dict:
    """A hyperparameter outside of its range."""
    positive_integers = (
        "epochs", "train_batch_size", "micro_batch_size", "epochs_per_step", "rollouts_per_step",
        "group_size", "max_length", "warmup_samples", "checkpoint_interval", "max_steps", "max_new_tokens",
        "max_skipped_updates",
    )  # fmt: skip
    positive = ("lr", "max_norm", "eps", "temperature", "top_p", "clip_eps")
    not_negative = ("weight_decay", "kl_weight", "alpha", "beta", "w_min", "w_max", "k")
    not_negative_integers = ("keep_checkpoints", "lora_rank", "seed")
    name = draw.choice(positive_integers + positive + not_negative + not_negative_integers)
    if name in positive_integers or name in not_negative_integers:
        return {name: draw.choice([-1, -draw.randrange(1, 10**12)] + [0] * (name in positive_integers))}
    below = [-draw.random() - 1e-9, -1e300, math.nan, math.inf, -math.inf]
    return {name: draw.choice(below + [0.0] * (name in positive))}


def bad_word(draw: random.Random) -> dict:
    """A choice, a type or a flag that does not exist: only a command line can have these."""
    word = "".join(draw.choices(string.ascii_letters + string.digits + "é§ €", k=draw.randrange(1, 30)))
    name = draw.choice([
        "device", "dtype", "lr_schedule", "advantage_scale", "reward_mode", "reward_scorer", "rm_bounds",
        "lr", "group_size", "epochs", "max_steps", "top_p", "seed", "no_such_flag",
        "gradient_checkpointing_", "learning_rate",
    ])  # fmt: skip
    return {name: word + "x"}


def bad_combination(draw: random.Random) -> dict:
    """Values that are valid one by one, but not together or on this machine."""
    return draw.choice([
        dict(train_batch_size=draw.choice([3, 5, 7, 16, 1000])),
        dict(rollouts_per_step=draw.randrange(17, 10**6), train_batch_size=1),
        dict(eval_interval=draw.randrange(1, 100)),
        dict(max_length=draw.choice([2, 10, 30, 513, 10**9])),
        dict(w_min=draw.uniform(2.1, 10)),
        dict(reward_mode="rm"),
        dict(reward_model_device=draw.choice(["cuda", "offload"]), reward_model_name="embedded"),
        dict(device="mps" if sys.platform == "linux" else "cuda"),
        dict(seed=2**32 + draw.randrange(10**6)),
    ])  # fmt: skip


def bad_line(draw: random.Random) -> bytes:
    """A data file with one bad line."""
    lines = [json.dumps({"question": f"What is {i} + {i}?", "answer": str(2 * i)}) for i in range(1, 9)]
    bad = draw.choice([
        "{", "[]", "null", "3", '"text"', "{}", '{"question": "a"}', '{"answer": "1"}',
        '{"question": "", "answer": "1"}', '{"question": "a", "answer": ""}',
        '{"question": "a", "answer": []}', '{"question": {"a": 1}, "answer": "1"}',
        '{"question": "a", "answer": true}', '{"question": "a", "answer": "####"}',
        '{"question": "a", "answer": "\\\\frac{"}', '{"question": "a", "answer": "9^9^9^9"}',
        '{"question": "a", "answer": ' + "1" * 5000 + "}", "[" * 100_000,
        '{"question": "a", "answer": "' + "7" * 1000 + '"}',
        '{"question": "' + "long " * 200 + '", "answer": "1"}',
        lines[0][: draw.randrange(1, len(lines[0]) - 1)],
        "".join(draw.choices(string.printable.strip(), k=40)),
    ])  # fmt: skip
    lines.insert(draw.randrange(len(lines) + 1), bad)
    return "\n".join(lines).encode()


def bad_bytes(draw: random.Random) -> bytes:
    """A file that is not UTF-8 text or JSON, or is empty."""
    wide = '{"question": "a", "answer": "1"}'.encode("utf-16")
    return draw.choice([b"", b"\n\n \n", draw.randbytes(300), wide, b"\x00" * 50, b"PK\x03\x04"])


def bad_path(draw: random.Random, folder: Path) -> dict:
    """A path to nothing, or to the wrong kind of file."""
    (folder / "a-file").write_text("text")
    paths = ["nowhere", "", "a-file", "a-folder/x", "a\nb", "é" * 100, "x" * 300, "hf:", "hf:a:b:c:d", "."]
    path = draw.choice(paths)
    (folder / "a-folder").mkdir(exist_ok=True)
    name = draw.choice(["data", "eval_data", "model_name", "output"])
    if name == "output":
        return {"output": str(folder / "a-file" / "below")}
    if name == "model_name":
        return {name: str(folder / draw.choice(["nowhere", "a-file", "a-folder"]))}
    return {name: path if path.startswith("hf:") else str(folder / path)}


def bad_resume(draw: random.Random, folder: Path) -> dict:
    """A folder that is not a run, or a run that cannot be resumed."""
    run = folder / "broken-run"
    run.mkdir(exist_ok=True)
    configs = ["", "{", "[]", "3", '{"hyperparameters": 3}', '{"hyperparameters": {"data": "x"}}', "\x00"]
    (run / "config.json").write_text(draw.choice(configs))
    return dict(resume=str(draw.choice([run, run / "step_3", folder / "nowhere", folder, folder / "a-file"])))


@pytest.fixture
def case(tmp_path, tiny):
    """A function that returns the kind and the settings of a case, given its number."""

    def settings(number: int) -> tuple[str, dict]:
        draw, kind = random.Random(number), KINDS[number % len(KINDS)]
        data = tmp_path / "data.jsonl"
        if kind in ("line", "bytes"):
            data.write_bytes(bad_line(draw) if kind == "line" else bad_bytes(draw))
            return kind, tiny | {draw.choice(["data", "eval_data"]): str(data)}
        make = dict(number=bad_number, word=bad_word, combination=bad_combination).get(kind)
        change = make(draw) if make else dict(path=bad_path, resume=bad_resume)[kind](draw, tmp_path)
        return kind, (change if kind == "resume" else tiny | change)

    return settings


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_generated_bad_input_ends_with_one_message(case, tmp_path, monkeypatch, capfd):
    for number in range(CASES):
        kind, settings = case(number)
        before = snapshot(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *as_flags(settings)])
        with pytest.raises(SystemExit) as end:
            train.cli()
        out, err = capfd.readouterr()
        shown = f"case {number}, {kind}: {settings}\n{out}\n{err}"
        assert end.value.code == 2, shown
        assert "Traceback" not in out + err, shown
        message = (out + err).strip()
        assert message and message.count("\n") < 24, shown  # one screen at most
        assert max(map(len, message.splitlines())) < 2000, shown
        assert "\x1b" not in message, shown
        assert snapshot(tmp_path) == before, shown
        assert not Path(settings.get("output", tmp_path / "output")).exists(), shown


# ----------------------------------------------------------------------------------------------------------
# Values that only Python can pass

WRONG: dict[type, list] = {
    int: [True, 2.0, math.nan, "8", "", "none", np.int64(8), torch.tensor(3), [8], (8,), {}, 1 + 2j, b"8"],
    float: [False, "1e-5", "", "high", np.array([1]), torch.tensor(0.5), [0.5], {}, 1j, print],
    str: [3, 0.5, True, b"text", Path("folder"), ["text"], {}, object()],
    bool: [0, 1, "yes", "", "False", 0.0, [], np.True_],
}


def base_of(annotation) -> tuple[type, bool]:
    """The type of a parameter, for a choice str, and whether it may be None."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = parts[0]
    return (kind if kind in WRONG else str), type(None) in parts


def misspell(draw: random.Random, word: str) -> str:
    """A choice with another case, a letter too many or too few, or two letters exchanged."""
    i = draw.randrange(len(word))
    return draw.choice(
        [word.upper(), word.title(), word[:i] + word[i + 1 :], word[:i] + "x" + word[i:], word + " "]
    )


@pytest.mark.parametrize("number", range(300))
def test_a_value_of_the_wrong_type_or_a_misspelled_choice_is_one_message(tiny, monkeypatch, number):
    """Once, main(reward_mode="Hybrid") trained with another reward."""
    draw = random.Random(number)
    annotations = typing.get_type_hints(train.main)
    del annotations["return"]
    name = draw.choice(list(annotations))
    annotation = annotations[name]
    kind, may_be_none = base_of(annotation)
    choices = choices_in(annotation)
    if choices and draw.random() < 0.7:
        value = misspell(draw, draw.choice(choices))
        value = [value] if name == "tracker" else value
    else:
        wrong = WRONG[kind] if name != "tracker" else ["wandb", ("wandb",), [1], {}, 3]
        value = draw.choice(wrong + [None] * (not may_be_none))
    monkeypatch.setattr(train, "load_problems", lambda *_: pytest.fail("went on"))
    with pytest.raises(InputError) as error:
        train.main(**tiny | {name: value})
    message = str(error.value)
    assert message.startswith(f"--{name.replace('_', '-')} {value!r} ({type(value).__name__}): must be ")
    assert "; " in message and "\n" not in message
    assert not Path(tiny["output"]).exists()


def test_the_way_out_of_a_misspelled_choice_is_the_choice_itself():
    for given, meant in (
        (dict(reward_mode="Hybrid"), "did you mean 'hybrid'?"),
        (dict(reward_scorer="sigmod"), "did you mean 'sigmoid'?"),
        (dict(tracker="tensorboard"), "did you mean ['tensorboard']?"),
        (dict(lr="1e-5"), "must be a number; for example 5e-06"),
        (dict(max_steps=2.0), "must be an integer, or None; None is the default"),
        (dict(rm_bounds="none"), "must be 'warmup' or 'group'; for example 'warmup'"),
        (dict(advantage_scale="max"), "must be 'batch', 'group' or 'none'; for example 'batch'"),
    ):
        with pytest.raises(InputError, match=re.escape(meant)):
            train.main(**given)
