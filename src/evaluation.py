"""Evaluation: how many held-out questions a policy answers right, greedily and in n samples, and how two policies compare.

The same completions are judged twice: strictly (marked answers alone) and leniently (the last number too), so that a gain in
form can be told from a gain in maths. Every figure comes with a 95 % interval over questions: what would change if others of the
kind had been asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src import console
from src.math_verifier import MathVerifier
from src.rollout import fit_memory
from src.run_log import environment
from src.sampler import Limits, Sampling, decode, sample

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

METHODS = {"lenient": "flexible", "strict": "strict"}  # name of the figure: method of the verifier
RESAMPLES = 9999
FLIPS_SHOWN = 10  # in each direction; evaluation.json has them all


class Estimate(NamedTuple):
    """A share of questions, or a difference of two, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass
class Answered:
    """Judged completions of N questions, n of each; those of a question side by side."""

    completions: list[str]
    tokens: np.ndarray  # (N x n,) of each completion, stop token included
    finished: np.ndarray  # (N x n,) bool
    parsed: dict[str, list[str | None]]  # by name in METHODS: N x n answers, None where the verifier found none
    right: dict[str, np.ndarray]  # by name in METHODS: (N, n) bool


def answer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    questions: list[str],
    answers: list[str],
    prompt_ids: list[list[int]],
    n: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    *,
    generator: torch.Generator | None,
    **sampling: Unpack[Sampling],
) -> Answered:
    """Answer each question n times and judge the answers.

    Args:
        prompt_ids: Of the questions, N of each.
        n: Completions per question.
        batch_size: Completions that are sampled at once, about.
        progress: Called with the number of completions of each batch that is done.
        generator, sampling: As `sampler.sample` takes them.
    """
    completions: list[str] = []
    tokens: list[int] = []
    finished: list[bool] = []
    parsed: dict[str, list[str | None]] = {name: [] for name in METHODS}
    right: dict[str, list[bool]] = {name: [] for name in METHODS}
    at_once = max(1, batch_size // n)
    for start in range(0, len(questions), at_once):
        part = slice(start, start + at_once)
        samples = sample(policy, prompt_ids[part], n, generator=generator, **sampling)
        texts = decode(tokenizer, samples)
        asked, truths = ([x for x in of_all[part] for _ in range(n)] for of_all in (questions, answers))
        for name, method in METHODS.items():
            verdicts = verifier.verify_batch(asked, texts, truths, method)
            parsed[name] += [v["parsed_answer"] for v in verdicts]
            right[name] += [v["correct"] for v in verdicts]
        completions += texts
        tokens += map(len, samples.completion_ids)
        finished += samples.finished.tolist()
        progress(len(texts))
    verifier.metrics()  # begins the counts at zero: these completions are none of the training's
    judged = {name: np.array(verdicts).reshape(len(questions), n) for name, verdicts in right.items()}
    return Answered(completions, np.array(tokens), np.array(finished), parsed, judged)


def answer_metrics(answered: Answered, method: str) -> dict[str, float]:
    """The eval/... metrics of greedy answers; docs/metrics.md has a line on each.

    Args:
        method: That the verifier judges by in training: "flexible" or "strict". It decides eval/accuracy.
    """
    name = next(name for name, of_verifier in METHODS.items() if of_verifier == method)
    accuracy = wilson(answered.right[name][:, 0])
    return {
        "eval/accuracy": accuracy.value,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/strict_accuracy": float(answered.right["strict"].mean()),
        "eval/len_mean": float(answered.tokens.mean()),
        "eval/truncated_frac": 1 - float(answered.finished.mean()),
        "eval/extracted_frac": sum(p is not None for p in answered.parsed[name]) / len(answered.completions),
    }


def describe(metrics: dict[str, float]) -> str:
    """Held-out accuracy in a few words."""
    low, high = 100 * metrics["eval/accuracy_low"], 100 * metrics["eval/accuracy_high"]
    strict = f", strictly {100 * metrics['eval/strict_accuracy']:.1f} %"
    return f"{100 * metrics['eval/accuracy']:.1f} % ({low:.1f} to {high:.1f}{strict})"


# ----------------------------------------------------------------------------------------------------------------------
# Figures with their intervals


def wilson(right: np.ndarray) -> Estimate:
    """The share of questions answered right, (N,) bool, with the Wilson score interval (E. B. Wilson, JASA 22, 1927).

    >>> [round(x, 3) for x in wilson(np.array([True] * 9 + [False]))]
    [0.9, 0.596, 0.982]
    """
    from scipy.stats import binomtest  # takes half a second

    result = binomtest(int(right.sum()), len(right))
    interval = result.proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(result.statistic, float(interval.low), float(interval.high))


def bootstrap(values: np.ndarray, least: float = 0.0, most: float = 1.0) -> Estimate:
    """Mean of a value per question, (N,), with the percentile bootstrap interval over questions.

    It draws from a generator of its own, always the same. With few questions (below 50) the interval is somewhat too narrow.
    Where all values are equal every resample is the same, and the interval is what would follow if as many questions had another
    value, anywhere from `least` to `most`, as Wilson's interval allows after none in N.
    """
    from scipy.stats import bootstrap as resample

    value = float(values.mean())
    if np.ptp(values) == 0:
        others = wilson(np.zeros(len(values), dtype=bool)).high
        return Estimate(value, value - others * (value - least), value + others * (most - value))
    drawn = resample(
        (values,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(value, float(drawn.low), float(drawn.high))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which `right` are: 1 - C(n - right, k) / C(n, k).

    Source: arXiv:2107.03374, equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
    (0.25, 0.5, 1.0)
    """
    assert 1 <= k <= n and 0 <= right <= n
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ks_up_to(n: int) -> list[int]:
    """1, 2, 4, ... and n.

    >>> ks_up_to(8), ks_up_to(10), ks_up_to(0)
    ([1, 2, 4, 8], [1, 2, 4, 8, 10], [])
    """
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n else []


def values_per_question(greedy: np.ndarray, samples: np.ndarray | None) -> dict[str, np.ndarray]:
    """What each figure is the mean of, (N,) each: "greedy", and "pass@k" for each k.

    Args:
        greedy: (N, 1) bool, the greedy answer is right.
        samples: (N, n) bool, the sampled ones are; None where there are none.
    """
    values = {"greedy": greedy[:, 0]}
    if samples is not None:
        n = samples.shape[1]
        for k in ks_up_to(n):
            values[f"pass@{k}"] = np.array([pass_at_k(n, int(right), k) for right in samples.sum(axis=1)])
    return values


def figures(values: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Each figure with its interval: Wilson's for the greedy answers, the bootstrap over questions for pass@k."""
    return {name: wilson(v) if v.dtype == bool else bootstrap(v) for name, v in values.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Two policies on the same questions


@dataclass
class Comparison:
    """One policy against another on the same questions, by one method."""

    differences: dict[str, Estimate]  # figure by figure, this one minus the other; the bootstrap keeps each question's pair
    p_value: float  # exact McNemar test of the greedy answers, two-sided
    gained: list[int]  # questions that this one alone answers right, greedily
    lost: list[int]  # that the other one alone does


def compare(values: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> Comparison:
    """Compare two policies question by question, which cancels how hard each question is.

    Args:
        values: From `values_per_question`.
        others: The same of the other policy.

    >>> greedy = lambda *right: {"greedy": np.array(right, dtype=bool)}
    >>> compared = compare(greedy(1, 1, 1, 0), greedy(0, 0, 1, 1))
    >>> compared.gained, compared.lost, compared.differences["greedy"].value, compared.p_value
    ([0, 1], [3], 0.25, 1.0)
    """
    from scipy.stats import binomtest

    ours, theirs = values["greedy"], others["greedy"]
    gained, lost = np.flatnonzero(ours & ~theirs).tolist(), np.flatnonzero(~ours & theirs).tolist()
    flips = len(gained) + len(lost)
    # Where neither is better, a question whose answer flips does so in either direction with the same chance.
    p_value = float(binomtest(len(gained), flips).pvalue) if flips else 1.0
    differences = {name: bootstrap(values[name].astype(float) - others[name], least=-1.0) for name in values}
    return Comparison(differences, p_value, gained, lost)


# ----------------------------------------------------------------------------------------------------------------------
# What is written and printed


@dataclass
class Evaluated:
    """One policy on N questions."""

    name: str
    greedy: Answered
    samples: Answered | None

    def values(self, method: str) -> dict[str, np.ndarray]:
        """`values_per_question` by a method of METHODS."""
        return values_per_question(self.greedy.right[method], self.samples.right[method] if self.samples else None)

    def summary(self) -> dict:
        """What evaluation.json says of it."""
        summary: dict = {"model": self.name}
        for method in METHODS:
            shown: dict = {name: estimate._asdict() for name, estimate in figures(self.values(method)).items()}
            if self.samples:
                shown["any_right_frac"] = float(self.samples.right[method].any(axis=1).mean())
            summary[method] = shown
        metrics = answer_metrics(self.greedy, "flexible")
        names = ("eval/len_mean", "eval/truncated_frac", "eval/extracted_frac")
        return summary | {f"greedy_{name.removeprefix('eval/')}": metrics[name] for name in names}

    def rows(self, questions: list[str], answers: list[str]) -> list[dict]:
        """A record per completion, for evaluation.jsonl."""
        rows = []
        for kind, answered in (("greedy", self.greedy), ("sample", self.samples)):
            if answered is None:
                continue
            for i, completion in enumerate(answered.completions):
                question, sample_number = divmod(i, answered.right["strict"].shape[1])
                rows.append(
                    {
                        "model": self.name,
                        "kind": kind,
                        "question": questions[question],
                        "answer": answers[question],
                        "sample": sample_number,
                        "completion": completion,
                        "tokens": int(answered.tokens[i]),
                        "finished": bool(answered.finished[i]),
                        "parsed_answer": answered.parsed["lenient"][i],
                        **{method: bool(answered.right[method][question, sample_number]) for method in METHODS},
                    }
                )
        return rows


def evaluate_policy(
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    questions: list[str],
    answers: list[str],
    prompt_ids: list[list[int]],
    n: int,
    batch_size: int,
    seed: int,
    *,
    temperature: float,
    top_p: float,
    **limits: Unpack[Limits],
) -> Evaluated:
    """Answer each question greedily, and n times at random; where memory runs out, with fewer completions at once."""
    compute = partial(answer, policy, tokenizer, verifier, questions, answers, prompt_ids, progress=console.advance, **limits)
    console.phase("greedy")
    greedy, batch_size = fit_memory(partial(compute, 1, temperature=0.0, top_p=1.0, generator=None), batch_size)
    if n == 0:
        return Evaluated(name, greedy, None)
    console.phase(f"{n} samples")
    generator = torch.Generator(policy.device).manual_seed(seed)
    explore = partial(compute, n, temperature=temperature, top_p=top_p, generator=generator)
    return Evaluated(name, greedy, fit_memory(explore, batch_size)[0])


def report_evaluation(folder: Path, settings: dict, questions: list[str], answers: list[str], evaluated: list[Evaluated]) -> None:
    """Print the figures of one policy, or of two with their comparison; write evaluation.json and evaluation.jsonl.

    Args:
        folder: Of the run.
        settings: The resolved hyperparameters, for evaluation.json.
        evaluated: The policy, and the one that it is compared with if there is one.
    """
    result = {"questions": len(questions), **evaluated[0].summary()}
    if len(evaluated) == 1:
        by_method = [figures(evaluated[0].values(method)) for method in METHODS]
        rows = [[_label(name, evaluated[0]), *(_share(of_method[name]) for of_method in by_method)] for name in by_method[0]]
        console.table(["share right (95 % interval)", *METHODS], rows)
    else:
        result["against"] = evaluated[1].summary()
        result["comparison"] = {}
        for method in METHODS:
            compared = compare(*(one.values(method) for one in evaluated))
            flips = {
                direction: [_flip(method, i, questions, answers, evaluated) for i in getattr(compared, direction)]
                for direction in ("gained", "lost")
            }
            result["comparison"][method] = {
                "differences": {name: estimate._asdict() for name, estimate in compared.differences.items()},
                "p_value": compared.p_value,
                **flips,
            }
            _print_comparison(method, evaluated, compared, flips)
    result |= {"hyperparameters": settings, **environment()}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with (folder / "evaluation.jsonl").open("w", encoding="utf-8") as file:
        for one in evaluated:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in one.rows(questions, answers))


def _print_comparison(method: str, evaluated: list[Evaluated], compared: Comparison, flips: dict[str, list[dict]]) -> None:
    of_each = [figures(one.values(method)) for one in evaluated]
    rows = [
        [_label(name, evaluated[0]), *(_share(of_one[name]) for of_one in of_each), _points(compared.differences[name])]
        for name in of_each[0]
    ]
    console.table([f"{method}: share right (95 % interval)", "model", "against", "difference in points"], rows)
    print(
        f"{method}: {len(compared.gained)} questions gained, {len(compared.lost)} lost, greedily; "
        f"exact McNemar p = {compared.p_value:.2g}"
    )
    for direction, of_direction in flips.items():
        for flip in of_direction[:FLIPS_SHOWN]:
            print(
                f"{direction} q={flip['question']!r}, a={flip['answer']!r}, model {flip['model']!r}, against {flip['against']!r}"
            )
        if len(of_direction) > FLIPS_SHOWN:
            print(f"... and {len(of_direction) - FLIPS_SHOWN} more {direction}, all in evaluation.json")


def _flip(method: str, i: int, questions: list[str], answers: list[str], evaluated: list[Evaluated]) -> dict:
    parsed = [one.greedy.parsed[method][i] for one in evaluated]
    return {"question": questions[i], "answer": answers[i], "model": parsed[0], "against": parsed[1]}


def _label(name: str, evaluated: Evaluated) -> str:
    samples = evaluated.samples and evaluated.samples.right["strict"].shape[1]
    return f"{name} (any sample right)" if name == f"pass@{samples}" else name


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"
