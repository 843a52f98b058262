"""The hybrid reward: a verifier's verdict opens a band, the reward model's score says where in it a completion lies.

Source: HERO, "Hybrid Reinforcement: When Reward Is Sparse, It's Better to Be Dense" (arXiv:2510.07242), sections 3.1
(stratified normalisation) and 3.2 (difficulty weight). All functions take floats and tensors alike.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

Number = TypeVar("Number", float, torch.Tensor)


def combine_hybrid_score(
    verl_score: Number | float,
    rm_score: Number,
    min_rm: Number | float,
    max_rm: Number | float,
    eps: float,
    alpha: float,
    beta: float,
) -> Number:
    """Place a reward-model score in the band of its verdict.

    n = (rm_score - min_rm) / (max_rm - min_rm + eps); a right answer earns (1 - beta) + 2 beta n, any other
    -alpha + 2 alpha n. Scores outside [min_rm, max_rm] leave the band: clamp them first (`clamp_scores`).

    Args:
        verl_score: The verifier's verdict, 1 = right; scalar or (B,).
        rm_score: The reward model's raw score; scalar or (B,).
        min_rm, max_rm: Bounds of the reward model's scores: from the warmup, or one for each completion (`group_bounds`).
        eps: Keeps n finite when both bounds are equal.
        alpha, beta: Half-widths of the bands of wrong and of right answers.

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


def normalised_score(rm_score: Number, min_rm: Number | float, max_rm: Number | float, eps: float) -> Number:
    """n of `combine_hybrid_score`, from 0 at the lower bound to just below 1 at the upper; scalar or (B,)."""
    return (rm_score - min_rm) / (max_rm - min_rm + eps)


def get_final_reward(
    r_hat: Number, sigma_bar: Number | float, sigma_u: Number, w_min: float = 0.5, w_max: float = 2.0, k: float = 5.0
) -> Number:
    """HERO's reward: r_hat weighted by the difficulty of its question (`--reward-scorer sigmoid`).

    w = w_min + (w_max - w_min) / (1 + exp(-k (sigma_u - sigma_bar))): a question on which the reward model's scores
    spread more than usual is worth more.

    Args:
        r_hat: From `combine_hybrid_score`; scalar or (B,).
        sigma_bar: Running mean of all sigma_u so far.
        sigma_u: Standard deviation of the reward-model scores of the question's group; scalar or (B,). train.py takes the
            scores held within the bounds, the only ones that r_hat knows.
        w_min, w_max, k: Range and slope of the weight.

    Returns:
        w * r_hat, scalar or (B,).

    >>> get_final_reward(1.0, sigma_bar=0.3, sigma_u=0.3)
    1.25
    """
    return difficulty_weight(sigma_bar, sigma_u, w_min, w_max, k) * r_hat


def get_our_final_reward(
    r_hat: Number, sigma_bar: Number | float, sigma_u: Number | float, w_min: float = 0.5, w_max: float = 2.0, k: float = 5.0
) -> Number:
    """The experimental reward: r_hat weighted by itself (`--reward-scorer tanh`). sigma_bar, sigma_u and k are not read.

    w = w_min + (w_max - w_min) tanh(r_hat^3). Not monotone: w * r_hat has its minimum at r_hat of about -0.437, so
    with alpha = 0.5 the very worst completion earns slightly more than a merely bad one.

    Returns:
        w * r_hat, scalar or (B,).
    """
    return tanh_weight(r_hat, w_min, w_max) * r_hat


def difficulty_weight(
    sigma_bar: Number | float, sigma_u: Number, w_min: float = 0.5, w_max: float = 2.0, k: float = 5.0
) -> Number:
    """The weight of `get_final_reward`, by itself for the logs; scalar or (B,)."""
    x = k * (sigma_u - sigma_bar)
    # The same sigmoid written so that exp() cannot overflow a Python float.
    sigmoid = torch.sigmoid(x) if isinstance(x, torch.Tensor) else 0.5 * (1.0 + math.tanh(0.5 * x))
    return w_min + (w_max - w_min) * sigmoid


def tanh_weight(r_hat: Number, w_min: float = 0.5, w_max: float = 2.0) -> Number:
    """The weight of `get_our_final_reward`, by itself for the logs; scalar or (B,)."""
    return w_min + (w_max - w_min) * (torch.tanh(r_hat**3) if isinstance(r_hat, torch.Tensor) else math.tanh(r_hat**3))


def clamp_scores(
    rm_scores: torch.Tensor, min_rm: float | torch.Tensor, max_rm: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold scores within the calibrated bounds, so that no wrong answer can outrank a right one.

    Returns:
        The held scores (B,) and a (B,) bool that is true where a score was outside.
    """
    held = torch.clamp(rm_scores, torch.as_tensor(min_rm), torch.as_tensor(max_rm))
    return held, held != rm_scores


def group_bounds(rm_scores: torch.Tensor, rule_rewards: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest score among the completions of the same question and the same verdict (`--rm-bounds group`).

    HERO's own bounds (section 3.1, "within verifier-defined groups"). Every band is then filled from end to end, whether its
    scores differ much or by noise alone.

    Args:
        rm_scores, rule_rewards: (B,), the completions of a question side by side; scores that are nan are left out.
        group_size: G.

    Returns:
        Two (B,) tensors.
    """
    scores, rules = rm_scores.view(-1, group_size), rule_rewards.view(-1, group_size)  # (Q, G)
    alike = rules[:, :, None] == rules[:, None, :]  # (Q, G, G)
    alike = alike & ~scores.isnan()[:, None, :]
    low = torch.where(alike, scores[:, None, :], torch.inf).amin(dim=2).flatten()
    high = torch.where(alike, scores[:, None, :], -torch.inf).amax(dim=2).flatten()
    nothing = low > high
    return low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)


@dataclass
class RunningMean:
    """Mean of every value seen so far: sigma_bar. Part of a run's state."""

    mean: float = 0.0
    count: int = 0

    def update(self, values: torch.Tensor) -> float:
        """Take in a tensor of values, any shape; returns the new mean."""
        self.count += values.numel()
        self.mean += (values.double().sum().item() - values.numel() * self.mean) / self.count
        return self.mean


class HybridRewards(NamedTuple):
    """Every part of the rewards of B completions; tensors are (B,)."""

    rm_scores: torch.Tensor  # raw; the middle of the bounds where scoring failed
    rm_clamped: torch.Tensor  # bool, the score was outside the bounds
    n: torch.Tensor  # the score's place between the bounds, from 0 to 1
    sigma_u: torch.Tensor  # std of the group's scores
    r_hat: torch.Tensor  # the verdict alone or n alone where reward_mode is not hybrid
    weights: torch.Tensor
    rewards: torch.Tensor  # weights * r_hat


def hybrid_rewards(
    rule_rewards: torch.Tensor,
    rm_scores: torch.Tensor,
    group_size: int,
    *,
    min_rm: float,
    max_rm: float,
    rm_bounds: str,
    alpha: float,
    beta: float,
    eps: float,
    reward_mode: str,
    reward_scorer: str,
    w_min: float,
    w_max: float,
    k: float,
    sigma_bar: RunningMean,
) -> HybridRewards:
    """From verdicts and scores to rewards; takes the sigma_u of these groups into `sigma_bar`, then weights by it.

    sigma_u is the std (n - 1) of the group's scores after they are held within the bounds, in units of the reward model.
    A completion that the reward model failed on gets a neutral score, halfway between the bounds.

    Args:
        rule_rewards, rm_scores: (B,) float32, the completions of a question side by side; a score is nan where it failed.
        group_size: G.
        min_rm, max_rm: Bounds of the scores; read where `rm_bounds` is "warmup".
        sigma_bar: Changed in place.
        rm_bounds, alpha, beta, eps, reward_mode, reward_scorer, w_min, w_max, k: As in train.py's main().
    """
    if rm_bounds == "warmup":
        low, high = torch.full_like(rm_scores, min_rm), torch.full_like(rm_scores, max_rm)
    else:
        strata = rule_rewards if reward_mode == "hybrid" else torch.zeros_like(rule_rewards)
        low, high = group_bounds(rm_scores, strata, group_size)
    rm_scores = torch.where(rm_scores.isnan(), 0.5 * (low + high), rm_scores)
    held, rm_clamped = clamp_scores(rm_scores, low, high)
    n = normalised_score(held, low, high, eps)
    group_sigma = held.view(-1, group_size).std(dim=1)  # (Q,)
    sigma_bar.update(group_sigma)
    sigma_u = group_sigma.repeat_interleave(group_size)  # (B,)
    r_hat = combine_hybrid_score(rule_rewards, held, low, high, eps, alpha, beta)
    if reward_mode != "hybrid":
        r_hat = rewards = rule_rewards if reward_mode == "verifier" else n
        weights = torch.ones_like(r_hat)
    elif reward_scorer == "sigmoid":
        weights = difficulty_weight(sigma_bar.mean, sigma_u, w_min, w_max, k)
        rewards = get_final_reward(r_hat, sigma_bar.mean, sigma_u, w_min, w_max, k)
    else:
        weights = tanh_weight(r_hat, w_min, w_max)
        rewards = get_our_final_reward(r_hat, sigma_bar.mean, sigma_u, w_min, w_max, k)
    return HybridRewards(rm_scores, rm_clamped, n, sigma_u, r_hat, weights, rewards)
