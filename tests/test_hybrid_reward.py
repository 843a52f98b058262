"""The hybrid reward, compared with its formulas, which are written again here with plain floats."""

import inspect
import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
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

WEIGHT = dict(w_min=0.5, w_max=2.0, k=5.0)

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
def test_r_hat_agrees_with_a_calculation_by_hand(verdict, score, expected):
    assert combine_hybrid_score(verdict, score, -2.0, 2.0, 0.0, 0.5, 0.5) == pytest.approx(expected)


def test_r_hat_uses_eps():
    # n = (1 - 0) / (1 - 0 + 0.01)
    assert combine_hybrid_score(1, 1.0, 0.0, 1.0, 0.01, 0.5, 0.25) == pytest.approx(0.75 + 0.5 / 1.01)


def test_without_a_reward_model_r_hat_is_minus_alpha_or_one_minus_beta():
    r_hat = combine_hybrid_score(torch.tensor([1.0, 0.0]), torch.zeros(2), 0.0, 0.0, 0.01, 0.3, 0.2)
    torch.testing.assert_close(r_hat, torch.tensor([0.8, -0.3]))


@given(r_hat=st.floats(-1, 2), sigma_bar=st.floats(0, 10), sigma_u=st.floats(0, 10))
def test_final_rewards_agree_with_the_formulas(r_hat, sigma_bar, sigma_u):
    w = 0.5 + 1.5 / (1 + math.exp(-5 * (sigma_u - sigma_bar)))
    assert get_final_reward(r_hat, sigma_bar, sigma_u) == pytest.approx(w * r_hat, rel=1e-12, abs=1e-300)
    w = 0.5 + 1.5 * math.tanh(r_hat**3)
    assert get_our_final_reward(r_hat, sigma_bar, sigma_u) == pytest.approx(w * r_hat, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("reward", [get_final_reward, get_our_final_reward])
def test_the_defaults_of_the_contract_functions_are_those_of_main(reward):
    """Other code calls these two functions without w_min, w_max and k, and must get train.py's defaults."""
    of_main, own = inspect.signature(train.main).parameters, inspect.signature(reward).parameters
    assert {name: own[name].default for name in WEIGHT} == {name: of_main[name].default for name in WEIGHT}
    assert [name for name in own if own[name].default is not inspect.Parameter.empty] == list(WEIGHT)


@pytest.mark.parametrize("weight", [difficulty_weight, tanh_weight])
def test_the_weights_have_no_defaults_of_their_own(weight):
    parameters = inspect.signature(weight).parameters.values()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


def test_final_rewards_accept_keywords_and_do_not_overflow():
    assert get_final_reward(2.0, 0.0, 0.0, w_min=0.0, w_max=1.0, k=3.0) == pytest.approx(1.0)
    assert get_our_final_reward(1.0, 0.0, 0.0, w_min=0.0, w_max=1.0) == pytest.approx(math.tanh(1))
    assert get_final_reward(1.0, 1e6, 0.0) == 0.5
    assert get_final_reward(1.0, 0.0, 1e6) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_10_000_random_inputs_agree_with_mpmath(dtype):
    """Compare three functions, applied to tensors, with 30-digit arithmetic on the same values."""
    g = torch.Generator().manual_seed(0)
    uniform = lambda low, high: torch.empty(10_000, dtype=dtype).uniform_(low, high, generator=g)  # noqa: E731
    verdicts = torch.randint(0, 2, (10_000,), generator=g).to(dtype)
    low, sigma_bar, sigma_u = uniform(-20, 20), uniform(0, 5), uniform(0, 5)
    high = low + uniform(0, 10) * torch.randint(0, 2, (10_000,), generator=g)  # half of the bounds are equal
    rm_scores = low + (high - low) * uniform(-0.5, 1.5)  # some are outside the bounds
    eps, alpha, beta, w_min, w_max, k = 0.01, 0.37, 0.21, 0.4, 3.0, 6.0
    r_hat = combine_hybrid_score(verdicts, rm_scores, low, high, eps, alpha, beta)
    sigmoid = get_final_reward(r_hat, sigma_bar, sigma_u, w_min, w_max, k)
    tanh = get_our_final_reward(r_hat, sigma_bar, sigma_u, w_min, w_max, k)
    columns = [verdicts, rm_scores, low, high, sigma_bar, sigma_u, r_hat, sigmoid, tanh]
    with mpmath.workdps(30):
        for row in torch.stack(columns, dim=1).double().tolist():
            verdict, score, lowest, highest, bar, u, got_r_hat, got_sigmoid, got_tanh = map(mpmath.mpf, row)
            n = (score - lowest) / (highest - lowest + mpmath.mpf(eps))
            expected = (1 - beta) + 2 * beta * n if verdict == 1 else -alpha + 2 * alpha * n
            assert abs(got_r_hat - expected) < 1e-6
            w = w_min + (w_max - w_min) / (1 + mpmath.exp(-k * (u - bar)))
            assert abs(got_sigmoid - w * expected) < 1e-6 * max(1, abs(w * expected))
            w = w_min + (w_max - w_min) * mpmath.tanh(expected**3)
            assert abs(got_tanh - w * expected) < 1e-6 * max(1, abs(w * expected))


@given(verdict=st.sampled_from([0.0, 0.2, 1.0]), score=scores, low=scores, width=st.floats(0, 10, width=32))
def test_tensors_equal_floats(verdict, score, low, width):
    args = (low, low + width, 0.01, 0.4, 0.3)
    sigma_u = abs(score)
    as_tensor = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
    r_hat = combine_hybrid_score(verdict, score, *args)
    tensor = combine_hybrid_score(as_tensor(verdict), as_tensor(score), *args)
    assert tensor.item() == pytest.approx(r_hat, rel=1e-9, abs=1e-9)
    for function in (get_final_reward, get_our_final_reward):
        tensor = function(as_tensor(r_hat), 0.7, as_tensor(sigma_u))
        assert tensor.item() == pytest.approx(function(r_hat, 0.7, sigma_u), rel=1e-9, abs=1e-9)


@given(r_hat=st.floats(-1, 2), sigma_bar=st.floats(0, 10), sigma_u=st.floats(0, 10))
def test_the_logged_weights_are_those_of_the_final_rewards(r_hat, sigma_bar, sigma_u):
    w_min, w_max, k = WEIGHT.values()
    weight = difficulty_weight(sigma_bar, sigma_u, w_min, w_max, k)
    assert weight * r_hat == get_final_reward(r_hat, sigma_bar, sigma_u, **WEIGHT)
    assert tanh_weight(r_hat, w_min, w_max) * r_hat == get_our_final_reward(r_hat, 0.0, 0.0, **WEIGHT)


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
    right, wrong = (clamp_scores(torch.tensor(s), low, low + width)[0] for s in (right, wrong))
    r_hat_right = combine_hybrid_score(torch.ones_like(right), right, *args)
    r_hat_wrong = combine_hybrid_score(torch.zeros_like(wrong), wrong, *args)
    assert r_hat_right.min() >= r_hat_wrong.max() - 1e-5


def test_unclamped_a_wrong_answer_can_outrank_a_right_one():
    """This is why scores are clamped: outside the bounds, the formula leaves its band."""
    args = (0.0, 1.0, 0.01, 0.5, 0.5)
    assert combine_hybrid_score(0, 9.0, *args) > combine_hybrid_score(1, 0.5, *args)


@given(st.lists(st.tuples(scores, st.booleans()), min_size=8, max_size=8))
def test_group_bounds_are_those_of_each_question_and_verdict(rows):
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


def test_group_bounds_ignore_failed_scores():
    rm = torch.tensor([5.0, 6.0, torch.nan, 7.0, torch.nan, 1.0, 2.0, 3.0])
    rules = torch.tensor([0.0] * 4 + [1.0] + [0.0] * 3)
    low, high = group_bounds(rm, rules, 4)
    assert low.tolist() == [5, 5, 5, 5, 0, 1, 1, 1]
    assert high.tolist() == [7, 7, 7, 7, 0, 3, 3, 3]


def test_clamping_reports_which_scores_were_outside():
    clamped, outside = clamp_scores(torch.tensor([-3.0, -1.0, 0.5, 2.0]), -1.0, 1.0)
    assert clamped.tolist() == [-1.0, -1.0, 0.5, 1.0]
    assert outside.tolist() == [True, False, False, True]


def test_the_tanh_reward_dips_at_minus_0_437():
    """Documented and intended: the very worst completion earns more than a merely bad one."""
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
