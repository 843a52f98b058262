"""Tokens per second and arithmetic counted by hand."""

import pytest
import torch

from src.speed import model_flops, peak_flops, speed_metrics
from tests.conftest import make_policy
from tests.test_sampler import PROMPTS, run


def test_arithmetic_by_hand():
    # 10 tokens of 100 weights: rollout 2, reference 2, forward 2, backward 4 FLOPs a weight and token
    assert model_flops(100, 100, 10, 1, reference=True) == 10 * 100 * (2 + 2 + 6)
    assert model_flops(100, 100, 10, 3, reference=False) == 10 * 100 * (2 + 18)
    assert model_flops(100, 1, 10, 1, reference=False) == 10 * (100 * 2 + 100 * 4 + 2)  # LoRA: no gradients of frozen weights


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L40S", 362e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_are_found_by_the_devices_own_name(name, peak):
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops(name, torch.float32) is None


def test_tokens_per_second_and_utilisation(policy, monkeypatch):
    samples = run(policy, group_size=2)
    sampled = sum(map(len, samples.completion_ids))
    times = {"time/step_s": 4.0, "time/rollout_s": 0.5}
    metrics = speed_metrics(policy, samples, 2, 1, True, times)
    assert metrics == {"time/tokens_per_s": sampled / 4, "time/rollout_tokens_per_s": sampled / 0.5}  # no peak of a CPU is known

    monkeypatch.setattr(type(policy), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    bfloat16 = make_policy().bfloat16()
    mfu = speed_metrics(bfloat16, samples, 2, 1, True, times)["time/mfu"]
    tokens = sampled + sum(map(len, PROMPTS))
    assert mfu == pytest.approx(tokens * 10 * bfloat16.num_parameters() / 4 / 989e12)
