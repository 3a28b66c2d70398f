"""The sections about what a model sees in images: attention, patch features, t-SNE map and nearest neighbors.

Legend: n images, D width, h w grid of patches, H W image.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from ..data.photometric import PhotometricStage
from ..data.sources import MapBatch
from ..data.views import make_views, view_settings
from ..problem_types import SINGLE_LABEL
from ..run_folder import RunFolder
from .confusion import confusion_parts
from .images import Samples, Seen, Viewer
from .parts import (
    CHART_SIZE,
    INK,
    MUTED,
    PAPER,
    SERIES,
    Charts,
    Gallery,
    Hover,
    Picture,
    Section,
    Table,
    Text,
    attempt,
    finish_chart,
    new_figure,
    percent,
    save_sheet,
    shorten,
)
from .summary import margin


# Number of images shown in each section, and of neighbors of each query.
ATTENTION_IMAGES, COMPONENT_IMAGES, QUERIES, NEIGHBORS, VIEW_IMAGES = 6, 12, 4, 6, 8
MAX_HEADS = 16
# A class needs this many images for a color on the map; t-SNE needs this many for a meaningful perplexity.
MAP_IMAGES, MIN_POINTS = 3, 10
PERPLEXITY = 30


def image_sections(
    folder: RunFolder, viewer: Viewer, samples: Samples, seen: Seen, start: Seen | None, plots: Path, seed: int
) -> list[Section]:
    """All sections that need images. Writes the PNG files of charts and galleries to `plots`."""
    build: dict[tuple[str, str], Callable[[], list]] = {
        ("views", "Augmented views"): partial(view_parts, folder, viewer, samples, seen, plots),
        ("attention", "Attention"): partial(attention_parts, viewer, samples, seen, plots),
        ("components", "Patch features"): partial(component_parts, viewer, samples, seen, plots),
        ("map", "t-SNE map"): partial(map_parts, samples, seen, plots, seed),
        ("neighbors", "Nearest neighbors"): partial(neighbor_parts, samples, seen, start, plots),
    }
    if viewer.is_classifier and viewer.model.config.problem_type in (None, SINGLE_LABEL):
        build["confusion", "Confusion matrix"] = partial(confusion_parts, viewer, samples, seen, plots)
    sections = []
    for (name, title), parts in build.items():
        found = attempt(folder.notes, f"the section {title!r}", parts, [])
        if found:
            sections.append(Section(name, title, found))
    return sections


def view_parts(folder: RunFolder, viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    """Both views of some images, as the run would draw them; nothing for other folders than pre-training runs."""
    if folder.kind != "pretraining" or not folder.recipe:
        return []
    settings = view_settings(folder.recipe)
    rows = torch.as_tensor(samples.rows[:VIEW_IMAGES])
    made = make_views(MapBatch(samples.source, rows), settings, 0, 0, viewer.transform.pixel_format)
    stage = PhotometricStage(*viewer.normalization, max_blur_sigma=settings[0].blur_sigma[1], optional_operations=True)
    views = [stage(*both) for both in zip(made["pixels"], made["parameters"], strict=True)]
    strips = []
    for index, pair in enumerate(zip(*views, strict=True)):
        name = samples.name_of(index)
        pictures = [Picture(seen.views[index], f"Image of {name}", name)]
        for number, view in enumerate(map(viewer.view, pair), start=1):
            pictures.append(Picture(view, f"Augmented view {number} of an image of {name}", f"view {number}"))
        strips.append(("", pictures))
    save_sheet(strips, plots / "views.png", per_row=6)
    caption = (
        "An image, and two augmented views of it: a positive pair, which the loss pulls together. Healthy: both views"
        " recognizably show the same thing, and differ in color, position and scale. If a view shows nothing of the"
        " object, raise the first number of --crop_scale; if color or orientation carries the meaning, lower --hue,"
        " --saturation or --flip_probability."
    )
    return [Gallery(strips, caption, size=84, columns=True)]


def attention_parts(viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    try:
        attention = viewer.attention(samples, min(ATTENTION_IMAGES, len(samples))).numpy()
    except ValueError as error:
        return [Text(f"No attention maps: {error}.")]
    heads, strips = attention.shape[1], []
    for index, maps in enumerate(attention):
        name, image = samples.name_of(index), seen.views[index]
        mean = over_image(maps.mean(axis=0), image)
        pictures = [
            Picture(image, f"Image of {name}", "image"),
            Picture(mean, f"Mean attention over an image of {name}", "mean"),
        ]
        for head, values in enumerate(maps[:MAX_HEADS], start=1):
            alt = f"Attention of head {head} on an image of {name}"
            pictures.append(Picture(heat_map(values), alt, f"head {head}", is_grid=True))
        strips.append((name, pictures))
    save_sheet(strips, plots / "attention.png", per_row=len(strips[0][1]))
    caption = (
        f"Attention of the CLS token to the patches in the last block: the mean of the {heads} heads over the image,"
        f" then {'each head' if heads <= MAX_HEADS else f'the first {MAX_HEADS} heads'}. Every map is scaled to its"
        " maximum. Healthy: heads differ, and several focus on the object. If all maps are flat, or all focus on the"
        " same background patches, the model has learned little."
    )
    return [Gallery(strips, caption, size=84)]


def component_parts(viewer: Viewer, samples: Samples, seen: Seen, plots: Path) -> list:
    try:
        maps = viewer.patches(samples, min(COMPONENT_IMAGES, len(samples))).numpy()
    except ValueError as error:
        return [Text(f"No patch features: {error}.")]
    height, width = maps.shape[1:3]
    if height * width < 4:
        return [Text(f"No patch features: at this image size the last feature map is only {height} × {width}.")]
    colors, explained = component_colors(maps)
    strips = []
    for index, color in enumerate((colors * 255).round().astype(np.uint8)):
        name = samples.name_of(index)
        alt = f"First three principal components of the patches of an image of {name}"
        pictures = [Picture(seen.views[index], f"Image of {name}", name), Picture(color, alt, is_grid=True)]
        strips.append(("", pictures))
    save_sheet(strips, plots / "components.png", per_row=8)
    caption = (
        f"First three principal components of the {height} × {width} patch features of these {len(maps)} images as"
        f" red, green and blue. They explain {100 * explained:.0f} % of the variance; gray is the mean patch. Healthy:"
        " similar parts have the same color in all images, and objects stand out from the background. The same pattern"
        " in every image encodes position, not content."
    )
    return [Gallery(strips, caption, size=110, columns=True)]


def map_parts(samples: Samples, seen: Seen, plots: Path, seed: int) -> list:
    if len(samples) < MIN_POINTS:
        return [Text(f"No t-SNE map: {len(samples)} images are too few, it needs at least {MIN_POINTS}.")]
    points, labels = embed(seen.features, seed), samples.labels
    shown = [] if labels is None else most_frequent(labels, len(SERIES), at_least=MAP_IMAGES)
    figure = new_figure((CHART_SIZE[0], 3.8))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    options = {"s": 14, "linewidths": 0, "rasterized": len(points) > 3000}
    others = ~np.isin(labels, shown) if shown else np.ones(len(points), dtype=bool)
    axes.scatter(*points[others].T, color=MUTED if shown else SERIES[0], alpha=0.4 if shown else 0.75, **options)
    for label, color in zip(shown, SERIES, strict=False):
        members, name = points[labels == label], samples.class_names[label]
        axes.scatter(*members.T, color=color, alpha=0.85, label=shorten(name), **options)
        box = {"boxstyle": "round,pad=0.2", "facecolor": PAPER, "edgecolor": color, "alpha": 0.8}
        axes.annotate(shorten(name, 14), medoid(members), ha="center", va="center", fontsize=7, color=INK, bbox=box)
    if shown:  # labels on the map overlap where classes do
        figure.legend(loc="outside lower center", ncols=3, handletextpad=0.1)
    caption = (
        f"t-SNE of the features of {len(samples)} images. Neighbors are similar; distances between clusters mean"
        " little. "
    )
    alt = f"Scatter plot of {len(samples)} images"
    if shown:
        classes = len(np.unique(labels))
        alt += f" of {classes} classes"
        caption += "Healthy: classes form clusters, although pre-training used no labels."
        if classes > len(shown):
            caption += f" {len(shown)} of {classes} classes are colored, the others are gray."
    else:
        caption += "Healthy: several clusters, not one even cloud. " + samples.why_unlabeled
        if labels is not None:
            caption += f"Classes are not colored: none has {MAP_IMAGES} images here."
    hovers = [Hover(axes, point, point, samples.name_of(index), margin=3) for index, point in enumerate(points)]
    chart = finish_chart(figure, "tsne", plots, title="t-SNE", caption=caption, alt=f"{alt}.", hovers=hovers)
    return [Charts([chart])]


def neighbor_parts(samples: Samples, seen: Seen, start: Seen | None, plots: Path) -> list:
    k = min(NEIGHBORS, len(samples) - 1)
    similarities, rows = nearest_others(seen.features, k)
    labels = samples.labels
    chance = 0.0 if labels is None else chance_of_agreement(labels)
    is_judged = chance > 0  # with one image of every class no neighbor can be right
    before = None if start is None else nearest_others(start.features, k)

    def strip(query: int, similarities: np.ndarray, rows: np.ndarray) -> list[Picture]:
        name = samples.name_of(query)
        pictures = [Picture(seen.views[query], f"Query: {name}", name, mark="query")]
        for similarity, row in zip(similarities[query], rows[query], strict=True):
            other, mark = samples.name_of(row), ""
            label = f"{similarity:.3f}" if labels is None else f"{similarity:.3f} {other}"
            if is_judged:
                mark = "right" if labels[row] == labels[query] else "wrong"
                label = f"{similarity:.3f} ✓" if mark == "right" else f"{similarity:.3f} ✕ {other}"
            alt = f"Neighbor: {other}, similarity {similarity:.3f}"
            pictures.append(Picture(seen.views[row], alt, label, mark))
        return pictures

    strips = []
    for query in range(min(QUERIES, len(samples))):
        strips.append(("" if before is None else "trained", strip(query, similarities, rows)))
        if before is not None:
            strips.append(("random weights", strip(query, *before)))
    save_sheet(strips, plots / "neighbors.png", per_row=k + 1)
    caption = f"A query (left) and the {k} most similar of the other images, with cosine similarity."
    caption += " ✓ same class, ✕ another class." if is_judged else ""
    caption += (
        " Healthy: neighbors show the same kind of object, not just the same colors. If all similarities are close to"
        " 1, the features have collapsed."
    )
    table_rows = []
    for weights, found in (("random weights", before), ("trained", (similarities, rows))):
        if found is not None:
            share = percent(agreement(labels, found[1])) if is_judged else ""
            table_rows.append([weights, share, f"{found[0][:, 0].mean():.3f}"])
    if is_judged:
        table_rows.insert(0, ["chance", percent(chance), ""])
    columns = ["weights", f"class of the query, among {k} neighbors", "similarity of the nearest"]
    words = f"Over all {len(samples)} images of {samples.description}."
    if before is not None:
        words += " Random weights: the same architecture before any training."
    if not is_judged:
        columns, table_rows = columns[::2], [row[::2] for row in table_rows]
    numeric = tuple(range(1, len(columns)))
    return [Table(columns, table_rows, words, numeric), Gallery(strips, caption)]


def neighbor_findings(samples: Samples, seen: Seen, start: Seen | None) -> list[tuple[str, str]]:
    """Whether neighbors share a class more often than at chance, and than with random weights."""
    k = min(NEIGHBORS, len(samples) - 1)
    chance = 0.0 if samples.labels is None else chance_of_agreement(samples.labels)
    if not chance > 0:
        return []
    after, before = (
        None if one is None else agreement(samples.labels, nearest_others(one.features, k)[1]) for one in (seen, start)
    )
    text = f"{percent(after)} of the {k} nearest neighbors in {len(samples)} images share the class of the query"
    compared = "" if before is None else f", {percent(before)} with random weights"
    is_better = after > chance + margin(chance, len(samples)) and (before is None or after > before)
    return [("good" if is_better else "bad", f"{text}{compared}; chance is {percent(chance)}.")]


def agreement(labels: np.ndarray, rows: np.ndarray) -> float:
    """Share of the neighbors (n, k) that have the class of their query."""
    return float((labels[rows] == labels[:, None]).mean())


def heat_map(values: np.ndarray) -> np.ndarray:
    """Nonnegative values (h, w) as uint8 (h, w, 3): black at 0, bright at the maximum."""
    return matplotlib.colormaps["inferno"](values / (values.max() or 1), bytes=True)[..., :3]


def over_image(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A heat map (h, w), enlarged smoothly, over a grayscale version of an image uint8 (H, W, 3)."""
    values = torch.as_tensor(values)[None, None].float()
    smooth = F.interpolate(values, image.shape[:2], mode="bicubic", antialias=True)[0, 0].clamp(min=0).numpy()
    return (0.65 * heat_map(smooth) + 0.35 * image.mean(axis=2, keepdims=True)).round().astype(np.uint8)


def component_colors(maps: np.ndarray) -> tuple[np.ndarray, float]:
    """
    The first three principal components of patch features as red, green and blue: 0.5 is the mean, and two standard
    deviations to either side reach 0 and 1.

    Args:
        maps: (n, h, w, D) float.

    Returns:
        (n, h, w, 3) in 0..1, a component without variance is 0.5; and the share of the variance that the components
        explain.
    """
    patches = maps.reshape(-1, maps.shape[-1])
    variance = patches.var(axis=0).sum()
    colors = np.full((len(patches), 3), 0.5)
    if variance < 1e-12:
        return colors.reshape(*maps.shape[:3], 3), 0.0
    scores = PCA(min(3, *patches.shape), random_state=0).fit_transform(patches)
    deviations = scores.std(axis=0)
    usable = np.flatnonzero(deviations > 1e-6 * deviations.max())
    colors[:, usable] += scores[:, usable] / (4 * deviations[usable])
    return colors.clip(0, 1).reshape(*maps.shape[:3], 3), float(scores.var(axis=0).sum() / variance)


def nearest_others(features: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities (n, k), highest first, and row numbers (n, k) of the k nearest other images; k < n."""
    distances, rows = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features.numpy()).kneighbors()
    return 1 - distances, rows


def chance_of_agreement(labels: np.ndarray) -> float:
    """Probability that another image, drawn at random, has the class of an image."""
    images = np.unique(labels, return_counts=True)[1]
    return float((images * (images - 1)).sum() / (len(labels) * (len(labels) - 1)))


def embed(features: torch.Tensor, seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, 2008) of L2-normalized features (n, D), n ≥ `MIN_POINTS`: (n, 2) float32."""
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(F.normalize(features, dim=1).numpy())


def most_frequent(labels: np.ndarray, count: int, at_least: int = 1) -> list[int]:
    """The `count` most frequent classes with `at_least` images, sorted; among equals the lowest."""
    found = Counter(sorted(labels.tolist())).most_common(count)
    return sorted(label for label, images in found if images >= at_least)


def medoid(points: np.ndarray) -> np.ndarray:
    """The one of the first thousand points (n, 2) closest to the others: unlike the mean it lies in a cluster."""
    points = points[:1000]
    return points[pairwise_distances(points).sum(axis=0).argmin()]
