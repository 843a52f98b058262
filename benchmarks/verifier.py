"""How long the verifier takes: python benchmarks/verifier.py [--json-file FILE]

64 completions of the embedded model a batch (tests/generated_answers.jsonl), each batch by a new verifier with nothing in its
cache; and the time until the process of the symbolic stage answers its first question.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

from src.math_verifier import MathVerifier
from src.symbolic import SymbolicWorker

ROOT = Path(__file__).parent.parent
REPETITIONS = 15


def main(json_file: Path | None = None) -> None:
    """Print medians, least and most of 15 repetitions.

    Args:
        json_file: Also write them there.
    """
    rows = [json.loads(line) for line in (ROOT / "tests/generated_answers.jsonl").read_text().splitlines()]
    results = {}

    times, fast, extracted = [], 0.0, 0.0
    for repetition in range(REPETITIONS + 1):
        batch = [rows[(64 * repetition + i) % len(rows)] for i in range(64)]
        questions, responses, truths = ([row[key] for row in batch] for key in ("question", "response", "truth"))
        with MathVerifier() as verifier:
            verifier.prepare(truths)
            time.sleep(1.0)  # start-up is measured below
            started = time.perf_counter()
            verifier.verify_batch(questions, responses, truths)
            times.append(1e3 * (time.perf_counter() - started))
            metrics = verifier.metrics()
            fast, extracted = fast + metrics["verifier/fast"], extracted + 64 * metrics["verifier/extracted_frac"]
    results["64 completions, ms"] = times[1:]  # the first one compiles the patterns

    times = []
    for _ in range(REPETITIONS):
        worker = SymbolicWorker()
        started = time.perf_counter()
        worker.ask("$x+1$", "$1+x$", time.monotonic() + 60)
        times.append(1e3 * (time.perf_counter() - started))
        worker.close()
    results["start of the symbolic stage, ms"] = times

    with MathVerifier() as verifier:
        pairs = [(rf"\boxed{{{i}x + x^2}}", f"x^2+{i}x") for i in range(3, 43)]
        verifier.prepare(["x"])
        verifier.verify("", *pairs[0])
        started = time.perf_counter()
        assert all(v["correct"] for v in verifier.verify_batch([""] * len(pairs), [r for r, _ in pairs], [t for _, t in pairs]))
        results["a symbolic comparison, ms"] = [1e3 * (time.perf_counter() - started) / len(pairs)]

    print(f"{'':34} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in results.items():
        print(f"{name:34} {statistics.median(values):8.1f} {min(values):8.1f} {max(values):8.1f}")
    print(f"answers settled without the symbolic stage: {100 * fast / extracted:.1f} %")
    if json_file:
        json_file.write_text(json.dumps({**results, "fast share": fast / extracted}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
