"""Compare the sampler with Hugging Face's generate: python benchmarks/sampler.py [--help]

Both sample with the bundled model in bfloat16, in groups of 8 completions, at temperature 0.8, with the end
token suppressed. For each batch size, they take turns in one process. The roofline is the minimum time for a
step: the time to read the weights and the cache, or the time for the matrix products, whichever is longer. It
assumes the rates that a sum over memory and a large matrix product reach in the same run.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step import in_turns  # noqa: E402
from src import models  # noqa: E402
from src.engine.master_weights import MasterWeights  # noqa: E402
from src.engine.memory import keep_freed_memory  # noqa: E402
from src.engine.sampler import Sampling, sample  # noqa: E402

TEMPERATURE = 0.8


def best(run, repetitions: int = 5) -> float:
    """Seconds that the fastest of several runs takes, which shows what the machine can do."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def machine_rates(policy, rows: int) -> tuple[float, float]:
    """Bytes/s of reading memory, and FLOP/s of bfloat16 products with the model's widest layer.

    Args:
        rows: Number of rows in the products; at least 2,048 are used.
    """
    block = torch.ones(2**28, dtype=torch.uint8)  # 256 MB, larger than almost any cache
    reading = len(block) / best(lambda: block.view(torch.int64).sum())
    weight = policy.model.layers[0].mlp.up_proj.weight.detach()
    x = torch.randn(max(rows, 2048), weight.shape[1], dtype=weight.dtype)
    product = 2 * len(x) * weight.numel() / best(lambda: x @ weight.T)
    return reading, product


def measure(
    policy, prompts: torch.Tensor, group_size: int, tokens: int, repetitions: int, generator: torch.Generator
) -> dict[str, Any]:
    """Time both samplers on one batch, and compare our time with what the machine could do.

    Args:
        prompts: (Q, P) token ids.
        group_size: Completions per prompt.
        tokens: Tokens per completion.
        repetitions: Timed runs of each sampler.
    """
    repeated = prompts.repeat_interleave(group_size, 0)  # (B, P)

    sampling = Sampling(TEMPERATURE, top_p=1.0, max_length=2048, max_new_tokens=tokens, stop_ids=[])

    def ours():
        sample(policy, prompts.tolist(), group_size, sampling, generator)

    def generate():
        policy.generate(
            repeated,
            attention_mask=torch.ones_like(repeated),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )

    timed = in_turns({"ours": ours, "generate": generate}, repetitions)
    times = {name: [seconds for seconds, _ in rounds] for name, rounds in timed.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    batch = len(repeated)
    reading, product = machine_rates(policy, batch)
    columns = prompts.numel() + batch * tokens / 2  # columns of the cache that a step reads on average
    min_seconds = tokens * min_step_seconds(policy, batch, columns, reading, product)
    return {
        "completions": batch,
        **medians,
        "all": times,
        "step_ms": 1e3 * medians["ours"] / tokens,
        "reading_bytes_per_s": reading,
        "product_flops": product,
        "roofline": min_seconds / medians["ours"],
    }


def min_step_seconds(policy, batch: int, columns: float, reading: float, product: float) -> float:
    """The roofline of a step: the seconds for reading or for the products, whichever is longer.

    Args:
        batch: Number of completions.
        columns: Number of cache columns that the step reads.
        reading: Rate of reading memory, in bytes/s.
        product: Rate of matrix products, in FLOP/s.
    """
    config, weights = policy.config, policy.num_parameters()
    head_dim = policy.model.layers[0].self_attn.head_dim
    # Bytes per column: keys and values, 2 bytes each.
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return max((2 * weights + cache * columns) / reading, 2 * weights * batch / product)


def main(
    batches: tuple[int, ...] = (8, 64, 256),
    tokens: int = 64,
    prompt_tokens: int = 62,
    group_size: int = 8,
    repetitions: int = 3,
    model: str = "embedded",
    output: Path | None = None,
) -> None:
    """Time both samplers in turns, and print medians.

    Args:
        batches: Batch sizes, in completions.
        tokens: Tokens per completion.
        prompt_tokens: Number of random tokens per prompt.
        group_size: Completions per prompt. Every batch size must be a multiple of it.
        repetitions: Timed runs of each sampler, after one warm-up run.
        model: A model, as in train.py's --model-name.
        output: JSON file to which the results are written.
    """
    keep_freed_memory()
    policy = models.load_policy(model, torch.device("cpu"))
    MasterWeights(policy, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    table = Table(
        "completions",
        "ours, s",
        "generate, s",
        "times",
        "ours, tokens/s",
        "ms per step",
        "of the roofline",
    )
    rows = []
    for batch in batches:
        prompts = torch.randint(100, 40_000, (batch // group_size, prompt_tokens), generator=generator)
        row = measure(policy, prompts, group_size, tokens, repetitions, generator)
        rows.append(row)
        table.add_row(
            str(batch),
            f"{row['ours']:.2f}",
            f"{row['generate']:.2f}",
            f"{row['generate'] / row['ours']:.1f}",
            f"{batch * tokens / row['ours']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{100 * row['roofline']:.0f}%",
        )
    Console(width=120).print(table)
    if output:
        result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
