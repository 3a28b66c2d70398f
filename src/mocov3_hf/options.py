"""
One parser of options: from a recipe (YAML), the command line, or the keywords of a Python call.

This module and those that it imports import neither torch nor transformers, so that mistakes are reported at once.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .declarations import Command, option
from .hints import OTHER_NAMES, either, nearest
from .option_help import phrase, show_help
from .option_values import NO, YES, convert, describe_type, is_list, plain_type, shown
from .recipe_files import find_recipe, recipe_command, recipe_names, without_command
from .reporting import UsageError, reporting, warn
from .yaml_files import read_yaml


# Placeholders of options whose value is, or may be, a path on this machine.
PATH_WORDS = frozenset(("CHECKPOINT", "DATASET", "DIR", "FILE", "FOLDER", "IMAGES", "MODEL", "PATH"))
Group = TypeVar("Group")


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
    path = Path(path)
    content = without_command(read_yaml(path), path, command.name)
    return _converted(command, content.items(), path.name, "", quiet)


def recipe_values(
    command: Command, recipe: str | os.PathLike | Mapping[str, Any], quiet: bool = False
) -> dict[str, Any]:
    """
    The options that a recipe sets, converted.

    Args:
        command: What may be set.
        recipe: Name, YAML file, or the options themselves.
        quiet: As `values_of_recipe`.

    Raises:
        UsageError: No such recipe, and as `values_of_recipe`.
    """
    if isinstance(recipe, Mapping):
        content = without_command(recipe, Path("recipe"), command.name)
        return _converted(command, content.items(), "recipe", "", quiet)
    if command.recipes is None or not isinstance(recipe, str | os.PathLike):
        raise UsageError(f"recipe takes a name, a YAML file or a mapping of options, got {shown(recipe)}")
    return values_of_recipe(command, find_recipe(os.fspath(recipe), command.recipes, command.name), quiet)


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
    one_too_many = ""  # what to say if a value after another turns out not to be the positional
    waiting = list(arguments)[::-1]

    def is_value(token: str) -> bool:
        return not token.startswith("--")

    while waiting:
        token = waiting.pop()
        if is_value(token):
            if token.startswith("-") and len(token) > 1 and not re.match(r"-[0-9.]", token):
                hint = _meant(command, token[1:].replace("-", "_"), "--", cutoff=1)
                raise UsageError(f"there is no option {token!r}: options begin with two dashes{hint}")
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
        extra = waiting[-1] if waiting and is_value(waiting[-1]) and not is_list(kind) else ""
        if plain_type(kind) in (int, float) and re.fullmatch(r"[-+]?[0-9.]+", extra):
            one_too_many = f"--{written} takes {describe_type(plain_type(kind))}, got {shown(f'{values[0]} {extra}')}"
        elif plain_type(kind) is bool and extra and loose:
            one_too_many = f"--{written} takes {describe_type(bool)}, got {shown(extra)}"
        given.append((name, values if is_list(kind) else values[0]))
    loose = loose or _positional_after_list(command, given)
    if loose:
        takes_many = command.positional is not None and is_list(types[command.positional])
        if one_too_many and not takes_many and len(loose) + (command.positional in dict(given)) != 1:
            raise UsageError(one_too_many)
        if command.positional is None:
            raise UsageError(f"unexpected argument {loose[0]!r}: {all_options(command)}")
        if not takes_many and len(loose) > 1:
            takes_data = "dataset_name" in types and command.positional != "dataset_name"
            hint = f"; did you mean --dataset_name {loose[1]}?" if takes_data else ""
            raise UsageError(f"unexpected argument {loose[1]!r}: {command.name} takes one {command.positional}{hint}")
        given.append((command.positional, loose if len(loose) > 1 else loose[0]))
    return _converted(command, given, "command line", "--", False)


def _positional_after_list(command: Command, given: list[tuple[str, Any]]) -> list[str]:
    """
    The values of a positional that a list option has taken, as in `report --label_column defect RUN`. They are removed
    from `given`, and one value stays with the option.

    Only of a positional that is given nowhere else. After numbers and fixed choices, it is what is neither. After
    text, it is the last value, or all at the end that exist as paths if the positional is a list; a command that can
    do without its positional takes only what exists.
    """
    fields, types, name = command.fields(), command.types(), command.positional
    chosen = dict(given)
    if name is None or name in chosen:
        return []
    is_required = _has_no_default(fields[name])
    if not is_required and "dataset_name" in chosen:
        return []
    if command.recipes is not None and "recipe" in chosen and name in recipe_values(command, chosen["recipe"], True):
        return []
    lists = [(place, *pair) for place, pair in enumerate(given) if isinstance(pair[1], list)]
    # The last one first, and those of text after the others: any value may be meant for them.
    for place, option_name, values in sorted(lists, key=lambda item: (plain_type(types[item[1]]) is str, -item[0])):
        kind, number = types[option_name], 0
        is_text = plain_type(kind) is str
        for value in values[:0:-1]:
            if not os.path.exists(expanded(value)) and (is_text or _is_element(value, kind)):
                break
            number += 1
        if is_text:
            takes_paths = fields[option_name].metadata["metavar"] in PATH_WORDS
            several = is_list(types[name]) and not takes_paths
            number = max(number if several else min(number, 1), is_required and len(values) > 1)
        if number:
            given[place] = (option_name, values[:-number])
            return values[-number:]
    return []


def _is_element(value: str, kind: Any) -> bool:
    """Whether a value may be meant for a list of numbers or choices: it is one, or begins like a number."""
    try:
        convert("", [value], kind)
    except UsageError:
        return re.match(r"[-+]?[.0-9]", value) is not None
    return True


def values_of_keywords(
    command: Command, options: Mapping[str, Any], recipe: str | os.PathLike | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    The options of a Python call over those of a recipe, converted. None is a value here, as `null` is on a command
    line.

    Raises:
        UsageError: an option that does not exist, a value of another type, no such recipe.
    """
    given = [
        (name, "null" if value is None else os.fspath(value) if isinstance(value, os.PathLike) else value)
        for name, value in options.items()
    ]
    values = _converted(command, given, f"{command.name.replace('-', '_')}()", "", False)
    return values if recipe is None else merged(recipe_values(command, recipe), values)


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
        if isinstance(value, str) and value in metadata["old_values"]:
            meant = metadata["old_values"][value]
            if not quiet:
                warn(f"{dash}{name} {value} is deprecated: use {meant}")
            value = meant
        label = f"{dash}{name}" if dash else f"{source}: {name}"
        converted = convert(label, value, types[name], metadata["bounds"])
        if PATH_WORDS.intersection(re.findall(r"[A-Z_]+", metadata["metavar"] or "")):
            converted = expanded(converted)
        if isinstance(converted, dict) and isinstance(values.get(name), dict):
            converted = over(converted, values[name])
        values[name] = converted
    return values


def expanded(value: Any) -> Any:
    """A path, or a list of them, with "~" replaced by the home folder."""
    if isinstance(value, list):
        return [expanded(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _refuse(command: Command, name: str, source: str, dash: str) -> typing.NoReturn:
    key = name.replace("-", "_")
    where = "" if dash else f"{source}: "
    if key in command.removed:
        raise UsageError(f"{where}{dash}{name} no longer exists: {command.removed[key]}")
    if key in command.hints:
        raise UsageError(f"{where}{command.hints[key]}")
    hint = _meant(command, key, dash)
    raise UsageError(f"{where}there is no option {dash + name!r}{hint or f'; {all_options(command)}'}")


def _meant(command: Command, name: str, dash: str, cutoff: float = 0.5) -> str:
    """`; did you mean '--x'?`, or nothing: by the names of other tools, else by the nearest name."""
    fields = command.fields()
    meant = [repr(dash + other) for other in OTHER_NAMES.get(name, ()) if other in fields]
    return f"; did you mean {either(meant)}?" if meant else nearest(name, fields, dash, cutoff)


def all_options(command: Command) -> str:
    """Where a user finds the options of a command."""
    return f"mocov3 {command.name} --help all lists all options" if command.fields() else "the command takes none"


def over(above: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """Two mappings merged by key. A backbone of another type replaces the first one, whose keys it does not have."""
    kind = below.get("model_type", "mocov3_vit")
    return above if above.get("model_type", kind) != kind else {**below, **above}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command line over those of a recipe."""
    both = {
        name: over(value, below[name])
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
        if _has_no_default(item) and name not in values:
            kind = plain_type(typing.get_type_hints(group)[name])
            choices = f" ({describe_type(kind)})" if typing.get_origin(kind) is typing.Literal else ""
            raise UsageError(f"--{name} is missing: {phrase(item.metadata['help'])}{choices}")
    return group(**{name: value for name, value in values.items() if name in names})


def _has_no_default(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


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
        values = merged(recipe_values(command, recipe), values)
        if "recipe" in command.fields():
            values["recipe"] = recipe
    return values


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
            print(find_recipe(options.name).read_text(encoding="utf-8").rstrip())
            return
        for command in sorted({recipe_command(find_recipe(name)) for name in recipe_names()}, reverse=True):
            print(f"{command}:")
            print("\n".join(f"  {name}" for name in recipe_names(command)))
