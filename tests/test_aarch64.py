"""The kernels on ARM: calls recorded on this machine are repeated in an emulator and give the same values.

Each call starts from the memory that it had on this machine, so differences do not add up. This says nothing
about speed on ARM.
"""

import ctypes
import functools
import gc
import itertools
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from src.engine import kernels, linear, native_library
from src.engine.llama import Layout

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SYSTEM = "/usr/aarch64-linux-gnu"  # where the cross-compiler's C and C++ libraries are
pytestmark = [
    pytest.mark.skipif(
        not (COMPILER and EMULATOR),
        reason="needs a cross-compiler and an emulator (apt-get install g++-aarch64-linux-gnu qemu-user)",
    ),
    pytest.mark.skipif(
        native_library.libraries() is None, reason="there are no kernels here to compare those of ARM with"
    ),
]
ALIGNMENT = 64  # of PyTorch's memory
PROMPT, STEPS = 21, 5  # tokens of a prompt and of each completion

MAIN = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>

static void run(void (*call)(char*), size_t size) {
    char* memory = static_cast<char*>(aligned_alloc(64, size));
    if (fread(memory, 1, size, stdin) != size) exit(1);
    call(memory);
    if (fwrite(memory, 1, size, stdout) != size) exit(2);
    free(memory);
}
"""


@dataclass
class Call:
    """One call of a kernel, with the memory that it can reach."""

    name: str
    body: str  # C++ that repeats it, if m points to the memory
    kinds: str  # the C++ types of its arguments
    before: bytes
    after: bytes
    tensors: list[tuple[int, torch.dtype, torch.Size]]  # their places in the memory, in the arguments' order

    def results(self, memory: bytes) -> list[torch.Tensor]:
        """All tensors, from the memory after the call."""
        tensors = []
        for start, dtype, shape in self.tensors:
            part = bytearray(memory[start : start + math.prod(shape) * dtype.itemsize])
            tensors.append(torch.frombuffer(part, dtype=dtype).view(shape))
        return tensors


class Memory:
    """The tensors that one call can reach, moved next to each other."""

    def __init__(self):
        self.size = 0
        self.places: dict[int, tuple[int, torch.Tensor]] = {}  # by address: the place of a storage's bytes
        self.tensors: list[tuple[int, torch.dtype, torch.Size]] = []

    def place_of(self, tensor: torch.Tensor, address: int) -> int:
        """Where an address in a tensor is moved to."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.places:
            self.places[storage.data_ptr()] = self.size, torch.empty(0, dtype=torch.uint8).set_(storage)
            self.size += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        start = self.places[storage.data_ptr()][0] - storage.data_ptr()
        seen = (start + tensor.data_ptr(), tensor.dtype, tensor.shape)
        if seen not in self.tensors and tensor.numel():
            self.tensors.append(seen)
        return start + address

    def read(self) -> bytes:
        memory = bytearray(self.size)
        for place, storage in self.places.values():
            memory[place : place + len(storage)] = storage.numpy().tobytes()
        return bytes(memory)


@dataclass
class Recorder:
    """Records every call of `native_library.call` for a dtype, on top of that dtype's library."""

    library: ctypes.CDLL
    calls: list[Call] = field(default_factory=list)
    pointed_to: list[torch.Tensor] = field(default_factory=list)  # by structs; kept, so addresses stay theirs

    def __getattr__(self, name: str) -> Callable[..., None]:
        return functools.partial(self.record, name)

    def record(self, name: str, *arguments: native_library.Argument) -> None:
        memory, structs, written, kinds = Memory(), [], [], []
        for value in arguments:
            if isinstance(value, ctypes.Structure):
                structs.append(f"int64_t s{len(structs)}[] = {{{self.fields(value, memory)}}};")
                text, kind = f"s{len(structs) - 1}", "void*"
            elif isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                text, kind = f"m + {memory.place_of(value, value.data_ptr())}", "void*"
            elif isinstance(value, float):
                text, kind = f"{ctypes.c_float(value).value.hex()}f", "float"
            else:
                text, kind = ("nullptr", "void*") if value is None else (f"INT64_C({value})", "int64_t")
            written.append(text)
            kinds.append(kind)
        before = memory.read()
        getattr(self.library, name)(*map(to_ctypes, arguments))
        body = " ".join([*structs, f"{name}({', '.join(written)});"])
        self.calls.append(Call(name, body, ", ".join(kinds), before, memory.read(), memory.tensors))

    def fields(self, struct: ctypes.Structure, memory: Memory) -> str:
        texts = []
        for name, kind in struct._fields_:
            value = getattr(struct, name)
            if kind is ctypes.c_void_p and value:
                texts.append(f"int64_t(m + {memory.place_of(self.tensor_at(value), value)})")
            else:
                assert kind in (ctypes.c_void_p, ctypes.c_int64)
                texts.append(f"INT64_C({value or 0})")
        return ", ".join(texts)

    def tensor_at(self, address: int) -> torch.Tensor:
        """The tensor that a struct points into. The struct knows only its address."""

        def contains(tensor: torch.Tensor) -> bool:
            return tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes

        for tensor in self.pointed_to:
            if contains(tensor):
                return tensor
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_contiguous() and contains(t)]
        assert found, "a struct points to memory of no tensor"
        self.pointed_to.append(max(found, key=lambda tensor: tensor.nbytes))
        return self.pointed_to[-1]


to_ctypes = native_library._to_ctypes  # the original; recording replaces it


# ------------------------------------------------------------------------------------- what is recorded


def normalize_and_gate(dtype: torch.dtype) -> None:
    for d in (16, 33, 576):
        x, delta, weight = torch.randn(7, d), torch.randn(7, d).to(dtype), torch.randn(d).to(dtype)
        x[3, 2] = torch.nan if d == 33 else 0
        d_y, d_x = torch.randn(7, d).to(dtype), torch.randn(7, d)
        for added in (delta, None):
            _, _, scale = kernels.add_norm(x, added, weight, 1e-5)
            kernels.norm_backward(d_y, x, added, scale, weight, d_x)
        gate_up = (4 * torch.randn(5, 2 * d)).to(dtype)
        gate_up[0, :4] = torch.tensor([-200.0, 200.0, torch.inf, torch.nan])
        kernels.swiglu_backward(kernels.swiglu(gate_up), gate_up)


def attend(dtype: torch.dtype, head_dim: int, share: int) -> None:
    """The attention of a prompt and two completions, once for training and once token by token."""
    kv_heads = 2
    heads, lengths = share * kv_heads, [STEPS, STEPS]
    layout = Layout.of([PROMPT], [lengths])
    blocks = [block.to_native(heads, kv_heads, head_dim) for block in layout.blocks]
    tokens = len(layout.positions)
    angles = torch.rand(PROMPT + STEPS, head_dim) * 6
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    rotated = qkv.clone()
    kernels.rotate_(rotated, heads + kv_heads, cos[layout.positions], sin[layout.positions])
    together = kernels.attend(blocks, rotated, heads)
    cache = kernels.Cache(1, kv_heads, head_dim, [PROMPT], len(lengths), STEPS, dtype)
    cache.put_prompt(0, 0, rotated[:PROMPT, heads:])
    for step in range(STEPS):
        new, positions = qkv[PROMPT + step :: STEPS].contiguous(), torch.full((2,), PROMPT + step)
        one_by_one = cache.attend(0, new, cos, sin, positions)
        assert torch.equal(one_by_one, together[PROMPT + step :: STEPS])
        cache.advance()
    d_qkv = kernels.attend_backward(blocks, torch.randn_like(together), rotated, heads)
    kernels.rotate_(d_qkv, heads + kv_heads, cos[layout.positions], sin[layout.positions], backward=True)


def read_logits(dtype: torch.dtype) -> None:
    logits, targets = 5 * torch.randn(6, 1300), torch.tensor([0, 511, 512, 700, 1298, 1299])
    logits[0, 7] = -torch.inf
    sums = kernels.CompiledLogSumExp(targets, 0.7)
    for start in (0, 650):
        sums.add(logits[:, start : start + 650].contiguous(), start)
    kernels.logits_backward_(logits.to(dtype), 0.7, sums.value(), torch.randn(6))
    uniforms = torch.rand(50)
    uniforms[0], uniforms[1] = 0, 1 - 2**-24
    kernels.choose(5 * torch.randn(50, 1300), 0.7, uniforms)


def multiply(dtype: torch.dtype) -> None:
    layers = [
        linear.make_linear(torch.randn(64, 672).to(dtype), torch.randn(64).to(dtype)),
        linear.make_linear(torch.randn(672, 64).to(dtype).T),
    ]
    for layer in layers:
        for rows in (1, 7, 64, 200):
            layer(torch.randn(rows, 672).to(dtype))


@pytest.fixture(scope="module")
def recorded() -> dict[torch.dtype, list[Call]]:
    """Calls of every kernel, in float32 and bfloat16, except products in bfloat16, which only x86 has."""
    recorders = {dtype: Recorder(library) for dtype, library in native_library.libraries().items()}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "libraries", lambda: recorders)
        patch.setattr(native_library, "_to_ctypes", lambda argument: argument)
        patch.setattr(kernels, "can_multiply_packed", lambda dtype: dtype == torch.float32)
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN, so reading it would show
        gc.freeze()  # so that `Recorder.tensor_at` looks only at what is made from here on
        try:
            for dtype in recorders:
                normalize_and_gate(dtype)
                for head_dim in kernels.HEAD_SIZES:
                    for share in (1, 2, 3, 4):
                        attend(dtype, head_dim, share)
                read_logits(dtype)
                multiply(dtype)
        finally:
            gc.unfreeze()
            torch.use_deterministic_algorithms(False)
    return {dtype: recorder.calls for dtype, recorder in recorders.items()}


# ------------------------------------------------------------------------------------- how it is repeated


@dataclass
class Replay:
    """Calls that were repeated on ARM."""

    calls: list[Call]
    memories: list[bytes]  # each call's memory after it
    library: Path


def replay(calls: list[Call], dtype: torch.dtype, compiler: str, folder: Path) -> Replay:
    """Compile the kernels for ARM, and repeat these calls in the emulator."""
    library, program = folder / "kernels.so", folder / "program"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "_load", lambda path: None)  # this process can't
        options = native_library.choose_options(compiler, folder)
    native_library.compile_kernels(compiler, options, dtype, library)
    declarations = {f'extern "C" void {call.name}({call.kinds});' for call in calls}
    bodies = [f"static void call{i}(char* m) {{ {call.body} }}" for i, call in enumerate(calls)]
    runs = [f"run(call{i}, {len(call.before)});" for i, call in enumerate(calls)]
    source = folder / "program.cpp"
    source.write_text("\n".join([MAIN, *sorted(declarations), *bodies, "int main() {", *runs, "}"]))
    subprocess.run([compiler, source, library, "-o", program], check=True)
    command = [EMULATOR, "-L", SYSTEM, "-E", f"LD_LIBRARY_PATH={folder}", program]
    threads = dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    before = b"".join(call.before for call in calls)
    done = subprocess.run(command, input=before, stdout=subprocess.PIPE, check=True, env=os.environ | threads)
    assert len(done.stdout) == len(before)
    stops = list(itertools.accumulate(len(call.before) for call in calls))
    memories = [done.stdout[i:j] for i, j in itertools.pairwise([0, *stops])]
    return Replay(calls, memories, library)


# Compilers as shell commands. The last three stand for Graviton 3, whose vectors have no fixed size, for a
# compiler without OpenMP, and for Apple's.
COMPILERS = {
    "gcc": 'exec aarch64-linux-gnu-g++ "$@"',
    "sve": 'exec aarch64-linux-gnu-g++ -mcpu=neoverse-v1 "$@"',
    "serial": 'case " $* " in *" -fopenmp "*) exit 1; esac; exec aarch64-linux-gnu-g++ "$@"',
    "clang": 'exec clang++ --target=aarch64-linux-gnu -mcpu=apple-m1 "$@"',
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[pytest.mark.slow] * (name != "gcc"))
        for name in COMPILERS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def replayed(request, recorded, tmp_path_factory) -> Replay:
    name, dtype = request.param
    if name == "clang" and not shutil.which("clang++"):
        pytest.skip("needs clang++ (apt-get install clang)")
    folder = tmp_path_factory.mktemp(name)
    compiler = folder / name
    compiler.write_text(f"#!/bin/sh\n{COMPILERS[name]}\n")
    compiler.chmod(0o755)
    return replay(recorded[dtype], dtype, str(compiler), folder)


def test_every_kernel_is_repeated(recorded, replayed):
    command = ["aarch64-linux-gnu-nm", "--dynamic", "--defined-only", "--format=posix", replayed.library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    exported = {line.split()[0] for line in lines if line.split()[1] == "T"}
    kernel_names = {name for name in exported if not name.startswith("_")} - {"can_multiply_packed"}
    called = {call.name for calls in recorded.values() for call in calls}
    missing = {"pack_weight", "multiply_packed"} - {call.name for call in replayed.calls}  # bf16: only on x86
    assert kernel_names == called - missing


def bfloat16_steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of bfloat16 apart two tensors are."""
    bits = (x.view(torch.int16).int() for x in (a, b))
    first, second = (torch.where(x < 0, -(x & 0x7FFF), x) for x in bits)
    return (first - second).abs()


def test_arm_computes_the_same_values(replayed):
    """They differ only because float32 sums are added in another order.

    The bound is relative to the largest number of a row, because a sum's error is relative to its terms,
    which may cancel. It is 64 times the rounding error of one number (2^-24); the largest difference found is
    20 times that error. A result in bfloat16 may be rounded to the next number, but that is rare.
    """
    places = different = 0
    for call, memory in zip(replayed.calls, replayed.memories, strict=True):
        for expected, found in zip(call.results(call.after), call.results(memory), strict=True):
            if not expected.is_floating_point():  # such as chosen tokens
                assert torch.equal(found, expected), call.body
                continue
            finite = expected.isfinite()
            torch.testing.assert_close(found[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
            sizes = torch.where(finite, expected.double().abs(), 0).amax(-1, keepdim=True)
            close = ~finite | ((found.double() - expected.double()).abs() <= 2**-18 * sizes)
            if expected.dtype == torch.bfloat16:
                close |= bfloat16_steps(found, expected) <= 1
                places, different = places + finite.sum(), different + (finite & (found != expected)).sum()
            assert close.all(), call.body
    assert different <= places / 10_000


def test_arm_samples_and_trains_with_the_same_bits(replayed):
    """`attend` computes each attention twice, and the results are equal on this machine."""
    out = {"block_attention": [], "decode_attention": []}
    for call, memory in zip(replayed.calls, replayed.memories, strict=True):
        if call.name in out:
            out[call.name].append(call.results(memory)[-1])
    together = out["block_attention"][1::2]  # the completions', which come after the prompt's
    assert len(together) == 20
    for i, one_by_one in enumerate(out["decode_attention"]):
        trained = together[i // STEPS][PROMPT + i % STEPS :: STEPS]
        assert torch.equal(one_by_one, trained)
