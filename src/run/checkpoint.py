"""Checkpoints: folders that any Hugging Face tool can load, and from which a run resumes exactly.

    step_<k>/                    weights and tokenizer, or the LoRA adapter
    step_<k>/training_state/     weights.safetensors, exp_avg.safetensors, ...: the trained float32 weights
                                 and AdamW's moments
                                 randomness.safetensors: the state of every random generator
                                 state.json: `Progress`
                                 complete.json: size and SHA-256 of every file of the checkpoint; written last

A checkpoint is written to a hidden folder, synced to the disk and then renamed, so a step_<k> folder is
always complete. It contains no pickles and no code.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src import console
from src.errors import InputError, first_line
from src.files import new_folder, remove_folder, remove_leftovers
from src.hybrid_reward import Calibration, RunningMean

if TYPE_CHECKING:
    from peft import PeftModel

    from src.engine.master_weights import MasterWeights
    from src.run.log import RunLog

# How many checkpoints keep their training state: the newest, and the one before it in case the newest is
# damaged.
RESUMABLE = 2


@dataclass
class Progress:
    """The state that one step passes to the next, apart from weights and optimizer moments."""

    step: int = 0  # steps done
    order: list[int] = field(default_factory=list)  # indices of the problems left in this epoch
    calibration: Calibration | None = None  # None before the warmup
    rm_failed: int = 0  # responses that the reward model could not score
    rm_truncated: int = 0  # responses that were too long for the reward model
    accuracies: list[float] = field(default_factory=list)  # held-out accuracies so far
    skipped_in_a_row: int = 0  # non-finite optimizer steps skipped since the last good one
    problems: int = 0  # size of the data set
    model: str = ""  # fingerprint of the policy when it was first loaded
    reward_model: str | None = None
    wandb_id: str | None = None
    prompts: str = ""  # a hash of all rendered prompts

    # Set by `Checkpoints.snapshot`
    written: dict[str, int] = field(default_factory=dict)  # sizes of the run's files in bytes
    randomness: dict[str, torch.Tensor] = field(default_factory=dict)  # states of the random generators

    @classmethod
    def start(cls, problems: list, model: str, reward_model: str | None) -> Progress:
        """The progress of a new run, which also records its data and its models."""
        prompts = hashlib.sha256(repr([problem.prompt_ids for problem in problems]).encode()).hexdigest()
        return cls(problems=len(problems), model=model, reward_model=reward_model, prompts=prompts)

    def adapt(self, current: Progress, other_problems: bool) -> None:
        """Drop the state that does not fit the current reward model or the current problems."""
        if self.reward_model != current.reward_model:  # the new scores are in different units
            self.calibration = None
        if other_problems:  # the indices refer to the old problems
            self.order = []
        self.problems, self.model, self.reward_model = current.problems, current.model, current.reward_model
        self.prompts = current.prompts

    def to_json(self) -> str:
        values = asdict(self)
        del values["randomness"]
        return json.dumps(values | (values.pop("calibration") or {}), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Progress:
        values = json.loads(text)
        mean = RunningMean(**values["sigma_bar"])
        values["calibration"] = Calibration(values["min_rm"], values["max_rm"], mean)
        names = {f.name for f in fields(cls)}  # older checkpoints have additional keys
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass
class TrainingState:
    """What a checkpoint saves besides the `Progress`.

    The model (the policy, or its LoRA adapter) is saved only for other tools. Training resumes from the
    master weights.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    master: MasterWeights
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]  # by name


class Checkpoints:
    """The checkpoints of one run.

    Args:
        log: The run's files.
        state: What is saved and restored.
        keep: How many of the newest checkpoints to keep; 0 keeps all. Only the last two can be resumed from.
    """

    def __init__(self, log: RunLog, state: TrainingState, keep: int):
        self.log, self.state, self.keep = log, state, keep

    def snapshot(self, progress: Progress) -> Progress:
        """Copy the progress, with the state of every random generator.

        Together, they are everything that a step changes before its update.
        """
        now = copy.deepcopy(progress)
        now.randomness = {
            "torch": torch.get_rng_state(),
            **{f"cuda.{i}": state for i, state in enumerate(_cuda_states())},
            **{
                f"generator.{name}": generator.get_state()
                for name, generator in self.state.generators.items()
            },
        }
        return now

    def save(self, progress: Progress) -> None:
        """Write `step_<k>`, then delete the checkpoints that are too old to keep. Prints the outcome.

        Args:
            progress: From `snapshot`, taken since the last optimizer step.
        """
        if not self.log.writes:
            return
        folder = self.log.folder / f"step_{progress.step}"
        try:
            progress.written = self.log.sync()
            with new_folder(folder) as partial:
                self.state.model.save_pretrained(str(partial))
                self.state.tokenizer.save_pretrained(partial)
                training_state = partial / "training_state"
                training_state.mkdir()
                for name, tensors in self._tensors().items():
                    save_file(tensors, training_state / f"{name}.safetensors")
                save_file(progress.randomness, training_state / "randomness.safetensors")
                (training_state / "state.json").write_text(progress.to_json())
                files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
                sums = {str(path.relative_to(partial)): _sum(path) for path in files}
                (training_state / "complete.json").write_text(json.dumps(sums, indent=1) + "\n")
        except Exception as error:  # whatever it is, the training so far must not be lost
            complete = [path.name for path in checkpoints_of(self.log.folder) if is_resumable(path)]
            kept = f"; the newest checkpoint is {complete[-1]}" if complete else ""
            reason = first_line(error)
            console.warn(
                f"checkpoint {folder.name} could not be written ({reason}); training continues{kept}"
            )
            return
        self._prune()
        console.say(f"saved {folder}")

    def has(self, step: int) -> bool:
        """Whether there is a complete checkpoint of a step."""
        return is_resumable(self.log.folder / f"step_{step}")

    def load(self, folder: Path) -> Progress:
        """Restore weights, optimizer and random generators from a checkpoint.

        Raises:
            InputError: The checkpoint belongs to a different model.
        """
        progress = read_progress(folder)
        saved = (folder / "training_state").glob("*.safetensors")
        tensors = {path.stem: load_file(path) for path in saved if path.stem != "randomness"}
        weights = tensors.pop("weights")
        parameters = self._parameters()
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
            raise InputError(
                f"--resume {folder}: its weights do not match the model; "
                "pass the model that the run started from"
            )
        master, optimizer = self.state.master, self.state.optimizer
        with torch.no_grad(), master.on_device(optimizer):
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
            master.write_back()
            master.load_moments(optimizer, tensors)
        self._restore_randomness(progress.randomness, progress.step)
        return progress

    def _restore_randomness(self, states: dict[str, torch.Tensor], step: int) -> None:
        torch.set_rng_state(states["torch"])
        cuda = [states[f"cuda.{i}"] for i in range(torch.cuda.device_count()) if f"cuda.{i}" in states]
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        for name, generator in self.state.generators.items():
            saved = states[f"generator.{name}"]
            if saved.shape == generator.get_state().shape:
                generator.set_state(saved)
            else:  # a CPU's generator has another state than a GPU's
                generator.manual_seed(generator.initial_seed() + step)
                console.warn(
                    "the run began on another kind of device, which draws other random numbers; sampling "
                    f"continues with the seed {generator.initial_seed()}"
                )

    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.state.master.names, self.state.master.parameters, strict=True))

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Each file's tensors, by weight name: the trained weights and each part of the optimizer's state."""
        files: dict[str, dict[str, torch.Tensor]] = {"weights": {}}
        states = self.state.optimizer.state
        for name, parameter in self._parameters().items():
            files["weights"][name] = parameter.detach()
            for part, value in states[parameter].items() if parameter in states else ():
                files.setdefault(part, {})[name] = value
        return files

    def _prune(self) -> None:
        saved = checkpoints_of(self.log.folder)
        with contextlib.suppress(OSError):  # what cannot be deleted now will be deleted next time
            if self.keep:
                for path in saved[: -self.keep]:
                    remove_folder(path)
            for path in saved[:-RESUMABLE]:
                if (path / "training_state").exists():
                    remove_folder(path / "training_state")


def read_progress(folder: Path) -> Progress:
    """The progress saved in a checkpoint."""
    progress = Progress.from_json((folder / "training_state/state.json").read_text())
    progress.randomness = load_file(folder / "training_state/randomness.safetensors")
    return progress


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write only weights and tokenizer, atomically, replacing an existing folder, and print the path."""
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    console.say(f"saved {folder}")


# ----------------------------------------------------------------------------------------------------------
# Finding checkpoints


def step_of(path: Path) -> int | None:
    """The step of a path that ends in step_<k>; None for any other path.

    >>> step_of(Path("output/run/step_20")), step_of(Path("output/run")), step_of(Path("step_20.damaged"))
    (20, None, None)
    """
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match[1]) if match else None


def run_of(path: Path) -> Path:
    """The run's folder, given that folder or one of its checkpoints."""
    return path if step_of(path) is None else path.parent


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last. Their step numbers decide which is newer, not file times."""
    paths = [path for path in run_folder.glob("step_*") if path.is_dir() and step_of(path) is not None]
    return sorted(paths, key=lambda path: step_of(path) or 0)


def is_resumable(folder: Path) -> bool:
    """Whether a checkpoint has its training state. Does not check the contents of its files."""
    return (folder / "training_state/complete.json").is_file()


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if every file is as it was written."""
    try:
        sums = json.loads((folder / "training_state/complete.json").read_text())
        for name, expected in sums.items():
            found = _sum(folder / name)
            if found != expected:
                what = "size" if found["bytes"] != expected["bytes"] else "checksum"
                return f"the {what} of {name} has changed since it was written"
        return None if "training_state/state.json" in sums else "its list of files is incomplete"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def find_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """The run and the checkpoint to resume from.

    Args:
        path: A run's folder, to find its newest undamaged checkpoint, or one `step_<k>` in it.

    Returns:
        The run's folder, and the checkpoint (None if the run has not written one yet).

    Raises:
        InputError: The requested checkpoint, or every checkpoint of the run, is damaged or has only weights.
    """
    named = step_of(path) is not None
    run_folder = run_of(path)
    candidates = [path] if named else checkpoints_of(run_folder)[::-1]
    problems = []
    for folder in candidates:
        if is_resumable(folder):
            damage = find_damage(folder)
            if damage is None:
                return run_folder, folder
            problems.append(f"{folder.name} is damaged ({damage})")
            if not named:
                console.warn(f"{problems[-1]}; falling back to the previous checkpoint")
        elif named:
            problems.append(f"{folder.name} has no training state; only the newest {RESUMABLE} have one")
    if not candidates:
        return run_folder, None
    reasons = "; ".join(problems) or "its checkpoints contain only weights"
    raise InputError(
        f"--resume {path}: {reasons}; resume from another checkpoint, or start a new run from the weights "
        f"with --model-name {candidates[0]}"
    )


def set_aside_later(log: RunLog, step: int) -> None:
    """Rename all checkpoints later than a step, because the run is about to continue from that step."""
    if not log.writes:
        return
    for path in checkpoints_of(log.folder):
        if (step_of(path) or 0) > step:
            label = "abandoned" if is_resumable(path) and find_damage(path) is None else "damaged"
            target, n = path.with_name(f"{path.name}.{label}"), 1
            while target.exists():
                n += 1
                target = path.with_name(f"{path.name}.{label}-{n}")
            path.rename(target)
            print(f"{path.name} is now {target.name}; delete it if you do not need it", flush=True)
    remove_leftovers(log.folder)


def _sum(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
