"""Training inside a notebook: the quick start as a whole, an interruption, and the line that shows progress.

The slow tests need nbclient and ipykernel: pip install nbclient ipykernel
"""

import asyncio
import json
import sys
import types

import pytest
from rich.console import Console

from src import console
from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
SHORT = {"steps = 10": "steps = 1", "steps + 2": "steps + 1", "max_new_tokens=64": "max_new_tokens=16"}


def notebook(tmp_path, sources: list[str] | None = None):
    """A client for the quick start, in its own folder, or for cells with these sources."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOK, 4)
    if sources is not None:
        book.cells = [book.cells[1], *(nbformat.v4.new_code_cell(source) for source in sources)]
    for cell in book.cells:
        for long, short in SHORT.items():
            cell.source = cell.source.replace(long, short)
        output = str(tmp_path / "output")
        cell.source = cell.source.replace("settings = dict(\n", f"settings = dict(\n    output={output!r},\n")
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=where)


def printed(cell) -> str:
    return "".join(out.get("text", "") for out in cell.outputs)


@pytest.mark.slow  # a minute
def test_the_quick_start_runs_from_top_to_bottom(tmp_path):
    client = notebook(tmp_path)
    client.execute()
    training, completions, report, resumed, gpu = [c for c in client.nb.cells if c.cell_type == "code"][1:]
    assert "done: 1 steps" in printed(training)
    assert "<table>" in str(completions.outputs) and "parsed_answer" in str(completions.outputs)
    assert "<iframe srcdoc=" in str(report.outputs)
    assert "done: 2 steps, the last 1" in printed(resumed)
    assert gpu.outputs
    assert not any(out.output_type == "error" for c in client.nb.cells for out in c.get("outputs", []))


@pytest.mark.slow  # a minute
def test_a_run_that_the_stop_button_interrupts_can_be_resumed_in_the_same_kernel(tmp_path):
    settings = dict(
        model_name="embedded", data="data/arithmetic_train.jsonl", max_new_tokens=8, warmup_samples=2,
        rollouts_per_step=2, group_size=2, train_batch_size=4, output=str(tmp_path / "output"),
    )  # fmt: skip
    client = notebook(
        tmp_path,
        [
            f"train.main(**{settings!r}, run_name='stopped', max_steps=500)",
            f"train.main(resume={str(tmp_path / 'output/stopped')!r}, max_steps=4)",
            f"train.main(**{settings!r}, run_name='second', max_steps=1)",
        ],
    )
    metrics = tmp_path / "output/stopped/metrics.jsonl"

    async def interrupt():
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            await asyncio.sleep(0.2)
        await client.km.interrupt_kernel()

    async def run():
        async with client.async_setup_kernel():
            await client.async_execute_cell(client.nb.cells[0], 0)
            stopping = asyncio.create_task(interrupt())
            client.allow_errors = True
            await client.async_execute_cell(client.nb.cells[1], 1)
            await stopping
            client.allow_errors = False
            steps = metrics.read_text().count("\n")
            text = client.nb.cells[2].source.replace("max_steps=4", f"max_steps={steps + 2}")
            client.nb.cells[2].source = text
            for index in (2, 3):
                await client.async_execute_cell(client.nb.cells[index], index)

    asyncio.run(run())
    stopped, resumed, second = client.nb.cells[1:]
    assert "continue with --resume" in printed(stopped)
    assert [out.ename for out in stopped.outputs if out.output_type == "error"] == ["Stopped"]
    assert "resuming from" in printed(resumed) and "done:" in printed(resumed)
    assert "done: 1 steps" in printed(second)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(len(steps)))


def test_in_a_notebook_one_line_is_replaced_as_the_run_goes_on(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(Console, "is_jupyter", True, raising=False)
    monkeypatch.setattr(console, "NOTEBOOK_REFRESH_S", 0.0)
    real = Console.__init__
    monkeypatch.setattr(
        Console, "__init__", lambda self, *a, **k: real(self, *a, **k | {"force_jupyter": True})
    )
    console.start(3, "step")
    with console.phase("rollout"):
        console.detail("12 left")
    console.advance(tokens_per_s=50.0)
    console.stop()
    assert any("step 1/3" in line and "rollout" in line and "12 left" in line for line in shown)
    assert any("step 2/3" in line for line in shown)
    assert shown[-1] == ""
    assert not any("\x1b" in line for line in shown)


def test_the_notebook_is_stored_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
