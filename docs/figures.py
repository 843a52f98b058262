"""Draw the figures of hybrid-reward.md with the functions that training uses: python docs/figures.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib
import torch
import tyro
from matplotlib import pyplot as plt

from src.grpo import compute_advantages
from src.hybrid_reward import (
    clamp_scores,
    combine_hybrid_score,
    difficulty_weight,
    get_final_reward,
    get_our_final_reward,
)

HERE = Path(__file__).parent
RIGHT, WRONG, GRAY = "#0b6e4f", "#b3391f", "#777777"
# The bounds are chosen to look clear. All other settings are the defaults of train.py.
LOW, HIGH, EPS, ALPHA, BETA = -12.0, -1.0, 0.01, 0.5, 0.5

# All tensors are float64, so that the SVG files are identical on every machine.


def bands() -> plt.Figure:
    """Plot r_hat against the reward model's score, clamped to the bounds and, dotted, by the bare formula."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    scores = torch.linspace(LOW - 5, HIGH + 5, 201, dtype=torch.float64)
    clamped, _ = clamp_scores(scores, LOW, HIGH)
    for verdict, color, name in ((1.0, RIGHT, "right answer"), (0.0, WRONG, "any other")):
        verdicts = torch.full_like(scores, verdict)
        band = combine_hybrid_score(verdicts, clamped, LOW, HIGH, EPS, ALPHA, BETA)
        unclamped = combine_hybrid_score(verdicts, scores, LOW, HIGH, EPS, ALPHA, BETA)
        axes.fill_between(scores, band.min(), band.max(), color=color, alpha=0.08, linewidth=0)
        axes.plot(scores, band, color=color, label=name)
        axes.plot(scores, unclamped, ":", color=color, linewidth=1)
    for bound, name in ((LOW, "min_rm"), (HIGH, "max_rm")):
        axes.axvline(bound, color=GRAY, linewidth=0.8)
        axes.text(bound, -1.05, f" {name}", color=GRAY)
    axes.set(xlabel="score of the reward model", ylabel="r_hat", ylim=(-1.2, 2.2))
    axes.legend(frameon=False, loc="upper left")
    return figure


def weights() -> plt.Figure:
    """Plot the sigmoid weight, and the rewards that both weights lead to."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    difference = torch.linspace(-2, 2, 401, dtype=torch.float64)
    for k, style in ((1.0, ":"), (5.0, "-"), (20.0, "--")):
        weight = difficulty_weight(0.0, difference, w_min=0.5, w_max=2.0, k=k)
        left.plot(difference, weight, style, color=RIGHT, label=f"k = {k:g}")
    left.set(xlabel="sigma_u - sigma_bar", ylabel="sigmoid weight w", ylim=(0, 2.1))
    left.legend(frameon=False)
    r_hat = torch.linspace(-1, 1.5, 2001, dtype=torch.float64)
    sigma = torch.zeros_like(r_hat)
    sigmoid_reward = get_final_reward(r_hat, sigma, sigma)
    tanh_reward = get_our_final_reward(r_hat, 0.0, 0.0)
    dip = int(tanh_reward.argmin())
    lowest = r_hat[dip], tanh_reward[dip]
    right.axhline(0, color=GRAY, linewidth=0.6)
    right.plot(r_hat, sigmoid_reward, "--", color=RIGHT, label="sigmoid, sigma_u = sigma_bar")
    right.plot(r_hat, tanh_reward, color=WRONG, label="tanh")
    right.plot(*lowest, "o", color=WRONG)
    right.annotate(f"{r_hat[dip]:.3f}", lowest, (0, -14), textcoords="offset points", ha="center")
    right.set(xlabel="r_hat", ylabel="reward w r_hat", xlim=(-1, 1.2), ylim=(-1.0, 2.2))
    right.legend(frameon=False)
    return figure


def advantages() -> plt.Figure:
    """Plot the advantages of two groups, each with a single verdict, under the three scales.

    The scores of the first group differ, and those of the second hardly do. Dividing by a group's own std
    amplifies the second group's noise.
    """
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([3.0, 0.1], dtype=torch.float64)  # (2,) std of each group's scores
    noise = torch.randn(2, 8, generator=rng, dtype=torch.float64)  # 2 groups of 8 completions
    scores = -6 + spread[:, None] * noise
    verdicts = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 8)
    clamped, _ = clamp_scores(scores.flatten(), LOW, HIGH)
    r_hat = combine_hybrid_score(verdicts.flatten(), clamped, LOW, HIGH, EPS, ALPHA, BETA)
    sigma_u = clamped.view(2, 8).std(dim=1)
    rewards = get_final_reward(r_hat, sigma_u.mean(), sigma_u.repeat_interleave(8))
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.0), layout="constrained", sharey=True)
    for axis, scale in zip(axes, ("group", "batch", "none"), strict=True):
        values = compute_advantages(rewards, 8, scale).view(2, 8)
        for group, color in ((0, WRONG), (1, RIGHT)):
            axis.bar(torch.arange(8) + 9 * group, values[group], color=color)
        axis.axhline(0, color=GRAY, linewidth=0.6)
        labels = ("all wrong,\nscores differ", "all right,\nnoise")
        axis.set(title=f"--advantage-scale {scale}", xticks=(3.5, 12.5), xticklabels=labels)
    axes[0].set_ylabel("advantage")
    return figure


def main(output: Path = HERE) -> None:
    """Write bands.svg, weights.svg and advantages.svg.

    Args:
        output: Folder to write to.
    """
    matplotlib.use("svg")
    plt.rcParams |= {
        "svg.hashsalt": "hybrid-reward", "svg.fonttype": "none", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False,
        "savefig.facecolor": "white",
    }  # fmt: skip
    for draw in (bands, weights, advantages):
        draw().savefig(output / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    tyro.cli(main)
