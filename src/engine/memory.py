"""Memory at run time: how much is free, smaller batches if it runs out, and reuse of freed blocks."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from src.console import warn
from src.engine import static_decoder

T = TypeVar("T")

# What CUDA's libraries say when they cannot allocate memory of their own.
OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA driver error: out of memory",
)
CGROUP = Path("/sys/fs/cgroup")  # this process's cgroup, as containers mount it
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # <malloc.h>


class BatchSize:
    """The number of completions in a batch. It is halved whenever memory runs out, and never raised again."""

    def __init__(self, size: int):
        self.size = size

    def fit(self, compute: Callable[[int], T]) -> T:
        """Run compute(size) with `fit_memory`, and remember the size that worked."""
        result, self.size = fit_memory(compute, self.size)
        return result


def fit_memory(compute: Callable[[int], T], size: int) -> tuple[T, int]:
    """Run compute(size), and halve the size each time memory runs out.

    Args:
        size: Number of completions to process at once.

    Returns:
        The result, and the size that worked.

    Raises:
        RuntimeError: Memory runs out even for a single completion, or `compute` fails for another reason.
    """
    while True:
        try:
            return compute(size), size
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # This is outside the handler, because its traceback would keep the failed attempt's tensors alive.
        static_decoder.release()  # frees the decoder's cache, which is as large as the failed batch
        clear_device_cache(garbage_collection=True)
        warn(f"out of memory; retrying with {size // 2} completions at a time instead of {size}")
        size //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in OUT_OF_MEMORY)


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate on a device; on the CPU, within its container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or no limit ("max")
        limit, used = (float((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as free, because the system drops them when memory is needed.
        files = float(stat["active_file"]) + float(stat["inactive_file"])
        free = min(free, limit - used + files)
    return free


def bound_product_cache() -> None:
    """Let oneDNN cache 256 compiled matrix products instead of 1,024. Call this before the first product.

    Each one takes 0.6 MB, and training keeps producing new shapes, so with 1,024 of them a run on a CPU would
    grow by half a GB in its first hundred steps. A single pass has fewer than a hundred shapes. If
    ONEDNN_PRIMITIVE_CACHE_CAPACITY is set, it takes precedence.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each one to the system. Without glibc, do nothing.

    By default, every tensor over 32 MB is mapped afresh, and its pages are zeroed and faulted in on first
    touch. On a CPU, that takes a sixth of the update's time, and most of the time in which the sampler
    chooses tokens (benchmarks/NOTES.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim
    libc.mallopt(M_TOP_PAD, 64 * 2**20)
