"""The floors of the house: who may import whom, read off the imports."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "src" / "mocov3_hf"
# A room imports only from floors below its own; rooms of one floor do not know each other.
FLOORS = {
    "_version": 0,
    "model": 0,
    "recipe": 0,
    "recipe_options": 0,
    "plan": 0,
    "processing": 0,
    "published_sizes": 0,
    "remote_code": 0,
    "complexity": 0,
    "data": 1,
    "optim": 1,
    "probes": 1,
    "pretraining": 2,
    "evaluation": 2,
    "interop": 2,
    "hub": 2,
    "report": 2,
    "inference": 2,
    "zoo": 3,
}
# The arrows between rooms of a floor: a plan is what a recipe comes to, and a recipe is made of its options.
ARROWS = {("plan", "recipe"), ("recipe", "recipe_options")}
# Floor 1 takes plain values: it never sees a recipe.
NEVER = {
    (room, module) for room in ("data", "optim", "probes", "model") for module in ("recipe", "recipe_options", "plan")
}


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


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_downhill(file):
    room = room_of(file)
    if room == "__init__":
        return  # exports and registers; that nobody imports it is tested below
    assert room in FLOORS, f"the room {room!r} is on no floor"
    for module in imported_modules(file):
        target = module.split(".")[1] if "." in module else None
        assert target is not None, f"{file.name} imports the package itself"
        if target == room:
            continue
        assert (room, target) not in NEVER, f"{room} must not know {target}"
        if (room, target) in ARROWS:
            continue
        assert FLOORS[target] < FLOORS[room], f"{room} imports {target}, which is not on a floor below"


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
    assert {room_of(room) for room in rooms()} - {"__init__"} <= set(FLOORS)
