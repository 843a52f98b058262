"""Open a run: create a new one, or resume one with its own settings, data and models."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from src import console, parallel
from src.errors import InputError
from src.run.checkpoint import (
    Checkpoints,
    Progress,
    TrainingState,
    find_checkpoint,
    read_progress,
    run_of,
    set_aside_later,
)
from src.run.log import RunLog, choose_folder

FIXED = {  # parameters that a resumed run cannot change, and why
    "output": "the run continues in its own folder",
    "run_name": "the run continues in its own folder",
    "seed": "the random generators continue from their saved states",
    "lora_rank": "different weights would be trained",
    "warmup_samples": "the bounds of the reward model's scores are already saved",
}
MAY_DIFFER = {*FIXED, "resume", "keep_checkpoints"}
DATA_FILES = ("data", "eval_data")


# ----------------------------------------------------------------------------------------------------------
# Settings of a resumed run


def defaults_of(main: Callable) -> dict[str, Any]:
    """The default of each of main()'s parameters."""
    return {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}


def named_flags(main: Callable, arguments: list[str]) -> set[str]:
    """The parameters of main() that a command line names, whatever value it gives them."""
    names = (argument.split("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--"))
    return {re.sub(r"^--(no-)?", "", name).replace("-", "_") for name in names} & defaults_of(main).keys()


def read_config(run_folder: Path) -> dict:
    """Read a run's config.json.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        config = json.loads((run_folder / "config.json").read_text())
        assert isinstance(config["hyperparameters"], dict)
        return config
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"--resume {run_folder}: there is no run to resume, because config.json cannot be read "
            f"({reason}); pass the folder of a run, or one step_<k> in it"
        ) from None


def resumed_settings(main: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a resumed run: the saved ones, updated with those given now. Prints the changes.

    Raises:
        InputError: There is no run, a given parameter cannot change, or a data file has changed.
    """
    defaults = defaults_of(main)
    folder = run_of(Path(given["resume"]))
    config = read_config(folder)
    saved = {name: value for name, value in config["hyperparameters"].items() if name in defaults}
    settings = defaults | saved | given
    for name, why in FIXED.items():
        if name in given and name in saved and given[name] != saved[name]:
            raise InputError(
                f"{_flag(name)} {given[name]}: cannot change in a resumed run, which has {saved[name]}: {why}"
            )
    for name in DATA_FILES:
        if name not in given and _has_changed(config, name, settings[name]):
            raise InputError(
                f"{_flag(name)} {settings[name]}: has changed since the run read it; restore the old file, "
                f"or pass the flag again ({_flag(name)} {settings[name]}) to continue with the new one"
            )
    console.configure(settings["quiet"])
    console.say(f"resuming {folder} with the settings in its config.json, not main()'s defaults")
    for name, (old, new) in changes(saved, settings).items():
        console.say(f"changed: {name}={new} instead of {old}")
    return settings


def changes(saved: dict[str, Any], settings: dict[str, Any]) -> dict[str, list]:
    """Old and new value of every hyperparameter that a resumed run changes."""
    return {
        k: [saved[k], v] for k, v in settings.items() if k in saved and k not in MAY_DIFFER and saved[k] != v
    }


def has_other_problems(config: dict, data: str) -> bool:
    """Whether `data` differs from the problems of a run's config.json.

    Files are compared by content, and data sets on the hub by name.
    """
    changed = _has_changed(config, "data", data)
    return config["hyperparameters"]["data"] != data if changed is None else changed


def _has_changed(config: dict, name: str, path: str | None) -> bool | None:
    """Whether a data file differs from the one that the run read; None if either is not a file."""
    saved, current = config.get("data_sha256", {}).get(name), _file_hash(path)
    return saved != current if saved and current else None


def _file_hash(data: str | None) -> str | None:
    """SHA-256 of a data file; None if there is no such file, as for a data set on the hub."""
    return hashlib.sha256(Path(data).read_bytes()).hexdigest() if data and Path(data).is_file() else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def say_settings(main: Callable, args: SimpleNamespace, folder: Path, problems: int) -> None:
    """Print the settings that differ from main()'s defaults, and the number of problems."""
    defaults = defaults_of(main)
    others = ", ".join(f"{name}={value}" for name, value in vars(args).items() if value != defaults[name])
    console.say(f"settings other than the defaults: {others or 'none'}; all in {folder / 'config.json'}")
    console.say(f"found {problems} matching prompts")


# ----------------------------------------------------------------------------------------------------------
# Opening


def locate_run(args: SimpleNamespace) -> tuple[Path, Path | None]:
    """The folder of the run, and the checkpoint to resume from, if any. Nothing is written yet.

    Raises:
        InputError: The folder cannot be used, or there is no undamaged checkpoint.
    """
    if args.resume:
        return parallel.from_first(lambda: find_checkpoint(Path(args.resume)))
    return parallel.from_first(lambda: (choose_folder(args.output, args.run_name), None))


def open_run(
    args: SimpleNamespace,
    resolved: dict[str, Any],
    folder: Path,
    checkpoint: Path | None,
    state: TrainingState,
    fresh: Progress,
) -> tuple[RunLog, Checkpoints, Progress]:
    """Create a run's folder and lock it, or resume the run from a checkpoint.

    Args:
        args: main()'s parameters.
        resolved: Further entries for config.json's "hyperparameters", including total_steps.
        folder, checkpoint: From `locate_run`.
        state: What a checkpoint restores.
        fresh: The progress of a new run, with the current problems and models.

    Raises:
        InputError: The folder cannot be written, or the run cannot continue with these models, problems or
            settings.
    """
    config = {
        "hyperparameters": vars(args) | resolved,
        "data_sha256": {name: _file_hash(getattr(args, name)) for name in DATA_FILES},
    }
    if not args.resume:
        log = _open_log(folder, args.run_name is None, config)
        return log, Checkpoints(log, state, args.keep_checkpoints), fresh
    saved = read_config(folder)
    changed = changes(saved["hyperparameters"], vars(args))
    other_problems = has_other_problems(saved, args.data)
    _say_other_threads(saved, resolved["run_device"])
    if checkpoint:
        check_resumed(
            read_progress(checkpoint), fresh, changed, other_problems, resolved["total_steps"], args.resume
        )
    log = _open_log(folder, False, None)
    checkpoints, progress = Checkpoints(log, state, args.keep_checkpoints), fresh
    if checkpoint:
        with console.phase("load the checkpoint"):
            progress = checkpoints.load(checkpoint)
        progress.adapt(fresh, other_problems)
        if progress.skipped_in_a_row >= args.max_skipped_updates:
            progress.skipped_in_a_row = 0  # the run had given up: reset the counter
    set_aside_later(log, progress.step)
    log.continue_from(progress.step, progress.written, changed, config)
    console.say(f"resuming from {checkpoint or 'the beginning: the run has no checkpoint yet'}")
    return log, checkpoints, progress


def _say_other_threads(saved: dict, device: str) -> None:
    """Say if a run on a CPU now has another number of threads: its results then differ in rounding."""
    before, now = saved.get("threads"), torch.get_num_threads()
    if device == "cpu" and before not in (None, now):
        console.say(
            f"threads: {now} instead of {before}, so the results differ in rounding from those of an "
            f"uninterrupted run; OMP_NUM_THREADS={before} restores them"
        )


def _open_log(folder: Path, may_rename: bool, config: dict | None) -> RunLog:
    """Open the run's files. Only the first process writes them, but all processes know the folder."""
    log = RunLog(folder, may_rename, config, writes=parallel.rank() == 0)
    log.folder = parallel.from_first(lambda: log.folder)
    return log


def check_resumed(
    saved: Progress,
    current: Progress,
    changed: dict[str, list],
    other_problems: bool,
    total_steps: int,
    resume: str,
) -> None:
    """Refuse to resume if the models or the number of problems changed, unless they were passed explicitly.

    The contents of data files have already been compared, in `resumed_settings`.

    Args:
        saved: The progress in the checkpoint.
        current: The progress that a new run would start with now.
        changed: Hyperparameters that have changed.
        other_problems: Whether the data has changed and was passed explicitly.
        total_steps: The run's total number of steps under its current settings.
        resume: The value of --resume.

    Raises:
        InputError: The run cannot continue with the current models, problems or number of steps.
    """
    if total_steps < saved.step:
        raise InputError(
            f"--resume {resume}: the run has done {saved.step} steps, but is now limited to {total_steps}; "
            "raise --max-steps or --epochs"
        )
    if saved.model != current.model and "model_name" not in changed:
        raise InputError(f"--resume {resume}: the model has changed since the run began; restore the old one")
    if saved.problems != current.problems and not other_problems:  # a data set on the hub
        raise InputError(
            f"--resume {resume}: the data set now has {current.problems} problems instead of "
            f"{saved.problems}; save the old problems to a file and pass it with --data"
        )
    rendered_otherwise = {"model_name", "system_prompt", "max_length"} & set(changed)
    if saved.prompts not in ("", current.prompts) and not (other_problems or rendered_otherwise):
        raise InputError(
            f"--resume {resume}: the problems are the same, but their prompts have changed since the run "
            "began: the chat template was edited, or it contains the date; restore it, or start a new run "
            "from the weights, with --model-name and a step_<k> folder"
        )
    if saved.reward_model != current.reward_model and not {"reward_model_name", "reward_mode"} & set(changed):
        raise InputError(
            f"--resume {resume}: the run had the reward model {saved.reward_model or 'none'} and would "
            f"continue with {current.reward_model or 'none'}; see the reason above, or pass another "
            "one with --reward-model-name"
        )
