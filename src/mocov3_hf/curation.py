"""The command `mocov3 neighbors`: nearest images, near-duplicates and outliers, as tables and a page with pictures."""

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .data.decode import printable
from .data.memory import named
from .data.references import shown
from .inference.feature_files import INFO, FeatureFolder, read_feature_folder
from .inference.files import PredictorOptions, extract_to_folder
from .inference.images import ImageInput, decode, name_of
from .inference.inputs import ImageOptions
from .inference.predictors import choose_device
from .inference.searched import Searched, checked_queries, choose_threshold, queries_of
from .metrics.knn import check_features
from .metrics.search import OUTLIER_Z, choose_backend, duplicate_groups, nearest_others, outlier_scores, search
from .metrics.search import Neighbors as Found
from .new_folder import check_output_dir
from .options import Command, build, option, parse, values_of_keywords
from .report.write import NEEDED
from .reporting import UsageError, reporting, warn
from .requirements import require_packages
from .storage import atomic_file, is_occupied, write_json, write_text


if TYPE_CHECKING:
    import pandas as pd

# Dimensions: N images, Q queries, k neighbors.

IMAGES, DUPLICATES, OUTLIERS, QUERIES = "images.parquet", "duplicates.csv", "outliers.csv", "queries.csv"
SUMMARY, PAGE, FEATURES = "summary.json", "gallery.html", "features"


@dataclass(frozen=True)
class SearchedOptions(ImageOptions):
    """Images"""

    images: list[str] = option(
        [],
        "A folder of features that mocov3 extract wrote; with --model files, folders and archives of images.",
        metavar="FEATURES",
    )


@dataclass(frozen=True)
class OptionalModelOptions(PredictorOptions):
    """Model"""

    model: str | None = option(  # type: ignore[assignment]
        None, "Folder, Hub id or published name of a model that extracts features first.", metavar="MODEL"
    )


@dataclass(frozen=True)
class NeighborOptions:
    """Search"""

    output_dir: str = option(help="Folder for the tables and the page.", metavar="DIR")
    overwrite_output_dir: bool = option(False, "Write to --output_dir if it exists.")
    query: list[str] = option([], "Files and folders of images to search for.", metavar="IMAGES")
    k: int = option(10, "Neighbors of each image.", at_least=1)
    threshold: float | None = option(
        None,
        "Cosine similarity from which on images are near-duplicates. Defaults to that which 90 % of re-encoded,"
        " resized and cropped copies of some of the images reach.",
        at_least=-1,
        at_most=1,
    )
    num_outliers: int = option(100, "Outliers to list.", at_least=0)
    num_shown: int = option(24, "Groups of near-duplicates, outliers and queries on the page.", at_least=1)
    backend: Literal["auto", "faiss", "sklearn", "torch"] = option(
        "auto", "Library that searches, exactly. auto is faiss on a CPU if it is installed, else torch."
    )
    gallery: bool = option(True, "Whether to write the page with pictures.")


COMMAND = Command(
    "neighbors",
    "Find nearest images, near-duplicates and outliers.",
    (SearchedOptions, OptionalModelOptions, NeighborOptions),
    "images",
)


@dataclass(frozen=True)
class Neighbors:
    """
    What `neighbors` found.

    Attributes:
        output_dir: Its folder.
        summary: As in `summary.json`: numbers of images, groups and outliers, the threshold and how it was chosen.
    """

    output_dir: Path
    summary: dict[str, Any]

    @cached_property
    def images(self) -> "pd.DataFrame":
        """
        A row per image: `row`, `image`, `label`, `group` of near-duplicates (missing without any), `outlier_score`,
        `outlier_z`, and the rows of its `neighbors` with their `similarities`.
        """
        import pandas as pd

        return pd.read_parquet(self.output_dir / IMAGES)

    @cached_property
    def duplicates(self) -> "pd.DataFrame":
        """A row per image that has near-duplicates: `group`, `row`, `image`, `similarity` to the nearest."""
        return self._table(DUPLICATES)

    @cached_property
    def outliers(self) -> "pd.DataFrame":
        """The images farthest from their neighbors: `row`, `image`, `outlier_score`, `outlier_z`."""
        return self._table(OUTLIERS)

    @cached_property
    def queries(self) -> "pd.DataFrame":
        """The nearest images of each query: `query`, `rank`, `row`, `image`, `similarity`."""
        return self._table(QUERIES)

    @property
    def gallery(self) -> Path:
        """The HTML page."""
        return self.output_dir / PAGE

    def _table(self, name: str) -> "pd.DataFrame":
        import pandas as pd

        return pd.read_csv(self.output_dir / name)


@dataclass(frozen=True)
class Query:
    """
    An image that was searched for.

    Attributes:
        name: Its path, or its place among the queries.
        picture: uint8 (h, w, 3).
        rows, similarities: Of its nearest images, best first.
    """

    name: str
    picture: np.ndarray | None
    rows: list[int]
    similarities: list[float]


def run(
    which: ImageOptions, how: OptionalModelOptions, options: NeighborOptions, queries: Sequence[ImageInput] = ()
) -> Neighbors:
    """
    Search, and write tables, summary and page.

    Args:
        queries: Images in memory to search for, beside those of `options.query`.

    Raises:
        ValueError: No features or images, no such model, fewer than two images, or missing packages.
        OSError: The folder cannot be written.
    """
    if options.gallery:
        require_packages("the page with pictures (or pass --no_gallery)", "report", NEEDED)
    check_output_dir(options.output_dir)
    if is_occupied(options.output_dir, options.overwrite_output_dir):
        raise UsageError(
            f"--output_dir {options.output_dir} exists: pass a new folder, or --overwrite_output_dir to write to it"
        )
    output, device = Path(options.output_dir), choose_device(how.device)
    queries = [*options.query, *queries]
    backend = choose_backend(options.backend, device)
    asked = checked_queries(queries, which.on_bad_image)
    settings = {"device": how.device, "batch_size": how.batch_size, "num_workers": how.dataloader_num_workers}
    folder = open_features(which, how, output / FEATURES, options.overwrite_output_dir)
    searched = Searched(folder, how.model, **settings)
    check_features(f"the features in {str(folder.path)!r}", searched.features)
    is_new = folder.path not in map(Path, which.images)
    with where_features_are(folder.path) if is_new else contextlib.nullcontext():
        found = nearest_others(searched.features, options.k, backend=backend, device=device)
        nearest, bad_queries = search_queries(searched, asked, options.k, backend, device) if asked else ([], [])
        if bad_queries and which.on_bad_image == "stop":
            raise UsageError(f"query {bad_queries[0]} cannot be decoded: pass another image, or --on_bad_image skip")
        threshold, reason = options.threshold, "as passed"
        if threshold is None:
            threshold, reason = choose_threshold(searched)
        groups = numbered(duplicate_groups(searched.features, found, threshold, device=device).numpy())
        info = searched.folder.info
        scores, z = (values.numpy() for values in outlier_scores(found[0]))
        summary = {
            "images": info["rows"],
            "bad_images": info["bad_images"],
            "groups": int(groups.max()),
            "near_duplicates": int((groups > 0).sum()),
            "outliers": int((z > OUTLIER_Z).sum()),
            "queries": len(nearest),
            "bad_queries": bad_queries,
            "threshold": threshold,
            "threshold_chosen": reason,
            "k": found[1].shape[1],
            "backend": backend,
            "model": info["model"],
            "features": str(searched.folder.path),
        }
        write_tables(output, searched, found, groups, scores, z, nearest, options.num_outliers)
        write_json(output / SUMMARY, summary)
        (output / PAGE).unlink(missing_ok=True)  # of an earlier search
        if options.gallery:
            write_page(output, summary, searched, found, groups, scores, nearest, options.num_shown)
        return Neighbors(output, summary)


@contextlib.contextmanager
def where_features_are(path: Path) -> Iterator[None]:
    """If a search in features that were just extracted fails: how to search again without extracting them."""
    try:
        yield
    except BaseException:
        warn(f"the features are in {path}: pass it in place of the images, and --overwrite_output_dir or a new folder")
        raise


def run_call(dataset: Any, model: str | None, query: Any, options: dict[str, Any]) -> Neighbors:
    """`mocov3_hf.neighbors`, inside `named_model`."""
    with named(dataset) as (name, split):
        is_path = isinstance(dataset, str | os.PathLike) and "test_split" not in options and os.path.exists(name)
        given = {**options, **({"images": [name]} if is_path else {"dataset_name": name})}
        if model is not None:
            given["model"] = model
        if split is not None:
            given.setdefault("test_split", split)
        values = values_of_keywords(COMMAND, given)
        which, how, chosen = (
            build(SearchedOptions, values),
            build(OptionalModelOptions, values),
            build(NeighborOptions, values),
        )
        return run(which, how, chosen, list(queries_of(query)))


def open_features(which: ImageOptions, how: OptionalModelOptions, path: Path, overwrite: bool) -> FeatureFolder:
    """The folder of features that is named, or one with the features of the images that are named."""
    if len(which.images) == 1 and (how.model is None or (Path(which.images[0]) / INFO).is_file()):
        return read_feature_folder(which.images[0])
    if how.model is None:
        raise UsageError(
            "no features: pass a folder that mocov3 extract --output_dir wrote, or images and --model to extract them"
        )
    return extract_to_folder(which, how, str(path), overwrite=overwrite)


def search_queries(
    searched: Searched, asked: Sequence[ImageInput], k: int, backend: str, device: torch.device
) -> tuple[list[Query], list[str]]:
    """The nearest images of each query, other than itself; and the names of queries that could not be decoded."""
    names = [name_of(image, index) for index, image in enumerate(asked)]
    batches = list(searched.extractor.batches(asked))
    prepared = [image for batch, _ in batches for image in batch]
    good = [place for place, image in enumerate(prepared) if image.error is None]
    bad = [printable(image.name) for image in prepared if image.error is not None]
    if not good:
        return [], bad
    number = min(k + 1, len(searched.names))  # one may be the query itself
    features = torch.cat([rows for _, rows in batches if rows.numel()])
    similarities, rows = search(features, searched.features, number, backend=backend, device=device)
    found = []
    for place, near, alike in zip(good, rows.tolist(), similarities.tolist(), strict=True):
        own = shown(os.path.abspath(names[place])) if isinstance(asked[place], str | os.PathLike) else None
        others = [(row, value) for row, value in zip(near, alike, strict=True) if searched.names[row] != own]
        picture = searched.picture(decode(asked[place], searched.pixel_format))
        found.append(Query(printable(names[place]), picture, *map(list, zip(*others[:k], strict=True))))
    return found, bad


def numbered(groups: np.ndarray) -> np.ndarray:
    """
    Numbers of groups from 1, the largest first; 0 for an image without near-duplicates.

    Args:
        groups: (N,) of `duplicate_groups`.
    """
    roots, sizes = np.unique(groups, return_counts=True)
    order = np.lexsort((roots, -sizes))
    numbers: np.ndarray = np.zeros(len(groups), dtype=np.int64)
    ranked = order[sizes[order] > 1]
    numbers[roots[ranked]] = np.arange(1, len(ranked) + 1)
    return numbers[groups]


def write_tables(
    output: Path,
    searched: Searched,
    found: Found,
    groups: np.ndarray,
    scores: np.ndarray,
    z: np.ndarray,
    nearest: list[Query],
    num_outliers: int,
) -> None:
    """Write what `Neighbors` reads. Arrays are (N,)."""
    names, k = searched.names, found[1].shape[1]
    table = searched.folder.index.select(["row", "image", "label"])
    columns = {
        "group": pa.array(groups, mask=groups == 0),
        "outlier_score": pa.array(scores),
        "outlier_z": pa.array(z),
        "neighbors": pa.FixedSizeListArray.from_arrays(pa.array(found[1].flatten().numpy()), k),
        "similarities": pa.FixedSizeListArray.from_arrays(pa.array(found[0].flatten().numpy()), k),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / IMAGES) as aside:
        pq.write_table(table, aside)
    members = np.lexsort((np.arange(len(groups)), groups))[int((groups == 0).sum()) :]
    similar = ([groups[row], row, names[row], f"{found[0][row, 0]:.6f}"] for row in members.tolist())
    write_csv(output / DUPLICATES, ["group", "row", "image", "similarity"], similar)
    farthest = np.argsort(-scores, kind="stable")[:num_outliers].tolist()
    far = ([row, names[row], f"{scores[row]:.6f}", f"{z[row]:.3f}"] for row in farthest)
    write_csv(output / OUTLIERS, ["row", "image", "outlier_score", "outlier_z"], far)
    near = (
        [query.name, rank, row, names[row], f"{similarity:.6f}"]
        for query in nearest
        for rank, (row, similarity) in enumerate(zip(query.rows, query.similarities, strict=True), start=1)
    )
    write_csv(output / QUERIES, ["query", "rank", "row", "image", "similarity"], near)


def write_csv(path: Path, columns: list[str], rows: Iterable[list]) -> None:
    """A table as text, in one step."""
    with atomic_file(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_page(
    output: Path,
    summary: dict[str, Any],
    searched: Searched,
    found: Found,
    groups: np.ndarray,
    scores: np.ndarray,
    nearest: list[Query],
    num_shown: int,
) -> None:
    """Write the page; without queries it shows neighbors of images spread over all."""
    from .report.gallery import render_neighbors

    similarities = found[0].numpy()
    duplicates = []
    for number in range(1, min(summary["groups"], num_shown) + 1):
        rows = np.flatnonzero(groups == number).tolist()
        duplicates.append([(row, float(similarities[row, 0])) for row in rows])
    farthest = [(row, float(scores[row])) for row in np.argsort(-scores, kind="stable")[:num_shown].tolist()]
    shown_queries = nearest[:num_shown]
    if not summary["queries"]:
        spread = np.unique(np.linspace(0, len(scores) - 1, min(num_shown, 8)).astype(int)).tolist()
        shown_queries = [
            Query(searched.names[row], searched.picture(row), found[1][row].tolist(), similarities[row].tolist())
            for row in spread
        ]
    strips = [
        (query.name, query.picture, list(zip(query.rows, query.similarities, strict=True))) for query in shown_queries
    ]
    page = render_neighbors(
        summary, searched.names, searched.picture, duplicates, farthest, strips, searched.folder.bad_images
    )
    write_text(output / PAGE, page)


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 neighbors`."""
    with reporting():
        found = run(*parse(COMMAND, arguments))
        summary = found.summary
        print(f"near-duplicates: {summary['near_duplicates']}, groups: {summary['groups']}")
        print(f"threshold {summary['threshold']:g}: {summary['threshold_chosen']}")
        print(f"outliers: {summary['outliers']}")
        print(f"{found.output_dir}: {', '.join(sorted(path.name for path in found.output_dir.iterdir()))}")
