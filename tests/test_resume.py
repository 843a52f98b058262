"""A run that is stopped anywhere and resumed is the run that was never stopped: bit for bit on a CPU."""

import functools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

import train
from src import checkpoint
from src.checkpoint import checkpoints_of, damage, find_checkpoint, is_resumable
from src.errors import InputError
from tests import processes
from tests.conftest import as_flags
from tests.test_train import metrics_of, rollouts_of, without_times


@pytest.fixture(autouse=True)
def one_thread():
    """The tiny models need no more, and threads that wait for one another on a busy machine take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    """Ends a run at a place, as SIGKILL would: nothing of ours catches it."""


def kill_at(name: str, call: int, **settings) -> None:
    """Start a run that ends at the `call`-th call of a function of train.py."""
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
    """Everything in a checkpoint: tensors by file and name; what is in JSON."""
    folder = run / f"step_{step}"
    assert damage(folder) is None
    tensors = {f"{p.name}: {n}": t for p in sorted(folder.rglob("*.safetensors")) for n, t in load_file(p).items()}
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
    """A run with all there is to be carried over: a reward model, several epochs, held-out accuracy, KL, AdamW's moments."""
    return tiny | dict(
        reward_model_name=str(reward_model_folder), max_steps=7, rollouts_per_step=4, group_size=2, train_batch_size=4,
        checkpoint_interval=2, eval_data=tiny["data"], eval_interval=3, lr=1e-3, kl_weight=0.1, epochs_per_step=2, seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [dict(dtype="float32"), dict(dtype="bfloat16"), dict(dtype="bfloat16", lora_rank=2)])
def test_a_run_killed_in_mid_step_and_resumed_is_the_run_that_was_never_stopped(settings, kind):
    straight = train.main(**settings | kind | dict(run_name="straight"))
    killed = Path(settings["output"]) / "killed"
    kill_at("update", 4, **settings | kind | dict(run_name="killed"))
    if kind == dict(dtype="float32"):
        kill_at("score", 2, resume=str(killed))
        kill_at("answer", 2, resume=str(killed))
    for seeds in (random.seed, numpy.random.seed, torch.manual_seed):  # another process has other ones
        seeds(5)
    assert train.main(resume=str(killed)) == killed
    assert_same_run(straight, killed, 7)
    if "lora_rank" in kind:
        a, b = (load_file(run / "merged/model.safetensors") for run in (straight, killed))
        assert all(torch.equal(a[name], b[name]) for name in a)


def has_steps(run: Path, steps: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= steps


def flags_of(settings: dict) -> list[str]:
    return as_flags(settings | dict(dtype="float32"))


def test_sigkill_at_any_moment_also_while_a_checkpoint_is_written(settings, tmp_path):
    straight = train.main(**settings | dict(run_name="straight", dtype="float32"))
    killed, lines = Path(settings["output"]) / "killed", tmp_path / "lines"
    flags = flags_of(settings | dict(run_name="killed"))
    for moment in (slow_write, None, slow_write):
        process = processes.start(flags, lines, moment)
        if moment:  # half of the files are there
            processes.wait_for(lambda: list(killed.glob(".step_*.partial/training_state/weights.safetensors")))
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
    """Files of a checkpoint that take their time, so that a signal comes while they are written."""
    import time

    real = checkpoint.save_file

    def save_file(tensors, path):
        real(tensors, path)
        if "step_2" not in str(path) and "weights" in str(path):
            time.sleep(30)

    checkpoint.save_file = save_file


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_once_and_the_run_goes_on_exactly(settings, tmp_path, signum):
    straight = train.main(**settings | dict(run_name="straight", dtype="float32"))
    stopped, lines = Path(settings["output"]) / "stopped", tmp_path / "lines"
    lines.touch()
    process = processes.start(flags_of(settings | dict(run_name="stopped", checkpoint_interval=100)), lines, slow_rollout)
    processes.wait_for(lambda: "in the fourth rollout" in lines.read_text())
    os.kill(process.pid, signum)
    assert processes.finish(process, 20) == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum], lines.read_text()
    assert f"{signum.name}: saving; once more to end at once" in lines.read_text()
    assert "Traceback" not in lines.read_text()
    (saved,) = checkpoints_of(stopped)
    assert saved.name == "step_3" and damage(saved) is None
    train.main(resume=str(stopped), checkpoint_interval=2)
    assert_same_run(straight, stopped, 7)


def slow_rollout():
    """The fourth rollout takes a minute."""
    import time

    import train

    real, calls = train.roll_out, []

    def roll_out(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        if len(calls) == 4:
            print("in the fourth rollout", flush=True)
            time.sleep(60)
        return result

    train.roll_out = roll_out


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint_whole(settings, tmp_path):
    run, lines = Path(settings["output"]) / "run", tmp_path / "lines"
    process = processes.start(flags_of(settings), lines, slow_write)
    processes.wait_for(lambda: list(run.glob(".step_4.partial/training_state/weights.safetensors")))
    os.kill(process.pid, signal.SIGTERM)
    processes.wait_for(lambda: "SIGTERM: saving after this step" in lines.read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert processes.finish(process, 10) == 143
    assert [path.name for path in checkpoints_of(run)] == ["step_2"] and damage(run / "step_2") is None
    assert find_checkpoint(run) == (run, run / "step_2")


# ------------------------------------------------------------------------------------------- settings of a resumed run


@pytest.fixture
def done(tiny) -> Path:
    """A run of two steps."""
    return train.main(**tiny | dict(checkpoint_interval=1))


def test_the_runs_own_settings_count_whatever_the_defaults_are_and_what_is_given_is_printed_and_recorded(done, tiny, capsys):
    run = train.main(resume=str(done), max_steps=3, lr=1e-5)
    assert run == done and len(metrics_of(run)) == 3
    out = capsys.readouterr().out
    assert "its config.json decides, not main()'s defaults" in out and "group_size=4" in out
    assert "given anew: max_steps=3 in place of 2" in out and "given anew: lr=1e-05 in place of 5e-06" in out
    config = json.loads((run / "config.json").read_text())
    assert config["hyperparameters"]["lr"] == 1e-5 and config["hyperparameters"]["max_steps"] == 3
    (entry,) = config["resumed"]
    assert entry["step"] == 2 and entry["changed"] == {"max_steps": [2, 3], "lr": [5e-6, 1e-5]}
    assert metrics_of(run)[2]["optim/lr"] == 1e-5


def test_a_flag_that_repeats_a_default_counts_as_given(done, tmp_path):
    train.main(resume=str(done), lr=1e-4, max_steps=3)
    status, text = processes.run(["--resume", str(done), "--max-steps", "4", "--lr", "5e-6"], tmp_path / "lines")
    assert status == 0, text
    assert "given anew: lr=5e-06 in place of 0.0001" in text
    assert [row["optim/lr"] for row in metrics_of(done)] == [5e-6, 5e-6, 1e-4, 5e-6]


@pytest.mark.parametrize("change", [dict(seed=7), dict(lora_rank=2), dict(run_name="other"), dict(output="other")])
def test_what_cannot_change_is_refused_with_both_values(done, tiny, change):
    (name, value), *_ = change.items()
    old = {"seed": 42, "lora_rank": 0}.get(name, tiny.get(name))
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value}: cannot change in a resumed run .it has {old}.: "):
        train.main(resume=str(done), **change)


def test_a_data_file_that_has_changed_is_refused_unless_it_is_named_again(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny["data"], data)
    run = train.main(**tiny | dict(data=str(data)))
    data.write_text(data.read_text().replace("5 + 3", "5 + 4"))
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"--data .*data.jsonl: has changed since the run read it; put the old file back"):
        train.main(resume=str(run), max_steps=3)
    assert (run / "config.json").read_bytes() == before and len(metrics_of(run)) == 2
    train.main(resume=str(run), max_steps=3, data=str(data))
    assert len(metrics_of(run)) == 3


def test_a_run_goes_on_with_fewer_problems_and_then_without_naming_them(tiny, tmp_path, capsys):
    """What is left of an epoch counts into the old problems: it would lie outside of the new ones."""
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny["data"], data)
    run = train.main(**tiny | dict(data=str(data)))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    train.main(resume=str(run), max_steps=4, epochs=4, data=str(data))
    assert "done: 4 steps, the last 2 in " in capsys.readouterr().out
    train.main(resume=str(run), max_steps=5, epochs=5)
    asked = {row["question"] for row in rollouts_of(run) if row["step"] >= 2}
    assert len(metrics_of(run)) == 5 and asked <= {json.loads(line)["question"] for line in data.read_text().splitlines()}


def test_a_run_that_goes_on_without_its_reward_model_has_the_rewards_of_the_verifier_alone(tiny, reward_model_folder):
    run = train.main(**tiny | dict(reward_model_name=str(reward_model_folder)))
    assert json.loads((run / "step_2/training_state/state.json").read_text())["sigma_bar"]["count"] > 0
    train.main(resume=str(run), max_steps=3, reward_model_name="none")
    after = [row for row in rollouts_of(run) if row["step"] == 2]
    assert {row["r_hat"] for row in after} <= {-0.5, 0.5} and metrics_of(run)[2]["reward/sigma_bar"] == 0
    assert metrics_of(run)[1]["reward/rm_max"] != metrics_of(run)[2]["reward/rm_max"] == 0


def test_a_model_or_reward_model_that_has_changed_is_refused(tiny, policy_folder, reward_model_folder, tmp_path):
    model, reward_model = tmp_path / "model", tmp_path / "reward-model"
    shutil.copytree(policy_folder, model)
    shutil.copytree(reward_model_folder, reward_model)
    run = train.main(**tiny | dict(model_name=str(model), reward_model_name=str(reward_model)))
    (reward_model / "config.json").rename(reward_model / "config.json.away")
    with pytest.raises(InputError, match=r"had the reward model .*reward-model and would go on with none"):
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
    with pytest.raises(InputError, match=r"--resume .*(no run to continue|step_3 has no training state)"):
        train.main(resume=str(path))


def test_a_finished_run_resumes_to_its_end_and_fewer_steps_are_refused(done, capsys):
    rows = metrics_of(done)
    train.main(resume=str(done))
    assert metrics_of(done) == rows and "done: 2 steps" in capsys.readouterr().out
    with pytest.raises(InputError, match="has done 2 steps and is to have 1"):
        train.main(resume=str(done), max_steps=1)


def test_a_run_without_a_checkpoint_yet_begins_again_in_its_folder(tiny):
    straight = train.main(**tiny | dict(run_name="straight", max_steps=3))
    kill_at("update", 3, **tiny | dict(max_steps=3))
    run = train.main(resume=str(Path(tiny["output"]) / "run"))
    assert_same_run(straight, run, 3)


def test_weights_and_biases_goes_on_with_the_same_run(tiny, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train.main(**tiny | dict(wandb_project="test", max_steps=1))
    train.main(resume=str(run), max_steps=2)
    name = json.loads((run / "step_2/training_state/state.json").read_text())["wandb_id"]
    assert name and {path.stem.rsplit("-", 1)[1] for path in run.glob("wandb/offline-run-*/*.wandb")} == {name}


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_older_checkpoints_are_pruned_and_the_newest_two_can_be_resumed_from(tiny):
    run = train.main(**tiny | dict(max_steps=5, checkpoint_interval=1))
    assert [path.name for path in checkpoints_of(run)] == ["step_3", "step_4", "step_5"]
    assert [is_resumable(path) for path in checkpoints_of(run)] == [False, True, True]
    with pytest.raises(InputError, match="step_3 has no training state; only the newest 2 keep it"):
        train.main(resume=str(run / "step_3"))
    everything = train.main(**tiny | dict(max_steps=5, checkpoint_interval=1, keep_checkpoints=0, run_name="all"))
    assert len(checkpoints_of(everything)) == 5


def test_a_named_step_is_gone_back_to_and_later_ones_are_set_aside(tiny, capsys):
    run = train.main(**tiny | dict(max_steps=3, checkpoint_interval=1))
    straight = (run / "rollouts.jsonl").read_bytes()
    train.main(resume=str(run / "step_2"))
    assert (run / "rollouts.jsonl").read_bytes() == straight
    assert "step_3 is now step_3.abandoned" in capsys.readouterr().out
    assert damage(run / "step_3") is None


def test_which_checkpoint_is_the_newest_is_no_matter_of_clocks(tiny):
    run = train.main(**tiny | dict(max_steps=11, checkpoint_interval=1))
    for age, path in enumerate(checkpoints_of(run)):
        os.utime(path, (1e9 - age * 1e6,) * 2)
    assert find_checkpoint(run) == (run, run / "step_11")
