"""The same hybrid reward on verl's distributed trainer, without patching verl.

    python -m src.verl_plugin convert data/arithmetic_train.jsonl data/arithmetic_train.parquet
    python -m src.verl_plugin calibrate output/RUN/rollouts.jsonl \\
        --rm-address localhost:8001 --rm-model nvidia/AceMath-7B-RM
    python -m src.verl_plugin command output/RUN/config.json --train-files data/arithmetic_train.parquet ...

verl trains on a Ray cluster with FSDP or Megatron, and samples with vLLM or SGLang. A reward function in verl
sees one completion but never the completion's group. An advantage estimator sees the groups, but gets only
one float32 per completion. The work is therefore split. `compute_score`, in verl's reward workers, judges and
scores a completion and packs both results into that one number (`pack`). `HybridReward.advantages`, in verl's
trainer, unpacks the numbers and calls the same functions as train.py. verl creates the `HybridReward` object
as its checkpoint callback (trainer.checkpoint_callback_class). That object checks the configuration,
registers the estimator, and saves sigma_bar with each checkpoint.

Written for verl 0.9.1 and its default ("v1") trainer. docs/scale-out.md has the steps and lists what was
tested.
"""

import asyncio
import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from src.errors import InputError
from src.files import write_text
from src.grpo import compute_advantages
from src.hybrid_reward import Calibration, HybridRewards, RewardSettings, RunningMean, hybrid_rewards
from src.math_verifier import MathVerifier
from src.metrics import reward_metrics
from src.verl_plugin.client import (
    SIGMOID,
    Server,
    ServerReply,
    check_reward_model,
    load_reward_tokenizer,
    look_like_probabilities,
    reward_model_score,
)
from src.verl_plugin.settings import REWARD_SETTINGS, check_config

STATE_FILE = "hybrid_state.json"
NO_SCORE = 0.25


# ----------------------------------------------------------------------------------------------------------
# One number for a verdict and a score


def pack(right: bool, score: float, min_rm: float, max_rm: float) -> float:
    """Pack a verdict and a score into one number, which is all that verl passes to an advantage estimator.

    The sign is the verdict. The number lies between 0.5 and 1 for a right answer and between -1 and -0.5 for
    a wrong one, and rises with the score's position between the bounds. Unlike r_hat, it can be unpacked even
    if the bands of the verdicts touch, overlap or have no width. float32 preserves the position to within
    6e-8.

    Args:
        score: Raw score, which is clamped to the bounds here; nan if scoring failed, which is packed as
            +-0.25.

    >>> pack(True, 3.0, min_rm=-1.0, max_rm=3.0), pack(False, 1.0, min_rm=-1.0, max_rm=3.0)
    (1.0, -0.75)
    >>> pack(False, math.nan, min_rm=0.0, max_rm=0.0)
    -0.25
    """
    if math.isnan(score):
        return NO_SCORE if right else -NO_SCORE
    position = (min(max(score, min_rm), max_rm) - min_rm) / (max_rm - min_rm) if max_rm > min_rm else 0.0
    return 0.5 + 0.5 * position if right else -1.0 + 0.5 * position


def unpack(packed: torch.Tensor, min_rm: float, max_rm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Recover the verdicts and the clamped scores from packed numbers.

    Returns:
        The verdicts (1 = right) and the scores (nan if scoring failed), (B,) float32 each.

    Raises:
        RuntimeError: A number cannot have come from `pack`, so something in verl changed the rewards.
    """
    numbers = packed.double()
    no_score = numbers.abs() == NO_SCORE
    invalid = ~(((numbers.abs() >= 0.5) & (numbers.abs() <= 1.0)) | no_score)  # nan too
    if invalid.any():
        raise RuntimeError(
            f"{int(invalid.sum())} of {len(packed)} rewards, for example {packed[invalid][0].item()}, are "
            "not what compute_score returned; look for a KL term in the reward, another reward manager, or a "
            "lower precision"
        )
    right = numbers > 0
    position = 2.0 * (numbers - torch.where(right, 0.5, -1.0))
    scores = ((1.0 - position) * min_rm + position * max_rm).float()  # exact at both ends
    return right.float(), scores.masked_fill(no_score, torch.nan)


# ----------------------------------------------------------------------------------------------------------
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
    reward_router_address: str | None = None,
    reward_model_tokenizer: PreTrainedTokenizerBase | None = None,
    **hybrid: Any,
) -> dict[str, float]:
    """verl's custom_reward_function: the verdict on one completion and its reward-model score.

    verl dictates the signature.

    Args:
        data_source, solution_str, ground_truth, extra_info: A row that `convert` wrote, and its completion.
        reward_router_address, reward_model_tokenizer: Passed by verl only if it serves the reward model.
        hybrid: All of algorithm.hybrid. Only the bounds and SCORER_SETTINGS are used.

    Returns:
        Five numbers, which verl logs for its validation set:
        score: The packed number for the estimator.
        acc: 1.0 if the answer is right, else 0.0.
        rm: The raw score, or the middle of the bounds if scoring failed.
        rm_failed: 1.0 if scoring failed, else 0.0.
        rm_retries: How many times the request was retried.
    """
    question = extra_info["question"]
    verify = _verifier(hybrid["verifier_method"]).verify
    judging = asyncio.to_thread(verify, question, solution_str, ground_truth)
    if hybrid["rm_api"] == "none":
        verdict, reply = await judging, ServerReply(0.0, 0, "")
    else:
        server = scoring_server(hybrid, hybrid["rm_address"] or reward_router_address)
        tokenizer = reward_model_tokenizer or load_reward_tokenizer(server.model)
        scoring = reward_model_score(tokenizer, question, solution_str, server)
        verdict, reply = await asyncio.gather(judging, scoring)
    right = verdict["correct"]
    failed = math.isnan(reply.score)
    if failed:
        print(
            f"warning: no reward-model score after {reply.retries} retries: {reply.reason}",
            file=sys.stderr,
            flush=True,
        )
    min_rm, max_rm = hybrid["min_rm"], hybrid["max_rm"]
    return {
        "score": pack(right, reply.score, min_rm, max_rm),
        "acc": float(right),
        "rm": 0.5 * (min_rm + max_rm) if failed else reply.score,
        "rm_failed": float(failed),
        "rm_retries": float(reply.retries),
    }


def scoring_server(hybrid: dict, address: str | None) -> Server:
    """The server at an address, with its settings from algorithm.hybrid."""
    assert address is not None and hybrid["rm_model"] is not None  # guaranteed by `check_config`
    return Server(
        address=address,
        api=hybrid["rm_api"],
        model=hybrid["rm_model"],
        max_length=hybrid["rm_max_length"],
        timeout_s=hybrid["rm_timeout_s"],
        deadline_s=hybrid["rm_deadline_s"],
    )


# ----------------------------------------------------------------------------------------------------------
# In verl's trainer: all completions of a step


class HybridReward:
    """Does for verl's trainer what train.py does between rollout and update.

    verl creates one instance and passes it verl's full configuration. The instance registers `advantages` as
    the estimator "hybrid", restores sigma_bar from the checkpoint that verl resumes from, and appends one
    line per step to hybrid_metrics.jsonl in trainer.default_local_dir.

    Raises:
        InputError: With these settings, the reward would differ from train.py's, or the reward model's server
            does not return raw scores.
    """

    def __init__(self, config: Any):
        from verl.trainer.ppo.core_algos import register_adv_est

        check_config(config)
        self.hybrid = dict(config.algorithm.hybrid)
        self.settings = RewardSettings(**{name: self.hybrid[name] for name in REWARD_SETTINGS})
        self.calibration = Calibration(self.hybrid["min_rm"], self.hybrid["max_rm"])
        self.step = 0
        checkpoint = checkpoint_to_resume(config.trainer)
        if checkpoint is not None:
            self.resume(checkpoint)
        self.metrics_file = Path(config.trainer.default_local_dir) / "hybrid_metrics.jsonl"
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.metrics_file.read_text().splitlines(keepends=True) if self.metrics_file.exists() else []
        write_text(
            self.metrics_file, "".join(line for line in lines if json.loads(line)["step"] <= self.step)
        )
        if self.hybrid["rm_api"] != "none" and self.hybrid["rm_address"]:
            server = scoring_server(self.hybrid, self.hybrid["rm_address"])
            check_reward_model(server, self.hybrid["rm_unit_scores"])
        register_adv_est("hybrid")(self.advantages)

    def advantages(
        self, token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages of a batch, computed by train.py's functions. Updates sigma_bar.

        Args:
            token_level_rewards: (B, R) float32, zero except for the packed number at one token of each
                completion.
            response_mask: (B, R). A row of zeros is padding and is ignored.
            index: (B,) the group of each row, in any order. If verl lost a completion of a group, the group's
                other completions get an advantage of 0, and the group is counted in reward/incomplete_groups.

        Returns:
            Advantages and rewards, both (B, R), with the same value at each token of a completion. verl calls
            the rewards "returns" and logs both. Only a critic would be trained on the returns.

        Raises:
            RuntimeError: No group is complete, more scores failed than rm_max_failed allows, or verl changed
                the packed numbers.
        """
        hybrid, group_size = self.hybrid, self.hybrid["group_size"]
        complete, incomplete = groups_in(response_mask, index, group_size)
        if not complete:
            raise RuntimeError(
                f"no group has all {group_size} completions in this step; the log of the rollout says why"
            )
        rows = torch.tensor(complete).flatten()  # (B',), with the completions of a question side by side
        packed = token_level_rewards.sum(dim=1).cpu()[rows]  # (B',)
        rule_rewards, rm_scores = unpack(packed, hybrid["min_rm"], hybrid["max_rm"])
        self.check_scores(rm_scores)
        scores = hybrid_rewards(rule_rewards, rm_scores, group_size, self.settings, self.calibration)
        advantages = compute_advantages(scores.rewards, group_size, hybrid["advantage_scale"])  # (B',)
        self.step += 1
        # compute_score has already clamped the scores, so a score at a bound counts as clamped.
        at_bound = (packed.abs() == 0.5) | (packed.abs() == 1.0)
        scores = replace(scores, rm_clamped=at_bound & (hybrid["max_rm"] > hybrid["min_rm"]))
        self.log_step(scores, advantages, failed=int(rm_scores.isnan().sum()), incomplete=incomplete)
        per_row = torch.zeros(2, len(response_mask))
        per_row[:, rows] = torch.stack([advantages, scores.rewards])
        advantages, rewards = per_row.to(response_mask.device)[:, :, None] * response_mask  # (B, R) each
        return advantages, rewards

    def log_step(
        self, scores: HybridRewards, advantages: torch.Tensor, *, failed: int, incomplete: int
    ) -> None:
        """Append the metrics of a step to hybrid_metrics.jsonl."""
        metrics = reward_metrics(scores, advantages, self.hybrid["group_size"]) | {
            "reward/rm_failed": float(failed),
            "reward/sigma_bar": self.calibration.sigma_bar.mean,
            "reward/incomplete_groups": float(incomplete),
        }
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": self.step, **metrics}) + "\n")

    def check_scores(self, rm_scores: torch.Tensor) -> None:
        """Stop the run if too many scores are missing, or if the first step's scores look like probabilities.

        Raises:
            RuntimeError: One of these is the case.
        """
        hybrid = self.hybrid
        failed = int(rm_scores.isnan().sum())
        if failed > hybrid["rm_max_failed"] * len(rm_scores):
            raise RuntimeError(
                f"{failed} of {len(rm_scores)} completions got no reward-model score, more than the share "
                f"that rm_max_failed {hybrid['rm_max_failed']} allows; the log of the reward workers says "
                "why. Fix the server, then resume"
            )
        beyond_unit = hybrid["min_rm"] < 0.0 or hybrid["max_rm"] > 1.0
        raw = hybrid["rm_api"] != "none" and not hybrid["rm_unit_scores"] and beyond_unit
        first = self.calibration.sigma_bar.count == 0
        if raw and first and look_like_probabilities(rm_scores[rm_scores.isfinite()].tolist()):
            raise RuntimeError(f"the reward-model scores of the first step are {SIGMOID}")

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        """Called by verl when it has written a checkpoint: saves the step and sigma_bar in it."""
        sigma_bar = self.calibration.sigma_bar
        state = {"step": self.step, "sigma_bar": {"mean": sigma_bar.mean, "count": sigma_bar.count}}
        write_text(Path(checkpoint_dir) / STATE_FILE, json.dumps(state) + "\n")

    def resume(self, checkpoint: Path) -> None:
        """Restore what `on_save` saved.

        Raises:
            InputError: The checkpoint has no state file, or the file cannot be read.
        """
        file = checkpoint / STATE_FILE
        try:
            state = json.loads(file.read_text())
            self.step, self.calibration.sigma_bar = state["step"], RunningMean(**state["sigma_bar"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}: no state to resume from ({type(error).__name__}: {error}); resume from an earlier "
                "checkpoint with trainer.resume_mode=resume_path trainer.resume_from_path=FOLDER, or start "
                "over with trainer.resume_mode=disable"
            ) from None


def groups_in(response_mask: torch.Tensor, index: Any, group_size: int) -> tuple[list[list[int]], int]:
    """The rows of each complete group, and the number of incomplete ones. Padding rows belong to no group."""
    rows_by_group: dict[Any, list[int]] = {}
    for row in response_mask.any(dim=1).nonzero().flatten().tolist():
        rows_by_group.setdefault(index[row], []).append(row)
    complete = [rows for rows in rows_by_group.values() if len(rows) == group_size]
    return complete, len(rows_by_group) - len(complete)


def checkpoint_to_resume(trainer: Any) -> Path | None:
    """The folder that verl is about to resume from, found in the same way as verl finds it."""
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    if trainer.resume_mode == "disable":
        return None
    folder = trainer.resume_from_path
    if trainer.resume_mode == "auto":
        folder = find_latest_ckpt_path(str(Path(trainer.default_local_dir).absolute()))
    return None if folder is None else Path(folder)
