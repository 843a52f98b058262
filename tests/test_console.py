"""What a run prints: plain lines when piped, a bar that fits a terminal, and no control characters."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from rich.progress import Progress

import train
from src import console, console_lines
from src.problems import Problem
from tests.conftest import ROOT, as_flags, run_command

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202eright to left\u202c [bold]markup[/bold]\r\nnext \x9b2J"


def rollout(reward: float, completion: str = "It is 8.") -> dict:
    return dict(
        question=HOSTILE, answer=HOSTILE, completion=completion, correct=reward > 0, rm_score=-1.5,
        r_hat=reward, weight=1.25, reward=reward, advantage=0.5 * reward,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def not_quiet():
    console.configure(False)
    yield
    console.configure(False)


def test_samples_have_the_highest_the_middle_and_the_lowest_reward(capsys):
    console_lines.say_samples([rollout(r) for r in (0.5, -1.0, 2.0, 0.0, 1.0)])
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r" reward=(\S+),", line)[1] for line in lines] == ["2.00", "0.50", "-1.00"]
    assert "right, rm=-1.50, r_hat=2.00, weight=1.25, reward=2.00, advantage=+1.00: 'It is 8.'" in lines[0]
    console_lines.say_samples([rollout(1.0)])
    assert capsys.readouterr().out.count("sample q=") == 1


def test_text_from_models_and_data_cannot_control_a_terminal(capsys):
    import torch

    console_lines.say_samples([rollout(1.0, HOSTILE), rollout(-1.0, HOSTILE * 50)])
    scores = SimpleNamespace(rule_rewards=torch.ones(1), rewards=torch.ones(1))
    console_lines.say_rollouts([Problem(HOSTILE, HOSTILE, "here")], scores, 0)
    console_lines.warn_if_unread({"verifier/extracted_frac": 0}, [HOSTILE], "strict")
    out = capsys.readouterr().out
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert len(out.splitlines()) == 2 + 2 + 1  # the text adds no lines
    assert "\\x1b[31mred" in out and "\\u202e" in out and "[bold]markup[/bold]" in out


def test_a_piped_table_is_plain_and_keeps_brackets(capsys):
    console.table(["name", "value [%]"], [["[red]a", "1"], ["b", "22"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["name", "value", "[%]"], ["[red]a", "1"], ["b", "22"]]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_quiet_prints_only_warnings_and_the_result(tiny, capsys):
    train.main(**tiny | dict(quiet=True, verifier_method="strict", eval_data=tiny["data"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["warning:", "done:"]
    train.main(resume=f"{tiny['output']}/run", max_steps=3)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done:"]


@pytest.mark.slow
def test_characters_that_standard_output_cannot_encode_are_escaped(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "Was ergibt 5 + 3, Jürgen? ∑", "answer": "8"}\n' * 2, encoding="utf-8")
    flags = as_flags(tiny | dict(data=data, max_steps=1))
    done = run_command("train.py", *flags, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "J\\xfcrgen? \\u2211" in done.stdout


def in_terminal(columns: int, *arguments: str) -> str:
    """Run Python in a terminal of this width, and return everything it writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    written, began = b"", time.monotonic()
    while time.monotonic() - began < 120:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the process has closed its end
            break
        written += part
    os.close(ours)
    assert process.wait(timeout=10) == 0, written.decode()
    return written.decode()


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize("columns", [120, pytest.param(40, marks=pytest.mark.slow)])
def test_on_a_terminal_a_bar_shows_phase_speed_and_time_left_until_the_end(tiny, columns):
    settings = tiny | dict(max_steps=8, max_new_tokens=60, eval_data=tiny["data"])
    written = in_terminal(columns, "train.py", *as_flags(settings))
    lines = re.split(r"[\r\n]+", ESCAPES.sub("", written))
    frames = [line for line in lines if re.search(r"step \d/8", line)]
    assert all(len(frame) <= columns for frame in frames), frames
    assert any(re.search("evaluate|rollout|score|update|save", frame) for frame in frames)
    assert any(re.search(r"\d:\d\d:\d\d left", frame) for frame in frames)
    assert any("tokens/s" in frame for frame in frames) == (columns == 120)
    assert not any("…" in frame for frame in frames)
    assert written.rfind("\x1b[?25h") >= written.rfind("\x1b[?25l")  # the cursor is visible
    assert "step 9/8" not in written and any(line.startswith("done: 8 steps") for line in lines)
    assert any(line.startswith("returns of step 7: ") for line in lines)  # the lines appear above the bar
    assert any(line.startswith("╭") for line in lines)  # a framed summary


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("TERM", "dumb")
    assert not console.on_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert console.on_terminal()


def test_time_left_is_the_mean_time_of_this_runs_steps_times_the_steps_left(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    resumed = dict(total=20, start_time=800.0, fields={"done_before": 10})
    task = SimpleNamespace(completed=12, **resumed)
    assert console._time_left(task) == "0:13:20 left"  # 2 steps in 200 s, 8 left
    assert console._time_left(SimpleNamespace(completed=10, **resumed)) == ""


def test_loops_show_how_far_they_are_and_nothing_afterwards(monkeypatch):
    bar = Progress()
    bar.add_task("", total=1, counts="")
    monkeypatch.setattr(console, "_bar", bar)
    shown = []

    def note():
        shown.append(f"{bar.tasks[0].description} {bar.tasks[0].fields['counts']}".strip())

    with console.phase("update"):
        for _ in console.counted("ab"):
            note()
            for _ in console.counted([1]):  # a single pass is not worth a number
                note()
            for _ in console.counted((1, 2, 3)):
                console.detail("5 left, 7 tokens")
                note()
                with console.phase("reference"):
                    note()
                note()
        note()
        for _ in console.counted("cde"):
            break  # as an exception would
        note()
    note()
    inner = [
        line
        for i in (1, 2, 3)
        for line in (f"update 1/2 {i}/3 5 left, 7 tokens", "reference", f"update 1/2 {i}/3")
    ]
    first = ["update 1/2", "update 1/2", *inner]
    second = [line.replace("1/2", "2/2") for line in first]
    assert shown == [*first, *second, "update", "update", ""]


def test_without_a_bar_loops_only_loop():
    assert list(console.counted(range(3))) == [0, 1, 2]
    console.detail("nothing")
    with console.phase("quietly"):
        pass


def test_a_phase_outside_of_the_bar_has_a_line_with_its_time():
    program = (
        "import time; from src import console\n"
        "with console.phase('load'):\n"
        "    for _ in console.counted(range(3)):\n"
        "        time.sleep(0.5)\n"
        "        print('a line')\n"
    )
    written = in_terminal(80, "-c", program)
    lines = [" ".join(line.split()) for line in re.split(r"[\r\n]+", ESCAPES.sub("", written))]
    assert any(re.fullmatch(r"\S load 1/3 0:00:00", line) for line in lines), lines
    assert any(re.fullmatch(r"\S load 3/3 0:00:01", line) for line in lines)
    assert lines.count("a line") == 3  # above the phase's line


@pytest.mark.slow
def test_every_long_phase_of_a_real_run_shows_how_far_it_is(tmp_path):
    flags = ["--model-name", "embedded", "--max-steps", "1", "--max-new-tokens", "32", "--output", tmp_path]
    written = in_terminal(120, "train.py", *map(str, flags), "--eval-data", "data/dummy_math_tasks.jsonl")
    text = ESCAPES.sub("", written)
    for shown in (
        r"load the policy", r"warmup +\d+ left, \d+ tokens", r"evaluate +\d+ left, \d+ tokens",
        r"rollout +\d+ left, \d+ tokens", r"reference +\d/\d", r"update +\d/8",
    ):  # fmt: skip
        assert re.search(shown, text), shown
