"""The documents: their figures are what their scripts draw, their links lead somewhere, and the tests they name exist."""

import re
import sys

import pytest

from tests.conftest import ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_figures_are_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    sys.modules.pop("figures", None)
    import figures

    figures.main(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == {path.name for path in (ROOT / "docs").glob("*.svg")}
    for name, text in drawn.items():
        assert text == (ROOT / "docs" / name).read_text(), f"{name}: run python docs/figures.py"


def test_the_table_of_memory_is_what_the_budget_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    assert memory.table() in (ROOT / "README.md").read_text(), "run python benchmarks/memory.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_gap_is_left(document):
    """Placeholders are in capitals, as are constants and variables of the environment, which the code knows."""
    code = "".join(path.read_text() for folder in ("", "src", "benchmarks") for path in (ROOT / folder).glob("*.py"))
    known = {"WANDB_MODE", "PIP_EXTRA_INDEX_URL", "GLIBC_TUNABLES"} | set(re.findall(r"\b[A-Z_]{4,}\b", code))
    gaps = set(re.findall(r"\b[A-Z]{4,}_[A-Z_]+\b|^[A-Z]{6,}$|@[A-Z]{3,}|TODO", document.read_text(), re.MULTILINE))
    assert gaps <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_tests_that_are_named_exist(document):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", document.read_text()):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_that_are_named_exist(document):
    made = {"data/arithmetic_hard_train.parquet", "data/arithmetic_hard_test.parquet"}  # by commands of the documents
    for path in set(re.findall(r"(?<![\w/.])(?:src|tests|benchmarks|docs|data)/[\w/.*-]*\w", document.read_text())) - made:
        assert any(ROOT.glob(path)), path
