"""
What a command takes: its options, each declared once as a documented field of a dataclass.

options.py reads them from a recipe (YAML) and from the command line, option_help.py makes `--help` of them.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    old: Mapping[str, Callable[[Any], Any] | None] | Iterable[str] = (),
    old_values: Mapping[str, str] | None = None,
    advanced: bool = False,
    metavar: str | None = None,
    required: bool = False,
) -> Any:
    """
    Declare an option as a field of a dataclass; its annotation is its type.

    Args:
        default: A list or mapping is copied for every instance. Left out, the option is required.
        help: What `--help` says: a noun phrase or an imperative, without type and default.
        at_least, at_most, above, below: Bounds of a number, or of every number in a list.
        old: Earlier spellings, which still work with a deprecation line; a mapping gives a function from the old value
            to the new one, or None.
        old_values: Earlier words for a choice, with those of today; they still work with a deprecation line.
        advanced: Shown by `--help all` only.
        metavar: Placeholder of the value in `--help`, such as DIR.
        required: Whether `--help` marks an option with a default as required; its command checks it.
    """
    metadata = {
        "help": help,
        "bounds": {"at least": at_least, "above": above, "at most": at_most, "below": below},
        "old": dict(old) if isinstance(old, Mapping) else dict.fromkeys(old),
        "old_values": old_values or {},
        "advanced": advanced,
        "metavar": metavar,
        "required": required,
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
