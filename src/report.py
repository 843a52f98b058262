"""What a run leaves on disk: config.json, metrics.jsonl, rollouts.jsonl."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from src.errors import InputError

VERSIONS_OF = ("torch", "transformers", "accelerate", "verl", "wandb", "peft", "datasets")


class RunLog:
    """The files of one run. Each line is written whole and at once, so that a killed run keeps all its steps.

    Args:
        folder: From `choose_folder`; made here.
        config: The resolved hyperparameters, for config.json.

    Raises:
        InputError: The folder cannot be written.
    """

    def __init__(self, folder: Path, config: dict):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}); give a folder of yours with --output") from None
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        about = {
            "hyperparameters": config,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS_OF}},
            "git_commit": git.stdout.strip() or None,
            "machine": platform.platform(),
            "started": datetime.now().isoformat(timespec="seconds"),
        }
        (self.folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one step's metrics, names as in the README's table."""
        self._append("metrics.jsonl", [{"step": step, **values}])

    def rollouts(self, rows: Iterable[dict]) -> None:
        """Append completions with each part of their reward."""
        self._append("rollouts.jsonl", rows)

    def _append(self, name: str, rows: Iterable[dict]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose_folder(output: str, run_name: str | None) -> Path:
    """The folder that a run will have, checked before anything loads; nothing is made yet.

    Args:
        output: Folder of all runs.
        run_name: Name of this run's folder; None takes the time of day.

    Raises:
        InputError: It cannot be written, or already holds a run.
    """
    name = run_name or datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, n = Path(output) / name, 1
    while run_name is None and folder.exists():  # two runs in one second
        n += 1
        folder = Path(output) / f"{name}-{n}"
    above = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--output {output}: {folder} cannot be written; give a folder of yours with --output")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"--run-name {name}: {folder} already holds a run, which is not overwritten; give another name or move the folder"
        )
    return folder
