"""The verl plug-in, run by verl's own code: the same verdicts, scores, rewards and advantages as train.py."""

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
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from src import files
from src.errors import InputError
from src.grpo import compute_advantages
from src.hybrid_reward import Calibration, RewardSettings
from src.math_verifier import MathVerifier
from src.metrics import Scores
from src.problems import Problem
from src.reward_model import AceRewardModel
from src.verl_plugin import client as reward_client
from src.verl_plugin import command as verl_command
from src.verl_plugin import plugin as verl_plugin
from src.verl_plugin.plugin import HybridReward, compute_score, pack, unpack
from tests.conftest import ROOT, needs_verl, run_command
from tests.tools.reward_server import serving

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
    """A function that returns the overrides `command` prints for a run with the given hyperparameters."""

    def overrides(hyperparameters=(), **flags) -> list[str]:
        run = dict(model_name=str(policy_folder), output=str(tmp_path), run_name="run")
        h = DEFAULTS | run | dict(hyperparameters)
        (tmp_path / "config.json").write_text(json.dumps({"hyperparameters": h}))
        usual = dict(train_files="x.parquet", rm_address="127.0.0.1:9", rm_model=str(reward_model_folder))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            verl_command.command(tmp_path / "config.json", **{**usual, **BOUNDS, **flags})
        words = shlex.split(printed.getvalue().replace("\\\n", ""), comments=True)  # join continued lines
        return words[words.index("verl.trainer.main_ppo") + 1 :]

    return overrides


def compose(overrides: list[str]):
    needs_verl()
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides)


@pytest.fixture
def in_the_trainer(monkeypatch):
    """A function that creates a HybridReward the way verl does, but contacts no reward-model server.

    It can be called several times, although a verl process creates only one.
    """
    needs_verl()
    from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    monkeypatch.setattr(verl_plugin, "check_reward_model", lambda *_: None)

    def create(config) -> HybridReward:
        ADV_ESTIMATOR_REGISTRY.pop("hybrid", None)
        return build_checkpoint_callback(config)

    yield create
    ADV_ESTIMATOR_REGISTRY.pop("hybrid", None)


def score_with_train_py(verifier, reward_model, problems, completions, hybrid, calibration) -> Scores:
    """Score completions with train.py, with the settings in the keys of algorithm.hybrid."""
    settings = RewardSettings(**{field.name: hybrid[field.name] for field in fields(RewardSettings)})
    return train.score(verifier, reward_model, problems, completions, settings, calibration)


# ----------------------------------------------------------------------------------------------------------
# One number for a verdict and a score

bound = st.floats(-1000, 1000, width=32)


@given(
    st.tuples(bound, bound),
    st.booleans(),
    st.one_of(st.floats(-(2.0**100), 2.0**100, width=32), st.just(math.nan)),
)
def test_a_verdict_and_a_score_survive_packing_into_one_float32(bounds, right, score):
    low, high = sorted(bounds)
    packed = torch.tensor([pack(right, score, low, high)], dtype=torch.float32)
    rule_rewards, scores = unpack(packed, low, high)
    assert rule_rewards.item() == right
    if math.isnan(score):
        assert scores.isnan().all()
    else:
        clamped = min(max(score, low), high)
        assert abs(scores.item() - clamped) <= 6.1e-8 * (high - low) + 1.2e-7 * abs(clamped)
        assert low <= scores.item() <= high
        if clamped in (low, high):
            assert scores.item() == clamped


@given(st.tuples(bound, bound), st.booleans(), bound, bound)
def test_packing_keeps_the_order_of_scores(bounds, right, a, b):
    low, high = sorted(bounds)
    if a <= b:
        assert np.float32(pack(right, a, low, high)) <= np.float32(pack(right, b, low, high))
    assert pack(True, a, low, high) >= pack(False, b, low, high) + 1.0


@pytest.mark.parametrize("value", [0.0, 0.3, -0.49, 1.001, -7.0, math.nan, math.inf])
def test_a_number_that_was_not_packed_is_refused(value):
    with pytest.raises(RuntimeError, match="not what compute_score returned"):
        unpack(torch.tensor([0.75, value]), -1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------
# 500 groups through train.py and through the plug-in

GROUPS, G, PER_STEP = 500, 8, 10


class FakeRewardModel:
    """Returns known scores, to train.score and to compute_score alike."""

    def __init__(self, scores: dict[str, float]):
        self.scores = scores

    def score_texts(self, questions, completions):
        return torch.tensor([self.scores[completion] for completion in completions])

    async def reward_model_score(self, tokenizer, question, response, server):
        return reward_client.ServerReply(self.scores[response], 0, "")


@pytest.fixture(scope="module")
def rollouts():
    """One problem per completion, the completions, and the reward model's score of each.

    The scores of a group are random, equal, nearly equal, far outside the bounds, or one of them is nan.
    """
    rng = random.Random(0)
    problems, completions, scores = [], [], {}
    for group in range(GROUPS):
        a, b = rng.randrange(50), rng.randrange(50)
        kind, share, spread = rng.randrange(6), rng.random(), rng.choice([0.1, 1.0, 3.0])
        for i in range(G):
            answer = a + b if rng.random() < share else a + b + rng.randrange(1, 9)
            reasoning = f"{a} + {b} = {answer}. That is completion {i} of group {group}"
            text = f"{reasoning}, so the answer is \\boxed{{{answer}}}."
            score = {0: 0.7, 1: 0.3 + 1e-3 * i, 2: rng.uniform(-50, 50)}.get(kind, rng.gauss(-1.0, spread))
            if kind == 5 and i == 0 and group % PER_STEP == 3:
                score = math.nan  # one of 80 in its step
            problems.append(Problem(f"What is {a} + {b}?", str(a + b), "test"))
            completions.append(text)
            scores[text] = float(np.float32(score))
    return problems, completions, scores


def compute_scores(problems: list[Problem], completions: list[str], **settings) -> list[dict]:
    """The result of compute_score for each completion."""

    async def compute_all():
        return await asyncio.gather(
            *(
                compute_score("data", completion, problem.answer, {"question": problem.question}, **settings)
                for problem, completion in zip(problems, completions, strict=True)
            )
        )

    return asyncio.run(compute_all())


@pytest.fixture(scope="module")
def packed(rollouts) -> list[dict]:
    problems, completions, scores = rollouts
    settings = dict(
        **BOUNDS, verifier_method="flexible", rm_api="vllm", rm_address="unused", rm_model="unused",
        rm_max_length=1, rm_timeout_s=1, rm_deadline_s=1, reward_model_tokenizer=object(), alpha=0.5,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl_plugin, "reward_model_score", FakeRewardModel(scores).reward_model_score)
        return compute_scores(problems, completions, **settings)


def as_verl_batch(values: list[float], uids: list, seed: int):
    """A verl batch with its rows shuffled, completions of any length, and some padding rows.

    Returns:
        The batch, and the index into `values` of each of its rows; None for padding.
    """
    needs_verl()
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
    index = np.array(
        [f"padding-{row}" if i is None else uids[i] for row, i in enumerate(order)], dtype=object
    )
    batch = TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=len(order))
    return DataProto(batch=batch, non_tensor_batch={"uid": index}), order


def estimate(hybrid: HybridReward, data) -> tuple[torch.Tensor, torch.Tensor]:
    return hybrid.advantages(
        data.batch["token_level_rewards"], data.batch["response_mask"], data.non_tensor_batch["uid"]
    )


def rounding_errors(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """(B,) by how much more than 1e-5 an advantage may differ from train.py's.

    Dividing by the std of a group amplifies the last bits of its rewards, as reordering its rows would: the
    roundings of 2^-24 in position, r_hat, mean and reward, times a weight of at most 2.
    """
    errors = torch.zeros(len(rewards))
    if scale == "group":
        errors = (2**-22 * 2 / rewards.view(-1, G).std(dim=1)).repeat_interleave(G)
        errors[(errors < 1e-5) | ~errors.isfinite()] = 0.0
    return errors


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
@pytest.mark.parametrize("scorer", ["sigmoid", "tanh"])
def test_500_groups_have_the_rewards_and_advantages_of_train_py(
    rollouts, packed, command_of, in_the_trainer, scorer, scale
):
    needs_verl()
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = compose(command_of({"reward_scorer": scorer, "advantage_scale": scale}))
    hybrid = in_the_trainer(config)
    problems, completions, scores = rollouts
    verifier, calibration, precise = MathVerifier(), Calibration(**BOUNDS), 0
    fake = FakeRewardModel(scores)
    for start in range(0, GROUPS * G, PER_STEP * G):
        part = slice(start, start + PER_STEP * G)
        here = score_with_train_py(
            verifier, fake, problems[part][::G], completions[part], config.algorithm.hybrid, calibration
        )
        expected = compute_advantages(here.rewards, G, scale)
        errors = rounding_errors(here.rewards, scale)
        data, order = as_verl_batch(
            [p["score"] for p in packed[part]], [i // G for i in range(PER_STEP * G)], start
        )
        data = compute_advantage(data, adv_estimator="hybrid", num_repeat=G, config=config.algorithm)
        for row, i in enumerate(order):
            mask = data.batch["response_mask"][row]
            values = (0.0, 0.0, 0.0) if i is None else (here.rewards[i], expected[i], errors[i])
            reward, advantage, error = values
            torch.testing.assert_close(data.batch["returns"][row], mask * reward, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                data.batch["advantages"][row], mask * advantage, atol=1e-5 + error, rtol=0
            )
        assert [p["acc"] for p in packed[part]] == here.rule_rewards.tolist()
        assert [p["rm"] for p in packed[part]] == here.rm_scores.tolist()
        precise += int((errors == 0).sum())
        equal = (here.rewards.view(-1, G) == here.rewards.view(-1, G)[:, :1]).all(dim=1).repeat_interleave(G)
        for row, i in enumerate(order):
            if i is not None and equal[i]:
                assert (data.batch["advantages"][row] == 0).all()
    assert calibration.sigma_bar.count == hybrid.calibration.sigma_bar.count == GROUPS
    assert hybrid.calibration.sigma_bar.mean == pytest.approx(calibration.sigma_bar.mean, abs=1e-6)
    assert precise >= (0.6 if scale == "group" else 1.0) * GROUPS * G


def test_a_group_that_lost_a_completion_gets_no_advantage_and_is_counted(command_of, in_the_trainer):
    hybrid = in_the_trainer(compose(command_of({"group_size": 2, "advantage_scale": "none"})))
    rewards = torch.tensor([[0.75], [-0.75], [0.0], [1.0]])
    mask = torch.tensor([[1], [1], [0], [1]])
    advantages, _ = hybrid.advantages(rewards, mask, np.array(["a", "a", "padding", "b"], dtype=object))
    assert advantages[0].item() == pytest.approx(-advantages[1].item()) and advantages[0] > 0
    assert advantages[2:].tolist() == [[0.0], [0.0]]
    assert hybrid.calibration.sigma_bar.count == 1
    line = json.loads(hybrid.metrics_file.read_text())
    assert (line["step"], line["reward/incomplete_groups"], line["reward/rule_mean"]) == (1, 1.0, 0.5)
    with pytest.raises(RuntimeError, match="no group has all 2 completions"):
        hybrid.advantages(rewards, mask, np.array(["a", "b", "c", "d"], dtype=object))


# ----------------------------------------------------------------------------------------------------------
# Scores over HTTP


def reward_loop_worker(config):
    """verl's reward worker, in this process."""
    needs_verl()
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    return RewardLoopWorker(config, None)


def as_rollout(tokenizer, problem: Problem, completion: str):
    """One completion in the form in which verl's agent loop passes it to a reward worker."""
    needs_verl()
    from tensordict import TensorDict
    from verl import DataProto

    prompt = tokenizer.encode(problem.question)
    response = [*tokenizer.encode(completion), tokenizer.eos_token_id]
    batch = {
        "prompts": torch.tensor([prompt]),
        "responses": torch.tensor([response]),
        "attention_mask": torch.ones(1, len(prompt) + len(response), dtype=torch.int64),
    }
    others = {
        "data_source": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": 0, "question": problem.question},
    }
    others = {key: np.array([value], dtype=object) for key, value in others.items()}
    return DataProto(batch=TensorDict(batch, batch_size=1), non_tensor_batch=others)


PROBLEMS = [Problem("What is 5 + 3?", "8", "test")] * 4 + [Problem("What is 7 * 6?", "42", "test")] * 4
QUESTIONS = [problem.question for problem in PROBLEMS]
COMPLETIONS = [
    "5 + 3 = 8.", "It is 9.", "\\boxed{8}", "I do not know.",
    "7 * 6 = 42", "42", "The answer is 13.", "It is ½.",
]  # fmt: skip


@pytest.mark.parametrize("rm_api", ["vllm", "sglang"])
def test_verls_reward_worker_scores_as_train_py_does(rm_api, server, reward_model, command_of, tokenizer):
    sorted_scores = reward_model.score_texts(QUESTIONS, COMPLETIONS).sort().values
    bounds = dict(min_rm=sorted_scores[1].item(), max_rm=sorted_scores[-2].item())  # one score outside each
    config = compose(command_of({"group_size": 4}, rm_api=rm_api, rm_address=server.address, **bounds))
    worker = reward_loop_worker(config)
    rollouts = [as_rollout(tokenizer, *row) for row in zip(PROBLEMS, COMPLETIONS, strict=True)]

    async def score_all():
        return await asyncio.gather(*map(worker.compute_score, rollouts))

    results = worker.loop.run_until_complete(score_all())
    here = score_with_train_py(
        MathVerifier(),
        reward_model,
        PROBLEMS[::4],
        COMPLETIONS,
        config.algorithm.hybrid,
        Calibration(**bounds),
    )
    verdicts = [result["reward_extra_info"]["acc"] for result in results]
    assert verdicts == here.rule_rewards.tolist() == [1, 0, 1, 0, 1, 1, 0, 0]
    raw = torch.tensor([result["reward_extra_info"]["rm"] for result in results])
    torch.testing.assert_close(raw, here.rm_scores, atol=1e-5, rtol=0)
    packed = torch.tensor([result["reward_score"] for result in results], dtype=torch.float32)
    rule_rewards, clamped = unpack(packed, **bounds)
    assert rule_rewards.tolist() == here.rule_rewards.tolist()
    expected = here.rm_scores.clamp(bounds["min_rm"], bounds["max_rm"])
    torch.testing.assert_close(clamped, expected, atol=1e-5, rtol=0)
    assert {len(set(result["reward_extra_info"])) for result in results} == {5}
    if rm_api == "vllm":
        assert all(body["use_activation"] is False for body in server.requests)


def ask(server, reward_model, **settings) -> reward_client.ServerReply:
    settings = dict(timeout_s=0.3, deadline_s=5.0) | settings
    asked = reward_client.Server(server.address, "vllm", "m", **settings)
    return asyncio.run(reward_client.reward_model_score(reward_model.tokenizer, "What is 5 + 3?", "8", asked))


@pytest.mark.parametrize("fault", ["drop", "slow", "nonsense", "500", "429"])
def test_temporary_failures_are_retried_and_counted(fault, server, reward_model):
    server.faults = [fault, fault]
    reply = ask(server, reward_model)
    assert reply.score == pytest.approx(reward_model.compute_reward("What is 5 + 3?", "8"), abs=1e-6)
    assert reply.retries == 2 and len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop", "Server"),
        ("slow", "did not answer within"),
        ("nonsense", "'high' is not a finite number"),
        ("503", "answered 503"),
    ],
)
def test_permanent_failures_end_at_the_deadline_without_a_score(fault, reason, server, reward_model):
    server.faults = [f"forever {fault}"]
    reply = ask(server, reward_model, deadline_s=1.0)
    assert math.isnan(reply.score) and reply.retries >= 1
    assert reason in reply.reason


def test_a_client_error_is_final(server, reward_model):
    server.faults = ["404"]
    reply = ask(server, reward_model)
    assert math.isnan(reply.score) and reply.retries == 0 and "answered 404" in reply.reason


@pytest.mark.parametrize(
    ("api", "body"),
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
def test_a_reply_without_exactly_one_score_is_refused(api, body):
    with pytest.raises(ValueError, match=r"single score|not a finite number"):
        reward_client.read_score(api, body)


def test_a_server_that_is_down_never_scores_0_and_stops_the_run(command_of, in_the_trainer, capfd):
    config = compose(command_of({"group_size": 4}))
    settings = dict(config.algorithm.hybrid) | dict(rm_deadline_s=0.6)
    results = compute_scores(PROBLEMS, COMPLETIONS, **settings)
    assert [r["rm_failed"] for r in results] == [1.0] * 8 and all(r["rm_retries"] >= 1 for r in results)
    assert [r["score"] for r in results] == [0.25 if r["acc"] else -0.25 for r in results]
    assert [r["rm"] for r in results] == [-0.5] * 8  # the middle of the bounds
    assert capfd.readouterr().err.count("no reward-model score") == 8
    data, _ = as_verl_batch([r["score"] for r in results], [0] * 4 + [1] * 4, 0)
    hybrid = in_the_trainer(config)
    message = r"8 of 8 completions got no reward-model score.*rm_max_failed 0\.05"
    with pytest.raises(RuntimeError, match=message):
        estimate(hybrid, data)
    assert hybrid.calibration.sigma_bar.count == 0


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
    """If verl serves the reward model, there is no server to ask before the run."""
    config = compose(command_of({"group_size": 4}, rm_address=None, rm_gpus=1))
    probabilities = [
        pack(right, p, **BOUNDS) for right, p in zip([True, False] * 4, np.linspace(0.1, 0.9, 8), strict=True)
    ]
    data, _ = as_verl_batch(probabilities, [0] * 4 + [1] * 4, 0)
    with pytest.raises(RuntimeError, match="scores of the first step are all between 0 and 1"):
        estimate(in_the_trainer(config), data)
    config.algorithm.hybrid.rm_unit_scores = True
    assert estimate(in_the_trainer(config), data)[0].abs().max() > 0


# ----------------------------------------------------------------------------------------------------------
# State


def test_sigma_bar_continues_after_a_resume(command_of, in_the_trainer):
    config = compose(command_of({"group_size": 4}))

    def step(hybrid, seed):
        rng = random.Random(seed)
        packed = [pack(rng.random() < 0.5, rng.gauss(0, 2), **BOUNDS) for _ in range(16)]
        data, _ = as_verl_batch(packed, [i // 4 for i in range(16)], seed)
        return estimate(hybrid, data)[0]

    uninterrupted = in_the_trainer(config)
    for seed in range(2):
        step(uninterrupted, seed)
    folder = Path(config.trainer.default_local_dir) / "global_step_2"
    folder.mkdir()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("2")
    uninterrupted.on_save(trainer=None, global_step=2, checkpoint_dir=str(folder), async_save=False)
    expected = [step(uninterrupted, seed) for seed in (2, 3)]
    lines = uninterrupted.metrics_file.read_text()

    resumed = in_the_trainer(config)  # trainer.resume_mode is auto
    assert (resumed.step, resumed.calibration.sigma_bar.count) == (2, 8)
    for seed, advantages in zip((2, 3), expected, strict=True):
        assert torch.equal(step(resumed, seed), advantages)
    assert resumed.metrics_file.read_text() == lines  # each step once
    assert sorted(path.name for path in folder.iterdir()) == ["hybrid_state.json"]

    config.trainer.resume_mode = "resume_path"
    config.trainer.resume_from_path = str(folder)
    assert in_the_trainer(config).calibration.sigma_bar.count == 8
    config.trainer.resume_mode = "disable"
    assert in_the_trainer(config).calibration.sigma_bar.count == 0
    config.trainer.resume_mode = "auto"
    (folder / "hybrid_state.json").write_text('{"step": 2}')
    with pytest.raises(InputError, match=r"no state to resume from.*resume_path"):
        in_the_trainer(config)


def test_a_failed_save_leaves_the_old_state_intact(command_of, in_the_trainer, tmp_path, monkeypatch):
    hybrid = in_the_trainer(compose(command_of()))
    hybrid.on_save(trainer=None, global_step=0, checkpoint_dir=str(tmp_path))
    saved = (tmp_path / "hybrid_state.json").read_text()
    hybrid.step = 1
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        hybrid.on_save(trainer=None, global_step=1, checkpoint_dir=str(tmp_path))
    assert (tmp_path / "hybrid_state.json").read_text() == saved


# ----------------------------------------------------------------------------------------------------------
# The command

VARIANTS = [
    ({}, {}),
    ({"kl_weight": 0.0, "reward_scorer": "tanh", "loss_normalizer": "sequence", "dtype": "float32"}, {}),
    (
        {"lora_rank": 16, "loss_normalizer": "constant", "gradient_checkpointing": True},
        dict(rollout="sglang", rm_api="sglang"),
    ),
    (
        {"reward_mode": "verifier", "max_steps": 3, "system_prompt": "Be brief."},
        dict(rm_model=None, rm_address=None),
    ),
    (
        {"train_batch_size": 64, "eval_data": "x.jsonl", "eval_interval": 10},
        dict(gpus_per_node=8, val_files="y.parquet"),
    ),
    (
        {"train_batch_size": 64, "wandb_project": "my project"},
        dict(gpus_per_node=8, nodes=2, tensor_parallel=2),
    ),
    ({"lr_schedule": "linear", "run_name": None}, {}),
    ({"rm_bounds": "group", "alpha": 0.05, "beta": 0.05}, dict(rm_address=None, rm_gpus=1)),
]


@pytest.mark.parametrize(("hyperparameters", "flags"), VARIANTS)
def test_the_printed_command_composes_and_passes_verls_validation(
    hyperparameters, flags, command_of, in_the_trainer
):
    needs_verl()
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = compose(command_of(hyperparameters, **flags))
    validate_config(
        config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )
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
        ("actor_rollout_ref.rollout.n=4", "rollout.n=8: it is 4, but must equal"),
        ("reward.reward_manager.name=dapo", "reward_manager.name=naive"),
        ("reward.custom_reward_function.name=other", "custom_reward_function.name=compute_score"),
        (
            "reward.custom_reward_function.reward_kwargs={alpha:0.1}",
            "packed and unpacked with the same settings",
        ),
        ("algorithm.hybrid.max_rm=-9", "calibrate"),
        ("+algorithm.hybrid.alfa=0.1", "unknown .'alfa'"),
        ("~algorithm.hybrid.alpha", "missing .'alpha'"),
        ("algorithm.hybrid.rm_address=null", "there is no reward model"),
        ("algorithm.hybrid.rm_api=tgi", "rm_api=vllm"),
        ("reward.reward_model.enable=True", "enable_resource_pool=True"),
    ],
)
def test_a_setting_that_would_change_the_reward_is_refused_with_the_override(
    override, message, command_of, in_the_trainer
):
    with pytest.raises(InputError, match=re.escape(message).replace(r"\.'", ".'")):
        in_the_trainer(compose([*command_of(), override]))


@pytest.mark.parametrize(
    ("hyperparameters", "flags", "message"),
    [
        ({"train_batch_size": 4}, {}, "train_batch_size 4.*multiple of group_size 8"),
        ({}, dict(gpus_per_node=3), "multiple of the 3 GPUs"),
        ({"model_name": "embedded"}, {}, "--model"),
        ({"reward_model_name": "embedded"}, dict(rm_model=None), "--rm-model"),
        ({"reward_mode": "verifier"}, dict(rm_address=None), "--rm-model: this reward uses no reward model"),
        ({}, dict(max_rm=-9.0), "calibrate"),
        ({}, dict(rm_gpus=1), "pass one of the two"),
        ({}, dict(max_prompt_length=512), "--max-prompt-length 512"),
    ],
)
def test_what_verl_cannot_do_is_refused(hyperparameters, flags, message, command_of):
    with pytest.raises(InputError, match=message):
        command_of(hyperparameters, **flags)


@pytest.mark.slow
def test_the_command_line_reports_an_error_in_one_line(tmp_path):
    config = tmp_path / "none.json"
    done = run_command("-m", "src.verl_plugin", "command", str(config), "--train-files", "x.parquet")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"error: {config}: not a run's config.json")


def test_the_document_has_a_row_for_every_hyperparameter(command_of):
    """Each row names overrides that `command` sets, or says that there are none; no row is left over."""
    table = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| (.+) \|$", (ROOT / "docs/scale-out.md").read_text(), re.MULTILINE
    )
    rows = [(name, row.replace("<name>", name)) for names, row in table for name in re.findall(r"\w+", names)]
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


def test_verl_reads_the_converted_data(tmp_path, policy_folder, tokenizer):
    needs_verl()
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    source, out = tmp_path / "problems.jsonl", tmp_path / "problems.parquet"
    lines = [
        '{"question": "What is 5 + 3?", "answer": 8}',
        "",
        '{"question": "And ½ of 4?", "answer": "half of 4 is 2 #### 2"}',
    ]
    source.write_text("\n".join(lines) + "\n")
    verl_command.convert(str(source), out, system_prompt="Be brief.")
    data = RLHFDataset([str(out)], tokenizer, OmegaConf.create({"cache_dir": str(tmp_path)}))
    assert len(data) == 2
    assert [row["reward_model"]["ground_truth"] for row in data] == ["8", "2"]
    assert data[1]["extra_info"]["question"] == "And ½ of 4?"
    assert [m["role"] for m in data[0]["raw_prompt"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"question": "What?", "answer": "\\frac{1}{"}', "cannot be compared"),
        ('{"question": "What?"}', "line 1: no 'answer'; each record must have 'question' and 'answer'"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_not_converted(line, message, tmp_path):
    (tmp_path / "problems.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        verl_command.convert(str(tmp_path / "problems.jsonl"), tmp_path / "problems.parquet")


def test_calibration_prints_the_lowest_and_the_highest_score(
    tmp_path, server, reward_model, reward_model_folder, capsys
):
    questions, completions = [*QUESTIONS, "What is 1 + 1?"], [*COMPLETIONS, ""]  # a completion may be empty
    rows = [{"question": q, "completion": c} for q, c in zip(questions, completions, strict=True)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(rm_address=server.address, rm_model=str(reward_model_folder), warmup_samples=9)
    verl_command.calibrate(tmp_path / "rollouts.jsonl", **flags)
    scores = reward_model.score_texts(questions, completions)
    low, high = map(float, re.search(r"--min-rm (\S+) --max-rm (\S+)", capsys.readouterr().out).groups())
    assert low == pytest.approx(scores.min().item(), abs=1e-5)
    assert high == pytest.approx(scores.max().item(), abs=1e-5)
    server.ignores_use_activation = True
    with pytest.raises(InputError, match="all between 0 and 1"):
        verl_command.calibrate(tmp_path / "rollouts.jsonl", **flags)


# ----------------------------------------------------------------------------------------------------------
# A complete run

ON_A_CPU = [
    "trainer.device=cpu",
    "actor_rollout_ref.rollout.name=cpu",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
    "actor_rollout_ref.model.use_remove_padding=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "data.dataloader_num_workers=0",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "ray_kwargs.ray_init.num_cpus=16",
    "+ray_kwargs.ray_init.num_gpus=1",
    "+ray_kwargs.ray_init.include_dashboard=False",
]


@pytest.mark.slow
def test_real_steps_of_main_ppo_with_the_printed_command(tmp_path, command_of, server):
    """Two steps of verl's own main_ppo, and a third after a resume.

    tests/tools/verl_on_cpu.py explains how verl runs on a CPU.
    """
    pytest.importorskip("transfer_queue", reason="verl's trainer needs verl[verl-core]")
    verl_command.convert(str(ROOT / "data/dummy_math_tasks.jsonl"), tmp_path / "problems.parquet")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "VERL_USE_EXTERNAL_MODULES": "tests.tools.verl_on_cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "OMP_NUM_THREADS": "1",
    }
    settings = dict(
        rollouts_per_step=2, group_size=4, train_batch_size=8, max_length=256, max_new_tokens=8,
        kl_weight=0.0, dtype="float32", checkpoint_interval=1,
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
        metrics = (tmp_path / "run-verl/hybrid_metrics.jsonl").read_text()
        lines = [json.loads(line) for line in metrics.splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(line["reward/rm_failed"] == line["reward/incomplete_groups"] == 0 for line in lines)
        assert all(math.isfinite(value) for line in lines for value in line.values())
        state = json.loads((tmp_path / f"run-verl/global_step_{steps}/hybrid_state.json").read_text())
        assert state["step"] == steps and state["sigma_bar"]["count"] == 2 * steps
        assert state["sigma_bar"]["mean"] == pytest.approx(lines[-1]["reward/sigma_bar"]) != 0
        rewards = re.findall(r"critic/returns/max:(?:np\.float64\()?(-?[\d.]+)", done.stdout)
        assert rewards and max(abs(float(reward)) for reward in rewards) > 0
    # Each completion was scored once, plus the four responses that each of the two runs asks about first.
    assert len(server.requests) == 3 * 8 + 2 * 4
