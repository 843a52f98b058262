"""Draw the figures of hybrid-reward.md from the code itself: python docs/figures.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib
import torch
import tyro
from matplotlib import pyplot as plt

from src.grpo import compute_advantages
from src.hybrid_reward import clamp_scores, combine_hybrid_score, difficulty_weight, get_final_reward, get_our_final_reward

# In float64, so that the files are the same to the last digit on every machine.
HERE = Path(__file__).parent
RIGHT, WRONG, GREY = "#0b6e4f", "#b3391f", "#777777"
LOW, HIGH, EPS, ALPHA, BETA = -12.0, -1.0, 0.01, 0.5, 0.5  # bounds for the eye; the rest are train.py's defaults


def bands() -> plt.Figure:
    """r_hat against the reward model's score, held within the bounds and as the formula goes on outside."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    scores = torch.linspace(LOW - 5, HIGH + 5, 201, dtype=torch.float64)
    held, _ = clamp_scores(scores, LOW, HIGH)
    for verdict, colour, name in ((1.0, RIGHT, "right answer"), (0.0, WRONG, "any other")):
        verdicts = torch.full_like(scores, verdict)
        band = combine_hybrid_score(verdicts, held, LOW, HIGH, EPS, ALPHA, BETA)
        axes.fill_between(scores, band.min(), band.max(), color=colour, alpha=0.08, linewidth=0)
        axes.plot(scores, band, color=colour, label=name)
        axes.plot(scores, combine_hybrid_score(verdicts, scores, LOW, HIGH, EPS, ALPHA, BETA), ":", color=colour, linewidth=1)
    for bound, name in ((LOW, "min_rm"), (HIGH, "max_rm")):
        axes.axvline(bound, color=GREY, linewidth=0.8)
        axes.text(bound, -1.05, f" {name}", color=GREY)
    axes.set(xlabel="score of the reward model", ylabel="r_hat", ylim=(-1.2, 2.2))
    axes.legend(frameon=False, loc="upper left")
    return figure


def weights() -> plt.Figure:
    """The two weights, and the reward that the tanh weight makes of r_hat."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    difference = torch.linspace(-2, 2, 401, dtype=torch.float64)
    for k, style in ((1.0, ":"), (5.0, "-"), (20.0, "--")):
        left.plot(difference, difficulty_weight(0.0, difference, k=k), style, color=RIGHT, label=f"k = {k:g}")
    left.set(xlabel="sigma_u - sigma_bar", ylabel="sigmoid weight w", ylim=(0, 2.1))
    left.legend(frameon=False)
    r_hat = torch.linspace(-1, 1.5, 2001, dtype=torch.float64)
    reward = get_our_final_reward(r_hat, 0.0, 0.0)
    dip = int(reward.argmin())
    right.axhline(0, color=GREY, linewidth=0.6)
    right.plot(r_hat, get_final_reward(r_hat, 0.0, 0.0), "--", color=RIGHT, label="sigmoid, sigma_u = sigma_bar")
    right.plot(r_hat, reward, color=WRONG, label="tanh")
    right.plot(r_hat[dip], reward[dip], "o", color=WRONG)
    right.annotate(f"{r_hat[dip]:.3f}", (r_hat[dip], reward[dip]), (0, -14), textcoords="offset points", ha="center")
    right.set(xlabel="r_hat", ylabel="reward w r_hat", xlim=(-1, 1.2), ylim=(-1.0, 2.2))
    right.legend(frameon=False)
    return figure


def advantages() -> plt.Figure:
    """Two groups with one verdict each, under the three advantage scales: what a group's own std does to noise."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor(
        [3.0, 0.1], dtype=torch.float64
    )  # std of the scores: a group on which they differ, and one on which they hardly do
    scores = -6 + spread[:, None] * torch.randn(2, 8, generator=rng, dtype=torch.float64)  # (2 groups, 8 completions)
    verdicts = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 8)
    held, _ = clamp_scores(scores.flatten(), LOW, HIGH)
    r_hat = combine_hybrid_score(verdicts.flatten(), held, LOW, HIGH, EPS, ALPHA, BETA)
    sigma_u = held.view(2, 8).std(dim=1)
    rewards = get_final_reward(r_hat, sigma_u.mean(), sigma_u.repeat_interleave(8))
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.0), layout="constrained", sharey=True)
    for axis, scale in zip(axes, ("group", "batch", "none"), strict=True):
        values = compute_advantages(rewards, 8, scale).view(2, 8)
        for group, colour in ((0, WRONG), (1, RIGHT)):
            axis.bar(torch.arange(8) + 9 * group, values[group], color=colour)
        axis.axhline(0, color=GREY, linewidth=0.6)
        axis.set(
            title=f"--advantage-scale {scale}", xticks=(3.5, 12.5), xticklabels=("all wrong,\nscores differ", "all right,\nnoise")
        )
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
