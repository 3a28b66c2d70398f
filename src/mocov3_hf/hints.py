"""What an error message offers: the nearest name that exists, and choices in words."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def either(names: Iterable[object]) -> str:
    """Choices in words: `A`, `A or B`, `A, B or C`."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def nearest(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def describe_missing(name: str | os.PathLike, what: str = "folder", fix: str = "") -> str:
    """
    What to say about a path that does not exist: the nearest name that does, or how to fix it.

    Args:
        name: The path.
        what: What it should be.
        fix: What to do if no name is near.

    Returns:
        Such as `folder 'runs/frist' does not exist; did you mean 'runs/first'?`.
    """
    path = Path(os.path.expanduser(name))
    text = f"{what} {os.fspath(name)!r} does not exist"
    if os.path.islink(path):
        return f"{text}: it is a link to {os.readlink(path)!r}"
    # `Path.exists` raises for a name that is too long.
    first = ([part for part in (path, *path.parents) if not os.path.exists(part)] or [path])[-1]
    try:
        siblings = [entry.name for entry in first.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        siblings = []
    close = difflib.get_close_matches(first.name, siblings, n=1)
    if not close:
        if first != path and len(path.parts) > 2:  # of `name/name`, both may be meant as a Hub id
            text += f" (there is no folder {str(first)!r})"
        return f"{text}: {fix}" if fix else text
    meant = first.with_name(close[0])
    whole = meant / path.relative_to(first)
    return f"{text}; did you mean {str(whole if os.path.exists(whole) else meant)!r}?"
