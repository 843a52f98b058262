"""Checkpoints: folders that any tool of the Hugging Face family loads as they are, and from which a run goes on exactly.

    step_<k>/                    weights and tokenizer, or the LoRA adapter
    step_<k>/training_state/     weights.safetensors, exp_avg.safetensors, ...: what is trained, in float32, and AdamW's moments
                                 randomness.safetensors: the state of every random generator
                                 state.json: `Progress`
                                 complete.json: size and SHA-256 of every file of the checkpoint; written last

A checkpoint is written aside, synced to the disk and renamed, so that it is whole whenever it is there. Nothing in it is
pickled, and nothing of it is run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import InputError
from src.hybrid_reward import RunningMean

if TYPE_CHECKING:
    from peft import PeftModel

    from src.master_weights import MasterWeights
    from src.run_log import RunLog

RESUMABLE = 2  # checkpoints that keep their training state: the newest, and the one before in case it gets damaged


@dataclass
class Progress:
    """What one step hands to the next, besides weights and the optimizer's moments."""

    step: int = 0  # steps that are done
    order: list[int] = field(default_factory=list)  # problems that this epoch has still to come
    sigma_bar: RunningMean = field(default_factory=RunningMean)
    min_rm: float = 0.0  # bounds of the reward model's scores, from the warmup
    max_rm: float = 0.0
    rm_failed: int = 0  # responses that it could not score, and that lost their start
    rm_truncated: int = 0
    accuracies: list[float] = field(default_factory=list)  # held-out, so far
    skipped_in_a_row: int = 0  # optimizer steps until now that were skipped because something was not finite
    problems: int = 0  # of the data
    model: str = ""  # fingerprint of the policy as it was first loaded
    reward_model: str | None = None
    wandb_id: str | None = None

    # Filled in by `Checkpoints.snapshot`
    python_gauss: float | None = None  # of Python's own generator
    written: dict[str, int] = field(default_factory=dict)  # bytes of the run's files
    randomness: dict[str, torch.Tensor] = field(default_factory=dict)  # states of all other random generators

    def adapt(self, now: Progress, other_problems: bool) -> None:
        """Let go of what belonged to another reward model or to other problems than those of `now`."""
        if self.reward_model != now.reward_model:  # both are in its units
            self.min_rm, self.max_rm, self.sigma_bar = 0.0, 0.0, RunningMean()
        if other_problems:  # it counts into the old ones
            self.order = []
        self.problems, self.model, self.reward_model = now.problems, now.model, now.reward_model

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if k != "randomness"}, indent=1) + "\n"

    @classmethod
    def of_json(cls, text: str) -> Progress:
        values = json.loads(text)
        return cls(**values | {"sigma_bar": RunningMean(**values["sigma_bar"])})


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: Its files.
        model: What is saved for other tools: the policy, or its LoRA adapter.
        tokenizer: Saved beside it.
        master: The weights that are trained.
        optimizer: Of these.
        generators: Random generators of the run, by name.
        keep: Checkpoints to keep, the newest ones; 0 keeps all. Of these the newest two can be resumed from, the others hold
            weights alone.
    """

    def __init__(
        self,
        run: RunLog,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        master: MasterWeights,
        optimizer: torch.optim.Optimizer,
        generators: dict[str, torch.Generator],
        keep: int,
    ):
        self.run, self.model, self.tokenizer, self.master, self.optimizer = run, model, tokenizer, master, optimizer
        self.generators, self.keep = generators, keep

    def snapshot(self, progress: Progress) -> Progress:
        """A copy of the progress, with the state of every random generator: all that a step changes before its update."""
        now = copy.deepcopy(progress)
        version, numbers, now.python_gauss = random.getstate()
        assert version == 3
        of_numpy = numpy.random.get_state(legacy=False)
        assert of_numpy["bit_generator"] == "MT19937"
        keys, position = of_numpy["state"]["key"], of_numpy["state"]["pos"]
        now.randomness = {
            "python": torch.tensor(numbers),
            "torch": torch.get_rng_state(),
            "numpy.keys": torch.from_numpy(keys.astype(numpy.int64)),
            "numpy.rest": torch.tensor([position, of_numpy["has_gauss"], of_numpy["gauss"]], dtype=torch.float64),
            **{f"cuda.{i}": state for i, state in enumerate(_cuda_states())},
            **{f"generator.{name}": generator.get_state() for name, generator in self.generators.items()},
        }
        return now

    def save(self, progress: Progress) -> Path | None:
        """Write `step_<k>`, then delete what is older than `keep`.

        Args:
            progress: From `snapshot`, taken since the last optimizer step.

        Returns:
            The folder, or None where it could not be written (no room on the disk, above all). A line says why.
        """
        if not self.run.writes:
            return None
        name = f"step_{progress.step}"
        try:
            progress.written = self.run.sync()
            with written_aside(self.run.folder / name) as aside:
                self.model.save_pretrained(str(aside))
                self.tokenizer.save_pretrained(aside)
                (aside / "training_state").mkdir()
                for part, tensors in self._tensors().items():
                    save_file(tensors, aside / "training_state" / f"{part}.safetensors")
                save_file(progress.randomness, aside / "training_state/randomness.safetensors")
                (aside / "training_state/state.json").write_text(progress.to_json())
                sums = {str(path.relative_to(aside)): _sum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
                (aside / "training_state/complete.json").write_text(json.dumps(sums, indent=1) + "\n")
        except (OSError, SafetensorError) as error:
            whole = [path.name for path in checkpoints_of(self.run.folder) if is_resumable(path)]
            kept = f"; {whole[-1]} is the last one" if whole else ""
            print(f"warning: checkpoint {name} could not be written ({error}); training goes on{kept}", flush=True)
            return None
        self._prune()
        return self.run.folder / name

    def has(self, step: int) -> bool:
        """Whether a step is saved."""
        return is_resumable(self.run.folder / f"step_{step}")

    def load(self, folder: Path) -> Progress:
        """Put weights, optimizer and random generators back to where a checkpoint had them.

        Raises:
            InputError: It is of another model.
        """
        state = folder / "training_state"
        progress = read_progress(folder)
        tensors = {path.stem: load_file(path) for path in state.glob("*.safetensors") if path.stem != "randomness"}
        weights = tensors.pop("weights")
        parameters = dict(zip(self.master.names, self.master.parameters, strict=True))
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
            raise InputError(f"--resume {folder}: its weights are not those of the model; name the one that it was trained from")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        self.master.write_back()
        moments = {
            i: {part: values[name].clone() for part, values in tensors.items() if name in values}  # not a view of the file
            for i, name in enumerate(parameters)
            if any(name in values for values in tensors.values())
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self._restore_randomness(progress)
        return progress

    def _restore_randomness(self, progress: Progress) -> None:
        states = progress.randomness
        random.setstate((3, tuple(states["python"].tolist()), progress.python_gauss))
        position, has_gauss, cached = states["numpy.rest"].tolist()
        numpy.random.set_state(
            ("MT19937", states["numpy.keys"].numpy().astype(numpy.uint32), int(position), int(has_gauss), cached)
        )
        torch.set_rng_state(states["torch"])
        cuda = [states[f"cuda.{i}"] for i in range(torch.cuda.device_count()) if f"cuda.{i}" in states]
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        for name, generator in self.generators.items():
            generator.set_state(states[f"generator.{name}"])

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File by file, what is trained and the optimizer's state of it, by the weights' names."""
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}}
        for name, parameter in zip(self.master.names, self.master.parameters, strict=True):
            parts["weights"][name] = parameter.detach()
            for part, value in self.optimizer.state[parameter].items() if parameter in self.optimizer.state else ():
                parts.setdefault(part, {})[name] = value
        return parts

    def _prune(self) -> None:
        saved = checkpoints_of(self.run.folder)
        with contextlib.suppress(OSError):  # what cannot be deleted now can be at the next time
            if self.keep:
                for path in saved[: -self.keep]:
                    remove(path)
            for path in saved[:-RESUMABLE]:
                if (path / "training_state").exists():
                    remove(path / "training_state")


def read_progress(folder: Path) -> Progress:
    """The progress that a checkpoint was saved with."""
    progress = Progress.of_json((folder / "training_state/state.json").read_text())
    progress.randomness = load_file(folder / "training_state/randomness.safetensors")
    return progress


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write weights and tokenizer alone, as a whole or not at all; what was there is replaced."""
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return folder


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new, hidden folder that takes the place of `folder` when all that was written to it has reached the disk."""
    aside, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        if folder.exists():  # left by an earlier attempt at the same step
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def remove(folder: Path) -> None:
    """Delete a folder such that no half of it is left under its name."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run by their step, the newest last. Their number says which is newer, never a clock."""
    found = [path for path in run_folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def is_resumable(folder: Path) -> bool:
    """Whether a checkpoint has its training state; says nothing of its bytes."""
    return (folder / "training_state/complete.json").is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint; None where every file is as it was written."""
    try:
        sums = json.loads((folder / "training_state/complete.json").read_text())
        for name, expected in sums.items():
            found = _sum(folder / name)
            if found != expected:
                what = "size" if found["bytes"] != expected["bytes"] else "checksum"
                return f"{name} has another {what} than when it was written"
        return None if "training_state/state.json" in sums else "its list of files is not whole"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def find_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """The run and the checkpoint that `--resume` goes on from.

    Args:
        path: A run's folder, for its newest checkpoint that is whole, or one `step_<k>` of it.

    Returns:
        The run's folder and the checkpoint; None where the run has not come to its first.

    Raises:
        InputError: The checkpoint asked for, or every one, is damaged or holds weights alone.
    """
    named = re.fullmatch(r"step_\d+", path.name) is not None
    run_folder = path.parent if named else path
    candidates = [path] if named else checkpoints_of(run_folder)[::-1]
    problems = []
    for folder in candidates:
        if is_resumable(folder):
            problem = damage(folder)
            if problem is None:
                return run_folder, folder
            problems.append(f"{folder.name} is damaged ({problem})")
            if not named:
                print(f"warning: {problems[-1]}; going back to the checkpoint before", flush=True)
        elif named:
            problems.append(f"{folder.name} has no training state; only the newest {RESUMABLE} keep it")
    if not candidates:
        return run_folder, None
    reasons = "; ".join(problems) or "its checkpoints hold weights alone"
    way_out = f"resume from another, or train on from its weights with --model-name {candidates[0]}"
    raise InputError(f"--resume {path}: {reasons}; {way_out}")


def set_aside_later(run: RunLog, step: int) -> None:
    """Rename the checkpoints after a step, from which a run is about to go another way."""
    if not run.writes:
        return
    for path in checkpoints_of(run.folder):
        if int(path.name.removeprefix("step_")) > step:
            label = "abandoned" if is_resumable(path) and damage(path) is None else "damaged"
            target, n = path.with_name(f"{path.name}.{label}"), 1
            while target.exists():
                n += 1
                target = path.with_name(f"{path.name}.{label}-{n}")
            path.rename(target)
            print(f"{path.name} is now {target.name}; delete it if you do not need it", flush=True)
    for hidden in [*run.folder.glob(".*.partial"), *run.folder.glob(".*.old")]:  # of a run that was killed
        shutil.rmtree(hidden, ignore_errors=True)
