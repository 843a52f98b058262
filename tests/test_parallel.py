"""Two processes with gloo equal one: the same questions, completions, rewards and gradients."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from src import parallel, placement
from src.engine.rollout import batches
from src.errors import InputError
from src.run.checkpoint import find_damage
from tests.conftest import ROOT, as_flags
from tests.test_resume import assert_same_run, has_steps, one_thread  # noqa: F401 (a fixture)
from tests.test_train import metrics_of, rollouts_of, without_times
from tests.tools import processes


def join_group(rank: int, size: int, port: int, gradients: str) -> None:
    """Make this process one of several, as torchrun would, and save its first optimizer step's gradients.

    Args:
        gradients: Folder to save them in, as <size>-<rank>.safetensors.
    """
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")

    def save_gradients(optimizer, *_):
        path = Path(gradients) / f"{size}-{rank}.safetensors"
        if not path.exists():
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            save_file({str(i): p.grad.clone() for i, p in enumerate(weights)}, path)

    register_optimizer_step_pre_hook(save_gradients)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_two(flags: list[str], folder: Path) -> list:
    """Start a run of two processes."""
    port = free_port()
    joins = [functools.partial(join_group, rank, 2, port, str(folder)) for rank in (0, 1)]
    return [processes.start(flags, folder / f"lines-{rank}", join) for rank, join in enumerate(joins)]


def run_two(flags: list[str], folder: Path) -> list[str]:
    """Run two processes to their end, and return what each printed."""
    lines = []
    for rank, process in enumerate(start_two(flags, folder)):
        status, text = processes.finish(process), (folder / f"lines-{rank}").read_text()
        assert status == 0, text
        lines.append(text)
    return lines


@pytest.fixture
def settings(tiny, reward_model_folder) -> dict:
    """Without a GPU the device is left at auto. Each process then once took itself for the only one."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return tiny | dict(
        device="cpu" if has_gpu else "auto",
        reward_model_name=str(reward_model_folder), dtype="float32", rollouts_per_step=4, train_batch_size=8,
        max_steps=2, kl_weight=0.1, lr=1e-4, eval_data=tiny["data"],
    )  # fmt: skip


def test_two_processes_have_the_same_questions_rewards_and_gradient_as_one(settings, tmp_path):
    join = functools.partial(join_group, 0, 1, 0, str(tmp_path))
    one = processes.start(as_flags(settings | dict(run_name="one")), tmp_path / "lines", join)
    assert processes.finish(one) == 0, (tmp_path / "lines").read_text()
    first, second = run_two(as_flags(settings | dict(run_name="two")), tmp_path)
    assert "done: 2 steps" in first and second == ""  # only the first prints
    runs = [Path(settings["output"]) / name for name in ("one", "two")]
    assert sorted(path.name for path in runs[1].iterdir()) == sorted(path.name for path in runs[0].iterdir())

    single, *both = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    norm = sum(g.square().sum() for g in single.values()).sqrt()
    for gradients in both:
        error = sum((gradients[name] - g).square().sum() for name, g in single.items()).sqrt()
        assert norm > 0.1 and error / norm < 1e-5
    assert all(torch.equal(both[0][name], both[1][name]) for name in single)

    rows = [rollouts_of(run) for run in runs]
    assert len(rows[0]) == len(rows[1]) == 32
    for a, b in zip(*rows, strict=True):
        for name in a:
            number = isinstance(a[name], float)
            expected = pytest.approx(a[name], rel=1e-4, abs=1e-5) if number else a[name]
            assert b[name] == expected, name
    for a, b in zip(*(without_times(metrics_of(run)) for run in runs), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    weights = [load_file(run / "step_2/model.safetensors") for run in runs]
    for name in weights[0]:
        # AdamW's first steps have a size of about lr, so a tiny gradient of the other sign counts 2 lr.
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=4e-4)


@pytest.mark.slow
def test_two_processes_resume_exactly_and_both_skip_groups_without_an_advantage(settings, tmp_path):
    settings = settings | dict(kl_weight=0.0, reward_mode="verifier", max_steps=4, checkpoint_interval=2)
    run_two(as_flags(settings | dict(run_name="straight")), tmp_path)
    run_two(as_flags(settings | dict(run_name="parts", max_steps=2)), tmp_path)
    straight, parts = (Path(settings["output"]) / name for name in ("straight", "parts"))
    run_two(["--resume", str(parts), "--max-steps", "4"], tmp_path)
    both = (without_times(metrics_of(run), ("time/", "eval/")) for run in (straight, parts))
    a, b = ([row for row in rows if "policy/loss" in row] for rows in both)
    assert a == b
    assert rollouts_of(straight) == rollouts_of(parts)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(settings, tmp_path):
    endless = {k: v for k, v in settings.items() if k not in ("max_steps", "eval_data")} | {"epochs": 1000}
    run, both = Path(settings["output"]) / "run", start_two(as_flags(endless), tmp_path)
    processes.wait_for(lambda: has_steps(run, 2), 30)
    os.kill(both[1].pid, signal.SIGTERM)
    assert [processes.finish(process, 60) for process in both] == [143, 143]
    steps = len(metrics_of(run))
    assert find_damage(run / f"step_{steps}") is None


def test_a_crash_of_one_process_ends_all_of_them_with_its_message(settings, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "if os.environ['RANK'] == '1':\n"
        "    def decode(*args): raise RuntimeError('the second process crashes')\n"
        "    train.decode = decode\n"
        "train.cli()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--master-port", str(free_port()), program]
    command += as_flags(settings | dict(reward_model_name="none"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0
    assert "the second process crashes" in done.stderr
    assert time.monotonic() - started < 90


def test_a_number_of_processes_that_does_not_divide_the_questions_is_refused():
    placement.check_processes(4, 8)
    with pytest.raises(InputError, match="--rollouts-per-step 8: must be a multiple of the 3 processes"):
        placement.check_processes(3, 8)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5, 8, 100])
def test_batches_contain_each_completion_once_and_complete_groups_if_they_fit(at_once):
    prompts = [[i] for i in range(6)]
    rows = []
    for first, part, group in batches(prompts, slice(2, 5), 4, at_once):
        assert len(part) * group <= at_once
        assert group == 4 or at_once < 4
        for i, (prompt,) in enumerate(part):
            rows += [(first + i * 4 + j, prompt) for j in range(group)]
    assert rows == [(row, row // 4) for row in range(8, 20)]


def test_a_single_process_gets_everything():
    assert parallel.processes() == 1
    assert parallel.share(5) == slice(0, 5) and parallel.gather([1, 2]) == [1, 2]
