"""Run a command as on a processor without AVX-512 and AMX: python benchmarks/avx2.py COMMAND

For example, on a machine with AMX:

    python benchmarks/avx2.py python benchmarks/step.py --dtype float32

PyTorch, MKL and oneDNN are told to use only AVX2, and so is the compiler of the kernels. train.py and the
tests then choose float32 by themselves; benchmarks need `--dtype float32`. Processors that really lack
AVX-512 have other clock rates and caches. MKL_ENABLE_INSTRUCTIONS works only on Intel's processors.
"""

import os
import shlex
import shutil
import sys

from huggingface_hub import cached_assets_path

# AVX2 and what came with it. GCC's name of the first such processor.
ARCHITECTURE = "haswell"


def compiler() -> str:
    """The path of a script that compiles for AVX2 what it is asked to compile for this machine."""
    real = shutil.which(os.environ.get("CXX", "c++"))
    assert real, "needs a C++ compiler"
    script = cached_assets_path("hybrid-grpo", "benchmarks", "avx2") / "c++"
    script.write_text(f'#!/bin/bash\nexec {shlex.quote(real)} "${{@/-march=native/-march={ARCHITECTURE}}}"\n')
    script.chmod(0o755)
    return str(script)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    limits = dict(ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2", ONEDNN_MAX_CPU_ISA="AVX2")
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | limits | dict(CXX=compiler()))


if __name__ == "__main__":
    main()
