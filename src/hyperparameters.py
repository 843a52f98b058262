"""What main()'s parameters may be, alone and together."""

import math
from typing import Any

from src.errors import InputError
from src.trackers import check_trackers, chosen_trackers


def check_hyperparameters(**h: Any) -> None:
    """Refuse what cannot work, before anything loads. Takes main()'s parameters by name."""

    def refuse(name: str, rule: str) -> None:
        raise InputError(f"--{name.replace('_', '-')} {h[name]}: {rule}")

    at_least = dict(
        epochs=1, train_batch_size=1, micro_batch_size=1, epochs_per_step=1, rollouts_per_step=1, max_length=2,
        warmup_samples=1, checkpoint_interval=1, keep_checkpoints=0, eval_interval=0, eval_samples=0, seed=0, lora_rank=0,
        max_skipped_updates=1, sample_interval=0,
    )  # fmt: skip
    for name, least in at_least.items():
        if h[name] < least:
            refuse(name, f"must be at least {least}")
    for name in ("max_steps", "max_new_tokens"):
        if h[name] is not None and h[name] < 1:
            refuse(name, "must be at least 1; leave it out for no limit")
    if h["group_size"] < 2:
        refuse("group_size", "must be at least 2: an advantage compares the completions of a group")
    for name in ("lr", "max_norm", "eps", "temperature"):
        if not 0 < h[name] < math.inf:
            way_out = "; for greedy answers see --eval-data" if name == "temperature" else ""
            refuse(name, f"must be a finite number above 0{way_out}")
    for name in ("weight_decay", "kl_weight", "alpha", "beta", "w_min", "w_max", "k"):
        if not 0 <= h[name] < math.inf:
            refuse(name, "must be a finite number, 0 or more")
    if h["seed"] >= 2**32:
        refuse("seed", "must be below 2**32")
    if h["eval_interval"] and not h["eval_data"]:
        refuse("eval_interval", "needs --eval-data, the problems to evaluate on")
    if h["eval_only"] and not h["eval_data"]:
        raise InputError("--eval-only: needs --eval-data, the problems to evaluate on")
    if h["eval_only"] and h["resume"]:
        refuse("resume", "does not go with --eval-only; name the checkpoint to evaluate with --model-name")
    if h["eval_against"] and not h["eval_only"]:
        refuse("eval_against", "needs --eval-only, which compares it with --model-name")
    if not 0 < h["top_p"] <= 1:
        refuse("top_p", "must be above 0 and at most 1 (1 = sample from all tokens)")
    if not 0 < h["clip_eps"] < 1:
        refuse("clip_eps", "must be between 0 and 1, for example 0.2")
    if h["w_min"] > h["w_max"]:
        refuse("w_min", f"must not be above --w-max {h['w_max']}")
    batch = h["rollouts_per_step"] * h["group_size"]
    if batch % h["train_batch_size"]:
        refuse(
            "train_batch_size",
            f"must divide --rollouts-per-step {h['rollouts_per_step']} x --group-size {h['group_size']} = {batch} completions; "
            f"for example {math.gcd(batch, h['train_batch_size'])}",
        )
    if h["reward_model_8bit"] and h["reward_model_device"] == "offload":
        refuse("reward_model_device", "does not go with --reward-model-8bit; int8 halves the memory, offload frees it in turns")
    warn_of_rewards(h)
    if not h["eval_only"]:
        check_trackers(chosen_trackers(h["tracker"], h["wandb_project"]))


def warn_of_rewards(h: dict) -> None:
    """Say so where a wrong answer can earn more than a right one, or a worse one more than a better one."""
    if h["alpha"] + h["beta"] > 1:
        print(
            f"warning: --alpha {h['alpha']} + --beta {h['beta']} is above 1, so the bands overlap and a wrong answer can earn "
            "more than a right one; keep the sum at 1 or below",
            flush=True,
        )
    lowest = h["w_min"] + (h["w_max"] - h["w_min"]) * math.tanh(-(h["alpha"] ** 3))
    if h["reward_scorer"] == "tanh" and h["reward_mode"] == "hybrid" and lowest < 0:
        print(
            f"warning: --reward-scorer tanh --alpha {h['alpha']}: the worst answers have the negative weight {lowest:.2f}, so "
            "they earn a positive reward; lower --alpha or raise --w-min",
            flush=True,
        )


def check_processes(processes: int, rollouts_per_step: int) -> None:
    """Refuse a number of processes among which the questions of a step cannot be shared out evenly.

    Raises:
        InputError: It is such a number.
    """
    if rollouts_per_step % processes:
        raise InputError(
            f"--rollouts-per-step {rollouts_per_step}: must be a multiple of the {processes} processes; each samples whole groups"
        )
