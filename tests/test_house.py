"""The house rules: the algorithm comes early, functions are short, no import cycles, nothing unused."""

import ast
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 9
MAX_FILE_LINES = 400  # in src/
MAX_COLUMNS = 110  # not counting comments for the type checker and the linter
PRAGMA = re.compile(r"\s*# (type: ignore|noqa).*")

# Functions that may be longer or take more parameters, and why.
DICTATED = {
    ("train.py", "main"): "its parameters are the hyperparameters",
    ("src/verl_plugin/command.py", "command"): "its parameters are the flags of a command line",
}

# What each room of src/ may import besides itself. A room is a folder or a single module.
BELOW = {
    "answers": set(),
    "errors": set(),
    "intervals": set(),
    "threads": set(),
    "files": set(),
    "grpo": set(),
    "hybrid_reward": set(),
    "symbolic": set(),
    "console": {"errors"},
    "parallel": {"errors"},
    "engine": {"errors", "console", "parallel"},
    "math_verifier": {"answers", "symbolic", "errors"},
    "hub": {"errors", "console"},
    "models": {"errors", "console", "engine", "hub"},
    "judge": {"answers", "hub", "models"},
    "reward_model": {"errors", "console", "engine", "hub", "models", "judge"},
    "problems": {"errors", "console", "math_verifier", "models"},
    "run": {"errors", "console", "parallel", "files", "hybrid_reward"},
    "hyperparameters": {"errors", "console", "run"},
    "metrics": {
        "console",
        "parallel",
        "engine",
        "hybrid_reward",
        "math_verifier",
        "problems",
        "reward_model",
        "run",
    },
    "console_lines": {"console", "hybrid_reward", "metrics", "problems", "run"},
    "report": {"errors", "files", "hybrid_reward", "intervals"},
}
TOP = (
    "placement",
    "evaluation",
    "verl_plugin",
)  # may import everything in BELOW but the report, and not each other
BELOW |= {room: BELOW.keys() - {"report"} for room in TOP}
TYPES_ONLY = {("run", "engine")}  # for annotations, below TYPE_CHECKING


def own_files() -> list[Path]:
    """The repository's own files, committed or not; without git, all that are neither hidden nor output."""
    if shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return sorted(
                {ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
            )
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in ("output", "__pycache__")
        ]
        files += [Path(folder) / name for name in names]
    return sorted(files)


FILES = {path.relative_to(ROOT).as_posix(): path for path in own_files()}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items() if path.suffix == ".py"}
SRC = {name: tree for name, tree in TREES.items() if name.startswith("src/")}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORT = (ast.Import, ast.ImportFrom)


def functions(tree: ast.AST) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def parameters(function) -> list[str]:
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls", "ctx")]


def main_of_train() -> ast.FunctionDef:
    return next(
        node for node in TREES["train.py"].body if isinstance(node, ast.FunctionDef) and node.name == "main"
    )


# ------------------------------------------------------------------------------------------------------ sizes


def test_train_py_reaches_the_algorithm_quickly():
    main = main_of_train()
    loop = next(node for node in ast.walk(main) if isinstance(node, ast.For) and node.target.id == "step")
    assert FILES["train.py"].read_text().count("\n") <= 640
    assert loop.lineno < 260
    assert lines_of(main) <= 320


@pytest.mark.parametrize("name", TREES)
def test_functions_are_short_and_take_few_parameters(name):
    too_long = [
        (function.name, function.lineno, lines_of(function), len(parameters(function)))
        for function in functions(TREES[name])
        if (lines_of(function) > MAX_FUNCTION_LINES or len(parameters(function)) > MAX_PARAMETERS)
        and (name, function.name) not in DICTATED
    ]
    assert too_long == []


def test_every_exception_to_the_limits_is_needed():
    for name, function_name in DICTATED:
        function = next(f for f in functions(TREES[name]) if f.name == function_name)
        assert lines_of(function) > MAX_FUNCTION_LINES or len(parameters(function)) > MAX_PARAMETERS


def test_files_in_src_are_short():
    lengths = {n: path.read_bytes().count(b"\n") for n, path in FILES.items() if n.startswith("src/")}
    assert {"src/engine/sampler.py", "src/engine/native/attention.cpp"} <= set(lengths)
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_lines_are_short():
    suffixes = (".py", ".cpp", ".h", ".js", ".css", ".html", ".sh", ".toml", ".yml", ".yaml")
    names = [name for name in FILES if name.endswith(suffixes)]
    assert len(names) > 80
    too_long = [
        f"{name}:{number}"
        for name in names
        for number, line in enumerate(FILES[name].read_text().split("\n"), start=1)
        if len(PRAGMA.sub("", line)) > MAX_COLUMNS
    ]
    assert too_long == []


# ---------------------------------------------------------------------------------------------------- imports


def module_of(name: str) -> str:
    """src/engine/sampler.py -> src.engine.sampler, src/run/__init__.py -> src.run."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name): tree for name, tree in SRC.items()}


@functools.cache
def imported_by(tree: ast.AST) -> set[tuple[str, str | None]]:
    """Modules, each with a name that is imported from it, or None; inside functions and TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
    return found


@functools.cache
def own_imports(tree: ast.AST) -> set[str]:
    """The modules of src/ that a module imports."""
    whole = {f"{module}.{name}" for module, name in imported_by(tree)}
    return {m for m in MODULES if m in whole or any(m == module for module, _ in imported_by(tree))} - {"src"}


def room_of(module: str) -> str:
    return module.split(".")[1]


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module without what is imported for annotations only."""
    guarded = [s for s in tree.body if isinstance(s, ast.If) and ast.unparse(s.test) == "TYPE_CHECKING"]
    return ast.Module([s for s in tree.body if s not in guarded], [])


def test_every_room_imports_only_what_lies_below_it():
    assert {room_of(module) for module in MODULES if module != "src"} == set(BELOW)
    wrong = []
    for module, tree in MODULES.items():
        for imported in own_imports(tree) if module != "src" else ():
            pair = (room_of(module), room_of(imported))
            if pair[0] == pair[1] or pair[1] in BELOW[pair[0]]:
                continue
            if pair not in TYPES_ONLY or imported in own_imports(without_type_checking(tree)):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_the_table_would_notice_a_wrong_import():
    tree = ast.parse("def f():\n    from src.run import log\n    import src.placement")
    assert own_imports(tree) >= {"src.run.log", "src.placement"}
    tree = ast.parse("if TYPE_CHECKING:\n    from src.engine.sampler import Samples")
    assert own_imports(tree) == {"src.engine.sampler"} and own_imports(without_type_checking(tree)) == set()


def test_no_modules_import_each_other_in_a_circle():
    imports = {module: own_imports(tree) for module, tree in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in imports[module] - {module}:
                visit(imported, (*path, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def test_nothing_in_src_imports_train_placement_or_evaluation():
    assert {"src.placement", "src.evaluation"} <= own_imports(TREES["train.py"])
    for module, tree in MODULES.items():
        assert own_imports(tree) & {"src.placement", "src.evaluation"} <= {module}
        assert "train" not in {name for name, _ in imported_by(tree)}, module


# ----------------------------------------------------------------------------------------------------- unused


def fields_of(record: str) -> set[str]:
    """The fields of a dataclass of src/."""
    definition = next(
        node
        for tree in SRC.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == record
    )
    return {statement.target.id for statement in definition.body if isinstance(statement, ast.AnnAssign)}


def test_every_hyperparameter_is_read():
    """By its name in main(), as args.name elsewhere, or as a field of a record that main() selects."""
    main = main_of_train()
    nodes = [node for statement in main.body for node in ast.walk(statement)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    selected = {
        node.args[0].id
        for node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "select"
    }
    assert selected == {"Sampling", "RewardSettings", "UpdateSettings"}
    for record in selected:
        read |= fields_of(record)
    for name, tree in TREES.items():
        if name == "train.py" or (name.startswith("src/") and name != "src/hyperparameters.py"):
            read |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "args"
            }
    assert len(parameters(main)) > 40
    assert [name for name in parameters(main) if name not in read] == []


def defined_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (*FUNCTION, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def names_in(node: ast.AST) -> set[str]:
    """What a piece of code mentions: `f`, `module.f`, and strings, by which verl is told of functions."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            found.add(f"{part.value.id}.{part.attr}")
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
    return found


def test_everything_in_src_is_used_by_more_than_tests():
    """Every function, class and constant of a module is used by something other than itself and tests."""
    users = {name: tree for name, tree in TREES.items() if not name.startswith("tests/")}
    mentions = {  # of each top-level statement; importing something is not using it
        name: [
            (statement, names_in(statement)) for statement in tree.body if not isinstance(statement, IMPORT)
        ]
        for name, tree in users.items()
    }
    imports = {name: imported_by(tree) for name, tree in users.items()}

    def used(what: str, definition: ast.stmt, home: str) -> bool:
        module = module_of(home)
        last = module.split(".")[-1]
        dotted = {f"{module}.{what}", f"{last}.{what}", f"{module.rpartition('.')[0]}.{what}"}
        return any(
            names & (dotted | {what} if name == home or (module, what) in imports[name] else dotted)
            for name, statements in mentions.items()
            for statement, names in statements
            if statement is not definition
        )

    defined = [(what, statement, home) for home, tree in SRC.items() for statement in tree.body
               for what in defined_by(statement) if what != "__all__"]  # fmt: skip
    assert len(defined) > 200
    assert [f"{home}: {what}" for what, statement, home in defined if not used(what, statement, home)] == []
