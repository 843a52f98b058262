"""train.score: from verdicts and reward-model scores to rewards, including scores that are odd or missing."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from src.grpo import compute_advantages
from src.hybrid_reward import Calibration, RewardSettings
from src.problems import Problem

finite = st.floats(-30, 30, width=32)
odd = st.one_of(finite, st.sampled_from([math.nan, 0.0, -1.5]))
SETTINGS = RewardSettings(
    "hybrid", "sigmoid", "warmup", alpha=0.5, beta=0.5, eps=0.01, w_min=0.5, w_max=2.0, k=5.0
)


class Verifier:
    """Judges a completion by its text, "right" or "wrong"."""

    def verify_batch(self, questions, completions, answers):
        return [
            {"correct": c == "right", "reward": float(c == "right"), "parsed_answer": c} for c in completions
        ]


class RewardModel:
    def __init__(self, scores):
        self.scores = scores

    def score_texts(self, questions, completions):
        return torch.tensor(self.scores)


def score(verdicts, rm_scores, group_size=4, **changes):
    calibration = Calibration() if rm_scores is None else Calibration(-2.0, 3.0)
    completions = ["right" if v else "wrong" for v in verdicts]
    problems = [Problem("q", "a", "here")] * (len(verdicts) // group_size)
    reward_model = None if rm_scores is None else RewardModel(rm_scores)
    settings = replace(SETTINGS, **changes)
    scores = train.score(Verifier(), reward_model, problems, completions, settings, calibration)
    return scores, calibration.sigma_bar


def expected_rewards(verdicts, rm_scores, group_size, scorer):
    """The same for the default settings, one completion at a time, with floats."""
    clamped = [0.5 if math.isnan(s) else min(max(s, -2.0), 3.0) for s in rm_scores]
    sigmas = [statistics.stdev(clamped[i : i + group_size]) for i in range(0, len(clamped), group_size)]
    rewards = []
    for i, (verdict, s) in enumerate(zip(verdicts, clamped, strict=True)):
        n = (s + 2.0) / 5.01
        r_hat = 0.5 + n if verdict else -0.5 + n
        x = 5.0 * (sigmas[i // group_size] - statistics.mean(sigmas))
        w = 0.5 + 1.5 / (1 + math.exp(-x)) if scorer == "sigmoid" else 0.5 + 1.5 * math.tanh(r_hat**3)
        rewards.append(w * r_hat)
    return rewards


@given(
    st.lists(st.tuples(st.booleans(), odd), min_size=8, max_size=8),
    st.sampled_from([1, 2]),
    st.sampled_from(["sigmoid", "tanh"]),
)
def test_rewards_equal_the_scalar_formulas(rows, questions, scorer):
    verdicts, rm_scores = zip(*rows, strict=True)
    scores, sigma_bar = score(verdicts, rm_scores, 8 // questions, reward_scorer=scorer)
    expected = expected_rewards(verdicts, rm_scores, 8 // questions, scorer)
    torch.testing.assert_close(scores.rewards, torch.tensor(expected), atol=1e-5, rtol=0)
    assert sigma_bar.count == questions


@pytest.mark.parametrize("bounds", ["warmup", "group"])
@pytest.mark.parametrize("mode", ["hybrid", "verifier", "rm"])
@given(rows=st.lists(st.tuples(st.booleans(), odd), min_size=4, max_size=4))
def test_for_any_scores_all_is_finite_and_no_wrong_answer_beats_a_right_one(bounds, mode, rows):
    verdicts, rm_scores = zip(*rows, strict=True)
    scores, _ = score(verdicts, rm_scores, rm_bounds=bounds, reward_mode=mode)
    for name in ("rm_scores", "n", "sigma_u", "r_hat", "weights", "rewards"):
        assert getattr(scores, name).isfinite().all(), name
    assert compute_advantages(scores.rewards, 4, "batch").isfinite().all()
    assert (scores.n >= 0).all() and (scores.n <= 1).all()
    right, wrong = scores.r_hat[scores.rule_rewards == 1], scores.r_hat[scores.rule_rewards == 0]
    if mode != "rm" and len(right) and len(wrong):
        assert right.min() >= wrong.max() - 1e-6


@pytest.mark.parametrize("bounds", ["warmup", "group"])
@pytest.mark.parametrize("scorer", ["sigmoid", "tanh"])
@given(value=finite, verdict=st.booleans())
def test_equal_scores_give_no_advantage(bounds, scorer, value, verdict):
    scores, _ = score([verdict] * 4, [value] * 4, rm_bounds=bounds, reward_scorer=scorer)
    assert scores.sigma_u.tolist() == [0.0] * 4
    assert compute_advantages(scores.rewards, 4, "group").tolist() == [0.0] * 4


def test_a_failed_score_is_neutral():
    scores, _ = score([True, False, False, True], [math.nan, math.nan, 3.0, 3.0])
    assert scores.rm_scores.tolist() == [0.5, 0.5, 3.0, 3.0]
    torch.testing.assert_close(scores.r_hat[:2], torch.tensor([0.5 + 2.5 / 5.01, -0.5 + 2.5 / 5.01]))
    assert scores.rm_clamped.tolist() == [False] * 4
    everything_failed, _ = score([False] * 4, [math.nan] * 4, rm_bounds="group")
    assert everything_failed.r_hat.tolist() == [-0.5] * 4


def test_scores_outside_the_bounds_are_clamped_and_counted():
    scores, _ = score([False] * 4, [-9.0, -2.0, 3.0, 9.0])
    assert scores.rm_clamped.tolist() == [True, False, False, True]
    assert scores.r_hat[0] == scores.r_hat[1] == -0.5 and scores.r_hat[2] == scores.r_hat[3]
    assert scores.rm_scores.tolist() == [-9.0, -2.0, 3.0, 9.0]  # not clamped in the log


def test_without_a_reward_model_there_are_two_rewards():
    scores, _ = score([True, False, False, True], None)
    assert scores.r_hat.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert scores.rewards.tolist() == [0.5 * 1.25, -0.5 * 1.25, -0.5 * 1.25, 0.5 * 1.25]


def test_the_ablations_reward_the_bare_verdict_and_the_bare_score():
    verdicts, rm_scores = [True, False, False, True], [-2.0, 3.0, 0.5, 0.5]
    assert score(verdicts, rm_scores, reward_mode="verifier")[0].rewards.tolist() == [1.0, 0.0, 0.0, 1.0]
    rewards = score(verdicts, rm_scores, reward_mode="rm")[0].rewards
    torch.testing.assert_close(rewards, torch.tensor([0.0, 5 / 5.01, 2.5 / 5.01, 2.5 / 5.01]))


def test_under_a_groups_own_std_the_sigmoid_weight_and_the_band_cancel():
    """This is why the default divides by the std of the batch (docs/hybrid-reward.md)."""
    verdicts, rm_scores = [False] * 4 + [True] * 4, [-1.0, 0.0, 1.0, 2.9, -0.1, 0.0, 0.1, 0.2]
    advantages = {}
    for alpha, k in ((0.5, 5.0), (0.05, 5.0), (0.5, 0.0)):
        scores, _ = score(verdicts, rm_scores, alpha=alpha, k=k)
        for scale in ("group", "batch"):
            advantages[alpha, k, scale] = compute_advantages(scores.rewards, 4, scale)
    group, batch = (advantages[0.5, 5.0, scale] for scale in ("group", "batch"))
    for alpha, k in ((0.05, 5.0), (0.5, 0.0)):
        torch.testing.assert_close(group, advantages[alpha, k, "group"], atol=1e-4, rtol=1e-3)
        assert (batch - advantages[alpha, k, "batch"]).abs().max() > 0.1
    # The rewards of the right answers differ by a few hundredths. Divided by their own std, that counts as
    # much as the far larger differences between the wrong answers.
    assert group[4:].abs().max() > 1.0
    assert batch[4:].abs().max() < 0.2
