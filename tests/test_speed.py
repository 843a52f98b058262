"""Tokens per second and the arithmetic of a step, compared with calculations by hand."""

import pytest
import torch

from src.metrics import model_flops, peak_flops, speed_metrics
from tests.conftest import make_policy
from tests.test_sampler import PROMPTS, run


def test_flops_agree_with_a_calculation_by_hand():
    # 10 tokens, 100 weights. FLOPs per weight and token: rollout 2, reference 2, forward 2, backward 4.
    assert model_flops(100, 100, 10, 1, reference=True) == 10 * 100 * (2 + 2 + 6)
    assert model_flops(100, 100, 10, 3, reference=False) == 10 * 100 * (2 + 18)
    # LoRA: frozen weights get no gradients.
    assert model_flops(100, 1, 10, 1, reference=False) == 10 * (100 * 2 + 100 * 4 + 2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L4", 121e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_the_peak_rate_is_found_by_the_devices_name(name, peak):
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops(name, torch.float32) is None


def test_tokens_per_second_and_utilization(policy, monkeypatch):
    samples = run(policy, group_size=2)
    sampled = sum(map(len, samples.completion_ids()))
    times = {"time/step_s": 4.0, "time/rollout_s": 0.5}
    metrics = speed_metrics(policy, samples, 1, True, times)
    # No mfu, because the peak rate of a CPU is not known
    assert metrics == {"time/tokens_per_s": sampled / 4, "time/rollout_tokens_per_s": sampled / 0.5}

    monkeypatch.setattr(type(policy), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    bfloat16 = make_policy().bfloat16()
    mfu = speed_metrics(bfloat16, samples, 1, True, times)["time/mfu"]
    tokens = sampled + sum(map(len, PROMPTS))
    assert mfu == pytest.approx(tokens * 10 * bfloat16.num_parameters() / 4 / 989e12)
