"""What a resumed run takes from the one that it continues: its settings, unless they are given anew."""

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from src import console
from src.errors import InputError

FIXED = {  # what a resumed run cannot change, and why
    "output": "it goes on in its own folder",
    "run_name": "it goes on in its own folder",
    "seed": "the random generators go on from their saved states",
    "lora_rank": "what is trained would be other weights",
    "warmup_samples": "the bounds of the reward model's scores are saved",
}
MAY_DIFFER = {*FIXED, "resume", "keep_checkpoints"}
FILES = ("data", "eval_data")


def resumable(main: Callable[..., Path]) -> Callable[..., Path]:
    """With `resume`, let what is not given come from the run's config.json, whatever the defaults are by now."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Path:
        given = inspect.signature(main).bind(*args, **kwargs).arguments
        return main(**(resumed_settings(main, given) if given.get("resume") else given))

    return run


def named_flags(main: Callable, arguments: list[str]) -> set[str]:
    """The parameters of `main` that a command line names, whatever value it gives them."""
    flags = {re.sub(r"^--(no-)?", "", a.split("=")[0].replace("_", "-")).replace("-", "_") for a in arguments if a[:2] == "--"}
    return flags & set(inspect.signature(main).parameters)


def read_config(run_folder: Path) -> dict:
    """config.json of a run.

    Raises:
        InputError: There is none.
    """
    try:
        config = json.loads((run_folder / "config.json").read_text())
        assert isinstance(config["hyperparameters"], dict)
        return config
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"--resume {run_folder}: no run to continue, its config.json cannot be read ({reason}); "
            "give the folder of a run, or one step_<k> of it"
        ) from None


def resumed_settings(main: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a resumed run: the run's own, and those that are given now; a line says which those change.

    Raises:
        InputError: No run there, something given that cannot change, or a data file that has changed.
    """
    defaults = {name: p.default for name, p in inspect.signature(main).parameters.items()}
    path = Path(given["resume"])
    folder = path.parent if re.fullmatch(r"step_\d+", path.name) else path
    config = read_config(folder)
    saved = {name: value for name, value in config["hyperparameters"].items() if name in defaults}
    settings = defaults | saved | given
    for name, why in FIXED.items():
        if name in given and name in saved and given[name] != saved[name]:
            raise InputError(f"{_flag(name)} {given[name]}: cannot change in a resumed run (it has {saved[name]}): {why}")
    for name in FILES:
        if name not in given and _has_changed(config, name, settings[name]):
            raise InputError(
                f"{_flag(name)} {settings[name]}: has changed since the run read it; put the old file back, or name it again "
                f"({_flag(name)} {settings[name]}) to go on with it as it is"
            )
    console.configure(settings["quiet"])
    console.say(f"resuming {folder}: its config.json decides, not main()'s defaults")
    for name, (old, new) in changes(saved, settings).items():
        console.say(f"given anew: {name}={new} in place of {old}")
    return settings


def changes(saved: dict[str, Any], settings: dict[str, Any]) -> dict[str, list]:
    """Old and new value of every hyperparameter that a resumed run has otherwise than before."""
    return {k: [saved[k], v] for k, v in settings.items() if k in saved and k not in MAY_DIFFER and saved[k] != v}


def has_other_problems(config: dict, data: str) -> bool:
    """Whether `data` holds other problems than the run of a config.json had: by content, of a hub's data set by name."""
    changed = _has_changed(config, "data", data)
    return config["hyperparameters"]["data"] != data if changed is None else changed


def _has_changed(config: dict, name: str, path: str | None) -> bool | None:
    """Whether a data file is not what a run has read under that hyperparameter; None where either is no file."""
    before, now = config.get("data_sha256", {}).get(name), file_hash(path)
    return before != now if before and now else None


def file_hash(data: str | None) -> str | None:
    """SHA-256 of a data file; None where there is no such file, as for a data set of the hub."""
    return hashlib.sha256(Path(data).read_bytes()).hexdigest() if data and Path(data).is_file() else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def fingerprint(model: PreTrainedModel) -> str:
    """A hash by which a model is known again: names, shapes and 256 evenly spaced values of every parameter."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.flatten()[:: max(1, weight.numel() // 256)].detach().float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()
