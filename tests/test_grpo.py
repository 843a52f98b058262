"""The arithmetic of GRPO, checked against values worked out by hand and against verl's functions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.grpo import compute_advantages, kl_estimate, policy_loss, token_weights
from tests.conftest import needs_verl


def random_tensors(seed: int, batch: int = 8, length: int = 6):
    """log_probs, old_log_probs, advantages, action_mask; in each row of the mask the ones are contiguous."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(batch, length, generator=g)
    log_probs = old + 0.3 * torch.randn(batch, length, generator=g)
    lengths = torch.randint(1, length + 1, (batch,), generator=g)
    mask = torch.arange(length) < lengths[:, None]
    return log_probs, old, torch.randn(batch, generator=g), mask


# ------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 3.0, 0.0])  # two groups of three, means 1/3 and 2
    none = compute_advantages(rewards, 3, "none")
    torch.testing.assert_close(none, torch.tensor([2 / 3, -1 / 3, -1 / 3, 1.0, 1.0, -2.0]))
    # Group variances, with n - 1: (4/9 + 1/9 + 1/9) / 2 = 1/3 and (1 + 1 + 4) / 2 = 3.
    group = compute_advantages(rewards, 3, "group", eps=0.0)
    torch.testing.assert_close(group, none / torch.tensor([1 / 3, 3.0]).sqrt().repeat_interleave(3))
    # The batch: mean 7/6, sum of squares 19, variance (19 - 6 x 49/36) / 5.
    batch = compute_advantages(rewards, 3, "batch", eps=0.0)
    torch.testing.assert_close(batch, none / ((19 - 6 * 49 / 36) / 5) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_advantages_scaled_by_group_or_not_at_all_equal_verls(seed):
    needs_verl()
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(32, generator=g)
    rewards[:4] = 0.5  # one group without variance
    mask = torch.ones(32, 5)
    token_rewards = torch.zeros(32, 5)
    token_rewards[:, -1] = rewards
    for norm, scale in ((True, "group"), (False, "none")):
        theirs, _ = compute_grpo_outcome_advantage(
            token_rewards.clone(), mask, np.repeat(np.arange(8), 4), norm_adv_by_std_in_grpo=norm
        )
        torch.testing.assert_close(compute_advantages(rewards, 4, scale), theirs[:, 0], rtol=0, atol=1e-6)


@given(
    value=st.floats(-1e3, 1e3, width=32),
    group_size=st.integers(2, 16),
    scale=st.sampled_from(["batch", "group", "none"]),
    other=st.floats(-10, 10, width=32),
)
def test_a_group_of_equal_awkward_floats_has_advantage_exactly_zero(value, group_size, scale, other):
    rewards = torch.cat([torch.full((group_size,), value), torch.linspace(other, other + 1, group_size)])
    advantages = compute_advantages(rewards, group_size, scale)
    assert (advantages[:group_size] == 0).all()
    assert advantages.isfinite().all()


def test_twelve_rewards_of_0_3_would_give_noise_without_the_rule_for_equal_rewards():
    """Their float32 mean is not exactly 0.3, and the std of the group is no larger than that error."""
    rewards = torch.full((12,), 0.3)
    noise = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    assert noise.abs().max() > 0.1
    assert (compute_advantages(rewards, 12, "group") == 0).all()


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=8, max_size=8), st.sampled_from(["batch", "group", "none"])
)
def test_advantages_sum_to_zero_in_each_group_and_keep_its_order(values, scale):
    rewards = torch.tensor(values)
    advantages = compute_advantages(rewards, 4, scale)
    # If the rewards of a group differ only by rounding, its advantages may be as large as (G - 1) / sqrt(G).
    # Their sum is still small.
    assert advantages.view(2, 4).sum(dim=1).abs().max() < 0.05
    for group in (slice(0, 4), slice(4, 8)):
        order = rewards[group].argsort()
        assert (advantages[group][order].diff() >= 0).all()


# ------------------------------------------------------------------------------------------------ KL and loss


def test_kl_estimate_and_its_gradient_by_hand():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = kl_estimate(log_probs, torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(kl, torch.tensor([0.0, np.e - 2]).float())
    kl.sum().backward()  # d/dx (e^(r-x) - (r-x) - 1) = 1 - e^(r-x)
    torch.testing.assert_close(log_probs.grad, torch.tensor([0.0, 1 - np.e]).float())


@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_kl_estimate_is_never_negative_and_zero_at_equality(a, b):
    kl = kl_estimate(torch.tensor(a), torch.tensor(b))
    assert kl >= -1e-6 and kl.isfinite()
    assert kl_estimate(torch.tensor(a), torch.tensor(a)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_kl_estimate_equals_verls(seed):
    needs_verl()
    from verl.trainer.ppo.core_algos import kl_penalty

    log_probs, ref, _, _ = random_tensors(seed)
    theirs = kl_penalty(log_probs, ref, "low_var_kl")
    torch.testing.assert_close(kl_estimate(log_probs, ref), theirs, rtol=0, atol=1e-6)


def test_policy_loss_by_hand():
    old = torch.zeros(2, 3)
    log_probs = torch.tensor([[0.0, np.log(1.5), np.log(0.5)]] * 2, dtype=torch.float32, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    losses, clipped = policy_loss(log_probs, old, torch.tensor([2.0, -1.0]), mask, clip_eps=0.2)
    # Advantage 2: -min(2r, 2 clip(r)) = -2, -2.4 (clipped at 1.2), -1.0.
    # Advantage -1: -min(-r, -clip(r)) = 1, 1.5, masked.
    torch.testing.assert_close(losses, torch.tensor([[-2.0, -2.4, -1.0], [1.0, 1.5, 0.0]]))
    assert clipped.tolist() == [[False, True, False], [False, False, False]]
    losses.sum().backward()  # d(-A r)/d log p = -A r, and 0 if clipped or masked
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-2.0, 0.0, -1.0], [1.0, 1.5, 0.0]]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalizer", ["token", "sequence"])
def test_loss_equals_verls(seed, normalizer):
    needs_verl()
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    log_probs, old, advantages, mask = random_tensors(seed)
    config = ActorConfig(
        strategy="fsdp", clip_ratio=0.2, clip_ratio_c=1e9, rollout_n=4, ppo_micro_batch_size_per_gpu=1
    )
    mode = {"token": "token-mean", "sequence": "seq-mean-token-mean"}[normalizer]
    theirs, stats = compute_policy_loss_vanilla(
        old, log_probs, advantages[:, None].expand_as(old), mask.float(), loss_agg_mode=mode, config=config
    )
    losses, clipped = policy_loss(log_probs, old, advantages, mask, 0.2)
    ours = (losses * token_weights(mask, normalizer, 6)).sum()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert clipped.sum() / mask.sum() == pytest.approx(stats["actor/pg_clipfrac"], abs=1e-6)


def test_values_outside_the_mask_change_nothing():
    log_probs, old, advantages, mask = random_tensors(0)
    poisoned = torch.where(mask, old, torch.inf)
    x = log_probs.clone().requires_grad_()
    losses, _ = policy_loss(x, poisoned, advantages, mask, 0.2)
    losses.sum().backward()
    assert losses.isfinite().all() and x.grad.isfinite().all() and (x.grad[~mask] == 0).all()


def test_an_on_policy_batch_has_ratio_one_but_still_a_gradient():
    log_probs, _, advantages, mask = random_tensors(3)
    x = log_probs.clone().requires_grad_()
    losses, clipped = policy_loss(x, log_probs, advantages, mask, 0.2)
    torch.testing.assert_close(losses, -advantages[:, None] * mask)
    assert not clipped.any()
    losses.sum().backward()
    assert x.grad.abs().sum() > 0


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert token_weights(mask, "token", 5).tolist() == [[0.25, 0.25, 0.25], [0.25, 0, 0]]
    third = pytest.approx(1 / 6)
    assert token_weights(mask, "sequence", 5).tolist() == [[third, third, third], [0.5, 0, 0]]
    assert token_weights(mask, "constant", 5).tolist() == [
        [pytest.approx(0.1)] * 3,
        [pytest.approx(0.1), 0, 0],
    ]
    assert (token_weights(torch.zeros(2, 3, dtype=torch.bool), "token", 5) == 0).all()
    assert (token_weights(torch.zeros(2, 3, dtype=torch.bool), "sequence", 5) == 0).all()


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["token", "sequence", "constant"]))
def test_splitting_a_step_into_micro_batches_does_not_change_its_loss(seed, normalizer):
    log_probs, old, advantages, mask = random_tensors(seed)
    weights = token_weights(mask, normalizer, 6)
    whole = (policy_loss(log_probs, old, advantages, mask, 0.2)[0] * weights).sum()
    parts = sum(
        (
            policy_loss(log_probs[i : i + 1], old[i : i + 1], advantages[i : i + 1], mask[i : i + 1], 0.2)[0]
            * weights[i : i + 1]
        ).sum()
        for i in range(len(mask))
    )
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
