"""Train a small chat model to do maths with GRPO and a hybrid reward: a rule verifier's verdict and a reward model's score.

    python train.py                                  TinyLlama-1.1B-Chat with AceMath-7B-RM, one GPU
    python train.py --model-name embedded            SmolLM2-135M-Instruct, no GPU, no hub
    python train.py --reward-scorer tanh             the experimental weight
    python train.py --help                           every hyperparameter; they are the parameters of main()

One step: sample G completions for each of Q questions, judge and score each, centre the rewards on their group's mean,
and take clipped policy-gradient steps on all sampled tokens. Where this departs from the GRPO paper (arXiv:2402.03300):

1. The reward is HERO's (arXiv:2510.07242): the verdict opens a band, the reward model's score is the place in it, and the
   whole is weighted by the question's difficulty.
2. Centred rewards are divided by the std of the whole batch, not of their own group: a group with a single verdict differs
   by reward-model noise alone, which its own std would blow up (`--advantage-scale group` is the paper's).
3. Every token of an optimizer step counts the same, whichever completion it is in (`--loss-normalizer sequence` is the paper's).
4. The log-probs of the samples are those the sampler recorded, under the temperature that it sampled at, and training
   computes its own at the same temperature. The stop token is an action like any other. Completions that are cut off by
   `max_length` are trained on like the rest: they rarely hold an answer, which teaches the policy to finish.
5. The optimizer steps float32 weights; the model computes with them rounded to bfloat16 where the hardware has it.
"""

import inspect
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from src import models
from src.checkpoint import save_checkpoint
from src.errors import InputError
from src.grpo import compute_advantages, kl_estimate, policy_loss, token_weights
from src.hybrid_reward import (
    RunningMean,
    clamp_scores,
    combine_hybrid_score,
    difficulty_weight,
    get_final_reward,
    get_our_final_reward,
    group_bounds,
    normalised_score,
    tanh_weight,
)
from src.logprobs import completion_log_probs, micro_batches
from src.math_verifier import MathVerifier, ground_truth_of
from src.memory import Plan, check_fits, free_memory, keep_freed_memory, measure
from src.report import renew_report
from src.reward_model import AceRewardModel, RewardModelChoice, choose_reward_model
from src.run_log import RunLog, Scores, choose_folder, completion_metrics, reward_metrics, rollout_rows
from src.sampler import Samples, sample
from src.speed import speed_metrics

if TYPE_CHECKING:
    from peft import PeftModel

# Shapes: Q questions a step, G completions a question, B = Q x G completions, T tokens of the longest sequence.


def main(
    # Model
    model_name: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    reward_model_name: str = "auto",
    reward_model_device: Literal["auto", "cuda", "cpu", "offload"] = "auto",
    reward_model_8bit: bool = False,
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    lora_rank: int = 0,
    # Training
    data: str = "data/dummy_math_tasks.jsonl",
    epochs: int = 10,
    max_steps: int | None = None,
    lr: float = 5e-6,
    lr_schedule: Literal["constant", "linear"] = "constant",
    weight_decay: float = 0.0,
    train_batch_size: int = 8,
    micro_batch_size: int = 8,
    gradient_checkpointing: bool = False,
    epochs_per_step: int = 1,
    kl_weight: float = 0.01,
    clip_eps: float = 0.2,
    max_norm: float = 1.0,
    advantage_scale: Literal["batch", "group", "none"] = "batch",
    loss_normalizer: Literal["token", "sequence", "constant"] = "token",
    seed: int = 42,
    # Rollout
    rollouts_per_step: int = 8,
    group_size: int = 8,
    max_length: int = 512,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_p: float = 1.0,
    system_prompt: str | None = None,
    # Hybrid reward
    reward_mode: Literal["hybrid", "verifier", "rm"] = "hybrid",
    reward_scorer: Literal["sigmoid", "tanh"] = "sigmoid",
    rm_bounds: Literal["warmup", "group"] = "warmup",
    verifier_method: Literal["flexible", "strict"] = "flexible",
    alpha: float = 0.5,
    beta: float = 0.5,
    eps: float = 0.01,
    w_min: float = 0.5,
    w_max: float = 2.0,
    k: float = 5.0,
    warmup_samples: int = 10,
    # Monitoring
    output: str = "output",
    run_name: str | None = None,
    checkpoint_interval: int = 5,
    eval_data: str | None = None,
    eval_interval: int = 0,
    wandb_project: str | None = None,
) -> Path:
    """Train a chat model to do maths by GRPO with a hybrid reward.

    Args:
        model_name: The policy: a Hugging Face name, a local folder, or "embedded" (SmolLM2-135M-Instruct, no hub needed).
        reward_model_name: The reward model: a Hugging Face name, a local folder, "embedded" (a judge of answers to arithmetic,
            no hub needed), "none" (the verifier alone), or "auto" (the embedded one beside the embedded policy, AceMath-7B-RM
            where a GPU has room for it, otherwise none).
        reward_model_device: Where the reward model is: cuda, cpu (computed there, slowly), offload (in the host's memory, on
            the GPU only while scoring), or auto: the first of cuda, offload and cpu that has room.
        reward_model_8bit: Hold the reward model's linear layers in int8: half the memory of bfloat16. Needs bitsandbytes.
        device: Where to compute; auto takes cuda, mps or cpu, whichever is found first.
        dtype: What the models compute in; auto takes bfloat16 where the hardware has it. Trained weights are float32.
        lora_rank: Rank of a LoRA adapter in every linear layer but the head, which is then all that is trained; 0 trains
            every weight. It wants a learning rate of about ten times as much.
        data: Problems to train on: a JSONL file of {"question", "answer"}, or hf:NAME[:CONFIG[:SPLIT]] for a data set.
        epochs: Passes over the problems, reshuffled each time.
        max_steps: Stop after this many steps, if the epochs have not ended before.
        lr: Learning rate of AdamW.
        lr_schedule: constant, or linear: from lr in the first step down to 0 after the last.
        weight_decay: Decoupled weight decay of AdamW.
        train_batch_size: Completions per optimizer step; divides rollouts_per_step x group_size.
        micro_batch_size: Completions per forward and backward pass; changes memory and speed, not the result.
        gradient_checkpointing: Keep only what goes into each layer, compute the rest again: less memory, a slower update.
        epochs_per_step: Passes of the optimizer over the completions of a step.
        kl_weight: Weight of the KL divergence to the model as it was loaded; 0 keeps no reference model.
        clip_eps: Half-width of the interval around 1 to which the policy ratio is clipped.
        max_norm: Gradients are scaled down to this norm.
        advantage_scale: Divide centred rewards by the std of the batch, of their group (the GRPO paper), or by nothing
            (Dr. GRPO).
        loss_normalizer: What counts the same: each token (DAPO), each completion (the GRPO paper), or each token over a
            constant length (Dr. GRPO).
        seed: Of the order of the problems and of the samples.
        rollouts_per_step: Questions per step.
        group_size: Completions per question, at least 2.
        max_length: Tokens of prompt + completion at most.
        max_new_tokens: Tokens of a completion at most; by default max_length alone decides.
        temperature: Of sampling, above 0; the log-probs of training use it too.
        top_p: Sample from the smallest set of tokens that has this probability.
        system_prompt: System message before each question; by default what the chat template says.
        reward_mode: hybrid, or for comparison verifier (1 for a right answer, 0 for another) or rm (the reward model's
            score, normalised), both without weights.
        reward_scorer: Weight of the hybrid score: sigmoid of the question's difficulty (HERO), or tanh of the score itself
            (experimental).
        rm_bounds: What the reward model's scores are normalised by: the lowest and highest of the warmup, or of the
            completions of the same question and verdict (HERO).
        verifier_method: strict accepts marked final answers only (<answer>, \\boxed{}, ####); flexible also the last number.
        alpha: Half-width of the band of wrong answers.
        beta: Half-width of the band of right answers.
        eps: Keeps the normalised reward-model score finite where the bounds are equal.
        w_min: Lowest weight.
        w_max: Highest weight.
        k: Slope of the sigmoid weight, per unit of reward-model score.
        warmup_samples: Completions that set the bounds of the reward model's scores before training.
        output: Folder of all runs; git-ignored.
        run_name: Name of this run's folder in output; by default the time of day.
        checkpoint_interval: Steps between checkpoints; there is one at the end as well.
        eval_data: Held-out problems, in the same form as data, answered greedily before the first step and at the end.
        eval_interval: Answer them every so many steps too; 0 = only first and last.
        wandb_project: Weights & Biases project to log to (WANDB_MODE=offline needs no account); by default none.

    Returns:
        The run's folder: config.json, metrics.jsonl, rollouts.jsonl, report.html, step_<k>/.

    Raises:
        InputError: A value that cannot work, before any training.
    """
    hyperparameters = dict(locals())
    check_hyperparameters(**hyperparameters)
    problems = read_prompts(data, "--data")
    eval_problems = read_prompts(eval_data, "--eval-data") if eval_data else []
    if len(problems) < rollouts_per_step:
        raise InputError(
            f"--data {data}: {len(problems)} problems, but --rollouts-per-step is {rollouts_per_step}; add problems or lower it"
        )
    if device != "auto" and not getattr(torch, device).is_available():
        raise InputError(f"--device {device}: PyTorch finds none on this machine; leave it at auto")

    steps_per_epoch = len(problems) // rollouts_per_step
    total_steps = min(epochs * steps_per_epoch, max_steps or math.inf)

    verifier = MathVerifier(verifier_method)
    check_answers(verifier, problems + eval_problems)

    folder = choose_folder(output, run_name)

    accelerator = Accelerator(cpu=device == "cpu", log_with="wandb" if wandb_project else None)
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes: training runs in one; start it with python train.py")
    set_seed(seed)
    run_device = accelerator.device
    if device not in ("auto", run_device.type):
        raise InputError(
            f"--device {device}: accelerate already works on {run_device.type} in this Python process; start a new one"
        )
    if run_device.type == "cpu":
        keep_freed_memory()
    order_generator = torch.Generator().manual_seed(seed)
    sample_generator = torch.Generator(run_device).manual_seed(seed)

    # Memory: what it will take, before anything loads
    transformers.utils.logging.disable_progress_bar()  # of reading weights; downloads keep theirs
    tokenizer = models.load_tokenizer(model_name)
    prompt_ids = encode_prompts(tokenizer, problems, system_prompt, max_length)
    eval_prompt_ids = encode_prompts(tokenizer, eval_problems, system_prompt, max_length)
    compute_dtype = models.pick_dtype(run_device, dtype)
    skeleton = models.skeleton(
        models.resolve(model_name, "--model-name"), AutoModelForCausalLM, compute_dtype, f"--model-name {model_name}"
    )
    positions = getattr(skeleton.config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise InputError(f"--max-length {max_length}: must be at most the {positions} positions of {model_name}")
    reward_choice = plan_memory(
        skeleton, prompt_ids, model_name, reward_model_name, run_device, compute_dtype,
        reward_model_device=reward_model_device, reward_model_8bit=reward_model_8bit, reward_mode=reward_mode,
        lora_rank=lora_rank, kl_weight=kl_weight, completions=rollouts_per_step * group_size, group_size=group_size,
        micro_batch_size=micro_batch_size, gradient_checkpointing=gradient_checkpointing, max_length=max_length,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip

    # Models
    in_its_place = "" if "tinyllama" in model_name.lower() else f" in its place: {model_name}"
    print(f"Loading TinyLlama model...{in_its_place}", flush=True)
    policy = models.load_policy(model_name, run_device)
    compute = f"computes in {str(compute_dtype).removeprefix('torch.')} on {run_device.type}"
    print(f"policy: {policy.num_parameters() / 1e6:.1f} million weights, trained in float32, {compute}", flush=True)
    adapter = models.add_lora(policy, lora_rank) if lora_rank else None  # lives in the policy's layers
    if adapter:
        trained = adapter.get_nb_trainable_parameters()[0]
        print(f"LoRA of rank {lora_rank}: {trained / 1e6:.2f} million weights are trained", flush=True)
    master = models.MasterWeights(policy, compute_dtype)
    reference = None
    if kl_weight > 0:  # with LoRA it is the policy itself with the adapter switched off
        reference = policy if adapter else models.frozen_copy(policy)
    if gradient_checkpointing:
        models.checkpoint_activations(policy)
    optimizer = torch.optim.AdamW(master.parameters, lr=lr, weight_decay=weight_decay, fused=True)
    stop_ids = models.stop_token_ids(policy, tokenizer)
    sampling = dict(max_length=max_length, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=stop_ids[0])
    explore = dict(temperature=temperature, top_p=top_p)

    print("Loading reward model and math verifier...", flush=True)
    reward_model = load_reward_model(reward_choice)
    if reward_mode == "rm" and reward_model is None:
        raise InputError("--reward-mode rm: the reward model could not be loaded, see above")

    resolved = {"device": str(run_device), "compute_dtype": str(compute_dtype), "total_steps": total_steps}
    run = RunLog(folder, run_name is None, hyperparameters | resolved)
    if wandb_project:
        accelerator.init_trackers(wandb_project, hyperparameters, {"wandb": {"name": run.folder.name, "dir": str(run.folder)}})
    defaults = {name: p.default for name, p in inspect.signature(main).parameters.items()}
    changed = ", ".join(f"{name}={value}" for name, value in hyperparameters.items() if value != defaults[name])
    print(f"settings other than the defaults: {changed or 'none'}; all in {run.folder / 'config.json'}", flush=True)
    print(f"found {len(problems)} matching prompts", flush=True)

    # Warmup
    print("Running warmup to determine reward model bounds...", flush=True)
    min_rm, max_rm = 0.0, 0.0  # with no reward model every score is 0, so r_hat is -alpha or 1 - beta
    if reward_model is not None:
        warmup_generator = torch.Generator(run_device).manual_seed(seed + 1)
        picked = [i % len(problems) for i in range(warmup_samples)]
        warmup = sample(policy, [prompt_ids[i] for i in picked], 1, generator=warmup_generator, **explore, **sampling)
        warmup_questions, warmup_texts = [problems[i].question for i in picked], decode(tokenizer, warmup)
        verifier.verify_batch(warmup_questions, warmup_texts, [problems[i].answer for i in picked])
        warn_of_unread_answers(verifier.metrics(), warmup_texts, verifier_method)
        scores = reward_model.score_texts(warmup_questions, warmup_texts)
        scores = scores[scores.isfinite()]  # a score that failed is no bound
        if not len(scores):
            print("warning: the reward model failed on every completion of the warmup; both bounds are 0", flush=True)
        else:
            min_rm, max_rm = scores.min().item(), scores.max().item()
    print(f"RM bounds: min={min_rm:.4f}, max={max_rm:.4f}", flush=True)

    # Training
    sigma_bar = RunningMean()
    print(f"training for {total_steps} steps of {rollouts_per_step} x {group_size} completions", flush=True)
    if max_steps and total_steps < max_steps:
        print(f"that is less than --max-steps {max_steps}: --epochs {epochs} x {steps_per_epoch} steps come first", flush=True)
    order: list[int] = []
    accuracies: list[float] = []
    started = time.perf_counter()
    for step in range(total_steps + 1):
        metrics: dict[str, float] = {}

        # Held-out accuracy of the policy after `step` steps: before the first, every interval, after the last.
        if eval_problems and (step in (0, total_steps) or (eval_interval and step % eval_interval == 0)):
            evaluation = evaluate(
                policy, tokenizer, verifier, eval_problems, eval_prompt_ids, group_size * rollouts_per_step, sampling
            )
            metrics |= evaluation
            accuracies.append(evaluation["eval/accuracy"])
            print(
                f"held-out accuracy after {step} steps: {100 * accuracies[-1]:.1f} % of {len(eval_problems)}, greedy", flush=True
            )
        if step == total_steps:
            if metrics:
                run.metrics(step, metrics)
                accelerator.log(metrics, step=step)
            break

        step_started = time.perf_counter()
        # Which questions: a reshuffled pass over the problems; what does not fill a step waits for another epoch.
        if len(order) < rollouts_per_step:
            order = torch.randperm(len(problems), generator=order_generator).tolist()
        chosen, order = order[:rollouts_per_step], order[rollouts_per_step:]
        questions = [problems[i].question for i in chosen for _ in range(group_size)]  # B
        answers = [problems[i].answer for i in chosen for _ in range(group_size)]  # B

        # Rollout: G completions for each of Q questions, with the log-prob of every sampled token.
        phase_started = time.perf_counter()
        samples = sample(policy, [prompt_ids[i] for i in chosen], group_size, generator=sample_generator, **explore, **sampling)
        completions = decode(tokenizer, samples)
        rollout_s = time.perf_counter() - phase_started

        # Score: verdict and reward-model score -> r_hat -> weighted reward; (B,) each.
        phase_started = time.perf_counter()
        scores = score(
            verifier, reward_model, questions, answers, completions, group_size,
            min_rm=min_rm, max_rm=max_rm, rm_bounds=rm_bounds, alpha=alpha, beta=beta, eps=eps,
            reward_mode=reward_mode, reward_scorer=reward_scorer, w_min=w_min, w_max=w_max, k=k, sigma_bar=sigma_bar,
        )  # fmt: skip
        advantages = compute_advantages(scores.rewards, group_size, advantage_scale)  # (B,)
        score_s = time.perf_counter() - phase_started
        verifier_metrics = verifier.metrics()
        if step == 0 and reward_model is None:  # there was no warmup to see it in
            warn_of_unread_answers(verifier_metrics, completions, verifier_method)
        print_rollouts(questions, answers, scores, group_size, step)

        # Update: clipped policy-gradient steps over minibatches of train_batch_size completions.
        phase_started = time.perf_counter()
        step_lr = lr if lr_schedule == "constant" else lr * (1 - step / total_steps)
        for group in optimizer.param_groups:
            group["lr"] = step_lr
        metrics |= update(
            policy, reference, adapter, master, optimizer, samples, advantages.to(run_device), group_size, order_generator,
            train_batch_size=train_batch_size, micro_batch_size=micro_batch_size, epochs_per_step=epochs_per_step,
            temperature=temperature, kl_weight=kl_weight, clip_eps=clip_eps, max_norm=max_norm,
            loss_normalizer=loss_normalizer, max_completion_length=max_new_tokens or max_length,
        )  # fmt: skip
        update_s = time.perf_counter() - phase_started

        # Report and save
        metrics |= reward_metrics(scores, advantages, group_size) | completion_metrics(samples, scores)
        metrics |= {"reward/rm_min": min_rm, "reward/rm_max": max_rm}
        metrics["reward/rm_failed"] = float(reward_model.failed if reward_model else 0)
        metrics["reward/rm_truncated"] = float(reward_model.truncated if reward_model else 0)
        metrics |= verifier_metrics | {"reward/sigma_bar": sigma_bar.mean, "optim/lr": step_lr}
        metrics |= {"time/rollout_s": rollout_s, "time/score_s": score_s, "time/update_s": update_s}
        metrics["time/step_s"] = time.perf_counter() - step_started
        metrics |= speed_metrics(policy, samples, group_size, epochs_per_step, reference is not None, metrics)
        run.metrics(step, metrics)
        run.rollouts(rollout_rows(step, questions, answers, completions, samples, scores, advantages))
        accelerator.log(metrics, step=step)
        print(
            f"{step}: kl={metrics['policy/kl']:.4f}, grad_norm={metrics['policy/grad_norm']:.4f}, "
            f"right={100 * metrics['reward/rule_mean']:.0f}%, tokens={metrics['completion/len_mean']:.0f}, "
            f"truncated={100 * metrics['completion/truncated_frac']:.0f}%, {metrics['time/step_s']:.1f} s, "
            f"{metrics['time/tokens_per_s']:.0f} tokens/s (step {step + 1} of {total_steps})",
            flush=True,
        )
        if (step + 1) % checkpoint_interval == 0 or step + 1 == total_steps:
            checkpoint = save_checkpoint(run.folder, f"step_{step + 1}", adapter or policy, tokenizer)
            print(f"saved {checkpoint}", flush=True)
            renew_report(run.folder)

    if adapter:
        master.restore(policy)
        print(f"saved {save_checkpoint(run.folder, 'merged', adapter.merge_and_unload(), tokenizer)}", flush=True)
    accelerator.end_training()
    verifier.close()
    renew_report(run.folder)
    minutes = (time.perf_counter() - started) / 60
    change = f"; held-out accuracy {100 * accuracies[0]:.1f} % -> {100 * accuracies[-1]:.1f} %" if accuracies else ""
    print(f"done: {total_steps} steps in {minutes:.1f} minutes on {run_device.type}{change}; see {run.folder}", flush=True)
    return run.folder


# ----------------------------------------------------------------------------------------------------------------------
# Input


def check_hyperparameters(**h) -> None:
    """Refuse what cannot work, before anything loads. Takes main()'s parameters by name."""

    def refuse(name: str, rule: str) -> None:
        raise InputError(f"--{name.replace('_', '-')} {h[name]}: {rule}")

    at_least = dict(
        epochs=1, train_batch_size=1, micro_batch_size=1, epochs_per_step=1, rollouts_per_step=1, max_length=2,
        warmup_samples=1, checkpoint_interval=1, eval_interval=0, seed=0, lora_rank=0,
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
    if h["alpha"] + h["beta"] > 1:
        print(
            f"warning: --alpha {h['alpha']} + --beta {h['beta']} is above 1, so the bands overlap and a wrong answer can earn "
            "more than a right one; keep the sum at 1 or below",
            flush=True,
        )
    if h["wandb_project"]:
        check_wandb()


def check_wandb() -> None:
    """Refuse a W&B run that would stop to ask for a login."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode not in ("offline", "disabled") and not wandb.api.api_key:
        raise InputError(
            "--wandb-project: no W&B login on this machine; run `wandb login`, or set WANDB_MODE=offline to do without an account"
        )


@dataclass
class Problem:
    question: str
    answer: str  # the ground truth; a GSM8K solution is reduced to what follows its ####
    source: str  # where it stands, for messages


def read_prompts(data: str, flag: str) -> list[Problem]:
    """Read problems from a JSONL file or, as hf:NAME[:CONFIG[:SPLIT]], a data set of the Hugging Face hub.

    Raises:
        InputError: No such file or data set, a line that is not a JSON object, a record without question or answer, no
            record at all.
    """
    if data.startswith("hf:"):
        records = [(f"{data}, row {i}", row) for i, row in enumerate(load_hub_data(data, flag), start=1)]
    else:
        try:
            lines = Path(data).read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON strings may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{flag} {data}: cannot be read ({reason}); give a JSONL file of {{'question', 'answer'}} records"
            ) from None
        records = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    records.append((f"{data}, line {number}", json.loads(line)))
                except ValueError as error:  # not JSON, or a number of more digits than Python reads
                    raise InputError(
                        f"{data}, line {number}: not JSON ({error}); each line must be one {{'question', 'answer'}} object"
                    ) from None
    problems = []
    for source, record in records:
        values = [record.get(key) if isinstance(record, dict) else None for key in ("question", "answer")]
        for key, value in zip(("question", "answer"), values, strict=True):
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
                raise InputError(f"{source}: no {key!r}; each record must have a question and an answer, both text or numbers")
        truth = ground_truth_of(str(values[1]))
        if not truth:
            raise InputError(f"{source}: nothing follows the #### of the answer; put the final answer behind it")
        problems.append(Problem(str(values[0]), truth, source))
    if not problems:
        raise InputError(f"{flag} {data}: no problems in it; it must have at least one {{'question', 'answer'}} record")
    return problems


def check_answers(verifier: MathVerifier, problems: list[Problem]) -> None:
    """Refuse problems whose answer no completion could ever equal.

    Raises:
        InputError: There is one.
    """
    reasons = verifier.prepare([p.answer for p in problems])
    for problem, reason in zip(problems, reasons, strict=True):
        if reason:
            raise InputError(f"{problem.source}: its answer {problem.answer[:80]!r} cannot be compared with any: {reason}")


def load_hub_data(data: str, flag: str) -> list[dict]:
    """Rows of hf:NAME[:CONFIG[:SPLIT]]; the config named "main" where there are several and none is given; split train."""
    import datasets

    parts = data.removeprefix("hf:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise InputError(f"{flag} {data}: must be hf:NAME[:CONFIG[:SPLIT]], for example hf:openai/gsm8k:main:train")
    name, config, split = parts + [""] * (3 - len(parts))
    try:
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train")
        except ValueError as error:
            if config or "Config name is missing" not in str(error):
                raise
            rows = datasets.load_dataset(name, "main", split=split or "train")
    except Exception as error:  # datasets raises whatever its storage backend of the day raises
        raise InputError(
            f"{flag} {data}: could not be loaded ({type(error).__name__}: {error}); check the name and the network, "
            "or give a JSONL file"
        ) from None
    return list(rows)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], system_prompt: str | None, max_length: int
) -> list[list[int]]:
    """Token ids of each question in the policy's chat template, ready for its answer.

    Raises:
        InputError: A prompt leaves no room for a completion.
    """
    head = [{"role": "system", "content": system_prompt}] if system_prompt else []
    encoded = []
    for problem in problems:
        messages = [*head, {"role": "user", "content": problem.question}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the conversation ({error}); leave --system-prompt out") from None
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written the special tokens
        if len(ids) >= max_length:
            raise InputError(
                f"{problem.source}: the prompt has {len(ids)} tokens, which leaves no room within --max-length {max_length}; "
                "raise it or remove the problem"
            )
        encoded.append(ids)
    return encoded


def plan_memory(
    skeleton: PreTrainedModel,
    prompt_ids: list[list[int]],
    model_name: str,
    reward_model_name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    reward_model_device: str,
    reward_model_8bit: bool,
    reward_mode: str,
    lora_rank: int,
    kl_weight: float,
    completions: int,
    group_size: int,
    micro_batch_size: int,
    gradient_checkpointing: bool,
    max_length: int,
    max_new_tokens: int | None,
) -> RewardModelChoice:
    """Choose the reward model and where it goes, print what the run will take, and refuse what cannot fit.

    Raises:
        InputError: It cannot fit, or a placement of the reward model was asked for that cannot be.
    """
    if lora_rank:
        models.add_lora(skeleton, lora_rank)
    longest, shortest = max(map(len, prompt_ids)), min(map(len, prompt_ids))
    plan = Plan(
        measure(skeleton), device.type, completions, group_size, micro_batch_size, prompt_length=longest,
        completion_length=min(max_new_tokens or max_length, max_length - shortest), reference=kl_weight > 0 and not lora_rank,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    free, host_free = free_memory(device), free_memory(torch.device("cpu"))
    if reward_mode == "verifier":
        choice = RewardModelChoice(None, "--reward-mode verifier")
    else:
        choice = choose_reward_model(
            reward_model_name, reward_model_device, reward_model_8bit, model_name, plan, device, dtype, free, host_free
        )
    if reward_mode == "rm" and choice.name is None:
        raise InputError(f"--reward-mode rm: there is no reward model ({choice.why}); name one with --reward-model-name")
    plan = replace(plan, reward_weights=choice.weights, reward_placement=choice.placement)
    eight_bit = choice.weights / 2 if choice.name not in (None, models.EMBEDDED) and not choice.load_in_8bit else 0.0
    check_fits(plan, free, lambda: measure(models.add_lora(skeleton, 16).get_base_model()), eight_bit)
    return choice


def load_reward_model(choice: RewardModelChoice) -> AceRewardModel | None:
    """The reward model, or None for a run on the verifier alone; one line says which and why."""
    if choice.failed:
        print(f"warning: no reward model, the verifier alone decides: {choice.why}", flush=True)
        return None
    if choice.name is None:
        print(f"reward model: none, the verifier alone decides ({choice.why})", flush=True)
        return None
    try:
        reward_model = choice.load()
    except (InputError, RuntimeError) as error:  # no memory for it, above all
        print(f"warning: no reward model, the verifier alone decides: {error}", flush=True)
        return None
    print(f"reward model: {choice.name} on {choice.where()} ({choice.why})", flush=True)
    return reward_model


# ----------------------------------------------------------------------------------------------------------------------
# Rollout and score


def decode(tokenizer: PreTrainedTokenizerBase, samples: Samples) -> list[str]:
    """Text of each completion, without special tokens."""
    return tokenizer.batch_decode(samples.completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def warn_of_unread_answers(verifier_metrics: dict[str, float], completions: list[str], method: str) -> None:
    """Say so where the verifier found no final answer in any completion: all would be wrong, and nothing learned."""
    if verifier_metrics["verifier/extracted_frac"] == 0:
        wanted = "an <answer>, \\boxed{} or ####" if method == "strict" else "a final answer"
        print(
            f"warning: not one of the {len(completions)} first completions holds {wanted} that the verifier can read, for "
            f"example {completions[0][-200:]!r}; see --system-prompt, --verifier-method and --max-new-tokens",
            flush=True,
        )


def score(
    verifier: MathVerifier,
    reward_model: AceRewardModel | None,
    questions: list[str],
    answers: list[str],
    completions: list[str],
    group_size: int,
    *,
    min_rm: float,
    max_rm: float,
    rm_bounds: str,
    alpha: float,
    beta: float,
    eps: float,
    reward_mode: str,
    reward_scorer: str,
    w_min: float,
    w_max: float,
    k: float,
    sigma_bar: RunningMean,
) -> Scores:
    """Judge and score B completions; takes this step's sigma_u into `sigma_bar`, then weights by it.

    sigma_u is the std (n - 1) of the group's scores after they are held within the bounds, in units of the reward model.
    A completion that the reward model fails on gets a neutral score, halfway between the bounds.
    """
    verdicts = verifier.verify_batch(questions, completions, answers)
    rule_rewards = torch.tensor([float(v["correct"]) for v in verdicts])
    rm_scores = torch.zeros(len(completions))
    if reward_model is not None:
        rm_scores = reward_model.score_texts(questions, completions)  # nan where it failed
    if rm_bounds == "warmup":
        low, high = torch.full_like(rm_scores, min_rm), torch.full_like(rm_scores, max_rm)
    else:
        strata = rule_rewards if reward_mode == "hybrid" else torch.zeros_like(rule_rewards)
        low, high = group_bounds(rm_scores, strata, group_size)
    rm_scores = torch.where(rm_scores.isnan(), 0.5 * (low + high), rm_scores)
    held, rm_clamped = clamp_scores(rm_scores, low, high)
    n = normalised_score(held, low, high, eps)
    group_sigma = held.view(-1, group_size).std(dim=1)  # (Q,)
    sigma_bar.update(group_sigma)
    sigma_u = group_sigma.repeat_interleave(group_size)  # (B,)
    r_hat = combine_hybrid_score(rule_rewards, held, low, high, eps, alpha, beta)
    if reward_mode != "hybrid":
        r_hat = rewards = rule_rewards if reward_mode == "verifier" else n
        weights = torch.ones_like(r_hat)
    elif reward_scorer == "sigmoid":
        weights = difficulty_weight(sigma_bar.mean, sigma_u, w_min, w_max, k)
        rewards = get_final_reward(r_hat, sigma_bar.mean, sigma_u, w_min, w_max, k)
    else:
        weights = tanh_weight(r_hat, w_min, w_max)
        rewards = get_our_final_reward(r_hat, sigma_bar.mean, sigma_u, w_min, w_max, k)
    return Scores(verdicts, rule_rewards, rm_scores, rm_clamped, n, sigma_u, r_hat, weights, rewards)


# ----------------------------------------------------------------------------------------------------------------------
# Update


def update(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    adapter: "PeftModel | None",
    master: models.MasterWeights,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    advantages: torch.Tensor,
    group_size: int,
    generator: torch.Generator,
    *,
    train_batch_size: int,
    micro_batch_size: int,
    epochs_per_step: int,
    temperature: float,
    kl_weight: float,
    clip_eps: float,
    max_norm: float,
    loss_normalizer: str,
    max_completion_length: int,
) -> dict[str, float]:
    """Take the optimizer steps of one GRPO step.

    Questions are shuffled, their completions stay side by side, and each `train_batch_size` of them make one optimizer
    step. Where there is no KL term, completions without an advantage have no gradient and cost no compute.

    Returns:
        The policy/... metrics, means over all tokens of the step, and time/reference_s, a part of the update's.
    """
    ref_log_probs, started = None, time.perf_counter()
    if reference is not None:
        with adapter.disable_adapter() if adapter else nullcontext():
            ref_log_probs = reference_log_probs(reference, samples, group_size, micro_batch_size, temperature)
    reference_s = time.perf_counter() - started
    totals = dict.fromkeys(("loss", "kl", "clipped", "tokens", "gap", "gap_tokens"), 0.0)
    grad_norms, moved = [], 0.0
    for _ in range(epochs_per_step):
        questions = torch.randperm(len(advantages) // group_size, generator=generator)
        order = (questions[:, None] * group_size + torch.arange(group_size)).flatten()  # (B,)
        for batch in order.split(train_batch_size):
            weights = torch.zeros_like(samples.log_probs)  # (B, T-1)
            weights[batch] = token_weights(samples.action_mask[batch], loss_normalizer, max_completion_length)
            totals["tokens"] += samples.action_mask[batch].sum().item()
            if kl_weight == 0:
                batch = batch[(advantages[batch] != 0).cpu()]
            if len(batch) == 0:
                continue
            for part in micro_batches(policy, samples.attention_mask, samples.action_mask, batch, group_size, micro_batch_size):
                rows, n = part.rows, part.width
                mask, old = samples.action_mask[rows, :n], samples.log_probs[rows, :n]  # (b, t-1)
                log_probs = completion_log_probs(policy, samples.sequence_ids, samples.action_mask, part, temperature)  # (b, t-1)
                losses, clipped = policy_loss(log_probs, old, advantages[rows], mask, clip_eps)
                if ref_log_probs is not None:
                    kl = torch.where(mask, kl_estimate(log_probs, ref_log_probs[rows, :n]), 0.0)
                    losses = losses + kl_weight * kl
                    totals["kl"] += kl.sum().item()
                loss = (losses * weights[rows, :n]).sum()
                loss.backward()
                master.accumulate_gradients()
                totals["loss"] += loss.item()
                totals["clipped"] += clipped.sum().item()
                if not grad_norms:  # before the first optimizer step: sampler and trainer have the same weights
                    totals["gap"] += torch.where(mask, log_probs.detach() - old, 0.0).abs().sum().item()
                    totals["gap_tokens"] += mask.sum().item()
            grad_norm = torch.nn.utils.clip_grad_norm_(master.parameters, max_norm)
            grad_norms.append(grad_norm.item())
            if math.isfinite(grad_norms[-1]):
                before = master.sample_values() if len(grad_norms) == 1 else None
                optimizer.step()
                master.write_back()
                moved = moved if before is None else share_moved(before, master.sample_values())
            master.release_gradients()
    finite = [g for g in grad_norms if math.isfinite(g)]
    if len(finite) < len(grad_norms):
        print(f"warning: the gradient of {len(grad_norms) - len(finite)} updates was not finite; they were skipped", flush=True)
    return {
        "policy/loss": totals["loss"] / max(len(grad_norms), 1),
        "policy/kl": totals["kl"] / max(totals["tokens"], 1.0),
        "policy/clip_frac": totals["clipped"] / max(totals["tokens"], 1.0),
        "policy/grad_norm": sum(finite) / max(len(finite), 1),
        "policy/updates": float(len(finite)),
        "policy/skipped_updates": float(len(grad_norms) - len(finite)),
        "policy/moved_frac": moved,
        "policy/sampler_gap": totals["gap"] / max(totals["gap_tokens"], 1.0),
        # At top_p 1, -log p of a sampled token is an unbiased estimate of the entropy of its distribution.
        "time/reference_s": reference_s,
        "policy/entropy": -samples.log_probs.sum().item() / samples.action_mask.sum().item(),
    }


@torch.no_grad()
def reference_log_probs(
    reference: PreTrainedModel, samples: Samples, group_size: int, micro_batch_size: int, temperature: float
) -> torch.Tensor:
    """Log-probs (B, T-1) of the samples under the frozen reference, in larger passes: nothing is kept for a gradient."""
    log_probs = torch.zeros_like(samples.log_probs)
    every, size = torch.arange(len(log_probs)), 4 * micro_batch_size
    for part in micro_batches(reference, samples.attention_mask, samples.action_mask, every, group_size, size):
        of_part = completion_log_probs(reference, samples.sequence_ids, samples.action_mask, part, temperature)
        log_probs[part.rows, : part.width] = of_part
    return log_probs


def share_moved(before: list[tuple[torch.Tensor, torch.Tensor]], after: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of the sampled weights with a gradient that an optimizer step changed."""
    moved = with_gradient = 0
    for (old, gradient), (new, _) in zip(before, after, strict=True):
        with_gradient += int((gradient != 0).sum())
        moved += int(((gradient != 0) & (old != new)).sum())
    return moved / max(with_gradient, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluate and report


def evaluate(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    problems: list[Problem],
    prompt_ids: list[list[int]],
    batch_size: int,
    sampling: dict,
) -> dict[str, float]:
    """Greedy answers to held-out problems. Draws no random number, so training goes on as if it had not been."""
    right = tokens = finished = 0
    for start in range(0, len(problems), batch_size):
        part = problems[start : start + batch_size]
        samples = sample(
            policy, prompt_ids[start : start + batch_size], 1, temperature=0.0, top_p=1.0, generator=None, **sampling
        )
        verdicts = verifier.verify_batch([p.question for p in part], decode(tokenizer, samples), [p.answer for p in part])
        right += sum(v["correct"] for v in verdicts)
        tokens += sum(map(len, samples.completion_ids))
        finished += int(samples.finished.sum())
    n = len(problems)
    parsed = verifier.metrics()["verifier/extracted_frac"]  # and so begins the step's counts at zero
    return {
        "eval/accuracy": right / n,
        "eval/len_mean": tokens / n,
        "eval/truncated_frac": 1 - finished / n,
        "eval/extracted_frac": parsed,
    }


def print_rollouts(questions: list[str], answers: list[str], scores: Scores, group_size: int, step: int) -> None:
    """One line a question, then the sum of the step's rewards, in the words that users of this script know."""
    for start in range(0, len(questions), group_size):
        group = slice(start, start + group_size)
        right = int(scores.rule_rewards[group].sum())
        print(
            f"rollout q={questions[start]!r}, a={answers[start]!r}, returns={scores.rewards[group].sum():.2f}, "
            f"replay_buffer_size={start + group_size}, right={right}/{group_size}"
        )
    print(f"returns of step {step}: {scores.rewards.sum():.4f}", flush=True)


def cli() -> None:
    """main() as a command line: the parameters are the flags, and what the user can mend is said without a stack trace."""
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the checkpoints written so far are whole", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()
