"""The number of threads, how they wait, and how long they waited for a core."""

import json
import os
import subprocess
import sys
import time

import pytest

from src import console_lines, threads
from tests.conftest import ROOT


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A made-up tree of cgroups, with the process in the given one."""

    def make(line: str, files: dict[str, str]):
        monkeypatch.setattr(threads, "CGROUPS", tmp_path)
        monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")
        (tmp_path / "own").write_text(line + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return make


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1.0),
        ("0::/on/the/host", {"cpu.max": "50000 100000"}, 0.5),
        ("4:memory:/x", {"cpu.max": "50000 100000"}, None),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "20000", "cpu/a/cpu.cfs_period_us": "10000"}, 2.0),
        ("1:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "90000",
                             "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0.9),
    ],
)  # fmt: skip
def test_the_quota_is_the_smallest_of_all_cgroups_above_the_process(cgroups, monkeypatch, line, files, quota):
    cgroups(line, files)
    assert threads.cpu_quota() == quota
    monkeypatch.setattr(threads, "cores", lambda: 4)
    count, why = threads.available()
    assert count == (4 if quota is None else max(1, int(quota)))
    assert ("quota" in why) == (quota is not None)


def test_without_cgroups_there_is_no_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "missing")
    assert threads.cpu_quota() is None


def configured(**environment) -> dict[str, str | None]:
    """The variables that torch finds when it loads after src."""
    names = (*threads.COUNT_VARIABLES, *threads.WAITING_VARIABLES)
    code = f"import src, json, os; print(json.dumps({{n: os.environ.get(n) for n in {names}}}))"
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_threads_spin_only_briefly_unless_the_user_says_how_they_wait():
    assert configured()["GOMP_SPINCOUNT"] == "1000"
    assert configured(OMP_WAIT_POLICY="ACTIVE")["GOMP_SPINCOUNT"] is None
    assert configured(GOMP_SPINCOUNT="7")["GOMP_SPINCOUNT"] == "7"
    assert configured(OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"


def test_train_py_imports_src_before_torch():
    """OpenMP reads its settings when torch loads. torch.compile's compiler, which takes a second, waits."""
    code = (
        "import sys, builtins\n"
        "original = builtins.__import__\n"
        "def note(name, *a, **k):\n"
        "    if name in ('src', 'torch') and not seen.get(name):\n"
        "        seen[name] = True\n"
        "        print(name)\n"
        "    return original(name, *a, **k)\n"
        "seen = {}\n"
        "builtins.__import__ = note\n"
        "import train\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[:2] == ["src", "torch"], done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_time_without_a_core_is_counted():
    """Two programs share one core, so each waits about half of the time."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", code])
    script = (
        "import os, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from src import threads\n"
        "before, started = threads.waited(), time.perf_counter()\n"
        "while time.perf_counter() < started + 1: pass\n"
        "print(threads.waited_share(before, time.perf_counter() - started))\n"
    )
    try:
        time.sleep(0.2)
        share = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        ).stdout
    finally:
        other.kill()
        other.wait()
    if float(share) == 0:
        pytest.skip("this system does not tell how long threads wait (/proc/self/task/*/schedstat)")
    assert float(share) > 0.2


def test_a_run_says_once_that_other_programs_use_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(console_lines, "_said_crowded", False)
    for share, seconds in ((0.5, 1.0), (0.1, 9.0)):
        console_lines.warn_if_crowded(1, {"time/cpu_wait_frac": share, "time/step_s": seconds})
    assert capsys.readouterr().out == ""
    for step in (2, 3):
        console_lines.warn_if_crowded(step, {"time/cpu_wait_frac": 0.4, "time/step_s": 9.0})
    assert capsys.readouterr().out.startswith("warning: other programs kept the CPU busy in 40% of step 2;")
