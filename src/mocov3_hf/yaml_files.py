"""YAML files from anywhere, read without surprises."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .reporting import UsageError


# Bounds that no sensible recipe reaches; they keep mistakes and hostile files from costing time or memory.
LARGEST_FILE, DEEPEST_NESTING, MOST_ALIASES = 100_000, 20, 50


def check_unique(keys: Iterable[str]) -> None:
    """UsageError where a key of a mapping occurs twice."""
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"the key {twice!r} occurs twice")


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, deep nesting, and aliases that multiply."""

    nesting = aliases = 0

    def compose_node(self, parent, index):
        self.nesting += 1
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.nesting > DEEPEST_NESTING:
            raise UsageError(f"it is nested more than {DEEPEST_NESTING} levels deep")
        if self.aliases > MOST_ALIASES:
            raise UsageError(f"it has more than {MOST_ALIASES} aliases")
        node = super().compose_node(parent, index)
        self.nesting -= 1
        return node

    def construct_mapping(self, node, deep=False):
        check_unique(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        return super().construct_mapping(node, deep)


INT = "tag:yaml.org,2002:int"
# Integers are decimal: in YAML 1.1, 040 is 32, and 8:30 is 510 (here a text).
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != INT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_StrictLoader.add_constructor(INT, lambda _loader, node: int(node.value))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    The mapping in a YAML file.

    Raises:
        UsageError: a file that cannot be read, is not valid YAML, or does not hold a mapping.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError(f"it has {path.stat().st_size:,} bytes, a recipe has at most {LARGEST_FILE:,}")
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
        _check_expansion(content)
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {_reason(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of options, got {describe_yaml(content)}")
    return content or {}


def _reason(error: Exception) -> str:
    """What is wrong with a file, and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"  # type: ignore[attr-defined]
    if isinstance(error, yaml.reader.ReaderError):  # a character that YAML does not allow
        return f"character {error.position + 1}: {error.reason}"
    return " ".join(str(error).split()) or type(error).__name__


def _check_expansion(content: Any) -> None:
    """UsageError where aliases expand to more than a recipe could hold, or contain themselves."""
    waiting, seen = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > LARGEST_FILE or depth > DEEPEST_NESTING:
            raise UsageError("its aliases expand to more than a recipe can hold")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]


def describe_yaml(content: Any) -> str:
    return {list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value"}.get(
        type(content), f"a {type(content).__name__}"
    )
