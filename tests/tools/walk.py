"""Follow the documents like a newcomer: run their commands as printed, in a clean clone with an empty home.

    python tests/tools/walk.py                 all commands that take up to ten minutes each
    python tests/tools/walk.py --show          list the commands, and why some are skipped
    python tests/tools/walk.py --everything    also run hours of benchmarks
    python tests/tools/walk.py --only eval     only the setup and the commands that contain a word

Commands are the lines of ```bash blocks, ```python blocks, and any text between backticks that consists of
`python`, `bash`, `torchrun` or `accelerate launch` and its arguments. A command that appears several times is
run once. If a ```text block comes next, the commands before it must print its lines; numbers may differ, and
"..." matches anything. The exit status is 1 if a command fails or if such a line is missing.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools.chromium import find_chromium  # noqa: E402

# In reading order. The README comes first, because later pages use the runs that it makes. docs/data.md
# evaluates the last checkpoint of such a run, so it must come before docs/runs.md, which sets that one aside.
DOCUMENTS = (
    "README.md",
    "docs/configuration.md",
    "docs/models.md",
    "docs/data.md",
    "docs/verifier.md",
    "docs/hybrid-reward.md",
    "docs/speed.md",
    "docs/memory.md",
    "docs/runs.md",
    "docs/report.md",
    "docs/metrics.md",
    "docs/scale-out.md",
    "docs/comparison.md",
    "docs/troubleshooting.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
)
# Commands that cannot run everywhere, and why.
ELSEWHERE = {
    r"benchmarks/gpu\.py": "needs a GPU",
    r"^accelerate launch": "needs several GPUs",
    r"hf:": "downloads from the Hugging Face hub",
    r"calibrate .*HOST|^vllm|^python -m sglang": "needs a reward-model server",
    r"\.venv-verl|^pip install .verl|^ray ": "needs its own environment, with vLLM",
}
if find_chromium() is None:
    ELSEWHERE[r"benchmarks/report\.py"] = "needs Chromium"
# Commands that take more than ten minutes on two cores.
LONG = "|".join(
    (
        r"benchmarks/(learning|ablation|step|scaling|busy)\.py",
        r"data/make_judge\.py",
        r"tests/tools/(soak\.py|walk\.py(?! --show))",
        r"pytest -m slow",
        r"\.ci/run",
    )
)
CLONE = "git clone <this repository> grpo && cd grpo"
# Prefixes of environment variables that a newcomer would not have set.
OWN_VARIABLES = ("HF_", "PYTHON", "VIRTUAL_ENV", "XDG_", "WANDB_", "HYBRID_GRPO")


@dataclass(frozen=True)
class Command:
    """A command in a document."""

    document: str
    text: str
    missing: list[str]  # lines of the document's output not printed yet; one list for all commands of a block

    @property
    def sets_up(self) -> bool:
        return self.text == CLONE or self.text.startswith(("source", "bash setup.sh"))

    def reason_to_skip(self, everything: bool) -> str | None:
        """Why this command is not run, or None if it is."""
        if self.text == CLONE:
            return None
        for pattern, reason in ELSEWHERE.items():
            if re.search(pattern, self.text):
                return reason
        if re.search(r"<\w+>|\.\.\.", self.text):
            return "has a placeholder"
        if not everything and re.search(LONG, self.text):
            return "takes more than ten minutes; --everything runs it"
        return None


def commands() -> list[Command]:
    """All commands in reading order, each one once."""
    found: dict[str, Command] = {}
    block = r"^```(bash|python)\n(.*?)^```(?:(?:(?!^```).)*?^```text\n(.*?)^```)?"
    inline = r"`((?:python|bash|torchrun|accelerate launch) [^`]+)`"
    for document in DOCUMENTS:
        matches = re.findall(f"{block}|{inline}", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
        for language, fenced, output, quoted in matches:
            lines = re.sub(r"\\\n\s*", "", fenced).splitlines() if fenced else [" ".join(quoted.split())]
            if language == "python":
                lines = [f"python -c {shlex.quote(fenced)}"]
            missing = output.splitlines()
            for line in lines:
                text = re.sub(r"\s+#.*", "", line).strip()
                if text and not text.startswith("#"):
                    found.setdefault(text.removeprefix("bash setup.sh "), Command(document, text, missing))
    return list(found.values())


def is_printed(line: str, output: list[str]) -> bool:
    """Whether an output contains a document's line, apart from numbers, dates, dtype and spaces."""
    pattern = re.escape(line.strip())
    for what, replacement in (
        (r"bfloat16|float32", "DTYPE"),  # what models compute in depends on the processor
        (r"(?:\\-)?\d(?:[\d.,]|\\\.)*", r"-?[\\d.,]+"),
        ("DTYPE", "(?:bfloat16|float32)"),
        (r"(?:\\ )+", r"\\s+"),
        (r"\\\.\\\.\\\.", ".*"),
    ):
        pattern = re.sub(what, replacement, pattern)
    return any(re.fullmatch(pattern, printed.strip()) for printed in output)


def run(text: str, folder: Path, home: Path, activated: bool, log: Path) -> int:
    """Run a command with its output in `log`, and return its exit status."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
    with log.open("w") as file:
        return subprocess.run(
            ["bash", "-c", f". .venv/bin/activate && {text}" if activated else text],
            cwd=folder,
            env=environment | {"HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode


def walk(chosen: list[Command], logs: Path, temporary: Path) -> list[str]:
    """Run commands in a clean clone.

    Args:
        chosen: The commands to run.
        logs: Folder for their output.
        temporary: Folder for the clone and the home folder.

    Returns:
        The commands that failed or did not print what their document says.
    """
    home, folder = temporary / "home", temporary / "grpo"
    home.mkdir()
    failed, activated = [], False
    for number, command in enumerate(chosen):
        print(f"{command.document}: {command.text}", flush=True)
        started, log = time.time(), logs / f"{number}.log"
        if command.text == CLONE:
            status = run(f"git clone -q {ROOT} grpo", temporary, home, False, log)
        else:
            status = run(command.text, folder, home, activated, log)
            activated |= command.text.startswith("source")
        lines = log.read_text(errors="replace").splitlines()
        print(f"    status {status}, {time.time() - started:.0f} s: {lines[-1] if lines else ''}", flush=True)
        if status:
            failed.append(command.text)
            print("\n".join(f"    | {line}" for line in lines[-30:]), flush=True)
        command.missing[:] = [line for line in command.missing if not is_printed(line, lines)]
    last_of_block = {id(command.missing): command for command in chosen}
    for command in last_of_block.values():
        if command.missing:
            failed.append(command.text)
            print(f"not printed by {command.text}, or by the commands before it in its block:")
            print(*(f"    | {line}" for line in command.missing), sep="\n")
    return failed


def main(everything: bool = False, show: bool = False, only: str = "", logs: Path | None = None) -> None:
    """Run the documents' commands and report which of them failed.

    Args:
        everything: Also run commands that take long.
        show: Only list the commands.
        only: Only run commands that contain this, and the setup.
        logs: Folder in which to keep their output.
    """
    chosen = []
    for command in commands():
        if only and only not in command.text and not command.sets_up:
            continue
        reason = command.reason_to_skip(everything)
        if show or reason:
            skipped = f"\n    skipped: {reason}" if reason else ""
            print(f"{command.document}: {command.text}{skipped}")
        if not reason:
            chosen.append(command)
    if show:
        return
    with tempfile.TemporaryDirectory() as temporary:
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
        failed = walk(chosen, (logs or Path(temporary)).resolve(), Path(temporary))
    print(f"{len(failed)} failed" + "".join(f"\n    {text}" for text in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    tyro.cli(main)
