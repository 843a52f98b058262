"""The plug-in for verl against verl's own code and against train.py: same verdicts, scores, rewards and advantages."""

import asyncio
import contextlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from src import reward_client, verl_command, verl_plugin
from src.errors import InputError
from src.grpo import compute_advantages
from src.hybrid_reward import RunningMean
from src.math_verifier import MathVerifier
from src.reward_model import AceRewardModel
from src.verl_plugin import HybridReward, compute_score, pack, unpack
from tests.conftest import ROOT, run_command
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
        words = shlex.split(printed.getvalue().replace("\\\n", ""), comments=True)  # a backslash joins lines
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
def test_500_groups_have_the_rewards_and_advantages_of_train_py(rollouts, packed, command_of, in_the_trainer, scorer, scale):
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = compose(command_of({"reward_scorer": scorer, "advantage_scale": scale}))
    hybrid = in_the_trainer(config)
    questions, answers, completions, scores = rollouts
    names = ("rm_bounds", "alpha", "beta", "eps", "reward_mode", "reward_scorer", "w_min", "w_max", "k")
    settings = {name: config.algorithm.hybrid[name] for name in names}
    verifier, sigma_bar, wide = MathVerifier(), RunningMean(), 0
    for start in range(0, GROUPS * G, PER_STEP * G):
        part = slice(start, start + PER_STEP * G)
        here = train.score(
            verifier, Known(scores), questions[part], answers[part], completions[part], G, sigma_bar=sigma_bar, **BOUNDS,
            **settings,
        )  # fmt: skip
        expected = compute_advantages(here.rewards, G, scale)
        roundings = torch.zeros(PER_STEP * G)
        if scale == "group":
            # A group's own std blows up the last bits of its rewards, as another order of its rows would: roundings of 2^-24 in
            # place, r_hat, mean and reward, a weight of at most 2.
            roundings = (2**-22 * 2 / here.rewards.view(-1, G).std(dim=1)).repeat_interleave(G)
            roundings[(roundings < 1e-5) | ~roundings.isfinite()] = 0.0
        data, order = as_verl_has_them([p["score"] for p in packed[part]], [i // G for i in range(PER_STEP * G)], start)
        data = compute_advantage(data, adv_estimator="hybrid", num_repeat=G, config=config.algorithm)
        for row, i in enumerate(order):
            mask = data.batch["response_mask"][row]
            reward, advantage, rounding = (0.0, 0.0, 0.0) if i is None else (here.rewards[i], expected[i], roundings[i])
            torch.testing.assert_close(data.batch["returns"][row], mask * reward, atol=1e-5, rtol=0)
            torch.testing.assert_close(data.batch["advantages"][row], mask * advantage, atol=1e-5 + rounding, rtol=0)
        assert [p["acc"] for p in packed[part]] == here.rule_rewards.tolist()
        assert [p["rm"] for p in packed[part]] == here.rm_scores.tolist()
        wide += int((roundings == 0).sum())
        equal = (here.rewards.view(-1, G) == here.rewards.view(-1, G)[:, :1]).all(dim=1).repeat_interleave(G)
        for row, i in enumerate(order):
            if i is not None and equal[i]:
                assert (data.batch["advantages"][row] == 0).all()
    assert sigma_bar.count == hybrid.sigma_bar.count == GROUPS
    assert hybrid.sigma_bar.mean == pytest.approx(sigma_bar.mean, abs=1e-6)
    assert wide >= (0.6 if scale == "group" else 1.0) * GROUPS * G


def test_a_group_that_lost_a_completion_has_no_advantage_and_is_counted(command_of, in_the_trainer):
    hybrid = in_the_trainer(compose(command_of({"group_size": 2, "advantage_scale": "none"})))
    rewards = torch.tensor([[0.75], [-0.75], [0.0], [1.0]])
    mask = torch.tensor([[1], [1], [0], [1]])
    advantages, _ = hybrid.advantages(rewards, mask, np.array(["a", "a", "padding", "b"], dtype=object))
    assert advantages[0].item() == pytest.approx(-advantages[1].item()) and advantages[0] > 0
    assert advantages[2:].tolist() == [[0.0], [0.0]]
    assert hybrid.sigma_bar.count == 1
    line = json.loads(hybrid.metrics_file.read_text())
    assert (line["step"], line["reward/incomplete_groups"], line["reward/rule_mean"]) == (1, 1.0, 0.5)
    with pytest.raises(RuntimeError, match="no group of 2"):
        hybrid.advantages(rewards, mask, np.array(["a", "b", "c", "d"], dtype=object))


# ----------------------------------------------------------------------------------------------------------------------
# Scores over HTTP


def reward_loop_worker(config):
    """verl's, in this process."""
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    return RewardLoopWorker(config, None)


def as_rollout(tokenizer, question: str, answer: str, completion: str):
    """One completion as verl's agent loop hands it to a reward worker."""
    from tensordict import TensorDict
    from verl import DataProto

    prompt, response = tokenizer.encode(question), [*tokenizer.encode(completion), tokenizer.eos_token_id]
    batch = {
        "prompts": torch.tensor([prompt]),
        "responses": torch.tensor([response]),
        "attention_mask": torch.ones(1, len(prompt) + len(response), dtype=torch.int64),
    }
    others = {
        "data_source": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": 0, "question": question},
    }
    others = {key: np.array([value], dtype=object) for key, value in others.items()}
    return DataProto(batch=TensorDict(batch, batch_size=1), non_tensor_batch=others)


QUESTIONS = ["What is 5 + 3?"] * 4 + ["What is 7 * 6?"] * 4
ANSWERS = ["8"] * 4 + ["42"] * 4
COMPLETIONS = [
    "5 + 3 = 8.",
    "It is 9.",
    "\\boxed{8}",
    "I do not know.",
    "7 * 6 = 42",
    "42",
    "The answer is 13.",
    "It is ½.",
]


@pytest.mark.parametrize("rm_api", ["vllm", "sglang"])
def test_verls_reward_worker_scores_as_train_py_does(rm_api, server, reward_model, command_of, tokenizer):
    direct = reward_model.score_texts(QUESTIONS, COMPLETIONS)
    bounds = dict(min_rm=direct.sort().values[1].item(), max_rm=direct.sort().values[-2].item())  # one outside at each end
    config = compose(command_of(rm_api=rm_api, rm_address=server.address, **bounds))
    worker = reward_loop_worker(config)
    rollouts = [as_rollout(tokenizer, *row) for row in zip(QUESTIONS, ANSWERS, COMPLETIONS, strict=True)]

    async def score_all():
        return await asyncio.gather(*map(worker.compute_score, rollouts))

    results = worker.loop.run_until_complete(score_all())
    names = ("rm_bounds", "alpha", "beta", "eps", "reward_mode", "reward_scorer", "w_min", "w_max", "k")
    settings = {name: config.algorithm.hybrid[name] for name in names}
    here = train.score(
        MathVerifier(), reward_model, QUESTIONS, ANSWERS, COMPLETIONS, 4, sigma_bar=RunningMean(), **bounds, **settings
    )
    assert [r["reward_extra_info"]["acc"] for r in results] == here.rule_rewards.tolist() == [1, 0, 1, 0, 1, 1, 0, 0]
    raw = torch.tensor([r["reward_extra_info"]["rm"] for r in results])
    torch.testing.assert_close(raw, here.rm_scores, atol=1e-5, rtol=0)
    packed = torch.tensor([r["reward_score"] for r in results], dtype=torch.float32)
    rule_rewards, held = unpack(packed, **bounds)
    assert rule_rewards.tolist() == here.rule_rewards.tolist()
    torch.testing.assert_close(held, here.rm_scores.clamp(bounds["min_rm"], bounds["max_rm"]), atol=1e-5, rtol=0)
    assert {len(set(r["reward_extra_info"])) for r in results} == {5}
    if rm_api == "vllm":
        assert all(body["use_activation"] is False for body in server.requests)


def ask(server, reward_model, **settings):
    settings = dict(rm_api="vllm", rm_model="m", rm_timeout_s=0.3, rm_deadline_s=5.0) | settings
    return asyncio.run(
        reward_client.reward_model_score(reward_model.tokenizer, "What is 5 + 3?", "8", address=server.address, **settings)
    )


@pytest.mark.parametrize("fault", ["drop", "slow", "nonsense", "500", "429"])
def test_what_may_pass_is_tried_again_and_counted(fault, server, reward_model):
    server.faults = [fault, fault]
    answer = ask(server, reward_model)
    assert answer.score == pytest.approx(reward_model.compute_reward("What is 5 + 3?", "8"), abs=1e-6)
    assert answer.retries == 2 and len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop", "Server"),
        ("slow", "did not answer within"),
        ("nonsense", "'high' is not a finite number"),
        ("503", "answered 503"),
    ],
)
def test_what_does_not_pass_ends_at_the_deadline_without_a_score(fault, reason, server, reward_model):
    server.faults = [f"forever {fault}"]
    answer = ask(server, reward_model, rm_deadline_s=1.0)
    assert math.isnan(answer.score) and answer.retries >= 1
    assert reason in answer.reason


def test_a_client_error_is_final(server, reward_model):
    server.faults = ["404"]
    answer = ask(server, reward_model)
    assert math.isnan(answer.score) and answer.retries == 0 and "answered 404" in answer.reason


@pytest.mark.parametrize(
    ("rm_api", "answer"),
    [
        ("vllm", {"data": [{"probs": [0.1, 0.9]}]}),
        ("vllm", {"data": []}),
        ("vllm", {"error": "no such model"}),
        ("vllm", [1.0]),
        ("vllm", {"data": [{"probs": [None]}]}),
        ("vllm", {"data": [{"probs": [True]}]}),
        ("vllm", {"data": [{"probs": [math.inf]}]}),
        ("sglang", {"embedding": [0.1, 0.2]}),
        ("sglang", {"embedding": [math.nan]}),
        ("sglang", None),
    ],
)
def test_an_answer_without_one_score_is_refused(rm_api, answer):
    with pytest.raises(ValueError, match=r"score|finite"):
        reward_client.read_score(rm_api, answer)


def test_a_server_that_is_down_gives_no_zero_and_stops_the_run(reward_model, command_of, in_the_trainer, capfd):
    config = compose(command_of({"group_size": 4}, **BOUNDS))
    settings = dict(config.algorithm.hybrid) | dict(rm_deadline_s=0.6)

    async def score_all():
        rows = zip(QUESTIONS, ANSWERS, COMPLETIONS, strict=True)
        return await asyncio.gather(*(compute_score("d", c, a, {"question": q}, **settings) for q, a, c in rows))

    results = asyncio.run(score_all())
    assert [r["rm_failed"] for r in results] == [1.0] * 8 and all(r["rm_retries"] >= 1 for r in results)
    assert [r["score"] for r in results] == [0.25 if r["acc"] else -0.25 for r in results]
    assert [r["rm"] for r in results] == [-0.5] * 8  # the middle of the bounds, flagged
    assert capfd.readouterr().err.count("no reward-model score") == 8
    data, _ = as_verl_has_them([r["score"] for r in results], [0] * 4 + [1] * 4, 0)
    hybrid = in_the_trainer(config)
    with pytest.raises(RuntimeError, match=r"8 of 8 completions got no reward-model score.*rm_max_failed 0\.05"):
        hybrid.advantages(data.batch["token_level_rewards"], data.batch["response_mask"], data.non_tensor_batch["uid"])
    assert hybrid.sigma_bar.count == 0


def test_the_run_does_not_start_without_its_reward_model(server, command_of, in_the_trainer, monkeypatch):
    monkeypatch.setattr(verl_plugin, "check_reward_model", reward_client.check_reward_model)
    config = compose([*command_of(rm_address=server.address), "algorithm.hybrid.rm_deadline_s=0.6"])
    server.faults = ["forever 500"]
    with pytest.raises(InputError, match=r"no score after \d retries: .*answered 500"):
        in_the_trainer(config)
    server.faults, server.ignores_use_activation = [], True
    with pytest.raises(InputError, match=r"all between 0 and 1.*use_activation"):
        in_the_trainer(config)
    server.ignores_use_activation = False
    in_the_trainer(config)


def test_probabilities_in_the_first_step_stop_the_run(command_of, in_the_trainer):
    """Where verl serves the reward model there is no server to ask before."""
    config = compose(command_of({"group_size": 4}, rm_address=None, rm_gpus=1))
    probabilities = [pack(right, p, **BOUNDS) for right, p in zip([True, False] * 4, np.linspace(0.1, 0.9, 8), strict=True)]
    data, _ = as_verl_has_them(probabilities, [0] * 4 + [1] * 4, 0)
    inputs = (data.batch["token_level_rewards"], data.batch["response_mask"], data.non_tensor_batch["uid"])
    with pytest.raises(RuntimeError, match="scores of the first step are all between 0 and 1"):
        in_the_trainer(config).advantages(*inputs)
    config.algorithm.hybrid.rm_unit_scores = True
    assert in_the_trainer(config).advantages(*inputs)[0].abs().max() > 0


# ----------------------------------------------------------------------------------------------------------------------
# State


def test_sigma_bar_goes_on_after_a_resume(command_of, in_the_trainer, tmp_path):
    config = compose(command_of({"group_size": 4}))

    def step(hybrid, seed):
        rng = random.Random(seed)
        packed = [pack(rng.random() < 0.5, rng.gauss(0, 2), **BOUNDS) for _ in range(16)]
        data, _ = as_verl_has_them(packed, [i // 4 for i in range(16)], seed)
        return hybrid.advantages(data.batch["token_level_rewards"], data.batch["response_mask"], data.non_tensor_batch["uid"])[0]

    through = in_the_trainer(config)
    for seed in range(2):
        step(through, seed)
    folder = Path(config.trainer.default_local_dir) / "global_step_2"
    folder.mkdir()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("2")
    through.on_save(trainer=None, global_step=2, checkpoint_dir=str(folder), async_save=False)
    expected = [step(through, seed) for seed in (2, 3)]
    lines = through.metrics_file.read_text()

    resumed = in_the_trainer(config)  # trainer.resume_mode is auto
    assert (resumed.step, resumed.sigma_bar.count) == (2, 8)
    assert [torch.equal(step(resumed, seed), e) for seed, e in zip((2, 3), expected, strict=True)] == [True, True]
    assert resumed.metrics_file.read_text() == lines  # each step once
    assert sorted(path.name for path in folder.iterdir()) == ["hybrid_state.json"]

    config.trainer.resume_mode = "resume_path"
    config.trainer.resume_from_path = str(folder)
    assert in_the_trainer(config).sigma_bar.count == 8
    config.trainer.resume_mode = "disable"
    assert in_the_trainer(config).sigma_bar.count == 0
    config.trainer.resume_mode = "auto"
    (folder / "hybrid_state.json").write_text('{"step": 2}')
    with pytest.raises(InputError, match=r"no state to go on with.*resume_path"):
        in_the_trainer(config)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    verl_plugin.write_whole(file, "old")
    monkeypatch.setattr(verl_plugin.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        verl_plugin.write_whole(file, "new")
    assert file.read_text() == "old"


# ----------------------------------------------------------------------------------------------------------------------
# The command

VARIANTS = [
    ({}, {}),
    ({"kl_weight": 0.0, "reward_scorer": "tanh", "loss_normalizer": "sequence", "dtype": "float32"}, {}),
    ({"lora_rank": 16, "loss_normalizer": "constant", "gradient_checkpointing": True}, dict(rollout="sglang", rm_api="sglang")),
    ({"reward_mode": "verifier", "max_steps": 3, "system_prompt": "Be brief."}, dict(rm_model=None, rm_address=None)),
    ({"train_batch_size": 64, "eval_data": "x.jsonl", "eval_interval": 10}, dict(gpus_per_node=8, val_files="y.parquet")),
    ({"train_batch_size": 64, "wandb_project": "my project"}, dict(gpus_per_node=8, nodes=2, tensor_parallel=2)),
    ({"lr_schedule": "linear", "run_name": None}, {}),
    ({"rm_bounds": "group", "alpha": 0.05, "beta": 0.05}, dict(rm_address=None, rm_gpus=1)),
]  # fmt: skip


@pytest.mark.parametrize(("hyperparameters", "arguments"), VARIANTS)
def test_the_printed_command_composes_and_passes_verls_validation(hyperparameters, arguments, command_of, in_the_trainer):
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = compose(command_of(hyperparameters, **arguments))
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert not need_critic(config)
    assert need_reference_policy(config) == (hyperparameters.get("kl_weight") != 0.0)
    in_the_trainer(config)
    assert load_reward_manager(config, None).is_async_reward_score is True
    h = DEFAULTS | hyperparameters
    assert config.actor_rollout_ref.actor.optim.lr == h["lr"]
    assert config.data.max_prompt_length + config.data.max_response_length == h["max_length"]
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size * h["group_size"] == h["train_batch_size"]
    assert {key: config.algorithm.hybrid[key] for key in ("alpha", "beta", "reward_mode")} == {
        key: h[key] for key in ("alpha", "beta", "reward_mode")
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.use_kl_in_reward=True", "use_kl_in_reward=False"),
        ("algorithm.adv_estimator=grpo", "adv_estimator=hybrid"),
        ("actor_rollout_ref.rollout.n=4", "rollout.n=8: it is 4"),
        ("reward.reward_manager.name=dapo", "reward_manager.name=naive"),
        ("reward.custom_reward_function.name=other", "custom_reward_function.name=compute_score"),
        ("reward.custom_reward_function.reward_kwargs={alpha:0.1}", "both ends have to pack alike"),
        ("algorithm.hybrid.max_rm=-9", "calibrate"),
        ("+algorithm.hybrid.alfa=0.1", "unknown .'alfa'"),
        ("~algorithm.hybrid.alpha", "missing .'alpha'"),
        ("algorithm.hybrid.rm_address=null", "there is no reward model"),
        ("algorithm.hybrid.rm_api=tgi", "rm_api=vllm"),
        ("reward.reward_model.enable=True", "enable_resource_pool=True"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused_with_the_override(override, message, command_of, in_the_trainer):
    with pytest.raises(InputError, match=re.escape(message).replace(r"\.'", ".'")):
        in_the_trainer(compose([*command_of(), override]))


@pytest.mark.parametrize(
    ("hyperparameters", "arguments", "message"),
    [
        ({"train_batch_size": 4}, {}, "train_batch_size 4.*multiple of group_size 8"),
        ({}, dict(gpus_per_node=3), "multiple of the 3 GPUs"),
        ({"model_name": "embedded"}, {}, "--model"),
        ({"reward_model_name": "embedded"}, dict(rm_model=None), "--rm-model"),
        ({"reward_mode": "verifier"}, dict(rm_address=None), "--rm-model: no reward model has a part"),
        ({}, dict(max_rm=-9.0), "calibrate"),
        ({}, dict(rm_gpus=1), "one of the two"),
        ({}, dict(max_prompt_length=512), "--max-prompt-length 512"),
    ],
)
def test_what_verl_cannot_do_is_refused(hyperparameters, arguments, message, command_of):
    with pytest.raises(InputError, match=message):
        command_of(hyperparameters, **arguments)


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    done = run_command("-m", "src.verl_plugin", "command", str(tmp_path / "none.json"), "--train-files", "x.parquet")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}/none.json: not a run's config.json")


def test_every_hyperparameter_has_its_row_in_the_document(command_of):
    """And what the row names is what the command sets; no row without a parameter."""
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/scale-out.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(DEFAULTS)
    printed = {override.split("=")[0].lstrip("+").split(".", 1)[-1] for override in command_of()}
    printed |= {override.split("=")[0].lstrip("+") for override in command_of(rm_address=None, rm_gpus=1)}
    for name, row in rows:
        if name in verl_command.NO_COUNTERPART:
            assert "none" in row, name
        else:
            overrides = [o for o in re.findall(r"`([a-z_.]+)`", row.split("|")[0]) if "." in o]
            assert overrides, name
            for override in overrides:
                assert any(p == override or p.endswith(f".{override}") for p in printed), (name, override)


def test_the_converted_data_is_what_verl_reads(tmp_path, policy_folder, tokenizer):
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    source = tmp_path / "problems.jsonl"
    lines = ['{"question": "What is 5 + 3?", "answer": 8}', "", '{"question": "And ½ of 4?", "answer": "half of 4 is 2 #### 2"}']
    source.write_text("\n".join(lines) + "\n")
    verl_command.convert(source, tmp_path / "problems.parquet", system_prompt="Be brief.")
    data = RLHFDataset([str(tmp_path / "problems.parquet")], tokenizer, OmegaConf.create({"cache_dir": str(tmp_path)}))
    assert len(data) == 2
    assert [row["reward_model"]["ground_truth"] for row in data] == ["8", "2"]
    assert data[1]["extra_info"]["question"] == "And ½ of 4?"
    assert [m["role"] for m in data[0]["raw_prompt"]] == ["system", "user"]
    source.write_text('{"question": "What?", "answer": "\\\\frac{1}{"}\n')
    with pytest.raises(InputError, match="cannot be compared"):
        verl_command.convert(source, tmp_path / "x.parquet")
    source.write_text('{"question": "What?"}\n')
    with pytest.raises(InputError, match="line 1: must have question and answer"):
        verl_command.convert(source, tmp_path / "x.parquet")


def test_calibration_finds_the_bounds_of_the_warmup(tmp_path, server, reward_model, reward_model_folder, capsys):
    rows = [{"question": q, "completion": c} for q, c in zip(QUESTIONS, COMPLETIONS, strict=True)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = dict(rm_address=server.address, rm_model=str(reward_model_folder), warmup_samples=8)
    verl_command.calibrate(tmp_path / "rollouts.jsonl", **arguments)
    scores = reward_model.score_texts(QUESTIONS, COMPLETIONS)
    low, high = map(float, re.search(r"--min-rm (\S+) --max-rm (\S+)", capsys.readouterr().out).groups())
    assert low == pytest.approx(scores.min().item(), abs=1e-5) and high == pytest.approx(scores.max().item(), abs=1e-5)
    server.ignores_use_activation = True
    with pytest.raises(InputError, match="all between 0 and 1"):
        verl_command.calibrate(tmp_path / "rollouts.jsonl", **arguments)


# ----------------------------------------------------------------------------------------------------------------------
# A whole run


ON_A_CPU = [
    "trainer.device=cpu", "actor_rollout_ref.rollout.name=cpu", "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2", "actor_rollout_ref.model.use_remove_padding=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa", "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False", "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1", "data.dataloader_num_workers=0", "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "ray_kwargs.ray_init.num_cpus=16", "+ray_kwargs.ray_init.num_gpus=1", "+ray_kwargs.ray_init.include_dashboard=False",
]  # fmt: skip


@pytest.mark.slow
def test_real_steps_of_main_ppo_with_the_printed_command(tmp_path, command_of, server):
    """Two steps, then a third after a resume, of verl's own main_ppo on a CPU: tests/verl_on_cpu.py says what stands in."""
    pytest.importorskip("transfer_queue", reason="verl's trainer needs verl[verl-core]")
    verl_command.convert(ROOT / "data/dummy_math_tasks.jsonl", tmp_path / "problems.parquet")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "VERL_USE_EXTERNAL_MODULES": "tests.verl_on_cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "OMP_NUM_THREADS": "1",
    }
    settings = dict(
        rollouts_per_step=2, group_size=4, train_batch_size=8, max_length=256, max_new_tokens=8, kl_weight=0.0, dtype="float32",
        checkpoint_interval=1,
    )  # fmt: skip
    for steps in (2, 3):
        overrides = command_of(
            settings | {"max_steps": steps},
            train_files=str(tmp_path / "problems.parquet"),
            rm_address=server.address,
            min_rm=-9.0,
        )
        overrides += [*ON_A_CPU, f"hydra.run.dir={tmp_path}/hydra"]
        done = run_command("-m", "verl.trainer.main_ppo", *overrides, timeout=280, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / "run-verl/hybrid_metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(line["reward/rm_failed"] == line["reward/incomplete_groups"] == 0 for line in lines)
        assert all(math.isfinite(value) for line in lines for value in line.values())
        state = json.loads((tmp_path / f"run-verl/global_step_{steps}/hybrid_state.json").read_text())
        assert state["step"] == steps and state["sigma_bar"]["count"] == 2 * steps
        assert state["sigma_bar"]["mean"] == pytest.approx(lines[-1]["reward/sigma_bar"]) != 0
        rewards = [float(found) for found in re.findall(r"critic/returns/max:(?:np\.float64\()?(-?[\d.]+)", done.stdout)]
        assert rewards and max(map(abs, rewards)) > 0
    # As many as train.py would ask for: each completion once, and the four before either run.
    assert len(server.requests) == 3 * 8 + 2 * 4
