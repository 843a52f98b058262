"""The arithmetic of GRPO: small pure functions of tensors.

Letters: B completions = Q questions x G completions a question (`group_size`), T tokens of the longest sequence.
Sources: GRPO, DeepSeekMath (arXiv:2402.03300) equations 3-4; Dr. GRPO (arXiv:2503.20783); PPO clipping
(arXiv:1707.06347) equation 7; the k3 estimate, http://joschu.net/blog/kl-approx.html.
"""

import torch


def compute_advantages(rewards: torch.Tensor, group_size: int, scale: str = "batch", eps: float = 1e-6) -> torch.Tensor:
    """Advantage of each completion over the mean of its group.

    Args:
        rewards: (B,) float, the completions of a question side by side.
        group_size: G, at least 2; divides B.
        scale: What the centred rewards are divided by. "group": the group's own std, the paper's GRPO. "batch": the std
            of all B rewards, so that a group of one verdict, whose rewards differ by reward-model noise alone, is not
            blown up to unit variance, and a weight on a whole group survives. "none": nothing, Dr. GRPO.
        eps: Added to the std. Both stds are the unbiased ones (n - 1), as in verl and TRL.

    Returns:
        (B,) float. Exactly 0 throughout a group of equal rewards: their mean may differ from them by a rounding error,
        which a division by a tiny std would turn into a full-sized advantage.

    >>> compute_advantages(torch.tensor([1.0, 0.0, 0.3, 0.3]), group_size=2, scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    assert rewards.dim() == 1 and rewards.numel() % group_size == 0, f"{tuple(rewards.shape)} rewards, groups of {group_size}"
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
    """k3 estimate of KL(policy || reference) for tokens sampled from the policy: r - log r - 1 with r = ref / policy.

    Unbiased, never negative, exactly 0 where the two agree. The log-ratio is held within +-20, as in verl, so that one
    token that the reference finds impossible cannot overflow.

    Args:
        log_probs, ref_log_probs: same shape, nats.

    Returns:
        Same shape, nats, differentiable in `log_probs`.
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
        log_probs, old_log_probs: (B, T-1) float32, nats: now, and when the tokens were sampled.
        advantages: (B,) float32.
        action_mask: (B, T-1) bool; what lies outside of it may hold anything.
        clip_eps: Half-width of the interval around 1 in which the ratio still earns a gradient.

    Returns:
        losses (B, T-1) float32, exactly 0 outside the mask, and clipped (B, T-1) bool: tokens whose gradient the clip
        removed.
    """
    assert log_probs.shape == old_log_probs.shape == action_mask.shape and advantages.shape == log_probs.shape[:1]
    # Masked before exp(): inf x 0 outside the mask would be nan, in the gradient too.
    log_ratio = torch.where(action_mask, log_probs - old_log_probs, 0.0).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()  # (B, T-1)
    unclipped = -advantages[:, None] * ratio
    clipped = -advantages[:, None] * ratio.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    losses = torch.where(action_mask, torch.maximum(unclipped, clipped), 0.0)
    return losses, action_mask & (clipped > unclipped)


def token_weights(action_mask: torch.Tensor, normalizer: str, max_completion_length: int) -> torch.Tensor:
    """Weight of every token in one optimizer step's loss, so that loss = (losses * weights).sum().

    Computed once over all the completions of the step, before they are split into micro-batches: accumulation can then
    not change the loss (mean of means is not the mean).

    Args:
        action_mask: (B, T-1) bool, of the whole optimizer step.
        normalizer: "token": every token of the step counts the same (DAPO, arXiv:2503.14476 equation 12). "sequence":
            every completion counts the same, whatever its length (the GRPO paper). "constant": a token counts
            1 / (B x max_completion_length), which favours neither short nor long completions (Dr. GRPO).
        max_completion_length: Tokens a completion may have; read by "constant" only.

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
