"""The section about the mistakes of a classifier.

Legend: n images, C classes.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .charts import Chart, Palette, make_chart, plain
from .confusion import ClassFigures, confusion_matrix, labels_for_head, worst_classes
from .encoding import Seen, Viewer
from .folder import ReportError
from .page import Charts, Gallery, Strip, Table, Text, make_picture
from .pictures import save_sheet
from .samples import Samples


# Wrong answers that are shown.
CONFUSIONS = 12
# Largest confusion matrix that is drawn whole, and the largest with numbers in it.
MATRIX_CLASSES, MATRIX_NUMBERS = 40, 12


def confusion_parts(viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    if samples.labels is None:
        return [Text(f"No confusions: they need labels. {samples.why_unlabelled}")]
    config = viewer.model.config
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    try:
        labels = labels_for_head(samples.labels, samples.class_names, names)
    except ReportError as error:
        return [Text(f"No confusions: {error}.")]
    if names == [f"LABEL_{number}" for number in range(len(names))]:
        names[: len(samples.class_names)] = samples.class_names
    probabilities = seen.logits.softmax(dim=1)
    predicted = probabilities.argmax(dim=1).numpy()
    matrix = confusion_matrix(labels, predicted, len(names))
    figures = worst_classes(matrix)
    top1 = float((labels == predicted).mean())
    parts: list = [
        Text(
            f"Of {len(samples)} images of {samples.description}, {100 * top1:.1f} % are classified rightly. The figure"
            " on the whole split is that of scripts/evaluate.py."
        ),
        Charts([matrix_chart(matrix, figures, names, plots)]),
        worst_table(figures, names),
    ]
    wrong = torch.as_tensor(predicted != labels).nonzero().flatten()
    if len(wrong):
        surest = wrong[probabilities[wrong].amax(dim=1).argsort(descending=True)][:CONFUSIONS].tolist()
        pictures = [
            make_picture(
                seen.views[index],
                f"{names[labels[index]]}, taken for {names[predicted[index]]}",
                f"{names[labels[index]]} → {names[predicted[index]]} ({probabilities[index].max():.2f})",
                mark="wrong",
            )
            for index in surest
        ]
        save_sheet(
            [[seen.views[index] for index in surest[begin : begin + 6]] for begin in range(0, len(surest), 6)],
            plots / "confusions.png",
        )
        parts.append(
            Gallery(
                [Strip("", pictures)],
                f"The {len(surest)} surest of {len(wrong)} wrong answers: class → answer (probability). Healthy:"
                " answers that one can understand, and few that are sure. Sure answers that are absurd hint at wrong"
                " labels, or at preprocessing other than in training.",
                size=110,
            )
        )
    return parts


def matrix_chart(matrix: np.ndarray, figures: list[ClassFigures], names: list[str], plots: Path) -> Chart:
    """The confusion matrix, of the worst classes only where there are many."""
    present = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    shown = present
    if len(present) > MATRIX_CLASSES:
        worst = [label for one in figures for label in (one.label, one.taken_for) if label is not None]
        shown = np.array(sorted(list(dict.fromkeys(worst))[:MATRIX_CLASSES]))
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(matrix[shown].sum(axis=1, keepdims=True), 1)
    ticks = [plain(shorten(names[label])) for label in shown]

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.set_aspect("equal")
        # Cells are drawn one by one, as opaque as their share: they then stand on any background.
        for row, column in np.argwhere(part):
            color = palette.series[2] if row == column else palette.bad
            opacity = 0.12 + 0.58 * shares[row, column]
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, color=color, alpha=opacity, linewidth=0))
            if len(shown) <= MATRIX_NUMBERS:
                axes.text(column, row, str(part[row, column]), ha="center", va="center", fontsize=8, color=palette.ink)
        size = 8 if len(shown) <= 15 else 6
        axes.set_xticks(range(len(shown)), ticks, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(len(shown)), ticks, fontsize=size)
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("answer", fontsize=8)
        axes.set_ylabel("class", fontsize=8)
        axes.tick_params(length=0)

    caption = "Rows: class of the image. Columns: answer. The stronger the colour, the larger the share of the row."
    if len(shown) < len(present):
        caption += f" Shown are the {len(shown)} classes with the most confusions of {len(present)}."
    caption += " Healthy: a full diagonal, and confusions in small groups of classes that resemble each other."
    side = 3.4 + 0.12 * len(shown)
    return make_chart(
        "confusion-matrix",
        draw,
        plots,
        title="Confusion matrix",
        caption=caption,
        alt=f"Confusion matrix of {len(shown)} classes; {np.trace(part)} of {part.sum()} images on its diagonal.",
        size=(side + 0.6, side),
        wide=len(shown) > 15,
        min_width=round(80 * side) if len(shown) > 15 else 0,
    )


def worst_table(figures: list[ClassFigures], names: list[str], count: int = 10) -> Table:
    rows = [
        [
            names[one.label],
            str(one.images),
            f"{100 * one.accuracy:.1f}",
            "" if one.taken_for is None else f"{names[one.taken_for]} ({one.times}×)",
        ]
        for one in figures[:count]
    ]
    return Table(
        ["class", "images", "right (%)", "most often taken for"],
        rows,
        f"The {len(rows)} least accurate of {len(figures)} classes. With few images of a class its figure is rough.",
        numeric=(1, 2),
    )


def shorten(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
