"""Time to accuracy, here and in TRL's GRPOTrainer: python benchmarks/learning.py [--help]

The bundled model learns sums (data/arithmetic_*.jsonl) from only the verifier's verdict, without a KL term.
Both programs get the same problems, prompts, group size, prompts per step, optimizer steps, learning rate,
clipping, temperature, lengths and seeds. The same code evaluates both, on greedy answers of the policy
rounded to bfloat16. The clock starts with the first step and is stopped during evaluations.

- ours: train.py.
- trl: GRPOTrainer with its defaults: float32 weights, computing in bfloat16 through autocast. Only gradient
  checkpointing is switched off, because this model does not need it and it would be slower.

The runs take place one after another, seed by seed, and go to output/learning/. Each needs the machine to
itself. The script can be stopped at any time: when it is started again, it skips the runs that are finished,
and repeats the one that was interrupted. It writes the curves to benchmarks/learning.json and draws them in
benchmarks/learning.svg.
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

from src.run.log import environment  # noqa: E402

TRAIN, TEST = "data/arithmetic_train.jsonl", "data/arithmetic_test.jsonl"
Q, G, TRAIN_BATCH, LIMIT, LR, EVAL_INTERVAL = 8, 8, 32, 48, 2e-5, 2
UPDATES = Q * G // TRAIN_BATCH  # optimizer steps per step
MAX_LENGTH = 512  # tokens of prompt + completion
COLORS = {"ours": "#2a78d6", "trl": "#d9822b"}
LABELS = {"ours": "this project", "trl": "TRL"}


# ----------------------------------------------------------------------------------------------------------
# The programs. Each writes curve.jsonl: steps done, minutes of training, held-out accuracy.


def ours(folder: Path, seed: int, steps: int) -> None:
    """train.py, run with flags."""
    flags = f"""--model-name embedded --reward-mode verifier --data {TRAIN} --eval-data {TEST}
        --eval-interval {EVAL_INTERVAL} --max-steps {steps} --rollouts-per-step {Q} --group-size {G}
        --train-batch-size {TRAIN_BATCH} --micro-batch-size {TRAIN_BATCH} --max-new-tokens {LIMIT}
        --temperature 1.0 --kl-weight 0 --lr {LR} --lr-schedule linear --checkpoint-interval {steps}
        --seed {seed}"""
    command = [sys.executable, "train.py", *flags.split(), "--output", str(folder), "--run-name", "run"]
    subprocess.run(command, cwd=ROOT, check=True)
    minutes, points = 0.0, []
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval/accuracy" in row:
            points.append({"step": row["step"], "minutes": minutes, "accuracy": row["eval/accuracy"]})
        minutes += row.get("time/step_s", 0.0) / 60
    shutil.rmtree(folder / "run" / f"step_{steps}")  # 1.8 GB that is not needed
    (folder / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def trl(folder: Path, seed: int, steps: int) -> None:
    """TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from src import hub, models
    from src.math_verifier import MathVerifier
    from src.problems import read_problems

    verifier = MathVerifier()

    def reward(prompts, completions, answer, **_):
        questions, texts = [p[0]["content"] for p in prompts], [c[0]["content"] for c in completions]
        return [float(v["correct"]) for v in verifier.verify_batch(questions, texts, answer)]

    rows = [
        {"prompt": [{"role": "user", "content": p.question}], "answer": p.answer}
        for p in read_problems(TRAIN, "--data")
    ]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), seed=seed, use_cpu=True, bf16=True, gradient_checkpointing=False,
        num_generations=G, per_device_train_batch_size=G, gradient_accumulation_steps=TRAIN_BATCH // G,
        steps_per_generation=Q, max_completion_length=LIMIT, temperature=1.0, beta=0.0, scale_rewards="batch",
        epsilon=0.2, max_grad_norm=1.0, learning_rate=LR, lr_scheduler_type="linear", weight_decay=0.0,
        max_steps=steps * UPDATES, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    partial_curve = folder / "part.jsonl"  # renamed when it is complete
    trainer = GRPOTrainer(
        hub.resolve("embedded", "--model-name"), reward_funcs=reward, args=config,
        train_dataset=Dataset.from_list(rows), processing_class=models.load_tokenizer("embedded"),
        callbacks=[curve_callback(partial_curve, make_evaluator(verifier))],
    )  # fmt: skip
    trainer.train()
    partial_curve.rename(folder / "curve.jsonl")


def make_evaluator(verifier) -> Callable:
    """Make a function from a model in float32 to its held-out accuracy, measured as train.py measures it."""
    import torch

    from src import models
    from src.engine.master_weights import MasterWeights
    from src.engine.memory import BatchSize
    from src.engine.sampler import Sampling
    from src.evaluation import evaluate
    from src.problems import read_problems, with_prompts

    tokenizer = models.load_tokenizer("embedded")
    problems = with_prompts(read_problems(TEST, "--eval-data"), tokenizer, None, MAX_LENGTH)
    policy = models.load_policy("embedded", torch.device("cpu")).requires_grad_(False)
    MasterWeights(policy, torch.bfloat16)  # rounds the weights as training does; nothing is trained
    stop_ids = models.stop_token_ids(policy, tokenizer)
    sampling = Sampling(
        temperature=0.0, top_p=1.0, max_length=MAX_LENGTH, max_new_tokens=LIMIT, stop_ids=stop_ids
    )

    @torch.no_grad()
    def accuracy(model) -> float:
        for ours, theirs in zip(policy.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
        metrics = evaluate(policy, tokenizer, verifier, problems, sampling, BatchSize(Q * G))
        return metrics["eval/accuracy"]

    return accuracy


def curve_callback(target: Path, accuracy: Callable):
    """A trainer callback that writes a line every EVAL_INTERVAL steps, and stops the clock meanwhile."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        minutes, since = 0.0, 0.0

        def on_train_begin(self, args, state, control, model=None, **_):
            self.write_point(0, model)

        def on_step_end(self, args, state, control, model=None, **_):
            step, rest = divmod(state.global_step, UPDATES)
            if rest == 0 and step % EVAL_INTERVAL == 0:
                self.minutes += (time.perf_counter() - self.since) / 60
                self.write_point(step, model)

        def write_point(self, step, model):
            point = {"step": step, "minutes": self.minutes, "accuracy": accuracy(model)}
            print(point, flush=True)
            with target.open("a") as file:
                file.write(json.dumps(point) + "\n")
            self.since = time.perf_counter()

    return Curve()


PROGRAMS = {"ours": ours, "trl": trl}


# ----------------------------------------------------------------------------------------------------------
# The results


def minutes_to(curve: list[dict], accuracy: float) -> float | None:
    """Minutes of training until a curve first reaches an accuracy, or None if it never does."""
    return next((point["minutes"] for point in curve if point["accuracy"] >= accuracy), None)


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """By step, the mean minutes and accuracy of several seeds, and the std (n - 1) of the accuracy."""
    points = []
    for seeds in zip(*curves, strict=True):  # the points of one step
        accuracies = [point["accuracy"] for point in seeds]
        points.append(
            {
                "step": seeds[0]["step"],
                "minutes": float(np.mean([point["minutes"] for point in seeds])),
                "accuracy": float(np.mean(accuracies)),
                "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0,
            }
        )
    return points


def draw(curves: dict[str, list[list[dict]]], target: Path) -> None:
    """Draw accuracy against steps and against minutes: a thin line per seed, a thick one for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    labels = {"step": f"steps of {Q} x {G} completions", "minutes": "minutes of training, two CPU cores"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, seeds in curves.items():
            lines: list[tuple[list[dict], dict]] = [(curve, dict(alpha=0.3, lw=1)) for curve in seeds]
            lines.append((mean_curve(seeds), dict(lw=2.2, label=LABELS[name])))
            for points, style in lines:
                x, y = [p[key] for p in points], [100 * p["accuracy"] for p in points]
                axis.plot(x, y, color=COLORS[name], **style)
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out accuracy, %")
    axes[1].legend(loc="lower right", frameon=False)
    plt.rcParams["svg.hashsalt"] = "learning"
    figure.savefig(target, metadata={"Date": None})


def train_one(folder: Path, name: str, seed: int, steps: int) -> None:
    """Run one program in a process of its own, unless its run is finished."""
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
    """Print a row per program: accuracy before training, halfway and at the end, as mean ± std."""
    steps = [point["step"] for point in next(iter(means.values()))]
    halfway = len(steps) // 2
    table = Table("", "before", f"after {steps[halfway]} steps", f"after {steps[-1]} steps", "minutes")
    share = lambda point: f"{100 * point['accuracy']:.1f} ± {100 * point['std']:.1f} %"  # noqa: E731
    for name, mean in means.items():
        table.add_row(LABELS[name], *(share(mean[i]) for i in (0, halfway, -1)), f"{mean[-1]['minutes']:.1f}")
    Console(width=100).print(table)


def race(ours: list[dict], trl: list[dict], label: str) -> dict:
    """Print and return when each program first reaches TRL's final accuracy."""
    goal = trl[-1]["accuracy"]
    here, there = minutes_to(ours, goal), minutes_to(trl, goal)
    assert there is not None  # its own last point
    reached = "this project does not reach it"
    if here:
        reached = f"this project reaches it in {here:.1f} minutes, {there / here:.1f}x faster"
    print(f"{label}: TRL first reaches its final {100 * goal:.1f} % in {there:.1f} minutes; {reached}")
    return {"of": label, "accuracy": goal, "minutes": {"ours": here, "trl": there}}


def main(
    programs: tuple[Literal["ours", "trl"], ...] = ("ours", "trl"),
    seeds: tuple[int, ...] = (42, 43, 44),
    steps: int = 20,
    output: Path = ROOT / "output" / "learning",
    result: Path = ROOT / "benchmarks" / "learning.json",
    picture: Path = ROOT / "benchmarks" / "learning.svg",
) -> None:
    """Do the runs that are missing, then print the table, write the curves and draw them.

    Args:
        programs: The programs to compare.
        seeds: Seeds of the order of the problems and of the samples; each is a run.
        steps: Steps per run, each with 64 completions and two optimizer steps.
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
            lines = (folder / "curve.jsonl").read_text().splitlines()
            curves[name].append([json.loads(line) for line in lines])
            environments[folder.name] = json.loads((folder / "environment.json").read_text())
    means = {name: mean_curve(runs) for name, runs in curves.items()}
    show(means)
    races = []
    if {"ours", "trl"} <= set(programs):
        pairs = zip(seeds, curves["ours"], curves["trl"], strict=True)
        races = [race(ours_, trl_, f"seed {seed}") for seed, ours_, trl_ in pairs]
        races.append(race(means["ours"], means["trl"], "mean curves"))
    about = {
        "environments": environments,
        "curves": curves,
        "means": means,
        "to_final_accuracy_of_trl": races,
    }
    result.write_text(json.dumps(about, indent=1) + "\n")
    draw(curves, picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        os.chdir(ROOT)
        PROGRAMS[sys.argv[2]](Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        tyro.cli(main)
