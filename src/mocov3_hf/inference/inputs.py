"""The images that a command line names: files, folders, archives, or a split of a data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import datasets

from ..data.file_kinds import ARCHIVES, PARQUET, TABLES, extension_of
from ..data.image_files import files_of_archive
from ..data.labeled import find_label_column
from ..data.references import read_reference, shown
from ..data.sources import NO_RANDOM_ACCESS, MapSource, open_table
from ..data.splits import split_option
from ..hints import describe_missing
from ..options import option
from ..reporting import UsageError
from .images import NamedImage, find_images, report_skipped


@dataclass(frozen=True)
class ImageOptions:
    """Images"""

    images: list[str] = option([], "Files, folders and archives of images.", metavar="IMAGES")
    dataset_name: str | None = option(
        None, "Images of a data set instead: Hub id, or folder of parquet files.", metavar="DATASET"
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    test_split: str = option("test", "Split of the data set.", old=["split"])
    image_column: str | None = option(None, "Column of images. Found if there is only one.")
    on_bad_image: Literal["stop", "skip"] = option(
        "stop", "What to do with images that cannot be decoded.", old=["bad_images"]
    )


class Rows(Sequence[NamedImage]):
    """The encoded images of a split of a data set, read as they are needed."""

    def __init__(self, options: ImageOptions):
        name, split = str(options.dataset_name), options.test_split
        with split_option("--test_split"):
            dataset, column, account = open_table(
                name, options.dataset_config_name, split, options.image_column, labeled=False
            )
        if not isinstance(dataset, datasets.Dataset):
            raise UsageError(NO_RANDOM_ACCESS)
        self.split, self.source = split, MapSource(dataset, column or options.image_column, account)
        self.labels = labels_of(dataset)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return NamedImage(f"{self.split}[{index}]", partial(self.source.read, index))


def labels_of(dataset: datasets.Dataset) -> list[str | None] | None:
    """The class of each image; None without a column of labels, or with several."""
    try:
        column = find_label_column(dataset)
    except ValueError:
        return None
    names = getattr(dataset.features[column], "names", None)
    values = dataset.select_columns([column])[:][column]
    return [None if value is None else names[value] if names else str(value) for value in values]


def open_inputs(options: ImageOptions, is_reported: bool = True) -> Sequence[str | NamedImage]:
    """
    The images, undecoded: paths, or what has a name of its own.

    Args:
        is_reported: Whether warnings name what is skipped of folders and archives.

    Raises:
        UsageError, ValueError: There are none, or what is named does not exist.
    """
    if bool(options.images) == bool(options.dataset_name):
        raise UsageError("no images: pass files and folders, or --dataset_name" if not options.images else
                         "pass either files and folders of images or --dataset_name, not both")  # fmt: skip
    if options.dataset_name:
        return Rows(options)
    found: list[str | NamedImage] = []
    for path in map(os.path.expanduser, options.images):
        extension = extension_of(os.path.basename(os.fsencode(path)))
        if os.path.isdir(path):
            found += find_images(path, is_reported)
        elif extension in ARCHIVES and os.path.exists(path):
            members = files_of_archive(path, path, options.image_column)
            if not members.references:
                raise UsageError(f"archive {path!r} holds no images")
            if is_reported:
                report_skipped(path, members.tally)
            found += [NamedImage(shown(member), partial(read_reference, member)) for member in members.references]
        elif extension in PARQUET | TABLES:
            raise UsageError(f"{path!r} is a table: pass it as --dataset_name")
        else:
            found.append(path)
    missing = [path for path in found if isinstance(path, str) and not os.path.exists(path)]
    if missing and options.on_bad_image == "stop":
        text = describe_missing(missing[0], "image")
        raise UsageError(f"{text}{'' if text.endswith('?') else '.'} To skip it, pass --on_bad_image skip")
    return found
