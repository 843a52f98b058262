"""Compile the C++ code in src/engine/native on first use, and call its functions.

The functions are called through ctypes, so compiling needs no headers and takes only seconds.
"""

import contextlib
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
OPTIONS = ["-O3", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
# A library like the kernels, for finding out which further options a compiler accepts.
PROBE = """
extern "C" int omp_get_max_threads();
extern "C" int probe(const int* x, int n) {
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += x[i];
#ifdef _OPENMP
    sum += omp_get_max_threads();
#endif
    return sum;
}
"""
TORCH_OPENMP = Path(torch.__file__).parent / "lib" / "libomp.dylib"  # PyTorch's own OpenMP on macOS
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
    # The kernels are compiled for this processor only, and machines with other processors may share the home
    # folder.
    key = [os.path.realpath(compiler), platform.machine(), _processor(), *OPTIONS, str(_alternatives())]
    key += [f.read_text() for f in sorted(SOURCES.iterdir())]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    try:
        folder = cached_assets_path("hybrid-grpo", "kernels", name)
        paths = {
            dtype: folder / f"{str(dtype).removeprefix('torch.')}.so"
            for dtype in (torch.float32, torch.bfloat16)
        }
        if not all(path.exists() for path in paths.values()):
            say("Compiling the CPU kernels (once, about 5 s)...")
            options = choose_options(compiler, folder)
            if "-fopenmp" not in options:
                say(f"{compiler} cannot use OpenMP here, so each kernel will use only one thread.")
            with ThreadPoolExecutor() as pool:
                list(pool.map(functools.partial(compile_kernels, compiler, options), paths, paths.values()))
        return {dtype: _load(path) for dtype, path in paths.items()}
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


def _alternatives() -> list[list[list[str]]]:
    """Groups of options. From each of them, `choose_options` takes the first that works, if any."""
    # For x86, -mcpu=native only tunes the code, and clang rejects it. For ARM, -march=native does not tune
    # the code, and older versions of clang reject it.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    processor = [["-march=native"]] if is_x86 else [["-mcpu=native"], ["-march=native"]]
    # By default, x86 compilers avoid 512-bit vectors.
    wide = [["-mprefer-vector-width=512"]] if is_x86 else []
    # Apple's compiler has no OpenMP runtime. Any other than PyTorch's would end the process, because two
    # runtimes of LLVM do not tolerate each other. The kernels' calls are resolved when they are loaded.
    on_mac = ["-Xclang", "-fopenmp", "-undefined", "dynamic_lookup"]
    parallel = on_mac if platform.system() == "Darwin" else ["-fopenmp"]
    return [
        processor,
        wide,
        # This keeps the order of a sum from depending on a memory address, which would make two runs differ
        # in their last bits.
        [["--param=vect-max-peeling-for-alignment=0"]],
        [parallel, ["-fopenmp-simd"]],
    ]


def choose_options(compiler: str, folder: Path) -> list[str]:
    """The options for compiling the kernels: `OPTIONS`, and those of `_alternatives` that work.

    Compilers differ in how they are told to use the machine's own processor and OpenMP, and some can't.

    Args:
        compiler: The path of a compiler.
        folder: A folder from which libraries can be loaded, for temporary files.
    """
    options = list(OPTIONS)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source = Path(temporary) / "probe.cpp"
        source.write_text(PROBE)
        for g, group in enumerate(_alternatives()):
            for c, candidate in enumerate(group):
                library = Path(temporary) / f"{g}-{c}.so"  # a loaded library must not be overwritten
                try:
                    _run_compiler(compiler, [*options, *candidate], [source], library)
                    _load(library)
                except OSError:
                    continue
                options += candidate
                break
    return options


def compile_kernels(compiler: str, options: list[str], dtype: torch.dtype, target: Path) -> None:
    """Compile the kernels for a dtype, unless `target` exists."""
    if target.exists():
        return
    define = ["-DBFLOAT16"] if dtype == torch.bfloat16 else []
    # Two runs may compile at once, so the library is renamed to its final name only when it is complete.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        _run_compiler(compiler, [*options, *define], sorted(SOURCES.glob("*.cpp")), temporary)
        temporary.rename(target)


def _run_compiler(compiler: str, options: list[str], sources: list[Path], target: Path) -> None:
    # Libraries come after the sources that need them.
    command = [compiler, *map(str, sources), *options, "-o", str(target)]
    result = subprocess.run(command, capture_output=True, timeout=300)
    if result.returncode != 0:
        raise OSError(result.stderr.decode(errors="replace"))


def _load(library: Path) -> ctypes.CDLL:
    if platform.system() == "Darwin":
        # Let the library find the OpenMP runtime that PyTorch has loaded, without loading a second one.
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(TORCH_OPENMP), mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
    return ctypes.CDLL(str(library))


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
