"""A run's folder made up from a formula: any size in a second, and known answers to what the report says of it."""

import json
import random
from pathlib import Path

from src.hybrid_reward import combine_hybrid_score, difficulty_weight

BOUNDS = (-8.0, 4.0)


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
    """Write config.json, metrics.jsonl and rollouts.jsonl; every reward is what the project's own functions make of it."""
    rng = random.Random(0)
    hyperparameters = dict(
        model_name="made-up", reward_model_name="made-up" if scores else "none", device="cpu", compute_dtype="torch.float32",
        data="none.jsonl", rollouts_per_step=questions, group_size=group_size, reward_mode="hybrid", reward_scorer="sigmoid",
        rm_bounds="warmup", advantage_scale="none", alpha=0.5, beta=0.5, w_min=0.5, w_max=2.0, k=5.0,
        total_steps=total_steps or steps,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config = {
        "hyperparameters": hyperparameters | settings,
        "versions": {},
        "git_commit": "0" * 40,
        "started": "2026-01-01T00:00:00",
    }
    (folder / "config.json").write_text(json.dumps(config))
    metrics, rollouts = [], []
    for step in range(steps):
        skill = 0.1 + 0.8 * step / steps
        for question in range(questions):
            a, b = rng.randrange(100), question
            group = []
            for _ in range(group_size):
                right = rng.random() < skill
                score = rng.gauss(2.0 if right else -4.0, 2.5) if scores else 0.0
                said = a + b if right else a + b + rng.randrange(1, 9)
                text = " ".join(rng.choice(["so", "then", "add", "carry", "which", "gives"]) for _ in range(words))
                group.append(dict(right=right, score=score, said=said, text=f"{text} {said}", whole=rng.random() < 0.9))
            held = [min(max(c["score"], BOUNDS[0]), BOUNDS[1]) for c in group] if scores else [0.0] * group_size
            sigma_u = abs(max(held) - min(held)) / 3
            for c, h in zip(group, held, strict=True):
                low, high = BOUNDS if scores else (0.0, 0.0)
                c["n"] = (h - low) / (high - low + 0.01)
                c["r_hat"] = combine_hybrid_score(float(c["right"]), h, low, high, 0.01, 0.5, 0.5)
                c["weight"] = difficulty_weight(2.0, sigma_u)
            mean = sum(c["weight"] * c["r_hat"] for c in group) / group_size
            for c, h in zip(group, held, strict=True):
                reward = c["weight"] * c["r_hat"]
                rollouts.append(
                    dict(
                        step=step, question=f"What is {a} + {b}?", answer=str(a + b), completion=c["text"], tokens=words,
                        finished=c["whole"], correct=c["right"], parsed_answer=str(c["said"]), rm_score=c["score"],
                        rm_clamped=h != c["score"], n=c["n"], sigma_u=sigma_u, r_hat=c["r_hat"], weight=c["weight"],
                        reward=reward, advantage=reward - mean,
                    )
                )  # fmt: skip
        row = {"step": step, "reward/rule_mean": skill, "reward/mean": 2 * skill - 1, "time/step_s": 6.0, "reward/sigma_bar": 2.0}
        row |= {"reward/rm_min": BOUNDS[0] if scores else 0.0, "reward/rm_max": BOUNDS[1] if scores else 0.0}
        row |= {"completion/truncated_frac": 0.1, "policy/kl": 0.01 * step}
        held_out = {"eval/accuracy": 0.1, "eval/accuracy_low": 0.07, "eval/accuracy_high": 0.15}
        metrics.append(row | (held_out if evaluate and step == 0 else {}))
    if evaluate and steps == hyperparameters["total_steps"]:
        metrics.append({"step": steps, "eval/accuracy": 0.75, "eval/accuracy_low": 0.685, "eval/accuracy_high": 0.805})
    for name, rows in (("metrics", metrics), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
