"""Pre-training with MoCo v3, from a recipe to a folder of weights."""

import os
from pathlib import Path
from typing import Any


def pretrain(
    dataset: str | os.PathLike, *, recipe: str | os.PathLike, output_dir: str | os.PathLike, **options: Any
) -> Path:
    """
    Pre-train an encoder on unlabeled images: the command `mocov3 pretrain` as a Python call.

    Args:
        dataset: Folder of images, parquet files, webdataset tars or a saved data set, or a Hub id.
        recipe: Name of a recipe of the package (`mocov3 recipes`), or path of a YAML file.
        output_dir: Folder for weights, checkpoints, metrics and the resolved recipe.
        options: Any option of `mocov3 pretrain --help all`, as a Python value: `max_steps=100`,
            `backbone_config={"model_type": "resnet"}`, `crop_scale=[0.2, 1.0]`, `torch_compile=True`.

    Returns:
        The output folder, which `AutoModel.from_pretrained` loads. A run stopped by a signal returns it as well.

    Raises:
        UsageError, ValueError: an option that is not valid, no such data set, or a folder that holds a run.
        RunError, OSError: the run diverged, a checkpoint could not be written, or too many images are damaged.

    Example:

    ```python
    >>> import mocov3_hf

    >>> folder = mocov3_hf.pretrain("path/to/images", recipe="quickstart", output_dir="runs/first", max_steps=100)
    ```
    """
    from .loop import run_recipe
    from .recipe import recipe_of_call

    options |= {"dataset_name": os.fspath(dataset), "output_dir": os.fspath(output_dir)}
    resume = 'the same mocov3_hf.pretrain(...) with resume_from_checkpoint="auto"'
    return run_recipe(recipe_of_call(os.fspath(recipe), options), resume)
