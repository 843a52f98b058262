"""The same hybrid reward on verl's distributed trainer: Ray, FSDP or Megatron, vLLM or SGLang, and no patch of verl.

    python -m src.verl_plugin convert data/arithmetic_train.jsonl data/arithmetic_train.parquet
    python -m src.verl_plugin calibrate output/RUN/rollouts.jsonl --rm-address localhost:8001 --rm-model nvidia/AceMath-7B-RM
    python -m src.verl_plugin command output/RUN/config.json --train-files data/arithmetic_train.parquet ...

A reward function of verl sees one completion and never its group; an advantage estimator sees the groups, but of each
completion one float32. So the work is divided: `compute_score`, in verl's reward workers, judges and scores a completion and
packs both results into that number (`pack`); `HybridReward.advantages`, in the trainer, unpacks them and calls the functions
that train.py calls. verl makes the `HybridReward` as its checkpoint callback (trainer.checkpoint_callback_class), which is
where the settings are checked, the estimator is registered, and sigma_bar is saved with each checkpoint.

Written for verl 0.9.1 and its default ("v1") trainer; docs/scale-out.md has the commands and says what was run.
"""

import asyncio
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from src.errors import InputError
from src.grpo import compute_advantages
from src.hybrid_reward import RunningMean, hybrid_rewards
from src.math_verifier import MathVerifier
from src.reward_client import (
    SIGMOID,
    RewardModelAnswer,
    check_reward_model,
    like_probabilities,
    load_tokenizer,
    reward_model_score,
)
from src.run_log import Scores, reward_metrics

# What algorithm.hybrid has to hold, all of it; `command` prints it. The first group goes to hybrid_rewards as it is.
REWARD_SETTINGS = (
    "reward_mode", "reward_scorer", "rm_bounds", "alpha", "beta", "eps", "w_min", "w_max", "k", "min_rm", "max_rm",
)  # fmt: skip
GROUP_SETTINGS = ("advantage_scale", "group_size", "rm_max_failed", "rm_unit_scores")
SCORER_SETTINGS = ("verifier_method", "rm_api", "rm_address", "rm_model", "rm_max_length", "rm_timeout_s", "rm_deadline_s")

STATE_FILE = "hybrid_state.json"
NO_SCORE = 0.25


# ----------------------------------------------------------------------------------------------------------------------
# One number for a verdict and a score


def pack(right: bool, score: float, min_rm: float, max_rm: float) -> float:
    """Verdict and score as one number, the only thing that verl hands from a reward function to an advantage estimator.

    Its sign is the verdict. From -1 to -0.5 or from 0.5 to 1 it rises with the score's place between the bounds, which holds
    for bands that touch, overlap or have no width, as r_hat itself would not; float32 keeps the place to 6e-8.

    Args:
        score: Raw; held within the bounds here. nan where it could not be had: +-0.25.

    >>> pack(True, 3.0, min_rm=-1.0, max_rm=3.0), pack(False, 1.0, min_rm=-1.0, max_rm=3.0), pack(False, math.nan, 0.0, 0.0)
    (1.0, -0.75, -0.25)
    """
    if math.isnan(score):
        return NO_SCORE if right else -NO_SCORE
    place = (min(max(score, min_rm), max_rm) - min_rm) / (max_rm - min_rm) if max_rm > min_rm else 0.0
    return 0.5 + 0.5 * place if right else -1.0 + 0.5 * place


def unpack(packed: torch.Tensor, min_rm: float, max_rm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Verdicts (1 = right) and held scores, nan where there was none; (B,) float32 each.

    Raises:
        RuntimeError: A number that `pack` does not make: something in between has changed the rewards.
    """
    numbers = packed.double()
    no_score = numbers.abs() == NO_SCORE
    strange = ~(((numbers.abs() >= 0.5) & (numbers.abs() <= 1.0)) | no_score)  # nan too
    if strange.any():
        raise RuntimeError(
            f"{int(strange.sum())} of {len(packed)} rewards, for example {packed[strange][0].item()}, are not as compute_score "
            "gave them; a KL term in the reward, another reward manager or another precision would change them"
        )
    right = numbers > 0
    place = 2.0 * (numbers - torch.where(right, 0.5, -1.0))
    scores = ((1.0 - place) * min_rm + place * max_rm).float()  # exact at both ends
    return right.float(), scores.masked_fill(no_score, torch.nan)


# ----------------------------------------------------------------------------------------------------------------------
# In verl's reward workers: one completion


@functools.cache
def _verifier(method: str) -> MathVerifier:
    return MathVerifier(method)


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict,
    *,
    min_rm: float,
    max_rm: float,
    verifier_method: str,
    rm_api: str,
    rm_address: str | None,
    rm_model: str | None,
    rm_max_length: int,
    rm_timeout_s: float,
    rm_deadline_s: float,
    reward_router_address: str | None = None,
    reward_model_tokenizer: PreTrainedTokenizerBase | None = None,
    **of_the_estimator: Any,
) -> dict[str, float]:
    """verl's custom_reward_function: the verdict on one completion and its reward-model score.

    Args:
        data_source, solution_str, ground_truth, extra_info: From verl; extra_info["question"] is what `convert` puts there.
        min_rm, max_rm: Interval that scores are held in.
        rm_address: host:port of a server with the reward model; None takes reward_router_address, verl's own.
        rm_api, rm_model, rm_max_length, rm_timeout_s, rm_deadline_s: As `reward_model_score`.

    Returns:
        score: `pack`ed, for the estimator. acc: 1.0 if right. rm: the raw score (the middle of the bounds where there is
        none). rm_failed: 1.0 if there is none. rm_retries. verl logs all of them for its validation set.
    """
    question = extra_info["question"]
    judging = asyncio.to_thread(_verifier(verifier_method).verify, question, solution_str, ground_truth)
    if rm_api == "none":
        verdict, answer = await judging, RewardModelAnswer(0.0, 0, "")
    else:
        address = rm_address or reward_router_address
        assert address is not None and rm_model is not None  # `check_config` has seen to it
        tokenizer = reward_model_tokenizer or load_tokenizer(rm_model)
        scored = reward_model_score(
            tokenizer, question, solution_str, address=address, rm_api=rm_api, rm_model=rm_model, rm_max_length=rm_max_length,
            rm_timeout_s=rm_timeout_s, rm_deadline_s=rm_deadline_s,
        )  # fmt: skip
        verdict, answer = await asyncio.gather(judging, scored)
    right = verdict["correct"]
    failed = math.isnan(answer.score)
    if failed:
        print(f"warning: no reward-model score after {answer.retries} retries: {answer.reason}", file=sys.stderr, flush=True)
    return {
        "score": pack(right, answer.score, min_rm, max_rm),
        "acc": float(right),
        "rm": 0.5 * (min_rm + max_rm) if failed else answer.score,
        "rm_failed": float(failed),
        "rm_retries": float(answer.retries),
    }


# ----------------------------------------------------------------------------------------------------------------------
# In verl's trainer: all completions of a step


class HybridReward:
    """What train.py does between rollout and update, for verl's trainer; verl makes one, with its whole configuration.

    Registers `advantages` as the estimator "hybrid", goes on with the sigma_bar of the checkpoint that verl resumes from, and
    appends a line a step to hybrid_metrics.jsonl in trainer.default_local_dir.

    Raises:
        InputError: A setting with which the reward could not be what it is on one machine, or a reward model that does not
            answer.
    """

    def __init__(self, config: Any):
        from verl.trainer.ppo.core_algos import register_adv_est

        check_config(config)
        self.settings = dict(config.algorithm.hybrid)
        self.sigma_bar = RunningMean()
        self.step = 0
        checkpoint = checkpoint_to_resume(config.trainer)
        if checkpoint is not None:
            self.resume(checkpoint)
        self.metrics_file = Path(config.trainer.default_local_dir) / "hybrid_metrics.jsonl"
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.metrics_file.read_text().splitlines(keepends=True) if self.metrics_file.exists() else []
        write_whole(self.metrics_file, "".join(line for line in lines if json.loads(line)["step"] <= self.step))
        if self.settings["rm_api"] != "none" and self.settings["rm_address"]:
            check_reward_model({name: self.settings[name] for name in SCORER_SETTINGS}, self.settings["rm_unit_scores"])
        register_adv_est("hybrid")(self.advantages)

    def advantages(
        self, token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages of a batch, by train.py's functions; takes its sigma_u into sigma_bar.

        Args:
            token_level_rewards: (B, R) float32, `pack`ed, at one token of each completion.
            response_mask: (B, R); a row of zeros is padding, and takes part in nothing.
            index: (B,) the group of each row, in any order. A group that verl lost a completion of has no advantage, and is
                counted.

        Returns:
            Advantages and rewards, (B, R) each and the same at each token of a completion. verl calls the second returns, which
            only a critic would read, and logs both.

        Raises:
            RuntimeError: More scores failed than rm_max_failed allows, or the rewards are not what `pack` made.
        """
        h = self.settings
        group_size = h["group_size"]
        rows_of: dict[Any, list[int]] = {}
        for row in response_mask.any(dim=1).nonzero().flatten().tolist():
            rows_of.setdefault(index[row], []).append(row)
        whole = [rows for rows in rows_of.values() if len(rows) == group_size]
        if not whole:
            raise RuntimeError(f"no group of {group_size} completions in this step; the log of the rollout has the reasons")
        rows = torch.tensor(whole).flatten()  # (B',) the completions of a question side by side
        packed = token_level_rewards.sum(dim=1).cpu()[rows]  # (B',)
        rule_rewards, rm_scores = unpack(packed, h["min_rm"], h["max_rm"])
        self.check_scores(rm_scores)
        parts = hybrid_rewards(
            rule_rewards, rm_scores, group_size, sigma_bar=self.sigma_bar, **{name: h[name] for name in REWARD_SETTINGS}
        )
        of_rows = compute_advantages(parts.rewards, group_size, h["advantage_scale"])  # (B',)
        self.step += 1
        metrics = reward_metrics(Scores([], rule_rewards, *parts), of_rows, group_size)
        at_the_bounds = (packed.abs() == 0.5) | (packed.abs() == 1.0)  # compute_score has held them there
        metrics |= {
            "reward/rm_clamped_frac": at_the_bounds.float().mean().item() if h["max_rm"] > h["min_rm"] else 0.0,
            "reward/rm_failed": float(rm_scores.isnan().sum()),
            "reward/sigma_bar": self.sigma_bar.mean,
            "reward/incomplete_groups": float(len(rows_of) - len(whole)),
        }
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        both = torch.zeros(2, len(response_mask))
        both[:, rows] = torch.stack([of_rows, parts.rewards])
        advantages, rewards = both.to(response_mask.device)[:, :, None] * response_mask  # (B, R) each
        return advantages, rewards

    def check_scores(self, rm_scores: torch.Tensor) -> None:
        """Stop the run where it would train on scores that are none."""
        h = self.settings
        failed = int(rm_scores.isnan().sum())
        if failed > h["rm_max_failed"] * len(rm_scores):
            raise RuntimeError(
                f"{failed} of {len(rm_scores)} completions got no reward-model score, more than the share of rm_max_failed "
                f"{h['rm_max_failed']}; the log of the reward workers has the reasons. Put the server right and resume"
            )
        raw = h["rm_api"] != "none" and not h["rm_unit_scores"] and (h["min_rm"] < 0.0 or h["max_rm"] > 1.0)
        if raw and self.sigma_bar.count == 0 and like_probabilities(rm_scores[rm_scores.isfinite()].tolist()):
            raise RuntimeError(f"the reward-model scores of the first step are {SIGMOID}")

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        """Called by verl when it has written a checkpoint: put the state beside it, in one piece."""
        state = {"step": self.step, "sigma_bar": {"mean": self.sigma_bar.mean, "count": self.sigma_bar.count}}
        write_whole(Path(checkpoint_dir) / STATE_FILE, json.dumps(state) + "\n")

    def resume(self, checkpoint: Path) -> None:
        file = checkpoint / STATE_FILE
        try:
            state = json.loads(file.read_text())
            self.step, self.sigma_bar = state["step"], RunningMean(**state["sigma_bar"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}: no state to go on with ({type(error).__name__}: {error}); resume from an earlier checkpoint with "
                "trainer.resume_mode=resume_path trainer.resume_from_path=FOLDER, or begin anew with trainer.resume_mode=disable"
            ) from None


def check_config(config: Any) -> None:
    """Refuse what cannot give the single-machine reward, before any model loads.

    Raises:
        InputError: With the override to change.
    """
    hybrid, names = dict(config.algorithm.get("hybrid") or {}), {*REWARD_SETTINGS, *GROUP_SETTINGS, *SCORER_SETTINGS}
    if set(hybrid) != names:
        raise InputError(
            f"+algorithm.hybrid: missing {sorted(names - set(hybrid))}, unknown {sorted(set(hybrid) - names)}; take it whole "
            "from python -m src.verl_plugin command"
        )
    function, manager, served = (config.reward[key] for key in ("custom_reward_function", "reward_manager", "reward_model"))
    n, same = config.actor_rollout_ref.rollout.n, dict(function.get("reward_kwargs") or {}) == hybrid
    needs = [
        (config.algorithm.adv_estimator == "hybrid", "algorithm.adv_estimator=hybrid", "others do not know the packed score"),
        (not config.algorithm.use_kl_in_reward, "algorithm.use_kl_in_reward=False",
         "it changes the packed score; set actor_rollout_ref.actor.use_kl_loss=True"),
        ((function.path, function.name) == ("pkg://src.verl_plugin", "compute_score"),
         "reward.custom_reward_function.path=pkg://src.verl_plugin reward.custom_reward_function.name=compute_score", "it packs"),
        (same, "+reward.custom_reward_function.reward_kwargs='${algorithm.hybrid}'", "both ends have to pack alike"),
        ((manager.source, manager.name) == ("register", "naive"), "reward.reward_manager.name=naive",
         "others change the packed score"),
        (n == hybrid["group_size"] >= 2, f"actor_rollout_ref.rollout.n={hybrid['group_size']}",
         f"it is {n}; it has to be algorithm.hybrid.group_size, and at least 2"),
        (hybrid["rm_api"] in ("vllm", "sglang", "none"), "algorithm.hybrid.rm_api=vllm, =sglang or =none", "it is another"),
        (not served.enable or served.enable_resource_pool, "reward.reward_model.enable_resource_pool=True",
         "on the GPUs that train, verl scores without the question and the answer"),
    ]  # fmt: skip
    if hybrid["rm_api"] != "none":
        needs += [
            (hybrid["rm_model"], "algorithm.hybrid.rm_model", "its tokenizer writes the conversation"),
            (hybrid["rm_address"] or served.enable, "algorithm.hybrid.rm_address=HOST:PORT or reward.reward_model.enable=True",
             "there is no reward model"),
            (hybrid["max_rm"] > hybrid["min_rm"], "algorithm.hybrid.min_rm below algorithm.hybrid.max_rm",
             "python -m src.verl_plugin calibrate finds them"),
        ]  # fmt: skip
    for holds, override, why in needs:
        if not holds:
            raise InputError(f"the hybrid reward needs {override}: {why}")


def checkpoint_to_resume(trainer: Any) -> Path | None:
    """The folder that verl is about to resume from."""
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    if trainer.resume_mode == "disable":
        return None
    folder = trainer.resume_from_path
    if trainer.resume_mode == "auto":
        folder = find_latest_ckpt_path(str(Path(trainer.default_local_dir).absolute()))
    return None if folder is None else Path(folder)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is whole whenever it is there."""
    aside = file.with_name(f".{file.name}.partial")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, file)


if __name__ == "__main__":
    from src.verl_command import cli

    cli()
