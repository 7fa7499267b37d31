"""The layout: which folder may import which, no circle, no module too long, no dependency that is not declared."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pgp_hf"
# from the bottom up; a folder may import those of lower rows, and those of its own row as long as there is no circle
LAYERS = [
    {"version", "fields", "push_options"},
    {"projection", "data", "metrics", "embedded", "backbones"},
    {"runs", "heads"},
    {"tuners", "report", "models"},
    {"methods", "hub", "inference"},
    {"training"},
    {"presets"},
    {"cli", "benchmark"},
    {"arguments"},  # an alias
]
APART = {"convert", "__init__", "__main__"}
LONGEST = 450  # lines: about 400, and the trainer, most of which are methods that transformers calls


@cache
def modules() -> dict[str, Path]:
    """Files by their dotted name inside the package."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, inside functions too, but not under TYPE_CHECKING."""
    file, found = modules()[name], set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    package = [] if name == "__init__" else package

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "pgp_hf"):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = (node.module or "").removeprefix("pgp_hf").strip(".")
            target = ".".join([*base, *([stem] if stem else [])])
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                found.add(inner if inner in modules() else target)
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("pgp_hf.") for a in node.names if a.name.startswith("pgp_hf."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found - {"", name}


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_test_files_have_names_of_their_own():
    # pytest imports them by their bare names, and collects nothing where two have the same
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert len(set(names)) == len(names), sorted(names)


def test_the_reader_of_imports_sees_them():
    assert "data.stream" in imports("training.trainer") and "data.stream" not in imports("methods.base")
    assert "version" in imports("__init__")
    assert any(target.startswith("projection") for target in imports("runs.revision"))
    assert {"training.trainer", "projection.basis", "cli", "metrics.forgetting.forgetting"} <= modules().keys()


def test_every_folder_has_its_place():
    found = {folder(name) for name in modules()}
    assert found == set().union(*LAYERS) | APART
    assert not [name for name in found - APART if name.startswith("_")]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name):
    if folder(name) in APART:
        return
    place = {one: rank for rank, row in enumerate(LAYERS) for one in row}
    upward = [
        target for target in imports(name) if folder(target) in APART or place[folder(target)] > place[folder(name)]
    ]
    assert not upward, f"{name} imports from above: {upward}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, as the nodes along it; empty without one."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := walk(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"] and not circle(
        {"a": {"b"}, "b": set()}
    )


def test_no_circle_of_folders():
    graph: dict[str, set[str]] = {}
    for name in modules():
        own = graph.setdefault(folder(name), set())
        own.update(folder(target) for target in imports(name) if folder(target) != folder(name))
    assert not circle(graph)


def test_no_circle_of_modules():
    # a package's __init__ is imported before its modules, whichever are asked for: its own imports are not theirs
    graph = {name: imports(name) for name in modules() if name != "__init__"}
    assert not circle(graph)


def test_projection_imports_torch_alone():
    standard = sys.stdlib_module_names
    for name, file in modules().items():
        if folder(name) == "projection":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    roots = {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    roots = {(node.module or "").partition(".")[0]}
                else:
                    continue
                assert roots <= {"torch", *standard}, name
            assert all(folder(target) == "projection" for target in imports(name)), name


def test_modules_are_short():
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_no_class_is_split_over_mixins():
    """Only the trainer's own module touches what is private to it."""
    for name, file in modules().items():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\btrainer\._[a-z]", text) and "self.trainer" not in text, name


def test_types_are_precise_and_what_is_ignored_has_a_reason():
    strict = [file for name, file in modules().items() if folder(name) in ("projection", "methods", "models")]
    nodes = [node for file in strict for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    assert 0 < sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes) <= 20
    for name, file in modules().items():
        for line in file.read_text(encoding="utf-8").splitlines():
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[\w, -]+\]  # \w", line), f"{name}: {line.strip()}"
            assert not re.search(r"noqa.*(C901|PLR0912)", line), f"{name}: {line.strip()}"


def test_what_is_imported_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names_of(requirements):
        return {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in requirements}

    declared = names_of(project["dependencies"])
    extras = names_of(one for extra in project["optional-dependencies"].values() for one in extra)
    names = {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml"}
    for name, file in modules().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module or ""]
            allowed = (
                declared | extras if id(node) in inside else declared
            )  # what an extra brings is imported when needed
            for module in found:
                root = module.partition(".")[0]
                if root not in sys.stdlib_module_names | {"pgp_hf", "_typeshed"}:
                    assert names.get(root, root) in allowed, f"{name} imports {module}"
