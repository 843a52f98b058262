"""Every fault of the README's table, injected for real: what breaks, what is said, and what is left."""

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
from src import rollout, run_log
from src.checkpoint import checkpoints_of, damage, find_checkpoint
from src.errors import InputError, TrainingError
from src.reward_model import AceRewardModel
from tests import processes
from tests.conftest import as_flags
from tests.test_resume import assert_same_run, has_steps, one_thread, slow_rollout  # noqa: F401 (a fixture)
from tests.test_train import metrics_of, rollouts_of, without_times


@pytest.fixture
def tiny(tiny, reward_model_folder) -> dict:
    """Two completions of one question differ in their reward, so that every step has a gradient."""
    return tiny | dict(reward_model_name=str(reward_model_folder), lr=1e-3)


def before_update(monkeypatch, actions: dict) -> None:
    """Do something before the n-th update of the next run."""
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
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# ----------------------------------------------------------------------------------------------------------- the disk


def disk_that_is_full(folder: Path) -> tuple:
    def fill():
        with (folder / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    return fill, (folder / "filler").unlink


def files_that_may_not_grow(_: Path) -> tuple:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    set_limit = lambda soft: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, limits[1]))  # noqa: E731
    return lambda: set_limit(1000), lambda: set_limit(limits[0])


def check_a_run_survives(tiny, monkeypatch, capsys, folder, fault, message):
    settings = tiny | dict(max_steps=8, checkpoint_interval=2)
    straight = train.main(**settings | dict(run_name="straight"))
    capsys.readouterr()
    begin, end = fault(folder)
    before_update(monkeypatch, {4: begin, 7: end})
    run = train.main(**settings | dict(output=str(folder)))
    out = capsys.readouterr().out
    assert out.count("could not be written") == 2 and message in out
    assert "training goes on; step_2 is the last one" in out
    assert "saved " + str(run / "step_8") in out
    assert not list(run.glob(".*"))
    assert_same_run(straight, run, 8)  # lines that found no room are there by now, in order


def test_a_full_disk_stops_no_run_and_loses_nothing(tiny, monkeypatch, capsys, small_disk):
    check_a_run_survives(tiny, monkeypatch, capsys, small_disk, disk_that_is_full, "No space left on device")


def test_a_quota_stops_no_run_and_loses_nothing(tiny, monkeypatch, capsys, tmp_path):
    check_a_run_survives(tiny, monkeypatch, capsys, tmp_path / "here", files_that_may_not_grow, "File too large")


def test_a_disk_that_is_full_at_the_end_is_no_success(tiny, monkeypatch, capsys, small_disk):
    fill, free = disk_that_is_full(small_disk)
    before_update(monkeypatch, {3: fill})
    with pytest.raises(TrainingError, match=r"the last step is not saved; make room, then go on from .* with --resume"):
        train.main(**tiny | dict(output=str(small_disk), max_steps=4, checkpoint_interval=2))
    free()
    run = train.main(resume=str(small_disk / "run"))
    assert_same_run(train.main(**tiny | dict(max_steps=4, run_name="straight")), run, 4)


def full_at_the_third_update():
    """The disk that the lines go to is full from the third update to the fifth."""
    fill, free = disk_that_is_full(Path(os.readlink("/proc/self/fd/1")).parent)
    real, calls = train.update, []

    def update(*args, **kwargs):
        calls.append(1)
        {3: fill, 5: free}.get(len(calls), int)()
        if len(calls) == 3:
            with contextlib.suppress(OSError):  # the last page of the file too
                while os.write(1, b"\n"):
                    pass
        return real(*args, **kwargs)

    train.update = update


@pytest.mark.slow
def test_a_log_file_on_a_full_disk_stops_no_run_and_loses_no_line(tiny, small_disk):
    status, text = processes.run(as_flags(tiny | dict(max_steps=6)), small_disk / "lines", full_at_the_third_update)
    assert status == 0, text
    assert [line[0] for line in text.splitlines() if ": kl=" in line] == list("012345")


def test_resuming_on_a_full_disk_is_refused_and_leaves_the_run_as_it_was(tiny, capsys):
    run = train.main(**tiny)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    begin, end = files_that_may_not_grow(run)
    begin()
    try:
        with pytest.raises(InputError, match=r"run cannot be written \(File too large\); its checkpoints are whole"):
            train.main(resume=str(run), max_steps=3)
    finally:
        end()
    assert {path: path.read_bytes() for path in before} == before
    assert len(metrics_of(train.main(resume=str(run), max_steps=3))) == 3


def test_an_output_folder_that_is_read_only_is_refused_at_once(tiny, small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, text = processes.run(as_flags(tiny | dict(output=str(small_disk))), tmp_path / "lines")
    assert status == 2 and "Traceback" not in text and "Loading" not in text
    assert f"error: --output {small_disk}: {small_disk}/run cannot be written; give a folder of yours with --output" in text


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_it_taken(tiny, capsys, harm):
    settings = tiny | dict(max_steps=6, checkpoint_interval=2)
    straight = train.main(**settings | dict(run_name="straight"))
    run = train.main(**settings)
    for file in [path for path in (run / "step_6").rglob("*") if path.is_file() and path.name != "complete.json"]:
        whole = file.read_bytes()
        for _ in range(10):
            harm(file)
            assert file.name in damage(run / "step_6"), file
            file.write_bytes(whole)
    assert damage(run / "step_6") is None
    harm(run / "step_6/training_state/exp_avg.safetensors")
    assert find_checkpoint(run) == (run, run / "step_4")
    train.main(resume=str(run))
    out = capsys.readouterr().out
    assert "warning: step_6 is damaged (" in out and "exp_avg" in out and "step_6 is now step_6.damaged" in out
    assert_same_run(straight, run, 6)


def test_with_every_checkpoint_damaged_nothing_is_begun_anew(tiny):
    run = train.main(**tiny | dict(max_steps=2, checkpoint_interval=1))
    lines = (run / "rollouts.jsonl").read_bytes()
    for path in checkpoints_of(run):
        flip(path / "model.safetensors")
    with pytest.raises(InputError, match=r"step_2 is damaged .*; step_1 is damaged .*; resume from another, or train on from"):
        train.main(resume=str(run))
    assert (run / "rollouts.jsonl").read_bytes() == lines


def test_two_processes_on_one_run_are_refused(tiny, tmp_path):
    run, lines = Path(tiny["output"]) / "run", tmp_path / "lines"
    process = processes.start(as_flags(tiny | dict(max_steps=9, checkpoint_interval=1)), lines, slow_rollout)
    processes.wait_for(lambda: has_steps(run, 3))
    rows = metrics_of(run)
    with pytest.raises(InputError, match="another process is writing to this run"):
        train.main(resume=str(run))
    assert metrics_of(run) == rows
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    train.main(resume=str(run), max_steps=4)  # its lock has gone with it
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
    assert all(value >= 0 for row in metrics_of(run) for name, value in row.items() if name.startswith("time/"))


# ----------------------------------------------------------------------------------------------------------- numbers


def poison(monkeypatch, at: set[int], what: str = "loss") -> None:
    """Make the loss of the second completion of a pass, or the gradient of all, nan in some optimizer steps, counted from 1."""
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
def test_an_update_that_is_not_finite_is_skipped_and_its_completions_are_named(tiny, monkeypatch, capsys, what):
    settings = tiny | dict(train_batch_size=8, dtype="float32", checkpoint_interval=1, keep_checkpoints=0, max_steps=3)
    poison(monkeypatch, {2}, what)
    run = train.main(**settings)
    rows = metrics_of(run)
    assert [row["policy/skipped_updates"] for row in rows] == [0, 1, 0]
    assert all(value is not None for row in rows for value in row.values())
    warning = next(line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    named = "[0-7]" if what == "loss" else "0, 1, 2, 3, 4, 5, 6, 7"  # a gradient is the sum of them all
    assert re.search(f"They had the step's completions {named} ", warning)
    before, skipped, after = (load_file(run / f"step_{step}/model.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not all(torch.equal(skipped[name], after[name]) for name in before)


def test_updates_that_stay_not_finite_stop_the_run_with_its_state_saved(tiny, monkeypatch, capsys):
    settings = tiny | dict(train_batch_size=8, max_steps=8, checkpoint_interval=100)
    with monkeypatch.context() as patch:
        poison(patch, set(range(3, 100)))
        with pytest.raises(TrainingError, match=r"^3 optimizer steps in a row.*--resume .*/run"):
            train.main(**settings | dict(max_skipped_updates=3))
    run = Path(settings["output"]) / "run"
    assert [path.name for path in checkpoints_of(run)] == ["step_5"] and damage(run / "step_5") is None
    train.main(resume=str(run))  # what was wrong is mended
    assert [row["policy/skipped_updates"] for row in metrics_of(run)] == [0, 0, 1, 1, 1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ memory


def too_large(size: int) -> None:
    """Ask for more memory than there is, as a pass over that many completions would."""
    if size > 2:
        torch.empty(2**62, dtype=torch.uint8)


def test_out_of_memory_while_sampling_halves_the_batch_and_changes_no_completion(tiny, monkeypatch, capsys):
    straight = train.main(**tiny | dict(run_name="straight", dtype="float32"))
    real = rollout.sample
    monkeypatch.setattr(
        rollout,
        "sample",
        lambda policy, prompts, group, **kw: (too_large(len(prompts) * group), real(policy, prompts, group, **kw))[1],
    )
    run = train.main(**tiny | dict(dtype="float32"))
    out = capsys.readouterr().out
    assert out.count("out of memory; goes on with") == 2  # 8, 4, 2: for good
    assert "goes on with 2 completions at once in place of 4" in out
    texts = lambda path: [row["completion"] for row in rollouts_of(path)]  # noqa: E731
    assert texts(run) == texts(straight)


def test_out_of_memory_in_the_update_halves_the_micro_batch_and_changes_no_result(tiny, monkeypatch, capsys):
    settings = tiny | dict(dtype="float32", kl_weight=0.1)
    straight = train.main(**settings | dict(run_name="straight"))
    real = train.completion_log_probs

    def log_probs(model, ids, mask, part, temperature):
        result = real(model, ids, mask, part, temperature)
        if torch.is_grad_enabled():
            too_large(len(part.rows))
        return result

    monkeypatch.setattr(train, "completion_log_probs", log_probs)
    run = train.main(**settings)
    assert "warning: out of memory; goes on with" in capsys.readouterr().out
    assert [row["policy/micro_batch_size"] for row in metrics_of(run)] == [2.0, 2.0]
    for row, expected in zip(without_times(metrics_of(run)), without_times(metrics_of(straight)), strict=True):
        for name in row.keys() - {"policy/micro_batch_size"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    weights, expected = (load_file(path / "step_2/model.safetensors") for path in (run, straight))
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=2e-3)  # AdamW: a sign is worth lr


def test_without_memory_for_a_single_completion_the_error_comes_through(tiny, monkeypatch):
    monkeypatch.setattr(rollout, "sample", lambda *args, **kwargs: torch.empty(2**62, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train.main(**tiny)


# ----------------------------------------------------------------------------------------------------------- scoring


def test_a_reward_model_that_fails_in_mid_run_is_neutral_and_counted(tiny, monkeypatch, capsys):
    real, calls = AceRewardModel._forward, []

    def forward(self, texts):
        calls.append(1)
        if len(calls) == 3:  # of the second step
            raise RuntimeError("the device is gone")
        return real(self, texts)

    monkeypatch.setattr(AceRewardModel, "_forward", forward)
    run = train.main(**tiny | dict(max_steps=3))
    assert "warning: the reward model failed on" in capsys.readouterr().out
    failed = [row["reward/rm_failed"] for row in metrics_of(run)]
    assert failed[0] == 0 and failed[1] == failed[2] > 0
    assert all(abs(row["n"] - 0.5) < 0.05 for row in rollouts_of(run) if row["step"] == 1)


def test_a_verifier_that_fails_on_a_completion_gives_it_no_advantage_and_is_counted(tiny, monkeypatch):
    from src import math_verifier

    real, bad = math_verifier.final_answer, []

    def final_answer(response, method, prompt=""):
        if not bad or response == bad[0]:  # the first completion of all, each time that it is judged
            bad[:] = [response]
            raise RecursionError("maximum recursion depth exceeded")
        return real(response, method, prompt)

    settings = tiny | dict(reward_mode="rm", max_steps=1)
    monkeypatch.setattr(
        train, "warn_of_unread_answers", lambda *args: monkeypatch.setattr(math_verifier, "final_answer", final_answer)
    )
    run = train.main(**settings)
    rows = rollouts_of(run)
    assert metrics_of(run)[0]["verifier/errors"] == 1
    assert abs(rows[0]["advantage"]) < 1e-6 < abs(rows[1]["advantage"])
    assert rows[0]["completion"] == bad[0] and rows[0]["correct"] is False
    assert sum(row["advantage"] for row in rows[:4]) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- security


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("flag", ["model_name", "reward_model_name"])
def test_a_model_folder_of_a_stranger_runs_no_code(tiny, policy_folder, reward_model_folder, tmp_path, flag):
    folder, trap = tmp_path / "model", tmp_path / "trap"
    shutil.copytree(policy_folder if flag == "model_name" else reward_model_folder, folder)
    # Pickled weights
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError):
        train.main(**tiny | {flag: str(folder), "reward_mode": "rm" if flag == "reward_model_name" else "hybrid"})
    assert not trap.exists()
    # Code of its own
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(InputError):
        train.main(**tiny | {flag: str(folder), "reward_mode": "rm" if flag == "reward_model_name" else "hybrid"})
    assert not trap.exists()


def test_a_checkpoint_holds_no_pickle_and_a_pickle_in_it_is_not_read(tiny, tmp_path):
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


def test_control_characters_reach_no_terminal_and_secrets_no_file(tiny, tmp_path, monkeypatch, capsys):
    secrets = {"HF_TOKEN": "hf_SECRETsecretSECRET", "WANDB_API_KEY": "0123456789SECRET0123456789abcdefabcdef01"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    data = tmp_path / "data.jsonl"
    problem = {"question": "What is \x1b[2J\x1b]0;title\x07 1 + 1?\u202e\r", "answer": "2"}
    data.write_text("".join(json.dumps(problem) + "\n" for _ in range(4)))
    run = train.main(**tiny | dict(data=str(data), verifier_method="strict"))
    out = capsys.readouterr().out
    assert "rollout q=" in out and "warning: not one of the" in out
    assert not set(out) & {"\x1b", "\x07", "\r", "\u202e"}
    for path in run.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in secrets.values()), path


# --------------------------------------------------------------------------------------------------- nothing stays behind


def children() -> set[str]:
    return {pid for thread in Path("/proc/self/task").iterdir() for pid in (thread / "children").read_text().split()}


def test_a_run_leaves_no_process_thread_handler_or_open_file_behind(tiny, monkeypatch):
    train.main(**tiny | dict(run_name="first"))  # what libraries open once stays open
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), children(), signal.getsignal(signal.SIGTERM)
    train.main(**tiny)
    before_update(monkeypatch, {3: lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        train.main(**tiny | dict(run_name="crash", max_steps=4))
    after = len(os.listdir("/proc/self/fd")), threading.active_count(), children(), signal.getsignal(signal.SIGTERM)
    assert after == before


def test_training_works_outside_of_the_main_thread(tiny):
    thread = threading.Thread(target=train.main, kwargs=tiny)
    thread.start()
    thread.join()
    assert len(metrics_of(Path(tiny["output"]) / "run")) == 2
