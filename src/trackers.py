"""Experiment trackers, through accelerate: Weights & Biases, TensorBoard and trackio, each imported only where it is asked for.

They get the numbers of metrics.jsonl by the same names; that file stays the source of truth.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from src.console import say
from src.errors import InputError

INSTALL = {  # what to say where a tracker's package is missing
    "wandb": "pip install wandb==0.31.0",
    "tensorboard": "pip install tensorboard==2.21.0",
    "trackio": "pip install trackio==0.43.0",
}
PROJECT = "hybrid-grpo"  # where none is named


def chosen_trackers(tracker: Sequence[str] | None, wandb_project: str | None) -> list[str]:
    """Each of --tracker once, and wandb where --wandb-project is given.

    >>> chosen_trackers(["tensorboard", "wandb"], "project"), chosen_trackers(None, None)
    (['tensorboard', 'wandb'], [])
    """
    return list(dict.fromkeys([*(tracker or []), *(["wandb"] if wandb_project else [])]))


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker that is not installed, and a W&B run that would stop to ask for a login.

    Raises:
        InputError: There is one.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--tracker {name}: its package is not installed; run: {INSTALL[name]}")
    if "wandb" in names:
        import wandb

        settings = wandb.setup().settings
        if settings.mode not in ("offline", "disabled") and not wandb.api.api_key:
            raise InputError(
                "--tracker wandb: no W&B login on this machine; run `wandb login`, or set WANDB_MODE=offline to do without one"
            )


def start_trackers(
    accelerator: Accelerator, project: str | None, folder: Path, hyperparameters: dict, step: int, wandb_id: str | None
) -> str | None:
    """Begin to log to the trackers that the accelerator was made with, or go on where a resumed run left off.

    Args:
        project: W&B's and trackio's name for what belongs together.
        folder: Of the run, whose name is the run's there; TensorBoard's files go into its tensorboard/.
        step: That comes first: what TensorBoard has from there on, of a run that was broken off, it no longer shows.
        wandb_id: Of the W&B run to go on with; None begins one.

    Returns:
        The id of the W&B run, where there is one.
    """
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hyperparameters.items()}
    accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
    options = {
        "wandb": dict(name=folder.name, dir=str(folder), id=wandb_id, resume="allow" if wandb_id else None),
        "tensorboard": dict(purge_step=step or None),
        "trackio": dict(name=folder.name, resume="allow" if step else "never"),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # trackio's greeting is coloured, on a terminal or not
        accelerator.init_trackers(project or PROJECT, plain, options)
    names = [tracker.name for tracker in accelerator.trackers]
    if "tensorboard" in names:
        say(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
    if "trackio" in names:
        say(f"trackio: trackio show --project {project or PROJECT}")
    if not accelerator.is_main_process:
        return None
    return next((tracker.run.id for tracker in accelerator.trackers if tracker.name == "wandb"), None)


def log_completions(accelerator: Accelerator, rows: list[dict], step: int) -> None:
    """A step's completions with each part of their reward, as a table of W&B; the other trackers have no tables.

    Args:
        rows: From `run_log.rollout_rows`.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_table("completions", columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)
