"""Time drawing and using report.html: python benchmarks/report.py [--completions 20000] [--json-file FILE]

It draws the report of a made-up run with the given number of completions, and opens it from disk in headless
Chromium without a network. It needs playwright from requirements-dev.txt and Debian's `chromium` package, or
another Chromium whose path is in CHROMIUM.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro
from playwright.sync_api import Browser, sync_playwright

from src.report.page import page, renew_report
from src.report.reader import read_run
from tests.tools.chromium import find_chromium
from tests.tools.synthetic_run import write_run

# Fill in a field, and wait until the frame that shows the result has been painted.
FILL_IN = """([id, value]) => new Promise((done) => {
  const field = document.getElementById(id), started = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));
})"""
CLICK_CHIP = """([chip]) => new Promise((done) => {
  const button = document.querySelector(`[data-chip=${chip}]`), started = performance.now();
  button.click();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));
})"""
ACTIONS = {
    "first search": (FILL_IN, ["search", "carry which"]),
    "next search": (FILL_IN, ["search", "gives add"]),
    "no search": (FILL_IN, ["search", ""]),
    "one verdict": (FILL_IN, ["verdict", "0"]),
    "all verdicts": (FILL_IN, ["verdict", ""]),
    "an order": (FILL_IN, ["order", "reward"]),
    "one step": (FILL_IN, ["step", "10"]),
    "all steps": (FILL_IN, ["step", ""]),
    "wrong but high RM score": (CLICK_CHIP, ["fooled"]),
    "largest advantage": (CLICK_CHIP, ["strong"]),
}
Times = dict[str, list[float]]  # name of a measurement -> milliseconds of each repetition


def main(completions: int = 20_000, repetitions: int = 5, json_file: Path | None = None) -> None:
    """Print the median of each measurement.

    Args:
        completions: Number of completions in the made-up run, 40 per step.
        repetitions: How many times to open the page.
        json_file: If given, all times are also written to this file.
    """
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium found; install one (apt-get install chromium), or set CHROMIUM to its path")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = write_run(Path(folder) / "run", steps=completions // 40, questions=5, group_size=8, words=100)
        times: Times = {"draw the page, ms": time_drawing(run)}
        size = (run / "report.html").stat().st_size / 1e6
        browser = playwright.chromium.launch(executable_path=chromium)
        for _ in range(repetitions):
            time_page(browser, run / "report.html", times)
        version = browser.version
        browser.close()
    print(f"{completions} completions, {size:.1f} MB, Chromium {version}")
    for name, values in times.items():
        print(f"{name:32} {statistics.median(values):7.0f}   {min(values):.0f} to {max(values):.0f}")
    if json_file:
        results = dict(completions=completions, mb=size, chromium=version, times=times)
        json_file.write_text(json.dumps(results, indent=2) + "\n")


def time_drawing(run: Path) -> list[float]:
    """Draw a run's report.html three times, and return the milliseconds of each drawing."""
    page([read_run(run, 1)])  # imports matplotlib, which is not measured
    milliseconds = []
    for _ in range(3):
        started = time.perf_counter()
        renew_report(run)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return milliseconds


def time_page(browser: Browser, file: Path, times: Times) -> None:
    """Open the page once, perform every action, and add the milliseconds of each to `times`."""
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto(file.as_uri())
    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    ready = "performance.timing.domInteractive - performance.timing.navigationStart"
    while not tab.evaluate(paint):
        time.sleep(0.01)
    times.setdefault("first contentful paint, ms", []).append(tab.evaluate(paint))
    times.setdefault("list ready, ms", []).append(tab.evaluate(ready))
    for name, (script, arguments) in ACTIONS.items():
        times.setdefault(f"{name}, ms", []).append(tab.evaluate(script, arguments))
    context.close()


if __name__ == "__main__":
    tyro.cli(main)
