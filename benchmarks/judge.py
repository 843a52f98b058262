"""Measure how well the bundled reward model tells right solutions from wrong ones: python benchmarks/judge.py

It scores 1,000 pairs of a right and a wrong solution to the same question. The questions come from the two
arithmetic test files, which the model was not trained on. 500 pairs are written in several styles, with wrong
answers that are easily mistaken for right ones. The other 500 are sampled from the bundled policy and labeled
by the verifier. The script prints the AUC of all right against all wrong solutions, the share of pairs ranked
correctly, and the time that scoring takes.
"""

import itertools
import json
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data.make_judge import wrong_answer
from src import models
from src.engine.master_weights import MasterWeights
from src.engine.memory import keep_freed_memory
from src.engine.sampler import Sampling, decode, sample
from src.math_verifier import MathVerifier
from src.problems import Problem, read_problems, with_prompts
from src.reward_model import AceRewardModel

ROOT = Path(__file__).parent.parent
STYLES = (
    "{}", "The answer is {}.", "{} is the answer.", "So the result is {}.", "#### {}", r"\boxed{{{}}}",
    "<answer>{}</answer>",
    "Let me think step by step. First we look at the numbers. Therefore, the final answer is **{}**.",
    "It equals {}!", "= {}",
)  # fmt: skip


@dataclass
class Pair:
    """A right and a wrong solution to the same question."""

    question: str
    right: str
    wrong: str


def written(rng: random.Random, problems: list[Problem], count: int) -> list[Pair]:
    """Pairs written in a random style, the same for both solutions of a pair."""
    pairs = []
    for _ in range(count):
        problem = rng.choice(problems)
        terms = [int(t) for t in re.findall(r"\d+", problem.question)]
        wrong = wrong_answer(rng, int(problem.answer), terms)
        style = rng.choice(STYLES)
        pairs.append(Pair(problem.question, style.format(problem.answer), style.format(wrong)))
    return pairs


def sampled(problems: list[Problem], count: int, group_size: int, seed: int) -> tuple[list[Pair], float]:
    """Pairs of a right and a wrong completion, sampled from the bundled policy and judged by the verifier.

    Args:
        problems: Questions to sample completions for. They are asked again until there are enough pairs.
        count: Number of pairs.
        group_size: Completions per question.
        seed: Seed of the sampling.

    Returns:
        The pairs, and the seconds it took to sample 64 completions.
    """
    device = torch.device("cpu")
    policy, tokenizer = models.load_policy("embedded", device), models.load_tokenizer("embedded")
    MasterWeights(policy, models.pick_dtype(device, "auto"))
    verifier, stop_ids = MathVerifier(), models.stop_token_ids(policy, tokenizer)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_length=512, max_new_tokens=48, stop_ids=stop_ids)
    problems = with_prompts(problems, tokenizer, None, sampling.max_length)
    generator = torch.Generator().manual_seed(seed)
    pairs: list[Pair] = []
    completions, started = 0, time.perf_counter()
    for start in itertools.cycle(range(0, len(problems), 8)):
        asked = problems[start : start + 8]
        samples = sample(policy, [list(p.prompt_ids) for p in asked], group_size, sampling, generator)
        texts = decode(tokenizer, samples)
        completions += len(texts)
        repeated = [problem for problem in asked for _ in range(group_size)]
        verdicts = verifier.verify_batch([p.question for p in repeated], texts, [p.answer for p in repeated])
        for i, problem in enumerate(asked):
            group = range(group_size * i, group_size * (i + 1))
            right = [texts[j] for j in group if verdicts[j]["correct"]]
            wrong = [texts[j] for j in group if not verdicts[j]["correct"]]
            pairs += [Pair(problem.question, a, b) for a, b in zip(right, wrong, strict=False)]
        if len(pairs) >= count:
            break
    verifier.close()
    return pairs[:count], 64 * (time.perf_counter() - started) / completions


def auc(right: torch.Tensor, wrong: torch.Tensor) -> float:
    """The probability that a random right solution scores above a random wrong one; a tie counts half."""
    return share_above(right[:, None], wrong[None, :])


def share_above(right: torch.Tensor, wrong: torch.Tensor) -> float:
    """The share of pairs in which the right solution scores above the wrong one; a tie counts half."""
    return ((right > wrong).float() + 0.5 * (right == wrong).float()).mean().item()


def time_scoring(judge: AceRewardModel, pairs: list[Pair]) -> float:
    """Seconds that it takes to score both solutions of all pairs, as the median of five runs."""
    questions = [pair.question for pair in pairs for _ in range(2)]
    solutions = [solution for pair in pairs for solution in (pair.right, pair.wrong)]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        judge.score_texts(questions, solutions)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Print the table and, on the last line, the results as JSON."""
    keep_freed_memory()
    device, rng = torch.device("cpu"), random.Random(1)
    easy = read_problems(str(ROOT / "data/arithmetic_test.jsonl"), "--data")
    hard = read_problems(str(ROOT / "data/arithmetic_hard_test.jsonl"), "--data")
    judge = AceRewardModel("embedded", device, models.pick_dtype(device, "auto"))
    easy_pairs, sampling_s = sampled(easy, 300, 8, seed=1)
    hard_pairs, _ = sampled(hard, 200, 32, seed=2)
    sets = {
        "written, easy": written(rng, easy, 250),
        "written, hard": written(rng, hard, 250),
        "sampled, easy": easy_pairs,
        "sampled, hard": hard_pairs,
    }
    sets["all"] = [pair for pairs in sets.values() for pair in pairs]
    results: dict = {}
    print(f"{'':16} {'pairs':>6} {'AUC':>6} {'ranked right':>13} {'mean of right':>14} {'of wrong':>9}")
    for name, pairs in sets.items():
        questions = [p.question for p in pairs]
        right = judge.score_texts(questions, [p.right for p in pairs])
        wrong = judge.score_texts(questions, [p.wrong for p in pairs])
        ranked = share_above(right, wrong)
        results[name] = {"pairs": len(pairs), "auc": auc(right, wrong), "ranked_right": ranked}
        print(
            f"{name:16} {len(pairs):6} {auc(right, wrong):6.3f} {100 * ranked:12.1f}% "
            f"{right.mean():14.2f} {wrong.mean():9.2f}"
        )
    scoring_s = time_scoring(judge, easy_pairs[:32])
    results["score_64_s"], results["sample_64_s"] = scoring_s, sampling_s
    print(f"scoring 64 completions of 32 questions takes {scoring_s:.2f} s, sampling them {sampling_s:.1f} s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
