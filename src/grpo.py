"""The arithmetic of GRPO: small pure functions of tensors.

Letters: B completions = Q questions x G completions per question (`group_size`); T tokens in the longest
sequence, prompt included.

Sources: DeepSeekMath (arXiv:2402.03300) equations 3-4 for GRPO; Dr. GRPO (arXiv:2503.20783); PPO
(arXiv:1707.06347) equation 7 for the clipping; http://joschu.net/blog/kl-approx.html for the k3 estimate.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UpdateSettings:
    """How completions update the policy. main() in train.py explains the fields, which are its parameters."""

    train_batch_size: int
    epochs_per_step: int
    temperature: float
    kl_weight: float
    clip_eps: float
    max_norm: float
    loss_normalizer: str  # "token", "sequence" or "constant"
    max_length: int
    max_new_tokens: int | None

    @property
    def max_completion_length(self) -> int:
        """Maximum number of tokens in a completion, for `token_weights`."""
        return self.max_new_tokens or self.max_length


def compute_advantages(
    rewards: torch.Tensor, group_size: int, scale: str = "batch", eps: float = 1e-6
) -> torch.Tensor:
    """Advantage of each completion over the mean of its group.

    Args:
        rewards: (B,) float, sorted by question, G for each.
        group_size: G, at least 2; divides B.
        scale: The divisor of the centered rewards. "group": the group's own std, as in the GRPO paper.
            "batch": the std of all B rewards. With it, a group with a single verdict, whose rewards differ
            only by reward-model noise, is not scaled up to unit variance, and a weight that applies to an
            entire group has an effect. "none": no division, as in Dr. GRPO.
        eps: Added to the std. Either std divides by n - 1, as in verl and TRL.

    Returns:
        (B,) float. Exactly 0 in a group of equal rewards. Without this rule, their mean could differ from
        them by a rounding error, which dividing by a tiny std would turn into a full-sized advantage.

    >>> compute_advantages(torch.tensor([1.0, 0.0, 0.3, 0.3]), group_size=2, scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    assert rewards.dim() == 1 and rewards.numel() % group_size == 0, (
        f"{tuple(rewards.shape)} rewards, groups of {group_size}"
    )
    groups = rewards.view(-1, group_size)  # (Q, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)  # (Q, G)
    if scale == "group":
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + eps)
    else:
        assert scale == "none", scale
    all_equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    return advantages.masked_fill(all_equal, 0.0).flatten()  # (B,)


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(policy || reference) for tokens sampled from the policy.

    The estimate is r - log r - 1 with r = ref / policy. It is unbiased, never negative, and exactly 0 if
    the two models agree. The log-ratio is clamped to +-20, as in verl, so that a single token that the
    reference considers impossible cannot cause an overflow.

    Args:
        log_probs, ref_log_probs: Any shape, the same for both, nats.

    Returns:
        The same shape, nats, differentiable with respect to `log_probs`.
    """
    assert log_probs.shape == ref_log_probs.shape
    log_ratio = (ref_log_probs - log_probs).clamp(-20.0, 20.0)
    return log_ratio.exp() - log_ratio - 1.0


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    action_mask: torch.Tensor,
    clip_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped policy-gradient loss of each token: -min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps) A).

    Args:
        log_probs: (B, T-1) float32, nats, under the current policy.
        old_log_probs: (B, T-1) float32, nats, under the policy that sampled the tokens.
        advantages: (B,) float32.
        action_mask: (B, T-1) bool. The other tensors may contain any values outside it.
        clip_eps: Half-width of the interval around 1 to which the ratio is clipped.

    Returns:
        losses: (B, T-1) float32, exactly 0 outside the mask.
        clipped: (B, T-1) bool, the tokens whose gradient the clipping removed.
    """
    assert (
        log_probs.shape == old_log_probs.shape == action_mask.shape
        and advantages.shape == log_probs.shape[:1]
    )
    # Mask before exp(): outside the mask, inf x 0 would be nan, in the gradient too.
    log_ratio = torch.where(action_mask, log_probs - old_log_probs, 0.0).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()  # (B, T-1)
    unclipped = -advantages[:, None] * ratio
    clipped = -advantages[:, None] * ratio.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    losses = torch.where(action_mask, torch.maximum(unclipped, clipped), 0.0)
    return losses, action_mask & (clipped > unclipped)


def token_weights(action_mask: torch.Tensor, normalizer: str, max_completion_length: int) -> torch.Tensor:
    """Weight of each token in the loss of one optimizer step, so that loss = (losses * weights).sum().

    The weights are computed once over all completions of the step, before it is split into micro-batches,
    so gradient accumulation cannot change the loss (a mean of means is not the mean).

    Args:
        action_mask: (B, T-1) bool, for the entire optimizer step.
        normalizer: "token": all tokens of the step count the same (DAPO, arXiv:2503.14476 equation 12).
            "sequence": all completions count the same, regardless of length (the GRPO paper). "constant":
            each token counts 1 / (B x max_completion_length), which favors neither short nor long completions
            (Dr. GRPO).
        max_completion_length: Maximum number of tokens in a completion; only "constant" uses it.

    Returns:
        (B, T-1) float32, 0 outside the mask.
    """
    mask = action_mask.float()
    if normalizer == "token":
        return mask / mask.sum().clamp(min=1.0)
    if normalizer == "sequence":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0) / len(mask)
    assert normalizer == "constant", normalizer
    return mask / (len(mask) * max_completion_length)
