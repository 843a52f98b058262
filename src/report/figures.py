"""Which metrics report.html draws as curves, in which section, and how to read each figure."""

from dataclasses import dataclass


@dataclass
class Panel:
    """A figure with the curves of some metrics over the steps."""

    title: str
    curves: dict[str, str]  # label -> metric
    reading: str  # how to read the figure
    share: bool = False  # whether the values are shares, shown in percent
    stacked: bool = False
    colors: tuple[str, ...] = ("s1", "s2", "s3", "s4")  # variables of style.css, one for each curve


LEARNING = "Does it learn?"
REWARD_MODEL = "Is the reward model any good?"
SIGNAL = "Is there anything to learn from?"

# The sections of the page, in order. drawing.py adds the figures that are more than curves.
PANELS = {
    LEARNING: [
        Panel(
            "Right answers during training",
            {"all completions": "reward/rule_mean", "not truncated": "completion/finished_rule_mean"},
            "Share of the sampled answers that the verifier judged right. Each step has different questions, "
            "so the curve is noisy.",
            share=True,
        ),
        Panel(
            "Reward",
            {"weighted reward": "reward/mean", "r_hat, before weighting": "reward/r_hat_mean"},
            "Mean over the completions of a step. If the reward rises but the share of right answers does "
            "not, the policy is pleasing the reward model instead of solving problems.",
        ),
    ],
    REWARD_MODEL: [
        Panel(
            "Scores outside the bounds",
            {"clamped": "reward/rm_clamped_frac"},
            "Share of scores beyond the warmup's bounds, where the reward no longer changes. If it is high, "
            "the run needs another warmup.",
            share=True,
        ),
    ],
    SIGNAL: [
        Panel(
            "Groups with a single verdict",
            {
                "all wrong": "reward/all_wrong_frac",
                "all right": "reward/all_right_frac",
                "no advantage": "reward/zero_std_frac",
            },
            "Share of questions whose completions are all wrong or all right, and of questions whose "
            "completions all earn the same reward and therefore teach nothing. The gap between these two "
            "shares is the contribution of the reward model.",
            share=True,
            colors=("wrong", "right", "ink"),
        ),
        Panel(
            "Spread of the scores in a group",
            {"this step": "reward/sigma_u_mean", "mean so far (sigma_bar)": "reward/sigma_bar"},
            "sigma_u is the standard deviation of the reward model's scores for one question. The sigmoid "
            "weight compares it with sigma_bar.",
        ),
        Panel(
            "Weight",
            {"mean weight": "reward/weight_mean"},
            "The factor that turns r_hat into the reward, between w_min and w_max.",
        ),
    ],
    "Is the policy healthy?": [
        Panel(
            "KL to the reference",
            {"KL": "policy/kl"},
            "Distance from the initial model, in nats per token. It grows as the policy learns; a sudden "
            "jump means that the policy is breaking down.",
        ),
        Panel(
            "Entropy",
            {"entropy": "policy/entropy"},
            "How uncertain the policy is about each token, in nats. Near 0, all completions are alike and "
            "learning stops.",
        ),
        Panel(
            "Length of completions",
            {"mean": "completion/len_mean", "longest": "completion/len_max"},
            "In tokens, including the stop token. The longest completion stays at the limit as long as any "
            "completion is truncated.",
        ),
        Panel(
            "Truncated completions",
            {"training": "completion/truncated_frac", "held-out": "eval/truncated_frac"},
            "Share of completions that reached the length limit before they ended. They seldom contain an "
            "answer.",
            share=True,
        ),
        Panel(
            "Final answer found",
            {"training": "verifier/extracted_frac", "held-out": "eval/extracted_frac"},
            "Share of completions in which the verifier finds a final answer, right or wrong.",
            share=True,
        ),
        Panel(
            "Clipped tokens",
            {"clipped": "policy/clip_frac"},
            "Share of tokens whose probability had already changed so much in this step that they received "
            "no further gradient.",
            share=True,
        ),
        Panel(
            "Gradient norm",
            {"before clipping": "policy/grad_norm"},
            "Mean over the updates of a step, before the gradient is scaled down to max_norm. Watch for "
            "spikes.",
        ),
    ],
    "Where does the time go?": [
        Panel(
            "Seconds per step",
            {"rollout": "time/rollout_s", "score": "time/score_s", "update": "time/update_s"},
            "The time for sampling, for verifying and scoring, and for training, stacked. The rest of a step "
            "is spent writing files.",
            stacked=True,
        ),
        Panel(
            "Sampled tokens per second",
            {"whole step": "time/tokens_per_s", "rollout only": "time/rollout_tokens_per_s"},
            "The rate falls as completions become shorter, because fewer tokens share the fixed cost of a "
            "step.",
        ),
    ],
}
