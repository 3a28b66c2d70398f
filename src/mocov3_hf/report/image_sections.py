"""The sections about what a model sees in images."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .charts import LIGHT, Palette, make_chart, plain
from .components import component_colors
from .confusion_section import confusion_parts, shorten
from .encoding import Seen, Viewer
from .neighbors import MIN_POINTS, agreement, embed, neighbors_of_each
from .page import Charts, Gallery, Section, Strip, Text, make_picture
from .pictures import colors, heat_map, over_image, save_sheet
from .samples import Samples


# How many images are shown.
ATTENTION_IMAGES, COMPONENT_IMAGES, QUERIES = 6, 12, 8
NEIGHBORS = 6
# Images without which a class has no place on the map.
MAP_IMAGES = 3
MAX_HEADS = 16


def image_sections(viewer: Viewer, samples: Samples, seen: Seen, plots: Path, seed: int) -> list[Section]:
    """All that images show of a model; PNG files for a card go to `plots`."""
    sections = [
        Section("attention", "Attention", attention_parts(viewer, samples, seen, plots)),
        Section("components", "Patch features", component_parts(viewer, samples, seen, plots)),
        Section("map", "Map of the features", map_parts(samples, seen, plots, seed)),
        Section("neighbours", "Nearest neighbours", neighbor_parts(samples, seen, plots)),
    ]
    if viewer.is_classifier:
        sections.append(Section("confusions", "Confusions", confusion_parts(viewer, samples, seen, plots)))
    return sections


def attention_parts(viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    count = min(ATTENTION_IMAGES, len(samples))
    try:
        attention = viewer.attention(samples, count).numpy()
    except ValueError as error:
        return [Text(f"No attention maps: {error}.")]
    heads = attention.shape[1]
    strips, sheet = [], []
    for index in range(count):
        name, image, mean = samples.name_of(index), seen.views[index], attention[index].mean(axis=0)
        pictures = [
            make_picture(image, f"Image of {name}", "image"),
            make_picture(over_image(mean, image), f"Mean attention over an image of {name}", "mean"),
        ]
        pictures += [
            make_picture(
                heat_map(attention[index, head]),
                f"Attention of head {head + 1} on an image of {name}",
                f"head {head + 1}",
                kind="png",
                pixelated=True,
            )
            for head in range(min(heads, MAX_HEADS))
        ]
        strips.append(Strip(name, pictures))
        sheet.append(
            [image, over_image(mean, image), *(heat_map(attention[index, head]) for head in range(min(6, heads)))]
        )
    save_sheet(sheet, plots / "attention.png")
    caption = (
        f"Attention of the CLS token to the patches in the last block: the mean of its {heads} heads over the image,"
        f" then {'each head' if heads <= MAX_HEADS else f'the first {MAX_HEADS} heads'}; every map is as bright as its"
        " largest value. Healthy: heads differ, and several lie on the object. Maps that are all flat, or all on the"
        " same few patches of the background, belong to a model that has learned little."
    )
    return [Gallery(strips, caption, size=84)]


def component_parts(viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    if seen.patches is None:
        return [Text(f"No patch features: {seen.why_no_patches}.")]
    count = min(COMPONENT_IMAGES, len(samples))
    maps = viewer.patches(samples, count)
    if maps.shape[1] * maps.shape[2] < 4:
        return [
            Text(
                f"No patch features: the last feature map is {maps.shape[1]} × {maps.shape[2]} at this image size, too"
                " small to show anything."
            )
        ]
    painted = component_colors(maps, seen.patches).numpy()
    strips, pairs = [], []
    for index in range(count):
        name, image, picture = samples.name_of(index), seen.views[index], colors(painted[index])
        strips.append(
            Strip(
                "",
                [
                    make_picture(image, f"Image of {name}", name),
                    make_picture(
                        picture,
                        f"First three principal components of the patches of an image of {name}",
                        kind="png",
                        pixelated=True,
                    ),
                ],
            )
        )
        pairs.append([image, picture])
    rows = [[one for pair in pairs[begin : begin + 4] for one in pair] for begin in range(0, count, 4)]
    save_sheet(rows, plots / "components.png")
    grid = f"{maps.shape[1]} × {maps.shape[2]}"
    caption = (
        f"First three principal components of the {grid} patch features of all {len(samples)} images as red, green"
        f" and blue; they hold {100 * seen.patches.explained():.0f} % of the variance. Mid grey is the mean patch."
        " Healthy: parts of one kind have one colour in all images, and objects stand out from their background. The"
        " same pattern in every image is position, not content."
    )
    return [Gallery(strips, caption, size=110, columns=True)]


def map_parts(samples: Samples, seen: Seen, plots: Path, seed: int) -> list:
    if len(samples) < MIN_POINTS:
        return [Text(f"No map: {len(samples)} images are too few, t-SNE needs at least {MIN_POINTS}.")]
    points = embed(seen.features, seed)
    labels = samples.labels
    shown = [] if labels is None else most_frequent(labels, len(LIGHT.series), at_least=MAP_IMAGES)
    labels = labels if shown else None

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_aspect("equal", adjustable="datalim")
        others = np.ones(len(points), dtype=bool) if labels is None else ~np.isin(labels, shown)
        options = {"s": 14, "linewidths": 0, "rasterized": len(points) > 3000}
        color = palette.series[0] if labels is None else palette.muted
        axes.scatter(*points[others].T, color=color, alpha=0.75 if labels is None else 0.4, **options)
        for number, label in enumerate(shown):
            name = plain(shorten(samples.class_names[label]))
            color = palette.series[number]
            axes.scatter(*points[labels == label].T, color=color, alpha=0.85, label=name, **options)
        for number, label in enumerate(shown):
            axes.annotate(
                plain(shorten(samples.class_names[label])),
                medoid(points[labels == label]),
                color=palette.ink,
                fontsize=9,
                fontweight="bold",
                ha="center",
                va="center",
                bbox={
                    "boxstyle": "round,pad=0.2",
                    "facecolor": palette.paper,
                    "edgecolor": palette.series[number],
                    "alpha": 0.85,
                },
            )
        if shown:  # names on the map lie upon each other where classes do
            options = {"frameon": False, "fontsize": 8, "labelcolor": palette.ink, "handletextpad": 0.1}
            figure.legend(loc="outside lower center", ncols=min(len(shown), 5), **options)

    alt = f"Scatter plot of {len(samples)} images"
    caption = f"t-SNE of the features of {len(samples)} images: near is similar, distances of islands mean little."
    if labels is None:
        caption += " Healthy: islands, not one even cloud. " + samples.why_unlabelled
        if samples.labels is not None:
            caption += f"Classes are not coloured: none has {MAP_IMAGES} images here."
    else:
        classes = len(np.unique(labels))
        alt += f" of {classes} classes"
        caption += " Healthy: classes form islands of their own, though no label was used in pre-training."
        if classes > len(shown):
            caption += f" Coloured: {len(shown)} of {classes} classes; the others are grey."
    chart = make_chart(
        "tsne",
        draw,
        plots,
        title="t-SNE",
        caption=caption,
        alt=f"{alt}.",
        size=(5.6, 4.4),
        wide=True,
    )
    return [Charts([chart])]


def neighbor_parts(samples: Samples, seen: Seen, plots: Path) -> list:
    k = min(NEIGHBORS, len(samples) - 1)
    similarities, rows = (found.numpy() for found in neighbors_of_each(seen.features, k))
    labels = samples.labels
    if labels is not None and chance_of_agreement(labels) == 0:
        labels = None  # one image of every class: no neighbour can be right
    strips, sheet = [], []
    for query in range(min(QUERIES, len(samples))):
        name = samples.name_of(query)
        pictures = [make_picture(seen.views[query], f"Query: {name}", name, mark="query")]
        for similarity, row in zip(similarities[query], rows[query], strict=True):
            other = samples.name_of(row)
            mark, what = "", f" {other}" if samples.labels is not None else ""
            if labels is not None:
                mark = "right" if labels[row] == labels[query] else "wrong"
                what = " ✓" if mark == "right" else f" ✕ {other}"
            alt = f"Neighbour: {other}, similarity {similarity:.3f}"
            pictures.append(make_picture(seen.views[row], alt, f"{similarity:.3f}{what}", mark=mark))
        strips.append(Strip("", pictures))
        sheet.append([seen.views[query], *(seen.views[row] for row in rows[query])])
    save_sheet(sheet, plots / "neighbours.png")
    mean = f"{similarities[:, 0].mean():.3f}"
    caption = (
        f"An image (left) and the {k} most similar of the other {len(samples) - 1}, with cosine similarity (that of"
        f" the nearest is {mean} in the mean)."
    )
    if labels is not None:
        caption += (
            f" ✓ same class, ✕ another. Over all images {100 * agreement(labels, rows):.1f} % of the {k} nearest have"
            f" the class of their image, by chance {100 * chance_of_agreement(labels):.1f} %."
        )
    caption += (
        " Healthy: neighbours show the same kind of thing, not merely the same colours. Similarities that are all near"
        " 1 are a sign of collapse."
    )
    return [Gallery(strips, caption)]


def most_frequent(labels: np.ndarray, count: int, at_least: int = 1) -> list[int]:
    """The `count` classes with the most images, of equal ones the lower number, in the order of their numbers; those
    with fewer than `at_least` left out."""
    classes, images = np.unique(labels, return_counts=True)
    classes, images = classes[images >= at_least], images[images >= at_least]
    return sorted(classes[np.argsort(-images, kind="stable")][:count].tolist())


def medoid(points: np.ndarray) -> np.ndarray:
    """The point (2,) with the smallest sum of distances to the others (n, 2): unlike a mean, it lies among them. Of
    very many the first thousand are looked at."""
    points = points[:1000]
    distances = np.linalg.norm(points[:, None] - points[None], axis=2).sum(axis=1)
    return points[distances.argmin()]


def chance_of_agreement(labels: np.ndarray) -> float:
    """Probability that another image, drawn at random, has the class of an image."""
    images = np.unique(labels, return_counts=True)[1]
    return float((images * (images - 1)).sum() / (len(labels) * (len(labels) - 1)))
