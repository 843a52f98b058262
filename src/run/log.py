"""The files of a run: config.json, metrics.jsonl and rollouts.jsonl."""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import torch

from src import console
from src.errors import InputError
from src.files import write_text

FILES = ("metrics.jsonl", "rollouts.jsonl")  # one line per step, one line per completion
VERSIONS_OF = ("torch", "transformers", "accelerate", "peft", "math-verify", "verl", "wandb", "datasets")


class RunLog:
    """The files of one run, locked by one process.

    Complete lines are written immediately, so a killed run keeps all its steps. If the disk refuses them,
    they stay in memory until the next attempt.

    Args:
        folder: From `choose_folder`, created here; or the folder of the run to resume.
        may_rename: Whether to choose a different folder name if another run has just taken this one.
        config: Contents of config.json, written here: "hyperparameters" and whatever else describes the run.
            None for a resumed run, which must call `continue_from` before it writes anything.
        writes: Whether this process writes the files. If not, nothing happens here.

    Raises:
        InputError: The folder cannot be written, or another process is writing to it.
    """

    def __init__(self, folder: Path, may_rename: bool, config: dict | None, writes: bool = True):
        self.folder, self.writes = folder, writes
        if not writes:
            return
        try:
            while config is not None and not _claim(self.folder):
                if not may_rename:
                    raise InputError(
                        f"--run-name {folder.name}: another run has just taken {folder}; choose another name"
                    )
                self.folder = self.folder.with_name(self.folder.name + "b")
            self._files = {name: (self.folder / name).open("ab", buffering=0) for name in FILES}
            self._lock()
            self._pending = dict.fromkeys(FILES, b"")
            self._sizes = {name: (self.folder / name).stat().st_size for name in FILES}
            if config is not None:
                self._write_config(config | environment())
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); choose a writable folder with --output"
            ) from None

    def continue_from(self, step: int, sizes: dict[str, int], changed: dict[str, list], config: dict) -> None:
        """Truncate the files to their sizes at a checkpoint, and record the resume in config.json.

        Args:
            step: Step of the checkpoint.
            sizes: File sizes at the checkpoint, from `sync`; empty if the run starts again from the
                beginning.
            changed: Old and new value of each hyperparameter that has changed.
            config: New values of entries of config.json.

        Raises:
            InputError: The files cannot be written.
        """
        if not self.writes:
            return
        try:
            for name, file in self._files.items():
                size = sizes.get(name, 0)
                if self._sizes[name] < size:
                    lost = size - self._sizes[name]
                    console.warn(f"{self.folder / name} has lost lines: {lost} of {size} bytes are missing")
                else:
                    file.truncate(size)
                    self._sizes[name] = size
            saved = json.loads((self.folder / "config.json").read_text())
            entry = {"step": step, "changed": changed, **environment()}
            self._write_config(saved | config | {"resumed": [*saved.get("resumed", []), entry]})
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}); its checkpoints are complete"
            ) from None

    def _write_config(self, config: dict) -> None:
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _lock(self) -> None:
        """Lock the folder until `close` or until the process ends, however it ends."""
        try:
            fcntl.flock(self._files["metrics.jsonl"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for file in self._files.values():
                file.close()
            raise InputError(
                f"{self.folder}: another process is writing to this run; stop it, or wait until it ends"
            ) from None
        except OSError:  # a file system without locks
            console.warn(f"{self.folder} cannot be locked here; make sure that no two processes write to it")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one step's metrics. Values that are not finite become null: JSON cannot express them."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("metrics.jsonl", [{"step": step, **finite}])

    def rollouts(self, rows: Iterable[dict]) -> None:
        """Append completions with each part of their reward."""
        self._append("rollouts.jsonl", rows)

    def sync(self) -> dict[str, int]:
        """Make sure that every line is on the disk.

        Returns:
            Size of each file in bytes.

        Raises:
            OSError: The disk refuses some lines.
        """
        for name, file in self._files.items():
            self._write(name)
            os.fsync(file.fileno())
        return dict(self._sizes)

    def close(self) -> None:
        """Close and unlock the files."""
        for name, file in self._files.items() if self.writes else ():
            with contextlib.suppress(OSError):  # the lines that still wait may be lost
                self._write(name)
            file.close()

    def _append(self, name: str, rows: Iterable[dict]) -> None:
        if not self.writes:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._pending[name] += lines.encode("utf-8", "replace")
        try:
            self._write(name)
        except OSError as error:
            console.warn(
                f"{self.folder / name} cannot be written ({error.strerror}); its lines wait in memory"
            )

    def _write(self, name: str) -> None:
        file, data, written = self._files[name], self._pending[name], 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(self._sizes[name])  # leave no partial line
            raise
        self._sizes[name] += written
        self._pending[name] = b""


def choose_folder(output: str, run_name: str | None) -> Path:
    """The folder that a new run will have, checked before anything loads. It is not created yet.

    Args:
        output: Folder of all runs.
        run_name: Name of this run's folder; if None, it is the date and time.

    Raises:
        InputError: The folder cannot be written, or it already holds a run.
    """
    name = run_name or datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, n = Path(output) / name, 1
    while run_name is None and folder.exists():  # two runs started in the same second
        n += 1
        folder = Path(output) / f"{name}-{n}"
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"--output {output}: {folder} cannot be written; choose a writable folder with --output"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"--run-name {name}: {folder} already holds a run, which is never overwritten; choose another "
            "name or move the folder"
        )
    return folder


def _claim(folder: Path) -> bool:
    """Create the folder of a run. Returns False if another run already has it."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return folder.is_dir() and not any(folder.iterdir())  # an empty one is free
    return True


def environment() -> dict:
    """The versions, the commit and the machine that a run uses, and the current time."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS_OF}},
        "git_commit": _git_commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "started": datetime.now().isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # git is not installed
        return None
    return git.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
