"""The documents: their figures match the scripts, their links resolve, and what they name exists."""

import ast
import importlib
import re
import sys

import pytest

from benchmarks import memory
from tests.conftest import ROOT
from tests.tools import walk

DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
# Commands in the documents create these files.
CREATED = {"data/arithmetic_hard_train.parquet", "data/arithmetic_hard_test.parquet"}


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_figures_are_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    sys.modules.pop("figures", None)
    importlib.import_module("figures").main(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == {path.name for path in (ROOT / "docs").glob("*.svg")}
    for name, text in drawn.items():
        assert text == (ROOT / "docs" / name).read_text(), f"{name}: run python docs/figures.py"


def test_the_memory_tables_are_what_the_plan_computes():
    for table in memory.tables().split("\n\n"):
        assert table in (ROOT / "docs/memory.md").read_text(), "run python benchmarks/memory.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document):
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
def test_no_placeholder_is_left(document):
    """Placeholders are in capitals. So are constants and environment variables, but those are in the code."""
    files = [
        *ROOT.glob("*.py"),
        *(path for folder in ("src", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    ]
    code = "".join(path.read_text() for path in files)
    known = {"WANDB_MODE", "PIP_EXTRA_INDEX_URL", "GLIBC_TUNABLES"} | set(re.findall(r"\b[A-Z_]{4,}\b", code))
    gaps = set(
        re.findall(r"\b[A-Z]{4,}_[A-Z_]+\b|^[A-Z]{6,}$|@[A-Z]{3,}|TODO", document.read_text(), re.MULTILINE)
    )
    assert gaps <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_tests_exist(document):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", document.read_text()):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_paths_exist(document):
    pattern = r"(?<![\w/.])(?:src|tests|benchmarks|docs|data)/[\w/.*-]*\w"
    for path in set(re.findall(pattern, document.read_text())) - CREATED:
        assert any(ROOT.glob(path)), path


def test_the_tree_in_contributing_lists_every_module_of_src():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = next(
        block for block in re.findall(r"^```text\n(.*?)^```", text, re.M | re.S) if "\nsrc/\n" in block
    )
    listed = set()
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = line.index(name) // 2
        folders[depth:] = [name]
        listed.add("".join(folders))
    modules = {name_of(path) for path in (ROOT / "src").rglob("*.py") if not path.name.startswith("__")}
    assert {path for path in listed if path.startswith("src/") and path.endswith(".py")} == modules
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_every_flag_is_in_the_table_of_flags():
    """Flags are the parameters of main(), read from the source so that nothing has to be imported."""
    tree = ast.parse((ROOT / "train.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    flags = [argument.arg for argument in main.args.args + main.args.kwonlyargs]
    assert len(flags) > 40
    table = (ROOT / "docs/configuration.md").read_text()
    assert [flag for flag in flags if f"`{flag}`" not in table] == []


def test_the_walk_covers_every_document_with_commands():
    with_commands = {name_of(path) for path in DOCUMENTS} - {"CHANGELOG.md", "benchmarks/NOTES.md"}
    assert sorted(walk.DOCUMENTS) == sorted(with_commands)
