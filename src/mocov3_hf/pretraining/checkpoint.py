"""The content of a pre-training checkpoint: model, optimizer and state as safetensors and JSON, without pickle.

    checkpoint-N/
        model.safetensors config.json preprocessor_config.json    what `from_pretrained` loads
        optimizer.safetensors                                     optimizer state by parameter name
        state.json                                                position, optimizer settings, versions
        recipe.yaml
        manifest.json                                             size and SHA-256 of every other file

The output folder itself holds the model files of the newest checkpoint.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .._version import __version__
from ..data.order import ORDER_VERSION
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..results import hardware
from ..run_folder import (
    CHECKPOINT_PREFIX,
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    RECIPE,
    STATE,
    WEIGHTS,
    CheckpointError,
    describe_file,
    list_checkpoints,
    read_manifest,
    step_of,
    write_manifest,
)
from ..storage import atomic_file, atomic_folder, delete_folder, write_json
from .pixels import image_processor
from .recipe import Recipe


@dataclass(frozen=True)
class RunState:
    """The position of a run. Order of images, augmentation and dropout follow from seed and step."""

    step: int  # steps done
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    num_processes: int
    log: dict  # of `TrainingLog.state`
    skipped_batches: int = 0  # by rollbacks: the data are that far ahead of the steps
    num_rollbacks: int = 0
    scaler: dict | None = None  # of the gradient scaler, with fp16
    # Which images the run is trained on, None in checkpoints of 0.1, and how often they changed (--allow_data_change).
    num_samples: int | None = None
    data_fingerprint: str | None = None
    data_changes: int = 0
    order_version: int = ORDER_VERSION
    version: str = __version__
    torch_version: str = torch.__version__
    hardware: dict = field(default_factory=hardware)


def save_checkpoint(
    output_dir: Path,
    model: MoCoV3ForPreTraining,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    state: RunState,
    save_total_limit: int | None = None,
) -> Path:
    """
    Write `checkpoint-{step}`, and then delete the oldest checkpoints.

    Every `checkpoint-N` is complete at any time: it gets its name when all files are flushed to the disk.

    Raises:
        OSError: the disk is full or not writable; what was there before is unchanged.
    """
    folder = output_dir / f"{CHECKPOINT_PREFIX}{state.step}"
    tensors, settings = named_optimizer_state(model, optimizer)
    with atomic_folder(folder, replace=True) as aside:
        model.save_pretrained(aside)
        image_processor(recipe).save_pretrained(aside)
        save_file(tensors, aside / OPTIMIZER)
        write_json(aside / STATE, {"run": asdict(state), "optimizer": settings})
        recipe.save(aside / RECIPE)
        write_manifest(aside)
    if save_total_limit is not None:
        for old in list_checkpoints(output_dir)[save_total_limit:]:
            delete_folder(old)
    return folder


def publish(folder: Path, output_dir: Path) -> None:
    """
    Copy the model files of a checkpoint into the output folder, each in one step, the configuration last.

    Copies, not links: writing to a file there must not change the checkpoint.

    Raises:
        OSError: a file that cannot be replaced; it is as it was before.
    """
    for file in sorted(folder.iterdir(), key=lambda file: file.name == CONFIG):
        if file.name not in (OPTIMIZER, STATE, RECIPE, MANIFEST):
            with atomic_file(output_dir / file.name) as aside:
                shutil.copyfile(file, aside)


def is_published(folder: Path, output_dir: Path) -> bool:
    """Whether the output folder has the model files of a checkpoint: the run may have been killed before `publish`."""
    expected = {name: entry for name, entry in read_manifest(folder).items() if name not in (OPTIMIZER, STATE, RECIPE)}
    copies = {name: output_dir / name for name in expected}
    return all(copy.is_file() and describe_file(copy) == expected[name] for name, copy in copies.items())


def read_state(folder: Path) -> RunState:
    """
    The position of the run at a checkpoint.

    Raises:
        CheckpointError: the file is damaged, or of a version with other fields.
    """
    content = read_state_file(folder)
    try:
        state = RunState(**{"order_version": 1} | content["run"])  # version 0.1 did not write it
    except TypeError as error:
        raise CheckpointError(f"{folder} is damaged: {STATE} has other fields ({error})") from error
    if state.step != (step_of(folder) or state.step):
        raise CheckpointError(f"{folder} is damaged: {STATE} is that of step {state.step!r}")
    return state


def read_state_file(folder: Path) -> dict:
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is damaged: {STATE} cannot be read ({error})") from error
    if not isinstance(content, dict) or not {"run", "optimizer"} <= content.keys():
        raise CheckpointError(f"{folder} is damaged: {STATE} does not hold the state of a run")
    return content


def load_checkpoint(folder: Path, model: MoCoV3ForPreTraining, optimizer: torch.optim.Optimizer) -> None:
    """
    Load the tensors of a checkpoint into a model and an optimizer of the same recipe.

    Raises:
        CheckpointError: tensors that are missing, unknown or of another shape.
    """
    try:
        weights, tensors = load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds another model: {' '.join(str(error).split())}") from error
    restore_optimizer(model, optimizer, tensors, read_state_file(folder)["optimizer"])


def named_optimizer_state(
    model: MoCoV3ForPreTraining, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Tensors by `parameter name/key`, and the plain settings of every group with the names of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}/{key}": value.detach().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, settings


def restore_optimizer(
    model: MoCoV3ForPreTraining,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    settings: list[dict],
) -> None:
    """Through the optimizer's own `load_state_dict`, which moves and casts the tensors."""
    parameters = dict(model.named_parameters())
    current = named_optimizer_state(model, optimizer)[1]
    if [group["params"] for group in settings] != [group["params"] for group in current]:
        raise CheckpointError("the optimizer of the checkpoint has other parameters or other groups of them")
    order = [name for group in settings for name in group["params"]]
    state = {}
    for key, value in tensors.items():
        name, kind = key.rsplit("/", 1)
        if name not in order or (kind != "step" and value.shape != parameters[name].shape):
            raise CheckpointError(f"{key} of the optimizer has shape {tuple(value.shape)}, not that of a parameter")
        if kind != "step":  # fused optimizers require the memory format of the parameter
            value = torch.empty_like(parameters[name], dtype=value.dtype, device=value.device).copy_(value)
        state.setdefault(order.index(name), {})[kind] = value
    groups, start = [], 0
    for group in settings:
        number = len(group["params"])
        groups.append({**group, "params": list(range(start, start + number))})
        start += number
    optimizer.load_state_dict({"state": state, "param_groups": groups})
