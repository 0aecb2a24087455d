"""A room imports only rooms below it, there are no circles, and only plugin/ knows Axolotl.

Every import counts, those inside functions and under TYPE_CHECKING too. The one exception is the package's
own ``__init__``: it names the public things and imports them when they are first used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import axolotl_bitnet

SOURCE = Path(axolotl_bitnet.__file__).parent
PACKAGE = "axolotl_bitnet"

ROOMS = (
    "__main__",
    "cli",
    "plugin",
    "report",
    "verify",
    "serving",
    "training",
    "formats",
    "model",
    "layers",
    "ops",
    "storage",
    "run_folder",
    "ternary",
)
"""From top to bottom. A folder is one room, and so is a file at the top."""

LIBRARIES = {"axolotl": {"plugin"}, "trl": {"plugin"}, "vllm": {"serving"}, "triton": {"ops"}}
"""Who may import a library, where not everybody may."""

FLOORS = 10


@cache
def imports() -> dict[str, set[str]]:
    """By module (dotted, below the package), the absolute names that it imports."""
    return {module_of(path): set(imported(path, path.read_text(encoding="utf-8"))) for path in sources()}


def sources() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if "recipes" not in path.parts)


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, text: str) -> Iterator[str]:
    package = [PACKAGE, *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, modules: set[str]) -> str | None:
    """The module of this package that an imported name is, or is in; None for other packages."""
    if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
        return None
    parts = name.split(".")[1:]
    for count in range(len(parts), 0, -1):
        if ".".join(parts[:count]) in modules:
            return ".".join(parts[:count])
    return ""


def graph() -> dict[str, set[str]]:
    """Which module imports which, without the package's own ``__init__``."""
    modules = set(imports())
    found = {
        module: {target for name in names if (target := inside(name, modules)) is not None} - {module}
        for module, names in imports().items()
    }
    found.pop("")
    return {module: targets - {""} for module, targets in found.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle from each module that is in one (depth first)."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module not in done:
            for target in sorted(edges.get(module, ())):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def floors(edges: dict[str, set[str]]) -> int:
    """The longest chain of imports between rooms."""
    between = {
        name: {
            room(target) for module, targets in edges.items() if room(module) == name for target in targets
        }
        - {name}
        for name in {room(module) for module in edges}
    }

    @cache
    def height(name: str) -> int:
        return 1 + max((height(target) for target in between.get(name, ())), default=0)

    return max(height(name) for name in between)


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in graph()} <= set(ROOMS)


def test_imports_go_downwards_only() -> None:
    upwards = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if ROOMS.index(room(target)) < ROOMS.index(room(module))
    ]
    assert upwards == []


def test_there_are_no_circles() -> None:
    assert circles(graph()) == []


def test_there_are_few_floors() -> None:
    assert floors(graph()) <= FLOORS


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_stays_in_its_room(library: str) -> None:
    users = {
        room(module)
        for module, names in imports().items()
        if any(name == library or name.startswith(f"{library}.") for name in names)
    }
    assert users <= LIBRARIES[library]


def test_every_folder_says_what_lives_there() -> None:
    for folder in (path for path in SOURCE.rglob("*") if path.is_dir() and list(path.glob("*.py"))):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert said.count(".") >= 2, f"{folder}: two sentences, what lives here and what may not"


def test_the_rule_sees_what_it_should() -> None:
    """Imports in functions and relative ones count; a circle and a floor are found."""
    path = SOURCE / "formats" / "packed.py"
    text = "from ..storage import atomic\ndef f():\n    from . import dense\n    import axolotl.cli\n"
    assert set(imported(path, text)) == {
        "axolotl_bitnet.storage.atomic",
        "axolotl_bitnet.formats.dense",
        "axolotl.cli",
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == [["a", "b", "c", "a"]]
    assert floors({"cli.main": {"ops.run"}, "ops.run": {"ops.x", "ternary"}, "ternary": set()}) == 3
