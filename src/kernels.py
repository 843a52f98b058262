"""What a Llama-like model does on a CPU between its matrix products, compiled from src/native on first use.

PyTorch's own operations walk memory once for each elementary step, and a decode step of 64 rows is made of 1,500 of them: half of
its time. The C++ here makes one pass of several steps (a residual sum with its norm, a whole attention of one token) and takes
the machine's vectors. It is called through ctypes, so it needs a compiler but no headers, and compiles in seconds; without a
compiler everything runs on the general path (`llama.fits`), more slowly.
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

SOURCES = Path(__file__).parent / "native"
HEAD_SIZES = (16, 32, 64, 96, 128)  # that attention.cpp is compiled for
ABSENT = (
    "no C++ compiler on this machine, so training on the CPU takes about twice as long; install one "
    "(Debian, Ubuntu: apt-get install g++)"
)
Argument = torch.Tensor | ctypes.Structure | int | float | None  # of a kernel
LANES = 16  # columns of a block of keys, as in attention.cpp
OPTIONS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
# x86 compilers hold back otherwise; and no sum may begin where an address says, or two runs would differ in their last bits.
WIDE = ["-mprefer-vector-width=512", "--param=vect-max-peeling-for-alignment=0"]


@functools.lru_cache
def libraries() -> dict[torch.dtype, ctypes.CDLL] | None:
    """The kernels for models that compute in float32 and in bfloat16; None where there is no compiler, or no use of its result.

    Compiled once for each machine and version of the sources, into the cache folder of the Hugging Face libraries.
    HYBRID_GRPO_KERNELS=0 does without.
    """
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)
    if compiler is None or os.environ.get("HYBRID_GRPO_KERNELS") == "0":
        return None
    files = sorted(SOURCES.iterdir())
    # -march=native makes code for this processor alone, and a home folder may be seen by several.
    about = [compiler, platform.machine(), _processor(), *OPTIONS, *(f.read_text() for f in files)]
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()[:16]
    try:
        folder = cached_assets_path("hybrid-grpo", "kernels", name)
        compiled = {dtype: folder / f"{str(dtype).removeprefix('torch.')}.so" for dtype in (torch.float32, torch.bfloat16)}
        if not all(path.exists() for path in compiled.values()):
            say("Compiling the CPU kernels (once, about 5 s)...")
        with ThreadPoolExecutor() as pool:
            list(pool.map(functools.partial(_compile, compiler, files), compiled, compiled.values()))
        return {dtype: ctypes.CDLL(str(path)) for dtype, path in compiled.items()}
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """Its model and what it can do, as far as the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _compile(compiler: str, files: list[Path], dtype: torch.dtype, target: Path) -> None:
    if target.exists():
        return
    sources = [str(f) for f in files if f.suffix == ".cpp"]
    define = ["-DBFLOAT16"] if dtype == torch.bfloat16 else []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # renamed when whole: two runs may compile at once
        aside = Path(folder) / target.name
        for options in (OPTIONS + WIDE, OPTIONS):
            command = [compiler, *options, *define, "-o", str(aside), *sources]
            done = subprocess.run(command, capture_output=True, timeout=300)
            if done.returncode == 0:
                aside.rename(target)
                return
    raise OSError(done.stderr.decode(errors="replace"))


def _call(name: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a kernel with contiguous tensors on the CPU, whole numbers (int64), floats, blocks, and None for a null pointer."""
    compiled = libraries()
    assert compiled is not None  # or `llama.fits` would have said no
    getattr(compiled[dtype], name)(*map(_argument, arguments))


def _argument(value: Argument) -> object:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous(), value.shape
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_void_p() if value is None else ctypes.c_int64(value)


# ----------------------------------------------------------------------------------------------------------------------
# Between the products of a layer. Shapes: n tokens, D hidden size, I inner size of the MLP, E entries of a head, T the dtype.


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual stream x (n, D) float32 plus delta (n, D) in T, its RMSNorm (n, D) in T, and 1 / root mean square (n,)."""
    n, d = x.shape
    total = x if delta is None else torch.empty_like(x)
    y, scale = torch.empty(n, d, dtype=weight.dtype), torch.empty(n)
    _call("add_norm", weight.dtype, x, delta, weight, eps, total, y, scale, n, d)
    return total, y, scale


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, delta: torch.Tensor | None, scale: torch.Tensor, weight: torch.Tensor, of_x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `add_norm`'s norm.

    Args:
        grad: (n, D) in T, of the norm.
        x, delta, scale, weight: What add_norm took, and its scale.
        of_x: (n, D) float32; the gradient is added to it.

    Returns:
        of_x rounded to T, the norm once more (n, D), and the gradient of the weight.
    """
    n, d = x.shape
    rounded, y, of_weight = torch.empty_like(grad), torch.empty_like(grad), torch.empty(d)
    _call("norm_backward", grad.dtype, grad, x, delta, scale, weight, of_x, rounded, y, of_weight, n, d)
    return rounded, y, of_weight.to(grad.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Gate and up (n, 2 I) side by side -> silu(gate) * up (n, I)."""
    n, d = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, d)
    _call("swiglu", gate_up.dtype, gate_up, out, n, d)
    return out


def swiglu_backward(of_out: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient (n, I) of `swiglu`'s result -> that of gate and up (n, 2 I), and the result once more."""
    of_gate_up, out = torch.empty_like(gate_up), torch.empty_like(of_out)
    _call("swiglu_backward", gate_up.dtype, of_out, gate_up, of_gate_up, out, *of_out.shape)
    return of_gate_up, out


def rotate_(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> None:
    """Turn the first heads of x (n, all heads, E) to their tokens' positions in place; `back`: turn gradients.

    Args:
        cos, sin: (n, E) float32, the sine with the minus of rotate_half.
    """
    n, every, e = x.shape
    _call("rotate", x.dtype, x, cos, sin, n, heads, every, e, int(back))


# ----------------------------------------------------------------------------------------------------------------------
# Attention of sequences that lie one after the other, behind one prefix; see block.h.


class Block(ctypes.Structure):
    """`count` sequences, at most `longest` tokens each, that see `before` tokens first; their keys are padded to `keys` rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "prefix")),
        *((name, ctypes.c_int64) for name in ("count", "longest", "before", "keys", "heads", "kv_heads", "e")),
    )


def attend(blocks: list[Block], qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotated queries, keys and values (N, H + 2K, E) -> causal attention (N, H E); every token is in one block.

    By the same code as `Cache.attend`, to the same bits.
    """
    out = qkv.new_empty(len(qkv), heads * qkv.shape[-1])
    for block in blocks:
        _call("block_attention", qkv.dtype, block, qkv, out)
    return out


def attend_backward(blocks: list[Block], grad: torch.Tensor, qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Gradient (N, H E) of `attend`'s result -> that of qkv (N, H + 2K, E).

    A prefix comes in a block before those that see it, so its own gradients are set before others are added.
    """
    out, every = torch.empty_like(qkv), qkv.shape[1]
    for block in blocks:
        q, k, v = _factors(block, qkv)
        probs = _probs(block, q, k)
        of_attended = torch.empty_like(q)
        _call("gather_queries", qkv.dtype, block, grad, heads, of_attended)
        of_scores = of_attended @ v.transpose(1, 2)
        _call("causal_softmax_backward", qkv.dtype, block, probs, of_scores, block.e**-0.5)
        _call("scatter_queries", qkv.dtype, block, of_scores @ k, every, out)
        of_k, of_v = of_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ of_attended
        _call("scatter_keys_values", qkv.dtype, block, of_k, of_v, out)
    return out


def _factors(block: Block, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (c K, share x l, E), keys and values (c K, m, E) of a block; zeros where there is no token."""
    c, e, share = block.count * block.kv_heads, block.e, block.heads // block.kv_heads
    q = qkv.new_empty(c, share * block.longest, e)
    k, v = qkv.new_empty(c, block.keys, e), qkv.new_empty(c, block.keys, e)
    _call("gather_queries", qkv.dtype, block, qkv, qkv.shape[1], q)
    _call("gather_keys_values", qkv.dtype, block, qkv, k, v)
    return q, k, v


def _probs(block: Block, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(1, 2)
    _call("causal_softmax", q.dtype, block, scores, block.e**-0.5)
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# One token for each row of a decode batch


class Cache:
    """Keys and values of n rows: those of their prompts, which the rows of a prompt share, and their own.

    Args:
        layers, kv_heads, e: Of the model.
        prompt_lengths: Q.
        group_size: Rows of each prompt.
        columns: Tokens that a completion may have.
        dtype: Of the model.
    """

    def __init__(
        self, layers: int, kv_heads: int, e: int, prompt_lengths: list[int], group_size: int, columns: int, dtype: torch.dtype
    ):
        self.kv_heads, self.e, self.filled = kv_heads, e, 0
        self.prompt_lengths = torch.tensor(prompt_lengths)
        self.prompt_of = torch.arange(len(prompt_lengths)).repeat_interleave(group_size)  # (n,)
        self.slots = torch.arange(len(self.prompt_of))  # (n,), of each row in its own cache
        self.own_columns, self.prompt_columns = (-(-c // LANES) * LANES for c in (columns, max(prompt_lengths)))
        # Pages of memory are taken as they are first written to.
        self.own, self.prompts = (
            torch.empty(layers, 2, n, kv_heads, c * e, dtype=dtype)
            for n, c in ((len(self.slots), self.own_columns), (len(prompt_lengths), self.prompt_columns))
        )

    def put_prompt(self, layer: int, prompt: int, keys_values: torch.Tensor) -> None:
        """Take the keys and values (length, 2 K, E) of a prompt."""
        length = len(keys_values)
        keys, values = keys_values.view(length, 2, self.kv_heads, self.e).permute(1, 2, 0, 3)  # (K, length, E) each
        blocks = self.prompts[layer, 0, prompt].view(self.kv_heads, -1, self.e, LANES)
        padded = keys.new_zeros(self.kv_heads, self.prompt_columns, self.e)
        padded[:, :length] = keys
        blocks.copy_(padded.view(self.kv_heads, -1, LANES, self.e).transpose(2, 3))
        self.prompts[layer, 1, prompt].view(self.kv_heads, -1, self.e)[:, :length] = values

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Take the keys and values of one token of each row, and attend from it.

        Args:
            qkv: (n, H + 2K, E), not yet rotated.
            cos, sin: (positions, E) float32, as for `rotate_`.
            positions: (n,) int64, of the token.

        Returns:
            (n, H E).
        """
        n, heads = len(qkv), qkv.shape[1] - 2 * self.kv_heads
        out = qkv.new_empty(n, heads * self.e)
        _call(
            "decode_attention", qkv.dtype, self.e, qkv, cos, sin, positions, *self.own[layer].unbind(), self.own_columns,
            self.slots, self.filled, *self.prompts[layer].unbind(), self.prompt_columns, self.prompt_of, self.prompt_lengths,
            out, n, heads, self.kv_heads,
        )  # fmt: skip
        return out

    def advance(self) -> None:
        """All layers have attended: the next token has the next column."""
        self.filled += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Let the other rows leave; nothing is moved."""
        self.slots, self.prompt_of = self.slots[rows], self.prompt_of[rows]


# ----------------------------------------------------------------------------------------------------------------------
# Products with weights that are laid out once, on the matrix units of x86 processors that have them (AMX)


@functools.lru_cache
def matrix_units() -> bool:
    """Whether this machine multiplies bfloat16 matrices by `PackedWeight`."""
    compiled = libraries()
    return compiled is not None and bool(compiled[torch.bfloat16].matrix_units())


class PackedWeight:
    """The weight (out, in) in bfloat16 of a linear layer, laid out for the matrix units; both sizes are multiples of 32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.columns, self.depth = weight.shape
        self.bias = None if bias is None else bias.float()
        self.packed = torch.empty_like(weight)
        _call("pack_weight", weight.dtype, weight, self.packed, self.columns, self.depth)

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and all(size % 32 == 0 for size in weight.shape) and matrix_units()

    def __call__(self, x: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """x (n, in) bfloat16 -> (n, out), summed in float32 and given in that or rounded to bfloat16.

        A row's result has the same bits whatever the other rows are, which is not so of PyTorch's products.
        """
        out = torch.empty(len(x), self.columns, dtype=dtype)
        wide, rounded = (out, None) if dtype == torch.float32 else (None, out)
        _call("product", x.dtype, x, self.packed, self.bias, wide, rounded, len(x), self.columns, self.depth)
        return out


# ----------------------------------------------------------------------------------------------------------------------
# The vocabulary. Logits are float32 (n, V), V all entries or a block of them.


def choose(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token (n,) int64 from each row by inverse CDF at `uniform` (n,), and its log-prob (n,), at a temperature."""
    token, log_prob = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    _call("choose", torch.float32, logits, float(temperature), uniform, token, log_prob, *logits.shape)
    return token, log_prob


class LogTotals:
    """Log of the sum of exponentials of logits that come a block at a time, and the targets' logits, at a temperature."""

    def __init__(self, targets: torch.Tensor, temperature: float):
        self.targets, self.temperature = targets, float(temperature)
        self.most, self.sum = torch.full((len(targets),), -torch.inf), torch.zeros(len(targets))
        self.of_target = torch.zeros(len(targets))

    def take(self, logits: torch.Tensor, start: int) -> None:
        """Logits (n, v) of entries from `start` on."""
        state = (self.most, self.sum, self.of_target)
        _call("take_logits", torch.float32, logits, self.temperature, self.targets, start, *state, *logits.shape)

    def totals(self) -> torch.Tensor:
        return self.most + self.sum.log()


def logits_backward_(logits: torch.Tensor, temperature: float, totals: torch.Tensor, grad: torch.Tensor) -> None:
    """Replace logits (n, v) by the gradient of the targets' log-probs in them, the targets' own part apart; `grad` (n,)."""
    _call("logits_backward", logits.dtype, logits, float(temperature), totals, grad, *logits.shape)
