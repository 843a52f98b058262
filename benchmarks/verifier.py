"""Measure the speed of the verifier: python benchmarks/verifier.py [--json-file FILE]

It times three things: batches of 64 completions of the bundled model (tests/generated_answers.jsonl) with
empty caches, the start of the process for the symbolic stage, and a symbolic comparison.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

from src.answers.final_answer import final_answer
from src.math_verifier import MathVerifier
from src.symbolic import SymbolicWorker

ROOT = Path(__file__).parent.parent
REPETITIONS = 15


def time_batches(rows: list[dict]) -> tuple[list[float], float]:
    """Verify batches of 64 completions, each with a new verifier and an empty cache of parsed answers.

    Args:
        rows: Records with "question", "response" and "truth".

    Returns:
        Milliseconds per batch, and the share of answers settled without the symbolic stage.
    """
    times, fast, extracted = [], 0.0, 0.0
    for repetition in range(REPETITIONS + 1):
        batch = [rows[(64 * repetition + i) % len(rows)] for i in range(64)]
        questions, responses, truths = (
            [row[key] for row in batch] for key in ("question", "response", "truth")
        )
        final_answer.cache_clear()
        with MathVerifier() as verifier:
            verifier.prepare(truths)
            time.sleep(1.0)  # leave out the start-up, which time_start() measures
            started = time.perf_counter()
            verifier.verify_batch(questions, responses, truths)
            times.append(1e3 * (time.perf_counter() - started))
            metrics = verifier.metrics()
            fast += metrics["verifier/fast"]
            extracted += 64 * metrics["verifier/extracted_frac"]
    return times[1:], fast / extracted  # without the first batch, which compiles the patterns


def time_start() -> list[float]:
    """Milliseconds until the process of the symbolic stage answers its first question."""
    times = []
    for _ in range(REPETITIONS):
        worker = SymbolicWorker()
        started = time.perf_counter()
        worker.ask("$x+1$", "$1+x$", time.monotonic() + 60)
        times.append(1e3 * (time.perf_counter() - started))
        worker.close()
    return times


def time_symbolic_comparison() -> float:
    """Mean milliseconds of one symbolic comparison."""
    responses = [rf"\boxed{{{i}x + x^2}}" for i in range(3, 43)]
    truths = [f"x^2+{i}x" for i in range(3, 43)]
    with MathVerifier() as verifier:
        verifier.prepare(["x"])
        verifier.verify("", responses[0], truths[0])  # waits for the process to start
        started = time.perf_counter()
        verdicts = verifier.verify_batch([""] * len(responses), responses, truths)
        assert all(verdict["correct"] for verdict in verdicts)
        return 1e3 * (time.perf_counter() - started) / len(responses)


def main(json_file: Path | None = None) -> None:
    """Print the median, minimum and maximum of 15 repetitions.

    Args:
        json_file: If given, also write the results there.
    """
    rows = [json.loads(line) for line in (ROOT / "tests/generated_answers.jsonl").read_text().splitlines()]
    batch_times, fast_share = time_batches(rows)
    results = {
        "64 completions, ms": batch_times,
        "start of the symbolic stage, ms": time_start(),
        "a symbolic comparison, ms": [time_symbolic_comparison()],
    }
    print(f"{'':34} {'median':>8} {'min':>8} {'max':>8}")
    for name, values in results.items():
        print(f"{name:34} {statistics.median(values):8.1f} {min(values):8.1f} {max(values):8.1f}")
    print(f"answers settled without the symbolic stage: {100 * fast_share:.1f}%")
    if json_file:
        json_file.write_text(json.dumps({**results, "fast share": fast_share}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
