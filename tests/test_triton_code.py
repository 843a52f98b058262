"""The Triton code that torch.compile generates, without a GPU: each fused operation is a single kernel.

Needs Triton, which PyTorch's CPU build lacks: pip install --no-deps triton
"""

import re
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from benchmarks.fake_gpu import load_guard
from src.engine import cuda_llama, sampler, token_log_probs

pytest.importorskip("triton")

F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64
N, D, INNER, HEADS, KV_HEADS, HEAD_DIM = 3802, 2048, 5632, 32, 4, 64  # a pass of TinyLlama
QKV = HEADS + 2 * KV_HEADS
# For each operation: its arguments, tensors as (shape, dtype); how many kernels it is; and what they store.
OPERATIONS = {
    cuda_llama.add_norm: ([((N, D), F32), ((N, D), BF16), ((D,), BF16), 1e-5], 1, [(N, D), (N, D)]),
    cuda_llama.swiglu: ([((N, 2 * INNER), BF16)], 1, [(N, INNER)]),
    cuda_llama.rotate: (
        [((N, QKV, HEAD_DIM), BF16), ((N, HEAD_DIM), F32), ((N, HEAD_DIM), F32), KV_HEADS],
        1,
        [(N, QKV, HEAD_DIM)],
    ),
    cuda_llama.rotate_into: (
        [
            ((64, QKV, HEAD_DIM), BF16),
            ((64, HEAD_DIM), F32),
            ((64, HEAD_DIM), F32),
            KV_HEADS,
            ((300_000, HEAD_DIM), BF16),
            ((64, QKV), I64),
        ],
        1,
        [],
    ),
    # The second kernel only looks up the targets' logits.
    token_log_probs.sum_block: ([((N, 8000), F32), ((N, 1), I64), 0.8], 2, [(N,), (N,)]),
    token_log_probs.logits_gradient: (
        [((N, 8000), F32), ((N, 1), F32), ((N, 1), I64), ((N, 1), F32), 0.8, BF16],
        1,
        [(N, 8000)],
    ),
}


def generate(function, arguments: list, capability: int) -> str:
    """Inductor's code for a function, on a device of which only the properties are known."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    properties = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=capability, major=capability // 10,
        regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    load_guard()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=properties))
        for name, value in {
            "torch.cuda.current_device": 0,
            "torch.cuda.get_device_properties": properties,
            "torch.cuda.get_device_capability": divmod(capability, 10),
            "torch.utils._triton.has_triton": True,
            "torch._inductor.scheduler.has_triton": True,
            "torch.utils._triton.triton_hash_with_backend": "",
        }.items():
            stack.enter_context(mock.patch(name, return_value=value))
        stack.enter_context(FakeTensorMode())
        given = [
            torch.empty(a[0], dtype=a[1], device="cuda") if isinstance(a, tuple) else a for a in arguments
        ]
        tensors = [a for a in given if isinstance(a, torch.Tensor)]

        def call(*tensors):
            left = iter(tensors)
            return function.__wrapped__(*(next(left) if isinstance(a, torch.Tensor) else a for a in given))

        graph = GraphLowering(make_fx(call, decomposition_table=select_decomp_table())(*tensors))
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*tensors)
            return graph.codegen()[0].value


@pytest.mark.parametrize("capability", [90, 89])  # H100, RTX 4090
@pytest.mark.parametrize("function", OPERATIONS, ids=lambda function: function.__name__)
def test_an_operation_is_one_kernel_that_stores_only_its_results(function, capability):
    arguments, kernels, stored = OPERATIONS[function]
    code = generate(function, arguments, capability)
    assert len(re.findall(r"^\w+ = async_compile\.triton", code, re.M)) == kernels
    buffers = re.findall(r"empty_strided_cuda\(\(([^)]*)\)", code)
    assert sorted(tuple(map(int, filter(None, b.split(", ")))) for b in buffers) == sorted(stored)


@pytest.mark.parametrize("capability", [90, 89])
def test_choosing_tokens_reads_the_logits_in_few_kernels(capability):
    code = generate(sampler.choose, [((64, 32_000), F32), ((64,), F32), 0.8], capability)
    assert len(re.findall(r"^\w+ = async_compile\.triton", code, re.M)) <= 9
    assert "(64, 32000)" not in "".join(re.findall(r"empty_strided_cuda\(.*", code))
