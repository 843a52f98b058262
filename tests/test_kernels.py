"""The compiled kernels against PyTorch, and their purpose: training recomputes the sampled log-probs."""

import copy
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config

from src.engine import kernels, native_library
from src.engine.linear import PackedWeight, make_head
from src.engine.master_weights import MasterWeights
from tests.conftest import all_log_probs, make_policy
from tests.test_decoder import SMALL, build
from tests.test_sampler import run

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
needs_native_bfloat16 = pytest.mark.skipif(
    not kernels.can_multiply_packed(torch.bfloat16),
    reason="this processor does not multiply bfloat16 (AMX, AVX512_BF16)",
)
PACKED_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_native_bfloat16)]
)


@pytest.mark.parametrize("bias", [False, True])
@PACKED_DTYPES
def test_training_recomputes_the_sampled_log_probs(bias, dtype):
    """Batches of any shape give the same bits.

    The rows of a product do not depend on each other, and the same code computes all attention.
    """
    wide = dict(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=320
    )
    model = build(Qwen2Config(**SMALL | wide)) if bias else make_policy(**wide)
    MasterWeights(model, dtype)
    prompts = [list(range(3, 3 + n)) for n in (5, 21, 40)]
    samples = run(model, prompts=prompts, group_size=5, max_length=100, temperature=0.8)
    for size in (1, 7, 15):
        found = all_log_probs(model, samples, 0.8, size)
        torch.testing.assert_close(found, samples.log_probs, atol=1e-5, rtol=0)


@PACKED_DTYPES
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 31, 32, 33, 300])
@pytest.mark.parametrize("depth", [32, 96, 672])  # the last is more than vector_products.cpp reads at once
def test_packed_products_equal_exact_products(rows, depth, dtype):
    torch.manual_seed(rows)
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((rows, depth), (64, depth), (64,)))
    packed, exact = PackedWeight(weight, bias), F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(packed(x, torch.float32).double(), exact, atol=2e-4, rtol=1e-5)
    assert torch.equal(packed(x), packed(x, torch.float32).to(dtype))
    assert torch.equal(packed(x)[-1:], packed(x[-1:].contiguous()))  # whatever the other rows are


def test_a_float32_weight_may_be_transposed():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 50), torch.randn(50, 96)
    assert PackedWeight.supports(weight.T) and not PackedWeight.supports(weight)
    torch.testing.assert_close(PackedWeight(weight.T, None)(x), x @ weight, atol=1e-5, rtol=1e-5)


@PACKED_DTYPES
def test_packed_products_give_the_same_bits_with_any_number_of_threads(dtype):
    torch.manual_seed(0)
    x, packed = torch.randn(700, 96).to(dtype), PackedWeight(torch.randn(320, 96).to(dtype), None)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(packed(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_logits_are_float32_without_packed_weights_too(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(5, 64).bfloat16(),
        torch.randn(96, 64).bfloat16(),
        torch.randn(96).bfloat16(),
    )
    monkeypatch.setattr(kernels, "can_multiply_packed", lambda dtype: False)
    logits = make_head(weight, bias)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, F.linear(hidden.float(), weight.float(), bias.float()), atol=1e-4, rtol=1e-5
    )


def norm(x, weight, eps=1e-5):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * weight


@DTYPES
@pytest.mark.parametrize("d", [16, 33, 576])
def test_the_norm_of_a_sum_and_its_gradient_equal_pytorch(dtype, d):
    torch.manual_seed(d)
    x, delta, weight = torch.randn(7, d), torch.randn(7, d).to(dtype), torch.randn(d).to(dtype)
    d_y, before = torch.randn(7, d).to(dtype), torch.randn(7, d)
    total, y, scale = kernels.add_norm(x, delta, weight, 1e-5)
    leaf, wide_weight = (x + delta.float()).requires_grad_(), weight.float().requires_grad_()
    out = norm(leaf, wide_weight)
    torch.testing.assert_close(total, leaf.detach())
    torch.testing.assert_close(y, out.detach().to(dtype))
    assert torch.equal(kernels.add_norm(x, None, weight, 1e-5)[0], x)
    expected_d_x, expected_d_weight = torch.autograd.grad(out, (leaf, wide_weight), d_y.float())
    d_x = before.clone()
    rounded, again, d_weight = kernels.norm_backward(d_y, x, delta, scale, weight, d_x)
    torch.testing.assert_close(d_x, before + expected_d_x, atol=1e-5, rtol=1e-5)
    assert torch.equal(rounded, d_x.to(dtype))
    assert torch.equal(again, y)
    torch.testing.assert_close(d_weight, expected_d_weight.to(dtype))


@DTYPES
def test_swiglu_and_its_gradient_equal_pytorch(dtype):
    torch.manual_seed(0)
    gate_up, d_out = (4 * torch.randn(5, 2 * 37)).to(dtype), torch.randn(5, 37).to(dtype)
    leaf = gate_up.float().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    out = F.silu(gate) * up
    torch.testing.assert_close(kernels.swiglu(gate_up), out.detach().to(dtype))
    d_gate_up, again = kernels.swiglu_backward(d_out, gate_up)
    torch.testing.assert_close(d_gate_up, torch.autograd.grad(out, leaf, d_out.float())[0].to(dtype))
    assert torch.equal(again, kernels.swiglu(gate_up))


@given(st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 2.0]), st.integers(1, 1500))
def test_choosing_inverts_the_cumulative_distribution(seed, temperature, vocabulary):
    g = torch.Generator().manual_seed(seed)
    logits, uniform = 5 * torch.randn(6, vocabulary, generator=g), torch.rand(6, generator=g)
    token, log_prob = kernels.choose(logits, temperature, uniform)
    probs = (logits.double() / temperature).softmax(-1)
    above = probs.cumsum(-1).gather(1, token[:, None])[:, 0]
    below = above - probs.gather(1, token[:, None])[:, 0]
    assert (below - 1e-6 <= uniform).all()
    assert (uniform <= above + 1e-6).all()
    torch.testing.assert_close(
        log_prob.double(), probs.gather(1, token[:, None]).log()[:, 0], atol=1e-5, rtol=1e-5
    )


def test_a_token_with_probability_0_is_never_chosen():
    logits = torch.full((2, 700), -torch.inf)
    logits[0, 3] = logits[1, 699] = 0.0
    for uniform in (0.0, 0.5, 1 - 2**-24):
        token, log_prob = kernels.choose(logits, 1.0, torch.full((2,), uniform))
        assert token.tolist() == [3, 699]
        assert log_prob.tolist() == [0.0, 0.0]


@DTYPES
def test_nan_stays_nan(dtype):
    """A gradient that is not finite makes train.py skip the update, so no kernel may hide one."""
    x = torch.randn(2, 32)
    x[0, 5] = torch.nan
    weight = torch.ones(32, dtype=dtype)
    _, y, scale = kernels.add_norm(x, None, weight, 1e-5)
    assert y[0].isnan().all() and y[1].isfinite().all()
    assert kernels.swiglu(torch.full((1, 2), torch.nan, dtype=dtype)).isnan().all()
    d_x = torch.zeros_like(x)
    assert kernels.norm_backward(y, x, None, scale, weight, d_x)[2].isnan().any()


def test_every_call_gives_the_same_bits():
    """Several threads sum over tokens. Their sums are added in a fixed order."""
    model = make_policy()
    samples = run(model, group_size=6, max_length=60)
    gradients = []
    for _ in range(3):
        again = copy.deepcopy(model)
        all_log_probs(again, samples, 1.0).sum().backward()
        gradients.append([p.grad for p in again.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def test_there_are_no_kernels_without_a_compiler(monkeypatch):
    monkeypatch.setenv("HYBRID_GRPO_KERNELS", "0")
    assert kernels.libraries.__wrapped__() is None
    monkeypatch.delenv("HYBRID_GRPO_KERNELS")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.libraries.__wrapped__() is None


def test_there_are_no_kernels_if_the_compiler_fails(monkeypatch, tmp_path):
    (tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path))
    assert kernels.libraries.__wrapped__() is None


def write_compiler(path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def compiler_without(path, *rejected: str) -> str:
    """A compiler that fails if it gets one of these options."""
    patterns = "|".join(rejected)
    return write_compiler(path, f'for o; do case $o in {patterns}) exit 1; esac; done; exec c++ "$@"')


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs c++")


@needs_compiler
@pytest.mark.parametrize(
    ("rejected", "missing", "chosen"),
    [
        (["-fopenmp"], ["-fopenmp"], ["-fopenmp-simd"]),
        (["-fopenmp*"], ["-fopenmp", "-fopenmp-simd"], []),
        (["-march=*", "-mprefer*", "--param*"], ["-march=native"], ["-fopenmp"]),
    ],
)
def test_a_compiler_gets_only_options_that_it_accepts(rejected, missing, chosen, tmp_path):
    options = native_library.choose_options(compiler_without(tmp_path / "compiler", *rejected), tmp_path)
    assert not {*missing} & {*options}
    assert {*native_library.OPTIONS, *chosen} <= {*options}


@pytest.mark.parametrize("has_runtime", [True, False])
def test_options_for_a_mac(has_runtime, monkeypatch, tmp_path):
    """Simulated: this compiler accepts everything, and libraries load unless they lack a runtime."""
    commands = tmp_path / "commands"
    compiler = write_compiler(tmp_path / "compiler", f'echo "$@" >> {commands}')

    def load(library):
        if "-Xclang -fopenmp" in commands.read_text().splitlines()[-1] and not has_runtime:
            raise OSError("symbol not found in flat namespace '___kmpc_fork_call'")

    monkeypatch.setattr(native_library, "_load", load)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    options = native_library.choose_options(compiler, tmp_path)
    assert "-mcpu=native" in options
    assert not {"-march=native", "-mprefer-vector-width=512"} & {*options}
    assert ("-Xclang" in options) == has_runtime
    assert ("-fopenmp-simd" in options) != has_runtime


@needs_compiler
@DTYPES
def test_kernels_work_without_openmp(dtype, monkeypatch, tmp_path, capsys):
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("layers.cpp", "numbers.h"):  # the only file that calls OpenMP's functions
        shutil.copy(native_library.SOURCES / name, sources)
    monkeypatch.setattr(native_library, "SOURCES", sources)
    monkeypatch.setattr(native_library, "cached_assets_path", lambda *names: tmp_path)
    monkeypatch.setenv("CXX", compiler_without(tmp_path / "compiler", "-fopenmp"))
    torch.manual_seed(0)
    x, weight, d_y = torch.randn(7, 33), torch.randn(33).to(dtype), torch.randn(7, 33).to(dtype)
    scale = kernels.add_norm(x, None, weight, 1e-5)[2]
    expected = kernels.norm_backward(d_y, x, None, scale, weight, torch.ones_like(x))
    compiled = native_library.libraries.__wrapped__()
    assert "only one thread" in capsys.readouterr().out
    monkeypatch.setattr(native_library, "libraries", lambda: compiled)
    torch.testing.assert_close(
        kernels.norm_backward(d_y, x, None, scale, weight, torch.ones_like(x)), expected
    )


def test_a_library_belongs_to_one_processor(monkeypatch, tmp_path):
    """It may use instructions that others lack, and machines may share a home folder."""
    graviton = (
        "processor: 0\nBogoMIPS: 2100.00\nFeatures: fp asimd sve\nCPU implementer: 0x41\nCPU part: 0xd40\n"
    )
    monkeypatch.setattr(native_library, "CPUINFO", tmp_path / "cpuinfo")
    found = []
    for text in (graviton, graviton.replace("0xd40", "0xd4f"), graviton.replace("0x41", "0x46")):
        (tmp_path / "cpuinfo").write_text(text)
        found.append(native_library._processor())
    assert len(set(found)) == 3
    (tmp_path / "cpuinfo").write_text(graviton.replace("2100.00", "2000.00"))
    assert native_library._processor() == found[0]
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="Apple M1\n"))
    assert native_library._processor() == "Apple M1\n"
