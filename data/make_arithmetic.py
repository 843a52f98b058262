"""Write the arithmetic problems beside this file, the same ones each time: python data/make_arithmetic.py

arithmetic_{train,test}.jsonl: sums of two different numbers up to 24, of which the embedded model answers a quarter at first.
arithmetic_hard_{train,test}.jsonl: two-digit sums and products and three terms, where it begins near none. No expression of a
test file is in its train file in any wording; of the easy files no sum in the other order either, of the hard ones 3 of 200 are.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
WORDINGS = ("What is {}?", "Calculate {}.", "{} =", "How much is {}?", "Solve: {}")
TRAIN, TEST = 2000, 200


def easy_problems(rng: random.Random) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sums of numbers up to 24, as (train, test); a + b and b + a are on the same side.

    Training has each in every wording. The test has each in one, so that its 200 answers are of 100 different pairs: the
    same sum in several wordings is right or wrong together, which would leave far fewer independent answers.
    """
    pairs = [(a, b) for a in range(25) for b in range(a + 1, 25)]
    rng.shuffle(pairs)
    worded = lambda pair, wording: [(wording.format(f"{a} + {b}"), a + b) for a, b in (pair, pair[::-1])]  # noqa: E731
    held_out = TEST // 2
    test = [problem for pair in pairs[:held_out] for problem in worded(pair, rng.choice(WORDINGS))]
    train = [problem for pair in pairs[held_out:] for wording in WORDINGS for problem in worded(pair, wording)]
    rng.shuffle(test)
    rng.shuffle(train)
    return train, test


def hard_expressions(rng: random.Random) -> list[tuple[str, int]]:
    """Random two-digit sums and products and sums and differences of three two-digit terms, each once."""
    found: dict[str, int] = {}
    while len(found) < TRAIN + TEST:
        a, b, c = (rng.randint(10, 99) for _ in range(3))
        kind = rng.randrange(4)
        if kind == 0:
            found[f"{a} + {b}"] = a + b
        elif kind == 1:
            found[f"{a} * {c % 7 + 3}"] = a * (c % 7 + 3)
        elif kind == 2:
            found[f"{a} + {b} + {c}"] = a + b + c
        elif a + b >= c:
            found[f"{a} + {b} - {c}"] = a + b - c
    return list(found.items())


def write(name: str, problems: list[tuple[str, int]]) -> None:
    lines = [json.dumps({"question": question, "answer": str(answer)}) for question, answer in problems]
    (HERE / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    rng = random.Random(0)
    train, test = easy_problems(rng)
    write("arithmetic_train.jsonl", train[:TRAIN])
    write("arithmetic_test.jsonl", test)
    hard = [(rng.choice(WORDINGS).format(expression), answer) for expression, answer in hard_expressions(rng)]
    write("arithmetic_hard_test.jsonl", hard[:TEST])
    write("arithmetic_hard_train.jsonl", hard[TEST:])


if __name__ == "__main__":
    main()
