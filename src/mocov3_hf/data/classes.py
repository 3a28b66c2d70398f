"""One numbering of classes for the splits of a data set: classes are the same if their names are.

A class of the test split that the training split does not have is refused: no classifier could answer it, and its
images would count as wrong answers.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from .labeled import LabeledImages, open_labeled, stratified_split


HELD_OUT = 0.2  # of each class, if a single split is there


def open_labeled_splits(
    dataset_name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    revision: str | None = None,
) -> tuple[LabeledImages, LabeledImages]:
    """
    The split to learn from and the split to test on, with the same numbering of classes.

    Of a single split, given twice, a fifth of each class is the test split, always the same images.

    Raises:
        ValueError: As `open_labeled`; or a class that only the test split has, or a single class.
    """
    if train_split == test_split:
        images = open_labeled(dataset_name, config_name, train_split, image_column, label_column, revision=revision)
        held_out = stratified_split(images.labels, HELD_OUT, seed=0)
        if not held_out.any():
            raise ValueError(
                f"split {train_split!r} has too few images of each class to hold out a fifth of them: pass another"
                " --test_split"
            )
        train, test = (images.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return match_splits(train, test, train_split, test_split)
    train, test = (
        open_labeled(dataset_name, config_name, split, image_column, label_column, revision=revision)
        for split in (train_split, test_split)
    )
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
    present = np.unique(train.labels)
    if len(present) < 2:
        raise ValueError(
            f"split {train_split!r} has images of a single class, {_name(train, int(present[0]))!r}, which cannot"
            " be told apart from others: pass images of at least two classes"
        )
    if train.class_names is None and not np.array_equal(present, np.arange(len(present))):
        numbers = np.searchsorted(present, train.labels)
        train = LabeledImages(train.source, numbers, [str(label) for label in present.tolist()], train.account)
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
        test = LabeledImages(test.source, test.labels, test.class_names, account)
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
        return LabeledImages(test.source, test.labels, train.class_names, test.account)
    numbers = {name: number for number, name in enumerate(known)}
    occurring = np.unique(test.labels)
    unknown = {_name(test, label): int((test.labels == label).sum()) for label in occurring.tolist()}
    unknown = {name: count for name, count in unknown.items() if name not in numbers}
    if unknown:
        raise ValueError(_refusal(unknown, known, train_split, test_split))
    table = np.array([numbers[_name(test, label)] for label in occurring.tolist()], dtype=np.int64)
    # Not indexed by the labels themselves, which may be large.
    labels = table[np.searchsorted(occurring, test.labels)]
    return LabeledImages(test.source, labels, train.class_names, test.account)


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
