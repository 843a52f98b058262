"""A newcomer's walk: run every command of the documents as it is printed, on a clean clone with an empty home folder.

    python tests/walk.py                 what takes up to ten minutes a command
    python tests/walk.py --show          the commands, and which are left out and why
    python tests/walk.py --everything    hours of benchmarks too
    python tests/walk.py --only eval     those that contain a word, after those that set up

Commands are the lines of ```bash blocks, ```python blocks, and what begins with `python` or `bash` between backticks in the
text; what is printed several times is run once. Where a ```text block comes next, its commands must print its lines, whatever the
numbers ("..." is anything). Exits with status 1 when a command fails or such a line is not printed.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "docs/hybrid-reward.md",
    "docs/metrics.md",
    "docs/scale-out.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
)
# What cannot run everywhere, and why.
ELSEWHERE = {
    r"^(bash setup\.sh )?python train\.py( --reward-scorer tanh)?$": "downloads TinyLlama and wants a GPU",
    r"^accelerate launch": "wants several GPUs",
    r"hf:": "downloads from the Hugging Face hub",
    r"calibrate .*HOST|^vllm|^python -m sglang": "wants a reward-model server",
    r"\.venv-verl|^pip install .verl|^ray ": "wants an environment of its own, with vLLM",
}
# What takes more than ten minutes on two cores.
LONG = r"benchmarks/(learning|ablation|step|scaling)\.py|data/make_judge\.py|tests/(soak|walk)\.py|pytest -m slow|\.ci/run"
CLONE = "git clone <this repository> grpo && cd grpo"
OWN = ("HF_", "PYTHON", "VIRTUAL_ENV", "XDG_", "WANDB_", "HYBRID_GRPO")  # variables that a newcomer does not have


def commands() -> list[tuple[str, str, list[str]]]:
    """Of each command where it stands, its text, and the lines that its block prints; in reading order, each once.

    The list of lines is one object for all commands of a block.
    """
    found: dict[str, tuple[str, str, list[str]]] = {}
    block = r"^```(bash|python)\n(.*?)^```(?:(?:(?!^```).)*?^```text\n(.*?)^```)?"
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for language, fenced, prints, inline in re.findall(block + r"|`((?:python|bash) [^`]+)`", text, re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", "", fenced).splitlines() if fenced else [" ".join(inline.split())]
            if language == "python":
                lines = [f"python -c {shlex.quote(fenced)}"]
            printed = prints.splitlines()
            for line in lines:
                command = re.sub(r"\s+#.*", "", line).strip()
                if command and not command.startswith("#"):
                    found.setdefault(command.removeprefix("bash setup.sh "), (document, command, printed))
    return list(found.values())


def is_printed(line: str, output: list[str]) -> bool:
    """Whether a line of a document is among those of an output, numbers, dates and spaces aside."""
    pattern = re.escape(line.strip())
    for what, stands_for in ((r"\d(?:[\d.,]|\\\.)*", r"[\\d.,]+"), (r"(?:\\ )+", r"\\s+"), (r"\\\.\\\.\\\.", ".*")):
        pattern = re.sub(what, stands_for, pattern)
    return any(re.fullmatch(pattern, printed.strip()) for printed in output)


def left_out(command: str, everything: bool) -> str | None:
    """Why a command is not run, or None."""
    for pattern, reason in ELSEWHERE.items():
        if re.search(pattern, command):
            return reason
    if re.search(r"<\w+>|\.\.\.", command):
        return "has a gap to fill"
    if not everything and re.search(LONG, command):
        return "takes more than ten minutes; --everything runs it"
    return None


def run(command: str, folder: Path, home: Path, activated: bool, log: Path) -> int:
    """Its exit status; what it prints goes to `log`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN)} | {"HOME": str(home)}
    line = f". .venv/bin/activate && {command}" if activated else command
    with log.open("w") as file:
        return subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ).returncode


def main(everything: bool = False, show: bool = False, only: str = "", logs: Path | None = None) -> None:
    """Walk, and say how it went.

    Args:
        everything: Run what takes long, too.
        show: Print the commands alone.
        only: Run those that contain this, and those that set up.
        logs: Folder to keep in what each of them prints.
    """
    failed = []
    unprinted: dict[int, tuple[str, list[str]]] = {}  # by block: its last command, and lines not seen yet
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home, folder = Path(temporary, "home"), Path(temporary, "grpo")
        home.mkdir()
        activated = False
        for number, (document, command, printed) in enumerate(commands()):
            sets_up = command == CLONE or command.startswith(("source", "bash setup.sh"))
            reason = None if command == CLONE else left_out(command, everything)
            if only and only not in command and not sets_up:
                continue
            print(f"{document}: {command}" + (f"\n    not here: {reason}" if reason else ""), flush=True)
            if show or reason:
                continue
            started, log = time.time(), (logs or Path(temporary)).resolve() / f"{number}.log"
            if command == CLONE:
                status = run(f"git clone -q {ROOT} grpo", Path(temporary), home, False, log)
            else:
                status = run(command, folder, home, activated, log)
                activated |= command.startswith("source")
            lines = log.read_text(errors="replace").splitlines()
            print(f"    status {status}, {time.time() - started:.0f} s: {lines[-1] if lines else ''}", flush=True)
            if status:
                failed.append(command)
                print("\n".join(f"    | {line}" for line in lines[-30:]), flush=True)
            printed[:] = [line for line in printed if not is_printed(line, lines)]
            unprinted[id(printed)] = command, printed
    for command, missing in unprinted.values():
        if missing:
            failed.append(command)
            print(f"not printed by {command}, nor by those above it:", *missing, sep="\n    | ")
    print(f"{len(failed)} failed" + "".join(f"\n    {command}" for command in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    tyro.cli(main)
