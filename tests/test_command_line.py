"""The commands as users type them, in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, as_flags, run_command


def test_a_whole_run_from_the_command_line(tiny):
    done = run_command("train.py", *as_flags(tiny), "--eval-data", tiny["data"], "--reward-scorer", "tanh")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^done: 2 steps in .* held-out accuracy .* see ", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout  # plain lines when piped
    run = Path(tiny["output"]) / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((run / "config.json").read_text())["hyperparameters"]["reward_scorer"] == "tanh"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--lr", "fast"], "lr"),
        (["--reward-scorer", "softmax"], "sigmoid"),
        (["--group-size", "2.5"], "group-size"),
    ],
)
def test_an_unknown_flag_or_a_wrong_type_fails_before_anything_loads(flags, message):
    done = run_command("train.py", *flags)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Loading" not in done.stdout and "Traceback" not in done.stderr


def test_bad_input_is_one_line_without_a_stack_trace():
    done = run_command("train.py", "--temperature", "0")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --temperature 0.0: must be")
    assert "Traceback" not in done.stderr and "Loading" not in done.stdout


def test_help_lists_every_hyperparameter():
    import inspect

    import train

    done = run_command("train.py", "--help")
    assert done.returncode == 0
    for name in inspect.signature(train.main).parameters:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_ctrl_c_in_mid_step_exits_130_and_leaves_whole_checkpoints(tiny, tmp_path):
    flags = as_flags({k: v for k, v in tiny.items() if k != "max_steps"} | {"epochs": 1000, "checkpoint_interval": 1})
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background of a shell ignores it
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("rollout") and len(list(tmp_path.glob("output/run/step_*"))) >= 2:
            break  # in mid-step: sampled, not yet updated
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted" in err
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoints = list(tmp_path.glob("output/run/step_*"))
    assert len(checkpoints) >= 2
    for folder in checkpoints:
        assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).num_parameters() > 0
        AutoTokenizer.from_pretrained(folder)
    for line in (tmp_path / "output/run/metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_test_setup_says_all_is_well_here():
    done = run_command("test_setup.py")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert all(line.startswith(("✓ ", "- skipped: ")) for line in lines[:-1])
    assert "all is well" in lines[-1]


def test_test_setup_full_loads_the_models(policy_folder, reward_model_folder):
    done = run_command(
        "test_setup.py", "--full", "--model-name", str(policy_folder), "--reward-model-name", str(reward_model_folder)
    )
    assert done.returncode == 0, done.stdout
    assert "✓ policy" in done.stdout and "✓ reward model" in done.stdout


def test_test_setup_exits_1_with_the_cure_when_something_is_missing(tmp_path):
    (tmp_path / "verl.py").write_text("raise ImportError('no module named ray')")
    done = run_command("test_setup.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert re.search(
        r"^✗ import verl: ImportError: no module named ray\n    cure: run: bash setup.sh$", done.stdout, re.MULTILINE
    )
    assert done.stdout.strip().endswith("1 problems")


# ------------------------------------------------------------------------------------------------------------ setup.sh


@pytest.fixture
def clone(tmp_path):
    """A copy of what setup.sh reads, so that it installs into another .venv than this one."""
    for name in ("setup.sh", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def setup_sh(folder, *arguments, path="", **environment):
    env = {k: v for k, v in os.environ.items() if k != "PYTHON"} | environment
    env["PATH"] = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(["bash", "setup.sh", *arguments], cwd=folder, capture_output=True, text=True, env=env, timeout=120)


def fake(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return str(folder)


def test_setup_refuses_a_python_out_of_range(clone):
    old = fake(clone / "bin", "python9", 'case "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac')
    done = setup_sh(clone, "true", PYTHON=f"{old}/python9")
    assert done.returncode == 1
    assert "Python 3.9.1; Python 3.10, 3.11 or 3.12 is needed" in done.stderr
    assert not (clone / ".venv").exists()


def test_setup_refuses_a_full_disk(clone):
    path = fake(clone / "bin", "df", "echo Filesystem 1024-blocks Used Available; echo /dev/x 100 100 1024000 100% /")
    done = setup_sh(clone, "true", path=path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "1000 MB are free" in done.stderr and "4 GB" in done.stderr
    assert not (clone / ".venv").exists()


def test_setup_without_a_network_says_so_and_does_not_count_as_installed(clone):
    offline = dict(PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_RETRIES="0")
    done = setup_sh(clone, "true", PYTHON=sys.executable, PIP_CONFIG_FILE=os.devnull, **offline)
    assert done.returncode == 1
    assert "No network or a proxy" in done.stderr
    assert not (clone / ".venv/.installed").exists()


def test_setup_runs_its_command_inside_the_environment_with_arguments_and_status_kept():
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("these tests were not started through setup.sh")
    done = setup_sh(ROOT, "python", "-c", "import sys; print(sys.prefix, sys.argv[1:]); sys.exit(7)", "a b", "*")
    assert done.returncode == 7
    assert done.stdout.strip() == f"{ROOT}/.venv ['a b', '*']"
