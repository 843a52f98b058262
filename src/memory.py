"""What the process does with memory."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # <malloc.h>


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of handing each back to the system; elsewhere, do nothing.

    By default every tensor of over 32 MB is mapped anew and its pages are zeroed and faulted in at their first touch. On a
    CPU that is a sixth of the update's time and most of the sampler's token choice (benchmarks/NOTES.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(M_TOP_PAD, 64 * 2**20)
