"""Compile the C++ code in src/engine/native on first use, and call its functions.

The functions are called through ctypes, so compiling needs no headers and takes only seconds.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path

from src.console import say

CPUINFO = Path("/proc/cpuinfo")
SOURCES = Path(__file__).parent / "native"
OPTIONS = [
    "-O3",
    "-march=native",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# By default, x86 compilers avoid 512-bit vectors. The second option keeps the order of a sum from depending
# on a memory address, which would make two runs differ in their last bits.
WIDE = ["-mprefer-vector-width=512", "--param=vect-max-peeling-for-alignment=0"]
Argument = torch.Tensor | ctypes.Structure | int | float | None  # what a C++ function accepts


@functools.lru_cache
def libraries() -> dict[torch.dtype, ctypes.CDLL] | None:
    """The compiled kernels: one library for models in float32, and one for models in bfloat16.

    They are compiled once for each machine and each version of the sources, and stored in the cache folder of
    the Hugging Face libraries. HYBRID_GRPO_KERNELS=0 disables them.

    Returns:
        The library for each dtype, or None if the kernels are disabled, there is no compiler, or compiling or
        loading fails.
    """
    compiler = _find_compiler()
    if compiler is None or os.environ.get("HYBRID_GRPO_KERNELS") == "0":
        return None
    files = sorted(SOURCES.iterdir())
    # -march=native compiles for this processor only, and machines with other processors may share the home
    # folder.
    key = [compiler, platform.machine(), _processor(), *OPTIONS, *(f.read_text() for f in files)]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    try:
        folder = cached_assets_path("hybrid-grpo", "kernels", name)
        paths = {
            dtype: folder / f"{str(dtype).removeprefix('torch.')}.so"
            for dtype in (torch.float32, torch.bfloat16)
        }
        if not all(path.exists() for path in paths.values()):
            say("Compiling the CPU kernels (once, about 5 s)...")
        with ThreadPoolExecutor() as pool:
            list(pool.map(functools.partial(_compile, compiler, files), paths, paths.values()))
        return {dtype: ctypes.CDLL(str(path)) for dtype, path in paths.items()}
    except (OSError, subprocess.SubprocessError):
        return None


def _find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def _processor() -> str:
    """The processor's model and features, as far as the system reports them."""
    try:
        if platform.system() == "Darwin":  # platform.processor() is "arm" for all of Apple's processors
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        lines = CPUINFO.read_text().splitlines()
    except (OSError, subprocess.SubprocessError):
        return platform.processor()
    # On x86, then on ARM, where each maker numbers its own parts.
    fields = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))


def _compile(compiler: str, files: list[Path], dtype: torch.dtype, target: Path) -> None:
    """Compile the kernels for a dtype, unless `target` exists."""
    if target.exists():
        return
    sources = [str(f) for f in files if f.suffix == ".cpp"]
    define = ["-DBFLOAT16"] if dtype == torch.bfloat16 else []
    # Two runs may compile at once, so the library is renamed to its final name only when it is complete.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        for options in (OPTIONS + WIDE, OPTIONS):
            command = [compiler, *options, *define, "-o", str(temporary), *sources]
            result = subprocess.run(command, capture_output=True, timeout=300)
            if result.returncode == 0:
                temporary.rename(target)
                return
    raise OSError(result.stderr.decode(errors="replace"))


def call(name: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a kernel.

    Args:
        name: The kernel's name.
        dtype: The model's compute dtype, which selects the library.
        arguments: Contiguous tensors on the CPU, integers (as int64), floats (as float32) and structs (by
            reference). None becomes a null pointer.
    """
    compiled = libraries()
    assert compiled is not None  # otherwise `llama.is_supported` would have returned False
    getattr(compiled[dtype], name)(*map(_to_ctypes, arguments))


def _to_ctypes(value: Argument) -> object:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous(), value.shape
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_void_p() if value is None else ctypes.c_int64(value)
