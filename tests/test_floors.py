"""The house: an import never goes up a floor, and modules do not import one another in a circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tinyllava_switchkd"
NAME = PACKAGE.name

FLOORS = {
    "constants": 0,
    "registry": 0,
    "io": 0,
    "runtime": 0,
    "cli": 0,
    "fetch": 0,
    "_auto": 0,
    "data": 1,
    "model": 1,
    "distill": 2,
    "visualize": 2,
    "eval": 2,
    "train": 3,
    "serve": 3,
    "quickstart": 4,
    "launch": 4,
    "ablations": 5,
}

UPWARD = {
    ("_auto", "model"): "transformers' Auto classes are told of the configuration when transformers is imported",
}
"""Imports that go up a floor all the same, inside a function, and why."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [NAME, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@cache
def imports(module: str) -> frozenset[tuple[str, bool]]:
    """The package's modules that a module imports, each with whether it does so when it is itself imported."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, at_once)
            return
        inner = at_once and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            found.update((alias.name, at_once) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in MODULES:
                    found.add((name, at_once))
                elif base in MODULES:
                    found.add((base, at_once))
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return frozenset((name, at_once) for name, at_once in found if name != module)


def test_every_room_has_its_floor():
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms == set(FLOORS), "a new room gets its floor here, and its place in docs/design.md"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_no_import_goes_up_a_floor(module):
    here = room(module)
    up = {
        imported
        for imported, _ in imports(module)
        if room(imported) and FLOORS[room(imported)] > FLOORS[here] and (here, room(imported)) not in UPWARD
    }
    assert not up, f"{module} is on floor {FLOORS[here]} and imports {sorted(up)}"


def test_modules_do_not_import_one_another_in_a_circle():
    """Of what is imported at once; a package stands for its own __init__, not for its modules."""
    state: dict[str, str] = {}
    trail: list[str] = []

    def visit(module: str) -> None:
        state[module] = "open"
        trail.append(module)
        for imported in sorted(name for name, at_once in imports(module) if at_once):
            if state.get(imported) == "open":
                circle = [*trail[trail.index(imported) :], imported]
                if not is_own_package(circle):
                    raise AssertionError(f"a circle of imports: {' -> '.join(circle)}")
            elif imported not in state:
                visit(imported)
        trail.pop()
        state[module] = "done"

    for module in MODULES:
        if module not in state:
            visit(module)


def is_own_package(circle: list[str]) -> bool:
    """A package that holds a registry, and its modules that enter themselves there."""
    return any(all(module == home or module.startswith(f"{home}.") for module in circle) for home in circle)


def test_scoring_and_the_launcher_know_nothing_of_torch():
    """What `eval/score` and `launch` import at once, and what that imports in turn."""
    for start in ("eval.score", "launch.__main__", "train.argv", "data.check"):
        todo, seen = [f"{NAME}.{start}"], set()
        while todo:
            module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            todo += [name for name, at_once in imports(module) if at_once]
            for parent in (module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)):
                todo.append(parent)
            names = {
                alias.name.split(".")[0]
                for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
            }
            assert not names & {"torch", "transformers", "deepspeed", "peft", "gradio"}, (start, module)
