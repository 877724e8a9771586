"""The package's layers: imports only go down, and no modules import one another in a circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tinyllava_switchkd"
NAME = PACKAGE.name

FLOORS = [
    {"_auto", "cli", "constants", "io", "registry", "runtime", "statistics"},
    {"fetch"},
    {"data"},
    {"model"},
    {"distill"},
    {"train", "visualize"},
    {"eval", "serve"},
    {"launch"},
    {"quickstart"},
    {"ablations"},
]
"""The rooms from the ground up. A room knows those of the floors below it, and none beside it."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


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
    """The package's modules that a module imports, each with whether this happens when the module is imported."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
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
    assert rooms == set(FLOOR_OF), "a new room gets its floor here, and its place in docs/design.md"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_imports_go_down(module):
    """Including imports inside functions and for the type checker."""
    here = room(module)
    wrong = {
        imported
        for imported, _ in imports(module)
        if room(imported) not in ("", here) and FLOOR_OF[room(imported)] >= FLOOR_OF[here]
    }
    assert not wrong, f"{module} is on floor {FLOOR_OF[here]} and imports {sorted(wrong)}"


def test_modules_do_not_import_one_another_in_a_circle():
    """For all imports, wherever they are; a package means its own __init__, not its modules."""
    state: dict[str, str] = {}
    trail: list[str] = []

    def visit(module: str) -> None:
        state[module] = "open"
        trail.append(module)
        for imported in sorted({name for name, _ in imports(module)}):
            if state.get(imported) == "open":
                raise AssertionError(f"a circle of imports: {' -> '.join([*trail[trail.index(imported) :], imported])}")
            if imported not in state:
                visit(imported)
        trail.pop()
        state[module] = "done"

    for module in MODULES:
        if module not in state:
            visit(module)


def test_scoring_and_the_launcher_know_nothing_of_torch():
    """The modules that `eval/score` and `launch` import on import, directly or indirectly."""
    for start in ("eval.score", "launch.__main__", "train.command_line.argv", "train.check_data"):
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
