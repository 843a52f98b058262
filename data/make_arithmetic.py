"""Write the arithmetic problems next to this file, the same ones each time: python data/make_arithmetic.py

arithmetic_{train,test}.jsonl has sums of two different numbers up to 24. Before training, the bundled model
answers about a quarter of them correctly. arithmetic_hard_{train,test}.jsonl has two-digit sums and products,
and expressions with three terms. There, the bundled model starts near zero. No expression in a test file
appears in its train file in any wording. In the easy files, this is also true with the terms swapped. In the
hard files, 3 of the 200 test expressions appear in the train file with their terms swapped.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
WORDINGS = ("What is {}?", "Calculate {}.", "{} =", "How much is {}?", "Solve: {}")
TRAIN, TEST = 2000, 200


def easy_problems(rng: random.Random) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sums of two numbers up to 24, as (train, test). a + b and b + a are always in the same part.

    The train part has each sum in all wordings. The test part has each sum in only one wording, so that its
    200 answers come from 100 different pairs. A model gets the same sum right or wrong in all wordings, so
    repeating sums would leave far fewer independent answers.
    """
    pairs = [(a, b) for a in range(25) for b in range(a + 1, 25)]
    rng.shuffle(pairs)

    def both_orders(pair: tuple[int, int], wording: str) -> list[tuple[str, int]]:
        return [(wording.format(f"{a} + {b}"), a + b) for a, b in (pair, pair[::-1])]

    held_out, rest = pairs[: TEST // 2], pairs[TEST // 2 :]
    test = [problem for pair in held_out for problem in both_orders(pair, rng.choice(WORDINGS))]
    train = [problem for pair in rest for wording in WORDINGS for problem in both_orders(pair, wording)]
    rng.shuffle(test)
    rng.shuffle(train)
    return train, test


def hard_expressions(rng: random.Random) -> list[tuple[str, int]]:
    """Distinct random expressions: two-digit a + b, a + b + c, a + b - c, and a * b with b from 3 to 9."""
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
    """Write (question, answer) pairs to a file next to this one."""
    lines = [json.dumps({"question": question, "answer": str(answer)}) for question, answer in problems]
    (HERE / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write the four files."""
    rng = random.Random(0)
    train, test = easy_problems(rng)
    write("arithmetic_train.jsonl", train[:TRAIN])
    write("arithmetic_test.jsonl", test)
    hard = [(rng.choice(WORDINGS).format(expression), answer) for expression, answer in hard_expressions(rng)]
    write("arithmetic_hard_test.jsonl", hard[:TEST])
    write("arithmetic_hard_train.jsonl", hard[TEST:])


if __name__ == "__main__":
    main()
