"""The recipes of the package, and where a recipe given by name or path is."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hints import describe_missing, nearest
from .option_values import shown
from .reporting import UsageError


RECIPES = Path(__file__).parent / "recipes"
# The key of a recipe that names its command.
COMMAND_KEY = "command"


def recipe_command(path: Path) -> str:
    """The command of a recipe of the package, without parsing it; empty if it names none."""
    found = re.search(rf"^{COMMAND_KEY}: *([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else ""


def recipe_names(command: str | None = None, folder: Path = RECIPES) -> list[str]:
    """Names of the recipes in a folder and its subfolders: of one command, or all."""
    return sorted(path.stem for path in folder.rglob("*.yaml") if command in (None, recipe_command(path)))


def find_recipe(name: str, folder: Path = RECIPES, command: str | None = None) -> Path:
    """
    The file of a recipe given by name or path.

    Args:
        name: Of a recipe in `folder` or its subfolders, the backbone's part of the name of one of the paper's
            (`vit-bn-large-p7`), or a YAML file.
        folder: Of recipes.
        command: The command that asks: its recipes are offered first.

    Raises:
        UsageError: No such recipe; the message offers the nearest name.
    """
    given = Path(name).expanduser()
    try:
        if given.is_file():
            return given
        if given.is_dir():
            raise IsADirectoryError
        named = next(folder.rglob(f"{glob.escape(given.stem)}.yaml"), None)
        of_backbone = list(folder.glob(f"mocov3_{glob.escape(name)}_*.yaml"))
    except IsADirectoryError as error:
        known = "pass a YAML file, or a name that mocov3 recipes lists"
        raise UsageError(f"recipe {shown(name)} is a folder: {known}") from error
    except (OSError, ValueError):  # names that no file can have
        named, of_backbone = None, []
    if named is not None and named.stem == name:
        return named
    if len(of_backbone) == 1:
        return of_backbone[0]
    if given.suffix in (".yaml", ".yml") or "/" in name:
        hint = f"; did you mean the recipe {named.stem!r}?" if named is not None else ""
        raise UsageError(f"{describe_missing(name, 'recipe file')}{hint}")
    hint = nearest(name, recipe_names(command, folder)) or nearest(name, recipe_names(None, folder))
    raise UsageError(f"there is no recipe {shown(name)}{hint or ';'} mocov3 recipes lists all")


def without_command(content: Mapping[str, Any], path: Path, command: str) -> dict[str, Any]:
    """
    The options in a recipe, without the name of its command. Recipes of earlier versions do not have one.

    Raises:
        UsageError: It is a recipe for another command.
    """
    own = content.get(COMMAND_KEY, command)
    if not isinstance(own, str):
        raise UsageError(f"{path.name}: {COMMAND_KEY} takes text, got {shown(own)}")
    own = own.replace("_", "-")
    if own != command:
        name = path.stem if RECIPES in path.parents else path
        raise UsageError(
            f"recipe {str(name)!r} is for mocov3 {own}, not mocov3 {command}: run mocov3 {own} --recipe {name}, or"
            f" pass another recipe to mocov3 {command}"
        )
    return {key: value for key, value in content.items() if key != COMMAND_KEY}
