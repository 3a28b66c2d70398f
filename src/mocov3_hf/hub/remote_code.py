"""The model's code beside its weights, for `trust_remote_code=True` where this package is not installed."""

import json
import shutil
from pathlib import Path


CODE_FOLDER = Path(__file__).parent / "model"
# The whole map: what `save_pretrained` writes names only AutoConfig and the saved class.
AUTO_MAP = {
    "AutoConfig": "configuration_mocov3.MoCoV3Config",
    "AutoModel": "modeling_mocov3.MoCoV3Model",
    "AutoModelForImageClassification": "modeling_mocov3.MoCoV3ForImageClassification",
    "AutoModelForPreTraining": "modeling_mocov3_pretraining.MoCoV3ForPreTraining",
}


def add_code(folder: str | Path) -> None:
    """
    Copy the model's code into a saved model folder and name its classes in the configuration there.

    Args:
        folder (`str` or `Path`):
            With the `config.json` of one of this package's models.

    Raises:
        ValueError: no such configuration.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != "mocov3":
        raise ValueError(
            f"{path} is no configuration of model type 'mocov3': save a MoCoV3 model to this folder first"
        )
    for source in sorted(CODE_FOLDER.glob("*.py")):
        if source.name != "__init__.py":
            shutil.copyfile(source, Path(folder) / source.name)
    config["auto_map"] = AUTO_MAP
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
