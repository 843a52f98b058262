"""Which metrics report.html draws as curves, under which question, and how each figure is to be read."""

from dataclasses import dataclass


@dataclass
class Panel:
    """Curves of some metrics over the steps."""

    title: str
    curves: dict[str, str]  # what the key calls it: metric
    reading: str  # one sentence: how to read it
    share: bool = False
    stacked: bool = False
    colours: tuple[str, ...] = ("s1", "s2", "s3", "s4")  # variables of style.css


PANELS = {
    "Does it learn?": [
        Panel(
            "Right answers while training",
            {"all completions": "reward/rule_mean", "those not cut off": "completion/finished_rule_mean"},
            "Share of sampled answers that the verifier found right. New questions in each step, so it is noisy.",
            share=True,
        ),
        Panel(
            "Reward",
            {"weighted reward": "reward/mean", "r_hat, before the weight": "reward/r_hat_mean"},
            "Mean over the completions of a step. If it rises and right answers do not, the reward model is being pleased.",
        ),
    ],
    "Is there something to learn from?": [
        Panel(
            "Groups of one verdict",
            {"all wrong": "reward/all_wrong_frac", "all right": "reward/all_right_frac", "no advantage": "reward/zero_std_frac"},
            "Share of questions whose completions all have one verdict, and of those that all earn the same and so teach "
            "nothing; the gap between the two is what the reward model adds.",
            share=True,
            colours=("wrong", "right", "ink"),
        ),
        Panel(
            "Spread of the scores in a group",
            {"this step": "reward/sigma_u_mean", "mean so far (sigma_bar)": "reward/sigma_bar"},
            "sigma_u, the std of the reward model's scores for one question; the sigmoid weight compares it with sigma_bar.",
        ),
        Panel("Weight", {"mean weight": "reward/weight_mean"}, "The factor between r_hat and the reward, from w_min to w_max."),
    ],
    "Is the policy well?": [
        Panel(
            "KL to the reference",
            {"KL": "policy/kl"},
            "Distance from the model as it was loaded, nats a token. Grows as it learns; a jump means that it breaks.",
        ),
        Panel(
            "Entropy",
            {"entropy": "policy/entropy"},
            "How open the choice of a token is, nats. Near 0 all completions are alike and learning ends.",
        ),
        Panel(
            "Length of completions",
            {"mean": "completion/len_mean", "longest": "completion/len_max"},
            "Tokens, the stop token included. The longest lies at the limit as long as some are cut off.",
        ),
        Panel(
            "Cut off by the length limit",
            {"while training": "completion/truncated_frac", "held-out": "eval/truncated_frac"},
            "Share of completions that had not ended. They seldom hold an answer.",
            share=True,
        ),
        Panel(
            "Final answer found",
            {"while training": "verifier/extracted_frac", "held-out": "eval/extracted_frac"},
            "Share of completions in which the verifier can read an answer at all, right or wrong.",
            share=True,
        ),
        Panel(
            "Clipped tokens",
            {"clipped": "policy/clip_frac"},
            "Share of tokens that had already moved so far in this step that they earned no more gradient.",
            share=True,
        ),
        Panel(
            "Gradient norm",
            {"before clipping": "policy/grad_norm"},
            "Mean over the updates of a step, before it is scaled down to max_norm. Watch for spikes.",
        ),
    ],
    "Where does the time go?": [
        Panel(
            "Seconds of a step",
            {"rollout": "time/rollout_s", "score": "time/score_s", "update": "time/update_s"},
            "Sampling, judging and scoring, and training, on top of each other; the rest is writing.",
            stacked=True,
        ),
        Panel(
            "Sampled tokens per second",
            {"whole step": "time/tokens_per_s", "rollout alone": "time/rollout_tokens_per_s"},
            "Falls as completions become shorter: fewer tokens share a step's fixed cost.",
        ),
    ],
}

SCORES = Panel(
    "Scores outside the bounds",
    {"held at a bound": "reward/rm_clamped_frac"},
    "Share of scores beyond the warmup's bounds. Beyond them the reward no longer grows; a high share asks for another warmup.",
    share=True,
)
