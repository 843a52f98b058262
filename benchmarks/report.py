"""How long report.html takes to draw and to use: python benchmarks/report.py [--completions 20000] [--json-file FILE]

A made-up run of that many completions is drawn, and opened from disk in headless Chromium with the network off. Needs Debian's
`chromium` package (or another Chromium, named by CHROMIUM) and playwright from requirements-dev.txt.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro
from playwright.sync_api import sync_playwright

from src.report import page, renew_report
from src.run_reader import read_run
from tests.chromium import find_chromium
from tests.synthetic_run import write_run

# Set a field and wait until the frame that shows the result has been painted.
TIMED = """([id, value]) => new Promise((done) => {
  const field = document.getElementById(id), started = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));
})"""
CHIP = TIMED.replace("document.getElementById(id)", "document.querySelector(`[data-only=${id}]`)").replace(
    'field.dispatchEvent(new Event("input", { bubbles: true }))', "field.click()"
)
TRIES = {
    "search, first": (TIMED, ["search", "carry which"]),
    "search, then": (TIMED, ["search", "gives add"]),
    "no search": (TIMED, ["search", ""]),
    "a verdict": (TIMED, ["verdict", "0"]),
    "every verdict": (TIMED, ["verdict", ""]),
    "an order": (TIMED, ["order", "reward"]),
    "a step": (TIMED, ["step", "10"]),
    "every step": (TIMED, ["step", ""]),
    "wrong but high RM score": (CHIP, ["fooled", ""]),
    "largest advantage": (CHIP, ["strong", ""]),
}


def main(completions: int = 20_000, repetitions: int = 5, json_file: Path | None = None) -> None:
    """Print the medians.

    Args:
        completions: Of the made-up run, 40 a step.
        repetitions: Times that the page is opened.
        json_file: Also write all times there.
    """
    times: dict[str, list[float]] = {"draw the page, ms": [], "first contentful paint, ms": [], "list ready, ms": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = write_run(Path(folder) / "run", steps=completions // 40, questions=5, group_size=8, words=100)
        page([read_run(run, 1)])  # imports matplotlib
        for _ in range(3):
            started = time.perf_counter()
            renew_report(run)
            times["draw the page, ms"].append(1e3 * (time.perf_counter() - started))
        size = (run / "report.html").stat().st_size / 1e6
        browser = playwright.chromium.launch(executable_path=find_chromium())
        for _ in range(repetitions):
            context = browser.new_context(offline=True)
            tab = context.new_page()
            tab.goto((run / "report.html").as_uri())
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            while not tab.evaluate(paint):
                time.sleep(0.01)
            times["first contentful paint, ms"].append(tab.evaluate(paint))
            times["list ready, ms"].append(tab.evaluate("performance.timing.domInteractive - performance.timing.navigationStart"))
            for name, (script, arguments) in TRIES.items():
                times.setdefault(f"{name}, ms", []).append(tab.evaluate(script, arguments))
            context.close()
        version = browser.version
        browser.close()
    print(f"{completions} completions, {size:.1f} MB, Chromium {version}")
    for name, values in times.items():
        print(f"{name:32} {statistics.median(values):7.0f}   {min(values):.0f} to {max(values):.0f}")
    if json_file:
        json_file.write_text(json.dumps(dict(completions=completions, mb=size, chromium=version, times=times), indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
