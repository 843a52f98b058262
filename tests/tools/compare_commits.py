"""Check that a refactoring changed nothing: run two commits with the same seeds and compare all numbers.

    python tests/tools/compare_commits.py b842711 HEAD                  all runs, half an hour per commit
    python tests/tools/compare_commits.py b842711 HEAD --runs hard lora

The time is for two cores. Each commit is checked out into its own folder below --work. A run that exists
there is not repeated, so one commit can be run ahead of the other. Metrics are compared step by step and
completions line by line, to the last bit. Exits with status 1 if anything differs, except times, versions,
paths and the metrics named with --ignore.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[2]

LEARNING = (
    "--train-batch-size 32 --micro-batch-size 32 --max-new-tokens 48 --temperature 1.0 "
    "--kl-weight 0 --lr 2e-5 --lr-schedule linear"
)
SMALL = "--rollouts-per-step 2 --group-size 4 --train-batch-size 4 --max-new-tokens 24 --max-steps 2"
TORCHRUN = "-m torch.distributed.run --nproc-per-node 2 train.py --device cpu"
# Arguments of python, one string per command. --output and --run-name are added unless a command resumes.
RUNS = {
    "first": ["train.py --model-name embedded --max-steps 3"],
    "hard": [
        "train.py --model-name embedded --data data/arithmetic_hard_train.jsonl --max-steps 5 "
        f"--eval-interval 10 --eval-data data/arithmetic_hard_test.jsonl {LEARNING}"
    ],
    "lora": [f"train.py --model-name embedded --lora-rank 8 --lr 1e-3 {SMALL}"],
    "two-processes": [f"{TORCHRUN} --model-name embedded {SMALL}"],
    "eval-only": [
        "train.py --eval-only --model-name embedded --eval-data data/arithmetic_test.jsonl "
        "--max-new-tokens 48 --eval-samples 2 --temperature 1.0"
    ],
    "resumed": [
        f"train.py --model-name embedded --reward-scorer tanh {SMALL}",
        "train.py --resume {run} --max-steps 4 --lr 1e-4",
    ],
}
Name = Literal["first", "hard", "lora", "two-processes", "eval-only", "resumed"]
FILES = ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl", "evaluation.json")
INCOMPARABLE = ("time/", "hyperparameters", "versions", "git_commit", "machine", "started")


def run(commit: str, name: str, work: Path) -> Path:
    """Run one of RUNS at a commit, unless that was done before, and return the run's folder."""
    checkout, output = work / commit / "checkout", work / commit / "output"
    folder, done = output / name, output / f"{name}.done"
    if done.exists():
        return folder
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=checkout, check=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a failed attempt
    # Passive waiting changes no result, and keeps threads from spinning against each other on a busy machine.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with (output.parent / f"{name}.log").open("w") as log:
        for command in RUNS[name]:
            arguments = command.format(run=folder).split()
            if "--resume" not in arguments:
                arguments += ["--output", str(output), "--run-name", name]
            print(f"{commit} {name}: python {' '.join(arguments)}", flush=True)
            started = [sys.executable, *arguments]
            subprocess.run(started, cwd=checkout, env=environment, stdout=log, stderr=log, check=True)
    done.touch()
    return folder


def differences(old: Any, new: Any, ignore: tuple[str, ...], place: str) -> Iterator[str]:
    """Describe each place where two JSON values differ, except under keys that start with one of `ignore`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if not key.startswith(ignore):
                missing = "(missing)"
                yield from differences(old.get(key, missing), new.get(key, missing), ignore, f"{place} {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, ignore, f"{place}[{i}]")
    elif old != new:
        yield f"{place}: {old!r} before, {new!r} after"


def read(path: Path) -> list:
    """The records of a JSONL file, or the only one of a JSON file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in (text.split("\n") if path.suffix == ".jsonl" else [text]) if line]


def main(
    before: tyro.conf.Positional[str],
    after: tyro.conf.Positional[str],
    /,
    runs: tuple[Name, ...] = tuple(RUNS),  # type: ignore[arg-type]
    ignore: tuple[str, ...] = (),
    work: Path = ROOT / "output" / "compare",
) -> None:
    """Run two commits and compare what they wrote.

    Args:
        before: A commit. Pass its hash and not a branch, because runs are kept under this name.
        after: Another commit, or the same one to only run it.
        runs: Which of the runs to compare.
        ignore: Metrics to ignore, for example because one commit does not have them.
        work: Folder for the checkouts and their runs.
    """
    total = 0
    for name in runs:
        old, new = (run(commit, name, work.resolve()) for commit in (before, after))
        files = [file for file in FILES if (old / file).exists() or (new / file).exists()]
        assert files, f"{name} wrote nothing"
        for file in files:
            rows = read(old / file), read(new / file)
            found = list(differences(*rows, (*INCOMPARABLE, *ignore), file))
            if len(rows[0]) != len(rows[1]):
                found.append(f"{file}: {len(rows[0])} records before, {len(rows[1])} after")
            total += len(found)
            summary = f"{name} {file}: {len(rows[0])} records, {len(found)} differences"
            print(summary, *found[:10], sep="\n    ")
    print(f"{total} differences")
    sys.exit(total > 0)


if __name__ == "__main__":
    tyro.cli(main)
