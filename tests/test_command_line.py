"""The commands as users type them, each in its own process."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from tests.conftest import ROOT, as_flags, run_command


def test_a_complete_run_from_the_command_line(tiny):
    done = run_command("train.py", *as_flags(tiny), "--eval-data", tiny["data"], "--reward-scorer", "tanh")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^done: 2 steps in .* held-out accuracy .* see ", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout  # a pipe gets plain lines
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
def test_an_unknown_flag_or_a_value_of_the_wrong_type_is_refused_before_anything_loads(flags, message):
    done = run_command("train.py", *flags)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Loading" not in done.stdout and "Traceback" not in done.stderr


def test_bad_input_prints_one_line_without_a_traceback():
    done = run_command("train.py", "--temperature", "0")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --temperature 0.0: must be")
    assert "Traceback" not in done.stderr and "Loading" not in done.stdout


def test_help_lists_every_hyperparameter():
    done = run_command("train.py", "--help")
    assert done.returncode == 0
    for name in inspect.signature(train.main).parameters:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_ctrl_c_during_a_step_exits_with_130_and_leaves_complete_checkpoints(tiny, tmp_path):
    endless = {k: v for k, v in tiny.items() if k != "max_steps"} | {"epochs": 1000, "checkpoint_interval": 1}
    process = subprocess.Popen(
        [sys.executable, "train.py", *as_flags(endless)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Tests that run in the background of a shell inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("rollout") and len(list(tmp_path.glob("output/run/step_*"))) >= 2:
            break  # during a step: sampled, but not yet updated
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted" in err
    checkpoints = list(tmp_path.glob("output/run/step_*"))
    assert len(checkpoints) >= 2
    for folder in checkpoints:
        assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).num_parameters() > 0
        AutoTokenizer.from_pretrained(folder)
    for line in (tmp_path / "output/run/metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_test_setup_passes_on_this_machine():
    done = run_command("test_setup.py")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert all(line.startswith(("✓ ", "- skipped: ")) for line in lines[:-1])
    assert "all is well" in lines[-1]


def test_test_setup_full_loads_the_models(policy_folder, reward_model_folder):
    models = dict(model_name=policy_folder, reward_model_name=reward_model_folder)
    done = run_command("test_setup.py", "--full", *as_flags(models))
    assert done.returncode == 0, done.stdout
    assert "✓ policy" in done.stdout and "✓ reward model" in done.stdout


def test_test_setup_exits_with_1_and_names_the_cure_if_something_is_missing(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('no module named sentry')")
    done = run_command("test_setup.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    failure = r"^✗ import wandb: ImportError: no module named sentry\n    cure: run: bash setup.sh$"
    assert re.search(failure, done.stdout, re.MULTILINE)
    assert done.stdout.strip().endswith("1 problems")


# ------------------------------------------------------------------------------------------------ setup.sh


@pytest.fixture
def clone(tmp_path):
    """A copy of the files that setup.sh reads, so that it does not install into the .venv in use."""
    for name in ("setup.sh", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def setup_sh(folder, *arguments, path="", **environment):
    env = {k: v for k, v in os.environ.items() if k != "PYTHON"} | environment
    env["PATH"] = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        ["bash", "setup.sh", *arguments], cwd=folder, capture_output=True, text=True, env=env, timeout=120
    )


def fake(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return str(folder)


def test_setup_refuses_an_unsupported_python(clone):
    old = fake(clone / "bin", "python9", 'case "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac')
    done = setup_sh(clone, "true", PYTHON=f"{old}/python9")
    assert done.returncode == 1
    assert "Python 3.9.1; Python 3.10 to 3.14 is needed" in done.stderr
    assert not (clone / ".venv").exists()


def test_setup_refuses_a_full_disk(clone):
    script = "echo Filesystem 1024-blocks Used Available; echo /dev/x 100 100 1024000 100% /"
    path = fake(clone / "bin", "df", script)
    done = setup_sh(clone, "true", path=path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "1000 MB are free" in done.stderr and "4 GB" in done.stderr
    assert not (clone / ".venv").exists()


def test_setup_without_a_network_fails_and_does_not_count_as_installed(clone):
    offline = dict(
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_RETRIES="0"
    )
    done = setup_sh(clone, "true", PYTHON=sys.executable, PIP_CONFIG_FILE=os.devnull, **offline)
    assert done.returncode == 1
    assert "No network or a proxy" in done.stderr
    assert not (clone / ".venv/.installed").exists()


def test_setup_runs_a_command_in_its_environment_and_keeps_arguments_and_status():
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("these tests were not started through setup.sh")
    program = "import sys; print(sys.prefix, sys.argv[1:]); sys.exit(7)"
    done = setup_sh(ROOT, "python", "-c", program, "a b", "*")
    assert done.returncode == 7
    assert done.stdout.strip() == f"{ROOT}/.venv ['a b', '*']"
