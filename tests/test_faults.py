"""Inject every fault listed in docs/runs.md, and check what it breaks, what is printed and what remains."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from src import math_verifier
from src.engine import rollout
from src.errors import InputError, TrainingError
from src.reward_model import AceRewardModel
from src.run import log as run_log
from src.run.checkpoint import checkpoints_of, find_checkpoint, find_damage
from tests.conftest import as_flags
from tests.test_resume import assert_same_run, has_steps, one_thread, slow_rollout  # noqa: F401 (a fixture)
from tests.test_train import metrics_of, rollouts_of, without_times
from tests.tools import processes


@pytest.fixture
def tiny(tiny, reward_model_folder) -> dict:
    """With a reward model, the rewards within a group differ, so every step has a gradient."""
    return tiny | dict(reward_model_name=str(reward_model_folder), lr=1e-3)


def before_update(monkeypatch, actions: dict) -> None:
    """Call functions before some updates of the next run: `actions` maps an update, from 1, to a function."""
    real, calls = train.update, []

    def update(*args, **kwargs):
        calls.append(1)
        actions.get(len(calls), lambda: None)()
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "update", update)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# ------------------------------------------------------------------------------------------------ the disk


def full_disk(folder: Path) -> tuple:
    """Functions that fill the disk of a folder and free it again."""

    def fill():
        with (folder / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    return fill, (folder / "filler").unlink


def file_size_limit(_: Path) -> tuple:
    """Functions that limit the size of files, as a quota does, and lift the limit again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )


def check_a_run_survives(tiny, monkeypatch, capsys, folder, fault, message):
    settings = tiny | dict(max_steps=8, checkpoint_interval=2)
    straight = train.main(**settings | dict(run_name="straight"))
    capsys.readouterr()
    begin, end = fault(folder)
    before_update(monkeypatch, {4: begin, 7: end})
    run = train.main(**settings | dict(output=str(folder)))
    out = capsys.readouterr().out
    assert out.count("could not be written") == 2 and message in out
    assert "training continues; the newest checkpoint is step_2" in out
    assert "saved " + str(run / "step_8") in out
    assert not list(run.glob(".*"))
    assert_same_run(straight, run, 8)  # lines that had to wait have been written by now, in order


def test_a_full_disk_does_not_stop_a_run_and_loses_nothing(tiny, monkeypatch, capsys, small_disk):
    check_a_run_survives(tiny, monkeypatch, capsys, small_disk, full_disk, "No space left on device")


def test_a_quota_does_not_stop_a_run_and_loses_nothing(tiny, monkeypatch, capsys, tmp_path):
    check_a_run_survives(tiny, monkeypatch, capsys, tmp_path / "here", file_size_limit, "File too large")


def test_a_run_fails_if_the_disk_is_full_at_the_end(tiny, monkeypatch, capsys, small_disk):
    fill, free = full_disk(small_disk)
    before_update(monkeypatch, {3: fill})
    message = r"the last step is not saved; free some disk space and continue with --resume"
    with pytest.raises(TrainingError, match=message):
        train.main(**tiny | dict(output=str(small_disk), max_steps=4, checkpoint_interval=2))
    free()
    run = train.main(resume=str(small_disk / "run"))
    assert_same_run(train.main(**tiny | dict(max_steps=4, run_name="straight")), run, 4)


def full_at_the_third_update():
    """Fill the disk that standard output goes to, from the third update to the fifth."""
    fill, free = full_disk(Path(os.readlink("/proc/self/fd/1")).parent)
    real, calls = train.update, []

    def update(*args, **kwargs):
        calls.append(1)
        {3: fill, 5: free}.get(len(calls), int)()
        if len(calls) == 3:
            with contextlib.suppress(OSError):  # fill the last page of the file too
                while os.write(1, b"\n"):
                    pass
        return real(*args, **kwargs)

    train.update = update


@pytest.mark.slow
def test_a_log_file_on_a_full_disk_does_not_stop_a_run_and_loses_no_line(tiny, small_disk):
    flags = as_flags(tiny | dict(max_steps=6))
    status, text = processes.run(flags, small_disk / "lines", full_at_the_third_update)
    assert status == 0, text
    assert [line[0] for line in text.splitlines() if ": kl=" in line] == list("012345")


def test_resuming_on_a_full_disk_is_refused_and_leaves_the_run_unchanged(tiny, capsys):
    run = train.main(**tiny)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    begin, end = file_size_limit(run)
    begin()
    try:
        message = r"run cannot be written \(File too large\); its checkpoints are complete"
        with pytest.raises(InputError, match=message):
            train.main(resume=str(run), max_steps=3)
    finally:
        end()
    assert {path: path.read_bytes() for path in before} == before
    assert len(metrics_of(train.main(resume=str(run), max_steps=3))) == 3


def test_a_read_only_output_folder_is_refused_before_anything_loads(tiny, small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, text = processes.run(as_flags(tiny | dict(output=str(small_disk))), tmp_path / "lines")
    assert status == 2 and "Traceback" not in text and "Loading" not in text
    message = f"{small_disk}/run cannot be written; choose a writable folder with --output"
    assert f"error: --output {small_disk}: {message}" in text


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_used(tiny, capsys, damage):
    settings = tiny | dict(max_steps=6, checkpoint_interval=2)
    straight = train.main(**settings | dict(run_name="straight"))
    run = train.main(**settings)
    files = [path for path in (run / "step_6").rglob("*") if path.is_file() and path.name != "complete.json"]
    for file in files:
        undamaged = file.read_bytes()
        for _ in range(10):
            damage(file)
            assert file.name in find_damage(run / "step_6"), file
            file.write_bytes(undamaged)
    assert find_damage(run / "step_6") is None
    damage(run / "step_6/training_state/exp_avg.safetensors")
    assert find_checkpoint(run) == (run, run / "step_4")
    train.main(resume=str(run))
    out = capsys.readouterr().out
    assert "warning: step_6 is damaged (" in out and "exp_avg" in out
    assert "step_6 is now step_6.damaged" in out
    assert_same_run(straight, run, 6)


def test_a_run_is_not_restarted_if_all_its_checkpoints_are_damaged(tiny):
    run = train.main(**tiny | dict(max_steps=2, checkpoint_interval=1))
    lines = (run / "rollouts.jsonl").read_bytes()
    for path in checkpoints_of(run):
        flip_bit(path / "model.safetensors")
    ways_out = "resume from another checkpoint, or start a new run from"
    with pytest.raises(InputError, match=rf"step_2 is damaged .*; step_1 is damaged .*; {ways_out}"):
        train.main(resume=str(run))
    assert (run / "rollouts.jsonl").read_bytes() == lines


def test_a_second_process_on_the_same_run_is_refused(tiny, tmp_path):
    run, lines = Path(tiny["output"]) / "run", tmp_path / "lines"
    process = processes.start(as_flags(tiny | dict(max_steps=9, checkpoint_interval=1)), lines, slow_rollout)
    processes.wait_for(lambda: has_steps(run, 3))
    rows = metrics_of(run)
    with pytest.raises(InputError, match="another process is writing to this run"):
        train.main(resume=str(run))
    assert metrics_of(run) == rows
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    train.main(resume=str(run), max_steps=4)  # its lock ended with it
    assert len(metrics_of(run)) == 4


def test_a_clock_that_jumps_changes_nothing(tiny, monkeypatch):
    straight = train.main(**tiny | dict(max_steps=4, run_name="straight"))
    clock = iter(range(2_000_000_000, 0, -3_600))

    class Clock(run_log.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(next(clock))

    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    monkeypatch.setattr(run_log, "datetime", Clock)
    run = train.main(**tiny | dict(max_steps=2, run_name=None))
    train.main(resume=str(run), max_steps=4)
    assert_same_run(straight, run, 4)
    times = [v for row in metrics_of(run) for name, v in row.items() if name.startswith("time/")]
    assert times and all(value >= 0 for value in times)


# ------------------------------------------------------------------------------------------------- numbers


def poison(monkeypatch, at: set[int], what: str = "loss") -> None:
    """Make the loss nan for a pass's second completion, or its gradient for all, in passes counted from 1."""
    real, calls = train.policy_loss, []

    def policy_loss(*args):
        losses, clipped = real(*args)
        calls.append(1)
        if len(calls) in at:
            losses = losses.clone()
            if what == "loss":
                losses[1, -1] = torch.nan
            else:
                losses.register_hook(lambda gradient: gradient * torch.nan)
        return losses, clipped

    monkeypatch.setattr(train, "policy_loss", policy_loss)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nonfinite_update_is_skipped_and_its_completions_are_named(tiny, monkeypatch, capsys, what):
    every_step = dict(checkpoint_interval=1, keep_checkpoints=0)
    settings = tiny | every_step | dict(train_batch_size=8, dtype="float32", max_steps=3)
    poison(monkeypatch, {2}, what)
    run = train.main(**settings)
    rows = metrics_of(run)
    assert [row["policy/skipped_updates"] for row in rows] == [0, 1, 0]
    assert all(value is not None for row in rows for value in row.values())
    warning = next(line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    named = "[0-7]" if what == "loss" else "0, 1, 2, 3, 4, 5, 6, 7"  # the gradient is a sum over all
    assert re.search(f"They contained the step's completions {named} ", warning)
    before, skipped, after = (load_file(run / f"step_{step}/model.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not all(torch.equal(skipped[name], after[name]) for name in before)


def test_updates_that_stay_nonfinite_stop_the_run_with_its_state_saved(tiny, monkeypatch, capsys):
    settings = tiny | dict(train_batch_size=8, max_steps=8, checkpoint_interval=100)
    with monkeypatch.context() as patch:
        poison(patch, set(range(3, 100)))
        with pytest.raises(TrainingError, match=r"^3 optimizer steps had a non-finite.*--resume .*/run"):
            train.main(**settings | dict(max_skipped_updates=3))
    run = Path(settings["output"]) / "run"
    assert [path.name for path in checkpoints_of(run)] == ["step_5"] and find_damage(run / "step_5") is None
    train.main(resume=str(run))  # without the fault
    assert [row["policy/skipped_updates"] for row in metrics_of(run)] == [0, 0, 1, 1, 1, 0, 0, 0]


# -------------------------------------------------------------------------------------------------- memory


def too_large(size: int) -> None:
    """Run out of memory if there are more than two completions."""
    if size > 2:
        torch.empty(2**62, dtype=torch.uint8)


def test_out_of_memory_while_sampling_halves_the_batch_and_changes_no_completion(tiny, monkeypatch, capsys):
    straight = train.main(**tiny | dict(run_name="straight", dtype="float32"))
    real = rollout.sample

    def sample(policy, prompts, group_size, *args):
        too_large(len(prompts) * group_size)
        return real(policy, prompts, group_size, *args)

    monkeypatch.setattr(rollout, "sample", sample)
    run = train.main(**tiny | dict(dtype="float32"))
    out = capsys.readouterr().out
    assert out.count("out of memory; retrying with") == 2  # from 8 to 4 to 2, and then never again
    assert "retrying with 2 completions at a time instead of 4" in out
    texts, expected = ([row["completion"] for row in rollouts_of(path)] for path in (run, straight))
    assert texts == expected


def test_out_of_memory_in_the_update_halves_the_micro_batch_and_changes_no_result(tiny, monkeypatch, capsys):
    settings = tiny | dict(dtype="float32", kl_weight=0.1)
    straight = train.main(**settings | dict(run_name="straight"))
    real = train.completion_log_probs

    def log_probs(model, samples, part, temperature):
        result = real(model, samples, part, temperature)
        if torch.is_grad_enabled():
            too_large(len(part.rows))
        return result

    monkeypatch.setattr(train, "completion_log_probs", log_probs)
    run = train.main(**settings)
    assert "warning: out of memory; retrying with" in capsys.readouterr().out
    assert [row["policy/micro_batch_size"] for row in metrics_of(run)] == [2.0, 2.0]
    both = (without_times(metrics_of(path)) for path in (run, straight))
    for row, expected in zip(*both, strict=True):
        for name in row.keys() - {"policy/micro_batch_size"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    weights, expected = (load_file(path / "step_2/model.safetensors") for path in (run, straight))
    for name in weights:
        # AdamW's first steps have a size of about lr, so a tiny gradient of the other sign counts 2 lr.
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=2e-3)


def test_without_memory_for_even_one_completion_the_error_is_raised(tiny, monkeypatch):
    monkeypatch.setattr(rollout, "sample", lambda *args, **kwargs: torch.empty(2**62, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train.main(**tiny)


# ------------------------------------------------------------------------------------------------- scoring


def test_if_the_reward_model_fails_the_scores_are_neutral_and_counted(tiny, monkeypatch, capsys):
    real, calls = AceRewardModel._forward, []

    def forward(self, texts):
        calls.append(1)
        if len(calls) == 3:  # in the second step
            raise RuntimeError("the device is lost")
        return real(self, texts)

    monkeypatch.setattr(AceRewardModel, "_forward", forward)
    run = train.main(**tiny | dict(max_steps=3))
    assert "warning: the reward model failed on" in capsys.readouterr().out
    failed = [row["reward/rm_failed"] for row in metrics_of(run)]
    assert failed[0] == 0 and failed[1] == failed[2] > 0
    assert all(abs(row["n"] - 0.5) < 0.05 for row in rollouts_of(run) if row["step"] == 1)


def test_if_the_verifier_fails_on_a_completion_it_gets_no_advantage_and_is_counted(tiny, monkeypatch):
    real, bad = math_verifier.final_answer, []

    def final_answer(response, method, prompt=""):
        if not bad or response == bad[0]:  # the first completion, each time it is judged
            bad[:] = [response]
            raise RecursionError("maximum recursion depth exceeded")
        return real(response, method, prompt)

    def fail_from_now_on(*args):  # called at the end of the warmup
        monkeypatch.setattr(math_verifier, "final_answer", final_answer)

    monkeypatch.setattr("src.console_lines.warn_if_unread", fail_from_now_on)
    run = train.main(**tiny | dict(reward_mode="rm", max_steps=1))
    rows = rollouts_of(run)
    assert metrics_of(run)[0]["verifier/errors"] == 1
    assert abs(rows[0]["advantage"]) < 1e-6 < abs(rows[1]["advantage"])
    assert rows[0]["completion"] == bad[0] and rows[0]["correct"] is False
    assert sum(row["advantage"] for row in rows[:4]) == pytest.approx(0, abs=1e-5)


# ------------------------------------------------------------------------------------------------ security


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("flag", ["model_name", "reward_model_name"])
def test_no_code_in_an_untrusted_model_folder_runs(tiny, policy_folder, reward_model_folder, tmp_path, flag):
    folder, trap = tmp_path / "model", tmp_path / "trap"
    shutil.copytree(policy_folder if flag == "model_name" else reward_model_folder, folder)
    settings = tiny | {flag: str(folder), "reward_mode": "rm" if flag == "reward_model_name" else "hybrid"}
    # Pickled weights
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError):
        train.main(**settings)
    assert not trap.exists()
    # Python code
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(InputError):
        train.main(**settings)
    assert not trap.exists()


def test_checkpoints_contain_no_pickles_and_a_pickle_placed_in_one_is_not_read(tiny, tmp_path):
    run = train.main(**tiny)
    assert {path.suffix for path in (run / "step_2/training_state").iterdir()} == {".json", ".safetensors"}
    for path in (run / "step_2").rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")), path
    trap = tmp_path / "trap"
    torch.save(Evil(trap), run / "step_2/training_state/exp_avg.safetensors")
    with pytest.raises(InputError, match="step_2 is damaged"):
        train.main(resume=str(run / "step_2"))
    assert not trap.exists()


def test_control_characters_never_reach_the_terminal_and_secrets_never_reach_a_file(
    tiny, tmp_path, monkeypatch, capsys
):
    secrets = {
        "HF_TOKEN": "hf_SECRETsecretSECRET",
        "WANDB_API_KEY": "0123456789SECRET0123456789abcdefabcdef01",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    data = tmp_path / "data.jsonl"
    problem = {"question": "What is \x1b[2J\x1b]0;title\x07 1 + 1?\u202e\r", "answer": "2"}
    data.write_text("".join(json.dumps(problem) + "\n" for _ in range(4)))
    run = train.main(**tiny | dict(data=str(data), verifier_method="strict"))
    out = capsys.readouterr().out
    assert "rollout q=" in out and "warning: none of the" in out
    assert not set(out) & {"\x1b", "\x07", "\r", "\u202e"}
    for path in run.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in secrets.values()), path


# ----------------------------------------------------------------------------------------------- leftovers


def resources() -> tuple:
    """Open files, threads, child processes and the handler of SIGTERM."""
    threads = Path("/proc/self/task").iterdir()
    children = {pid for thread in threads for pid in (thread / "children").read_text().split()}
    files = len(os.listdir("/proc/self/fd"))
    return files, threading.active_count(), children, signal.getsignal(signal.SIGTERM)


def test_a_run_leaves_no_process_thread_handler_or_open_file_behind(tiny, monkeypatch):
    train.main(**tiny | dict(run_name="first"))  # libraries open some things once and keep them
    before = resources()
    train.main(**tiny)
    before_update(monkeypatch, {3: lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        train.main(**tiny | dict(run_name="crash", max_steps=4))
    assert resources() == before


def test_training_works_outside_the_main_thread(tiny):
    thread = threading.Thread(target=train.main, kwargs=tiny)
    thread.start()
    thread.join()
    assert len(metrics_of(Path(tiny["output"]) / "run")) == 2
