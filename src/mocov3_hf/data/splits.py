"""Split expressions: names of splits joined by "+", each with a slice if wanted, as in `train[:80%]+validation`."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

import datasets
import numpy as np

from .scan import SPLIT_NAMES


class MissingSplitError(ValueError):
    """
    A split that does not exist.

    Args:
        split: Its name.
        dataset_name: Of what.
        known: The splits that there are.
        reason: Why there are no others, appended to the message.

    Attributes:
        option: What names the split in the command that runs, see `split_option`.
    """

    def __init__(self, split: str, dataset_name: str, known: Iterable[object], reason: str = ""):
        super().__init__(split, dataset_name, [str(name) for name in known], reason)
        self.option = ""

    def __str__(self) -> str:
        split, dataset_name, known, reason = self.args
        there_are = f"split {split!r} does not exist in {dataset_name!r}; it has: {', '.join(known)}"
        return f"{there_are}. Pass one of them{f' as {self.option}' if self.option else ''}{reason}"


@contextlib.contextmanager
def split_option(name: str) -> Iterator[None]:
    """Where the split that an option names is opened: a message that it does not exist names the option."""
    try:
        yield
    except MissingSplitError as error:
        error.option = error.option or name
        raise


def choose_rows(
    splits: dict[str, np.ndarray], split: str, dataset_name: str, notes: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """
    The rows of a split expression: names joined by "+", each with a slice of `datasets` if wanted, `train[:10%]`.

    Returns:
        int64 (n,), and the names of the splits.

    Raises:
        ValueError: A split does not exist or is empty, or a slice is not valid.
    """
    chosen, names = [], []
    for matching, part in split_parts(split, splits, dataset_name, f"; {notes[0]}" if notes else ""):
        rows = np.concatenate([splits[name] for name in matching])
        chosen.append(sliced(rows, part) if part else rows)
        names += matching
    rows = np.concatenate(chosen)
    if len(rows) == 0:
        raise ValueError(f"split {split!r} of {dataset_name!r} is empty")
    return rows, names


def choose_parts(splits: Mapping[str, datasets.Dataset], split: str, dataset_name: str) -> list[datasets.Dataset]:
    """The data sets that a split expression names; arguments and errors are those of `choose_rows`."""
    chosen = []
    for matching, part in split_parts(split, splits, dataset_name):
        for dataset in (splits[name] for name in matching):
            chosen.append(dataset.select(sliced(np.arange(len(dataset)), part)) if part else dataset)
    return chosen


def split_parts(
    split: str, known: Iterable[str], dataset_name: str, reason: str = ""
) -> Iterator[tuple[list[str], str]]:
    """The names of splits and the slice, such as `[:10%]` or empty, of each part of a split expression."""
    for part in (part.strip() for part in split.split("+")):
        base, bracket, rest = part.partition("[")
        matching = [base] if base in known else split_aliases(base, known)
        if not matching:
            raise MissingSplitError(base, dataset_name, known, reason)
        yield matching, bracket + rest


def split_aliases(name: str, known: Iterable[str]) -> list[str]:
    """The splits that mean the same: `val` for a folder `validation`, `train` for `Training`."""
    canonical = SPLIT_NAMES.get(os.fsencode(name.lower()))
    return [other for other in known if canonical and SPLIT_NAMES.get(os.fsencode(other.lower())) == canonical]


def sliced(rows: np.ndarray, spec: str) -> np.ndarray:
    try:
        (part,) = datasets.ReadInstruction.from_spec(f"rows{spec}").to_absolute({"rows": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"slice {spec!r} of a split is not valid: {' '.join(str(error).split())}") from error
    return rows[part.from_ or 0 : len(rows) if part.to is None else part.to]


def names_of_files(split: str, known: list[str]) -> str:
    """A split expression with the names of folders or files: `val` for a folder `validation`."""
    parts = []
    for part in (part.strip() for part in split.split("+")):
        base = part.split("[")[0]
        matching = [base] if base in known else split_aliases(base, known)
        parts += [name + part[len(base) :] for name in matching] or [part]
    return "+".join(parts)


def check_split(builder, split: str, dataset_name: str) -> list[str]:
    """The names in a split expression. Raises MissingSplitError if one does not exist."""
    known = list(builder.config.data_files or builder.info.splits or ())
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if known and part.split("[")[0] not in known:
            raise MissingSplitError(part, dataset_name, known)
    return parts
