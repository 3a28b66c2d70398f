"""The floors of the package: which room may import which, read from the imports."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "src" / "mocov3_hf"
# The ground floor reads and writes. Every room may import it; its parts import only those before them.
GROUND = (
    "_version",
    "model",
    "reporting",
    "hints",
    "requirements",
    "precision",
    "process_group",
    "problem_types",
    "storage",
    "new_folder",
    "yaml_files",
    "option_values",
    "recipe_files",
    "declarations",
    "option_help",
    "options",
    "results",
    "run_folder",
    "processing",
    "zoo",
    "weights",
    "loading",
    "hub",
)
# Floor 1 takes and returns plain values. Floor 2 is behavior. Rooms of one floor do not import each other.
FLOORS = {
    "data": 1,
    "optim": 1,
    "metrics": 1,
    "pretraining": 2,
    "evaluation": 2,
    "inference": 2,
    "interop": 2,
    "report": 2,
    "trainer": 2,
    "dense": 2,
}
# Whole calls, made of several rooms of floor 2.
TOP = ("__main__", "__init__", "api", "curation")
# Floor 1 knows neither options nor the layout of folders.
PLAIN = {
    "_version",
    "model",
    "reporting",
    "hints",
    "requirements",
    "precision",
    "problem_types",
    "process_group",
    "storage",
    "processing",
}
# The only import uphill: fetching a published model includes converting it.
UPHILL = {("zoo", "interop")}


def rooms():
    return sorted(path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())


def files():
    return sorted(path for room in rooms() for path in ([room] if room.is_file() else room.rglob("*.py")))


def imported_modules(file):
    """Absolute dotted names of the package's own modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mocov3_hf")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "mocov3_hf":
            yield node.module
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            package = ("mocov3_hf", *file.relative_to(PACKAGE).parts[:-1])
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join((*base, name)) for name in names)


def room_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def may_import(room, target):
    if target == room or (room, target) in UPHILL or room in TOP:
        return True
    if room in GROUND:
        return target in GROUND and GROUND.index(target) < GROUND.index(room)
    if target in GROUND:
        return FLOORS[room] == 2 or target in PLAIN
    return FLOORS[target] < FLOORS[room]


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_downhill(file):
    room = room_of(file)
    for module in imported_modules(file):
        target = module.split(".")[1] if "." in module else None
        assert target is not None, f"{file.name} imports the package itself"
        assert may_import(room, target), f"{room} may not import {target}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "model").glob("*.py")), ids=lambda file: file.name)
def test_model_folder_is_flat_and_self_contained(file):
    """As remote code only `from .sibling import name` works."""
    assert not [path for path in (PACKAGE / "model").iterdir() if path.is_dir() and path.name != "__pycache__"]
    siblings = {path.stem for path in (PACKAGE / "model").glob("*.py")}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            assert node.level == 1
            assert node.module in siblings
        elif isinstance(node, ast.ImportFrom):
            assert not node.module.startswith("mocov3_hf")


def test_rooms_are_all_assigned():
    assert {room_of(room) for room in rooms()} - {*TOP} == {*GROUND, *FLOORS}
