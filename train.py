"""Train a small chat model to do math with GRPO and a hybrid reward: a verifier and a reward model.

    python train.py                                  TinyLlama-1.1B-Chat with AceMath-7B-RM if a GPU has room
    python train.py --model-name embedded            SmolLM2-135M-Instruct, bundled: no GPU, no hub
    python train.py --reward-scorer tanh             the experimental weight
    python train.py --resume output/RUN              continue a run that was stopped
    python train.py --help                           every hyperparameter; they are the parameters of main()

One step samples G completions for each of Q questions, judges and scores them, centers each reward on its
group's mean, and takes clipped policy-gradient steps on all sampled tokens. In the code's own names:

    n          = (score - min_rm) / (max_rm - min_rm + eps)   score: from the reward model, clamped to bounds
    r_hat      = 1 - beta + 2 beta n   for a right answer     hybrid_rewards
               = -alpha + 2 alpha n    for any other answer
    w          = w_min + (w_max - w_min) sigmoid(k (sigma_u - sigma_bar))      --reward-scorer sigmoid
               = w_min + (w_max - w_min) tanh(r_hat^3)                         --reward-scorer tanh
                 sigma_u: std of the clamped scores in the question's group
                 sigma_bar: mean of all sigma_u up to and including this step
    advantage  = (w r_hat - mean of its group) / std of all B rewards   compute_advantages
    ratio      = exp(log_prob - log_prob at sampling time)
    kl         = exp(ref - log_prob) - (ref - log_prob) - 1             kl_estimate
    loss       = mean over the tokens of an optimizer step of           policy_loss, token_weights
                 -min(ratio advantage, clip(ratio, 1 - clip_eps, 1 + clip_eps) advantage) + kl_weight kl

Departures from the GRPO paper (arXiv:2402.03300):

1. The reward is HERO's (arXiv:2510.07242): the verdict selects a band, the reward model's score selects the
   position within the band, and the sigmoid weight makes difficult questions count more. Unlike in HERO, the
   bounds come from the warmup (HERO's own bounds are --rm-bounds group).
2. Centered rewards are divided by the std of all B rewards of the step. The paper divides by the group's own
   std (--advantage-scale group), which amplifies reward-model noise in all-right and all-wrong groups.
3. Every token of an optimizer step has the same weight (the paper's rule is --loss-normalizer sequence).
4. The old log-probs are the sampler's, and training applies the sampling temperature too. Stop tokens are
   actions. Truncated completions are trained on; few contain an answer, so the policy learns to finish.
5. The optimizer updates float32 weights. The model computes with a copy of them in --dtype.
"""

import src  # noqa: F401  # isort: skip (sets what OpenMP reads when torch loads)
import io
import math
import signal
import sys
import time
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src import console, console_lines, metrics, models, parallel, placement, threads
from src.engine.logprobs import REFERENCE_PASS, completion_log_probs, micro_batches
from src.engine.master_weights import MasterWeights
from src.engine.memory import BatchSize
from src.engine.rollout import roll_out
from src.engine.sampler import Samples, Sampling, decode, sample
from src.engine.self_check import check_model
from src.errors import InputError, TrainingError
from src.evaluation import evaluate, evaluate_only
from src.grpo import UpdateSettings, compute_advantages, kl_estimate, policy_loss, token_weights
from src.hybrid_reward import Calibration, RewardSettings, hybrid_rewards
from src.hyperparameters import check_hyperparameters, resumable, select
from src.math_verifier import MathVerifier
from src.problems import Problem, load_problems, with_prompts
from src.report.page import renew_report
from src.reward_model import AceRewardModel
from src.run.checkpoint import Progress, TrainingState, save_model
from src.run.resume import defaults_of, locate_run, named_flags, open_run, say_settings
from src.run.signals import Stopped, StopSignals
from src.run.stdout import PatientStream
from src.run.trackers import log_completions, start_trackers

# Per step: Q questions, G completions of each, B = Q x G completions; the longest sequence has T tokens.


@resumable
def main(
    # Model
    model_name: str = "auto",
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
    """Train a chat model to do math with GRPO and a hybrid reward.

    Args:
        model_name: Hugging Face name, local folder, embedded (bundled), or auto: TinyLlama if a GPU has room.
        reward_model_name: The same, or none; auto: embedded with it, else AceMath-7B-RM if a GPU has room.
        reward_model_device: cuda, offload (on the GPU only while scoring), cpu, or auto: the first that fits.
        reward_model_8bit: Load the reward model in int8, in half the memory of bfloat16. Needs bitsandbytes.
        device: Where to compute; auto uses the first available of cuda, mps and cpu.
        dtype: Compute dtype; auto means bfloat16 if the hardware supports it. Trained weights are float32.
        lora_rank: Rank of the LoRA adapter to train (use about ten times the lr); 0 trains all weights.
        data: Training problems: a JSONL file of {"question", "answer"} records, or hf:NAME[:CONFIG[:SPLIT]].
        epochs: Passes over the problems, reshuffled each time; leftovers too few for a step are skipped.
        max_steps: Stop after this many steps, unless the epochs end first.
        lr: Learning rate of AdamW.
        lr_schedule: constant, or linear: decays from lr in the first step to 0 just after the last.
        weight_decay: Decoupled weight decay of AdamW.
        train_batch_size: Completions per optimizer step; must divide rollouts_per_step x group_size.
        micro_batch_size: Completions per forward and backward pass; changes memory and speed, not the result.
        gradient_checkpointing: Recompute each layer in the backward pass, which saves memory and costs time.
        epochs_per_step: Optimizer passes over the completions of each step.
        kl_weight: Weight of the KL divergence to the initial model; with 0, there is no reference model.
        clip_eps: The policy ratio is clipped to the interval from 1 - clip_eps to 1 + clip_eps.
        max_norm: Maximum gradient norm; larger gradients are scaled down to it.
        max_skipped_updates: Save and stop after N skipped updates in a row of steps that took none.
        advantage_scale: Divide centered rewards by the batch's std, by the group's (GRPO), or not (Dr. GRPO).
        loss_normalizer: Mean loss over tokens (DAPO), sequences (GRPO), or a constant length (Dr. GRPO).
        seed: Seeds everything random: the order of the problems, the samples and the order of updates.
        rollouts_per_step: Questions per step.
        group_size: Completions per question, at least 2.
        max_length: Maximum number of tokens in a prompt and its completion together.
        max_new_tokens: Maximum number of tokens in a completion; by default only max_length limits it.
        temperature: Sampling temperature, above 0; training applies it to its log-probs too.
        top_p: Sample from the smallest set of tokens whose total probability reaches this value.
        system_prompt: System message before each question; by default the chat template's own.
        reward_mode: hybrid, or unweighted: verifier (1 = right, 0 = wrong) or rm (normalized score).
        reward_scorer: Weight by the question's difficulty (sigmoid, HERO) or by r_hat (tanh, experimental).
        rm_bounds: Bounds of the scores: from the warmup, or separate for each group and verdict (HERO).
        verifier_method: strict reads only marked answers (<answer>, \\boxed{}, ####); flexible, all text.
        alpha: Half-width of the band of wrong answers.
        beta: Half-width of the band of right answers.
        eps: Keeps the normalized score finite if the bounds are equal.
        w_min: Lower limit of the sigmoid weight. The tanh weight is w_min at r_hat = 0, and less below 0.
        w_max: Upper limit of the weight.
        k: Slope of the sigmoid weight, per unit of reward-model score.
        warmup_samples: Completions that set the bounds of the reward model's scores before training.
        output: Folder that contains all runs.
        run_name: Name of this run's folder in output; by default the date and time.
        checkpoint_interval: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: How many checkpoints to keep; 0 = all. Only the newest two can be resumed from.
        resume: A run's folder, or a step_<k> in it. Other flags replace settings in the run's config.json.
        eval_data: Held-out problems, in the format of data, answered greedily before training and at the end.
        eval_interval: Also evaluate every N steps; 0 = only before the first and after the last.
        eval_only: Evaluate model_name on eval_data, without training.
        eval_samples: Sampled completions per question, for eval_only's estimate of pass@k; 0 = only greedy.
        eval_against: A second model for eval_only to compare with model_name, question by question.
        tracker: Log to wandb (WANDB_MODE=offline needs no account), tensorboard, trackio, or several of them.
        wandb_project: Project in W&B or trackio, by default hybrid-grpo; setting it adds wandb to tracker.
        sample_interval: Every N steps, print three of the completions and log all of them to W&B; 0 = never.
        quiet: Print only warnings and the result.

    Returns:
        The run's folder; the README lists its files.

    Raises:
        InputError: A setting or input is invalid; raised before any training.
        TrainingError: Training cannot continue.
        Stopped: SIGTERM or Ctrl-C stopped the run, which is saved. A subclass of KeyboardInterrupt.
    """
    args = SimpleNamespace(**locals())
    console.configure(quiet)
    check_hyperparameters(args)
    verifier = MathVerifier(verifier_method)
    problems, eval_problems = load_problems(args, verifier)
    accelerator, args.model_name = placement.start(args)
    run_device, compute_dtype = accelerator.device, models.pick_dtype(accelerator.device, dtype)
    folder, checkpoint = locate_run(args)
    if eval_only:
        return evaluate_only(args, folder, eval_problems, verifier, run_device, compute_dtype)

    # The models: policy with float32 master weights, frozen reference, reward model
    tokenizer = models.load_tokenizer(args.model_name)
    problems = with_prompts(problems, tokenizer, system_prompt, max_length)
    eval_problems = with_prompts(eval_problems, tokenizer, system_prompt, max_length)
    reward_choice, memory = placement.plan(args, problems, run_device, compute_dtype)
    policy, adapter, policy_id = models.load_trainable(args.model_name, run_device, compute_dtype, lora_rank)
    master = MasterWeights(policy, compute_dtype, memory.moves)
    check_model(policy, [problem.prompt_ids for problem in problems + eval_problems], args)
    reference = models.make_reference(policy, adapter, "reference" in memory.moves) if kl_weight > 0 else None
    if memory.gradient_checkpointing:
        models.checkpoint_activations(policy)
    optimizer = torch.optim.AdamW(master.parameters, lr=lr, weight_decay=weight_decay, fused=True)
    reward_model = placement.load_reward_model(reward_choice, reward_mode)

    # How to sample, reward and update, and how many completions at a time
    sampling = select(Sampling, args, stop_ids=models.stop_token_ids(policy, tokenizer))
    reward_settings, update_settings = select(RewardSettings, args), select(UpdateSettings, args)
    batch_size = BatchSize(rollouts_per_step * group_size)
    micro_batch, reference_batch = BatchSize(micro_batch_size), BatchSize(micro_batch_size)

    # The run: its files, and its progress, which is new or from a checkpoint
    total_steps = min(epochs * (len(problems) // rollouts_per_step), max_steps or sys.maxsize)
    order_generator, sample_generator = (torch.Generator(d).manual_seed(seed) for d in ("cpu", run_device))
    generators = {"order": order_generator, "sample": sample_generator}
    state = TrainingState(adapter or policy, tokenizer, master, optimizer, generators)
    fresh = Progress.start(problems, policy_id, reward_choice.name if reward_model else None)
    resolved = dict(run_device=str(run_device), compute_dtype=str(compute_dtype), total_steps=total_steps)
    log, checkpoints, progress = open_run(args, resolved, folder, checkpoint, state, fresh)
    progress.wandb_id = start_trackers(accelerator, args, log.folder, progress.step, progress.wandb_id)
    say_settings(main, args, log.folder, len(problems))
    calibration = progress.calibration = progress.calibration or warmup(
        args, policy, tokenizer, verifier, reward_model, problems, sampling, progress
    )
    console_lines.say_start(args, calibration, total_steps)
    resume_point = checkpoints.snapshot(progress)  # the state between two steps, which a signal saves
    stop, started, first_step = StopSignals(), time.perf_counter(), progress.step
    console.start(total_steps, "step", first_step)
    try:
        for step in range(first_step, total_steps + 1):
            stop.begin_step()
            logged: dict[str, float] = {}  # this step's metrics

            # Held-out accuracy after `step` steps: before the first, at each interval, after the last.
            if eval_problems and (step in (0, total_steps) or (eval_interval and step % eval_interval == 0)):
                logged |= evaluate(policy, tokenizer, verifier, eval_problems, sampling, batch_size)
                progress.accuracies.append(logged["eval/accuracy"])
                console_lines.say_accuracy(step, logged, len(eval_problems))
            if step == total_steps:
                stop.hold()
                if logged:
                    log.metrics(step, logged)
                    accelerator.log(logged, step=step)
                break

            # The next Q problems in a random order, which is redrawn when fewer than Q are left.
            step_started, waited_before = time.perf_counter(), threads.waited()
            if len(progress.order) < rollouts_per_step:
                progress.order = torch.randperm(len(problems), generator=order_generator).tolist()
            chosen = [problems[i] for i in progress.order[:rollouts_per_step]]  # Q
            progress.order = progress.order[rollouts_per_step:]

            # Rollout: G completions of each problem, with the log-prob of every sampled token.
            with metrics.timed("rollout", logged):
                prompts = [list(problem.prompt_ids) for problem in chosen]  # Q lists of token ids
                samples = roll_out(
                    policy, prompts, group_size, sampling, sample_generator, batch_size, memory.frees_cache
                )
                completions = decode(tokenizer, samples)  # B texts

            # Score: verdict and reward-model score -> r_hat -> weighted reward -> advantage, (B,) each.
            with metrics.timed("score", logged):
                scores = score(verifier, reward_model, chosen, completions, reward_settings, calibration)
                advantages = compute_advantages(scores.rewards, group_size, advantage_scale)  # (B,)
            logged |= metrics.verifier_metrics(verifier) | metrics.failure_metrics(reward_model, progress)
            if step == 0 and reward_model is None:  # with a reward model, the warmup checks this
                console_lines.warn_if_unread(logged, completions, verifier_method)
            console_lines.say_rollouts(chosen, scores, step)

            # Update: clipped policy-gradient steps. From here on, a signal takes effect after the step.
            stop.hold()
            logged["optim/lr"] = lr if lr_schedule == "constant" else lr * (1 - step / total_steps)
            for group in optimizer.param_groups:
                group["lr"] = logged["optim/lr"]
            with metrics.timed("update", logged):
                with metrics.timed("reference", logged):
                    given = (samples, temperature, reference_batch)
                    ref_log_probs = reference_log_probs(reference, *given) if reference else None  # (B, T-1)
                with master.on_device(optimizer):
                    updates = update(
                        policy, state, samples, advantages, ref_log_probs, update_settings, micro_batch
                    )
            progress.skipped_in_a_row = 0 if updates.taken else progress.skipped_in_a_row + updates.skipped

            # Record: every metric, and every completion with each part of its reward.
            logged |= updates.metrics(samples) | metrics.reward_metrics(scores, advantages, group_size)
            logged |= metrics.completion_metrics(samples, scores) | metrics.calibration_metrics(calibration)
            logged["policy/micro_batch_size"] = float(micro_batch.size)
            logged["time/step_s"] = time.perf_counter() - step_started
            logged["time/cpu_wait_frac"] = threads.waited_share(waited_before, logged["time/step_s"])
            logged |= metrics.speed_metrics(policy, samples, epochs_per_step, reference is not None, logged)
            rows = metrics.rollout_rows(step, chosen, completions, samples, scores, advantages)  # B
            log.metrics(step, logged)
            log.rollouts(rows)
            accelerator.log(logged, step=step)
            if sample_interval and step % sample_interval == 0:
                console_lines.say_samples(rows)
                log_completions(accelerator, rows, step)
            console_lines.say_step(step, total_steps, logged)
            console_lines.warn_if_crowded(step, logged)
            console_lines.warn_if_gap(step, logged, str(compute_dtype).removeprefix("torch."))
            console.advance(tokens_per_s=logged["time/tokens_per_s"])

            # Save
            progress.step = step + 1
            resume_point = checkpoints.snapshot(progress)
            give_up = progress.skipped_in_a_row >= max_skipped_updates
            if progress.step % checkpoint_interval == 0 or progress.step == total_steps or give_up:
                with console.phase("save"):
                    checkpoints.save(resume_point)
                    if log.writes:
                        renew_report(log.folder)
            if give_up:
                raise TrainingError(
                    f"{progress.skipped_in_a_row} optimizer steps had a non-finite loss or gradient. "
                    f"Continue with --resume {log.folder} and a lower --lr, or with --dtype float32"
                )
        if adapter and log.writes:
            master.restore(policy)  # adapter and base in float32, so merging rounds only once
            with console.phase("save"):
                save_model(log.folder / "merged", adapter.merge_and_unload(), tokenizer)
        if log.writes and not checkpoints.has(total_steps):
            raise TrainingError(
                f"the last step is not saved; free some disk space and continue with --resume {log.folder}"
            )
    except Stopped:
        print(f"stopped after {resume_point.step} steps; continue with --resume {log.folder}", flush=True)
        if not checkpoints.has(resume_point.step):
            checkpoints.save(resume_point)
        raise
    finally:
        console.stop()
        stop.close()
        verifier.close()
        log.close()
        accelerator.end_training()
    minutes = (time.perf_counter() - started) / 60
    if log.writes:
        with console.phase("report"):
            renew_report(log.folder)  # includes the last evaluation
        console_lines.say_summary(log.folder)
    console_lines.say_done(progress, first_step, minutes, run_device, log.folder)
    return log.folder


# ----------------------------------------------------------------------------------------------------------
# Warmup and score


@console.phase("warmup")
def warmup(
    args: SimpleNamespace,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    reward_model: AceRewardModel | None,
    problems: list[Problem],
    sampling: Sampling,
    progress: Progress,
) -> Calibration:
    """Sample and score a few completions; their lowest and highest scores become the bounds.

    Without a reward model, every score and both bounds are 0, so r_hat is -alpha or 1 - beta.

    Args:
        args: main()'s parameters.
        progress: The warmup's failed and truncated responses are added to its counts.
    """
    console.say("Running warmup to determine reward model bounds...")
    if reward_model is None:
        return Calibration()
    generator = torch.Generator(policy.device).manual_seed(args.seed + 1)
    chosen = [problems[i % len(problems)] for i in range(args.warmup_samples)]
    samples = sample(policy, [list(problem.prompt_ids) for problem in chosen], 1, sampling, generator)
    completions, questions = decode(tokenizer, samples), [problem.question for problem in chosen]
    # Judged only for the verifier's counts, which are checked next; the verdicts are not used.
    verifier.verify_batch(questions, completions, [problem.answer for problem in chosen])
    console_lines.warn_if_unread(verifier.metrics(), completions, verifier.method)
    scores = reward_model.score_texts(questions, completions)
    scores = scores[scores.isfinite()]  # drops failed scores
    if not len(scores):
        console.warn("the reward model failed on every warmup completion, so both bounds are 0")
    bounds = (scores.min().item(), scores.max().item()) if len(scores) else (0.0, 0.0)
    if parallel.rank() > 0:  # all processes score the same completions, so only rank 0 counts failures
        reward_model.failed = reward_model.truncated = 0
    metrics.failure_metrics(reward_model, progress)
    return Calibration(*parallel.from_first(lambda: bounds))


def score(
    verifier: MathVerifier,
    reward_model: AceRewardModel | None,
    problems: list[Problem],
    completions: list[str],
    settings: RewardSettings,
    calibration: Calibration,
) -> metrics.Scores:
    """Judge and score the B completions of Q problems, and turn verdicts and scores into rewards.

    A completion that the reward model fails to score gets a neutral score, halfway between the bounds. A
    completion that the verifier fails to judge gets the mean reward of its group's judged completions, so it
    has no advantage. With several processes, each one judges and scores the completions of some problems.

    Args:
        problems: Q problems.
        completions: B = Q x G texts, sorted by problem, G for each.
        calibration: Bounds of the scores, and sigma_bar, which is updated with this step's sigma_u.
    """
    group_size = len(completions) // len(problems)
    mine = parallel.share(len(problems))
    texts = completions[mine.start * group_size : mine.stop * group_size]
    questions = [problem.question for problem in problems[mine] for _ in range(group_size)]
    answers = [problem.answer for problem in problems[mine] for _ in range(group_size)]
    verdicts = parallel.gather(verifier.verify_batch(questions, texts, answers))  # B
    rule_rewards = torch.tensor([float(verdict["correct"]) for verdict in verdicts])  # (B,)
    rm_scores = torch.zeros(len(completions))  # (B,)
    if reward_model is not None:
        rm_scores = torch.tensor(parallel.gather(reward_model.score_texts(questions, texts).tolist()))
    parts = vars(hybrid_rewards(rule_rewards, rm_scores, group_size, settings, calibration))
    judged = torch.tensor(["error" not in verdict for verdict in verdicts])  # (B,)
    parts["rewards"] = neutral_if_unjudged(parts["rewards"], judged, group_size)
    return metrics.Scores(**parts, verdicts=verdicts)


def neutral_if_unjudged(rewards: torch.Tensor, judged: torch.Tensor, group_size: int) -> torch.Tensor:
    """Replace the reward of each unjudged completion by the mean of its group's judged ones. Returns (B,)."""
    if judged.all():
        return rewards
    groups, judged = rewards.view(-1, group_size), judged.view(-1, group_size)  # (Q, G)
    mean = (groups * judged).sum(dim=1, keepdim=True) / judged.sum(dim=1, keepdim=True).clamp(min=1)  # (Q, 1)
    return torch.where(judged, groups, mean).flatten()


# ----------------------------------------------------------------------------------------------------------
# Update


def update(
    policy: PreTrainedModel,
    state: TrainingState,
    samples: Samples,
    advantages: torch.Tensor,
    ref_log_probs: torch.Tensor | None,
    settings: UpdateSettings,
    micro_batch: BatchSize,
) -> metrics.UpdateResult:
    """Take the optimizer steps of one GRPO step.

    Questions are shuffled, but each question's completions stay together. Each block of `train_batch_size`
    completions forms one optimizer step, which is split among the processes. If memory runs out, the
    optimizer step is computed again with a smaller micro-batch. If a completion's loss or the gradient is not
    finite, the optimizer step is skipped.

    Args:
        advantages: (B,) float32, sorted by question, G for each.
        ref_log_probs: (B, T-1) float32, under the reference; None if there is no KL term.
    """
    master, group_size = state.master, samples.group_size
    advantages = advantages.to(samples.log_probs.device)
    result = metrics.UpdateResult()
    for _ in range(settings.epochs_per_step):
        questions = torch.randperm(len(advantages) // group_size, generator=state.generators["order"])  # (Q,)
        order = (questions[:, None] * group_size + torch.arange(group_size)).flatten()  # (B,)
        for batch in console.counted(order.split(settings.train_batch_size)):
            mask = samples.action_mask[batch]  # (b, T-1)
            weights = torch.zeros_like(samples.log_probs)  # (B, T-1), of each token in this step's loss
            weights[batch] = token_weights(mask, settings.loss_normalizer, settings.max_completion_length)
            if ref_log_probs is None:  # leave out rows without a gradient; `weights` counts their tokens
                batch = batch[(advantages[batch] != 0).cpu()]
            if len(batch) == 0:
                continue
            mine = batch[parallel.share(len(batch))]
            given = (policy, master, samples, advantages, ref_log_probs, weights, mine, settings)
            sums = micro_batch.fit(partial(accumulate_gradients, *given))
            parallel.sum_gradients(master.parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(master.parameters, settings.max_norm).item()
            not_finite = parallel.gather(sums.not_finite)
            if not_finite or not math.isfinite(grad_norm):
                result.skip(not_finite or batch.tolist())
            else:
                master.step(state.optimizer)
                result.add(sums, grad_norm, int(weights.count_nonzero()))
            master.zero_grad()
    result.warn_if_skipped()
    return result


def accumulate_gradients(
    policy: PreTrainedModel,
    master: MasterWeights,
    samples: Samples,
    advantages: torch.Tensor,
    ref_log_probs: torch.Tensor | None,
    weights: torch.Tensor,
    rows: torch.Tensor,
    settings: UpdateSettings,
    size: int,
) -> metrics.LossSums:
    """Compute the gradient of some completions' loss, in passes of at most `size` completions.

    Args:
        weights: (B, T-1), weight of each token in the loss.
        rows: (n,) int64, indices of these completions among all B.

    Returns:
        Sums over these completions' tokens for the metrics, and the rows whose loss is not finite.
    """
    master.zero_grad()  # discards the gradients of an attempt that ran out of memory
    passes = []
    for part in console.counted(micro_batches(policy, samples, rows, size)):
        at, n = part.rows, part.width
        mask, old = samples.action_mask[at, :n], samples.log_probs[at, :n]  # (b, t-1)
        log_probs = completion_log_probs(policy, samples, part, settings.temperature)  # (b, t-1)
        losses, clipped = policy_loss(log_probs, old, advantages[at], mask, settings.clip_eps)
        kl = torch.zeros_like(losses)
        if ref_log_probs is not None:
            kl = torch.where(mask, kl_estimate(log_probs, ref_log_probs[at, :n]), 0.0)
            losses = losses + settings.kl_weight * kl
        loss = (losses * weights[at, :n]).sum()
        loss.backward()
        gap = torch.where(mask, log_probs.detach() - old, 0.0).abs()
        passes.append(metrics.PassSums.of(at, losses, loss, kl, clipped, gap, mask))
    return metrics.LossSums.of(passes)


@torch.no_grad()
def reference_log_probs(
    reference: models.Reference, samples: Samples, temperature: float, micro_batch: BatchSize
) -> torch.Tensor:
    """Log-probs (B, T-1) of the samples under the frozen reference, in larger passes: nothing is kept."""
    questions = len(samples.log_probs) // samples.group_size
    rows = torch.arange(len(samples.log_probs)).view(questions, -1)  # (Q, G)
    mine = rows[parallel.share(questions)].flatten()  # (n,), the rows of this process

    def compute(size: int) -> torch.Tensor:
        log_probs = torch.zeros_like(samples.log_probs)  # (B, T-1)
        with reference.model() as model:
            for part in console.counted(micro_batches(model, samples, mine, REFERENCE_PASS * size)):
                log_probs[part.rows, : part.width] = completion_log_probs(model, samples, part, temperature)
        return parallel.add_up(log_probs)

    return micro_batch.fit(compute)


# ----------------------------------------------------------------------------------------------------------
# Command line


def cli() -> None:
    """main() as a command line: parameters are flags, and user errors are printed without a traceback.

    Exits with status 2 if a setting or input is invalid, 1 if training cannot continue, 130 after Ctrl-C, and
    143 after SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # some terminals cannot show every character
    if not isinstance(sys.stdout, PatientStream):  # it is, if Python calls cli() again
        sys.stdout = PatientStream(sys.stdout)
    # Before training there is nothing to save, so SIGTERM just exits.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    settings = tyro.cli(wraps(main)(lambda **settings: settings))
    defaults, named = defaults_of(main), named_flags(main, sys.argv[1:])
    try:  # pass only what was given; the rest comes from main()'s defaults or the run to resume
        main(**{name: value for name, value in settings.items() if name in named or value != defaults[name]})
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt as interrupt:
        print("interrupted; the checkpoints written so far are complete", file=sys.stderr)
        sys.exit(interrupt.exit_status if isinstance(interrupt, Stopped) else 130)


if __name__ == "__main__":
    cli()
