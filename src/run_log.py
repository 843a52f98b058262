"""What a run leaves on disk: config.json, metrics.jsonl, rollouts.jsonl, and how their lines are made."""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from src.errors import InputError
from src.math_verifier import Verdict
from src.sampler import Samples

FILES = ("metrics.jsonl", "rollouts.jsonl")  # one line a step, one line a completion
VERSIONS_OF = ("torch", "transformers", "accelerate", "peft", "math-verify", "verl", "wandb", "datasets")


class RunLog:
    """The files of one run, held by one process at a time.

    Lines are written whole and at once, so that a killed run keeps all its steps; where the disk does not take them, they wait
    in memory for the next attempt.

    Args:
        folder: From `choose_folder`, made here; of a run that is resumed, its own.
        may_rename: Take another name where a run has taken this one meanwhile.
        config: For config.json, which is written here: "hyperparameters" and what else there is to know. None where a run is
            resumed: `go_on` is then to be called before anything is written.
        writes: Whether it is this process that writes the files. Where it is another, nothing is done here.

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
                    raise InputError(f"--run-name {folder.name}: another run has just taken {folder}; give another name")
                self.folder = self.folder.with_name(self.folder.name + "b")
            self._files = {name: (self.folder / name).open("ab", buffering=0) for name in FILES}
            self._lock()
            self._pending = dict.fromkeys(FILES, b"")
            self._sizes = {name: (self.folder / name).stat().st_size for name in FILES}
            if config is not None:
                self._write_config(config | environment())
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}); give a folder of yours with --output") from None

    def go_on(self, step: int, sizes: dict[str, int], changed: dict[str, list], config: dict) -> None:
        """Cut the files to what they were at a checkpoint, and say in config.json that the run goes on from there.

        Args:
            step: Of the checkpoint.
            sizes: From `sync`, at the checkpoint; none where the run goes on from its beginning.
            changed: Old and new value of the hyperparameters that are not as before.
            config: What replaces its entries in config.json.

        Raises:
            InputError: The files cannot be written.
        """
        if not self.writes:
            return
        try:
            self._go_on(step, sizes, changed, config)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}); its checkpoints are whole") from None

    def _go_on(self, step: int, sizes: dict[str, int], changed: dict[str, list], config: dict) -> None:
        for name, file in self._files.items():
            size = sizes.get(name, 0)
            if self._sizes[name] < size:
                print(f"warning: {self.folder / name} has lost lines: {size - self._sizes[name]} of {size} bytes", flush=True)
            else:
                file.truncate(size)
                self._sizes[name] = size
        before = json.loads((self.folder / "config.json").read_text())
        entry = {"step": step, "changed": changed, **environment()}
        self._write_config(before | config | {"resumed": [*before.get("resumed", []), entry]})

    def _write_config(self, config: dict) -> None:
        aside = self.folder / ".config.json.partial"
        with aside.open("w") as file:
            file.write(json.dumps(config, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self.folder / "config.json")

    def _lock(self) -> None:
        """Hold the folder until `close` or the end of the process, however it ends."""
        try:
            fcntl.flock(self._files["metrics.jsonl"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for file in self._files.values():
                file.close()
            raise InputError(f"{self.folder}: another process is writing to this run; stop it, or wait for its end") from None
        except OSError:  # a file system without locks
            print(f"warning: {self.folder} cannot be locked here; see to it that no two processes write to it", flush=True)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one step's metrics, names as in docs/metrics.md; null for what is not finite, for which JSON has no word."""
        self._append("metrics.jsonl", [{"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}])

    def rollouts(self, rows: Iterable[dict]) -> None:
        """Append completions with each part of their reward."""
        self._append("rollouts.jsonl", rows)

    def sync(self) -> dict[str, int]:
        """See to it that every line is on the disk.

        Returns:
            Bytes of each file.

        Raises:
            OSError: The disk does not take them.
        """
        for name, file in self._files.items():
            self._write(name)
            os.fsync(file.fileno())
        return dict(self._sizes)

    def close(self) -> None:
        """Let go of the files."""
        for name, file in self._files.items() if self.writes else ():
            with contextlib.suppress(OSError):  # lines that still wait
                self._write(name)
            file.close()

    def _append(self, name: str, rows: Iterable[dict]) -> None:
        if not self.writes:
            return
        self._pending[name] += "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        try:
            self._write(name)
        except OSError as error:
            print(f"warning: {self.folder / name} cannot be written ({error.strerror}); its lines wait in memory", flush=True)

    def _write(self, name: str) -> None:
        file, data, written = self._files[name], self._pending[name], 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(self._sizes[name])  # no half of a line
            raise
        self._sizes[name] += written
        self._pending[name] = b""


def _claim(folder: Path) -> bool:
    """Make the folder of a run; False where another run has it."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return folder.is_dir() and not any(folder.iterdir())  # an empty one is as good as new
    return True


def environment() -> dict:
    """What a run is made with, and when."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS_OF}},
        "git_commit": _git_commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "started": datetime.now().isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None


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


@dataclass
class Scores:
    """Every part of the rewards of B completions; tensors are (B,) float32 on the CPU."""

    verdicts: list[Verdict]
    rule_rewards: torch.Tensor  # 1 = right, 0 = anything else
    rm_scores: torch.Tensor  # raw
    rm_clamped: torch.Tensor  # bool, the score was outside the warmup's bounds
    n: torch.Tensor  # the score's place between the bounds, from 0 to 1
    sigma_u: torch.Tensor  # std of the group's scores
    r_hat: torch.Tensor  # the verdict alone or n alone where reward_mode is not hybrid
    weights: torch.Tensor
    rewards: torch.Tensor  # weights * r_hat


def reward_metrics(scores: Scores, advantages: torch.Tensor, group_size: int) -> dict[str, float]:
    """The reward/... metrics; docs/metrics.md has a line on each."""
    groups = scores.rewards.view(-1, group_size)  # (Q, G)
    rules = scores.rule_rewards.view(-1, group_size)
    no_advantage = (advantages.view(-1, group_size) == 0).all(dim=1)  # (Q,)
    return {
        "reward/mean": groups.mean().item(),
        "reward/std": groups.std().item(),
        "reward/rule_mean": rules.mean().item(),
        "reward/rm_mean": scores.rm_scores.mean().item(),
        "reward/rm_std": scores.rm_scores.std().item(),
        "reward/rm_clamped_frac": scores.rm_clamped.float().mean().item(),
        "reward/r_hat_mean": scores.r_hat.mean().item(),
        "reward/weight_mean": scores.weights.mean().item(),
        "reward/sigma_u_mean": scores.sigma_u.mean().item(),
        "reward/zero_std_frac": no_advantage.float().mean().item(),
        "reward/all_right_frac": rules.all(dim=1).float().mean().item(),
        "reward/all_wrong_frac": (rules == 0).all(dim=1).float().mean().item(),
    }


def completion_metrics(samples: Samples, scores: Scores) -> dict[str, float]:
    """The completion/... metrics; lengths in tokens, stop token included."""
    lengths = torch.tensor([float(len(ids)) for ids in samples.completion_ids])
    finished = samples.finished.cpu()
    return {
        "completion/len_mean": lengths.mean().item(),
        "completion/len_max": lengths.max().item(),
        "completion/truncated_frac": 1 - finished.float().mean().item(),
        "completion/finished_rule_mean": scores.rule_rewards[finished].mean().item() if finished.any() else 0.0,
    }


def rollout_rows(
    step: int,
    questions: list[str],
    answers: list[str],
    completions: list[str],
    samples: Samples,
    scores: Scores,
    advantages: torch.Tensor,
) -> list[dict]:
    """One record per completion for rollouts.jsonl: the text and each part of its reward."""
    finished = samples.finished.tolist()
    parts = {
        name: getattr(scores, name).tolist()
        for name in ("rm_scores", "rm_clamped", "n", "sigma_u", "r_hat", "weights", "rewards")
    }
    return [
        {
            "step": step,
            "question": questions[i],
            "answer": answers[i],
            "completion": completions[i],
            "tokens": len(samples.completion_ids[i]),
            "finished": finished[i],
            "correct": scores.verdicts[i]["correct"],
            "parsed_answer": scores.verdicts[i]["parsed_answer"],
            "rm_score": parts["rm_scores"][i],
            "rm_clamped": parts["rm_clamped"][i],
            "n": parts["n"][i],
            "sigma_u": parts["sigma_u"][i],
            "r_hat": parts["r_hat"][i],
            "weight": parts["weights"][i],
            "reward": parts["rewards"][i],
            "advantage": advantages[i].item(),
        }
        for i in range(len(completions))
    ]
