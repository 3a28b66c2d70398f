"""
Options of the commands: each is declared once, as a documented field of a dataclass, and read by one parser from a
recipe (YAML) and from the command line. `--help` is generated from the declarations.

This module imports neither torch nor transformers, so that mistakes are reported at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .option_values import NO, YES, convert, describe_type, is_list, plain_type, shown
from .reporting import UsageError, reporting, warn
from .yaml_files import read_yaml


RECIPES = Path(__file__).parent / "recipes"


Group = TypeVar("Group")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    old: Mapping[str, Callable[[Any], Any] | None] | Iterable[str] = (),
    advanced: bool = False,
    metavar: str | None = None,
) -> Any:
    """
    Declare an option as a field of a dataclass; its annotation is its type.

    Args:
        default: A list or mapping is copied for every instance. Left out, the option is required.
        help: What `--help` says: a noun phrase or an imperative, without type and default.
        at_least, at_most, above, below: Bounds of a number, or of every number in a list.
        old: Earlier spellings, which still work with a deprecation line; a mapping gives a function from the old value
            to the new one, or None.
        advanced: Shown by `--help all` only.
        metavar: Placeholder of the value in `--help`, such as DIR.
    """
    metadata = {
        "help": help,
        "bounds": {"at least": at_least, "above": above, "at most": at_most, "below": below},
        "old": dict(old) if isinstance(old, Mapping) else dict.fromkeys(old),
        "advanced": advanced,
        "metavar": metavar,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Command:
    """
    What one command of `mocov3` takes.

    Args:
        name: As typed.
        summary: One line.
        groups: Dataclasses of options. The fields of a group, and those it inherits, are sections of `--help`.
        positional: The option whose values may stand without its name.
        recipes: Folder of the recipes that `--recipe` finds by name; None for a command without recipes.
        hints: What to say about an option that does not exist, by name.
        removed: Options of earlier versions that no longer exist, with the reason.
    """

    name: str
    summary: str
    groups: tuple[type, ...]
    positional: str | None = None
    recipes: Path | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> dict[str, dataclasses.Field]:
        return {item.name: item for group in self.groups for item in dataclasses.fields(group)}

    def types(self) -> dict[str, Any]:
        return {name: kind for group in self.groups for name, kind in typing.get_type_hints(group).items()}

    def old_names(self) -> dict[str, tuple[str, Callable | None]]:
        """Earlier spelling to the option of today and what converts the value."""
        return {
            old: (name, change) for name, item in self.fields().items() for old, change in item.metadata["old"].items()
        }


# Recipes


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes of the package in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """
    The file of a recipe given by name or path.

    Raises:
        UsageError: no such recipe; the message offers the nearest name.
    """
    given = Path(name).expanduser()
    with contextlib.suppress(OSError, ValueError):  # names that no file can have
        if given.is_file():
            return given
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        raise UsageError(f"recipe file {shown(name)} does not exist")
    known = recipe_names(folder)
    raise UsageError(f"there is no recipe {shown(name)}{nearest(name, known) or ';'} mocov3 recipes lists all")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


# One parser


def values_of_recipe(command: Command, path: str | Path, quiet: bool = False) -> dict[str, Any]:
    """
    The options that a recipe file sets, converted.

    Args:
        command: What may be set.
        path: YAML file.
        quiet: Whether earlier spellings are taken without a deprecation line, as in files that a run has written.

    Raises:
        UsageError: an unreadable file, an option that does not exist, a value of another type.
    """
    return _converted(command, read_yaml(path).items(), Path(path).name, "", quiet)


def values_of_arguments(command: Command, arguments: Iterable[str]) -> dict[str, Any]:
    """
    The options that a command line sets, converted.

    Raises:
        UsageError: an option that does not exist, a value that is missing or of another type.
    """
    types = command.types() | ({"recipe": str} if command.recipes is not None else {})
    types |= {name: bool for name in command.removed if name not in types}
    given: list[tuple[str, Any]] = []
    loose: list[str] = []
    waiting = list(arguments)[::-1]

    def is_value(token: str) -> bool:
        return not token.startswith("--")

    while waiting:
        token = waiting.pop()
        if is_value(token):
            if token.startswith("-") and len(token) > 1 and not re.match(r"-[0-9.]", token):
                raise UsageError(f"there is no option {token!r}: options begin with two dashes")
            loose.append(token)
            continue
        written, equals, value = token[2:].partition("=")
        name = written.replace("-", "_")
        known = types.keys() | command.old_names().keys()
        if name not in known and name.startswith("no_") and name[3:] in types:
            given.append((name[3:], "false"))
            continue
        if name not in known:
            _refuse(command, written, "command line", "--")
        kind = types[command.old_names().get(name, (name,))[0]]
        if equals:
            values = [value]
        elif is_list(kind):
            values = []
            while waiting and is_value(waiting[-1]):
                values.append(waiting.pop())
        elif plain_type(kind) is bool:
            values = [waiting.pop()] if waiting and waiting[-1].lower() in YES + NO else ["true"]
        else:
            values = [waiting.pop()] if waiting and is_value(waiting[-1]) else []
        if not values:
            raise UsageError(f"--{written} needs a value: {describe_type(plain_type(kind))}")
        given.append((name, values if is_list(kind) else values[0]))
    if loose:
        if command.positional is None:
            raise UsageError(f"unexpected argument {loose[0]!r}: options begin with two dashes")
        if not is_list(types[command.positional]) and len(loose) > 1:
            raise UsageError(f"unexpected argument {loose[1]!r}: {command.name} takes one {command.positional}")
        given.append((command.positional, loose if len(loose) > 1 else loose[0]))
    return _converted(command, given, "command line", "--", False)


def values_of_keywords(command: Command, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    The options of a Python call, converted. None is a value here, as `null` is on a command line.

    Raises:
        UsageError: an option that does not exist, a value of another type.
    """
    given = [(name, "null" if value is None else value) for name, value in options.items()]
    return _converted(command, given, f"{command.name}()", "", False)


def _converted(
    command: Command, given: Iterable[tuple[Any, Any]], source: str, dash: str, quiet: bool
) -> dict[str, Any]:
    fields, types, old_names = command.fields(), command.types(), command.old_names()
    values: dict[str, Any] = {}
    for name, value in given:
        if name == "recipe" and dash and command.recipes is not None:
            values[name] = convert("--recipe", value, str)
            continue
        change = None
        if name in old_names and name not in fields:
            if value is None:
                continue
            old, (name, change) = name, old_names[name]
            if not quiet:
                warn(f"{dash}{old} is deprecated: use {dash}{name}")
        if name in command.removed and name not in fields and (quiet or value in (None, False, "false", "null")):
            continue
        if name not in fields:
            _refuse(command, str(name), source, dash)
        metadata = fields[name].metadata
        if change is not None:
            value = change(convert(f"{dash}{old}", value, types[name]))
        elif value is None and not dash:
            continue
        label = f"{dash}{name}" if dash else f"{source}: {name}"
        converted = convert(label, value, types[name], metadata["bounds"])
        if isinstance(converted, dict) and isinstance(values.get(name), dict):
            converted = {**values[name], **converted}
        values[name] = converted
    return values


def _refuse(command: Command, name: str, source: str, dash: str) -> typing.NoReturn:
    key = name.replace("-", "_")
    where = "" if dash else f"{source}: "
    if key in command.removed:
        raise UsageError(f"{where}{dash}{name} no longer exists: {command.removed[key]}")
    if key in command.hints:
        raise UsageError(f"{where}{command.hints[key]}")
    hint = nearest(key, command.fields(), dash)
    raise UsageError(f"{where}there is no option {dash + name!r}{hint or '; --help all lists all options'}")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command line over those of a recipe; mappings are merged by key."""
    both = {
        name: {**below[name], **value}
        for name, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return {**below, **above, **both}


def build(group: type[Group], values: Mapping[str, Any]) -> Group:
    """
    An instance of a group of options.

    Raises:
        UsageError: a required option is missing.
    """
    names = {item.name: item for item in dataclasses.fields(group)}  # type: ignore[arg-type]
    for name, item in names.items():
        is_required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if is_required and name not in values:
            help = item.metadata["help"].rstrip(".")
            raise UsageError(f"--{name} is missing: {help[0].lower()}{help[1:]}")
    return group(**{name: value for name, value in values.items() if name in names})


def parse(command: Command, arguments: Iterable[str]) -> tuple:
    """
    The groups of a command from its command line, over the recipe that `--recipe` names. `--help` prints and exits.

    Raises:
        UsageError: anything that is wrong with the options.
    """
    values = given_values(command, arguments)
    return tuple(build(group, values) for group in command.groups)


def given_values(command: Command, arguments: Iterable[str]) -> dict[str, Any]:
    """
    The options that a command line and its recipe set, converted, without defaults. `--help` prints and exits.

    Raises:
        UsageError: As `parse`, but for required options that are missing.
    """
    arguments = list(arguments)
    show_help(command, arguments)
    values = values_of_arguments(command, arguments)
    recipe = values.pop("recipe", None)
    if recipe is not None and command.recipes is not None:
        values = merged(values_of_recipe(command, find_recipe(recipe, command.recipes)), values)
        if "recipe" in command.fields():
            values["recipe"] = recipe
    return values


# Help


def show_help(command: Command, arguments: list[str]) -> None:
    """Print `--help` or `--help all` and exit, where a command line asks for it."""
    for place, token in enumerate(arguments):
        if token in ("-h", "--help"):
            print(help_text(command, everything=arguments[place + 1 : place + 2] == ["all"]))
            sys.exit(0)


def help_text(command: Command, everything: bool = False) -> str:
    """What a command does and its options, section by section; those marked advanced only with `everything`."""
    fields, kinds = command.fields(), command.types()
    usage = [f"mocov3 {command.name}"]
    if command.positional is not None:
        placeholder = fields[command.positional].metadata["metavar"] or command.positional.upper()
        usage.append(f"[{placeholder} ...]" if is_list(kinds[command.positional]) else f"[{placeholder}]")
    if command.recipes is not None:
        usage.append("[--recipe NAME|FILE]")
    parser = argparse.ArgumentParser(
        usage=" ".join([*usage, "[--option value ...]"]),
        description=command.summary,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=118),
    )
    if command.recipes is not None:
        section = parser.add_argument_group("Recipe")
        section.add_argument("--recipe", metavar="NAME|FILE", help=_recipe_help(command.recipes))
    hidden = 0
    for title, names in _sections(command).items():
        section = parser.add_argument_group(title)
        for name in names:
            metadata = fields[name].metadata
            if metadata["advanced"] and not everything:
                hidden += 1
                continue
            section.add_argument(
                f"--{name}", metavar=metadata["metavar"] or _metavar(kinds[name]), help=_described(fields[name])
            )
    if hidden:
        parser.epilog = f"{hidden} more options: mocov3 {command.name} --help all"
    return parser.format_help().rstrip()


def _recipe_help(folder: Path) -> str:
    names = recipe_names(folder)
    return f"a YAML file of options, or one of {len(names)} recipes such as {names[0]}; mocov3 recipes lists them"


def _sections(command: Command) -> dict[str, list[str]]:
    """Names of options by the title of their section: the first line of the docstring of the class they stand in."""
    sections: dict[str, list[str]] = {}
    for group in command.groups:
        owners = {name: owner for owner in group.__mro__ for name in inspect.get_annotations(owner)}
        for item in dataclasses.fields(group):
            if item.name == "recipe" and command.recipes is not None:  # has a section of its own
                continue
            title = (owners[item.name].__doc__ or owners[item.name].__name__).strip().splitlines()[0].rstrip(".")
            sections.setdefault(title, []).append(item.name)
    return sections


def _metavar(kind: Any) -> str:
    plain = plain_type(kind)
    if typing.get_origin(plain) is Literal:
        word = "{" + ",".join(map(str, typing.get_args(plain))) + "}"
    else:
        word = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}[plain]
    return f"{word} ..." if is_list(kind) else word


def _described(item: dataclasses.Field) -> str:
    default = item.default if item.default is not dataclasses.MISSING else None
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    text = item.metadata["help"].rstrip(".")
    # Phrases begin in lower case, names and abbreviations as they are.
    if text[1:2].islower() and not text.startswith("Hub "):
        text = text[0].lower() + text[1:]
    if default not in (None, [], {}) and default is not False:
        text += f" (default: {_as_text(default)})"
    return text.replace("%", "%%")


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return " ".join(map(_as_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# Commands about recipes


@dataclass(frozen=True)
class RecipeName:
    """Recipe"""

    name: str | None = option(None, "Recipe to print as YAML. Left out, all are listed.", metavar="NAME")


RECIPES_COMMAND = Command("recipes", "List the recipes of the package, or print one.", (RecipeName,), "name")


def recipes_main(arguments: Iterable[str]) -> None:
    """The command `mocov3 recipes [NAME]`."""
    with reporting():
        (options,) = parse(RECIPES_COMMAND, arguments)
        if options.name is not None:
            folder = RECIPES / "evaluation" if options.name in recipe_names(RECIPES / "evaluation") else RECIPES
            print(find_recipe(options.name, folder).read_text(encoding="utf-8").rstrip())
            return
        for title, folder in (("pretrain", RECIPES), ("linear-probe, finetune", RECIPES / "evaluation")):
            print(f"{title}:")
            print("\n".join(f"  {name}" for name in recipe_names(folder)))
