"""Data sets that `datasets` opens: those of the Hub, and files that it alone reads. Its errors are one line each."""

import errno
import functools

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..hints import describe_missing, joined
from ..reporting import RunError, quiet_hub, warn
from ..storage import is_local
from .damaged_files import damaged_parquet, num_parquet_rows, one_line
from .decode import printable


def load_builder(dataset_name: str, config_name: str | None = None, revision: str | None = None, data_files=None):
    """
    Call `datasets.load_dataset_builder`, and raise its various errors as one-line ValueErrors.

    A name without a slash may be a mistyped folder: what is opened under it is reported.
    """
    shown = repr(printable(dataset_name))
    try:
        with quiet_hub():
            builder = datasets.load_dataset_builder(
                dataset_name, config_name, revision=revision, data_files=data_files
            )
    except (DatasetNotFoundError, ConnectionError) as error:
        fix = "check the name, your access if it is gated, and the network"
        on_hub = f"as a data set on the Hub it cannot be opened: {fix}"
        raise ValueError(joined(describe_missing(dataset_name), on_hub)) from error
    except FileNotFoundError as error:  # EmptyDatasetError, DataFilesNotFoundError
        raise ValueError(f"no images, parquet files or tars found in {shown}: {first_line(error)}") from error
    except ValueError as error:  # unknown configuration, different formats of splits, ...
        raise ValueError(f"{shown} cannot be opened: {first_line(error)}") from error
    except RuntimeError as error:
        # A data set of the Hub with a loading script, which `datasets` 4 and later do not run, or a failed download.
        raise ValueError(f"{shown} cannot be opened: {first_line(error)}") from error
    except OSError as error:  # HTTP errors of the Hub, a disk that is full, ...
        raise ValueError(
            f"{shown} cannot be opened: {first_line(error)}: check the network, and HF_HUB_OFFLINE"
        ) from error
    if data_files is None and "/" not in dataset_name and not is_local(dataset_name):
        if builder.repo_id is None:  # all files below the current folder
            raise ValueError(f"{shown} is the name of a format: pass a folder of images, a file or a Hub id")
        report_bare_name(dataset_name, builder.cache_dir if builder.name == "cache" else None)
    return builder


@functools.cache
def report_bare_name(name: str, cached: str | None) -> None:
    """
    A line on stderr, once: no folder has this name.

    Args:
        name: Of a data set of the Hub, or of one in the cache of `datasets` that can also be of an earlier folder.
        cached: The folder of the latter.
    """
    what = f"the data set {name!r} of the Hub" if cached is None else f"what datasets has kept in {cached!r}"
    warn(f"there is no folder {name!r} here: loading {what}")


def prepare(builder: datasets.DatasetBuilder, name: str) -> None:
    """Raises ValueError where a file of a data set is damaged."""
    try:
        builder.download_and_prepare()
    # `datasets` wraps most errors in DatasetGenerationError; others are those of Arrow and of damaged metadata.
    except (DatasetGenerationError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = datasets.config.HF_DATASETS_CACHE
            raise RunError(f"{name!r} cannot be prepared in {str(cache)!r}: {cause.strerror}") from error
        files = [file for part in (builder.config.data_files or {}).values() for file in part]
        found = None
        if builder.name == "parquet":
            if num_parquet_rows(files) == 0:
                raise ValueError(f"{name!r} is empty: its parquet files have no rows") from error
            found = damaged_parquet(files)
        file, reason = found or (name, one_line(cause))
        raise ValueError(f"{file!r} cannot be read: {reason}") from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
