"""How well the embedded reward model tells right solutions from wrong ones: python benchmarks/judge.py

1,000 pairs of a right and a wrong solution of one question of the two arithmetic test files, which it was not trained on: 500
written in several styles, the wrong one easily mistaken for right, and 500 sampled from the embedded policy and told apart by the
verifier. Prints the AUC over all right against all wrong solutions, the share of pairs ranked right, and what scoring costs.
"""

import itertools
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from data.make_judge import wrong_answer
from src import models
from src.master_weights import MasterWeights
from src.math_verifier import MathVerifier
from src.memory import keep_freed_memory
from src.reward_model import AceRewardModel
from src.sampler import sample

ROOT = Path(__file__).parent.parent
STYLES = (
    "{}", "The answer is {}.", "{} is the answer.", "So the result is {}.", "#### {}", r"\boxed{{{}}}", "<answer>{}</answer>",
    "Let me think step by step. First we look at the numbers. Therefore, the final answer is **{}**.", "It equals {}!", "= {}",
)  # fmt: skip


@dataclass
class Pair:
    question: str
    right: str
    wrong: str


def written(rng: random.Random, problems: list[train.Problem], count: int) -> list[Pair]:
    """Right and wrong answers in one style each."""
    pairs = []
    for _ in range(count):
        problem = rng.choice(problems)
        terms = [int(t) for t in re.findall(r"\d+", problem.question)]
        wrong = wrong_answer(rng, int(problem.answer), terms)
        style = rng.choice(STYLES)
        pairs.append(Pair(problem.question, style.format(problem.answer), style.format(wrong)))
    return pairs


def sampled(problems: list[train.Problem], count: int, group_size: int, seed: int) -> tuple[list[Pair], float]:
    """Right and wrong completions of the embedded policy, by the verifier, and the seconds that sampling 64 took."""
    device = torch.device("cpu")
    policy, tokenizer = models.load_policy("embedded", device), models.load_tokenizer("embedded")
    MasterWeights(policy, models.pick_dtype(device, "auto"))
    verifier, stop_ids = MathVerifier(), models.stop_token_ids(policy, tokenizer)
    ids = train.encode_prompts(tokenizer, problems, None, 512)
    generator = torch.Generator().manual_seed(seed)
    pairs, texts_made, started = [], 0, time.perf_counter()
    for start in itertools.cycle(range(0, len(problems), 8)):
        part = problems[start : start + 8]
        samples = sample(
            policy, ids[start : start + 8], group_size, max_length=512, max_new_tokens=48, temperature=1.0, top_p=1.0,
            stop_ids=stop_ids, pad_id=stop_ids[0], generator=generator,
        )  # fmt: skip
        texts = train.decode(tokenizer, samples)
        texts_made += len(texts)
        questions = [p.question for p in part for _ in range(group_size)]
        verdicts = verifier.verify_batch(questions, texts, [p.answer for p in part for _ in range(group_size)])
        for i, problem in enumerate(part):
            group = range(group_size * i, group_size * (i + 1))
            right = [texts[j] for j in group if verdicts[j]["correct"]]
            wrong = [texts[j] for j in group if not verdicts[j]["correct"]]
            pairs += [Pair(problem.question, a, b) for a, b in zip(right, wrong, strict=False)]
        if len(pairs) >= count:
            break
    verifier.close()
    return pairs[:count], 64 * (time.perf_counter() - started) / texts_made


def auc(right: torch.Tensor, wrong: torch.Tensor) -> float:
    """Probability that a right solution scores above a wrong one, both drawn at random; a tie counts half."""
    difference = right[:, None] - wrong[None, :]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def main() -> None:
    keep_freed_memory()
    device, rng = torch.device("cpu"), random.Random(1)
    easy = train.read_prompts(str(ROOT / "data/arithmetic_test.jsonl"), "--data")
    hard = train.read_prompts(str(ROOT / "data/arithmetic_hard_test.jsonl"), "--data")
    judge = AceRewardModel("embedded", device, models.pick_dtype(device, "auto"))
    easy_pairs, rollout_s = sampled(easy, 300, 8, seed=1)
    hard_pairs, _ = sampled(hard, 200, 32, seed=2)
    sets = {
        "written, easy": written(rng, easy, 250),
        "written, hard": written(rng, hard, 250),
        "sampled, easy": easy_pairs,
        "sampled, hard": hard_pairs,
    }
    every = [pair for pairs in sets.values() for pair in pairs]
    results: dict = {}
    print(f"{'':16} {'pairs':>6} {'AUC':>6} {'ranked right':>13} {'mean of right':>14} {'of wrong':>9}")
    for name, pairs in (sets | {"all": every}).items():
        questions = [p.question for p in pairs]
        right = judge.score_texts(questions, [p.right for p in pairs])
        wrong = judge.score_texts(questions, [p.wrong for p in pairs])
        ranked = ((right > wrong).float() + 0.5 * (right == wrong).float()).mean().item()
        results[name] = {"pairs": len(pairs), "auc": auc(right, wrong), "ranked_right": ranked}
        print(f"{name:16} {len(pairs):6} {auc(right, wrong):6.3f} {100 * ranked:12.1f}% {right.mean():14.2f} {wrong.mean():9.2f}")
    pairs = easy_pairs[:32]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        judge.score_texts([p.question for p in pairs for _ in range(2)], [t for p in pairs for t in (p.right, p.wrong)])
        times.append(time.perf_counter() - started)
    results["score_64_s"], results["sample_64_s"] = sorted(times)[2], rollout_s
    print(f"scoring 64 completions of 32 questions takes {sorted(times)[2]:.2f} s, sampling as many {rollout_s:.1f} s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
