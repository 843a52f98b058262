"""Pretend to have a GPU: models without numbers that take the CUDA path, for `benchmarks/counting.py`.

Fake tensors on the device cuda follow every condition in the code, and reject every operation on two devices.
They support no backward pass, so that runs on the meta device, where `cuda_llama`'s compiled functions are
replaced by what remains of them: a single kernel, and the tensors that it keeps.
"""

import ctypes
import functools
import inspect
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.counting import as_one_kernel, tensors_in
from src.engine import architecture, cuda_llama, llama, sampler, static_decoder, token_log_probs
from src.engine.cuda_decoder import GraphDecoder
from src.engine.sampler import Samples

META = torch.device("meta")
# Switching to a device needs a guard, and PyTorch has one for CUDA only in its CUDA build.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


# ----------------------------------------------------------------------------------------------------------
# Fake tensors on cuda, for everything without a backward pass


@functools.lru_cache
def load_guard() -> None:
    """Let fake tensors be on the device cuda in a build of PyTorch without CUDA.

    Raises:
        RuntimeError: It could not be compiled.
    """
    if torch.backends.cuda.is_built():
        return
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(source)]
        command += ["-o", str(library), f"-L{torch_folder}/lib", "-lc10"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{error}: {getattr(error, 'stderr', '')}") from None
        ctypes.CDLL(str(library))


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs as it is, but counts as a single kernel.

    Its parameter `out`, if it has one, is written as far as the first argument is large.
    """
    plain = getattr(function, "__wrapped__", function)  # not compiled

    parameters = list(inspect.signature(plain).parameters)
    out = parameters.index("out") if "out" in parameters else None

    @functools.wraps(plain)
    def run(x: torch.Tensor, *args: Any) -> Any:
        read = [a for i, a in enumerate(args, start=1) if isinstance(a, torch.Tensor) and i != out]
        with as_one_kernel(plain.__name__, x, *read) as written:
            result = plain(x, *args)
            written += [x] if out else tensors_in(result)
        return result

    return run


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside the `with` block, tensors may be on the device cuda, without values."""
    load_guard()
    with ExitStack() as stack:
        for module, name in (
            (cuda_llama, "add_norm"),
            (cuda_llama, "swiglu"),
            (cuda_llama, "rotate"),
            (cuda_llama, "rotate_into"),
            (sampler, "choose"),
            (token_log_probs, "sum_block"),
        ):
            stack.enter_context(mock.patch.object(module, name, one_kernel(getattr(module, name))))
        stack.enter_context(mock.patch.object(cuda_llama, "cat_weights", _joined))
        stack.enter_context(mock.patch.object(cuda_llama, "_has_flash_attention", return_value=True))
        stack.enter_context(mock.patch.object(static_decoder, "_has_triton", return_value=False))
        stack.enter_context(mock.patch.object(GraphDecoder, "_capture"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_RealOnCpu())
        yield


class _RealOnCpu(TorchDispatchMode):
    """Only tensors on cuda are fake. Those on the CPU are real, so that the host can compute with them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fakes = any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs)))
        device = kwargs.get("device")
        if fakes or (device is not None and torch.device(device).type == "cuda"):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def fake_model(config: PreTrainedConfig, auto_class: Any, **settings: Any) -> PreTrainedModel:
    """A model in bfloat16 whose weights are fake tensors on cuda. Call this inside `fake_cuda`."""
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.bfloat16, **settings).eval()
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return model


# ----------------------------------------------------------------------------------------------------------
# The meta device, for backward passes


def only_results(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without a gradient that counts as a single kernel, and allocates only its results."""
    plain = getattr(function, "__wrapped__", function)  # not compiled

    @functools.wraps(plain)
    def run(*args: Any) -> Any:
        with as_one_kernel(plain.__name__, *tensors_in(args)) as written:
            with _disable_current_modes():
                result = plain(*args)
            result = tree_map(torch.empty_like, result)
            written += tensors_in(result)
        return result

    return run


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> Any:
        with as_one_kernel("add_norm", x, delta, weight) as written:
            total = x if delta is None else torch.empty_like(x)
            written += [torch.empty_like(x, dtype=weight.dtype)] + ([] if delta is None else [total])
        ctx.save_for_backward(total, weight)
        return total, written[0]

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor, d_y: torch.Tensor) -> Any:
        total, weight = ctx.saved_tensors
        with as_one_kernel("add_norm backward", total, weight, d_total, d_y) as written:
            written += [torch.empty_like(total), torch.empty_like(weight)]
            if ctx.needs_input_grad[1]:
                written.append(torch.empty_like(d_y))
        return written[0], written[2] if ctx.needs_input_grad[1] else None, written[1], None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        with as_one_kernel("swiglu", gate_up) as written:
            written.append(gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))
        return written[0]

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        with as_one_kernel("swiglu backward", gate_up, d_out) as written:
            written.append(torch.empty_like(gate_up))
        return written[0]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv_heads: int
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        with as_one_kernel("rotate", qkv, cos, sin) as written:
            written.append(torch.empty_like(qkv))
        return written[0]

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        with as_one_kernel("rotate backward", d_out, *ctx.saved_tensors) as written:
            written.append(torch.empty_like(d_out))
        return written[0], None, None, None


def _attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
    """FlashAttention's results, and the log-sum-exp that it keeps."""
    with as_one_kernel("attention", q, keys, values) as written:
        written += [torch.empty_like(q), torch.empty(q.shape[1], len(q), device=META)]
    return *written, torch.empty(2), torch.empty(0)


def _attention_backward(d_out: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, saved: Any, *_: Any) -> Any:
    """FlashAttention 2's gradients.

    It sums those of the queries in float32 and, if several query heads share a key, computes the keys' and
    values' for each query head (flash_api.cpp, mha_varlen_bwd: dq_accum, dk_expanded, dv_expanded).
    """
    keys, heads, head_dim = len(kv), q.shape[1], q.shape[2]
    with as_one_kernel("attention backward", d_out, q, kv, *saved) as written:
        sums = torch.empty(len(q), heads, head_dim, device=META)
        expanded = torch.empty(2, keys, heads, head_dim, dtype=q.dtype, device=META)
        written += [sums, sums, expanded, expanded, torch.empty_like(q), torch.empty_like(kv)]
    d_q, (d_keys, d_values) = written[-2], written[-1].chunk(2, dim=1)
    del sums, expanded, written[:]
    return d_q, torch.cat([d_keys, d_values], dim=1)


def _joined(*weights: torch.Tensor) -> torch.Tensor:
    """`linear.cat_weights` of weights that `architecture.join_weights` has made adjacent."""
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), (weights[0].shape[1], 1))


def _head(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: torch.mm(hidden, weight.T, out_dtype=torch.float32)


@contextmanager
def meta_gpu() -> Iterator[None]:
    """Inside the `with` block, `cuda_llama` runs models on the meta device."""
    with ExitStack() as stack:
        for module, name, instead in (
            (cuda_llama, "add_norm", _AddNorm.apply),
            (cuda_llama, "swiglu", _SwiGLU.apply),
            (cuda_llama, "rotate", _Rotate.apply),
            (cuda_llama, "flash_attention", _attention),
            (cuda_llama, "flash_attention_backward", _attention_backward),
            (cuda_llama, "cat_weights", _joined),
            (cuda_llama, "is_supported", architecture.is_llama_like),
            (llama, "is_supported", mock.Mock(return_value=False)),
            (token_log_probs, "make_head", _head),
            (token_log_probs, "sum_block", only_results(token_log_probs.sum_block)),
            (token_log_probs, "logits_gradient", only_results(token_log_probs.logits_gradient)),
        ):
            stack.enter_context(mock.patch.object(module, name, instead))
        yield


def on_device(samples: Samples, device: torch.device) -> Samples:
    """The samples on a device without values, which remember their copy in host memory."""
    moved = samples.to(device)
    vars(moved)["_copy_on_host"] = samples
    return moved
