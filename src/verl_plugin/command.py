"""Commands of `python -m src.verl_plugin`: convert data, find the score bounds, and print verl's command."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, Literal

import tyro

from src.errors import InputError
from src.hub import EMBEDDED
from src.math_verifier import MathVerifier
from src.models import conversation
from src.problems import check_answers, read_problems, read_records
from src.run.trackers import chosen_trackers
from src.verl_plugin.client import SIGMOID, Server, look_like_probabilities, score_all
from src.verl_plugin.settings import REWARD_SETTINGS

# Parameters of train.py's main() without a corresponding override in verl, and what to do instead.
NO_COUNTERPART = {
    "reward_model_device": "the reward model runs on its own server",
    "reward_model_8bit": "quantize on the server, for example vllm serve --quantization",
    "device": "verl trains on GPUs",
    "system_prompt": "it is part of the data; pass --system-prompt to convert",
    "warmup_samples": "pass --warmup-samples to calibrate",
    "max_skipped_updates": "verl skips an update that is not finite and continues",
    "resume": "run the command again to resume",
    "eval_only": "trainer.val_only=True evaluates without training",
    "eval_samples": "actor_rollout_ref.rollout.val_kwargs.n sets the number of samples",
    "eval_against": "compare checkpoints with train.py --eval-only",
    "sample_interval": "trainer.log_val_generations logs some completions",
    "quiet": "verl has no such flag",
}
LOSS_AGG_MODES = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}


def convert(
    data: tyro.conf.Positional[str], out: tyro.conf.Positional[Path], /, system_prompt: str | None = None
) -> None:
    """Write problems in the format that verl reads.

    Args:
        data: The problems, in any format that train.py's --data accepts.
        out: The .parquet file to write.
        system_prompt: System message before each question, like train.py's --system-prompt.
    """
    import datasets

    problems = read_problems(data, "convert")
    with MathVerifier() as verifier:
        check_answers(verifier, problems)
    rows = [
        {
            "data_source": Path(data).stem,
            "prompt": conversation(problem.question, system_prompt),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": i, "question": problem.question},
        }
        for i, problem in enumerate(problems)
    ]
    datasets.Dataset.from_list(rows).to_parquet(out)
    print(f"{len(rows)} problems: {out}")


def calibrate(
    samples: tyro.conf.Positional[Path],
    /,
    rm_address: str,
    rm_model: str,
    rm_api: Literal["vllm", "sglang"] = "vllm",
    warmup_samples: int = 10,
    rm_max_length: int = Server.max_length,
    rm_unit_scores: bool = False,
) -> None:
    """Print the bounds of the reward model's scores, which are requested exactly as in training.

    Args:
        samples: JSONL with "question" and "completion": a run's rollouts.jsonl, or your policy's completions.
        rm_address: host:port of the reward model's server.
        rm_model: The reward model's name on the server, which is also used to load its tokenizer.
        rm_api: The server's API.
        warmup_samples: How many of the samples to score, spread evenly over the file.
        rm_max_length: Maximum tokens per conversation.
        rm_unit_scores: Accept scores that all lie between 0 and 1. Pass this if the model's own scores do.
    """
    found = read_records(samples, ("question", "completion"), "calibrate", allow_blank=True)
    records = [record for _, record in found]
    if not 1 <= warmup_samples <= len(records):
        raise InputError(
            f"--warmup-samples {warmup_samples}: must be at least 1 and at most {len(records)}, the number "
            f"of samples in {samples}"
        )
    picked = [records[i * len(records) // warmup_samples] for i in range(warmup_samples)]
    pairs = [(str(record["question"]), str(record["completion"])) for record in picked]
    scores = score_all(pairs, Server(rm_address, rm_api, rm_model, rm_max_length))
    if not rm_unit_scores and look_like_probabilities(scores):
        raise InputError(f"--rm-address {rm_address}: the scores are {SIGMOID}")
    print(f"RM bounds: min={min(scores):.4f}, max={max(scores):.4f}")
    print(f"pass to `command`: --min-rm {min(scores)!r} --max-rm {max(scores)!r}")


# Each parameter is a command-line flag, so there are more of them than a function should have.
def command(
    config: tyro.conf.Positional[Path],
    /,
    train_files: str,
    val_files: str | None = None,
    model: str | None = None,
    rm_model: str | None = None,
    rm_address: str | None = None,
    rm_api: Literal["vllm", "sglang", "none"] = "vllm",
    rm_gpus: int = 0,
    min_rm: float = 0.0,
    max_rm: float = 0.0,
    rm_max_failed: float = 0.05,
    rm_unit_scores: bool = False,
    rollout: Literal["vllm", "sglang"] = "vllm",
    gpus_per_node: int = 1,
    nodes: int = 1,
    tensor_parallel: int = 1,
    max_prompt_length: int | None = None,
) -> None:
    """Print the verl command that trains with the settings of a run.

    Args:
        config: The run's config.json.
        train_files: Training problems, from `convert`.
        val_files: Held-out problems, from `convert`; without them, nothing is evaluated.
        model: The policy; by default, the run's.
        rm_model: The reward model; by default, the run's.
        rm_address: host:port of the reward model's server; without it, verl serves the model on --rm-gpus.
        rm_api: The server's API, or none to use only the verifier.
        rm_gpus: Number of GPUs that verl reserves for the reward model, on one node.
        min_rm: Lower bound of the reward model's scores, from `calibrate`.
        max_rm: Upper bound of the reward model's scores, from `calibrate`.
        rm_max_failed: Stop if scoring fails for more than this share of a step's completions.
        rm_unit_scores: Accept scores that all lie between 0 and 1. Pass this if the model's own scores do.
        rollout: The engine that samples.
        gpus_per_node: Number of GPUs per node for training.
        nodes: Number of nodes.
        tensor_parallel: Number of GPUs that share one copy of the policy for sampling.
        max_prompt_length: Maximum tokens per prompt; by default half of max_length. Completions get the rest.
    """
    h = hyperparameters_in(config)
    served = served_reward_model(
        h, rm_api, rm_model, rm_address=rm_address, rm_gpus=rm_gpus, min_rm=min_rm, max_rm=max_rm
    )
    overrides = {
        **training_overrides(h, model or h["model_name"], gpus_per_node * nodes),
        **rollout_overrides(h, rollout, tensor_parallel, max_prompt_length or h["max_length"] // 2),
        **hybrid_overrides(h, rm_max_failed=rm_max_failed, rm_unit_scores=rm_unit_scores, **served),
        **(server_overrides(rm_api, served["rm_model"], rm_gpus) if served["rm_model"] and rm_gpus else {}),
        **run_overrides(h, train_files, val_files),
        "trainer.n_gpus_per_node": gpus_per_node,
        "trainer.nnodes": nodes,
    }
    print("export PYTHONPATH=$PWD  # on every node, before `ray start`: verl imports src.verl_plugin from it")
    words = [shlex.quote(f"{key}={hydra_value(value)}") for key, value in overrides.items()]
    print(" \\\n    ".join(["python -m verl.trainer.main_ppo", *words]))
    print(*without_counterpart(h, val_files), sep="\n")


def hyperparameters_in(config: Path) -> dict:
    """The parameters of main() that a run was started with.

    Raises:
        InputError: The file cannot be read, or is not the config.json of a run.
    """
    try:
        return json.loads(config.read_text())["hyperparameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{config}: not a run's config.json ({type(error).__name__}: {error}); pass the one in the run's "
            "folder"
        ) from None


def served_reward_model(
    h: dict,
    rm_api: str,
    rm_model: str | None,
    *,
    rm_address: str | None,
    rm_gpus: int,
    min_rm: float,
    max_rm: float,
) -> dict[str, Any]:
    """The keys of algorithm.hybrid that describe the reward model: its server, name and bounds.

    Raises:
        InputError: The flags contradict each other, one is missing, or no server can serve the reward model.
    """
    if h["reward_mode"] == "verifier" or rm_api == "none":
        named = [
            name for name, value in (("model", rm_model), ("address", rm_address), ("gpus", rm_gpus)) if value
        ]
        if named:
            raise InputError(
                f"--rm-{named[0]}: this reward uses no reward model (--reward-mode verifier or --rm-api none)"
                "; leave the flag out"
            )
        return dict(rm_api="none", rm_address=None, rm_model=None, min_rm=0.0, max_rm=0.0)
    rm_model = rm_model or h["reward_model_name"]
    if rm_model in ("auto", "none", EMBEDDED):
        raise InputError(
            f"--rm-model: no server can serve the run's reward model, {rm_model!r}; name another one, or "
            "pass --rm-api none"
        )
    if max_rm <= min_rm:
        raise InputError(
            f"--min-rm {min_rm} --max-rm {max_rm}: the first must be below the second; pass the bounds that "
            "`calibrate` prints"
        )
    if bool(rm_address) == bool(rm_gpus):
        raise InputError(
            "--rm-address, --rm-gpus: pass one of the two: the address of your own server, or the number of "
            "GPUs on which verl should serve the reward model"
        )
    return dict(rm_api=rm_api, rm_address=rm_address, rm_model=rm_model, min_rm=min_rm, max_rm=max_rm)


def without_counterpart(h: dict, val_files: str | None) -> list[str]:
    """Shell comments that list the hyperparameters the command leaves out."""
    lines = [f"# {key} {h[key]}: no counterpart; {why}" for key, why in NO_COUNTERPART.items()]
    if h["lr_schedule"] == "linear":
        lines.append("# lr_schedule linear: no counterpart; a cosine from lr down to 0 replaces it")
    if h["eval_data"] and not val_files:
        lines.append(
            f"# eval_data {h['eval_data']}: nothing is evaluated; convert it and pass it as --val-files"
        )
    return lines


def training_overrides(h: dict, policy: str, gpus: int) -> dict[str, object]:
    """Overrides for the groups Model and Training of main()'s parameters.

    Raises:
        InputError: verl cannot train the policy, or cannot divide the optimizer's batch.
    """
    if policy == EMBEDDED:
        raise InputError(
            "--model: verl cannot train the bundled model; pass a Hugging Face name or a local folder"
        )
    group_size, batch = h["group_size"], h["train_batch_size"]
    if batch % group_size:
        raise InputError(
            f"train_batch_size {batch}: verl's optimizer steps consist of complete groups; use a multiple of "
            f"group_size {group_size}"
        )
    if batch % gpus:
        raise InputError(
            f"train_batch_size {batch}: must be a multiple of the {gpus} GPUs; change one of the two numbers"
        )
    micro = math.gcd(h["micro_batch_size"], batch // gpus)
    dtype = "fp32" if h["dtype"] == "float32" else "bf16"
    actor = {
        "fsdp_config.seed": h["seed"],
        "optim.lr": h["lr"],
        "optim.lr_scheduler_type": "cosine" if h["lr_schedule"] == "linear" else "constant",
        "optim.weight_decay": h["weight_decay"],
        "optim.clip_grad": h["max_norm"],
        "ppo_mini_batch_size": batch // group_size,
        "ppo_micro_batch_size_per_gpu": micro,
        "ppo_epochs": h["epochs_per_step"],
        "shuffle": True,
        "data_loader_seed": h["seed"],
        "use_kl_loss": h["kl_weight"] > 0,
        "kl_loss_coef": h["kl_weight"],
        "kl_loss_type": "low_var_kl",
        **dict.fromkeys(("clip_ratio", "clip_ratio_low", "clip_ratio_high"), h["clip_eps"]),
        "clip_ratio_c": 1e9,  # disables verl's second clip, for large ratios with a negative advantage
        "loss_agg_mode": LOSS_AGG_MODES[h["loss_normalizer"]],
        "loss_scale_factor": h["max_new_tokens"] or h["max_length"],
    }
    return {
        "actor_rollout_ref.model.path": policy,
        "actor_rollout_ref.model.enable_gradient_checkpointing": h["gradient_checkpointing"],
        "actor_rollout_ref.model.lora_rank": h["lora_rank"],
        "actor_rollout_ref.model.lora_alpha": 2 * h["lora_rank"] or 16,
        "data.train_batch_size": h["rollouts_per_step"],
        "data.seed": h["seed"],
        "trainer.total_epochs": h["epochs"],
        "trainer.total_training_steps": h["max_steps"],
        **{f"actor_rollout_ref.actor.{key}": value for key, value in actor.items()},
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": dtype,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": micro,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": micro,
    }


def rollout_overrides(h: dict, rollout: str, tensor_parallel: int, prompt_length: int) -> dict[str, object]:
    """Overrides for the group Rollout.

    Raises:
        InputError: A prompt of that length would leave no room for a completion.
    """
    if not 0 < prompt_length < h["max_length"]:
        raise InputError(
            f"--max-prompt-length {prompt_length}: must be above 0 and below the run's max_length "
            f"{h['max_length']}"
        )
    values = {
        "name": rollout,
        "n": h["group_size"],
        "temperature": h["temperature"],
        "top_p": h["top_p"],
        "seed": h["seed"],
        "dtype": "float32" if h["dtype"] == "float32" else "bfloat16",
        "tensor_model_parallel_size": tensor_parallel,
        # With LoRA, verl sends only the adapter to the engine, so the engine must load the policy's weights
        # itself.
        "load_format": "safetensors" if h["lora_rank"] else "dummy",
    }
    return {
        "data.max_prompt_length": prompt_length,
        "data.max_response_length": min(
            h["max_new_tokens"] or h["max_length"], h["max_length"] - prompt_length
        ),
        **{f"actor_rollout_ref.rollout.{key}": value for key, value in values.items()},
    }


def hybrid_overrides(h: dict, **reward_model: object) -> dict[str, object]:
    """Overrides for the group Hybrid reward, and those that make verl use the plug-in.

    Args:
        reward_model: The keys of algorithm.hybrid that describe the reward model, from `served_reward_model`.
    """
    names = (*REWARD_SETTINGS, "advantage_scale", "group_size", "verifier_method")
    hybrid = {name: h[name] for name in names} | reward_model
    hybrid |= {
        "rm_max_length": Server.max_length,
        "rm_timeout_s": Server.timeout_s,
        "rm_deadline_s": Server.deadline_s,
    }
    return {
        **{f"+algorithm.hybrid.{key}": value for key, value in hybrid.items()},
        "algorithm.adv_estimator": "hybrid",
        "critic.enable": False,
        "reward.custom_reward_function.path": "pkg://src.verl_plugin",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs": "${algorithm.hybrid}",
        "trainer.checkpoint_callback_class": "src.verl_plugin.HybridReward",
    }


def server_overrides(rm_api: str, rm_model: str, rm_gpus: int) -> dict[str, object]:
    """Overrides that make verl serve the reward model on its own GPUs."""
    served = dict(
        enable=True, enable_resource_pool=True, n_gpus_per_node=rm_gpus, nnodes=1, model_path=rm_model
    )
    served |= {"rollout.name": rm_api, "rollout.tensor_model_parallel_size": 1}
    return {f"reward.reward_model.{key}": value for key, value in served.items()}


def run_overrides(h: dict, train_files: str, val_files: str | None) -> dict[str, object]:
    """Overrides for the group Monitoring, and for the data."""
    name = h["run_name"] or "hybrid"
    return {
        "data.train_files": train_files,
        "data.val_files": val_files or train_files,
        "trainer.val_before_train": bool(val_files),
        # If this is positive, verl also evaluates after the last step.
        "trainer.test_freq": (h["eval_interval"] or 10**6) if val_files else -1,
        "trainer.default_local_dir": f"{h['output']}/{name}-verl",
        "trainer.experiment_name": name,
        "trainer.save_freq": h["checkpoint_interval"],
        "trainer.max_actor_ckpt_to_keep": h["keep_checkpoints"] or None,
        "trainer.v1.sampler.sync_refill_failed_groups": True,  # replace questions whose rollout failed
        "trainer.project_name": h["wandb_project"] or "hybrid",
        "trainer.logger": f"[{','.join(['console', *chosen_trackers(h['tracker'], h['wandb_project'])])}]",
    }


def hydra_value(value: object) -> str:
    """Format a value in Hydra's override grammar."""
    if value is None:
        return "null"
    if (
        isinstance(value, str)
        and not value.startswith(("[", "${"))
        and not re.fullmatch(r"[A-Za-z_][\w./:-]*", value)
    ):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
