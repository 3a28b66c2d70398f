"""`results.json`: the evaluations of a model, appended by every command, with the versions and the hardware."""

import datetime
import json
import os
import platform
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .storage import locked, write_json


RESULTS = "results.json"
RESULTS_FORMAT = 1
# The evaluations that `results.json` knows: the Hub's task, and what a reader calls it.
TASKS = {
    "knn": ("image-feature-extraction", "k-nearest neighbors"),
    "linear": ("image-classification", "linear probe"),
    "linear_cached": ("image-classification", "linear probe on cached features"),
    "finetune": ("image-classification", "fine-tuning"),
    "evaluate": ("image-classification", "classification"),
}
# Metrics between 0 and 1, shown in percent: the last words of their names.
_SHARES = re.compile(r"(^|_)(top\d+(_std)?|mean_per_class|map|micro_f1|macro_f1|ece)(_ema)?$")
PACKAGES = ("mocov3_hf", "torch", "torchvision", "transformers", "accelerate", "datasets")


def append_result(
    output_dir: str | os.PathLike,
    *,
    task: str,
    dataset: Mapping[str, Any],
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    seconds: float,
    seed: int | None = None,
    model: Mapping[str, Any] | None = None,
    plots: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Append one evaluation to `output_dir/results.json`: `{"format": 1, "results": [...]}`, oldest first.

    Safe against crashes and against other evaluations at the same time. A file that cannot be read is moved to
    `results.json.damaged` with a warning; it is never overwritten.

    Args:
        output_dir: Folder; created if missing.
        task: A key of `TASKS`.
        dataset: What was evaluated on: name, config, splits, revision, fingerprint, ...
        metrics: Name to value; accuracies between 0 and 1; per-class accuracies as a mapping.
        settings: Every choice that has an influence on the metrics.
        seconds: Wall-clock time of the evaluation.
        seed: None if nothing was random.
        model: Name of the model and hash of its weights.
        plots: What the charts of a report show, such as the bins of a reliability diagram.

    Returns:
        The result as stored: the arguments, date, versions and hardware.

    Raises:
        ValueError: A value that JSON cannot hold, including NaN.
    """
    result = {
        "task": task,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": None if model is None else dict(model),
        "dataset": dict(dataset),
        "metrics": dict(metrics),
        "settings": dict(settings),
        "seed": seed,
        "seconds": round(seconds, 3),
        "versions": package_versions(),
        "hardware": hardware(),
        **({"plots": dict(plots)} if plots else {}),
    }
    try:
        result = json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a result may only hold numbers, text, lists and mappings: {error}") from error
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        results = [*_read_or_move_aside(folder / RESULTS), result]
        write_json(folder / RESULTS, {"format": RESULTS_FORMAT, "results": results})
    return result


def read_results(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    All evaluations in a folder's `results.json`, oldest first; none without the file.

    Raises:
        ValueError: The file is damaged, or was written by a later version of the package.
    """
    path = Path(folder) / RESULTS
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, results = content["format"], content["results"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): repair it or move it away") from error
    if found != RESULTS_FORMAT or not isinstance(results, list):
        raise ValueError(f"{str(path)!r} has format {found!r}, expected {RESULTS_FORMAT}: update mocov3_hf")
    return [row for row in results if isinstance(row, dict) and isinstance(row.get("metrics"), dict)]


def is_share(metric: str) -> bool:
    """Whether a metric is an accuracy or another share, which people read in percent."""
    return _SHARES.search(metric) is not None


def _read_or_move_aside(path: Path) -> list[dict[str, Any]]:
    try:
        return read_results(path.parent)
    except ValueError as error:
        aside, number = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.damaged-{number}")
        os.replace(path, aside)
        warnings.warn(f"started a new {path.name}, moved the old one to {aside.name}: {error}", stacklevel=3)
        return []


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that have an influence on results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # used from a folder, not installed
            versions[name] = "unknown"
    return versions


def hardware() -> dict[str, Any]:
    """CPU, number of cores, GPU and number of processes."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_count": torch.cuda.device_count()}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
