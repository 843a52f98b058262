"""Experiment trackers, through accelerate: Weights & Biases, TensorBoard and trackio.

Each is imported only if requested. Trackers get the numbers of metrics.jsonl under the same names, but that
file remains the source of truth.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator

from src.console import say
from src.errors import InputError

INSTALL = {  # how to install a tracker's package
    "wandb": "pip install wandb==0.31.0",
    "tensorboard": "pip install tensorboard==2.21.0",
    "trackio": "pip install trackio==0.43.0",
}
PROJECT = "hybrid-grpo"  # the default project


def chosen_trackers(tracker: Sequence[str] | None, wandb_project: str | None) -> list[str]:
    """The values of --tracker without repetitions, and wandb if --wandb-project is given.

    >>> chosen_trackers(["tensorboard", "wandb"], "project"), chosen_trackers(None, None)
    (['tensorboard', 'wandb'], [])
    """
    return list(dict.fromkeys([*(tracker or []), *(["wandb"] if wandb_project else [])]))


def check_trackers(names: list[str]) -> None:
    """Reject a tracker that is not installed, and a W&B run that would stop to ask for a login.

    Raises:
        InputError: A tracker's package is missing, or W&B has no login.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--tracker {name}: its package is not installed; run: {INSTALL[name]}")
    if "wandb" in names:
        import wandb

        settings = wandb.setup().settings
        if settings.mode not in ("offline", "disabled") and not wandb.api.api_key:
            raise InputError(
                "--tracker wandb: there is no W&B login on this machine; run `wandb login`, or set "
                "WANDB_MODE=offline"
            )


def start_trackers(
    accelerator: Accelerator, args: SimpleNamespace, folder: Path, step: int, wandb_id: str | None
) -> str | None:
    """Start logging to the accelerator's trackers, or continue where a resumed run stopped.

    Args:
        args: main()'s parameters.
        folder: The run's folder. The trackers use its name for the run; TensorBoard's files go into its
            subfolder tensorboard/.
        step: First step that will be logged. TensorBoard hides this and later steps of an earlier attempt.
        wandb_id: Id of the W&B run to continue; if None, a new one starts.

    Returns:
        The id of the W&B run, if there is one.
    """
    if not accelerator.log_with:
        return wandb_id
    project = args.wandb_project or PROJECT
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in vars(args).items()}
    accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
    options = {
        "wandb": dict(name=folder.name, dir=str(folder), id=wandb_id, resume="allow" if wandb_id else None),
        "tensorboard": dict(purge_step=step or None),
        "trackio": dict(name=folder.name, resume="allow" if step else "never"),
    }
    # trackio prints a colored greeting, even without a terminal.
    with contextlib.redirect_stdout(io.StringIO()):
        accelerator.init_trackers(project, plain, options)
    names = [tracker.name for tracker in accelerator.trackers]
    if "tensorboard" in names:
        say(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
    if "trackio" in names:
        say(f"trackio: trackio show --project {project}")
    if not accelerator.is_main_process:
        return None
    return next((tracker.run.id for tracker in accelerator.trackers if tracker.name == "wandb"), None)


def log_completions(accelerator: Accelerator, rows: list[dict], step: int) -> None:
    """Log a step's completions and each part of their reward as a W&B table. Other trackers have no tables.

    Args:
        rows: From `metrics.rollout_rows`.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            data = [list(row.values()) for row in rows]
            tracker.log_table("completions", columns=list(rows[0]), data=data, step=step)
