"""A run's folder made up from a formula: any size in a second, and known answers to what the report says of it."""

import json
import operator
import random
import statistics
from pathlib import Path

from src.hybrid_reward import combine_hybrid_score, difficulty_weight, normalised_score, tanh_weight

BOUNDS = (-8.0, 4.0)
SIGMA_BAR = 2.0
WORDS = ("so", "then", "add", "carry", "which", "gives")


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
    """Write config.json, metrics.jsonl and rollouts.jsonl. The share of right answers goes from 10 % towards 90 %."""
    settings = dict(
        model_name="made-up", reward_model_name="made-up" if scores else "none", device="cpu", compute_dtype="torch.float32",
        data="none.jsonl", rollouts_per_step=questions, group_size=group_size, reward_mode="hybrid", reward_scorer="sigmoid",
        rm_bounds="warmup", advantage_scale="none", alpha=0.5, beta=0.5, w_min=0.5, w_max=2.0, k=5.0,
        total_steps=total_steps or steps,
    ) | settings  # fmt: skip
    folder.mkdir(parents=True)
    about = {"versions": {}, "git_commit": "0" * 40, "started": "2026-01-01T00:00:00"}
    (folder / "config.json").write_text(json.dumps({"hyperparameters": settings} | about))
    rng = random.Random(0)
    bounds = BOUNDS if scores else (0.0, 0.0)
    metrics, rollouts = [], []
    for step in range(steps):
        skill = 0.1 + 0.8 * step / steps
        for question in range(questions):
            sampled = [_completion(rng, skill, scores, words) for _ in range(group_size)]
            rollouts += [{"step": step} | row for row in _group(rng.randrange(100), question, sampled, bounds, settings)]
        row = {"step": step, "reward/rule_mean": skill, "reward/mean": 2 * skill - 1, "time/step_s": 6.0}
        row |= {"reward/sigma_bar": SIGMA_BAR, "reward/rm_min": bounds[0], "reward/rm_max": bounds[1]}
        row |= {"completion/truncated_frac": 0.1, "policy/kl": 0.01 * step}
        held_out = {"eval/accuracy": 0.1, "eval/accuracy_low": 0.07, "eval/accuracy_high": 0.15}
        metrics.append(row | (held_out if evaluate and step == 0 else {}))
    if evaluate and steps == settings["total_steps"]:
        metrics.append({"step": steps, "eval/accuracy": 0.75, "eval/accuracy_low": 0.685, "eval/accuracy_high": 0.805})
    for name, rows in (("metrics", metrics), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _completion(rng: random.Random, skill: float, scores: bool, words: int) -> dict:
    """What is sampled: whether it is right, by how much it is off, its score, its words, whether it ended."""
    right = rng.random() < skill
    return dict(
        right=right, off=0 if right else rng.randrange(1, 9), score=rng.gauss(2.0 if right else -4.0, 2.5) if scores else 0.0,
        text=" ".join(rng.choice(WORDS) for _ in range(words)), whole=rng.random() < 0.9,
    )  # fmt: skip


def _group(a: int, b: int, sampled: list[dict], bounds: tuple[float, float], settings: dict) -> list[dict]:
    """Rows of rollouts.jsonl for one question; every reward is what the project's own functions make of it."""
    low, high = bounds
    held = [min(max(c["score"], low), high) for c in sampled]
    sigma_u = statistics.stdev(held)
    r_hats = [combine_hybrid_score(float(c["right"]), h, low, high, 0.01, 0.5, 0.5) for c, h in zip(sampled, held, strict=True)]
    by_itself = settings["reward_scorer"] == "tanh"
    weights = [tanh_weight(r) if by_itself else difficulty_weight(SIGMA_BAR, sigma_u) for r in r_hats]
    mean = sum(map(operator.mul, weights, r_hats)) / len(sampled)
    return [
        dict(
            question=f"What is {a} + {b}?", answer=str(a + b), completion=f"{c['text']} {a + b + c['off']}",
            tokens=len(c["text"].split()), finished=c["whole"], correct=c["right"], parsed_answer=str(a + b + c["off"]),
            rm_score=c["score"], rm_clamped=h != c["score"], n=normalised_score(h, low, high, 0.01), sigma_u=sigma_u,
            r_hat=r_hat, weight=weight, reward=weight * r_hat, advantage=weight * r_hat - mean,
        )
        for c, h, r_hat, weight in zip(sampled, held, r_hats, weights, strict=True)
    ]  # fmt: skip
