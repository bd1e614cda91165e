"""The shape of the package: floors, sizes, light imports, documentation."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import opcd

SOURCE = Path(opcd.__file__).parent
RECIPE = Path(__file__).parents[1] / "recipes" / "support_desk" / "run.toml"

FLOORS = (
    ("errors", "types", "config", "config.*"),
    (
        "targets",
        "tasks",
        "public_sets",
        "math_answers",
        "contexts",
        "graders",
        "rendering",
        "openings",
        "anchors",
        "intervals",
        "other_contexts",
        "costs",
        "instructions",
        "near_duplicates",
        "screening",
        "memory",
        "servers",
    ),
    ("divergence", "batching", "chunking", "products", "norms", "ragged"),
    (
        "weights",
        "adapters",
        "sharding",
        "zero",
        "attention",
        "models",
        "prefix_cache",
        "prefix_store",
        "teachers",
        "scored",
        "remote",
        "rollouts",
        "rollouts.*",
        "envs",
        "envs.*",
    ),
    ("runs", "checkpoint", "tracking", "tally", "traces", "launch", "interruption"),
    (
        "items",
        "serving",
        "assembly",
        "experience",
        "solving",
        "extraction",
        "endpoint",
        "gathering",
        "authoring",
        "drawing",
        "distill",
        "responses",
        "suites",
        "gap",
        "evaluation",
        "training",
        "programs",
        "comparing",
        "candidates",
        "coaching",
        "consolidation",
        "growth",
        "learning_tables",
        "rounds",
        "selection",
        "timing",
        "soft_prompt",
        "compressing",
        "alternatives",
        "costing",
        "exporting",
        "harness",
        "checking",
        "playing",
        "showing",
        "tables",
        "findings",
        "glossary",
        "verdict",
        "columns",
        "companions",
        "exhibits",
        "charts",
        "figures",
        "report",
        "cost_tables",
    ),
    ("lab", "lab.*"),
    ("cli", "experience_cli", "lab_cli", "__main__", ""),
)
"""Module patterns by floor; the package itself is the empty name. Imports only go down."""

TREES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}
"""Module name, without `opcd.` -> its syntax tree."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def floors_of(module: str) -> list[int]:
    return [
        floor
        for floor, patterns in enumerate(FLOORS)
        if any(fnmatch(module, pattern) for pattern in patterns)
    ]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what only a type checker sees is left out."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imported(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    for node in nodes(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "opcd":
                inner = name.partition(".")[2]
                yield inner if inner in TREES else inner.rpartition(".")[0]


def functions() -> Iterator[tuple[str, Function]]:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{module}.{node.name}", node


def lines_of(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes, functions, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_stands_on_one_floor() -> None:
    assert {m: floors_of(m) for m in TREES if len(floors_of(m)) != 1} == {}


def test_every_pattern_of_a_floor_names_a_module() -> None:
    """A renamed module must not leave its old name behind."""
    patterns = [pattern for floor in FLOORS for pattern in floor]
    assert [p for p in patterns if not any(fnmatch(m, p) for m in TREES)] == []


def test_imports_only_go_down() -> None:
    """Floors hold because nothing imports what stands above it."""
    upward = [
        f"{module or 'opcd'} (floor {floors_of(module)[0]}) imports {other} "
        f"(floor {floors_of(other)[0]})"
        for module in TREES
        for other in imported(module)
        if floors_of(other)[0] > floors_of(module)[0]
    ]
    assert upward == []


def test_the_import_check_sees_imports() -> None:
    """Guards the two tests above against a reader that finds nothing."""
    assert set(imported("rendering")) == {"config.training", "contexts", "errors", "types"}
    assert "showing" in set(imported("cli"))


def test_modules_and_functions_stay_small() -> None:
    long_modules = {
        str(path.relative_to(SOURCE)): count
        for path in SOURCE.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    long_functions = {name: lines_of(f) for name, f in functions() if lines_of(f) > 60}
    assert (long_modules, long_functions) == ({}, {})


def test_the_median_function_is_short() -> None:
    assert statistics.median(lines_of(node) for _, node in functions()) <= 12


def test_floors_0_and_1_and_check_run_need_no_torch() -> None:
    """`opcd check` answers in a fraction of a second because these modules are light."""
    light = [f"opcd.{m}".rstrip(".") for m in TREES if m.endswith("cli") or floors_of(m)[0] <= 1]
    code = (
        "import importlib, pathlib, sys\n"
        f"for name in {['opcd', *light]!r}: importlib.import_module(name)\n"
        "import opcd.checking\n"
        f"opcd.checking.check_run(pathlib.Path({str(RECIPE)!r}))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'accelerate'} & sys.modules.keys()))\n"
    )
    done = run_python(code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from opcd.cli import main\n"
        "sys.argv = ['opcd', '--help']\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'matplotlib'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    verbs = ("check", "gap", "train", "evaluate", "compare", "search", "sample", "costs", "report")
    assert all(verb in done.stdout for verb in verbs)


@pytest.mark.parametrize("module", TREES)
def test_public_names_are_documented(module: str) -> None:
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module}: the module has no docstring"
    assert [name for name, node in public(tree) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", TREES)
def test_public_functions_are_annotated(module: str) -> None:
    bare: list[str] = []
    for name, node in public(TREES[module]):
        if isinstance(node, ast.ClassDef):
            continue
        spec = node.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
        arguments += [a for a in (spec.vararg, spec.kwarg) if a]
        bare += [
            f"{name}({a.arg})"
            for a in arguments
            if a.annotation is None and a.arg not in ("self", "cls")
        ]
        bare += [f"{name} -> ?"] if node.returns is None else []
    assert bare == []
