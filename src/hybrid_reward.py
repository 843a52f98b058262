"""The hybrid reward: the verdict selects a band, and the reward model's score selects the position within it.

Source: HERO, "Hybrid Reinforcement: When Reward Is Sparse, It's Better to Be Dense" (arXiv:2510.07242),
sections 3.1 (stratified normalization) and 3.2 (difficulty weight). The formulas accept both floats and
tensors.
"""

import math
from dataclasses import dataclass, field
from typing import TypeVar

import torch

FloatOrTensor = TypeVar("FloatOrTensor", float, torch.Tensor)


def combine_hybrid_score(
    verl_score: FloatOrTensor | float,
    rm_score: FloatOrTensor,
    min_rm: FloatOrTensor | float,
    max_rm: FloatOrTensor | float,
    eps: float,
    alpha: float,
    beta: float,
) -> FloatOrTensor:
    """Map a reward-model score into the band of its verdict.

    With n = (rm_score - min_rm) / (max_rm - min_rm + eps), a right answer earns (1 - beta) + 2 beta n, and
    any other answer -alpha + 2 alpha n. Scores outside [min_rm, max_rm] would leave the band, so clamp them
    first (`clamp_scores`).

    Args:
        verl_score: The verifier's verdict, 1 = right; scalar or (B,).
        rm_score: The reward model's raw score; scalar or (B,).
        min_rm, max_rm: Bounds of the reward model's scores: scalars from the warmup, or (B,) from
            `group_bounds`.
        eps: Keeps n finite if both bounds are equal.
        alpha: Half-width of the band of wrong answers.
        beta: Half-width of the band of right answers.

    Returns:
        r_hat, scalar or (B,).

    >>> combine_hybrid_score(1.0, 2.0, min_rm=0.0, max_rm=4.0, eps=0.0, alpha=0.5, beta=0.5)
    1.0
    >>> combine_hybrid_score(0.0, 2.0, min_rm=0.0, max_rm=4.0, eps=0.0, alpha=0.5, beta=0.5)
    0.0
    """
    n = normalised_score(rm_score, min_rm, max_rm, eps)
    right = (1.0 - beta) + 2.0 * beta * n
    wrong = -alpha + 2.0 * alpha * n
    if isinstance(verl_score, torch.Tensor) or isinstance(n, torch.Tensor):
        return torch.where(torch.as_tensor(verl_score == 1), right, wrong)
    return right if verl_score == 1 else wrong


def normalised_score(
    rm_score: FloatOrTensor, min_rm: FloatOrTensor | float, max_rm: FloatOrTensor | float, eps: float
) -> FloatOrTensor:
    """n of `combine_hybrid_score`: 0 at the lower bound, just below 1 at the upper one; scalar or (B,)."""
    return (rm_score - min_rm) / (max_rm - min_rm + eps)


def get_final_reward(
    r_hat: FloatOrTensor,
    sigma_bar: FloatOrTensor | float,
    sigma_u: FloatOrTensor,
    w_min: float = 0.5,
    w_max: float = 2.0,
    k: float = 5.0,
) -> FloatOrTensor:
    """HERO's reward: r_hat weighted by the difficulty of its question (`--reward-scorer sigmoid`).

    w = w_min + (w_max - w_min) / (1 + exp(-k (sigma_u - sigma_bar))), so a question counts for more if the
    reward model's scores for it are more spread out than usual.

    Args:
        r_hat: From `combine_hybrid_score`; scalar or (B,).
        sigma_bar: Running mean of all sigma_u so far.
        sigma_u: Standard deviation of the reward-model scores of the question's group; scalar or (B,).
            `hybrid_rewards` computes it from the clamped scores, because r_hat depends only on those.
        w_min, w_max: Range of the weight.
        k: Slope of the weight.

    Returns:
        w * r_hat, scalar or (B,).

    >>> get_final_reward(1.0, sigma_bar=0.3, sigma_u=0.3)
    1.25
    """
    return difficulty_weight(sigma_bar, sigma_u, w_min, w_max, k) * r_hat


def get_our_final_reward(
    r_hat: FloatOrTensor,
    sigma_bar: FloatOrTensor | float,
    sigma_u: FloatOrTensor | float,
    w_min: float = 0.5,
    w_max: float = 2.0,
    k: float = 5.0,
) -> FloatOrTensor:
    """The experimental reward: r_hat weighted by a function of itself (`--reward-scorer tanh`).

    w = w_min + (w_max - w_min) tanh(r_hat^3). sigma_bar, sigma_u and k are not used. The reward is not
    monotonic: w * r_hat has its minimum at an r_hat of about -0.437, so with alpha = 0.5 the very worst
    completion earns slightly more than a merely bad one.

    Returns:
        w * r_hat, scalar or (B,).
    """
    return tanh_weight(r_hat, w_min, w_max) * r_hat


def difficulty_weight(
    sigma_bar: FloatOrTensor | float, sigma_u: FloatOrTensor, w_min: float, w_max: float, k: float
) -> FloatOrTensor:
    """The weight of `get_final_reward` on its own, for the logs; scalar or (B,)."""
    x = k * (sigma_u - sigma_bar)
    # For floats, the sigmoid is written with tanh(), because exp() could overflow.
    sigmoid = torch.sigmoid(x) if isinstance(x, torch.Tensor) else 0.5 * (1.0 + math.tanh(0.5 * x))
    return w_min + (w_max - w_min) * sigmoid


def tanh_weight(r_hat: FloatOrTensor, w_min: float, w_max: float) -> FloatOrTensor:
    """The weight of `get_our_final_reward` on its own, for the logs; scalar or (B,)."""
    cube = r_hat**3
    return w_min + (w_max - w_min) * (torch.tanh(cube) if isinstance(cube, torch.Tensor) else math.tanh(cube))


def clamp_scores(
    rm_scores: torch.Tensor, min_rm: float | torch.Tensor, max_rm: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamp scores (B,) to the calibrated bounds, so that no wrong answer can earn more than a right one.

    Returns:
        The clamped scores (B,), and a (B,) bool tensor that marks the scores outside the bounds.
    """
    clamped = torch.clamp(rm_scores, torch.as_tensor(min_rm), torch.as_tensor(max_rm))
    return clamped, clamped != rm_scores


def group_bounds(
    rm_scores: torch.Tensor, rule_rewards: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest score among the completions with the same question and the same verdict.

    These are HERO's own bounds (section 3.1, "within verifier-defined groups"; `--rm-bounds group`). With
    these bounds, the scores fill every band from end to end, whether they differ a lot or only by noise.

    Args:
        rm_scores, rule_rewards: (B,), sorted by question, G for each. Scores that are nan are ignored.
        group_size: G.

    Returns:
        Two (B,) tensors: the lowest and the highest score. Both are 0 if all of those scores are nan.
    """
    scores, rules = rm_scores.view(-1, group_size), rule_rewards.view(-1, group_size)  # (Q, G)
    alike = rules[:, :, None] == rules[:, None, :]  # (Q, G, G)
    alike = alike & ~scores.isnan()[:, None, :]
    low = torch.where(alike, scores[:, None, :], torch.inf).amin(dim=2).flatten()
    high = torch.where(alike, scores[:, None, :], -torch.inf).amax(dim=2).flatten()
    all_nan = low > high
    return low.masked_fill(all_nan, 0.0), high.masked_fill(all_nan, 0.0)


@dataclass
class RunningMean:
    """Mean of all values seen so far."""

    mean: float = 0.0
    count: int = 0

    def update(self, values: torch.Tensor) -> float:
        """Add the values of a tensor of any shape, and return the new mean."""
        self.count += values.numel()
        self.mean += (values.double().sum().item() - values.numel() * self.mean) / self.count
        return self.mean


@dataclass
class Calibration:
    """What a run has learned about its reward model's scores, in the units of those scores."""

    min_rm: float = 0.0  # lowest score of the warmup
    max_rm: float = 0.0  # highest score of the warmup
    sigma_bar: RunningMean = field(default_factory=RunningMean)  # mean sigma_u of all questions so far


@dataclass(frozen=True)
class RewardSettings:
    """How rewards are computed. main() in train.py explains the fields, which are its parameters."""

    reward_mode: str  # "hybrid", "verifier" or "rm"
    reward_scorer: str  # "sigmoid" or "tanh"
    rm_bounds: str  # "warmup" or "group"
    alpha: float
    beta: float
    eps: float
    w_min: float
    w_max: float
    k: float


@dataclass(frozen=True)
class HybridRewards:
    """Every part of the rewards of B completions. All tensors are (B,)."""

    rule_rewards: torch.Tensor  # 1 = right, 0 = anything else
    rm_scores: torch.Tensor  # raw; the middle of the bounds if scoring failed
    rm_clamped: torch.Tensor  # bool, whether the score was outside the bounds
    n: torch.Tensor  # where the score lies between the bounds, from 0 to 1
    sigma_u: torch.Tensor  # std of the group's clamped scores
    r_hat: torch.Tensor  # in mode verifier only the verdict, in mode rm only n
    weights: torch.Tensor
    rewards: torch.Tensor  # weights * r_hat


def hybrid_rewards(
    rule_rewards: torch.Tensor,
    rm_scores: torch.Tensor,
    group_size: int,
    settings: RewardSettings,
    calibration: Calibration,
) -> HybridRewards:
    """Turn verdicts and scores into rewards, after updating sigma_bar with the sigma_u of these groups.

    sigma_u is the std (n - 1) of a group's scores after they are clamped to the bounds, in the units
    of the scores. A completion that the reward model failed to score gets a neutral score, halfway between
    the bounds.

    Args:
        rule_rewards, rm_scores: (B,) float32, sorted by question, G for each. A failed score is nan.
        group_size: G.
        settings: How to combine verdicts and scores.
        calibration: The bounds, used if rm_bounds is "warmup", and sigma_bar, which is updated in place.
    """
    if settings.rm_bounds == "warmup":
        low = torch.full_like(rm_scores, calibration.min_rm)
        high = torch.full_like(rm_scores, calibration.max_rm)
    else:
        strata = rule_rewards if settings.reward_mode == "hybrid" else torch.zeros_like(rule_rewards)
        low, high = group_bounds(rm_scores, strata, group_size)
    rm_scores = torch.where(rm_scores.isnan(), 0.5 * (low + high), rm_scores)
    clamped, rm_clamped = clamp_scores(rm_scores, low, high)
    n = normalised_score(clamped, low, high, settings.eps)
    group_sigma = clamped.view(-1, group_size).std(dim=1)  # (Q,)
    sigma_bar = calibration.sigma_bar.update(group_sigma)
    sigma_u = group_sigma.repeat_interleave(group_size)  # (B,)
    weight_range = (settings.w_min, settings.w_max)
    if settings.reward_mode != "hybrid":
        r_hat = rewards = rule_rewards if settings.reward_mode == "verifier" else n
        weights = torch.ones_like(r_hat)
    else:
        r_hat = combine_hybrid_score(
            rule_rewards, clamped, low, high, settings.eps, settings.alpha, settings.beta
        )
        if settings.reward_scorer == "sigmoid":
            weights = difficulty_weight(sigma_bar, sigma_u, *weight_range, settings.k)
            rewards = get_final_reward(r_hat, sigma_bar, sigma_u, *weight_range, settings.k)
        else:
            weights = tanh_weight(r_hat, *weight_range)
            rewards = get_our_final_reward(r_hat, sigma_bar, sigma_u, *weight_range)
    return HybridRewards(rule_rewards, rm_scores, rm_clamped, n, sigma_u, r_hat, weights, rewards)
