"""The sampler against Hugging Face generate: python benchmarks/sampler.py [--help]

The embedded model in bfloat16, groups of 8 completions, the end token suppressed, temperature 0.8; for each batch size the two
take turns in one process. The roofline: how long reading weights and cache, or the products, whichever is more, would take at
the rates that a sum over memory and a large product reach in the same run.
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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from step import in_turns  # noqa: E402

from src import models  # noqa: E402
from src.master_weights import MasterWeights  # noqa: E402
from src.memory import keep_freed_memory  # noqa: E402
from src.sampler import sample  # noqa: E402

TEMPERATURE = 0.8


def best(run, repetitions: int = 5) -> float:
    """Seconds of the fastest of some runs: what the machine can do."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def machine_rates(policy, rows: int) -> tuple[float, float]:
    """Bytes/s of reading and FLOP/s of bfloat16 products of `rows` rows with the model's widest layer."""
    block = torch.ones(2**28, dtype=torch.uint8)  # 256 MB, beyond any cache but the largest
    reading = len(block) / best(lambda: block.view(torch.int64).sum())
    weight = policy.model.layers[0].mlp.up_proj.weight.detach()
    x = torch.randn(max(rows, 2048), weight.shape[1], dtype=weight.dtype)
    product = 2 * len(x) * weight.numel() / best(lambda: x @ weight.T)
    return reading, product


def measure(
    policy, prompts: torch.Tensor, group_size: int, tokens: int, repetitions: int, generator: torch.Generator
) -> dict[str, Any]:
    """Seconds of both for `tokens` tokens of `group_size` completions of each prompt (Q, P), and what the machine could do."""
    repeated = prompts.repeat_interleave(group_size, 0)  # (B, P)

    def ours():
        sample(
            policy, prompts.tolist(), group_size, max_length=2048, max_new_tokens=tokens, temperature=TEMPERATURE,
            top_p=1.0, stop_ids=[], pad_id=0, generator=generator,
        )  # fmt: skip

    def generate():
        policy.generate(
            repeated, attention_mask=torch.ones_like(repeated), do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
            min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip

    timed = in_turns({"ours": ours, "generate": generate}, repetitions)
    times = {name: [seconds for seconds, _ in rounds] for name, rounds in timed.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    batch = len(repeated)
    reading, product = machine_rates(policy, batch)
    columns = prompts.numel() + batch * tokens / 2  # that a step reads, on average
    least = tokens * least_step_seconds(policy, batch, columns, reading, product)
    return {
        "completions": batch, **medians, "all": times, "step_ms": 1e3 * medians["ours"] / tokens,
        "reading_bytes_per_s": reading, "product_flops": product, "roofline": least / medians["ours"],
    }  # fmt: skip


def least_step_seconds(policy, batch: int, columns: float, reading: float, product: float) -> float:
    """The roofline of a step: reading weights and the cache's columns (bytes/s), or the products (FLOP/s), whichever is more."""
    config, weights = policy.config, policy.num_parameters()
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * policy.model.layers[0].self_attn.head_dim
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
    """Sample in turns and print medians.

    Args:
        batches: Completions at once.
        tokens: Of each completion.
        prompt_tokens: Of each prompt; random ids.
        group_size: Completions of a prompt; divides every batch.
        repetitions: Runs of each, after one to warm up.
        model: As --model-name of train.py takes it.
        output: File for the figures as JSON.
    """
    keep_freed_memory()
    policy = models.load_policy(model, torch.device("cpu"))
    MasterWeights(policy, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    table = Table("completions", "ours, s", "generate, s", "times", "ours, tokens/s", "ms a token step", "of the roofline")
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
            f"{100 * row['roofline']:.0f} %",
        )
    Console(width=120).print(table)
    if output:
        output.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    tyro.cli(main)
