"""What an error message offers: the nearest name that exists, and choices in words."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


# Names of `Trainer`, of the official code and of other tools, and the options that they may mean here.
OTHER_NAMES = {
    "a": ("backbone_config",),
    "amp": ("mixed_precision",),
    "arch": ("backbone_config", "model"),
    "b": ("train_batch_size", "batch_size"),
    "backbone": ("backbone_config",),
    "base_lr": ("base_learning_rate",),
    "batch_size": ("train_batch_size", "per_device_train_batch_size"),
    "bf16": ("mixed_precision",),
    "checkpoint": ("model",),
    "ckpt": ("model",),
    "compile": ("torch_compile",),
    "crop_min": ("crop_scale",),
    "data": ("dataset_name",),
    "data_dir": ("dataset_name",),
    "data_path": ("dataset_name",),
    "dataset": ("dataset_name", "images"),
    "epochs": ("num_train_epochs",),
    "evaluation_strategy": ("eval_strategy",),
    "fp16": ("mixed_precision", "dtype"),
    "grad_accum": ("gradient_accumulation_steps", "gradient_cache_chunk_size"),
    "img_size": ("image_size",),
    "input_size": ("image_size",),
    "j": ("dataloader_num_workers",),
    "lr": ("learning_rate", "base_learning_rate"),
    "m": ("model",),
    "moco_dim": ("projection_dim",),
    "moco_m": ("ema_decay",),
    "moco_m_cos": ("ema_schedule",),
    "moco_mlp_dim": ("head_hidden_size",),
    "moco_t": ("temperature",),
    "model_name_or_path": ("model",),
    "model_path": ("model",),
    "name_or_path": ("model",),
    "num_epochs": ("num_train_epochs",),
    "o": ("output_dir", "output"),
    "out": ("output_dir", "output"),
    "out_dir": ("output_dir",),
    "output": ("output_dir",),
    "output_file": ("output",),
    "output_path": ("output_dir", "output"),
    "p": ("logging_steps",),
    "overwrite": ("overwrite_output_dir",),
    "per_device_eval_batch_size": ("batch_size",),
    "precision": ("mixed_precision", "dtype"),
    "pretrained": ("model",),
    "print_freq": ("logging_steps",),
    "repo_id": ("hub_model_id",),
    "resume": ("resume_from_checkpoint",),
    "split": ("test_split", "train_split"),
    "steps": ("max_steps",),
    "stop_grad_conv1": ("backbone_config",),
    "topk": ("top_k",),
    "val_split": ("test_split",),
    "validation_split": ("test_split",),
    "warmup_ratio": ("warmup_epochs",),
    "warmup_steps": ("warmup_epochs",),
    "wd": ("weight_decay",),
    "weights": ("model",),
    "workers": ("dataloader_num_workers",),
}


def either(names: Iterable[object]) -> str:
    """Choices in words: `A`, `A or B`, `A, B or C`."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def nearest(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def joined(text: str, more: str) -> str:
    """`text` and a further clause: after a question, a sentence of its own."""
    return f"{text} {more[0].upper()}{more[1:]}" if text.endswith("?") else f"{text}, and {more}"


def describe_missing(name: str | os.PathLike, what: str = "folder", fix: str = "") -> str:
    """
    What to say about a path that does not exist: the nearest name that does, or how to fix it.

    Args:
        name: The path.
        what: What it should be.
        fix: What to do if no name is near.

    Returns:
        Such as `folder 'runs/frist' does not exist; did you mean 'runs/first'?`.
    """
    path = Path(os.path.expanduser(name))
    text = f"{what} {os.fspath(name)!r} does not exist"
    if os.path.islink(path):
        return f"{text}: it is a link to {os.readlink(path)!r}"
    # `Path.exists` raises for a name that is too long.
    first = ([part for part in (path, *path.parents) if not os.path.exists(part)] or [path])[-1]
    try:
        siblings = [entry.name for entry in first.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        siblings = []
    close = difflib.get_close_matches(first.name, siblings, n=1)
    if not close:
        if first != path and len(path.parts) > 2:  # of `name/name`, both may be meant as a Hub id
            text += f" (there is no folder {str(first)!r})"
        return f"{text}: {fix}" if fix else text
    meant = first.with_name(close[0])
    whole = meant / path.relative_to(first)
    return f"{text}; did you mean {str(whole if os.path.exists(whole) else meant)!r}?"
