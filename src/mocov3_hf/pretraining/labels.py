"""Labeled images among those of a run, and the commands that use them afterwards."""

import shlex
from pathlib import Path
from typing import NamedTuple

from ..data.account import Account
from ..data.classes import open_labeled_splits
from ..data.memory import IN_MEMORY
from ..reporting import one_line
from .recipe import Recipe


PROBE_BATCH_SIZE = 1024  # that of linear-probe, which must not be larger than the data set


class LabeledSplits(NamedTuple):
    """The splits to learn from and to test on, and their numbers of images."""

    train: str
    test: str
    num_train: int
    num_test: int


def labeled_splits(recipe: Recipe, account: Account | None) -> tuple[LabeledSplits | None, str]:
    """
    Labeled splits of the kNN images or, without these, of the images of a run; None, and why there are none. One split
    with labels is both: a fifth of it is held out.
    """
    options, data = recipe.monitoring, recipe.data
    train, test = options.knn_train_split, options.knn_test_split
    if options.knn_steps is None and options.knn_dataset_name is None:
        known = () if account is None else tuple(account.splits)
        train = data.train_split if not {"+", "["} & set(data.train_split) else train
        test = next((name for name in ("validation", "test", *known) if name in known and name != train), train)
    name = options.knn_dataset_name or data.dataset_name
    try:
        parts = open_labeled_splits(name, data.dataset_config_name, train, test, data.image_column)
    except (ValueError, OSError) as error:
        return None, one_line(error).partition(":")[0]
    return LabeledSplits(train, test, *map(len, parts)), ""


def next_commands(recipe: Recipe, account: Account | None) -> list[str]:
    """Useful commands after a run, which work as they are."""
    data, folder = recipe.data, str(recipe.run.output_dir)
    name = recipe.monitoring.knn_dataset_name or data.dataset_name
    if name is None or IN_MEMORY in (name, data.dataset_name):
        return [f"mocov3_hf.knn({folder!r}, labeled_images)"]
    found, _ = labeled_splits(recipe, account)
    if found is None:
        images = ["--images", name] if Path(name).exists() else ["--dataset_name", name]
        images += [] if Path(name).exists() else ["--test_split", data.train_split]
        features = str(Path(folder) / "features.safetensors")
        return [shlex.join(["mocov3", "extract", *images, "--model", folder, "--output", features])]
    labeled = ["--dataset_name", name, "--train_split", found.train, "--test_split", found.test]
    probe = ["--model", folder, "--output_dir", str(Path(folder) / "linear-probe"), *labeled]
    if found.num_train < PROBE_BATCH_SIZE:
        probe += ["--train_batch_size", str(2 ** (found.num_train.bit_length() - 1))]
    return [
        shlex.join(["mocov3", "knn", "--model", folder, "--output_dir", folder, *labeled]),
        shlex.join(["mocov3", "linear-probe", *probe]),
    ]
