"""Trackers get the numbers of metrics.jsonl, as their own files show, and are only imported if requested."""

import importlib.util
import json
import os
import sqlite3
import struct
from pathlib import Path

import pytest

import train
from src.errors import InputError
from tests.conftest import as_flags, run_command


def wandb_history(path: Path) -> list[dict]:
    """The lines that an offline run logged.

    Its file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB that contain records. Each record
    has a checksum (4 bytes), a length (2) and a type (1): complete, or the first, a middle or the last part.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, history = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                history.append({})
                for item in record.history.item:
                    name, *under = item.nested_key or [item.key]
                    target = history[-1].setdefault(name, {}) if under else history[-1]
                    target[under[0] if under else name] = json.loads(item.value_json)
    return history


def test_each_tracker_gets_the_numbers_of_metrics_jsonl(tiny, tmp_path):
    pytest.importorskip("trackio")
    flags = as_flags(tiny | dict(sample_interval=2, eval_data=tiny["data"]))
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_SILENT": "true"}
    done = run_command("train.py", *flags, "--tracker", "wandb", "tensorboard", "trackio", env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    run = Path(tiny["output"]) / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {line.pop("step"): line for line in lines}
    assert set(wanted) == {0, 1, 2} and all(wanted.values())

    history = wandb_history(next(run.glob("wandb/offline-run-*/*.wandb")))
    assert {line["_step"]: {k: v for k, v in line.items() if "/" in k} for line in history} == wanted
    (table,) = [line["completions"] for line in history if "completions" in line]
    assert (table["_type"], table["nrows"]) == ("table-file", 8)
    rows = json.loads(next(run.glob(f"wandb/offline-run-*/files/{table['path']}")).read_text())
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert [dict(zip(rows["columns"], row, strict=True)) for row in rows["data"]] == rollouts[:8]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "hybrid-grpo"))
    events.Reload()
    seen: dict[int, dict] = {step: {} for step in wanted}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            seen[event.step][name] = event.value
    for step, metrics in wanted.items():
        assert seen[step] == pytest.approx(metrics, rel=1e-6), step  # TensorBoard stores float32

    with sqlite3.connect(tmp_path / "trackio" / "hybrid-grpo.db") as database:
        logged = database.execute("select step, metrics from metrics where run_name = 'run'").fetchall()
    assert {step: json.loads(metrics) for step, metrics in logged} == wanted


def test_a_resumed_run_continues_the_same_tracker_runs(tiny, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train.main(**tiny | dict(wandb_project="test", tracker=["tensorboard"], max_steps=1))
    train.main(resume=str(run), max_steps=2)
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # the name contains the W&B run's id
    assert sorted(line["_step"] for file in files for line in wandb_history(file)) == [0, 1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "test"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [0, 1]


@pytest.mark.slow
def test_optional_packages_are_not_imported_unless_used(tiny):
    script = (
        "import sys, train\n"
        "names = ('wandb', 'tensorboard', 'trackio', 'scipy.stats', 'verl', 'ray')\n"
        "print('after import', [n for n in names if n in sys.modules])\n"
        f"train.main(**{tiny | dict(max_steps=1)!r})\n"
        "print('after run', [n for n in names if n in sys.modules])\n"
    )
    done = run_command("-c", script)
    assert done.returncode == 0, done.stderr
    assert "after import []" in done.stdout and "after run []" in done.stdout


def test_a_tracker_whose_package_is_missing_is_refused_with_the_command_that_installs_it(tiny, monkeypatch):
    find_spec = importlib.util.find_spec

    def without_trackio(name, *package):
        return None if name == "trackio" else find_spec(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", without_trackio)
    with pytest.raises(InputError, match=r"--tracker trackio: .*not installed; run: pip install trackio=="):
        train.main(**tiny | dict(tracker=["trackio"], model_name="/nowhere"))
    assert not os.path.exists(tiny["output"])
