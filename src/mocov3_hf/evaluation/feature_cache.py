"""Features on disk, and the identity of the data that they belong to."""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.fingerprint import file_stamps
from ..data.labeled import LabeledImages
from ..data.sources import MapSource
from ..storage import atomic_file


# Images that are read in full for the fingerprint of a data set.
_SAMPLED_IMAGES = 256


def data_fingerprint(images: LabeledImages) -> str:
    """
    32 hex digits that change with the data: the fingerprint of `datasets` (the table, or the commit on the Hub), sizes
    and times of files, all labels, and the full content of some images spread over the split.

    If the source is not a `datasets.Dataset`, all images are read in full.
    """
    dataset = getattr(images.source, "_dataset", None)
    known = getattr(dataset, "_fingerprint", None)
    step = 1 if known is None else max(1, len(images) // _SAMPLED_IMAGES)
    digest = hashlib.sha256(f"{known} {len(images)} {images.class_names}".encode(errors="backslashreplace"))
    if isinstance(images.source, MapSource):
        digest.update(file_stamps(images.source))
    digest.update(np.asarray(images.labels, dtype=np.int64 if images.labels.ndim == 1 else None).tobytes())
    for row in range(0, len(images), step):
        data = images.read(row)
        if isinstance(data, (str, os.PathLike)):
            # A missing file is reported by the pass over the images, which names the row.
            data = Path(data).read_bytes() if os.path.isfile(data) else os.fspath(data).encode()
        elif isinstance(data, np.ndarray):
            data = data.tobytes()
        digest.update(hashlib.sha256(data or b"").digest())
    return digest.hexdigest()[:32]


def cache_path(cache_dir: str | os.PathLike, identity: dict[str, str]) -> Path:
    """File for features with this identity."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cache_dir) / f"features-{name}.safetensors"


def read_cache(path: Path, identity: dict[str, str], rows: int) -> torch.Tensor | None:
    """Features (n, D) of a cache file, memory-mapped; None if it is missing, damaged (with a warning) or of others."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("identity", "null")) != identity:
                return None
            features = file.get_tensor("features")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"cached features {str(path)!r} are damaged, computing them again: {error}", stacklevel=2)
        return None
    return features if len(features) == rows and features.dtype == torch.float32 else None


def write_cache(path: Path, identity: dict[str, str], features: torch.Tensor) -> None:
    """Write a cache file in one step."""
    with atomic_file(path) as aside:
        save_file({"features": features.contiguous()}, aside, metadata={"identity": json.dumps(identity)})
