"""Time to accuracy, here and in TRL's GRPOTrainer: python benchmarks/learning.py [--help]

The embedded model learns sums (data/arithmetic_*.jsonl) from the verifier's verdict alone, with the same problems, prompts, group
size, prompts a step, optimizer steps, learning rate, clipping, temperature, lengths and seeds, and no KL term. One piece of code
evaluates both: greedy answers of the policy rounded to bfloat16. The clock begins with the first step and stands still meanwhile.

- ours: train.py.
- trl: GRPOTrainer, float32 weights that compute in bfloat16 by autocast, as it comes; but without gradient checkpointing, which
  this model has no need of and which would make it slower.

Runs are taken one after the other, seed by seed, and go to output/learning/; each needs the machine for itself. One that is there
is not repeated, one that was stopped midway begins again: the script can be stopped at any time. The curves are written to
benchmarks/learning.json and drawn in benchmarks/learning.svg.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from src.run_log import environment  # noqa: E402

TRAIN, TEST = "data/arithmetic_train.jsonl", "data/arithmetic_test.jsonl"
Q, G, TRAIN_BATCH, LIMIT, LR, EVERY = 8, 8, 32, 48, 2e-5, 2
UPDATES = Q * G // TRAIN_BATCH  # optimizer steps of a step
COLORS = {"ours": "#2a78d6", "trl": "#d9822b"}
LABELS = {"ours": "this project", "trl": "TRL"}


# ----------------------------------------------------------------------------------------------------------------------
# The programs. Each writes curve.jsonl: steps done, minutes of training, held-out accuracy.


def ours(folder: Path, seed: int, steps: int) -> None:
    """train.py, with flags alone."""
    flags = f"""--model-name embedded --reward-mode verifier --data {TRAIN} --eval-data {TEST}
        --eval-interval {EVERY} --max-steps {steps} --rollouts-per-step {Q} --group-size {G} --train-batch-size {TRAIN_BATCH}
        --micro-batch-size {TRAIN_BATCH} --max-new-tokens {LIMIT} --temperature 1.0 --kl-weight 0 --lr {LR}
        --lr-schedule linear --checkpoint-interval {steps} --seed {seed}"""
    command = [sys.executable, "train.py", *flags.split(), "--output", str(folder), "--run-name", "run"]
    subprocess.run(command, cwd=ROOT, check=True)
    minutes, points = 0.0, []
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval/accuracy" in row:
            points.append({"step": row["step"], "minutes": minutes, "accuracy": row["eval/accuracy"]})
        minutes += row.get("time/step_s", 0.0) / 60
    shutil.rmtree(folder / "run" / f"step_{steps}")  # 1.8 GB that nobody reads
    (folder / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def trl(folder: Path, seed: int, steps: int) -> None:
    """TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from src import models
    from src.math_verifier import MathVerifier
    from train import read_prompts

    verifier = MathVerifier()

    def reward(prompts, completions, answer, **_):
        texts = [c[0]["content"] for c in completions]
        return [float(v["correct"]) for v in verifier.verify_batch([p[0]["content"] for p in prompts], texts, answer)]

    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in read_prompts(TRAIN, "--data")]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), seed=seed, use_cpu=True, bf16=True, gradient_checkpointing=False, num_generations=G,
        per_device_train_batch_size=G, gradient_accumulation_steps=TRAIN_BATCH // G, steps_per_generation=Q,
        max_completion_length=LIMIT, temperature=1.0, beta=0.0, scale_rewards="batch", epsilon=0.2, max_grad_norm=1.0,
        learning_rate=LR, lr_scheduler_type="linear", weight_decay=0.0, max_steps=steps * UPDATES, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        models.resolve("embedded", "--model-name"), reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=models.load_tokenizer("embedded"), callbacks=[curve(folder / "part.jsonl", evaluator(verifier))],
    )  # fmt: skip
    trainer.train()
    (folder / "part.jsonl").rename(folder / "curve.jsonl")


def evaluator(verifier) -> Callable:
    """A function from a model in float32 to its held-out accuracy, found as train.py finds it."""
    import torch

    from src import models
    from src.evaluation import answer, answer_metrics
    from src.master_weights import MasterWeights
    from train import encode_prompts, read_prompts, texts_of

    tokenizer, test = models.load_tokenizer("embedded"), read_prompts(TEST, "--eval-data")
    prompt_ids = encode_prompts(tokenizer, test, None, 512)
    policy = models.load_policy("embedded", torch.device("cpu")).requires_grad_(False)
    MasterWeights(policy, torch.bfloat16)  # rounds it as training does; there is nothing to train
    stop_ids = models.stop_token_ids(policy, tokenizer)

    @torch.no_grad()
    def accuracy(model) -> float:
        for ours, theirs in zip(policy.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
        answered = answer(
            policy, tokenizer, verifier, *texts_of(test), prompt_ids, 1, Q * G, temperature=0.0, top_p=1.0, generator=None,
            max_length=512, max_new_tokens=LIMIT, stop_ids=stop_ids, pad_id=stop_ids[0],
        )  # fmt: skip
        return answer_metrics(answered, "flexible")["eval/accuracy"]

    return accuracy


def curve(target: Path, accuracy: Callable):
    """A callback of the trainer that writes a line every EVERY steps, and stops the clock meanwhile."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        minutes, since = 0.0, 0.0

        def on_train_begin(self, args, state, control, model=None, **_):
            self.point(0, model)

        def on_step_end(self, args, state, control, model=None, **_):
            step, rest = divmod(state.global_step, UPDATES)
            if rest == 0 and step % EVERY == 0:
                self.minutes += (time.perf_counter() - self.since) / 60
                self.point(step, model)

        def point(self, step, model):
            point = {"step": step, "minutes": self.minutes, "accuracy": accuracy(model)}
            print(point, flush=True)
            with target.open("a") as file:
                file.write(json.dumps(point) + "\n")
            self.since = time.perf_counter()

    return Curve()


PROGRAMS = {"ours": ours, "trl": trl}


# ----------------------------------------------------------------------------------------------------------------------
# What comes of it


def minutes_to(curve: list[dict], accuracy: float) -> float | None:
    """Minutes of training after which a curve has first reached an accuracy, or None."""
    return next((point["minutes"] for point in curve if point["accuracy"] >= accuracy), None)


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """Mean minutes and accuracy of several seeds, and the accuracies' std (n - 1), by step."""
    points = []
    for together in zip(*curves, strict=True):
        accuracies = [point["accuracy"] for point in together]
        points.append(
            {
                "step": together[0]["step"],
                "minutes": float(np.mean([point["minutes"] for point in together])),
                "accuracy": float(np.mean(accuracies)),
                "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0,
            }
        )
    return points


def draw(curves: dict[str, list[list[dict]]], target: Path) -> None:
    """Accuracy against steps and against minutes: each seed thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    labels = {"step": f"steps of {Q} x {G} completions", "minutes": "minutes of training, two CPU cores"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, of_seeds in curves.items():
            for curve in of_seeds:
                axis.plot([p[key] for p in curve], [100 * p["accuracy"] for p in curve], color=COLORS[name], alpha=0.3, lw=1)
            mean = mean_curve(of_seeds)
            axis.plot([p[key] for p in mean], [100 * p["accuracy"] for p in mean], color=COLORS[name], lw=2.2, label=LABELS[name])
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out accuracy, %")
    axes[1].legend(loc="lower right", frameon=False)
    plt.rcParams["svg.hashsalt"] = "learning"
    figure.savefig(target, metadata={"Date": None})


def train_one(folder: Path, name: str, seed: int, steps: int) -> None:
    """Train what is not there yet."""
    if (folder / "curve.jsonl").exists():
        return
    print(f"{folder.name}: training...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = environment() | {"trl": version("trl"), "cores": os.cpu_count()}
    (folder / "environment.json").write_text(json.dumps(about) + "\n")
    command = [sys.executable, __file__, "--worker", name, str(folder), str(seed), str(steps)]
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def show(means: dict[str, list[dict]]) -> None:
    """Accuracy before, halfway and after, mean ± std."""
    steps = [point["step"] for point in next(iter(means.values()))]
    halfway = len(steps) // 2
    table = Table("", "before", f"after {steps[halfway]} steps", f"after {steps[-1]} steps", "minutes")
    share = lambda point: f"{100 * point['accuracy']:.1f} ± {100 * point['std']:.1f} %"  # noqa: E731
    for name, mean in means.items():
        table.add_row(LABELS[name], *(share(mean[i]) for i in (0, halfway, -1)), f"{mean[-1]['minutes']:.1f}")
    Console(width=100).print(table)


def race(ours: list[dict], trl: list[dict], label: str) -> dict:
    """Who reaches TRL's final accuracy when."""
    goal = trl[-1]["accuracy"]
    here, there = minutes_to(ours, goal), minutes_to(trl, goal)
    said = f"here in {here:.1f}, {there / here:.1f} times sooner" if here and there else "not reached here"
    print(f"{label}: TRL's final {100 * goal:.1f} % first in {there:.1f} minutes there, {said}")
    return {"of": label, "accuracy": goal, "minutes": {"ours": here, "trl": there}}


def main(
    programs: tuple[Literal["ours", "trl"], ...] = ("ours", "trl"),
    seeds: tuple[int, ...] = (42, 43, 44),
    steps: int = 20,
    output: Path = ROOT / "output" / "learning",
    result: Path = ROOT / "benchmarks" / "learning.json",
    picture: Path = ROOT / "benchmarks" / "learning.svg",
) -> None:
    """Train what is not there yet, then print the table, write the curves and draw them.

    Args:
        programs: Which to compare.
        seeds: Of the order of the problems and of the samples.
        steps: Of 64 completions, with two optimizer steps each.
        output: Folder of the runs.
        result: File for the curves as JSON.
        picture: File for the figure.
    """
    curves: dict[str, list[list[dict]]] = {name: [] for name in programs}
    environments = {}
    for seed in seeds:
        for name in programs:
            folder = output.resolve() / f"{name}-{steps}-{seed}"
            train_one(folder, name, seed, steps)
            curves[name].append([json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()])
            environments[folder.name] = json.loads((folder / "environment.json").read_text())
    means = {name: mean_curve(of_seeds) for name, of_seeds in curves.items()}
    show(means)
    races = []
    if {"ours", "trl"} <= set(programs):
        races = [race(a, b, f"seed {seed}") for seed, a, b in zip(seeds, curves["ours"], curves["trl"], strict=True)]
        races.append(race(means["ours"], means["trl"], "mean curves"))
    about = {"environments": environments, "curves": curves, "means": means, "to_final_accuracy_of_trl": races}
    result.write_text(json.dumps(about, indent=1) + "\n")
    draw(curves, picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        os.chdir(ROOT)
        PROGRAMS[sys.argv[2]](Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        tyro.cli(main)
