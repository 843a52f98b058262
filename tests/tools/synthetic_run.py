"""Writes the folder of a made-up run, of any size within a second, whose numbers tests know in advance."""

import json
import operator
import random
import statistics
from pathlib import Path
from typing import Any

from src.hybrid_reward import combine_hybrid_score, difficulty_weight, normalised_score, tanh_weight

BOUNDS = (-8.0, 4.0)
SIGMA_BAR = 2.0
WORDS = ("so", "then", "add", "carry", "which", "gives")
DEFAULTS: dict[str, Any] = dict(
    model_name="made-up", reward_model_name="made-up", device="cpu", compute_dtype="torch.float32",
    data="none.jsonl", reward_mode="hybrid", reward_scorer="sigmoid", rm_bounds="warmup",
    advantage_scale="none", alpha=0.5, beta=0.5, w_min=0.5, w_max=2.0, k=5.0,
)  # fmt: skip
ACCURACY_BEFORE = {"eval/accuracy": 0.1, "eval/accuracy_low": 0.07, "eval/accuracy_high": 0.15}
ACCURACY_AFTER = {"eval/accuracy": 0.75, "eval/accuracy_low": 0.685, "eval/accuracy_high": 0.805}


def write_run(
    folder: Path,
    steps: int = 6,
    questions: int = 3,
    group_size: int = 4,
    scores: bool = True,
    evaluate: bool = True,
    total_steps: int | None = None,
    words: int = 30,
    **settings,
) -> Path:
    """Write config.json, metrics.jsonl and rollouts.jsonl. From 10% right, answers improve toward 90%.

    Args:
        scores: Whether the run has a reward model.
        evaluate: Whether it was evaluated before the first step and, if it is finished, after the last.
        total_steps: Number of steps planned; by default as many as there are.
        words: Length of each completion.
        settings: Other hyperparameters.
    """
    sizes = dict(rollouts_per_step=questions, group_size=group_size, total_steps=total_steps or steps)
    settings = DEFAULTS | sizes | ({} if scores else dict(reward_model_name="none")) | settings
    folder.mkdir(parents=True)
    about = {"versions": {}, "git_commit": "0" * 40, "started": "2026-01-01T00:00:00"}
    (folder / "config.json").write_text(json.dumps({"hyperparameters": settings} | about))
    rng = random.Random(0)
    bounds = BOUNDS if scores else (0.0, 0.0)
    metrics, rollouts = [], []
    for step in range(steps):
        skill = 0.1 + 0.8 * step / steps
        for question in range(questions):
            sampled = [_sample(rng, skill, scores, words) for _ in range(group_size)]
            rows = _rows(rng.randrange(100), question, sampled, bounds, settings)
            rollouts += [{"step": step} | row for row in rows]
        metrics.append(_metrics(step, skill, bounds) | (ACCURACY_BEFORE if evaluate and step == 0 else {}))
    if evaluate and steps == settings["total_steps"]:
        metrics.append({"step": steps} | ACCURACY_AFTER)
    for name, records in (("metrics", metrics), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _metrics(step: int, skill: float, bounds: tuple[float, float]) -> dict[str, float]:
    low, high = bounds
    return {
        "step": step, "reward/rule_mean": skill, "reward/mean": 2 * skill - 1, "time/step_s": 6.0,
        "reward/sigma_bar": SIGMA_BAR, "reward/rm_min": low, "reward/rm_max": high,
        "completion/truncated_frac": 0.1, "policy/kl": 0.01 * step,
    }  # fmt: skip


def _sample(rng: random.Random, skill: float, scores: bool, words: int) -> dict:
    """A made-up completion: whether it is right, its error, its score, its words, and whether it ended."""
    right = rng.random() < skill
    return dict(
        right=right,
        error=0 if right else rng.randrange(1, 9),
        score=rng.gauss(2.0 if right else -4.0, 2.5) if scores else 0.0,
        text=" ".join(rng.choice(WORDS) for _ in range(words)),
        finished=rng.random() < 0.9,
    )


def _rows(a: int, b: int, sampled: list[dict], bounds: tuple[float, float], settings: dict) -> list[dict]:
    """Rows of rollouts.jsonl for the question a + b, with rewards computed by the project's own functions."""
    low, high = bounds
    clamped = [min(max(c["score"], low), high) for c in sampled]
    sigma_u = statistics.stdev(clamped)
    r_hats = [
        combine_hybrid_score(float(c["right"]), score, low, high, 0.01, 0.5, 0.5)
        for c, score in zip(sampled, clamped, strict=True)
    ]
    w_min, w_max = settings["w_min"], settings["w_max"]
    if settings["reward_scorer"] == "tanh":
        weights = [tanh_weight(r_hat, w_min, w_max) for r_hat in r_hats]
    else:
        weights = [difficulty_weight(SIGMA_BAR, sigma_u, w_min, w_max, settings["k"])] * len(r_hats)
    mean = sum(map(operator.mul, weights, r_hats)) / len(sampled)
    return [
        dict(
            question=f"What is {a} + {b}?", answer=str(a + b), completion=f"{c['text']} {a + b + c['error']}",
            tokens=len(c["text"].split()), finished=c["finished"], correct=c["right"],
            parsed_answer=str(a + b + c["error"]), rm_score=c["score"], rm_clamped=score != c["score"],
            n=normalised_score(score, low, high, 0.01), sigma_u=sigma_u, r_hat=r_hat, weight=weight,
            reward=weight * r_hat, advantage=weight * r_hat - mean,
        )
        for c, score, r_hat, weight in zip(sampled, clamped, r_hats, weights, strict=True)
    ]  # fmt: skip
