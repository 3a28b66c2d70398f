"""
Features of many images on disk: a folder of safetensors and a table that says which image a row belongs to.

- `features-00000.safetensors`, ...: `features` (n, D), float32 or float16, in the order of the table.
- `index.parquet`, a row per image: `row` of the features; `image`, its path or its place in the data set; `input`, its
  place among the images of the command; `label`, null if there is none.
- `features.json`: model, hash of its weights, image processor, images of the command, shards.
- `bad_images.jsonl`: images that could not be decoded, with the reason; missing if there are none.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.references import reference_of
from ..hints import describe_missing
from ..reporting import RunError, UsageError
from ..run_folder import BAD_IMAGES
from ..storage import append_lines, write_json, writing
from .images import PreparedImage


# Dimensions: n images of a shard, N of all, D width.

INFO, INDEX = "features.json", "index.parquet"
FORMAT = 1
SHARD_BYTES = 1 << 27
DTYPES = {"float32": torch.float32, "float16": torch.float16}
SCHEMA = pa.schema([("row", pa.int64()), ("image", pa.string()), ("input", pa.int64()), ("label", pa.string())])


class FeatureWriter:
    """
    Writes features shard by shard: memory holds one shard, `SHARD_BYTES`, for any number of images.

    Args:
        folder: An existing, empty folder.
        dtype: A key of `DTYPES`.
        shard_bytes: A shard is written once it has this size.
    """

    def __init__(self, folder: Path, dtype: str = "float32", shard_bytes: int = SHARD_BYTES):
        self.folder, self.dtype, self.shard_bytes = folder, DTYPES[dtype], shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.rows = self.bad = self.inputs = self.width = 0
        self._index = pq.ParquetWriter(folder / INDEX, SCHEMA)
        self._features: list[torch.Tensor] = []
        self._columns: dict[str, list] = {name: [] for name in SCHEMA.names}

    def add(self, batch: list[PreparedImage], features: torch.Tensor, labels: list[str | None] | None = None) -> None:
        """
        Add a batch as `Predictor.batches` returns it.

        Raises:
            RunError: Features that float16 cannot hold.
        """
        for image in batch:
            if image.error is not None:
                line = {"image": _text(image.name), "reason": image.error.reason}
                append_lines(self.folder / BAD_IMAGES, [line])
                self.bad += 1
            else:
                label = None if labels is None else labels[self.inputs]
                values = (self.rows, _text(image.name), self.inputs, label)
                for column, value in zip(self._columns.values(), values, strict=True):
                    column.append(value)
                self.rows += 1
            self.inputs += 1
        if features.numel():
            stored = features.to(self.dtype)
            if not stored.isfinite().all() and features.isfinite().all():
                raise RunError(f"features up to {features.abs().max():g} do not fit float16: store them as float32")
            self.width = features.shape[1]
            self._features.append(stored)
        if sum(part.nbytes for part in self._features) >= self.shard_bytes:
            self._write_shard()

    def close(self, info: Mapping[str, Any]) -> None:
        """Write what is left, and `features.json` with this description of where the features come from."""
        if self._features:
            self._write_shard()
        self._index.close()
        counts = {"format": FORMAT, "rows": self.rows, "width": self.width, "bad_images": self.bad}
        dtype = str(self.dtype).removeprefix("torch.")
        write_json(self.folder / INFO, {**counts, "dtype": dtype, **info, "shards": self.shards})

    def _write_shard(self) -> None:
        features = torch.cat(self._features)
        name = f"features-{len(self.shards):05d}.safetensors"
        metadata = {"format": "pt", "first_row": str(self.rows - len(features))}
        with writing(str(self.folder / name)):
            save_file({"features": features}, self.folder / name, metadata=metadata)
        self.shards.append({"file": name, "rows": len(features)})
        self._index.write_table(pa.table(self._columns, schema=SCHEMA))
        self._features, self._columns = [], {name: [] for name in SCHEMA.names}


def _text(name: str) -> str:
    """A name as Arrow and JSON hold it: bytes that are not UTF-8 are escaped."""
    return reference_of(os.fsencode(name))


@dataclass(frozen=True)
class FeatureFolder:
    """
    What `FeatureWriter` wrote.

    Attributes:
        path: The folder.
        info: `features.json`.
    """

    path: Path
    info: dict[str, Any]

    @cached_property
    def features(self) -> torch.Tensor:
        """
        All features (N, D), in the type that they are stored in.

        Raises:
            ValueError: A file is missing, damaged or does not fit the others.
        """
        parts = []
        for shard in self.info["shards"]:
            file = self.path / shard["file"]
            try:
                with safe_open(file, "pt") as opened:
                    parts.append(opened.get_tensor("features"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"features {str(file)!r} cannot be read, extract them again: {error}") from error
            if parts[-1].shape != (shard["rows"], self.info["width"]):
                raise ValueError(f"features {str(file)!r} have the shape {tuple(parts[-1].shape)}, expected"
                                 f" {(shard['rows'], self.info['width'])}: extract them again")  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def index(self) -> pa.Table:
        """The table of N rows."""
        try:
            table = pq.read_table(self.path / INDEX)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{str(self.path / INDEX)!r} cannot be read, extract again: {error}") from error
        if len(table) != self.info["rows"]:
            raise ValueError(f"{str(self.path / INDEX)!r} has {len(table)} rows, expected {self.info['rows']}")
        return table

    @property
    def bad_images(self) -> list[dict[str, str]]:
        """The images that could not be decoded: `{"image", "reason"}`."""
        if not self.info["bad_images"]:
            return []
        lines = (self.path / BAD_IMAGES).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def read_feature_folder(path: str | os.PathLike) -> FeatureFolder:
    """
    Features that `mocov3 extract --output_dir` wrote.

    Raises:
        ValueError: There are none, or they are damaged.
    """
    folder = Path(path)
    if not folder.exists():
        raise UsageError(describe_missing(folder, "folder of features"))
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        is_ours = info["format"] == FORMAT and {"rows", "width", "bad_images", "shards"} <= info.keys()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{str(folder)!r} holds no features (no {INFO}): pass a folder that mocov3 extract --output_dir wrote, or"
            " images with --model"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder / INFO)!r} is damaged: extract the features again") from error
    if not is_ours:
        raise ValueError(f"{str(folder / INFO)!r} is of another version: extract the features again")
    return FeatureFolder(folder, info)
