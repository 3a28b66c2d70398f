"""What to do with a finished run: commands that run as they are printed."""

import shlex
from pathlib import Path

import numpy as np

from ..data.classes import open_labeled_splits
from ..data.memory import IN_MEMORY
from ..run_folder import BAD_IMAGES
from .recipe import Recipe


TEST_SPLITS = ("test", "validation")
LARGEST_LABELED = 1_000_000  # images; from here on, opening the labels takes minutes
FEWEST_NEIGHBORS = 10  # of kNN, unless it is asked for other numbers


def labeled_splits(
    dataset_name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
) -> tuple[str, str, int, int] | None:
    """
    Splits for evaluation: training and test split, number of classes and of images; None without labels.

    The test split is `test_split`, "test" or "validation", whichever exists first and has the same classes; else the
    training split, of which the evaluations hold out a fifth.
    """
    for test in dict.fromkeys((test_split, *TEST_SPLITS, train_split)):
        if test is None:
            continue
        try:
            train, queries = open_labeled_splits(dataset_name, config_name, train_split, test, image_column)
        except (ValueError, OSError):  # no such split, no labels, other classes, or out of reach
            continue
        if len(np.unique(train.labels)) > 1 and len(train) >= FEWEST_NEIGHBORS:
            return train_split, test, train.num_classes, len(train) + len(queries)
    return None


def next_commands(recipe: Recipe) -> list[str]:
    """Commands about the weights in the output folder, or Python calls for data in memory."""
    options, data, folder = recipe.monitoring, recipe.data, str(recipe.run.output_dir)
    if IN_MEMORY in (options.knn_dataset_name, data.dataset_name):
        return [f"mocov3_hf.report({folder!r})", f"mocov3_hf.knn({folder!r}, labeled_images)"]
    own = options.knn_dataset_name is None
    name = data.dataset_name if own else options.knn_dataset_name
    train = data.train_split if own and options.knn_steps is None else options.knn_train_split
    found = None
    if name is not None and not data.streaming:
        test = options.knn_test_split
        found = labeled_splits(name, data.dataset_config_name, train, test, data.image_column)
    common = ["--model", folder]
    about_data = [
        *(["--dataset_config_name", data.dataset_config_name] if data.dataset_config_name else []),
        *(["--image_column", data.image_column] if data.image_column else []),
        *(["--on_bad_image", "skip"] if (Path(folder) / BAD_IMAGES).exists() else []),
    ]
    commands = [["mocov3", "report", folder]]
    if found is not None:
        splits = ["--dataset_name", str(name), "--train_split", found[0], "--test_split", found[1], *about_data]
        commands += [
            ["mocov3", "knn", *common, *splits],
            ["mocov3", "linear-probe", "--cached", *common, *splits],
        ]
    elif not data.streaming:
        images = ["--dataset_name", str(data.dataset_name), "--test_split", data.train_split, *about_data]
        commands.append(["mocov3", "extract", *common, *images, "--output_dir", str(Path(folder) / "features")])
    return [shlex.join(command) for command in commands]
