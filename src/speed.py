"""How fast a step was: tokens per second, and the share of the hardware's peak rate that the model's own arithmetic took."""

import torch
from transformers import PreTrainedModel

from src.sampler import Samples

# Dense matrix rates in bfloat16, FLOP/s, from NVIDIA's data sheets; a name is looked for in the device's own.
BFLOAT16_PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "A40": 150e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The peak rate of a device for matrix products in a dtype; None where it is not known."""
    if dtype != torch.bfloat16:
        return None
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in BFLOAT16_PEAKS.items() if all(word in words for word in name.split())), None)


def model_flops(weights: int, trained: int, tokens: int, epochs_per_step: int, reference: bool) -> float:
    """Arithmetic of one step, 2 FLOPs a weight and token of each forward pass: rollout, reference, and 2 or 3 times that for
    each pass of the optimizer (arXiv:2001.08361, section 2.1). Attention to other tokens and what is computed again do not count.

    Args:
        weights: Of the policy.
        trained: Of these; the others need no gradient of their own.
        tokens: Prompts and completions of the step, a prompt once for its group.
    """
    update = (4.0 * weights + 2.0 * trained) * epochs_per_step
    return tokens * (2.0 * weights * (2 if reference else 1) + update)


def speed_metrics(
    policy: PreTrainedModel,
    samples: Samples,
    group_size: int,
    epochs_per_step: int,
    reference: bool,
    times: dict[str, float],
) -> dict[str, float]:
    """Sampled tokens per second of the step and of its rollout, and time/mfu where the device's peak rate is known."""
    sampled = sum(map(len, samples.completion_ids))
    prompts = int(samples.attention_mask[::group_size].sum()) - sum(map(len, samples.completion_ids[::group_size]))
    metrics = {
        "time/tokens_per_s": sampled / times["time/step_s"],
        "time/rollout_tokens_per_s": sampled / times["time/rollout_s"],
    }
    device = policy.device
    peak = peak_flops(torch.cuda.get_device_name(device), policy.dtype) if device.type == "cuda" else None
    if peak:
        trained = policy.num_parameters(only_trainable=True)
        flops = model_flops(policy.num_parameters(), trained, sampled + prompts, epochs_per_step, reference)
        metrics["time/mfu"] = flops / times["time/step_s"] / peak
    return metrics
