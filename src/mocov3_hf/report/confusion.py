"""The section about the mistakes of a classifier.

Legend: n images, C classes.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from .images import Samples, Seen, Viewer
from .parts import (
    INK,
    SERIES,
    Chart,
    Charts,
    Gallery,
    Hover,
    Picture,
    Table,
    Text,
    finish_chart,
    new_figure,
    percent,
    save_sheet,
    shorten,
)


WRONG_ANSWERS, WORST_CLASSES = 12, 10
# Largest confusion matrix that is drawn in full, and the largest with a number in every cell.
MATRIX_CLASSES, MATRIX_NUMBERS = 40, 12
# Transparent at 0, so that the matrix fits the light and the dark theme.
SHADES = LinearSegmentedColormap.from_list("shades", [(*to_rgb(SERIES[5]), alpha) for alpha in (0.0, 0.65)])


def confusion_parts(viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    if samples.labels is None:
        return [Text(f"No confusion matrix: it needs labels. {samples.why_unlabeled}")]
    config = viewer.model.config
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    try:
        labels = labels_for_head(samples.labels, samples.class_names, names)
    except ValueError as error:
        return [Text(f"No confusion matrix: {error}.")]
    if names == nameless(len(names)):
        names[: len(samples.class_names)] = samples.class_names
    probabilities, predicted = (found.numpy() for found in seen.logits.softmax(dim=1).max(dim=1))
    matrix = confusion_matrix(labels, predicted, labels=range(len(names)))
    parts: list = [
        Text(
            f"Accuracy on {len(samples)} images of {samples.description}: {100 * (labels == predicted).mean():.1f} %."
            " For the whole split, run mocov3 evaluate."
        ),
        Charts([matrix_chart(matrix, names, plots)]),
        worst_table(matrix, names),
    ]
    wrong = np.flatnonzero(labels != predicted)
    if len(wrong):
        wrong = wrong[np.argsort(-probabilities[wrong], kind="stable")]
        pictures = []
        for index in wrong[:WRONG_ANSWERS]:
            label, answer = names[labels[index]], names[predicted[index]]
            caption = f"{label} → {answer} ({probabilities[index]:.2f})"
            pictures.append(Picture(seen.views[index], f"{label}, classified as {answer}", caption, mark="wrong"))
        strips = [("", pictures)]
        save_sheet(strips, plots / "wrong-answers.png", per_row=6)
        caption = (
            f"The {len(pictures)} most confident of {len(wrong)} wrong predictions: class → prediction (probability)."
            " Healthy: understandable mistakes, few of them confident. Confident absurd predictions suggest wrong"
            " labels, or preprocessing that differs from training."
        )
        parts.append(Gallery(strips, caption, size=110))
    return parts


def matrix_chart(matrix: np.ndarray, names: list[str], plots: Path) -> Chart:
    """The confusion matrix as shares of each row; with many classes, of the least accurate ones."""
    present = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    shown = present
    if len(present) > MATRIX_CLASSES:
        worst = [label for one in worst_classes(matrix) for label in (one, most_confused(matrix, one))]
        shown = np.array(sorted(list(dict.fromkeys(worst))[:MATRIX_CLASSES]))
    shares = matrix[shown][:, shown] / np.maximum(matrix[shown].sum(axis=1, keepdims=True), 1)
    side = 3.4 + 0.12 * len(shown)
    figure = new_figure((side + 0.6, side))
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=[shorten(names[label]) for label in shown])
    display.plot(
        ax=axes,
        include_values=len(shown) <= MATRIX_NUMBERS,
        values_format=".0%",
        cmap=SHADES,
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
        text_kw={"color": INK},
    )
    axes.set(xlabel="prediction", ylabel="class")
    axes.tick_params(length=0, labelsize=6 if len(shown) > 15 else 8)
    for label in axes.get_xticklabels():
        label.set(rotation=60, ha="right", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    caption = "Rows: true class. Columns: prediction. Color: share of the row."
    if len(shown) < len(present):
        caption += f" The {len(shown)} most confused of {len(present)} classes."
    caption += " Healthy: a strong diagonal, and confusion only within small groups of similar classes."
    hovers = [
        Hover(
            axes,
            (column - 0.5, row - 0.5),
            (column + 0.5, row + 0.5),
            f"{names[shown[row]]} → {names[shown[column]]}: {matrix[shown[row], shown[column]]} images"
            f" ({percent(shares[row, column])})",
        )
        for row, column in np.argwhere(shares)
    ]
    return finish_chart(
        figure,
        "confusion-matrix",
        plots,
        title="Confusion matrix",
        caption=caption,
        alt=f"Confusion matrix of {len(shown)} classes; mean of the diagonal {100 * shares.diagonal().mean():.0f} %.",
        hovers=hovers,
    )


def worst_table(matrix: np.ndarray, names: list[str]) -> Table:
    worst, rows = worst_classes(matrix), []
    for label in worst[:WORST_CLASSES]:
        images, other = matrix[label].sum(), most_confused(matrix, label)
        confused = "" if other == label else f"{names[other]} ({matrix[label, other]}×)"
        rows.append([names[label], str(images), f"{100 * matrix[label, label] / images:.1f} %", confused])
    caption = f"The {len(rows)} least accurate of {len(worst)} classes. With few images per class, accuracy is noisy."
    return Table(["class", "images", "accuracy", "most often confused with"], rows, caption, numeric=(1, 2))


def worst_classes(matrix: np.ndarray) -> list[int]:
    """The classes that have images, the least accurate first; among equals those with more images."""
    images = matrix.sum(axis=1)
    accuracy = matrix.diagonal() / np.maximum(images, 1)
    return [int(label) for label in np.lexsort((-images, accuracy)) if images[label]]


def most_confused(matrix: np.ndarray, label: int) -> int:
    """The class that a class is most often mistaken for; the class itself if it never is."""
    wrong = matrix[label].copy()
    wrong[label] = 0
    return int(wrong.argmax()) if wrong.any() else label


def nameless(count: int) -> list[str]:
    """The class names of a config that was given none."""
    return [f"LABEL_{number}" for number in range(count)]


def labels_for_head(labels: np.ndarray, names: list[str], head_names: list[str]) -> np.ndarray:
    """
    Map the labels of a dataset to the outputs of a classifier: by class name, or by number if the classifier or the
    dataset has no names.

    Raises:
        ValueError: classes that the classifier does not have.
    """
    numbers = {name: number for number, name in enumerate(head_names)}
    if all(name in numbers for name in names) and len(numbers) == len(head_names):
        return np.array([numbers[name] for name in names], dtype=np.int64)[labels]
    is_numbered = names == [str(number) for number in range(len(names))]
    if (head_names == nameless(len(head_names)) or is_numbered) and labels.max() < len(head_names):
        return labels
    unknown = [name for name in names if name not in numbers]
    raise ValueError(
        f"the classifier does not have {len(unknown)} of the {len(names)} classes of the dataset (such as"
        f" {', '.join(map(repr, unknown[:3]))})"
    )
