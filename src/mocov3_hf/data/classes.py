"""One numbering of classes for the splits of a data set: classes are the same if their names are.

A class of the test split that the training split does not have is refused: no classifier could answer it, and its
images would count as wrong answers.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..problem_types import REGRESSION, SINGLE_LABEL
from .labeled import LabeledImages, open_labeled, stratified_split
from .splits import split_option


HELD_OUT = 0.2  # of each class, if a single split is there


def open_labeled_splits(
    dataset_name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    problem_type: str = SINGLE_LABEL,
    superclass_column: str | None = None,
    split_options: tuple[str, str] = ("--train_split", "--test_split"),
) -> tuple[LabeledImages, LabeledImages]:
    """
    The split to learn from and the split to test on, with the same numbering of classes.

    Of a single split, given twice, a fifth of each class is the test split, always the same images. `split_options`
    are what messages call the two splits.

    Raises:
        ValueError: As `open_labeled`; or a class that only the test split has, or a single class.
    """
    names = (image_column, label_column)
    options: dict[str, Any] = {"revision": revision, "superclass_column": superclass_column}
    with split_option(split_options[0]):
        train = open_labeled(dataset_name, config_name, train_split, *names, problem_type=problem_type, **options)
    if train_split == test_split:
        images = train
        held_out = stratified_split(images.labels, HELD_OUT, seed=0)
        if not held_out.any():
            raise ValueError(
                f"split {train_split!r} has too few images of each class to hold out a fifth of them: pass another"
                f" {split_options[1]}"
            )
        train, test = (images.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return match_splits(train, test, train_split, test_split)
    options |= {"problem_type": train.problem_type, "num_classes": train.num_classes}
    with split_option(split_options[1]):
        test = open_labeled(dataset_name, config_name, test_split, *names, **options)
    return match_splits(train, test, train_split, test_split)


def match_splits(
    train: LabeledImages, test: LabeledImages, train_split: str = "train", test_split: str = "test"
) -> tuple[LabeledImages, LabeledImages]:
    """
    Number the classes of both splits as those of the training split.

    Plain integers that are not 0, 1, 2, ... without gaps become names: 7, 13 and 900 are three classes.

    Raises:
        ValueError: As `open_labeled_splits`.
    """
    if train.problem_type != SINGLE_LABEL:
        return _match_targets(train, test, train_split, test_split)
    present = np.unique(train.labels)
    if len(present) < 2:
        raise ValueError(
            f"split {train_split!r} has images of a single class, {_name(train, int(present[0]))!r}, which cannot"
            " be told apart from others: pass images of at least two classes"
        )
    if train.class_names is None and not np.array_equal(present, np.arange(len(present))):
        numbers = np.searchsorted(present, train.labels)
        train = train.relabel(numbers, [str(label) for label in present.tolist()])
    if train.class_names != test.class_names:
        test = _renumbered(train, test, train_split, test_split)
    without = np.setdiff1d(test.labels, train.labels)
    if len(without):
        unknown = {_name(train, int(label)): int((test.labels == label).sum()) for label in without}
        names = [_name(train, int(label)) for label in np.unique(train.labels)]
        raise ValueError(_refusal(unknown, names, train_split, test_split))
    absent = np.setdiff1d(train.labels, test.labels)
    if len(absent) and test.account is not None:
        some = ", ".join(repr(_name(train, int(label))) for label in absent[:3])
        note = (
            f"classes of split {train_split!r} without images in split {test_split!r}: {len(absent)}, such as {some}"
        )
        account = replace(test.account, notes=[*test.account.notes, note])
        test = LabeledImages(test.source, test.labels, test.class_names, account, test.superclasses)
    return train, test


def _renumbered(train: LabeledImages, test: LabeledImages, train_split: str, test_split: str) -> LabeledImages:
    known = train.class_names or [str(label) for label in range(train.num_classes)]
    if test.class_names is None and not all(name.isdecimal() for name in known):
        # Numbers without names, and names: the numbers are those of the names.
        if test.labels.max() >= len(known):
            raise ValueError(
                f"label {test.labels.max()} in split {test_split!r} has no name: split {train_split!r} has"
                f" {len(known)} class names"
            )
        return test.relabel(test.labels, train.class_names)
    numbers = {name: number for number, name in enumerate(known)}
    occurring = np.unique(test.labels)
    unknown = {_name(test, label): int((test.labels == label).sum()) for label in occurring.tolist()}
    unknown = {name: count for name, count in unknown.items() if name not in numbers}
    if unknown:
        raise ValueError(_refusal(unknown, known, train_split, test_split))
    table = np.array([numbers[_name(test, label)] for label in occurring.tolist()], dtype=np.int64)
    # Not indexed by the labels themselves, which may be large.
    labels = table[np.searchsorted(occurring, test.labels)]
    return test.relabel(labels, train.class_names)


def _match_targets(
    train: LabeledImages, test: LabeledImages, train_split: str, test_split: str
) -> tuple[LabeledImages, LabeledImages]:
    """The columns of the test split in the order of the training split."""
    if train.problem_type == REGRESSION:
        if (train.num_classes, train.class_names) != (test.num_classes, test.class_names):
            raise ValueError(
                f"split {test_split!r} has {test.num_classes} targets, expected the {train.num_classes} of split"
                f" {train_split!r}: give both the same columns"
            )
        return train, test
    if not (train.labels != train.labels[:1]).any():
        raise ValueError(f"all images of split {train_split!r} have the same classes: pass images that differ in them")
    labels, unknown = columns_by_name(test, known := [_name(train, number) for number in range(train.num_classes)])
    for number in np.flatnonzero(labels.any(axis=0) & ~train.labels.any(axis=0)):
        unknown[known[number]] = int(labels[:, number].sum())
    if unknown:
        names = [name for name, is_used in zip(known, train.labels.any(axis=0), strict=True) if is_used]
        raise ValueError(_refusal(unknown, names, train_split, test_split))
    return train, test.relabel(labels, train.class_names)


def columns_by_name(images: LabeledImages, names: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """
    The labels of a multi-label split with a column for each of `names`; and its other classes, with their numbers of
    images.
    """
    labels, unknown = np.zeros((len(images), len(names)), dtype=images.labels.dtype), {}
    numbers = {name: number for number, name in enumerate(names)}
    for column in range(images.num_classes):
        name = _name(images, column)
        if name in numbers:
            labels[:, numbers[name]] = images.labels[:, column]
        elif images.labels[:, column].any():
            unknown[name] = int(images.labels[:, column].sum())
    return labels, unknown


def _name(images: LabeledImages, label: int) -> str:
    return images.class_names[label] if images.class_names is not None else str(label)


def _refusal(unknown: dict[str, int], known: Sequence[str], train_split: str, test_split: str) -> str:
    name, count = next(iter(unknown.items()))
    rest = len(unknown) - 1
    others = f" and of {rest} other {'class' if rest == 1 else 'classes'}" if rest else ""
    return (
        f"split {test_split!r} has {count} images of the class {name!r}{others}, which split {train_split!r} does not"
        f" have{alike(name, known)}: rename the class, or remove its images"
    )


def alike(name: str, known: Iterable[str]) -> str:
    """` (it has 'bee')` for a name that differs only in case, spaces or Unicode form; else nothing."""

    def plain(text: str) -> str:
        return "".join(unicodedata.normalize("NFKC", text).casefold().split())

    found = next((other for other in known if plain(other) == plain(name)), None)
    return f" (it has {found!r})" if found is not None else ""
