"""What verl is started with (`python -m src.verl_plugin`): its data, the reward model's bounds, and the whole command."""

import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from src.errors import InputError
from src.math_verifier import MathVerifier, ground_truth_of
from src.models import EMBEDDED
from src.reward_client import SIGMOID, like_probabilities, score_all
from src.trackers import chosen_trackers

# Parameters of train.py's main() that no override stands for, and what does.
NO_COUNTERPART = {
    "reward_model_device": "the reward model is on a server of its own",
    "reward_model_8bit": "quantize on the server, for example vllm serve --quantization",
    "device": "verl trains on GPUs",
    "system_prompt": "part of the data: convert --system-prompt",
    "warmup_samples": "calibrate --warmup-samples",
    "max_skipped_updates": "verl skips an update that is not finite, and goes on",
    "resume": "running the command again resumes",
    "eval_only": "trainer.val_only=True evaluates alone",
    "eval_samples": "actor_rollout_ref.rollout.val_kwargs.n samples that many",
    "eval_against": "compare checkpoints with train.py --eval-only",
    "sample_interval": "trainer.log_val_generations shows some",
    "quiet": "verl has no such flag",
}
LOSS_AGG_MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}


def read_records(file: Path, keys: tuple[str, str]) -> list[dict]:
    """Records of a JSONL file, each with two texts (or numbers).

    Raises:
        InputError: It cannot be read, or a line has them not.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give a JSONL file of {keys} records") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}, line {number}: not JSON ({error})") from None
            values = [record.get(key) if isinstance(record, dict) else None for key in keys]
            if any(isinstance(value, bool) or not isinstance(value, str | int | float) for value in values):
                raise InputError(f"{file}, line {number}: must have {' and '.join(keys)}, both text or numbers")
            records.append(dict(zip(keys, map(str, values), strict=True)))
    if not records:
        raise InputError(f"{file}: no records in it")
    return records


def convert(data: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], /, system_prompt: str | None = None) -> None:
    """Write problems as verl reads them.

    Args:
        data: JSONL of {"question", "answer"}, as train.py's --data.
        out: The .parquet file to write.
        system_prompt: System message before each question, as train.py's --system-prompt.
    """
    import datasets

    records = read_records(data, ("question", "answer"))
    head = [{"role": "system", "content": system_prompt}] if system_prompt else []
    truths = [ground_truth_of(record["answer"]) for record in records]
    with MathVerifier() as verifier:
        for record, reason in zip(records, verifier.prepare(truths), strict=True):
            if reason:
                raise InputError(f"{data}: the answer of {record['question'][:80]!r} cannot be compared with any: {reason}")
    rows = [
        {
            "data_source": data.stem,
            "prompt": [*head, {"role": "user", "content": record["question"]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": i, "question": record["question"]},
        }
        for i, (record, truth) in enumerate(zip(records, truths, strict=True))
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
    rm_max_length: int = 4096,
    rm_unit_scores: bool = False,
) -> None:
    """Print the bounds of the reward model's scores, by the very path that scores take in training.

    Args:
        samples: JSONL of {"question", "completion"}: a run's rollouts.jsonl, or any file of your policy's completions.
        rm_address: host:port of the reward model's server.
        rm_model: Its name there, and where its tokenizer is.
        rm_api: Form of the server's /classify.
        warmup_samples: How many of the samples, spread evenly over the file.
        rm_max_length: Tokens of a conversation at most.
        rm_unit_scores: The model's own scores lie between 0 and 1.
    """
    records = read_records(samples, ("question", "completion"))
    if not 1 <= warmup_samples <= len(records):
        raise InputError(f"--warmup-samples {warmup_samples}: must be at least 1 and at most the {len(records)} of {samples}")
    picked = [records[i * len(records) // warmup_samples] for i in range(warmup_samples)]
    settings = dict(rm_api=rm_api, rm_address=rm_address, rm_model=rm_model, rm_max_length=rm_max_length)
    pairs = [(record["question"], record["completion"]) for record in picked]
    scores = score_all(pairs, {**settings, "rm_timeout_s": 30.0, "rm_deadline_s": 120.0})
    if not rm_unit_scores and like_probabilities(scores):
        raise InputError(f"--rm-address {rm_address}: the scores are {SIGMOID}")
    print(f"RM bounds: min={min(scores):.4f}, max={max(scores):.4f}")
    print(f"pass to `command`: --min-rm {min(scores)!r} --max-rm {max(scores)!r}")


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
    """Print the command that goes on on verl with the settings of a run.

    Args:
        config: The run's config.json.
        train_files: From `convert`.
        val_files: The same of the held-out problems; without them nothing is evaluated.
        model: The policy, if not the run's.
        rm_model: The reward model, if not the run's.
        rm_address: host:port of the reward model's server; without it verl serves it on --rm-gpus.
        rm_api: Form of the server's /classify; none for the verifier alone.
        rm_gpus: GPUs of a node that verl sets apart for the reward model.
        min_rm: Lower bound of the reward model's scores, from `calibrate`.
        max_rm: Upper bound.
        rm_max_failed: Share of a step's completions that may go without a score, neutral, before the run stops.
        rm_unit_scores: The reward model's own scores lie between 0 and 1.
        rollout: What generates.
        gpus_per_node: Those that train.
        nodes: Machines.
        tensor_parallel: GPUs that generate together.
        max_prompt_length: Tokens of a prompt at most; by default half of --max-length. The rest is the completion's.
    """
    h = hyperparameters_in(config)
    served = served_reward_model(h, rm_api, rm_model, rm_address=rm_address, rm_gpus=rm_gpus, min_rm=min_rm, max_rm=max_rm)
    overrides = {
        **training_overrides(h, model or h["model_name"], gpus_per_node * nodes),
        **rollout_overrides(h, rollout, tensor_parallel, max_prompt_length or h["max_length"] // 2),
        **hybrid_overrides(h, rm_max_failed=rm_max_failed, rm_unit_scores=rm_unit_scores, **served),
        **(server_overrides(rm_api, served["rm_model"], rm_gpus) if served["rm_model"] and rm_gpus else {}),
        **run_overrides(h, train_files, val_files),
        "trainer.n_gpus_per_node": gpus_per_node,
        "trainer.nnodes": nodes,
    }
    print("export PYTHONPATH=$PWD  # on every node, before `ray start`: src.verl_plugin is imported from it")
    words = [shlex.quote(f"{key}={override(value)}") for key, value in overrides.items()]
    print(" \\\n    ".join(["python -m verl.trainer.main_ppo", *words]))
    print(*without_counterpart(h, val_files), sep="\n")


def hyperparameters_in(config: Path) -> dict:
    """main()'s parameters of a run, from its config.json.

    Raises:
        InputError: It cannot be read, or is another file.
    """
    try:
        return json.loads(config.read_text())["hyperparameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config}: not a run's config.json ({type(error).__name__}: {error})") from None


def served_reward_model(
    h: dict, rm_api: str, rm_model: str | None, *, rm_address: str | None, rm_gpus: int, min_rm: float, max_rm: float
) -> dict[str, Any]:
    """The reward model that a server has, where it is and its bounds, as settings of `hybrid_overrides`.

    Raises:
        InputError: No server could have it, or there is nothing known about it.
    """
    if h["reward_mode"] == "verifier" or rm_api == "none":
        named = [name for name, value in (("model", rm_model), ("address", rm_address), ("gpus", rm_gpus)) if value]
        if named:
            raise InputError(
                f"--rm-{named[0]}: no reward model has a part in this reward (--reward-mode verifier or --rm-api none)"
            )
        return dict(rm_api="none", rm_address=None, rm_model=None, min_rm=0.0, max_rm=0.0)
    rm_model = rm_model or h["reward_model_name"]
    if rm_model in ("auto", "none", EMBEDDED):
        raise InputError(f"--rm-model: no server has the run's reward model, {rm_model!r}; name one, or give --rm-api none")
    if max_rm <= min_rm:
        raise InputError(f"--min-rm {min_rm} --max-rm {max_rm}: give the bounds that `calibrate` prints")
    if bool(rm_address) == bool(rm_gpus):
        raise InputError("--rm-address, --rm-gpus: give one of the two: a server of yours, or GPUs for verl to serve it on")
    return dict(rm_api=rm_api, rm_address=rm_address, rm_model=rm_model, min_rm=min_rm, max_rm=max_rm)


def without_counterpart(h: dict, val_files: str | None) -> list[str]:
    """What the command leaves out, as comments of a shell."""
    lines = [f"# {key} {h[key]}: no counterpart; {why}" for key, why in NO_COUNTERPART.items()]
    if h["lr_schedule"] == "linear":
        lines.append("# lr_schedule linear: no counterpart; a cosine from lr down to 0 stands in")
    if h["eval_data"] and not val_files:
        lines.append(f"# eval_data {h['eval_data']}: nothing is evaluated; convert it and give it as --val-files")
    return lines


def training_overrides(h: dict, policy: str, gpus: int) -> dict[str, object]:
    """Of the groups Model and Training of main()'s parameters.

    Raises:
        InputError: The optimizer's batch cannot be shared out as verl does.
    """
    if policy == EMBEDDED:
        raise InputError("--model: verl cannot train the embedded model; name one of the Hugging Face hub or a folder")
    group_size, batch = h["group_size"], h["train_batch_size"]
    if batch % group_size:
        raise InputError(
            f"train_batch_size {batch}: verl's optimizer steps are of whole questions; take a multiple of group_size {group_size}"
        )
    if batch % gpus:
        raise InputError(f"train_batch_size {batch}: must be a multiple of the {gpus} GPUs that share it")
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
        "clip_ratio_c": 1e9,  # never: a second clip of verl's, for ratios above it where the advantage is negative
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
    """Of the group Rollout.

    Raises:
        InputError: A prompt of that length leaves no room for a completion.
    """
    if not 0 < prompt_length < h["max_length"]:
        raise InputError(f"--max-prompt-length {prompt_length}: must be below the run's max_length {h['max_length']}")
    values = {
        "name": rollout,
        "n": h["group_size"],
        "temperature": h["temperature"],
        "top_p": h["top_p"],
        "seed": h["seed"],
        "dtype": "float32" if h["dtype"] == "float32" else "bfloat16",
        "tensor_model_parallel_size": tensor_parallel,
        "load_format": "safetensors" if h["lora_rank"] else "dummy",  # with LoRA only the adapter is sent there
    }
    return {
        "data.max_prompt_length": prompt_length,
        "data.max_response_length": min(h["max_new_tokens"] or h["max_length"], h["max_length"] - prompt_length),
        **{f"actor_rollout_ref.rollout.{key}": value for key, value in values.items()},
    }


def hybrid_overrides(h: dict, **of_the_reward_model: object) -> dict[str, object]:
    """Of the group Hybrid reward, with what stands for the reward model."""
    names = (
        "reward_mode", "reward_scorer", "rm_bounds", "alpha", "beta", "eps", "w_min", "w_max", "k", "advantage_scale",
        "group_size", "verifier_method",
    )  # fmt: skip
    hybrid = {name: h[name] for name in names} | of_the_reward_model
    hybrid |= dict(rm_max_length=4096, rm_timeout_s=30.0, rm_deadline_s=120.0)
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
    """A reward model that verl serves, on GPUs of its own."""
    served = dict(enable=True, enable_resource_pool=True, n_gpus_per_node=rm_gpus, nnodes=1, model_path=rm_model)
    served |= {"rollout.name": rm_api, "rollout.tensor_model_parallel_size": 1}
    return {f"reward.reward_model.{key}": value for key, value in served.items()}


def run_overrides(h: dict, train_files: str, val_files: str | None) -> dict[str, object]:
    """Of the group Monitoring, with the data."""
    name = h["run_name"] or "hybrid"
    return {
        "data.train_files": train_files,
        "data.val_files": val_files or train_files,
        "trainer.val_before_train": bool(val_files),
        "trainer.test_freq": (h["eval_interval"] or 10**6) if val_files else -1,  # and after the last step in any case
        "trainer.default_local_dir": f"{h['output']}/{name}-verl",
        "trainer.experiment_name": name,
        "trainer.save_freq": h["checkpoint_interval"],
        "trainer.max_actor_ckpt_to_keep": h["keep_checkpoints"] or None,
        "trainer.v1.sampler.sync_refill_failed_groups": True,  # where a question's rollout fails, another is sampled
        "trainer.project_name": h["wandb_project"] or "hybrid",
        "trainer.logger": f"[{','.join(['console', *chosen_trackers(h['tracker'], h['wandb_project'])])}]",
    }


def override(value: object) -> str:
    """A value as Hydra's override grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, str) and not value.startswith(("[", "${")) and not re.fullmatch(r"[A-Za-z_][\w./:-]*", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def cli() -> None:
    """`python -m src.verl_plugin`: what the user can mend is said without a stack trace."""
    try:
        tyro.extras.subcommand_cli_from_dict({"convert": convert, "calibrate": calibrate, "command": command})
    except InputError as error:
        sys.exit(f"error: {error}")
