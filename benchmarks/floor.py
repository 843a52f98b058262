"""How close a step comes to the time of its matrix products alone: python benchmarks/floor.py --dtype float32

The floor of a phase is its number of operations divided by the rate of large matrix products. On a shared
machine that rate changes from second to second, so a large product is timed about once per second during the
step, between two layers, and its own time is left out. The step is that of benchmarks/step.py.
"""

import statistics
import sys
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Literal

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import src  # noqa: E402, F401  (first, because it decides how threads wait, before torch loads)

# isort: split
import torch  # noqa: E402
import transformers  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks import step  # noqa: E402
from src import models  # noqa: E402
from src.engine import decoder, llama  # noqa: E402

SIZE = 2048  # of the large product
INTERVAL = 1.0  # seconds between two of them
PASSES = {"generate": 1, "reference": 1, "update": 3}  # in forward passes


class LargeProducts:
    """Times a large product now and then."""

    def __init__(self, dtype: torch.dtype):
        self.a, self.b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        self.seconds: list[float] = []
        self.last = 0.0

    def between(self, owner, function: str) -> None:
        """Time one before calls of a function, if the last one is long enough ago."""
        original = getattr(owner, function)

        def with_product(*args, **kwargs):
            if perf_counter() - self.last > INTERVAL:
                started = perf_counter()
                self.a @ self.b
                self.last = perf_counter()
                self.seconds.append(self.last - started)
            return original(*args, **kwargs)

        setattr(owner, function, with_product)


def measured_phases(products: LargeProducts, rates: dict[str, list[float]]) -> type[step.Phases]:
    """A version of `step.Phases` that leaves the large products out, and notes them by phase in `rates`."""

    class Measured(step.Phases):
        @contextmanager
        def __call__(self, name: str):
            before = len(products.seconds)
            with super().__call__(name):
                yield
            inside = products.seconds[before:]
            self.seconds[name] -= sum(inside)
            rates.setdefault(name, []).extend(inside)

    return Measured


def forward_operations(task: step.Task) -> float:
    """Floating-point operations of one forward pass over a step, with each prompt once per question."""
    tokenizer = models.load_tokenizer(task.model)
    policy = models.load_policy(task.model, torch.device("cpu"))
    config = policy.config
    layers = sum(w.numel() for w in policy.model.layers.parameters() if w.dim() == 2)
    prompts = [len(problem.prompt_ids) for problem in task.problems(tokenizer)]
    sampled = task.completions * task.tokens
    tokens = sum(prompts) + sampled - task.completions  # a completion's last token predicts nothing
    pairs = sum(p * p / 2 + task.group_size * task.tokens * (p + task.tokens / 2) for p in prompts)
    attention = 4 * config.hidden_size * config.num_hidden_layers * pairs  # scores, and the sum of values
    return 2.0 * (layers * tokens + config.vocab_size * config.hidden_size * sampled) + attention


def main(
    dtype: Literal["bfloat16", "float32"] = "float32",
    repetitions: int = 3,
    tokens: int = 64,
    data: str = str(ROOT / "data" / "dummy_math_tasks.jsonl"),
) -> None:
    """Print the time of each phase, and its floor.

    Args:
        dtype: What the policy computes in; the large products too.
        repetitions: Steps after a warm-up step.
        tokens: Tokens of each completion.
        data: A file of problems; the first 8 are used.
    """
    transformers.utils.logging.disable_progress_bar()
    task = step.Task(data, "embedded", tokens, dtype)
    operations = forward_operations(task)
    products = LargeProducts(getattr(torch, dtype))
    rates: dict[str, list[float]] = {}
    products.between(llama, "_layer")
    products.between(llama, "_layer_backward")
    products.between(decoder.LlamaDecoder, "step")
    step.Phases = measured_phases(products, rates)  # type: ignore[misc]
    program = step.ours(task)
    next(program)  # the setup
    next(program)  # the warm-up
    rates.clear()
    steps = [next(program)["phases"] for _ in range(repetitions)]
    show({name: statistics.mean(phases[name] for phases in steps) for name in PASSES}, rates, operations)


def show(seconds: dict[str, float], rates: dict[str, list[float]], operations: float) -> None:
    """Print a line for each phase, and one for the step."""
    table = Table("phase", "seconds", "GFLOP/s", "large products", "floor, s", "times")
    floors = {}
    for name, passes in PASSES.items():
        rate = 2 * SIZE**3 / statistics.mean(rates[name])
        floors[name] = passes * operations / rate
        achieved = passes * operations / seconds[name]
        numbers = (seconds[name], achieved / 1e9, rate / 1e9, floors[name], seconds[name] / floors[name])
        table.add_row(name, *(f"{number:.3g}" for number in numbers))
    total, floor = sum(seconds.values()), sum(floors.values())
    table.add_row("step", f"{total:.3g}", "", "", f"{floor:.3g}", f"{total / floor:.3g}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
