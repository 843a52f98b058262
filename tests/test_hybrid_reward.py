"""The hybrid reward against its formulas, written out again here with plain floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.hybrid_reward import (
    RunningMean,
    clamp_scores,
    combine_hybrid_score,
    difficulty_weight,
    get_final_reward,
    get_our_final_reward,
    group_bounds,
    tanh_weight,
)

scores = st.floats(-20, 20, width=32)


@pytest.mark.parametrize(
    ("verdict", "score", "expected"),
    [
        (1.0, -2.0, 0.5),  # the worst right answer: 1 - beta
        (1.0, 2.0, 1.5),  # the best: 1 + beta
        (1.0, 0.0, 1.0),
        (0.0, -2.0, -0.5),  # the worst wrong answer: -alpha
        (0.0, 2.0, 0.5),  # the best: alpha
        (0.0, 1.0, 0.25),
    ],
)
def test_combine_by_hand(verdict, score, expected):
    assert combine_hybrid_score(verdict, score, -2.0, 2.0, 0.0, 0.5, 0.5) == pytest.approx(expected)


def test_combine_uses_eps():
    # n = (1 - 0) / (1 - 0 + 0.01)
    assert combine_hybrid_score(1, 1.0, 0.0, 1.0, 0.01, 0.5, 0.25) == pytest.approx(0.75 + 0.5 / 1.01)


def test_without_a_reward_model_r_hat_is_minus_alpha_or_one_minus_beta():
    r_hat = combine_hybrid_score(torch.tensor([1.0, 0.0]), torch.zeros(2), 0.0, 0.0, 0.01, 0.3, 0.2)
    torch.testing.assert_close(r_hat, torch.tensor([0.8, -0.3]))


@given(r_hat=st.floats(-1, 2), sigma_bar=st.floats(0, 10), sigma_u=st.floats(0, 10))
def test_final_rewards_are_the_formulas(r_hat, sigma_bar, sigma_u):
    w = 0.5 + 1.5 / (1 + math.exp(-5 * (sigma_u - sigma_bar)))
    assert get_final_reward(r_hat, sigma_bar, sigma_u) == pytest.approx(w * r_hat, rel=1e-12, abs=1e-300)
    w = 0.5 + 1.5 * math.tanh(r_hat**3)
    assert get_our_final_reward(r_hat, sigma_bar, sigma_u) == pytest.approx(w * r_hat, rel=1e-12, abs=1e-300)


def test_weights_take_their_keywords_and_do_not_overflow():
    assert get_final_reward(2.0, 0.0, 0.0, w_min=0.0, w_max=1.0, k=3.0) == pytest.approx(1.0)
    assert get_our_final_reward(1.0, 0.0, 0.0, w_min=0.0, w_max=1.0) == pytest.approx(math.tanh(1))
    assert get_final_reward(1.0, 1e6, 0.0) == 0.5
    assert get_final_reward(1.0, 0.0, 1e6) == 2.0


@given(verdict=st.sampled_from([0.0, 0.2, 1.0]), score=scores, low=scores, width=st.floats(0, 10, width=32))
def test_tensors_equal_floats(verdict, score, low, width):
    args = (low, low + width, 0.01, 0.4, 0.3)
    one = combine_hybrid_score(verdict, score, *args)
    many = combine_hybrid_score(torch.tensor([verdict], dtype=torch.float64), torch.tensor([score], dtype=torch.float64), *args)
    assert many.item() == pytest.approx(one, rel=1e-9, abs=1e-9)
    for function in (get_final_reward, get_our_final_reward):
        tensor = function(torch.tensor([one], dtype=torch.float64), 0.7, torch.tensor([abs(score)], dtype=torch.float64))
        assert tensor.item() == pytest.approx(function(one, 0.7, abs(score)), rel=1e-9, abs=1e-9)
    assert difficulty_weight(0.7, abs(score)) * one == get_final_reward(one, 0.7, abs(score))
    assert tanh_weight(one) * one == get_our_final_reward(one, 0.0, 0.0)


@given(
    right=st.lists(scores, min_size=1, max_size=8),
    wrong=st.lists(scores, min_size=1, max_size=8),
    low=scores,
    width=st.floats(0, 10, width=32),
    alpha=st.floats(0, 0.5),
    beta=st.floats(0, 0.5),
)
def test_once_clamped_no_wrong_answer_outranks_a_right_one(right, wrong, low, width, alpha, beta):
    args = (low, low + width, 0.01, alpha, beta)
    held = [clamp_scores(torch.tensor(s), low, low + width)[0] for s in (right, wrong)]
    r_hat = [combine_hybrid_score(torch.full_like(h, v), h, *args) for v, h in zip((1.0, 0.0), held, strict=True)]
    assert r_hat[0].min() >= r_hat[1].max() - 1e-5


def test_unclamped_a_wrong_answer_can_outrank_a_right_one():
    """Why scores are clamped: the formula itself leaves its band outside the bounds."""
    assert combine_hybrid_score(0, 9.0, 0.0, 1.0, 0.01, 0.5, 0.5) > combine_hybrid_score(1, 0.5, 0.0, 1.0, 0.01, 0.5, 0.5)


@given(st.lists(st.tuples(scores, st.booleans()), min_size=8, max_size=8))
def test_group_bounds_are_those_of_question_and_verdict(rows):
    rm = torch.tensor([r[0] for r in rows])
    rules = torch.tensor([float(r[1]) for r in rows])
    low, high = group_bounds(rm, rules, 4)
    for i in range(8):
        stratum = [rm[j].item() for j in range(i // 4 * 4, i // 4 * 4 + 4) if rules[j] == rules[i]]
        assert (low[i].item(), high[i].item()) == (min(stratum), max(stratum))
    r_hat = combine_hybrid_score(rules, rm, low, high, 0.01, 0.5, 0.5)
    for q in (slice(0, 4), slice(4, 8)):
        right, wrong = r_hat[q][rules[q] == 1], r_hat[q][rules[q] == 0]
        assert not len(right) or not len(wrong) or right.min() >= wrong.max() - 1e-5


def test_group_bounds_leave_failed_scores_out():
    rm, rules = torch.tensor([5.0, 6.0, torch.nan, 7.0, torch.nan, 1.0, 2.0, 3.0]), torch.tensor([0.0] * 4 + [1.0] + [0.0] * 3)
    low, high = group_bounds(rm, rules, 4)
    assert low.tolist() == [5, 5, 5, 5, 0, 1, 1, 1]
    assert high.tolist() == [7, 7, 7, 7, 0, 3, 3, 3]


def test_clamp_reports_what_was_outside():
    held, outside = clamp_scores(torch.tensor([-3.0, -1.0, 0.5, 2.0]), -1.0, 1.0)
    assert held.tolist() == [-1.0, -1.0, 0.5, 1.0]
    assert outside.tolist() == [True, False, False, True]


def test_the_tanh_reward_dips_at_minus_0_437():
    """Documented, and kept: the very worst completion earns more than a merely bad one."""
    rewards = {r / 1000: get_our_final_reward(r / 1000, 0, 0) for r in range(-1000, 1501)}
    assert min(rewards, key=rewards.get) == pytest.approx(-0.437, abs=0.002)
    assert rewards[-0.5] > rewards[-0.437]


def test_running_mean_is_the_mean_of_all_values():
    running = RunningMean()
    seen = []
    for values in ([1.0, 2.0], [6.0], [0.0, 0.0, 3.0]):
        seen += values
        assert running.update(torch.tensor(values)) == pytest.approx(sum(seen) / len(seen))
    assert running.count == 6
