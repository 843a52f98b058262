"""How many threads compute on a CPU, how they wait for each other, and how long they waited for a core.

`src/__init__.py` calls `configure` before torch loads, because OpenMP reads its settings only once.
"""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
TASKS = Path("/proc/self/task")
# Variables with which users set the number of threads, or how threads wait.
COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SPIN_COUNT = "1000"  # less than 0.1 ms; sleeping at once made steps 17% slower on a virtual machine
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def configure() -> None:
    """Set what OpenMP reads when it loads, except what the user has set.

    - Threads that wait for others spin briefly, and then sleep. By default, GNU's OpenMP spins for many
      milliseconds. If another program uses one of the cores, that keeps the thread that is waited for from
      running, and a step takes up to twelve times as long (benchmarks/NOTES.md).
    - With a CPU quota, there is a thread for each core of the quota, not for each core of the machine.
    """
    if not any(name in os.environ for name in WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    count, _ = available()
    if not is_chosen() and count < cores():
        os.environ["OMP_NUM_THREADS"] = str(count)
        global limited
        limited = True


limited = False  # whether `configure` has set the number of threads


def is_chosen() -> bool:
    """Whether the user, or torchrun, has set the number of threads."""
    return not limited and any(name in os.environ for name in COUNT_VARIABLES)


def cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available() -> tuple[int, str]:
    """The number of threads that can run at the same time, and what limits it.

    The limit is that of the process's affinity and of the CPU quota of its containers. PyTorch does not know
    quotas: it starts a thread for every core, and they then take turns in a fraction of the time.
    """
    quota = cpu_quota()
    if quota is not None and quota < cores():
        return max(1, int(quota)), f"the CPU quota allows {quota:g} of {cores()} cores"
    return cores(), f"{cores()} cores"


def cpu_quota() -> float | None:
    """The smallest CPU quota, in cores, of this process's cgroups and their ancestors; None without one."""
    quotas = []
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS  # version 1 has a folder for each controller
        # Inside a container, the path may be that on the host. The container's own cgroup is then the root.
        for folder in (Path(path), *Path(path).parents):
            quotas.append(_quota_of(root / str(folder).lstrip("/"), version_1=bool(controllers)))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path, version_1: bool) -> float | None:
    try:
        if version_1:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # there is no such file, or no quota ("max")
        return None


def waited() -> float:
    """Seconds that this process's threads were ready to run but had no core so far; 0 if unknown."""
    try:
        delays = [int((task / "schedstat").read_text().split()[1]) for task in TASKS.iterdir()]
    except (OSError, ValueError, IndexError):  # not Linux, or a thread has just ended
        return 0.0
    return sum(delays) / 1e9


def waited_share(before: float, seconds: float) -> float:
    """The share of some seconds in which the threads waited for a core, as a mean over the threads.

    Args:
        before: `waited()` at the start of these seconds.
        seconds: How long ago that was.
    """
    count, _ = available()
    return max(waited() - before, 0.0) / (seconds * count)
