"""The lines that a run prints about its steps, in a format that its users already know.

`src.console` does the printing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from src import console
from src.console import say, warn
from src.hybrid_reward import Calibration
from src.metrics import Scores
from src.problems import Problem
from src.run.checkpoint import Progress

# Share of a step in which its threads may wait for a core before the run says so.
MUCH_WAITING = 0.15
MUCH_GAP = 0.1  # nats, of policy/sampler_gap; see docs/metrics.md
SAMPLES_SHOWN = 3
SAMPLE_CHARS = 300  # characters shown of a completion; a longer one loses its middle
FIRST_AND_LAST = 5  # steps that the summary averages over at each end of a run


def say_start(args: SimpleNamespace, calibration: Calibration, total_steps: int) -> None:
    """Print the bounds of the scores and the number of steps.

    Args:
        args: main()'s parameters.
    """
    say(f"RM bounds: min={calibration.min_rm:.4f}, max={calibration.max_rm:.4f}")
    say(f"training for {total_steps} steps of {args.rollouts_per_step} x {args.group_size} completions")
    if args.max_steps and total_steps < args.max_steps:
        say(f"that is fewer than --max-steps {args.max_steps}, because --epochs {args.epochs} comes first")


def warn_if_unread(metrics: dict[str, float], completions: list[str], method: str) -> None:
    """Warn if the verifier found no final answer in any completion: it would judge all of them wrong.

    Args:
        metrics: The verifier's metrics for these completions.
        method: The verifier's method.
    """
    if metrics["verifier/extracted_frac"] == 0:
        wanted = "an <answer>, \\boxed{} or ####" if method == "strict" else "a final answer"
        console.warn(
            f"none of the first {len(completions)} completions contains {wanted} that the verifier can read; "
            f"the first one ends with {completions[0][-200:]!r}. See --system-prompt, --verifier-method and "
            "--max-new-tokens"
        )


def say_accuracy(step: int, metrics: dict[str, float], problems: int) -> None:
    """Print the held-out accuracy."""
    low, high = 100 * metrics["eval/accuracy_low"], 100 * metrics["eval/accuracy_high"]
    accuracy, strict = 100 * metrics["eval/accuracy"], 100 * metrics["eval/strict_accuracy"]
    say(
        f"held-out accuracy after {step} steps: {accuracy:.1f} % ({low:.1f} to {high:.1f}, strictly "
        f"{strict:.1f} %) of {problems}, greedy"
    )


def say_rollouts(problems: list[Problem], scores: Scores, step: int) -> None:
    """Print a line per question, then the sum of the step's rewards."""
    group_size = len(scores.rewards) // len(problems)
    for i, problem in enumerate(problems):
        group = slice(i * group_size, (i + 1) * group_size)
        right = int(scores.rule_rewards[group].sum())
        say(
            f"rollout q={problem.question!r}, a={problem.answer!r}, "
            f"returns={scores.rewards[group].sum():.2f}, replay_buffer_size={group.stop}, "
            f"right={right}/{group_size}"
        )
    say(f"returns of step {step}: {scores.rewards.sum():.4f}")


def say_samples(rows: list[dict]) -> None:
    """Print the completions with the highest, middle and lowest rewards, and each part of the reward.

    Args:
        rows: From `rollout_rows`.
    """
    ranked = sorted(rows, key=lambda row: row["reward"], reverse=True)
    for i in range(min(SAMPLES_SHOWN, len(ranked))):
        row = ranked[i * (len(ranked) - 1) // (SAMPLES_SHOWN - 1)]
        text, half = row["completion"], SAMPLE_CHARS // 2
        shown = repr(text) if len(text) <= SAMPLE_CHARS else f"{text[:half]!r} ... {text[-half:]!r}"
        say(
            f"sample q={row['question']!r}, a={row['answer']!r}, {'right' if row['correct'] else 'wrong'}, "
            f"rm={row['rm_score']:.2f}, r_hat={row['r_hat']:.2f}, weight={row['weight']:.2f}, "
            f"reward={row['reward']:.2f}, advantage={row['advantage']:+.2f}: {shown}"
        )


def say_step(step: int, total_steps: int, metrics: dict[str, float]) -> None:
    """Print one line about a step."""
    say(
        f"{step}: kl={metrics['policy/kl']:.4f}, grad_norm={metrics['policy/grad_norm']:.4f}, "
        f"right={100 * metrics['reward/rule_mean']:.0f}%, tokens={metrics['completion/len_mean']:.0f}, "
        f"truncated={100 * metrics['completion/truncated_frac']:.0f}%, {metrics['time/step_s']:.1f} s, "
        f"{metrics['time/tokens_per_s']:.0f} tokens/s (step {step + 1} of {total_steps})"
    )


def warn_if_crowded(step: int, metrics: dict[str, float]) -> None:
    """Warn, once in a process, if the threads of a step often waited for a core that another program used."""
    global _said_crowded
    share = metrics["time/cpu_wait_frac"]
    long_enough = metrics["time/step_s"] > 2  # in a shorter step, a moment of company is a large share
    if share > MUCH_WAITING and long_enough and not _said_crowded:
        _said_crowded = True
        warn(
            f"other programs kept the CPU busy in {100 * share:.0f}% of step {step}; stop them, or give this "
            "run its own cores (taskset -c 0) or fewer threads (OMP_NUM_THREADS=1)"
        )


_said_crowded = False


def warn_if_gap(step: int, metrics: dict[str, float], dtype: str) -> None:
    """Warn, at most once in a process, if sampler and trainer do not compute the same log-probs."""
    global _said_gap
    gap = metrics["policy/sampler_gap"]
    if gap > MUCH_GAP and not _said_gap:
        _said_gap = True
        other = "use --dtype float32" if dtype != "float32" else "please report the model and this line"
        warn(
            f"policy/sampler_gap is {gap:.2f} nats in step {step}: sampling and training compute different "
            f"log-probs, so the policy learns from wrong ratios; {other}"
        )


_said_gap = False


def say_summary(run_folder: Path) -> None:
    """Print a table that compares the first and the last steps of a run, from its metrics.jsonl."""
    text = (run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if "policy/loss" in line]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    if console.is_quiet() or not steps:
        return
    n = min(FIRST_AND_LAST, len(steps))

    def row(name: str, metric: str, show: Callable[[float], str]) -> list[str]:
        parts = (steps[:n], steps[-n:])
        ends = [[line[metric] for line in part if line[metric] is not None] for part in parts]
        return [name, *(show(sum(values) / len(values)) if values else "-" for values in ends)]

    rows = [
        row("right answers", "reward/rule_mean", _percent),
        row("reward", "reward/mean", "{:.2f}".format),
        row("groups without an advantage", "reward/zero_std_frac", _percent),
        row("tokens per completion", "completion/len_mean", "{:.0f}".format),
        row("truncated completions", "completion/truncated_frac", _percent),
        row("KL divergence to the reference", "policy/kl", "{:.4f}".format),
        row("entropy, nats per token", "policy/entropy", "{:.2f}".format),
        row("seconds per step", "time/step_s", "{:.1f}".format),
        row("  rollout", "time/rollout_s", "{:.1f}".format),
        row("  score", "time/score_s", "{:.1f}".format),
        row("  update", "time/update_s", "{:.1f}".format),
        row("tokens per second", "time/tokens_per_s", "{:.0f}".format),
    ]
    if evaluated:
        shown = [_percent(line["eval/accuracy"]) + _interval(line) for line in (evaluated[0], evaluated[-1])]
        rows.insert(0, ["held-out accuracy (95 % interval), before and after", *shown])
    console.table(["mean of", f"the first {n} steps", f"the last {n}"], rows)


def say_done(progress: Progress, first_step: int, minutes: float, device: torch.device, folder: Path) -> None:
    """Print the result of a run, even if quiet."""
    accuracies = [f"{100 * accuracy:.1f} %" for accuracy in progress.accuracies]
    change = f"; held-out accuracy {accuracies[0]} -> {accuracies[-1]}" if accuracies else ""
    last = f", the last {progress.step - first_step}" if 0 < first_step < progress.step else ""
    print(
        f"done: {progress.step} steps{last} in {minutes:.1f} minutes on {device.type}{change}; see {folder}",
        flush=True,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(line: dict) -> str:
    return f" ({100 * line['eval/accuracy_low']:.1f} to {100 * line['eval/accuracy_high']:.1f})"
