"""The house: short functions, small files, no flag that is not read, nothing that is not used, and train.py on top of src/."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


def own_files() -> list[Path]:
    """The repository's own files, those that are not committed yet too; without git, what is neither hidden nor output."""
    if shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return sorted({ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()})
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("output", "__pycache__")]
        files += [Path(folder) / name for name in names]
    return sorted(files)


FILES = own_files()
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES if path.suffix == ".py"}
SRC = {name: tree for name, tree in TREES.items() if name.startswith("src/")}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORT = (ast.Import, ast.ImportFrom)


def imported_by(tree: ast.Module) -> set[tuple[str, str | None]]:
    """Modules, each with a name that is taken from it, or None; inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
    return found


def defined_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (*FUNCTION, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def names_in(node: ast.AST) -> set[str]:
    """What a piece of code speaks of: `f`, `module.f`, and strings, in which verl is told of functions."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            found.add(f"{part.value.id}.{part.attr}")
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
    return found


@pytest.mark.parametrize("name", TREES)
def test_no_function_is_longer_than_60_lines(name):
    long = [
        f"{node.name}, line {node.lineno}: {length} lines"
        for node in ast.walk(TREES[name])
        if isinstance(node, FUNCTION) and (length := node.end_lineno - node.lineno + 1) > 60
        if (name, node.name) != ("train.py", "main")  # the algorithm, with all its parameters
    ]
    assert long == []


def test_no_file_of_src_is_longer_than_400_lines():
    lengths = {
        path.relative_to(ROOT).as_posix(): path.read_bytes().count(b"\n") for path in FILES if ROOT / "src" in path.parents
    }
    assert {"src/sampler.py", "src/native/attention.cpp"} <= set(lengths)
    assert {file: length for file, length in lengths.items() if length > 400} == {}


def test_every_hyperparameter_is_read():
    """By its name in main(), or as h["name"] by a function that takes them all. `dict(locals())` reads none."""
    main = next(node for node in TREES["train.py"].body if isinstance(node, ast.FunctionDef) and node.name == "main")
    arguments = main.args.posonlyargs + main.args.args + main.args.kwonlyargs
    read = {
        node.id
        for statement in main.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    read |= {
        node.slice.value
        for node in ast.walk(TREES["train.py"])
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
    assert len(arguments) > 40
    assert [argument.arg for argument in arguments if argument.arg not in read] == []


def test_everything_in_src_is_used_by_more_than_tests():
    """Every function, class and constant of a module, by something other than itself, here or in another module or a script."""
    speaking = {name: tree for name, tree in TREES.items() if not name.startswith("tests/")}
    spoken = {  # of each top-level statement; an import is no use yet
        name: [(statement, names_in(statement)) for statement in tree.body if not isinstance(statement, IMPORT)]
        for name, tree in speaking.items()
    }
    imports = {name: imported_by(tree) for name, tree in speaking.items()}

    def used(what: str, definition: ast.stmt, home: str) -> bool:
        module = home.removesuffix(".py").replace("/", ".")
        dotted = {f"{module}.{what}", f"{module.removeprefix('src.')}.{what}"}
        return any(
            names & (dotted | {what} if name == home or (module, what) in imports[name] else dotted)
            for name, statements in spoken.items()
            for statement, names in statements
            if statement is not definition
        )

    defined = [(what, statement, home) for home, tree in SRC.items() for statement in tree.body for what in defined_by(statement)]
    assert len(defined) > 200
    assert [f"{home}: {what}" for what, statement, home in defined if not used(what, statement, home)] == []


def test_nothing_in_src_imports_train():
    imports = {name: {module.split(".")[0] for module, _ in imported_by(tree)} for name, tree in SRC.items()}
    assert "src" in imports["src/rollout.py"]
    assert [name for name, modules in imports.items() if "train" in modules] == []
