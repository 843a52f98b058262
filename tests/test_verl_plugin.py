"""The plug-in for verl against verl's own code and against train.py: same verdicts, scores, rewards and advantages."""

import asyncio
import contextlib
import inspect
import io
import json
import math
import random
import shlex

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from src import reward_client, verl_command, verl_plugin
from src.grpo import compute_advantages
from src.hybrid_reward import RunningMean
from src.math_verifier import MathVerifier
from src.reward_model import AceRewardModel
from src.verl_plugin import HybridReward, compute_score, pack, unpack
from tests.reward_server import serving

DEFAULTS = {name: p.default for name, p in inspect.signature(train.main).parameters.items()}
BOUNDS = dict(min_rm=-4.0, max_rm=3.0)


@pytest.fixture(scope="module")
def reward_model(reward_model_folder) -> AceRewardModel:
    return AceRewardModel(str(reward_model_folder), dtype=torch.float32, system_prompt=None)


@pytest.fixture
def server(reward_model):
    with serving(reward_model) as server:
        yield server


@pytest.fixture
def command_of(tmp_path, policy_folder, reward_model_folder):
    """Overrides that `command` prints for some hyperparameters, in a folder of the test's own."""

    def overrides(hyperparameters=(), **arguments) -> list[str]:
        h = DEFAULTS | dict(model_name=str(policy_folder), output=str(tmp_path), run_name="run") | dict(hyperparameters)
        (tmp_path / "config.json").write_text(json.dumps({"hyperparameters": h}))
        of_the_model = dict(rm_address="127.0.0.1:9", rm_model=str(reward_model_folder), **BOUNDS)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            verl_command.command(tmp_path / "config.json", **{"train_files": "x.parquet", **of_the_model, **arguments})
        words = shlex.split(printed.getvalue(), comments=True)
        return words[words.index("verl.trainer.main_ppo") + 1 :]

    return overrides


def compose(overrides: list[str]):
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides)


@pytest.fixture
def in_the_trainer(monkeypatch):
    """Makes the HybridReward as verl does, with no reward model to ask; one after the other, as one process never does."""
    from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    monkeypatch.setattr(verl_plugin, "check_reward_model", lambda *_: None)

    def make(config) -> HybridReward:
        ADV_ESTIMATOR_REGISTRY.pop("hybrid", None)
        return build_checkpoint_callback(config)

    yield make
    ADV_ESTIMATOR_REGISTRY.pop("hybrid", None)


# ----------------------------------------------------------------------------------------------------------------------
# One number for a verdict and a score

bound = st.floats(-1000, 1000, width=32)


@given(st.tuples(bound, bound), st.booleans(), st.one_of(st.floats(-(2.0**100), 2.0**100, width=32), st.just(math.nan)))
def test_a_verdict_and_a_score_survive_the_way_through_one_float32(bounds, right, score):
    low, high = sorted(bounds)
    packed = torch.tensor([pack(right, score, low, high)], dtype=torch.float32)
    rule_rewards, scores = unpack(packed, low, high)
    assert rule_rewards.item() == right
    if math.isnan(score):
        assert scores.isnan().all()
    else:
        held = min(max(score, low), high)
        assert abs(scores.item() - held) <= 6.1e-8 * (high - low) + 1.2e-7 * abs(held)
        assert low <= scores.item() <= high
        if held in (low, high):
            assert scores.item() == held


@given(st.tuples(bound, bound), st.booleans(), bound, bound)
def test_packing_keeps_the_order_of_scores(bounds, right, a, b):
    low, high = sorted(bounds)
    if a <= b:
        assert np.float32(pack(right, a, low, high)) <= np.float32(pack(right, b, low, high))
    assert pack(True, a, low, high) >= pack(False, b, low, high) + 1.0


@pytest.mark.parametrize("value", [0.0, 0.3, -0.49, 1.001, -7.0, math.nan, math.inf])
def test_a_number_that_was_not_packed_is_refused(value):
    with pytest.raises(RuntimeError, match="not as compute_score"):
        unpack(torch.tensor([0.75, value]), -1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# 500 groups through train.py and through the plug-in

GROUPS, G, PER_STEP = 500, 8, 10


class Known:
    """A reward model that gives known scores, to train.score and to compute_score alike."""

    def __init__(self, scores: dict[str, float]):
        self.scores = scores

    def score_texts(self, questions, completions):
        return torch.tensor([self.scores[completion] for completion in completions])

    async def reward_model_score(self, tokenizer, question, response, **_):
        return reward_client.RewardModelAnswer(self.scores[response], 0, "")


@pytest.fixture(scope="module")
def rollouts():
    """Questions, answers, completions and their scores: random, equal, nearly equal, far outside the bounds, and failed."""
    rng = random.Random(0)
    questions, answers, completions, scores = [], [], [], {}
    for group in range(GROUPS):
        a, b = rng.randrange(50), rng.randrange(50)
        kind, share, spread = rng.randrange(6), rng.random(), rng.choice([0.1, 1.0, 3.0])
        for i in range(G):
            said = a + b if rng.random() < share else a + b + rng.randrange(1, 9)
            text = f"{a} + {b} = {said}. That is completion {i} of group {group}, so the answer is \\boxed{{{said}}}."
            score = {0: 0.7, 1: 0.3 + 1e-3 * i, 2: rng.uniform(-50, 50)}.get(kind, rng.gauss(-1.0, spread))
            if kind == 5 and i == 0 and group % PER_STEP == 3:
                score = math.nan  # one of 80 in its step
            questions.append(f"What is {a} + {b}?")
            answers.append(str(a + b))
            completions.append(text)
            scores[text] = float(np.float32(score))
    return questions, answers, completions, scores


@pytest.fixture(scope="module")
def packed(rollouts) -> list[dict]:
    """What compute_score makes of each completion."""
    questions, answers, completions, scores = rollouts
    settings = dict(
        **BOUNDS, verifier_method="flexible", rm_api="vllm", rm_address="unused", rm_model="unused", rm_max_length=1,
        rm_timeout_s=1, rm_deadline_s=1, reward_model_tokenizer=object(), alpha=0.5,
    )  # fmt: skip

    async def all_of_them():
        rows = zip(questions, answers, completions, strict=True)
        return await asyncio.gather(*(compute_score("d", c, a, {"question": q}, **settings) for q, a, c in rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl_plugin, "reward_model_score", Known(scores).reward_model_score)
        return asyncio.run(all_of_them())


def as_verl_has_them(values: list[float], uids: list, seed: int):
    """A batch of verl's: rows in any order, of any length, with padding rows; and where each value went."""
    from tensordict import TensorDict
    from verl import DataProto

    rng, padding = random.Random(seed), 5
    order = [*range(len(values)), *[None] * padding]
    rng.shuffle(order)
    rewards, mask = torch.zeros(len(order), 7), torch.zeros(len(order), 7, dtype=torch.int64)
    for row, i in enumerate(order):
        if i is not None:
            length = rng.randint(1, 7)
            mask[row, :length] = 1
            rewards[row, length - 1] = values[i]
    index = np.array([f"padding-{row}" if i is None else uids[i] for row, i in enumerate(order)], dtype=object)
    batch = TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=len(order))
    return DataProto(batch=batch, non_tensor_batch={"uid": index}), order


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
@pytest.mark.parametrize("scorer", ["sigmoid", "tanh"])
def test_500_groups_have_the_rewards_and_advantages_of_train_py(
    rollouts, packed, command_of, in_the_trainer, monkeypatch, scorer, scale
):
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = compose(command_of({"reward_scorer": scorer, "advantage_scale": scale}))
    in_the_trainer(config)
    questions, answers, completions, scores = rollouts
    names = ("rm_bounds", "alpha", "beta", "eps", "reward_mode", "reward_scorer", "w_min", "w_max", "k")
    settings = {name: config.algorithm.hybrid[name] for name in names}
    verifier, sigma_bar, seen = MathVerifier(), RunningMean(), []
    theirs = verl_plugin.hybrid_rewards
    monkeypatch.setattr(verl_plugin, "hybrid_rewards", lambda *a, **k: seen.append(theirs(*a, **k)) or seen[-1])
    for start in range(0, GROUPS * G, PER_STEP * G):
        part = slice(start, start + PER_STEP * G)
        here = train.score(
            verifier,
            Known(scores),
            questions[part],
            answers[part],
            completions[part],
            G,
            sigma_bar=sigma_bar,
            **BOUNDS,
            **settings,
        )
        expected = compute_advantages(here.rewards, G, scale)
        data, order = as_verl_has_them([p["score"] for p in packed[part]], [i // G for i in range(PER_STEP * G)], start)
        data = compute_advantage(data, adv_estimator="hybrid", num_repeat=G, config=config.algorithm)
        for row, i in enumerate(order):
            wanted = data.batch["response_mask"][row] * (0.0 if i is None else expected[i])
            torch.testing.assert_close(data.batch["advantages"][row], wanted, atol=1e-5, rtol=0)
        # Groups come in the order of their first row: sorted, since only the values are to be compared.
        torch.testing.assert_close(seen[-1].rewards.sort().values, here.rewards.sort().values, atol=1e-5, rtol=0)
        assert [p["acc"] for p in packed[part]] == here.rule_rewards.tolist()
        assert [p["rm"] for p in packed[part]] == here.rm_scores.tolist()
        equal = (here.rewards.view(-1, G) == here.rewards.view(-1, G)[:, :1]).all(dim=1).repeat_interleave(G)
        for row, i in enumerate(order):
            if i is not None and equal[i]:
                assert (data.batch["advantages"][row] == 0).all()
    assert len(seen) == GROUPS // PER_STEP
