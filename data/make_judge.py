"""Train the embedded reward model (src/judge.py): python data/make_judge.py

SmolLM2-135M-Instruct with a LoRA adapter learns to answer questions of the kinds below at once. Loss: cross-entropy of the right
answer, plus Bradley-Terry between the log-probabilities of the right answer and of a wrong one (near misses, operands, other
operations, random numbers). No expression of a test file of data/ is trained on in either order.
Writes data/embedded_judge/, a peft folder. Half an hour on two cores, 4 GB of memory.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.make_arithmetic import WORDINGS
from src import models
from src.judge import JUDGE_FOLDER, answer_log_probs, judge_text
from src.master_weights import MasterWeights
from src.memory import keep_freed_memory

HERE = Path(__file__).parent
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
CARD = """A LoRA adapter (peft) that makes SmolLM2-135M-Instruct a judge of final answers to arithmetic questions, the embedded
reward model of this repository: see src/judge.py. Made by data/make_judge.py. Apache-2.0, as SmolLM2 is.
"""
NAMES = ["Tom", "Anna", "Sara", "Ben", "Mia", "Leo", "Ella", "Sam"]
THINGS = ["apples", "pens", "cookies", "candies", "books", "marbles", "stickers", "cards"]


def held_out_expressions() -> set[str]:
    """Every expression of the test files, and each sum in the other order."""
    held_out = set()
    for name in ("arithmetic_test.jsonl", "arithmetic_hard_test.jsonl"):
        for line in (HERE / name).read_text().splitlines():
            (found,) = re.findall(r"\d+(?: [-+*] \d+)+", json.loads(line)["question"])
            held_out |= {found, " + ".join(reversed(found.split(" + ")))}
    return held_out


def problem(rng: random.Random, held_out: set[str]) -> tuple[str, int, list[int]]:
    """A question, its answer, and the numbers in it."""
    while True:
        kind = rng.choice(["easy", "easy", "sum", "difference", "product", "three", "three minus", "quotient"])
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
    """Mostly one that is easily mistaken for the right one."""
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


def main(
    steps: int = 700, batch: int = 24, rank: int = 8, lr: float = 1e-3, pair_weight: float = 0.5, seed: int = 0,
    output: Path = JUDGE_FOLDER,
) -> None:  # fmt: skip
    """Train the judge and save its adapter.

    Args:
        steps: Optimizer steps.
        batch: Problems a step.
        rank: Of the adapter.
        lr: Highest learning rate; it falls to 0 in a half cosine after 20 steps of warmup.
        pair_weight: Weight of the Bradley-Terry loss beside the cross-entropy.
        seed: Of problems and initial weights.
        output: Folder to write.
    """
    keep_freed_memory()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    held_out = held_out_expressions()
    folder = models.embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = models.add_lora(model, rank)  # lives in the model's layers
    master = MasterWeights(model, models.pick_dtype(torch.device("cpu"), "auto"))
    optimizer = torch.optim.AdamW(master.parameters, lr=lr, weight_decay=0.0)
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 1.0) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item()),
    )
    started = time.perf_counter()
    for step in range(steps):
        problems = [problem(rng, held_out) for _ in range(batch)]
        texts = [judge_text(tokenizer, q, str(answer)) for q, answer, _ in problems]
        texts += [judge_text(tokenizer, q, str(wrong_answer(rng, answer, terms))) for q, answer, terms in problems]
        scores, lengths = answer_log_probs(model, texts)  # (2 x batch,) each
        right, wrong = scores.chunk(2)
        cross_entropy = (-right / lengths[:batch]).mean()
        pairs = -torch.nn.functional.logsigmoid(right - wrong).mean()
        (cross_entropy + pair_weight * pairs).backward()
        master.accumulate_gradients()
        torch.nn.utils.clip_grad_norm_(master.parameters, 1.0)
        optimizer.step()
        schedule.step()
        master.write_back()
        master.release_gradients()
        if step % 20 == 0 or step + 1 == steps:
            ranked = (right > wrong).float().mean()
            print(
                f"{step}: cross-entropy {cross_entropy:.3f}, pairs {pairs:.3f}, ranked right {100 * ranked:.0f} %, "
                f"{(time.perf_counter() - started) / 60:.1f} min",
                flush=True,
            )
    adapter.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    adapter.to(torch.bfloat16).save_pretrained(str(output), save_embedding_layers=False)
    (output / "README.md").write_text(CARD)
    print(f"saved {output}")


if __name__ == "__main__":
    tyro.cli(main)
