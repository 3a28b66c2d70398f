"""From text and YAML to the values of options: one conversion for recipes and command lines."""

import contextlib
import datetime
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from .reporting import UsageError, typed_command
from .yaml_files import DEEPEST_NESTING, check_unique


# No number of a sensible recipe is larger; that keeps mistakes and hostile files from costing time or memory.
LARGEST_INTEGER = 10**12
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# YAML 1.1 takes 1e-6, without a point, for text.
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def convert(name: str, value: Any, kind: Any, bounds: Mapping[str, float | None] | None = None) -> Any:
    """
    A value of a recipe or of the command line as the type of its option.

    Raises:
        UsageError: another type, or a number outside its bounds.
    """
    parts = alternatives(kind)
    if type(None) in parts and (value is None or (isinstance(value, str) and value.lower() == "null")):
        return None
    words = next((part for part in parts if typing.get_origin(part) is Literal), None)
    kind = next(part for part in parts if part is not type(None))
    if words is not None and words is not kind:  # such as `list[float] | Literal["auto"]`
        only = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        if isinstance(only, str) and only.lower() in typing.get_args(words):
            return only.lower()
        if isinstance(only, str) and not only.startswith("[") and _to_float(only) is None:
            several = describe_type(plain_type(kind), several=True)
            raise UsageError(f"{name} takes {' or '.join(typing.get_args(words))}, or {several}, got {shown(only)}")
    origin = typing.get_origin(kind)
    if origin is list:
        return _convert_list(name, value, typing.get_args(kind)[0], bounds)
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], (list, dict)):
        value = value[0]
    if isinstance(value, (list, tuple, dict)) and kind is not dict:
        raise UsageError(f"{name} takes {describe_type(kind)}, got {shown(value)}")
    if value is None:
        raise UsageError(f"{name} takes {describe_type(kind)}, got nothing")
    if origin is Literal:
        return _convert_choice(name, value, typing.get_args(kind))
    converters: dict[type, Callable] = {
        bool: _to_bool,
        int: _to_int,
        float: _to_float,
        str: _to_text,
        dict: _to_mapping,
    }
    try:
        converted = converters[kind](value)
    except UsageError as error:  # of a value inside a mapping
        raise UsageError(f"{name}: {error}") from error
    if converted is None:
        raise UsageError(f"{name} takes {describe_type(kind)}, got {shown(value)}")
    if kind in (int, float):
        check_bounds(name, converted, bounds or {})
    return converted


def _convert_list(name: str, value: Any, kind: Any, bounds: Mapping[str, float | None] | None) -> list:
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(item, (list, dict)) for item in values):
        raise UsageError(f"{name} takes a list of {describe_type(kind, several=True)}, got {shown(value)}")
    return [convert(name, item, kind, bounds) for item in values]


def _convert_choice(name: str, value: Any, choices: tuple) -> Any:
    # YAML 1.1 reads `no` as a boolean.
    words = {True: YES, False: NO}[value] if isinstance(value, bool) else (str(value).lower(),)
    found = next((choice for choice in choices if str(choice).lower() in words), None)
    if found is None:
        close = difflib.get_close_matches(str(value), map(str, choices), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"{name} takes one of {', '.join(map(str, choices))}, got {shown(value)}{hint}")
    return found


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    return True if text in YES else False if text in NO else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if re.fullmatch(r"[-+]?[0-9]{1,40}", text):
            return int(text)
        value = _to_float(text)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _to_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value if "\0" not in value else None
    if isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
        return str(value)
    return None


def _to_mapping(value: Any) -> dict | None:
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_unique_keys)
        except UsageError:
            raise
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return None
    return {key: _numbers(item) for key, item in value.items()}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    check_unique(key for key, _ in pairs)
    return dict(pairs)


def _numbers(value: Any, depth: int = 0) -> Any:
    """A value inside a mapping, with numbers that YAML takes for text as numbers."""
    if depth > DEEPEST_NESTING:
        raise UsageError(f"a mapping is nested more than {DEEPEST_NESTING} levels deep")
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"numbers in a mapping must be finite, got {value}")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise UsageError(f"numbers in a mapping must not exceed {LARGEST_INTEGER:g}, got {shown(value)}")
    if isinstance(value, dict):
        return {key: _numbers(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(item, depth + 1) for item in value]
    return value


def check_bounds(name: str, value: float, bounds: Mapping[str, float | None]) -> None:
    """
    Raises:
        UsageError: `value` violates one of the bounds "at least", "at most", "above" and "below".
    """
    violated = {
        "at least": lambda bound: value < bound,
        "at most": lambda bound: value > bound,
        "above": lambda bound: value <= bound,
        "below": lambda bound: value >= bound,
    }
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    if any(violated[word](bound) for word, bound in given.items()):
        wanted = " and ".join(f"{word} {bound:g}" for word, bound in given.items())
        raise UsageError(f"{name} must be {wanted}, got {shown(value)}")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise UsageError(f"{name} must not exceed {LARGEST_INTEGER:g}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}... ({len(text)} characters)"


def describe_type(kind: Any, several: bool = False) -> str:
    """A type in words: `one integer`, `numbers`."""
    words = {
        bool: ("true or false", "true or false"),
        int: ("one integer", "integers"),
        float: ("one finite number", "finite numbers"),
        str: ("text", "texts"),
        dict: ("a mapping (JSON on the command line)", "mappings"),
    }
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) is list:
        return f"a list of {describe_type(typing.get_args(kind)[0], several=True)}"
    return words[kind][several]


def alternatives(kind: Any) -> tuple:
    """The parts of a union, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def plain_type(kind: Any) -> Any:
    """The type inside `X | None` and `list[X]`."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return plain_type(parts[0])
    return parts[0] if typing.get_origin(kind) is list else kind


def is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list or any(typing.get_origin(part) is list for part in typing.get_args(kind))


def resume_command(typed: list[str]) -> str:
    """The command that was typed, with the option to resume and without those that contradict it."""
    kept, waiting = [], typed[::-1]
    while waiting:
        argument = waiting.pop()
        name, equals, _ = argument.replace("-", "_").partition("=")
        if name not in ("__resume_from_checkpoint", "__overwrite_output_dir"):
            kept.append(argument)
        elif not equals and waiting and (name == "__resume_from_checkpoint" or waiting[-1].lower() in YES + NO):
            waiting.pop()  # its value
    return typed_command([*kept, "--resume_from_checkpoint", "auto"])
