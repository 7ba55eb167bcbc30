"""Law 12: imports go down or sideways, never up, and make no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import quaver

ROOT = Path(quaver.__file__).parent
FLOORS = (
    (
        "errors",
        "config",
        "provenance",
        "checkpoint",
        "files",
        "partial",
        "meter",
        "audio",
        "text",
        "scripts",
        "voice",
        "report",
        "plots",
    ),
    ("sampling", "compiled", "int4", "int8", "recorded", "model"),
    ("kernels", "frame", "guard", "ledger", "runtime", "batch", "take", "engine"),
    (
        "plan",
        "card",
        "verify",
        "corpus",
        "awq",
        "awq_search",
        "stack",
        "stream",
        "recipe",
        "mixed",
        "budget",
        "blend",
        "export",
        "comparison",
        "validate",
        "sweep",
        "judge",
        "panel",
        "limits",
    ),
    ("demo", "cli", "__main__"),
)


def floor(module: str) -> int:
    room = module.split(".")[1]
    found = [index for index, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{module} has no floor: put it into the table"
    return found[0]


def imports() -> dict[str, set[str]]:
    """Every module and the modules of this package that it imports when it runs."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(("quaver", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        used = set()
        for node in ast.walk(tree):
            if id(node) in guarded:
                continue
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("quaver"):
                for alias in node.names:
                    part = ROOT.joinpath(*node.module.split(".")[1:], alias.name)
                    is_module = part.with_suffix(".py").exists() or part.is_dir()
                    used.add(f"{node.module}.{alias.name}" if is_module else node.module)
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names if alias.name.startswith("quaver")}
        found[name] = used
    return found


def test_imports_go_down_or_sideways():
    for module, used in imports().items():
        if module == "quaver":
            continue
        for other in used - {"quaver", "quaver.model"}:
            assert floor(other) <= floor(module), f"{module} imports {other} from a floor above"


def test_imports_make_no_circle():
    graph = imports()
    graph.pop("quaver")
    TopologicalSorter(graph).prepare()


def test_files_stay_short():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 500, f"{path.name} is too long: is it one thing?"


def test_the_library_prints_and_swallows_nothing():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "eval", "exec"), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{path.name}:{node.lineno}"
