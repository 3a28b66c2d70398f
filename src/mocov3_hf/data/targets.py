"""Labels of several classes for an image, and numbers: the targets of multi-label classification and of regression.

Legend: N images, C classes, T targets.
"""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL


# Between the names of the classes of an image in a column of text. The first that occurs is used.
SEPARATORS = ("|", ";", ",", " ")
# Targets of a regression, so that they and predictions far off fit into float32.
_LARGEST = 1e30


def infer_problem_type(dataset: datasets.Dataset, columns: Sequence[str]) -> str:
    """
    What labels are by the type of their columns: lists of classes, and several columns of 0 and 1, are multi-label;
    floating-point numbers, and several columns of numbers, are regression; other columns have one class per image.
    """
    feature = dataset.features[columns[0]]
    inner = getattr(feature, "feature", None)
    if len(columns) == 1 and inner is None:
        return REGRESSION if _is_float(feature) else SINGLE_LABEL
    if len(columns) == 1 and not _is_float(inner):
        return MULTI_LABEL
    values = (value for column in columns for row in dataset[column][:] for value in (row if inner else [row]))
    return MULTI_LABEL if all(value in (0, 1) for value in values) else REGRESSION


def read_targets(
    dataset: datasets.Dataset, columns: Sequence[str], problem_type: str, num_classes: int | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """
    The labels of multi-label classification, (N, C) uint8, 1 for the classes that apply; or of regression, (N, T)
    float64. And the names of the classes or targets, None without names.

    Args:
        columns: One column of lists of classes (numbers or names), of lists of 0 and 1, of names with one of
            `SEPARATORS` between them, or of numbers; or several columns of 0 and 1 or of numbers.
        problem_type: `MULTI_LABEL` or `REGRESSION`.
        num_classes: Where lists of class numbers without names may lack the last classes, their number.

    Raises:
        ValueError: Missing labels, or labels of another kind, by row.
    """
    if problem_type == REGRESSION:
        return _numbers(dataset, columns)
    feature, values = dataset.features[columns[0]], dataset[columns[0]][:]
    inner = getattr(feature, "feature", None)
    if len(columns) > 1 or _is_number(feature):
        return np.stack([_zero_one(column, dataset[column][:]) for column in columns], axis=1), list(columns)
    if _is_text(feature):
        found = next((mark for mark in SEPARATORS if any(mark in (value or "") for value in values)), None)
        # Of a CSV file, an empty field is missing.
        values = [[] if not value else value.split(found) if found else [value] for value in values]
        return _named(columns[0], [[name.strip() for name in row if name.strip()] for row in values])
    _check_present(columns[0], values)
    if inner is None:
        raise ValueError(
            f"label column {columns[0]!r} holds {_describe(feature)}, expected lists of classes, names with"
            f" {' or '.join(map(repr, SEPARATORS[:3]))} between them, or several columns of 0 and 1:"
            " name others with --label_column"
        )
    if _is_text(inner):
        return _named(columns[0], values)
    names = list(inner.names) if isinstance(inner, datasets.ClassLabel) else None
    return _listed(columns[0], values, names, num_classes), names


def _numbers(dataset: datasets.Dataset, columns: Sequence[str]) -> tuple[np.ndarray, list[str] | None]:
    feature = dataset.features[columns[0]]
    for column in columns:
        feature = dataset.features[column]
        if isinstance(feature, datasets.ClassLabel) or not _is_number(getattr(feature, "feature", feature)):
            raise ValueError(
                f"label column {column!r} holds {_describe(feature)}{_first_word(feature, dataset[column][:])}:"
                " regression needs numbers in every row, or name another column with --label_column"
            )
        _check_present(column, dataset[column][:])
    if len(columns) > 1:
        values, names = list(zip(*(dataset[column][:] for column in columns), strict=True)), list(columns)
    elif hasattr(feature, "feature"):
        values, names = dataset[columns[0]][:], None
    else:
        values, names = [[value] for value in dataset[columns[0]][:]], [columns[0]]
    _check_lengths(columns[0], values)
    targets = np.array(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(targets).all(axis=1))
    if len(bad):
        raise ValueError(
            f"column {' '.join(columns)!r} has NaN or infinity in {len(bad)} rows, the first in row {bad[0]}: fill in"
            " or remove these rows"
        )
    largest = np.abs(targets).max()
    if largest > _LARGEST:
        raise ValueError(
            f"column {' '.join(columns)!r} has values up to {largest:.3g}, and a model returns float32 (up to"
            f" {_LARGEST:g} here): choose a larger unit, or the logarithm"
        )
    return targets, names


def _zero_one(column: str, values: Sequence[Any]) -> np.ndarray:
    _check_present(column, values)
    wrong = next((row for row, value in enumerate(values) if value not in (0, 1)), None)
    if wrong is not None:
        raise ValueError(
            f"label column {column!r} has {values[wrong]!r} in row {wrong}: expected 0 or 1, as in every column of"
            " multi-label classification"
        )
    return np.array(values, dtype=np.uint8)


def _named(column: str, values: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    names = sorted({name for row in values for name in row})
    if not names:
        raise ValueError(f"label column {column!r} names no class: choose another with --label_column")
    numbers = {name: number for number, name in enumerate(names)}
    return _listed(column, [[numbers[name] for name in row] for row in values], names), names


def _listed(
    column: str, values: list[list[int]], names: list[str] | None, num_classes: int | None = None
) -> np.ndarray:
    """From lists of the numbers of classes; or, without names, of 0 and 1."""
    repeats = next((row for row, value in enumerate(values) if len(set(value)) < len(value)), None)
    is_zero_one = names is None and all(number in (0, 1) for value in values for number in value)
    is_table = len(values[0]) > 1 and len({len(value) for value in values}) == 1
    if is_zero_one and (repeats is not None or (is_table and num_classes in (None, len(values[0])))):
        _check_lengths(column, values)
        return np.array(values, dtype=np.uint8)
    if repeats is not None:
        raise ValueError(
            f"column {column!r} lists a class twice in row {repeats}: {values[repeats]}; expected the numbers of the"
            " classes that apply, or 0 and 1 for every class"
        )
    wrong = next(
        (row for row, value in enumerate(values) if any(number < 0 or number != int(number) for number in value)), None
    )
    if wrong is not None:
        raise ValueError(f"column {column!r} has {values[wrong]} in row {wrong}: number the classes from 0")
    largest = max((max(value) for value in values if value), default=-1)
    if largest < 0:
        raise ValueError(f"no row of column {column!r} has a class: choose another with --label_column")
    if (names is not None and largest >= len(names)) or largest >= 1 << 20:
        raise ValueError(f"column {column!r} has the class {largest}, which has no name: number the classes from 0")
    width = max(int(largest) + 1, num_classes or 0) if names is None else len(names)
    labels = np.zeros((len(values), width), dtype=np.uint8)
    for row, value in enumerate(values):
        labels[row, np.array(value, dtype=np.int64)] = 1
    return labels


def _check_present(column: str, values: Sequence[Any]) -> None:
    missing = [
        row
        for row, value in enumerate(values)
        if value is None or (isinstance(value, list) and any(item is None for item in value))
    ]
    if missing:
        raise ValueError(
            f"column {column!r} has {len(missing)} missing labels, the first in row {missing[0]}: fill in or remove"
            " these rows"
        )


def _check_lengths(column: str, values: Sequence[Sequence[Any]]) -> None:
    wrong = next((row for row, value in enumerate(values) if len(value) != len(values[0])), None)
    if wrong is not None or len(values[0]) == 0:
        wrong = wrong or 0
        raise ValueError(
            f"column {column!r} has {len(values[wrong])} values in row {wrong}, expected {len(values[0]) or 'some'} as"
            " in the first row: give every row the same number"
        )


def _first_word(feature: Any, values: Sequence[Any]) -> str:
    """Of a column of text, the first value that is not a number, with its row."""
    for row, value in enumerate(values if _is_text(feature) else []):
        try:
            float(value or "")
        except ValueError:
            return f" ({value!r} in row {row})"
    return ""


def several_names(names: Sequence[str]) -> str | None:
    """The first of names of classes that looks like several (`cat|dog`, `cat;dog`), None without one."""
    return next((name for name in names if any(mark in name for mark in SEPARATORS[:2])), None)


def looks_numeric(names: Sequence[str]) -> bool:
    """Whether most of these names of classes are numbers with a decimal point or exponent."""

    def is_decimal(name: str) -> bool:
        try:
            return not name.strip().lstrip("+-").isdecimal() and math.isfinite(float(name))
        except ValueError:
            return False

    return 2 * sum(map(is_decimal, names)) > len(names)


def _is_float(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("float", "double", "decimal"))


def _is_number(feature: Any) -> bool:
    return _is_float(feature) or (isinstance(feature, datasets.Value) and "int" in feature.dtype)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _describe(feature: Any) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"classes ({', '.join(feature.names[:3])}{', ...' if len(feature.names) > 3 else ''})"
    return "text" if _is_text(feature) else str(feature)
