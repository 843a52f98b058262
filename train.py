"""Train a small chat model to do maths with GRPO and a hybrid reward: a rule verifier's verdict and a reward model's score.

    python train.py                                  TinyLlama-1.1B-Chat with AceMath-7B-RM, one GPU
    python train.py --model-name embedded            SmolLM2-135M-Instruct, no GPU, no hub
    python train.py --reward-scorer tanh             the experimental weight
    python train.py --resume output/RUN              go on with a run that was stopped
    python train.py --eval-only --eval-data F        how many questions a model answers right
    python train.py --help                           every hyperparameter; they are the parameters of main()

One step: sample G completions for each of Q questions, judge and score each, centre the rewards on their group's mean,
and take clipped policy-gradient steps on all sampled tokens. In formulas, with the names of the code:

    n          = (score - min_rm) / (max_rm - min_rm + eps)             score: the reward model's, held within the bounds
    r_hat      = 1 - beta + 2 beta n   for a right answer               hybrid_rewards
               = -alpha + 2 alpha n    for any other
    w          = w_min + (w_max - w_min) sigmoid(k (sigma_u - sigma_bar))      --reward-scorer sigmoid
               = w_min + (w_max - w_min) tanh(r_hat^3)                         --reward-scorer tanh
                 sigma_u: std of the scores of the question's group; sigma_bar: mean of all sigma_u so far
    advantage  = (w r_hat - mean of its group) / std of the batch       compute_advantages
    ratio      = exp(log_prob - log_prob when it was sampled)
    kl         = exp(ref - log_prob) - (ref - log_prob) - 1             kl_estimate
    loss       = mean over the tokens of an optimizer step of           policy_loss, token_weights
                 -min(ratio advantage, clip(ratio, 1 - clip_eps, 1 + clip_eps) advantage) + kl_weight kl

Where this departs from the GRPO paper (arXiv:2402.03300):

1. The reward is HERO's (arXiv:2510.07242): the verdict opens a band, the reward model's score is the place in it, and the
   whole is weighted by the question's difficulty (with the sigmoid scorer).
2. Centred rewards are divided by the std of the whole batch, not of their own group: a group with a single verdict differs
   by reward-model noise alone, which its own std would blow up (`--advantage-scale group` is the paper's).
3. Every token of an optimizer step counts the same, whichever completion it is in (`--loss-normalizer sequence` is the paper's).
4. The log-probs of the samples are those the sampler recorded, under the temperature that it sampled at, and training
   computes its own at the same temperature. The stop token is an action like any other. Completions that are cut off by
   `max_length` are trained on like the rest: they rarely hold an answer, which teaches the policy to finish.
5. The optimizer steps float32 weights; the model computes with them rounded to bfloat16 where the hardware has it.
"""

import functools
import inspect
import io
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, PreTrainedModel

from src import console, kernels, models, parallel
from src.checkpoint import Checkpoints, Progress, find_checkpoint, read_progress, save_model, set_aside_later
from src.errors import InputError, TrainingError
from src.evaluation import Evaluated, answer, answer_metrics, describe, evaluate_policy, report_evaluation
from src.grpo import compute_advantages, kl_estimate, policy_loss, token_weights
from src.hybrid_reward import RunningMean, hybrid_rewards
from src.hyperparameters import check_hyperparameters, check_processes
from src.logprobs import completion_log_probs, micro_batches
from src.master_weights import MasterWeights
from src.math_verifier import MathVerifier
from src.memory import ModelSize, Plan, bound_product_cache, check_fits, free_memory, keep_freed_memory, measure
from src.patient_stream import PatientStream
from src.problems import Problem, check_answers, encode_prompts, read_prompts, texts_of
from src.report import renew_report
from src.resume import changes, file_hash, fingerprint, has_other_problems, named_flags, read_config, resumable
from src.reward_model import AceRewardModel, RewardModelChoice, choose_reward_model
from src.rollout import fit_memory, roll_out
from src.run_log import RunLog, Scores, choose_folder, completion_metrics, reward_metrics, rollout_rows
from src.sampler import Limits, Samples, Sampling, decode, sample
from src.signals import Stopped, StopSignals
from src.speed import speed_metrics
from src.trackers import chosen_trackers, log_completions, start_trackers

# Shapes: Q questions a step, G completions a question, B = Q x G completions, T tokens of the longest sequence.


@resumable
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
    max_skipped_updates: int = 10,
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
    keep_checkpoints: int = 3,
    resume: str | None = None,
    eval_data: str | None = None,
    eval_interval: int = 0,
    eval_only: bool = False,
    eval_samples: int = 8,
    eval_against: str | None = None,
    tracker: list[Literal["wandb", "tensorboard", "trackio"]] | None = None,
    wandb_project: str | None = None,
    sample_interval: int = 10,
    quiet: bool = False,
) -> Path:
    """Train a chat model to do maths by GRPO with a hybrid reward.

    Args:
        model_name: The policy: a Hugging Face name, a local folder, or "embedded" (SmolLM2-135M-Instruct, no hub needed).
        reward_model_name: The reward model: a Hugging Face name, a local folder, "embedded" (a judge of answers to arithmetic,
            no hub needed), "none" (the verifier alone), or "auto" (the embedded one beside the embedded policy, AceMath-7B-RM
            beside others where a GPU, or by turns with the host, has room for it, otherwise none).
        reward_model_device: Where the reward model is: cuda, cpu (computed there, slowly), offload (in the host's memory, on
            the GPU only while scoring), or auto: the first of cuda, offload and cpu that has room.
        reward_model_8bit: Hold the reward model's linear layers in int8: half the memory of bfloat16. Needs bitsandbytes.
        device: Where to compute; auto takes cuda, mps or cpu, whichever is found first.
        dtype: What the models compute in; auto takes bfloat16 where the hardware has it. Trained weights are float32.
        lora_rank: Rank of a LoRA adapter in every linear layer but the head, which is then all that is trained; 0 trains
            every weight. It wants a learning rate of about ten times as much.
        data: Problems to train on: a JSONL file of {"question", "answer"}, or hf:NAME[:CONFIG[:SPLIT]] for a data set.
        epochs: Passes over the problems, reshuffled each time; those left over that do not fill a step are skipped.
        max_steps: Stop after this many steps, if the epochs have not ended before.
        lr: Learning rate of AdamW.
        lr_schedule: constant, or linear: from lr in the first step down to 0 after the last.
        weight_decay: Decoupled weight decay of AdamW.
        train_batch_size: Completions per optimizer step; divides rollouts_per_step x group_size. Where it equals group_size, as
            by default, an optimizer step is one question.
        micro_batch_size: Completions per forward and backward pass; changes memory and speed, not the result.
        gradient_checkpointing: Keep only what goes into each layer, compute the rest again: less memory, a slower update.
        epochs_per_step: Passes of the optimizer over the completions of a step.
        kl_weight: Weight of the KL divergence to the model as it was loaded; 0 keeps no reference model.
        clip_eps: Half-width of the interval around 1 to which the policy ratio is clipped.
        max_norm: Gradients are scaled down to this norm where theirs is larger.
        max_skipped_updates: An optimizer step whose loss or gradient is not finite is skipped. Stop, with the state saved, when
            this many have been skipped in consecutive steps of which none took any.
        advantage_scale: Divide centred rewards by the std of all completions of the step (batch), of their group (the GRPO
            paper), or by nothing (Dr. GRPO).
        loss_normalizer: What counts the same: each token (DAPO), each completion (the GRPO paper), or each token over a
            constant length (Dr. GRPO).
        seed: Of all that is random: the order of the problems, the samples, the order of updates.
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
        w_min: Lowest weight of the sigmoid; weight of the tanh where r_hat is 0.
        w_max: Highest weight.
        k: Slope of the sigmoid weight, per unit of reward-model score.
        warmup_samples: Completions that set the bounds of the reward model's scores before training.
        output: Folder of all runs; git-ignored.
        run_name: Name of this run's folder in output; by default the time of day.
        checkpoint_interval: Steps between checkpoints; there is one at the end as well.
        keep_checkpoints: Checkpoints to keep, the newest ones; 0 keeps all. The newest two can be resumed from, the others are
            models alone.
        resume: A run's folder to go on from its newest whole checkpoint, or one step_<k> of it. The other hyperparameters are
            then the run's own, in its config.json; one that is given as well replaces the run's from there on.
        eval_data: Held-out problems, in the same form as data, answered greedily before the first step and at the end.
        eval_interval: Answer them every so many steps too; 0 = only first and last.
        eval_only: Evaluate model_name on eval_data and end: no training, no reward model.
        eval_samples: Completions per question, beside the greedy one, from which eval_only estimates pass@k; 0 = none.
        eval_against: A second model for eval_only, compared with the first question by question.
        tracker: Where metrics go besides metrics.jsonl: wandb (WANDB_MODE=offline needs no account), tensorboard, trackio, or
            several of them.
        wandb_project: Project in Weights & Biases (naming one switches it on) or trackio; by default hybrid-grpo.
        sample_interval: Print three completions with their rewards every so many steps, and log all of them to Weights & Biases
            as a table; 0 = never.
        quiet: Print warnings and the result alone.

    Returns:
        The run's folder: config.json, metrics.jsonl, rollouts.jsonl, report.html, step_<k>/, with LoRA merged/; with eval_only
        evaluation.json and evaluation.jsonl.

    Raises:
        InputError: A value that cannot work, before any training.
        Stopped: SIGTERM or Ctrl-C; a KeyboardInterrupt. A step whose update has begun is finished, an earlier one dropped, and
            the run saved as it then is.
        TrainingError: The training cannot go on.
    """
    hyperparameters = dict(locals())
    console.configure(quiet)
    check_hyperparameters(**hyperparameters)
    problems = [] if eval_only else read_prompts(data, "--data")
    eval_problems = read_prompts(eval_data, "--eval-data") if eval_data else []
    if len(problems) < rollouts_per_step and not eval_only:
        raise InputError(
            f"--data {data}: {len(problems)} problems, but --rollouts-per-step is {rollouts_per_step}; add problems or lower it"
        )
    if device != "auto" and not getattr(torch, device).is_available():
        raise InputError(f"--device {device}: PyTorch finds none on this machine; leave it at auto")

    verifier = MathVerifier(verifier_method)
    check_answers(verifier, problems + eval_problems)

    # Finds device and processes, and talks to trackers. It wraps no model: `update` adds up the gradients of all processes.
    accelerator = Accelerator(cpu=device == "cpu", log_with=chosen_trackers(tracker, wandb_project) or None, project_dir=output)
    check_processes(accelerator.num_processes, rollouts_per_step)
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks, for as long as the others live)
    if resume:
        folder, checkpoint = parallel.from_first(lambda: find_checkpoint(Path(resume)))
    else:
        folder, checkpoint = parallel.from_first(lambda: choose_folder(output, run_name)), None
    set_seed(seed)
    run_device = accelerator.device
    if device not in ("auto", run_device.type):
        raise InputError(
            f"--device {device}: accelerate works on {run_device.type}; if it was set up in this Python process, start a new one"
        )
    if run_device.type == "cpu":
        keep_freed_memory()
        bound_product_cache()
    order_generator = torch.Generator().manual_seed(seed)
    sample_generator = torch.Generator(run_device).manual_seed(seed)

    transformers.utils.logging.disable_progress_bar()  # of reading weights; downloads keep theirs
    compute_dtype = models.pick_dtype(run_device, dtype)
    resolved = {**hyperparameters, "run_device": str(run_device), "compute_dtype": str(compute_dtype)}
    if eval_only:
        return evaluate_only(
            folder, resolved, eval_problems, verifier, run_device, compute_dtype,
            model_name=model_name, eval_against=eval_against, n=eval_samples, batch_size=rollouts_per_step * group_size,
            seed=seed, max_length=max_length, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            system_prompt=system_prompt,
        )  # fmt: skip

    # Memory: what it will take, before anything loads
    tokenizer = models.load_tokenizer(model_name)
    prompt_ids = encode_prompts(tokenizer, problems, system_prompt, max_length)
    eval_prompt_ids = encode_prompts(tokenizer, eval_problems, system_prompt, max_length)
    skeleton = load_skeleton(model_name, "--model-name", compute_dtype, max_length)
    reward_choice = plan_memory(
        skeleton, prompt_ids, model_name, reward_model_name, run_device, compute_dtype,
        reward_model_device=reward_model_device, reward_model_8bit=reward_model_8bit, reward_mode=reward_mode,
        lora_rank=lora_rank, kl_weight=kl_weight, completions=rollouts_per_step * group_size, group_size=group_size,
        micro_batch_size=micro_batch_size, gradient_checkpointing=gradient_checkpointing, max_length=max_length,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip

    # Models
    in_its_place = "" if "tinyllama" in model_name.lower() else f" in its place: {model_name}"
    console.say(f"Loading TinyLlama model...{in_its_place}")
    policy = models.load_policy(model_name, run_device)
    model_fingerprint = fingerprint(policy)
    computes = f"computes in {str(compute_dtype).removeprefix('torch.')} on {run_device.type}"
    console.say(f"policy: {policy.num_parameters() / 1e6:.1f} million weights, trained in float32, {computes}")
    if run_device.type == "cpu" and kernels.libraries() is None:
        console.say(kernels.ABSENT)
    adapter = models.add_lora(policy, lora_rank) if lora_rank else None  # lives in the policy's layers
    if adapter:
        trained = adapter.get_nb_trainable_parameters()[0]
        console.say(f"LoRA of rank {lora_rank}: {trained / 1e6:.2f} million weights are trained")
    master = MasterWeights(policy, compute_dtype)
    reference = None
    if kl_weight > 0:  # with LoRA it is the policy itself with the adapter switched off
        reference = policy if adapter else models.frozen_copy(policy)
    if gradient_checkpointing:
        models.checkpoint_activations(policy)
    optimizer = torch.optim.AdamW(master.parameters, lr=lr, weight_decay=weight_decay, fused=True)
    stop_ids = models.stop_token_ids(policy, tokenizer)
    limits = Limits(max_length=max_length, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=stop_ids[0])
    sampling = Sampling(**limits, temperature=temperature, top_p=top_p)

    console.say("Loading reward model and math verifier...")
    reward_model = load_reward_model(reward_choice)
    if len(set(parallel.gather([reward_model is None]))) > 1:
        raise InputError("--reward-model-name: not every process has room for the reward model; see --reward-model-device")
    if reward_mode == "rm" and reward_model is None:
        raise InputError("--reward-mode rm: the reward model could not be loaded, see above")

    # The run: a new one, or one that goes on from a checkpoint
    steps_per_epoch = len(problems) // rollouts_per_step
    total_steps = min(epochs * steps_per_epoch, max_steps or sys.maxsize)
    progress = Progress(
        problems=len(problems), model=model_fingerprint, reward_model=reward_choice.name if reward_model else None
    )
    had = read_config(folder) if resume else {}
    changed = changes(had["hyperparameters"], hyperparameters) if resume else {}
    other_problems = bool(resume) and has_other_problems(had, data)
    if resume and checkpoint:
        check_resumed(read_progress(checkpoint), progress, changed, other_problems, total_steps, resume)
    config = {
        "hyperparameters": resolved | {"total_steps": total_steps},
        "data_sha256": {"data": file_hash(data), "eval_data": file_hash(eval_data)},
    }
    run = RunLog(folder, run_name is None, None if resume else config, accelerator.is_main_process)
    run.folder = parallel.from_first(lambda: run.folder)
    generators = {"order": order_generator, "sample": sample_generator}
    checkpoints = Checkpoints(run, adapter or policy, tokenizer, master, optimizer, generators, keep_checkpoints)
    warmed_up = False
    if checkpoint:
        now, progress = progress, checkpoints.load(checkpoint)
        warmed_up = progress.reward_model == now.reward_model  # the bounds are for one reward model
        progress.adapt(now, other_problems)
        if progress.skipped_in_a_row >= max_skipped_updates:
            progress.skipped_in_a_row = 0  # the run gave up; it is to have as many tries again
    if resume:
        set_aside_later(run, progress.step)
        run.go_on(progress.step, progress.written, changed, config)
        console.say(f"goes on from {checkpoint or 'the beginning: it has no checkpoint yet'}")
    if accelerator.log_with:
        progress.wandb_id = start_trackers(
            accelerator, wandb_project, run.folder, hyperparameters, progress.step, progress.wandb_id
        )
    defaults = {name: p.default for name, p in inspect.signature(main).parameters.items()}
    others = ", ".join(f"{name}={value}" for name, value in hyperparameters.items() if value != defaults[name])
    console.say(f"settings other than the defaults: {others or 'none'}; all in {run.folder / 'config.json'}")
    console.say(f"found {len(problems)} matching prompts")

    # Warmup
    if not warmed_up:
        console.say("Running warmup to determine reward model bounds...")
    if reward_model is not None and not warmed_up:
        warmup_generator = torch.Generator(run_device).manual_seed(seed + 1)
        picked = [i % len(problems) for i in range(warmup_samples)]
        warmup = sample(policy, [prompt_ids[i] for i in picked], 1, generator=warmup_generator, **sampling)
        warmup_questions, warmup_texts = [problems[i].question for i in picked], decode(tokenizer, warmup)
        verifier.verify_batch(warmup_questions, warmup_texts, [problems[i].answer for i in picked])  # for its counts alone
        warn_of_unread_answers(verifier.metrics(), warmup_texts, verifier_method)
        found = reward_model.score_texts(warmup_questions, warmup_texts)
        found = found[found.isfinite()]  # a score that failed is no bound
        if not len(found):
            print("warning: the reward model failed on every completion of the warmup; both bounds are 0", flush=True)
        bounds = (found.min().item(), found.max().item()) if len(found) else (0.0, 0.0)
        progress.min_rm, progress.max_rm = parallel.from_first(lambda: bounds)
        if not accelerator.is_main_process:  # every process has scored the same ones, and they count once
            reward_model.failed = reward_model.truncated = 0
        count_failures(reward_model, progress)
    # With no reward model every score and both bounds are 0, so r_hat is -alpha or 1 - beta.
    console.say(f"RM bounds: min={progress.min_rm:.4f}, max={progress.max_rm:.4f}")

    # Training
    console.say(f"training for {total_steps} steps of {rollouts_per_step} x {group_size} completions")
    if max_steps and total_steps < max_steps:
        console.say(f"that is less than --max-steps {max_steps}: --epochs {epochs} x {steps_per_epoch} steps come first")
    at_once = rollouts_per_step * group_size  # completions, as far as memory allows
    resume_point = checkpoints.snapshot(progress)  # the state between steps, to which a step that is broken off goes back
    stop = StopSignals()
    started = time.perf_counter()
    first_step = progress.step
    console.start(total_steps, "step", first_step)
    try:
        for step in range(first_step, total_steps + 1):
            stop.begin_step()
            metrics: dict[str, float] = {}

            # Held-out accuracy of the policy after `step` steps: before the first, every interval, after the last.
            if eval_problems and (step in (0, total_steps) or (eval_interval and step % eval_interval == 0)):
                console.phase("evaluate")
                compute = functools.partial(
                    answer, policy, tokenizer, verifier, *texts_of(eval_problems), eval_prompt_ids, 1, temperature=0.0, top_p=1.0,
                    generator=None, **limits,
                )  # fmt: skip
                answered, at_once = fit_memory(compute, at_once)
                metrics |= answer_metrics(answered, verifier_method)
                progress.accuracies.append(metrics["eval/accuracy"])
                console.say(f"held-out accuracy after {step} steps: {describe(metrics)} of {len(eval_problems)}, greedy")
            if step == total_steps:
                stop.hold()
                if metrics:
                    run.metrics(step, metrics)
                    accelerator.log(metrics, step=step)
                break

            step_started = time.perf_counter()
            # Which questions: the next Q of a random order of the problems, and of a new one when fewer are left.
            if len(progress.order) < rollouts_per_step:
                progress.order = torch.randperm(len(problems), generator=order_generator).tolist()
            chosen, progress.order = progress.order[:rollouts_per_step], progress.order[rollouts_per_step:]
            questions = [problems[i].question for i in chosen for _ in range(group_size)]  # B
            answers = [problems[i].answer for i in chosen for _ in range(group_size)]  # B

            # Rollout: G completions for each of Q questions, with the log-prob of every sampled token.
            console.phase("rollout")
            phase_started = time.perf_counter()
            prompts = [prompt_ids[i] for i in chosen]
            samples, at_once = roll_out(policy, prompts, group_size, at_once, generator=sample_generator, **sampling)
            completions = decode(tokenizer, samples)
            rollout_s = time.perf_counter() - phase_started

            # Score: verdict and reward-model score -> r_hat -> weighted reward; (B,) each.
            console.phase("score")
            phase_started = time.perf_counter()
            scores = score(
                verifier, reward_model, questions, answers, completions, group_size,
                min_rm=progress.min_rm, max_rm=progress.max_rm, rm_bounds=rm_bounds, alpha=alpha, beta=beta, eps=eps,
                reward_mode=reward_mode, reward_scorer=reward_scorer, w_min=w_min, w_max=w_max, k=k,
                sigma_bar=progress.sigma_bar,
            )  # fmt: skip
            advantages = compute_advantages(scores.rewards, group_size, advantage_scale)  # (B,)
            score_s = time.perf_counter() - phase_started
            verifier_metrics = parallel.sum_values(verifier.metrics())
            verifier_metrics["verifier/extracted_frac"] /= parallel.processes()  # each judges as many
            if step == 0 and reward_model is None:  # there was no warmup to see it in
                warn_of_unread_answers(verifier_metrics, completions, verifier_method)
            console.say_rollouts(questions, answers, scores, group_size, step)

            # Update: clipped policy-gradient steps over minibatches of train_batch_size completions. A signal up to here drops
            # the step and goes back to `resume_point`; from here on it waits for the step's end.
            stop.hold()
            console.phase("update")
            phase_started = time.perf_counter()
            step_lr = lr if lr_schedule == "constant" else lr * (1 - step / total_steps)
            for group in optimizer.param_groups:
                group["lr"] = step_lr
            ref_log_probs = None
            if reference is not None:
                with adapter.disable_adapter() if adapter else nullcontext():
                    of_reference = functools.partial(reference_log_probs, reference, samples, group_size, temperature)
                    ref_log_probs, micro_batch_size = fit_memory(of_reference, micro_batch_size)  # (B, T-1)
            reference_s = time.perf_counter() - phase_started
            metrics |= update(
                policy, master, optimizer, samples, advantages.to(run_device), ref_log_probs, group_size, order_generator,
                train_batch_size=train_batch_size, micro_batch_size=micro_batch_size, epochs_per_step=epochs_per_step,
                temperature=temperature, kl_weight=kl_weight, clip_eps=clip_eps, max_norm=max_norm,
                loss_normalizer=loss_normalizer, max_completion_length=max_new_tokens or max_length,
            )  # fmt: skip
            update_s = time.perf_counter() - phase_started  # includes reference_s
            micro_batch_size = int(metrics["policy/micro_batch_size"])  # lower where memory ran out
            if metrics["policy/updates"]:
                progress.skipped_in_a_row = 0
            else:
                progress.skipped_in_a_row += int(metrics["policy/skipped_updates"])

            # Report and save
            metrics |= reward_metrics(scores, advantages, group_size) | completion_metrics(samples, scores)
            count_failures(reward_model, progress)
            metrics |= {"reward/rm_min": progress.min_rm, "reward/rm_max": progress.max_rm}
            metrics |= {"reward/rm_failed": float(progress.rm_failed), "reward/rm_truncated": float(progress.rm_truncated)}
            metrics |= verifier_metrics | {"reward/sigma_bar": progress.sigma_bar.mean, "optim/lr": step_lr}
            metrics |= {"time/rollout_s": rollout_s, "time/score_s": score_s}
            metrics |= {"time/update_s": update_s, "time/reference_s": reference_s}
            metrics["time/step_s"] = time.perf_counter() - step_started
            metrics |= speed_metrics(policy, samples, group_size, epochs_per_step, reference is not None, metrics)
            run.metrics(step, metrics)
            rows = rollout_rows(step, questions, answers, completions, samples, scores, advantages)
            run.rollouts(rows)
            accelerator.log(metrics, step=step)
            if sample_interval and step % sample_interval == 0:
                console.say_samples(rows)
                log_completions(accelerator, rows, step)
            console.say_step(step, total_steps, metrics)
            console.advance(tokens_per_s=metrics["time/tokens_per_s"])
            progress.step = step + 1
            resume_point = checkpoints.snapshot(progress)
            give_up = progress.skipped_in_a_row >= max_skipped_updates
            if progress.step % checkpoint_interval == 0 or progress.step == total_steps or give_up:
                console.phase("save")
                saved = checkpoints.save(resume_point)
                if saved:
                    console.say(f"saved {saved}")
                if accelerator.is_main_process:
                    renew_report(run.folder)
            if give_up:
                raise TrainingError(
                    f"{progress.skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite; none was "
                    f"taken. Go on with --resume {run.folder} and a lower --lr, or with --dtype float32"
                )
        if adapter and accelerator.is_main_process:
            master.restore(policy)  # adapter and base in float32, to be rounded once, after they are added
            console.say(f"saved {save_model(run.folder / 'merged', adapter.merge_and_unload(), tokenizer)}")
        if accelerator.is_main_process and not checkpoints.has(total_steps):
            raise TrainingError(f"the last step is not saved; make room, then go on from {run.folder} with --resume")
    except Stopped:
        print(f"stopped after {resume_point.step} steps; go on with --resume {run.folder}", flush=True)
        if not checkpoints.has(resume_point.step):
            checkpoints.save(resume_point)
        raise
    finally:
        console.stop()
        stop.close()
        verifier.close()
        run.close()
        accelerator.end_training()
    minutes = (time.perf_counter() - started) / 60
    if accelerator.is_main_process:
        renew_report(run.folder)  # with the last evaluation
        console.say_summary(run.folder)
    accuracies = [f"{100 * accuracy:.1f} %" for accuracy in progress.accuracies]
    change = f"; held-out accuracy {accuracies[0]} -> {accuracies[-1]}" if accuracies else ""
    last = f", the last {total_steps - first_step}" if 0 < first_step < total_steps else ""
    print(f"done: {total_steps} steps{last} in {minutes:.1f} minutes on {run_device.type}{change}; see {run.folder}", flush=True)
    return run.folder


# ----------------------------------------------------------------------------------------------------------------------
# Rollout and score


def warn_of_unread_answers(verifier_metrics: dict[str, float], completions: list[str], method: str) -> None:
    """Say so where the verifier found no final answer in any completion: it would call all of them wrong."""
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
    """Judge and score B completions; takes this step's sigma_u into the mean `sigma_bar`, then weights by the new mean.

    sigma_u is the std (n - 1) of the group's scores after they are held within the bounds, in units of the reward model.
    A completion that the reward model fails on gets a neutral score, halfway between the bounds. One that the verifier fails on
    gets the mean reward of its group, and so no advantage. Several processes judge and score the completions of a part of the
    questions each.
    """
    groups = parallel.share(len(completions) // group_size)
    mine = slice(groups.start * group_size, groups.stop * group_size)
    verdicts = parallel.gather(verifier.verify_batch(questions[mine], completions[mine], answers[mine]))
    rule_rewards = torch.tensor([float(v["correct"]) for v in verdicts])
    rm_scores = torch.zeros(len(completions))
    if reward_model is not None:
        rm_scores = torch.tensor(parallel.gather(reward_model.score_texts(questions[mine], completions[mine]).tolist()))
    parts = hybrid_rewards(
        rule_rewards, rm_scores, group_size, min_rm=min_rm, max_rm=max_rm, rm_bounds=rm_bounds, alpha=alpha, beta=beta, eps=eps,
        reward_mode=reward_mode, reward_scorer=reward_scorer, w_min=w_min, w_max=w_max, k=k, sigma_bar=sigma_bar,
    )  # fmt: skip
    judged = torch.tensor(["error" not in v for v in verdicts])
    parts = parts._replace(rewards=neutral_where_unjudged(parts.rewards, judged, group_size))
    return Scores(verdicts, rule_rewards, *parts)


def count_failures(reward_model: AceRewardModel | None, progress: Progress) -> None:
    """Take what the reward model has counted in all processes into the run's own counts."""
    if reward_model:
        counts = parallel.sum_values({"failed": reward_model.failed, "truncated": reward_model.truncated})
        progress.rm_failed += counts["failed"]
        progress.rm_truncated += counts["truncated"]
        reward_model.failed = reward_model.truncated = 0


def neutral_where_unjudged(rewards: torch.Tensor, judged: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards (B,) in which a completion without a verdict has the mean of the judged ones of its group; 0 if none was."""
    if judged.all():
        return rewards
    groups, judged = rewards.view(-1, group_size), judged.view(-1, group_size)  # (Q, G)
    mean = (groups * judged).sum(dim=1, keepdim=True) / judged.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(judged, groups, mean).flatten()


# ----------------------------------------------------------------------------------------------------------------------
# Update


def update(
    policy: PreTrainedModel, master: MasterWeights, optimizer: torch.optim.Optimizer, samples: Samples,
    advantages: torch.Tensor, ref_log_probs: torch.Tensor | None, group_size: int, generator: torch.Generator, *,
    train_batch_size: int, micro_batch_size: int, epochs_per_step: int, temperature: float, kl_weight: float, clip_eps: float,
    max_norm: float, loss_normalizer: str, max_completion_length: int,
) -> dict[str, float]:  # fmt: skip
    """Take the optimizer steps of one GRPO step.

    Questions are shuffled, their completions stay side by side, and each `train_batch_size` of them make one optimizer
    step. Where there is no KL term, completions without an advantage have no gradient and cost no compute.

    Where memory runs out, the optimizer step is computed again with half of `micro_batch_size`. Where its loss or gradient is
    not finite it is left out, and the weights stay as they are. Several processes compute a part of each optimizer step each.

    Args:
        advantages: (B,) float32, the completions of a question side by side.
        ref_log_probs: (B, T-1) float32 of the reference, or None without a KL term.
        generator: Shuffles the questions.

    Returns:
        The policy/... metrics: loss and grad_norm are means over the optimizer steps that were taken, kl and clip_frac over
        their tokens.
    """
    totals = dict.fromkeys(("loss", "kl", "clipped", "gap", "gap_tokens"), 0.0)
    tokens, grad_norms, moved, failed = 0, [], 0.0, set()
    for _ in range(epochs_per_step):
        questions = torch.randperm(len(advantages) // group_size, generator=generator)
        order = (questions[:, None] * group_size + torch.arange(group_size)).flatten()  # (B,)
        for batch in order.split(train_batch_size):
            weights = torch.zeros_like(samples.log_probs)  # (B, T-1), of each token in the loss of this optimizer step
            weights[batch] = token_weights(samples.action_mask[batch], loss_normalizer, max_completion_length)
            if ref_log_probs is None:  # those without an advantage have no gradient; they stay in the mean above
                batch = batch[(advantages[batch] != 0).cpu()]
            if len(batch) == 0:
                continue
            compute = functools.partial(
                accumulate_gradients, policy, master, samples, ref_log_probs, advantages, weights,
                batch[parallel.share(len(batch))], group_size, temperature, kl_weight, clip_eps,
            )  # fmt: skip
            (sums, not_finite), micro_batch_size = fit_memory(compute, micro_batch_size)
            parallel.sum_gradients(master.parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(master.parameters, max_norm).item()
            not_finite = parallel.gather(not_finite)
            grad_norms.append(math.nan if not_finite else grad_norm)
            if math.isfinite(grad_norms[-1]):
                is_first = not any(map(math.isfinite, grad_norms[:-1]))
                values = master.sample_values() if is_first else []
                optimizer.step()
                master.write_back()
                moved = share_moved(values, master.sample_values()) if is_first else moved
                tokens += int(weights.count_nonzero())
                for name in sums:  # before the first optimizer step sampler and trainer have the same weights, later no longer
                    totals[name] += sums[name] if is_first or not name.startswith("gap") else 0.0
            else:
                failed |= set(not_finite or batch.tolist())
            master.release_gradients()
    warn_of_skipped_updates(grad_norms, failed)
    metrics = {"policy/moved_frac": moved, "policy/micro_batch_size": float(micro_batch_size)}
    return metrics | update_metrics(parallel.sum_values(totals), tokens, grad_norms, samples)


def warn_of_skipped_updates(grad_norms: list[float], failed: set[int]) -> None:
    """Name the completions whose loss was not finite; where only the gradient was, all of their optimizer step."""
    skipped = sum(not math.isfinite(g) for g in grad_norms)
    if skipped:
        print(
            f"warning: loss or gradient of {skipped} updates was not finite; they are skipped. They had "
            f"the step's completions {', '.join(map(str, sorted(failed)))} (0 is its first in rollouts.jsonl)",
            flush=True,
        )


def update_metrics(totals: dict[str, float], tokens: int, grad_norms: list[float], samples: Samples) -> dict[str, float]:
    """loss and grad_norm: means over the optimizer steps taken; kl and clip_frac: over their tokens; sampler_gap: over those of
    the first of them; entropy: over all that were sampled.
    """
    finite = [g for g in grad_norms if math.isfinite(g)]
    return {
        "policy/loss": totals["loss"] / max(len(finite), 1),
        "policy/kl": totals["kl"] / max(tokens, 1),
        "policy/clip_frac": totals["clipped"] / max(tokens, 1),
        "policy/grad_norm": sum(finite) / max(len(finite), 1),
        "policy/updates": float(len(finite)),
        "policy/skipped_updates": float(len(grad_norms) - len(finite)),
        "policy/sampler_gap": totals["gap"] / max(totals["gap_tokens"], 1.0),
        # At top_p 1, -log p of a sampled token is an unbiased estimate of the entropy of its distribution.
        "policy/entropy": -samples.log_probs.sum().item() / samples.action_mask.sum().item(),
    }


def accumulate_gradients(
    policy: PreTrainedModel,
    master: MasterWeights,
    samples: Samples,
    ref_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    group_size: int,
    temperature: float,
    kl_weight: float,
    clip_eps: float,
    micro_batch_size: int,
) -> tuple[dict[str, float], list[int]]:
    """Put the gradient of the loss of some completions into the master weights, in passes of `micro_batch_size`.

    Args:
        weights: (B, T-1), of each token in the loss.
        rows: (n,), of the batch of B.

    Returns:
        Sums over their tokens for the metrics, and the rows whose loss is not finite.
    """
    sums = dict.fromkeys(("loss", "kl", "clipped", "gap", "gap_tokens"), 0.0)
    not_finite: list[int] = []
    master.release_gradients()  # of an attempt for which there was no memory
    for part in micro_batches(policy, samples.attention_mask, samples.action_mask, rows, group_size, micro_batch_size):
        at, n = part.rows, part.width
        mask, old = samples.action_mask[at, :n], samples.log_probs[at, :n]  # (b, t-1)
        log_probs = completion_log_probs(policy, samples.sequence_ids, samples.action_mask, part, temperature)  # (b, t-1)
        losses, clipped = policy_loss(log_probs, old, advantages[at], mask, clip_eps)
        if ref_log_probs is not None:
            kl = torch.where(mask, kl_estimate(log_probs, ref_log_probs[at, :n]), 0.0)
            losses = losses + kl_weight * kl
            sums["kl"] += kl.sum().item()
        loss = (losses * weights[at, :n]).sum()
        loss.backward()
        master.accumulate_gradients()
        sums["loss"] += loss.item()
        sums["clipped"] += clipped.sum().item()
        sums["gap"] += torch.where(mask, log_probs.detach() - old, 0.0).abs().sum().item()
        sums["gap_tokens"] += mask.sum().item()
        if not math.isfinite(loss.item()):
            not_finite += at[(~losses.isfinite()).any(dim=1).cpu()].tolist()
    return sums, not_finite


@torch.no_grad()
def reference_log_probs(
    reference: PreTrainedModel, samples: Samples, group_size: int, temperature: float, micro_batch_size: int
) -> torch.Tensor:
    """Log-probs (B, T-1) of the samples under the frozen reference, in larger passes: nothing is kept for a gradient."""
    log_probs = torch.zeros_like(samples.log_probs)
    mine = torch.arange(len(log_probs)).view(-1, group_size)[parallel.share(len(log_probs) // group_size)].flatten()
    for part in micro_batches(reference, samples.attention_mask, samples.action_mask, mine, group_size, 4 * micro_batch_size):
        of_part = completion_log_probs(reference, samples.sequence_ids, samples.action_mask, part, temperature)
        log_probs[part.rows, : part.width] = of_part
    return parallel.add_up(log_probs)


def share_moved(before: list[tuple[torch.Tensor, torch.Tensor]], after: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of some of the weights, the share of those with a gradient that an optimizer step changed."""
    moved = with_gradient = 0
    for (old, gradient), (new, _) in zip(before, after, strict=True):
        with_gradient += int((gradient != 0).sum())
        moved += int(((gradient != 0) & (old != new)).sum())
    return moved / max(with_gradient, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Set up


def check_resumed(
    had: Progress, has: Progress, changed: dict[str, list], other_problems: bool, total_steps: int, resume: str
) -> None:
    """Refuse to go on with other models or another number of problems than before, unless they are named anew.

    What the data files hold has been compared by then, see `src/resume.py`.

    Args:
        had: From the checkpoint.
        has: As the run would begin now.
        changed: Hyperparameters that are not as before.
        other_problems: Whether the data is another than before, and was named.
        total_steps: Of the run as it is to be.
        resume: The flag's value.

    Raises:
        InputError: Something differs.
    """
    if total_steps < had.step:
        raise InputError(
            f"--resume {resume}: the run has done {had.step} steps and is to have {total_steps}; raise --max-steps or --epochs"
        )
    if had.model != has.model and "model_name" not in changed:
        raise InputError(f"--resume {resume}: the model has changed since the run began; put the old one back")
    if had.problems != has.problems and not other_problems:  # of the hub: a file's content has been compared
        raise InputError(
            f"--resume {resume}: the data set has {has.problems} problems and had {had.problems}; save the old ones to a file "
            "and name it with --data"
        )
    if had.reward_model != has.reward_model and not {"reward_model_name", "reward_mode"} & set(changed):
        raise InputError(
            f"--resume {resume}: the run had the reward model {had.reward_model or 'none'} and would go on with "
            f"{has.reward_model or 'none'}; see above why, or name another with --reward-model-name"
        )


def load_skeleton(model_name: str, flag: str, dtype: torch.dtype, max_length: int) -> PreTrainedModel:
    """The policy without its weights.

    Raises:
        InputError: It cannot be found, or has fewer positions than `max_length`.
    """
    base = models.base_of(models.resolve(model_name, flag), flag)
    skeleton = models.skeleton(base, AutoModelForCausalLM, dtype, f"{flag} {model_name}")
    positions = getattr(skeleton.config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise InputError(f"--max-length {max_length}: must be at most the {positions} positions of {model_name}")
    return skeleton


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
    plan = choice.added_to(plan)
    eight_bit = choice.weights / 2 if choice.name not in (None, models.EMBEDDED) and not choice.load_in_8bit else 0.0

    def with_lora() -> ModelSize:
        models.add_lora(skeleton, 16)
        return measure(skeleton)

    check_fits(plan, free, with_lora, eight_bit)
    return choice


def load_reward_model(choice: RewardModelChoice) -> AceRewardModel | None:
    """The reward model, or None for a run on the verifier alone; one line says which and why."""
    if choice.failed:
        print(f"warning: no reward model, the verifier alone decides: {choice.why}", flush=True)
        return None
    if choice.name is None:
        console.say(f"reward model: none, the verifier alone decides ({choice.why})")
        return None
    try:
        reward_model = choice.load()
    except (InputError, RuntimeError) as error:  # no memory for it, above all
        print(f"warning: no reward model, the verifier alone decides: {error}", flush=True)
        return None
    console.say(f"reward model: {choice.name} on {choice.where()} ({choice.why})")
    return reward_model


# ----------------------------------------------------------------------------------------------------------------------
# Evaluate and print


def evaluate_only(
    folder: Path,
    settings: dict,
    problems: list[Problem],
    verifier: MathVerifier,
    device: torch.device,
    dtype: torch.dtype,
    *,
    model_name: str,
    eval_against: str | None,
    n: int,
    batch_size: int,
    seed: int,
    max_length: int,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    system_prompt: str | None,
) -> Path:
    """Answer held-out problems with one model, or two, greedily and `n` times at random; print and write how many are right.

    Args:
        folder: From `choose_folder`; made here.
        settings: The resolved hyperparameters, for evaluation.json.

    Returns:
        The folder.
    """
    if parallel.processes() > 1:
        raise InputError("--eval-only: evaluates in one process; start it with python train.py")
    ready = []
    against = [("--eval-against", eval_against)] if eval_against else []
    for flag, name in [("--model-name", model_name), *against]:
        load_skeleton(name, flag, dtype, max_length)
        tokenizer = models.load_tokenizer(name, flag)
        ready.append((flag, name, tokenizer, encode_prompts(tokenizer, problems, system_prompt, max_length)))
    evaluated: list[Evaluated] = []
    console.start(len(problems) * (1 + n) * len(ready), "completion")
    try:
        for flag, name, tokenizer, prompt_ids in ready:
            at_random = f" and {n} times at temperature {temperature}" if n else ""
            console.say(f"Evaluating {name}: {len(problems)} questions, greedily{at_random}")
            policy = models.load_policy(name, device, flag).requires_grad_(False)
            MasterWeights(policy, dtype)  # rounds it as training does; there is nothing to train
            stop_ids = models.stop_token_ids(policy, tokenizer)
            evaluated.append(
                evaluate_policy(
                    name, policy, tokenizer, verifier, *texts_of(problems), prompt_ids, n, batch_size, seed,
                    temperature=temperature, top_p=top_p, max_length=max_length, max_new_tokens=max_new_tokens,
                    stop_ids=stop_ids, pad_id=stop_ids[0],
                )
            )  # fmt: skip
            del policy  # before the next one loads
    finally:
        console.stop()
        verifier.close()
    folder.mkdir(parents=True, exist_ok=True)
    report_evaluation(folder, settings, *texts_of(problems), evaluated)
    print(f"done: see {folder}", flush=True)
    return folder


def cli() -> None:
    """main() as a command line: the parameters are the flags, and what the user can mend is said without a stack trace.

    Exits with status 2 where input cannot work, 1 where training cannot go on, 130 after Ctrl-C and 143 after SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no reason to stop
    sys.stdout = PatientStream(sys.stdout)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # before training, where nothing is to be saved
    settings = tyro.cli(functools.wraps(main)(lambda **settings: settings))
    defaults = {name: p.default for name, p in inspect.signature(main).parameters.items()}
    named = named_flags(main, sys.argv[1:])
    try:
        main(**{name: value for name, value in settings.items() if name in named or value != defaults[name]})
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt as interrupt:
        print("interrupted; the checkpoints written so far are whole", file=sys.stderr)
        sys.exit(interrupt.exit_status if isinstance(interrupt, Stopped) else 130)


if __name__ == "__main__":
    cli()
