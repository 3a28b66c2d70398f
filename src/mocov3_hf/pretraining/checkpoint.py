"""Checkpoints as folders of safetensors and JSON: whole or absent, checked when read, never executed.

    checkpoint-N/
        model.safetensors config.json preprocessor_config.json    what `from_pretrained` loads
        optimizer.safetensors                                     moments, by parameter name
        state.json                                                position, precision, versions
        recipe.yaml
        manifest.json                                             size and SHA-256 of every other file

The output folder itself holds the model files of the newest checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .._version import __version__
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..processing import build_image_processor
from ..recipe import Recipe
from .sharding import is_sharded, spread_like, whole


MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


class SaveError(OSError):
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Order of images, augmentation and dropout follow from seed and step, so this is all."""

    step: int  # updates done
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    num_processes: int
    log: dict  # of `TrainingLog.state`
    skipped_batches: int = 0  # by rollbacks: the data are that much ahead of the steps
    num_rollbacks: int = 0
    scaler: dict | None = None  # of the gradient scaler, with fp16
    version: str = __version__
    torch_version: str = torch.__version__


@dataclass(frozen=True)
class RunTensors:
    """What a checkpoint holds of model and optimizer, whole."""

    weights: dict[str, torch.Tensor] | None  # None for those of the model, which are whole themselves
    moments: dict[str, torch.Tensor]  # by `parameter name/key`
    settings: list[dict]  # of the optimizer's groups


def gather_tensors(model: MoCoV3ForPreTraining, optimizer: torch.optim.Optimizer, keep: bool) -> RunTensors | None:
    """
    Put together what is spread over the processes, all of which must call this; `None` where it is not to be kept.
    """
    is_spread = is_sharded(model)
    if not (is_spread or keep):
        return None
    moments, settings = named_optimizer_state(model, optimizer)
    if not is_spread:
        return RunTensors(None, moments, settings)
    weights, moments = (collected(tensors, keep) for tensors in (model.state_dict(), moments))
    return RunTensors(weights, moments, settings) if keep else None


def collected(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors in the memory of the CPU, one after the other, so that only one lies on the device as well."""
    found = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if keep:
            found[name] = tensor.cpu()
    return found


def save_checkpoint(
    output_dir: Path,
    model: MoCoV3ForPreTraining,
    tensors: RunTensors,
    recipe: Recipe,
    state: RunState,
    save_total_limit: int | None = None,
) -> Path:
    """
    Write `checkpoint-{step}`, put its model files into `output_dir`, and only then delete older checkpoints.

    Whatever happens meanwhile, every `checkpoint-N` in the folder is whole: files are written aside and flushed to the
    disk before the folder gets its name.

    Raises:
        OSError: a full or unwritable disk; what was there before is still there.
    """
    folder = output_dir / f"{PREFIX}{state.step}"
    with written_aside(folder) as aside:
        model.save_pretrained(aside, state_dict=tensors.weights)
        build_image_processor(recipe.views.image_size).save_pretrained(aside)
        save_file(tensors.moments, aside / "optimizer.safetensors")
        write_json(aside / "state.json", {"run": asdict(state), "optimizer": tensors.settings})
        recipe.save(aside / "recipe.yaml")
        write_json(aside / MANIFEST, {file.name: describe_file(file) for file in sorted(aside.iterdir())})
    publish(folder, output_dir)
    rotate(output_dir, save_total_limit)
    return folder


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` with everything in it on the disk, or vanishes."""
    aside = folder.parent / f".{folder.name}.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            flush(file)
        flush(aside)
        if folder.exists():
            shutil.rmtree(folder)  # the same step again, after a resume: the new one is whole by now
        os.rename(aside, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, output_dir: Path) -> None:
    """
    Put the model files of a checkpoint into the output folder, each by one rename.

    As copies, not as links: whoever overwrites a file there must not reach into the checkpoint.
    """
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        if file.name in ("optimizer.safetensors", "state.json", "recipe.yaml", MANIFEST):
            continue
        aside = output_dir / f".{file.name}.incomplete"
        shutil.copyfile(file, aside)
        flush(aside)
        os.replace(aside, output_dir / file.name)
    flush(output_dir)


def rotate(output_dir: Path, save_total_limit: int | None) -> None:
    """Delete the oldest checkpoints beyond the limit."""
    if save_total_limit is not None:
        for folder in list_checkpoints(output_dir)[save_total_limit:]:
            # Out of the list first: a half-deleted checkpoint must not look like one.
            doomed = output_dir / f".{folder.name}.deleted"
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run had begun to write or to delete."""
    for pattern in (f".{PREFIX}*.incomplete", f".{PREFIX}*.deleted"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)
    for file in output_dir.glob(".*.incomplete"):
        file.unlink()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    folders = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Updates done at a checkpoint, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are those of its manifest, and what is wrong with newer ones."""
    complaints = []
    for folder in list_checkpoints(output_dir):
        try:
            check_manifest(folder)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return folder, complaints
    return None, complaints


def check_manifest(folder: Path) -> None:
    """
    Raises:
        CheckpointError: no manifest, or a file that is missing or not the one that was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: its {MANIFEST} cannot be read ({error})") from error
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {file.stat().st_size} bytes instead of {expected['size']}"
            )
        if describe_file(file) != expected:
            raise CheckpointError(f"{folder} is damaged: the content of {name} is not what was written")


def describe_file(file: Path) -> dict:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else sha256(stream)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def sha256(stream) -> "hashlib._Hash":
    """`hashlib.file_digest`, which Python 3.10 lacks."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest


def write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """Where the run stood at a checkpoint."""
    return RunState(**json.loads((folder / "state.json").read_text(encoding="utf-8"))["run"])


def load_checkpoint(folder: Path, model: MoCoV3ForPreTraining, optimizer: torch.optim.Optimizer) -> None:
    """
    Put the tensors of a checkpoint into a model and an optimizer of the same recipe.

    Raises:
        CheckpointError: tensors that are missing, unknown or of another shape.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    current = model.state_dict()
    weights = {
        name: spread_like(tensor, current[name]) if name in current else tensor for name, tensor in weights.items()
    }
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds another model: {' '.join(str(error).split())}") from error
    settings = json.loads((folder / "state.json").read_text(encoding="utf-8"))["optimizer"]
    restore_optimizer(model, optimizer, moments, settings)


def named_optimizer_state(
    model: MoCoV3ForPreTraining, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Tensors by `parameter name/key`, and the plain settings of every group with the names of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value.detach().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return moments, settings


def restore_optimizer(
    model: MoCoV3ForPreTraining,
    optimizer: torch.optim.Optimizer,
    moments: dict[str, torch.Tensor],
    settings: list[dict],
) -> None:
    """Through the optimizer's own `load_state_dict`, which places and casts the tensors."""
    parameters = dict(model.named_parameters())
    current = named_optimizer_state(model, optimizer)[1]
    if [group["params"] for group in settings] != [group["params"] for group in current]:
        raise CheckpointError("the optimizer of the checkpoint holds other parameters or other groups of them")
    order = [name for group in settings for name in group["params"]]
    state = {}
    for key, value in moments.items():
        name, kind = key.rsplit("/", 1)
        if kind != "step" and value.shape != parameters[name].shape:
            raise CheckpointError(f"{key} of the optimizer has shape {tuple(value.shape)}, not the parameter's")
        if kind != "step":  # fused optimizers take it for granted that both lie in memory in the same order
            value = spread_like(value, parameters[name])
            value = torch.empty_like(parameters[name], dtype=value.dtype, device=value.device).copy_(value)
        state.setdefault(order.index(name), {})[kind] = value
    groups, start = [], 0
    for group in settings:
        number = len(group["params"])
        groups.append({**group, "params": list(range(start, start + number))})
        start += number
    optimizer.load_state_dict({"state": state, "param_groups": groups})
