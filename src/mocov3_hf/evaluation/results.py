"""The record of evaluations: `results.json` next to the model, which every evaluation appends to."""

import datetime
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


FILE_NAME = "results.json"
FORMAT = 1
_PACKAGES = ("mocov3_hf", "torch", "torchvision", "transformers", "accelerate", "datasets")


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
) -> dict[str, Any]:
    """Add one evaluation to `output_dir/results.json`, which is made where missing.

    The file is `{"format": 1, "results": [...]}`, oldest first. Results already there are kept as they are. It is
    locked against other writers, written aside, synced and renamed, so that neither a crash nor two evaluations at
    once lose a result. A file that cannot be read is moved to `results.json.damaged` (a warning), never written over.

    Args:
        output_dir: folder, made where missing.
        task: "knn", "linear", "finetune", ...
        dataset: what was evaluated on: name, config, split(s), revision, fingerprint, ...
        metrics: name to value; accuracies between 0 and 1; of every class as a mapping.
        settings: everything that was chosen and has an influence on the metrics.
        seconds: how long it took.
        seed: None where nothing was drawn.
        model: what was evaluated, name and hash of the weights say.

    Returns:
        The result as it stands in the file: the arguments, and date, versions and hardware.

    Raises:
        ValueError: something in the arguments that JSON has no word for, NaN included.
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
    }
    try:
        result = json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a result must hold numbers, text, lists and dicts only: {error}") from error
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    with _locked(folder):
        results = [*_read_or_move_aside(path), result]
        _replace(path, json.dumps({"format": FORMAT, "results": results}, indent=2) + "\n")
    return result


def read_results(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """All results of a folder, oldest first; none where it has no `results.json`.

    Raises:
        ValueError: the file is damaged, or from a later version of the package.
    """
    path = Path(output_dir) / FILE_NAME
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, results = content["format"], content["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): repair it or move it away") from error
    if found != FORMAT or not isinstance(results, list):
        raise ValueError(f"{str(path)!r} has format {found!r}, this version of the package reads format {FORMAT}")
    return results


def table(metrics: Mapping[str, Any], title: str) -> str:
    """Metrics as lines of text: accuracies (`top` in the name, `mean_per_class`) in percent, other numbers as they
    are. What is no number, the accuracy of every class, is left to the file."""
    metrics = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    width = max(map(len, metrics), default=0)
    lines = [
        f"  {name:<{width}}  {100 * value:7.2f} %"
        if "top" in name or "mean_per_class" in name
        else f"  {name:<{width}}  {value:7.4g}"
        for name, value in metrics.items()
    ]
    return "\n".join([title, *lines])


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that have an influence on results."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # used from a folder that was not installed
            versions[name] = "unknown"
    return versions


def hardware() -> dict[str, Any]:
    """The machine in a few words: CPU, cores, GPU, processes."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_count"] = torch.cuda.device_count()
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read_or_move_aside(path: Path) -> list[dict[str, Any]]:
    try:
        return read_results(path.parent)
    except ValueError as error:
        aside = path.with_name(f"{FILE_NAME}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{FILE_NAME}.damaged-{number}")
        os.replace(path, aside)
        warnings.warn(f"moved to {aside.name}, a new file begins: {error}", stacklevel=3)
        return []


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if sys.platform != "win32":  # the rename itself must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _locked(folder: Path):
    """Exclusive among the writers of this machine. The folder itself is locked: nothing is left behind."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there the rename alone must do
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
