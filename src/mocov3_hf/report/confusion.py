"""Which classes a classifier takes for which.

Legend: n images, C classes.
"""

from dataclasses import dataclass

import numpy as np

from .folder import ReportError


@dataclass(frozen=True)
class ClassFigures:
    """
    One class: its number, its images, the share of them that is classified rightly, and the class that the wrong ones
    are most often taken for, with their number; None where there are no wrong ones.
    """

    label: int
    images: int
    accuracy: float
    taken_for: int | None
    times: int


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (C, C): images of class `row` that are classified as `column`. Both arguments (n,) in 0..C-1."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def worst_classes(matrix: np.ndarray) -> list[ClassFigures]:
    """The classes that have images, the least accurate first; of equal ones that with more images."""
    found = []
    for label, row in enumerate(matrix):
        images = int(row.sum())
        if images:
            wrong = row.copy()
            wrong[label] = 0
            times = int(wrong.max())
            taken_for = int(wrong.argmax()) if times else None
            found.append(ClassFigures(label, images, row[label] / images, taken_for, times))
    return sorted(found, key=lambda figures: (figures.accuracy, -figures.images))


def labels_for_head(labels: np.ndarray, names: list[str], head_names: list[str]) -> np.ndarray:
    """
    Labels of a data set numbered as the outputs of a classifier: by the names of the classes; by number where the
    classifier has no names of its own or the data set has numbers only.

    Raises:
        ReportError: classes that the classifier does not know.
    """
    numbers = {name: number for number, name in enumerate(head_names)}
    nameless = [f"LABEL_{number}" for number in range(len(head_names))]
    if all(name in numbers for name in names) and len(numbers) == len(head_names):
        return np.array([numbers[name] for name in names], dtype=np.int64)[labels]
    bare = names == [str(number) for number in range(len(names))]
    if (head_names == nameless or bare) and labels.max() < len(head_names):
        return labels
    unknown = [name for name in names if name not in numbers]
    raise ReportError(
        f"{len(unknown)} of the {len(names)} classes of the data set are not among the {len(head_names)} of the"
        f" classifier (such as {', '.join(map(repr, unknown[:3]))})"
    )
