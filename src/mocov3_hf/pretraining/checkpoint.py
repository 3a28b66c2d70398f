"""What a run leaves on disk."""

import os
import shutil
from pathlib import Path

from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..processing import build_image_processor
from ..recipe import Recipe


def save_model(model: MoCoV3ForPreTraining, recipe: Recipe, output_dir: Path) -> None:
    """
    Put weights, configuration and image processor into `output_dir`, loadable by `from_pretrained`.

    Every file is written aside, flushed to the disk and renamed, so that a reader never meets half of one.
    """
    aside = output_dir / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    build_image_processor(recipe.views.image_size).save_pretrained(aside)
    # The configuration last: it is what makes a folder a model.
    for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(file, output_dir / file.name)
    aside.rmdir()
