"""The code of a model next to its weights, for `trust_remote_code=True` without this package."""

import json
import shutil
from pathlib import Path

from ..hints import either
from ..model.image_processing_mocov3 import MoCoV3ImageProcessor
from ..run_folder import PROCESSOR
from ..storage import write_text


CODE_FOLDER = Path(__file__).parent.parent / "model"
# Complete maps by model type: `save_pretrained` itself names only AutoConfig and the class of the saved model.
AUTO_MAPS = {
    "mocov3": {
        "AutoBackbone": "modeling_mocov3_backbone.MoCoV3Backbone",
        "AutoConfig": "configuration_mocov3.MoCoV3Config",
        "AutoModel": "modeling_mocov3.MoCoV3Model",
        "AutoModelForImageClassification": "modeling_mocov3.MoCoV3ForImageClassification",
        "AutoModelForPreTraining": "modeling_mocov3_pretraining.MoCoV3ForPreTraining",
    },
    "mocov3_vit": {
        "AutoConfig": "configuration_mocov3_vit.MoCoV3ViTConfig",
        "AutoModel": "modeling_mocov3_vit.MoCoV3ViTModel",
    },
}
PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_mocov3.MoCoV3ImageProcessor"}


def add_code(folder: str | Path) -> None:
    """
    Copy the code of the models into a saved model folder and add the `auto_map` to its configuration, and to that of
    its image processor if it is one of this package.

    Args:
        folder (`str` or `Path`):
            Contains the `config.json` of one of the models of this package.

    Raises:
        ValueError: there is no such configuration.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    auto_map = AUTO_MAPS.get(config.get("model_type"))
    if auto_map is None:
        raise ValueError(
            f"{path} is not a configuration of model type {either(map(repr, AUTO_MAPS))}: save a MoCoV3 model to"
            " this folder first"
        )
    for source in sorted(CODE_FOLDER.glob("*.py")):
        if source.name != "__init__.py":
            shutil.copyfile(source, Path(folder) / source.name)
    config["auto_map"] = auto_map
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor_path = Path(folder) / PROCESSOR
    processor = json.loads(processor_path.read_text(encoding="utf-8")) if processor_path.is_file() else {}
    if processor.get("image_processor_type") == MoCoV3ImageProcessor.__name__:
        processor["auto_map"] = PROCESSOR_MAP
        write_text(processor_path, json.dumps(processor, indent=2, sort_keys=True) + "\n")
