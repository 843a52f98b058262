"""Estimates with 95% intervals: accuracy, pass@k and a paired comparison of two policies. No model needed."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 9999


class Estimate(NamedTuple):
    """A share of questions, or the difference of two shares, with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(right: np.ndarray) -> Estimate:
    """Share of questions answered right, with the Wilson score interval (E. B. Wilson, JASA 22, 1927).

    Args:
        right: (N,) bool, one per question.

    >>> [round(x, 3) for x in wilson(np.array([True] * 9 + [False]))]
    [0.9, 0.596, 0.982]
    """
    from scipy.stats import binomtest  # imported here because it takes half a second

    result = binomtest(int(right.sum()), len(right))
    interval = result.proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(result.statistic, float(interval.low), float(interval.high))


def bootstrap(values: np.ndarray, minimum: float = 0.0, maximum: float = 1.0) -> Estimate:
    """Mean of the values (N,), one per question, with the percentile bootstrap interval over questions.

    The random generator is local and has a fixed seed. With fewer than 50 questions the interval is somewhat
    too narrow. If all N values are equal, every resample is the same. The interval then allows for questions
    with any other value between `minimum` and `maximum`. Their assumed share is the upper end of Wilson's
    interval for 0 out of N.
    """
    from scipy.stats import bootstrap as resample

    mean = float(values.mean())
    if np.ptp(values) == 0:
        others = wilson(np.zeros(len(values), dtype=bool)).high
        return Estimate(mean, mean - others * (mean - minimum), mean + others * (maximum - mean))
    options = dict(n_resamples=RESAMPLES, batch=1000, method="percentile", rng=np.random.default_rng(0))
    interval = resample((values,), np.mean, **options).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, if `right` of n samples are.

    1 - C(n - right, k) / C(n, k). Source: arXiv:2107.03374, equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
    (0.25, 0.5, 1.0)
    """
    assert 1 <= k <= n and 0 <= right <= n
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ks_up_to(n: int) -> list[int]:
    """The values of k for which pass@k is reported: 1, 2, 4, ... and n.

    >>> ks_up_to(8), ks_up_to(10), ks_up_to(0)
    ([1, 2, 4, 8], [1, 2, 4, 8, 10], [])
    """
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n else []


def values_per_question(greedy: np.ndarray, samples: np.ndarray | None) -> dict[str, np.ndarray]:
    """Per-question values (N,) of each figure: "greedy", and "pass@k" for each k. A figure is their mean.

    Args:
        greedy: (N, 1) bool, whether the greedy answer is right.
        samples: (N, n) bool, whether each sampled answer is right; None if nothing was sampled.
    """
    values = {"greedy": greedy[:, 0]}
    if samples is not None:
        n = samples.shape[1]
        for k in ks_up_to(n):
            values[f"pass@{k}"] = np.array([pass_at_k(n, int(right), k) for right in samples.sum(axis=1)])
    return values


def estimate_all(values: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Each figure with its interval: Wilson's for greedy answers, the bootstrap over questions for pass@k."""
    return {name: wilson(v) if v.dtype == bool else bootstrap(v) for name, v in values.items()}


@dataclass
class Comparison:
    """One policy compared with another on the same questions, judged by one method."""

    differences: dict[str, Estimate]  # first minus second policy, by figure; the bootstrap resamples pairs
    p_value: float  # exact McNemar test of the greedy answers, two-sided
    gained: list[int]  # questions that only the first policy answers right, greedily
    lost: list[int]  # questions that only the second policy does


def compare(values: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> Comparison:
    """Compare two policies question by question, so that the difficulty of each question cancels out.

    Args:
        values: The first policy's values, from `values_per_question`.
        others: The second policy's values.

    >>> greedy = lambda *right: {"greedy": np.array(right, dtype=bool)}
    >>> compared = compare(greedy(1, 1, 1, 0), greedy(0, 0, 1, 1))
    >>> compared.gained, compared.lost, compared.differences["greedy"].value, compared.p_value
    ([0, 1], [3], 0.25, 1.0)
    """
    from scipy.stats import binomtest

    first, second = values["greedy"], others["greedy"]
    gained, lost = np.flatnonzero(first & ~second).tolist(), np.flatnonzero(~first & second).tolist()
    flips = len(gained) + len(lost)
    # If neither policy is better, an answer that flips is equally likely to flip in either direction.
    p_value = float(binomtest(len(gained), flips).pvalue) if flips else 1.0
    differences = {
        name: bootstrap(values[name].astype(float) - others[name], minimum=-1.0) for name in values
    }
    return Comparison(differences, p_value, gained, lost)
