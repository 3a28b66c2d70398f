"""`--help`, generated from the declarations of the options."""

import argparse
import dataclasses
import inspect
import json
import sys
import typing
from typing import Any, Literal

from .declarations import Command
from .option_values import is_list, plain_type
from .recipe_files import recipe_names


def show_help(command: Command, arguments: list[str]) -> None:
    """Print `--help` or `--help all` and exit, where a command line asks for it."""
    for place, token in enumerate(arguments):
        if token in ("-h", "--help"):
            print(help_text(command, everything=arguments[place + 1 : place + 2] == ["all"]))
            sys.exit(0)


def help_text(command: Command, everything: bool = False) -> str:
    """What a command does and its options, section by section; those marked advanced only with `everything`."""
    fields, kinds = command.fields(), command.types()
    parser = argparse.ArgumentParser(
        usage=_usage(command),
        description=command.summary,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=118),
    )
    if command.recipes is not None:
        names = recipe_names(command.name, command.recipes)
        section = parser.add_argument_group("Recipe", "\n".join(names))
        section.add_argument("--recipe", metavar="NAME|FILE", help="one of these, or a YAML file of options")
    hidden, required = 0, "required" if command.recipes is None else "required, here or in the recipe"
    for title, names in _sections(command).items():
        section = parser.add_argument_group(title)
        for name in names:
            metadata = fields[name].metadata
            if metadata["advanced"] and not everything:
                hidden += 1
                continue
            section.add_argument(
                f"--{name}",
                metavar=metadata["metavar"] or _metavar(kinds[name]),
                help=_described(fields[name], required),
            )
    if hidden:
        parser.epilog = f"{hidden} more options: mocov3 {command.name} --help all"
    return parser.format_help().rstrip()


def _usage(command: Command) -> str:
    """The positional and what is required; the rest as `[--option value ...]`."""
    fields, kinds = command.fields(), command.types()
    words = [f"mocov3 {command.name}"]
    if command.positional is not None:
        item = fields[command.positional]
        word = item.metadata["metavar"] or command.positional.upper()
        word = f"{word} ..." if is_list(kinds[command.positional]) else word
        words.append(word if is_required(item) else f"[{word}]")
    if command.recipes is not None:
        words.append("[--recipe NAME|FILE]")
    for name, item in fields.items():
        if is_required(item) and name != command.positional:
            words.append(f"--{name} {item.metadata['metavar'] or _metavar(kinds[name])}")
    return " ".join([*words, "[--option value ...]" if set(fields) - {command.positional} else "[--help]"])


def is_required(item: dataclasses.Field) -> bool:
    """Whether a command line must give an option."""
    has_default = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
    return item.metadata["required"] or not has_default


def phrase(help: str) -> str:
    """The description of an option as a phrase: in lower case but for names and abbreviations, without a full stop."""
    text = help.rstrip(".")
    return text[0].lower() + text[1:] if text[1:2].islower() and not text.startswith("Hub ") else text


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


def _described(item: dataclasses.Field, required: str) -> str:
    default = item.default if item.default is not dataclasses.MISSING else None
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    text = phrase(item.metadata["help"])
    if is_required(item):
        text += f" ({required})"
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
