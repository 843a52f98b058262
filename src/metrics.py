"""What a step records: every metric (explained in docs/metrics.md), and the rows of rollouts.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from src import console, parallel
from src.engine.sampler import Samples
from src.hybrid_reward import Calibration, HybridRewards
from src.math_verifier import MathVerifier, Verdict
from src.problems import Problem
from src.reward_model import AceRewardModel
from src.run.checkpoint import Progress

# Dense bfloat16 matrix rates in FLOP/s, from NVIDIA's data sheets, by words in the device's name.
BFLOAT16_PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "A40": 150e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class Scores(HybridRewards):
    """Every part of the rewards of B completions, with the verifier's verdicts."""

    verdicts: list[Verdict]


@contextmanager
def timed(name: str, metrics: dict[str, float]) -> Iterator[None]:
    """Show a phase of the step on the progress bar and record its seconds as time/<name>_s."""
    started = time.perf_counter()
    with console.phase(name):
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the GPU may still be busy with this phase
    metrics[f"time/{name}_s"] = time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------
# Metrics of a step


def reward_metrics(scores: HybridRewards, advantages: torch.Tensor, group_size: int) -> dict[str, float]:
    """The reward/... metrics of B completions."""
    groups = scores.rewards.view(-1, group_size)  # (Q, G)
    rules = scores.rule_rewards.view(-1, group_size)
    no_advantage = (advantages.view(-1, group_size) == 0).all(dim=1)  # (Q,)
    return {
        "reward/mean": groups.mean().item(),
        "reward/std": groups.std().item(),
        "reward/rule_mean": rules.mean().item(),
        "reward/rm_mean": scores.rm_scores.mean().item(),
        "reward/rm_std": scores.rm_scores.std().item(),
        "reward/rm_clamped_frac": scores.rm_clamped.float().mean().item(),
        "reward/r_hat_mean": scores.r_hat.mean().item(),
        "reward/weight_mean": scores.weights.mean().item(),
        "reward/sigma_u_mean": scores.sigma_u.mean().item(),
        "reward/zero_std_frac": no_advantage.float().mean().item(),
        "reward/all_right_frac": rules.all(dim=1).float().mean().item(),
        "reward/all_wrong_frac": (rules == 0).all(dim=1).float().mean().item(),
    }


def completion_metrics(samples: Samples, scores: HybridRewards) -> dict[str, float]:
    """The completion/... metrics; lengths in tokens, including the stop token."""
    lengths, finished = samples.lengths.cpu().float(), samples.finished.cpu()  # (B,) each
    finished_right = scores.rule_rewards[finished].mean().item() if finished.any() else 0.0
    return {
        "completion/len_mean": lengths.mean().item(),
        "completion/len_max": lengths.max().item(),
        "completion/truncated_frac": 1 - finished.float().mean().item(),
        "completion/finished_rule_mean": finished_right,
    }


def verifier_metrics(verifier: MathVerifier) -> dict[str, float]:
    """The verifier/... metrics of all processes since the last call."""
    counts = parallel.sum_values(verifier.metrics())
    # All processes judge the same number of completions, so the mean over processes is exact.
    counts["verifier/extracted_frac"] /= parallel.processes()
    return counts


def failure_metrics(reward_model: AceRewardModel | None, progress: Progress) -> dict[str, float]:
    """Add the failed and truncated responses of all processes to `progress`; return the totals as metrics."""
    if reward_model:
        counts = parallel.sum_values({"failed": reward_model.failed, "truncated": reward_model.truncated})
        progress.rm_failed += counts["failed"]
        progress.rm_truncated += counts["truncated"]
        reward_model.failed = reward_model.truncated = 0
    return {
        "reward/rm_failed": float(progress.rm_failed),
        "reward/rm_truncated": float(progress.rm_truncated),
    }


def calibration_metrics(calibration: Calibration) -> dict[str, float]:
    """The bounds of the scores, and sigma_bar."""
    return {
        "reward/rm_min": calibration.min_rm,
        "reward/rm_max": calibration.max_rm,
        "reward/sigma_bar": calibration.sigma_bar.mean,
    }


@dataclass
class PassSums:
    """What one pass adds to `LossSums`; left on the device, because reading it would wait for the pass."""

    rows: torch.Tensor  # (b,) int64 on the CPU, the pass's completions
    sums: torch.Tensor  # (5,) float32, in the order of LossSums
    finite: torch.Tensor  # (b,) bool, whether each completion's loss is finite

    @staticmethod
    @torch.no_grad()
    def of(
        rows: torch.Tensor,
        losses: torch.Tensor,
        loss: torch.Tensor,
        kl: torch.Tensor,
        clipped: torch.Tensor,
        gap: torch.Tensor,
        mask: torch.Tensor,
    ) -> PassSums:
        """All arguments after `rows` are (b, t-1), except `loss`, the pass's part of the loss, ()."""
        totals = [loss, *(x.sum() for x in (kl, clipped, gap, mask))]
        return PassSums(rows, torch.stack([x.float() for x in totals]), losses.isfinite().all(dim=1))


@dataclass
class LossSums:
    """Sums over one process's tokens in an optimizer step, and the completions that failed."""

    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0  # |log_prob - log_prob at sampling time|
    gap_tokens: float = 0.0
    not_finite: list[int] = field(default_factory=list)  # completions whose loss is not finite

    @staticmethod
    def of(passes: list[PassSums]) -> LossSums:
        """Add up the passes of an optimizer step."""
        total = LossSums()
        for part in passes:
            loss, kl, clipped, gap, gap_tokens = part.sums.tolist()
            total.loss += loss
            total.kl += kl
            total.clipped += clipped
            total.gap += gap
            total.gap_tokens += gap_tokens
            if not math.isfinite(loss):
                total.not_finite += part.rows[~part.finite.cpu()].tolist()
        return total


@dataclass
class UpdateResult:
    """What the optimizer steps of one GRPO step did."""

    # All but the last two fields cover only the optimizer steps that were taken.
    sums: LossSums = field(default_factory=LossSums)  # the gap covers only the first of these steps
    tokens: int = 0
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0  # number of skipped optimizer steps
    failed: set[int] = field(default_factory=set)  # completions of skipped steps

    @property
    def taken(self) -> int:
        return len(self.grad_norms)

    def add(self, sums: LossSums, grad_norm: float, tokens: int) -> None:
        """Count an optimizer step that was taken."""
        if not self.taken:  # until the first one, sampler and trainer have the same weights
            self.sums.gap, self.sums.gap_tokens = sums.gap, sums.gap_tokens
        self.sums.loss += sums.loss
        self.sums.kl += sums.kl
        self.sums.clipped += sums.clipped
        self.tokens += tokens
        self.grad_norms.append(grad_norm)

    def skip(self, completions: list[int]) -> None:
        """Count an optimizer step that was skipped.

        Args:
            completions: Those whose loss was not finite, or all of this optimizer step's if only its gradient
                was not finite.
        """
        self.skipped += 1
        self.failed |= set(completions)

    def warn_if_skipped(self) -> None:
        """Name the completions of skipped optimizer steps."""
        if self.skipped:
            completions = ", ".join(map(str, sorted(self.failed)))
            console.warn(
                f"the loss or gradient of {self.skipped} updates was not finite, so they were skipped. They "
                f"contained the step's completions {completions} (0 is the step's first in rollouts.jsonl)"
            )

    def metrics(self, samples: Samples) -> dict[str, float]:
        """The policy/... metrics.

        loss and grad_norm are means over optimizer steps. kl and clip_frac are means over the tokens of these
        steps, sampler_gap over the tokens of the first of them, and entropy over all sampled tokens.
        """
        names = ("loss", "kl", "clipped", "gap", "gap_tokens")
        totals = parallel.sum_values({name: getattr(self.sums, name) for name in names})
        return {
            "policy/loss": totals["loss"] / max(self.taken, 1),
            "policy/kl": totals["kl"] / max(self.tokens, 1),
            "policy/clip_frac": totals["clipped"] / max(self.tokens, 1),
            "policy/grad_norm": sum(self.grad_norms) / max(self.taken, 1),
            "policy/updates": float(self.taken),
            "policy/skipped_updates": float(self.skipped),
            "policy/sampler_gap": totals["gap"] / max(totals["gap_tokens"], 1.0),
            # At top_p 1, -log p of a sampled token is an unbiased estimate of its distribution's entropy.
            "policy/entropy": -samples.log_probs.sum().item() / samples.action_mask.sum().item(),
        }


def speed_metrics(
    policy: PreTrainedModel,
    samples: Samples,
    epochs_per_step: int,
    reference: bool,
    metrics: dict[str, float],
) -> dict[str, float]:
    """Sampled tokens per second of the step and of its rollout, and time/mfu if the peak rate is known.

    Args:
        reference: Whether the step computed the reference's log-probs.
        metrics: The step's metrics so far, including its times.
    """
    sampled = int(samples.lengths.sum())
    speeds = {
        "time/tokens_per_s": sampled / metrics["time/step_s"],
        "time/rollout_tokens_per_s": sampled / metrics["time/rollout_s"],
    }
    device = policy.device
    peak = peak_flops(torch.cuda.get_device_name(device), policy.dtype) if device.type == "cuda" else None
    if peak:
        firsts = slice(None, None, samples.group_size)  # the first completion of each group
        prompts = int(samples.attention_mask[firsts].sum()) - int(samples.lengths[firsts].sum())
        trained = policy.num_parameters(only_trainable=True)
        flops = model_flops(policy.num_parameters(), trained, sampled + prompts, epochs_per_step, reference)
        speeds["time/mfu"] = flops / metrics["time/step_s"] / peak
    return speeds


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """A device's peak rate for matrix products in a dtype, in FLOP/s; None if unknown."""
    if dtype != torch.bfloat16:
        return None
    words = set(device_name.replace("-", " ").split())
    return next((peak for name, peak in BFLOAT16_PEAKS.items() if words.issuperset(name.split())), None)


def model_flops(weights: int, trained: int, tokens: int, epochs_per_step: int, reference: bool) -> float:
    """FLOPs of the model's own arithmetic in one step (arXiv:2001.08361, section 2.1).

    A forward pass takes 2 FLOPs per weight and token, in the rollout and for the reference. A pass of the
    optimizer over the tokens takes two or three times as many. Attention between tokens and recomputation are
    not counted.

    Args:
        weights: Weights of the policy.
        trained: How many of these weights are trained; the others need no gradient.
        tokens: Tokens of the step's prompts and completions, each prompt counted once per group.
    """
    update = (4.0 * weights + 2.0 * trained) * epochs_per_step
    return tokens * (2.0 * weights * (2 if reference else 1) + update)


# ----------------------------------------------------------------------------------------------------------
# Rows of rollouts.jsonl


def rollout_rows(
    step: int,
    problems: list[Problem],
    completions: list[str],
    samples: Samples,
    scores: Scores,
    advantages: torch.Tensor,
) -> list[dict]:
    """One record per completion for rollouts.jsonl: the text and each part of its reward.

    Args:
        problems: Q problems. The B completions are sorted by problem, G for each.
    """
    group_size = len(completions) // len(problems)
    columns = {
        "tokens": samples.lengths.tolist(),
        "finished": samples.finished.tolist(),
        "correct": [verdict["correct"] for verdict in scores.verdicts],
        "parsed_answer": [verdict["parsed_answer"] for verdict in scores.verdicts],
        "rm_score": scores.rm_scores.tolist(),
        "rm_clamped": scores.rm_clamped.tolist(),
        "n": scores.n.tolist(),
        "sigma_u": scores.sigma_u.tolist(),
        "r_hat": scores.r_hat.tolist(),
        "weight": scores.weights.tolist(),
        "reward": scores.rewards.tolist(),
        "advantage": advantages.tolist(),
    }
    rows = []
    for i, completion in enumerate(completions):
        problem = problems[i // group_size]
        row = dict(step=step, question=problem.question, answer=problem.answer, completion=completion)
        rows.append(row | {name: column[i] for name, column in columns.items()})
    return rows
