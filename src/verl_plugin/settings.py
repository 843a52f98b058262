"""The keys of algorithm.hybrid, and a check of verl's configuration before anything loads."""

from dataclasses import fields
from typing import Any

from src.errors import InputError
from src.hybrid_reward import RewardSettings

# The keys that algorithm.hybrid must have; `command` prints all of them.
REWARD_SETTINGS = tuple(field.name for field in fields(RewardSettings))
GROUP_SETTINGS = ("min_rm", "max_rm", "advantage_scale", "group_size", "rm_max_failed", "rm_unit_scores")
SCORER_SETTINGS = (
    "verifier_method", "rm_api", "rm_address", "rm_model", "rm_max_length", "rm_timeout_s", "rm_deadline_s",
)  # fmt: skip


def check_config(config: Any) -> None:
    """Refuse a configuration whose rewards would differ from train.py's, before any model loads.

    Raises:
        InputError: A setting must be different; the message names the override.
    """
    hybrid = dict(config.algorithm.get("hybrid") or {})
    names = {*REWARD_SETTINGS, *GROUP_SETTINGS, *SCORER_SETTINGS}
    if set(hybrid) != names:
        raise InputError(
            f"+algorithm.hybrid: missing {sorted(names - set(hybrid))}, unknown {sorted(set(hybrid) - names)}"
            "; copy all of it from the output of python -m src.verl_plugin command"
        )
    needs = general_needs(config, hybrid)
    if hybrid["rm_api"] != "none":
        needs += reward_model_needs(config, hybrid)
    for met, override, why in needs:
        if not met:
            raise InputError(f"the hybrid reward needs {override}: {why}")


def general_needs(config: Any, hybrid: dict) -> list[tuple[bool, str, str]]:
    """What every run needs: whether the need is met, the override that meets it, and the reason."""
    function, manager = config.reward.custom_reward_function, config.reward.reward_manager
    served, n = config.reward.reward_model, config.actor_rollout_ref.rollout.n
    return [
        (config.algorithm.adv_estimator == "hybrid", "algorithm.adv_estimator=hybrid",
         "no other estimator can unpack the scores"),
        (not config.algorithm.use_kl_in_reward, "algorithm.use_kl_in_reward=False",
         "a KL term would change the packed score; set actor_rollout_ref.actor.use_kl_loss=True instead"),
        ((function.path, function.name) == ("pkg://src.verl_plugin", "compute_score"),
         "reward.custom_reward_function.path=pkg://src.verl_plugin "
         "reward.custom_reward_function.name=compute_score",
         "no other function packs the scores"),
        (dict(function.get("reward_kwargs") or {}) == hybrid,
         "+reward.custom_reward_function.reward_kwargs='${algorithm.hybrid}'",
         "scores must be packed and unpacked with the same settings"),
        ((manager.source, manager.name) == ("register", "naive"), "reward.reward_manager.name=naive",
         "any other manager would change the packed score"),
        (n == hybrid["group_size"] >= 2, f"actor_rollout_ref.rollout.n={hybrid['group_size']}",
         f"it is {n}, but must equal algorithm.hybrid.group_size and be at least 2"),
        (hybrid["rm_api"] in ("vllm", "sglang", "none"), "algorithm.hybrid.rm_api=vllm, =sglang or =none",
         f"it is {hybrid['rm_api']!r}"),
        (not served.enable or served.enable_resource_pool, "reward.reward_model.enable_resource_pool=True",
         "on the training GPUs, verl would call compute_score without the question and the answer"),
    ]  # fmt: skip


def reward_model_needs(config: Any, hybrid: dict) -> list[tuple[bool, str, str]]:
    """What else a run with a reward model needs, in the same form as `general_needs`."""
    return [
        (bool(hybrid["rm_model"]), "algorithm.hybrid.rm_model", "its tokenizer encodes the conversations"),
        (bool(hybrid["rm_address"] or config.reward.reward_model.enable),
         "algorithm.hybrid.rm_address=HOST:PORT or reward.reward_model.enable=True",
         "otherwise there is no reward model"),
        (hybrid["max_rm"] > hybrid["min_rm"], "algorithm.hybrid.min_rm below algorithm.hybrid.max_rm",
         "python -m src.verl_plugin calibrate prints both"),
    ]  # fmt: skip
