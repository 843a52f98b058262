"""A run that is stopped anywhere and resumed equals an uninterrupted run, on a CPU bit for bit."""

import functools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from src.errors import InputError
from src.run import checkpoint
from src.run.checkpoint import checkpoints_of, find_checkpoint, find_damage, is_resumable
from tests.conftest import as_flags
from tests.test_train import metrics_of, rollouts_of, without_times
from tests.tools import processes


@pytest.fixture(autouse=True)
def one_thread():
    """The tiny models need no more, and on a busy machine several threads take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    """Ends a run at some point as SIGKILL would: nothing in the project catches it."""


def kill_at(name: str, call: int, **settings) -> None:
    """Run train.main() until a function of train.py is called for the `call`-th time."""
    real, calls = getattr(train, name), []

    def function(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed(name)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, function)
        with pytest.raises(Killed):
            train.main(**settings)


def state_of(run: Path, step: int) -> tuple[dict, dict]:
    """Everything in a checkpoint: its tensors by file and name, and its JSON."""
    folder = run / f"step_{step}"
    assert find_damage(folder) is None
    files = sorted(folder.rglob("*.safetensors"))
    tensors = {f"{file.name}: {name}": t for file in files for name, t in load_file(file).items()}
    progress = json.loads((folder / "training_state/state.json").read_text())
    progress.pop("written")  # the times in metrics.jsonl have more or fewer digits
    return tensors, progress


def assert_same_run(a: Path, b: Path, step: int) -> None:
    assert without_times(metrics_of(a)) == without_times(metrics_of(b))
    assert (a / "rollouts.jsonl").read_bytes() == (b / "rollouts.jsonl").read_bytes()
    (tensors_a, progress_a), (tensors_b, progress_b) = state_of(a, step), state_of(b, step)
    assert progress_a == progress_b
    assert tensors_a.keys() == tensors_b.keys() and len(tensors_a) > 50
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name


@pytest.fixture
def settings(tiny, reward_model_folder) -> dict:
    """A run with everything that must survive: reward model, epochs, evaluation, KL, AdamW's moments."""
    return tiny | dict(
        reward_model_name=str(reward_model_folder), max_steps=7, rollouts_per_step=4, group_size=2,
        train_batch_size=4, checkpoint_interval=2, eval_data=tiny["data"], eval_interval=3, lr=1e-3,
        kl_weight=0.1, epochs_per_step=2, seed=3,
    )  # fmt: skip


KINDS = [dict(dtype="float32"), dict(dtype="bfloat16"), dict(dtype="bfloat16", lora_rank=2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_during_a_step_and_resumed_equals_an_uninterrupted_run(settings, kind):
    straight = train.main(**settings | kind | dict(run_name="straight"))
    killed = Path(settings["output"]) / "killed"
    kill_at("update", 4, **settings | kind | dict(run_name="killed"))
    if kind == dict(dtype="float32"):
        kill_at("score", 2, resume=str(killed))
        kill_at("evaluate", 2, resume=str(killed))
    for set_seed in (random.seed, numpy.random.seed, torch.manual_seed):  # as in a new process
        set_seed(5)
    assert train.main(resume=str(killed)) == killed
    assert_same_run(straight, killed, 7)
    if "lora_rank" in kind:
        a, b = (load_file(run / "merged/model.safetensors") for run in (straight, killed))
        assert all(torch.equal(a[name], b[name]) for name in a)


def has_steps(run: Path, steps: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= steps


def flags_of(settings: dict) -> list[str]:
    return as_flags(settings | dict(dtype="float32"))


def test_a_run_survives_sigkill_even_while_it_writes_a_checkpoint(settings, tmp_path):
    straight = train.main(**settings | dict(run_name="straight", dtype="float32"))
    killed, lines = Path(settings["output"]) / "killed", tmp_path / "lines"
    flags = flags_of(settings | dict(run_name="killed"))
    half_written = ".step_*.partial/training_state/weights.safetensors"
    for inject in (slow_write, None, slow_write):
        process = processes.start(flags, lines, inject)
        if inject:
            processes.wait_for(lambda: list(killed.glob(half_written)))
        else:
            wanted = len(metrics_of(killed)) + 2
            processes.wait_for(functools.partial(has_steps, killed, wanted))
        process.kill()
        assert processes.finish(process) == -signal.SIGKILL
        flags = ["--resume", str(killed)]
    status, text = processes.run(flags, lines)
    assert status == 0, text
    assert_same_run(straight, killed, 7)
    assert not list(killed.glob(".*"))


def slow_write():
    """Make checkpoints slow to write, so that a signal comes while one is being written."""
    real = checkpoint.save_file

    def save_file(tensors, path):
        real(tensors, path)
        if "step_2" not in str(path) and "weights" in str(path):
            time.sleep(30)

    checkpoint.save_file = save_file


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_immediately_and_the_run_resumes_exactly(settings, tmp_path, signum):
    straight = train.main(**settings | dict(run_name="straight", dtype="float32"))
    stopped, lines = Path(settings["output"]) / "stopped", tmp_path / "lines"
    lines.touch()
    flags = flags_of(settings | dict(run_name="stopped", checkpoint_interval=100))
    process = processes.start(flags, lines, slow_rollout)
    processes.wait_for(lambda: "in the fourth rollout" in lines.read_text())
    os.kill(process.pid, signum)
    status = processes.finish(process, 20)
    assert status == 128 + signum, lines.read_text()
    assert f"{signum.name}: saving; send it again to exit immediately" in lines.read_text()
    assert "Traceback" not in lines.read_text()
    (saved,) = checkpoints_of(stopped)
    assert saved.name == "step_3" and find_damage(saved) is None
    train.main(resume=str(stopped), checkpoint_interval=2)
    assert_same_run(straight, stopped, 7)


def slow_rollout():
    """Make the fourth rollout take a minute."""
    real, calls = train.roll_out, []

    def roll_out(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        if len(calls) == 4:
            print("in the fourth rollout", flush=True)
            time.sleep(60)
        return result

    train.roll_out = roll_out


def test_a_second_signal_exits_immediately_and_leaves_the_last_checkpoint_complete(settings, tmp_path):
    run, lines = Path(settings["output"]) / "run", tmp_path / "lines"
    process = processes.start(flags_of(settings), lines, slow_write)
    processes.wait_for(lambda: list(run.glob(".step_4.partial/training_state/weights.safetensors")))
    os.kill(process.pid, signal.SIGTERM)
    processes.wait_for(lambda: "SIGTERM: saving after this step" in lines.read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert processes.finish(process, 10) == 143
    assert [path.name for path in checkpoints_of(run)] == ["step_2"] and find_damage(run / "step_2") is None
    assert find_checkpoint(run) == (run, run / "step_2")


# ------------------------------------------------------------------------------- settings of a resumed run


@pytest.fixture
def done(tiny) -> Path:
    """A run of two steps."""
    return train.main(**tiny | dict(checkpoint_interval=1))


def test_a_resumed_run_keeps_its_settings_and_prints_and_records_changes(done, tiny, capsys):
    run = train.main(resume=str(done), max_steps=3, lr=1e-5)
    assert run == done and len(metrics_of(run)) == 3
    out = capsys.readouterr().out
    assert "with the settings in its config.json, not main()'s defaults" in out and "group_size=4" in out
    assert "changed: max_steps=3 instead of 2" in out and "changed: lr=1e-05 instead of 5e-06" in out
    config = json.loads((run / "config.json").read_text())
    assert config["hyperparameters"]["lr"] == 1e-5 and config["hyperparameters"]["max_steps"] == 3
    (entry,) = config["resumed"]
    assert entry["step"] == 2 and entry["changed"] == {"max_steps": [2, 3], "lr": [5e-6, 1e-5]}
    assert metrics_of(run)[2]["optim/lr"] == 1e-5


def test_a_flag_that_repeats_a_default_still_replaces_the_saved_value(done, tmp_path):
    train.main(resume=str(done), lr=1e-4, max_steps=3)
    flags = ["--resume", str(done), "--max-steps", "4", "--lr", "5e-6"]
    status, text = processes.run(flags, tmp_path / "lines")
    assert status == 0, text
    assert "changed: lr=5e-06 instead of 0.0001" in text
    assert [row["optim/lr"] for row in metrics_of(done)] == [5e-6, 5e-6, 1e-4, 5e-6]


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 7), ("lora_rank", 2), ("run_name", "other"), ("output", "other")]
)
def test_a_setting_that_cannot_change_is_refused_with_both_values(done, tiny, name, value):
    old = {"seed": 42, "lora_rank": 0}.get(name, tiny.get(name))
    flag = f"--{name.replace('_', '-')}"
    message = f"{flag} {value}: cannot change in a resumed run, which has {old}: "
    with pytest.raises(InputError, match=message):
        train.main(resume=str(done), **{name: value})


def test_a_changed_data_file_is_refused_unless_it_is_passed_again(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny["data"], data)
    run = train.main(**tiny | dict(data=str(data)))
    data.write_text(data.read_text().replace("5 + 3", "5 + 4"))
    before = (run / "config.json").read_bytes()
    message = r"--data .*data.jsonl: has changed since the run read it; restore the old file"
    with pytest.raises(InputError, match=message):
        train.main(resume=str(run), max_steps=3)
    assert (run / "config.json").read_bytes() == before and len(metrics_of(run)) == 2
    train.main(resume=str(run), max_steps=3, data=str(data))
    assert len(metrics_of(run)) == 3


def test_a_run_continues_with_fewer_problems_which_need_to_be_passed_only_once(tiny, tmp_path, capsys):
    """The rest of the epoch is saved as indices of the old problems, which may exceed the new number."""
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny["data"], data)
    run = train.main(**tiny | dict(data=str(data)))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    train.main(resume=str(run), max_steps=4, epochs=4, data=str(data))
    assert "done: 4 steps, the last 2 in " in capsys.readouterr().out
    train.main(resume=str(run), max_steps=5, epochs=5)
    asked = {row["question"] for row in rollouts_of(run) if row["step"] >= 2}
    questions = {json.loads(line)["question"] for line in data.read_text().splitlines()}
    assert len(metrics_of(run)) == 5 and asked <= questions


def test_a_run_resumed_without_its_reward_model_uses_only_the_verifier(tiny, reward_model_folder):
    run = train.main(**tiny | dict(reward_model_name=str(reward_model_folder)))
    assert json.loads((run / "step_2/training_state/state.json").read_text())["sigma_bar"]["count"] > 0
    train.main(resume=str(run), max_steps=3, reward_model_name="none")
    after = [row for row in rollouts_of(run) if row["step"] == 2]
    assert {row["r_hat"] for row in after} <= {-0.5, 0.5} and metrics_of(run)[2]["reward/sigma_bar"] == 0
    assert metrics_of(run)[1]["reward/rm_max"] != metrics_of(run)[2]["reward/rm_max"] == 0


def test_a_changed_model_or_reward_model_is_refused(tiny, policy_folder, reward_model_folder, tmp_path):
    model, reward_model = tmp_path / "model", tmp_path / "reward-model"
    shutil.copytree(policy_folder, model)
    shutil.copytree(reward_model_folder, reward_model)
    run = train.main(**tiny | dict(model_name=str(model), reward_model_name=str(reward_model)))
    (reward_model / "config.json").rename(reward_model / "config.json.away")
    with pytest.raises(InputError, match=r"had the reward model .*reward-model and would continue with none"):
        train.main(resume=str(run), max_steps=3)
    train.main(resume=str(run), max_steps=3, reward_model_name="none")
    assert {row["rm_score"] for row in rollouts_of(run)[-8:]} == {0.0}
    shutil.rmtree(model)
    shutil.copytree(run / "step_3", model)
    with pytest.raises(InputError, match="the model has changed since the run began"):
        train.main(resume=str(run), max_steps=4)


@pytest.mark.parametrize("where", ["nothing", "step_3"])
def test_a_folder_without_a_run_is_refused(done, tmp_path, where):
    path = tmp_path / "nothing" if where == "nothing" else done / "step_3"
    message = r"--resume .*(there is no run to resume|step_3 has no training state)"
    with pytest.raises(InputError, match=message):
        train.main(resume=str(path))


def test_resuming_a_finished_run_changes_nothing_and_fewer_steps_are_refused(done, capsys):
    rows = metrics_of(done)
    train.main(resume=str(done))
    assert metrics_of(done) == rows and "done: 2 steps" in capsys.readouterr().out
    with pytest.raises(InputError, match="has done 2 steps, but is now limited to 1"):
        train.main(resume=str(done), max_steps=1)


def test_a_run_without_a_checkpoint_restarts_in_its_folder(tiny):
    straight = train.main(**tiny | dict(run_name="straight", max_steps=3))
    kill_at("update", 3, **tiny | dict(max_steps=3))
    run = train.main(resume=str(Path(tiny["output"]) / "run"))
    assert_same_run(straight, run, 3)


def test_a_resumed_run_continues_its_weights_and_biases_run(tiny, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train.main(**tiny | dict(wandb_project="test", max_steps=1))
    train.main(resume=str(run), max_steps=2)
    name = json.loads((run / "step_2/training_state/state.json").read_text())["wandb_id"]
    files = run.glob("wandb/offline-run-*/*.wandb")
    assert name and {path.stem.rsplit("-", 1)[1] for path in files} == {name}


# --------------------------------------------------------------------------------------------- checkpoints


def test_older_checkpoints_are_deleted_and_the_newest_two_can_be_resumed_from(tiny):
    settings = tiny | dict(max_steps=5, checkpoint_interval=1)
    run = train.main(**settings)
    assert [path.name for path in checkpoints_of(run)] == ["step_3", "step_4", "step_5"]
    assert [is_resumable(path) for path in checkpoints_of(run)] == [False, True, True]
    with pytest.raises(InputError, match="step_3 has no training state; only the newest 2 have one"):
        train.main(resume=str(run / "step_3"))
    everything = train.main(**settings | dict(keep_checkpoints=0, run_name="all"))
    assert len(checkpoints_of(everything)) == 5


def test_a_run_can_return_to_an_earlier_step_and_renames_later_checkpoints(tiny, capsys):
    run = train.main(**tiny | dict(max_steps=3, checkpoint_interval=1))
    straight = (run / "rollouts.jsonl").read_bytes()
    train.main(resume=str(run / "step_2"))
    assert (run / "rollouts.jsonl").read_bytes() == straight
    assert "step_3 is now step_3.abandoned" in capsys.readouterr().out
    assert find_damage(run / "step_3") is None


def test_step_numbers_and_not_clocks_decide_which_checkpoint_is_the_newest(tiny):
    run = train.main(**tiny | dict(max_steps=11, checkpoint_interval=1))
    for age, path in enumerate(checkpoints_of(run)):
        os.utime(path, (1e9 - age * 1e6,) * 2)
    assert find_checkpoint(run) == (run, run / "step_11")


def test_a_run_can_continue_on_another_kind_of_device(tiny, capsys):
    """A GPU's generator has a state of 16 bytes, a CPU's of 5,056."""
    run = train.main(**tiny | dict(max_steps=2, checkpoint_interval=1))
    path = run / "step_1/training_state/randomness.safetensors"
    states = load_file(path)
    states["generator.sample"] = torch.zeros(16, dtype=torch.uint8)
    save_file(states, path)
    sums = path.parent / "complete.json"
    listed = json.loads(sums.read_text())
    listed["training_state/randomness.safetensors"] = checkpoint._sum(path)
    sums.write_text(json.dumps(listed))
    train.main(resume=str(run / "step_1"))
    assert "began on another kind of device" in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_says_if_the_number_of_threads_has_changed(tiny, capsys):
    run = train.main(**tiny | dict(max_steps=1))
    assert json.loads((run / "config.json").read_text())["threads"] == 1
    torch.set_num_threads(2)
    train.main(resume=str(run), max_steps=2)
    assert "threads: 2 instead of 1" in capsys.readouterr().out
    torch.set_num_threads(1)
    train.main(resume=str(run), max_steps=3)
    assert "instead of" not in capsys.readouterr().out.replace("max_steps=3 instead of 2", "")
