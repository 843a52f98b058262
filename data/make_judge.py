"""Train the bundled reward model (src/judge.py): python data/make_judge.py

SmolLM2-135M-Instruct with a LoRA adapter learns to answer questions of the kinds below directly, without
reasoning. The loss is the cross-entropy of the right answer, plus a Bradley-Terry loss between the
log-probabilities of the right answer and of a wrong one (a near miss, an operand, the result of another
operation, a random number). The judge is not trained on any expression from the test files in data/, not even
with its terms swapped.

The script writes data/embedded_judge/, a peft folder. It needs half an hour on two cores, and 4 GB of memory.
"""

import json
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data.make_arithmetic import WORDINGS
from src import hub, models
from src.engine.master_weights import MasterWeights
from src.engine.memory import keep_freed_memory
from src.judge import JUDGE_FOLDER, answer_log_probs, judge_text

HERE = Path(__file__).parent
WARMUP_STEPS = 20
STORIES = {
    "+": (
        "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
        "There are {a} {t} on the table and {b} in the box. How many {t} are there in all?",
        "{n} read {a} pages on Monday and {b} on Tuesday. How many pages did {n} read?",
        "{n} is {a} years old. How old will {n} be in {b} years?",
        "{n} has {a} {t}. A friend brings {b} more. How many {t} are there now?",
    ),
    "-": (
        "{n} had {a} {t} and gave {b} to a friend. How many {t} are left?",
        "There were {a} {t} in the shop and {b} were sold. How many {t} remain?",
        "{n} has {a} dollars and spends {b}. How many dollars does {n} have left?",
    ),
    "*": (
        "There are {a} boxes with {b} {t} in each box. How many {t} are there?",
        "A book costs {a} dollars. How many dollars do {b} books cost?",
        "{n} runs {a} kilometers a day. How many kilometers does {n} run in {b} days?",
    ),
    "+ -": (
        "A bus has {a} passengers. {b} get on and {c} get off. How many passengers are on the bus?",
        "{n} has {a} {t}, finds {b} and gives away {c}. How many {t} does {n} have now?",
    ),
    "/": (
        "{a} {t} are shared equally by {b} children. How many {t} does each child get?",
        "A rope of {a} meters is cut into {b} equal parts. How many meters long is each part?",
    ),
}
CARD = """A LoRA adapter (peft) that makes SmolLM2-135M-Instruct a judge of final answers in arithmetic. It is
the bundled reward model of this repository (see src/judge.py), trained by data/make_judge.py.
Apache-2.0, like SmolLM2.
"""
NAMES = ["Tom", "Anna", "Sara", "Ben", "Mia", "Leo", "Ella", "Sam"]
THINGS = ["apples", "pens", "cookies", "candies", "books", "marbles", "stickers", "cards"]


def held_out_expressions() -> set[str]:
    """All expressions in the test files, and the sums among them with their terms reversed."""
    held_out = set()
    for name in ("arithmetic_test.jsonl", "arithmetic_hard_test.jsonl"):
        for line in (HERE / name).read_text().splitlines():
            (found,) = re.findall(r"\d+(?: [-+*] \d+)+", json.loads(line)["question"])
            held_out |= {found, " + ".join(reversed(found.split(" + ")))}
    return held_out


def problem(rng: random.Random, held_out: set[str]) -> tuple[str, int, list[int]]:
    """A random question that is not held out, its answer, and the numbers in it."""
    while True:
        kind = rng.choice(
            ["easy", "easy", "sum", "difference", "product", "three", "three minus", "quotient"]
        )
        a, b, c = (rng.randint(10, 99) for _ in range(3))
        if kind == "easy":
            a, b = rng.randint(0, 24), rng.randint(0, 24)
            terms, sign, answer = [a, b], "+", a + b
        elif kind == "sum":
            terms, sign, answer = [a, b], "+", a + b
        elif kind == "difference":
            a = rng.randint(1, 99)
            b = rng.randint(0, a)
            terms, sign, answer = [a, b], "-", a - b
        elif kind == "product":
            b = rng.randint(2, 9)
            a = rng.choice([rng.randint(2, 12), a])
            terms, sign, answer = [a, b], "*", a * b
        elif kind == "quotient":
            b, answer = rng.randint(2, 10), rng.randint(1, 12)
            terms, sign = [b * answer, b], "/"
        else:
            if rng.random() < 0.2:
                a, b, c = (rng.randint(1, 9) for _ in range(3))
            sign = "+" if kind == "three" else "+ -"
            answer = a + b + c if kind == "three" else a + b - c
            terms = [a, b, c]
            if answer < 0:
                continue
        if len(terms) == 2:
            expression = f"{terms[0]} {sign} {terms[1]}"
        else:
            expression = f"{terms[0]} + {terms[1]} {'+' if kind == 'three' else '-'} {terms[2]}"
        if expression in held_out:
            continue
        if sign in STORIES and kind != "three" and rng.random() < 0.25:
            story = rng.choice(STORIES[sign])
            names = dict(zip("abc", terms, strict=False), n=rng.choice(NAMES), t=rng.choice(THINGS))
            return story.format(**names), answer, terms
        return rng.choice(WORDINGS).format(expression), answer, terms


def wrong_answer(rng: random.Random, answer: int, terms: list[int]) -> int:
    """A random wrong answer, mostly one that is easily mistaken for the right one."""
    while True:
        other = rng.choice(
            [
                answer + rng.choice([-2, -1, 1, 2]),
                answer + rng.choice([-20, -10, 10, 20]),
                answer + rng.randint(-9, 9),
                rng.choice(terms),
                terms[0] + terms[1],
                abs(terms[0] - terms[1]),
                terms[0] * terms[1],
                int(str(answer)[::-1]),
                rng.randint(0, 2 * answer + 10),
            ]
        )
        if other != answer and other >= 0:
            return other


def loss_and_ranking(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[tuple[str, int, list[int]]],
    rng: random.Random,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both losses of a batch of problems.

    Args:
        model: The judge in training.
        tokenizer: Its tokenizer.
        problems: From `problem`.
        rng: Draws the wrong answers.

    Returns:
        Cross-entropy per token of the right answers, Bradley-Terry loss, and the share of problems whose
        right answer scores higher; all scalars.
    """
    texts = [judge_text(tokenizer, question, str(answer)) for question, answer, _ in problems]
    texts += [
        judge_text(tokenizer, question, str(wrong_answer(rng, answer, terms)))
        for question, answer, terms in problems
    ]
    scores, lengths = answer_log_probs(model, texts)  # (2 x batch,) each
    right, wrong = scores.chunk(2)
    cross_entropy = (-right / lengths[: len(problems)]).mean()
    bradley_terry = -torch.nn.functional.logsigmoid(right - wrong).mean()
    return cross_entropy, bradley_terry, (right > wrong).float().mean()


def lr_factor(step: int, steps: int) -> float:
    """A step's learning rate as a fraction of the peak: a linear warmup times a half cosine from 1 to 0."""
    warmup = min((step + 1) / WARMUP_STEPS, 1.0)
    return warmup * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())


def main(
    steps: int = 700,
    batch: int = 24,
    rank: int = 8,
    lr: float = 1e-3,
    pair_weight: float = 0.5,
    seed: int = 0,
    output: Path = JUDGE_FOLDER,
) -> None:
    """Train the judge and save its adapter.

    Args:
        steps: Optimizer steps.
        batch: Problems per step.
        rank: Rank of the adapter.
        lr: Peak learning rate; see `lr_factor`.
        pair_weight: Weight of the Bradley-Terry loss; the cross-entropy has weight 1.
        seed: Seed of the problems and of the initial weights.
        output: Folder to write.
    """
    keep_freed_memory()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    held_out = held_out_expressions()
    folder = hub.embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = models.add_lora(model, rank)  # its weights are in the model's layers
    master = MasterWeights(model, models.pick_dtype(torch.device("cpu"), "auto"))
    optimizer = torch.optim.AdamW(master.parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    started = time.perf_counter()
    for step in range(steps):
        problems = [problem(rng, held_out) for _ in range(batch)]
        cross_entropy, bradley_terry, ranked = loss_and_ranking(model, tokenizer, problems, rng)
        (cross_entropy + pair_weight * bradley_terry).backward()
        torch.nn.utils.clip_grad_norm_(master.parameters, 1.0)
        master.step(optimizer)
        schedule.step()
        master.zero_grad()
        if step % 20 == 0 or step + 1 == steps:
            print(
                f"{step}: cross-entropy {cross_entropy:.3f}, pairs {bradley_terry:.3f}, "
                f"ranked right {100 * ranked:.0f}%, {(time.perf_counter() - started) / 60:.1f} min",
                flush=True,
            )
    adapter.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    adapter.to(torch.bfloat16).save_pretrained(str(output), save_embedding_layers=False)
    (output / "README.md").write_text(CARD)
    print(f"saved {output}")


if __name__ == "__main__":
    tyro.cli(main)
