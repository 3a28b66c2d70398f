"""Every class that a model folder names in its `auto_map`, loaded from the folder alone."""

import json
import subprocess
import sys

import pytest
import torch

from mocov3_hf import MoCoV3Backbone, MoCoV3Config, MoCoV3ForPreTraining, MoCoV3ViTConfig, MoCoV3ViTModel
from mocov3_hf.hub.remote_code import AUTO_MAPS, CODE_FOLDER, PROCESSOR_MAP, add_code
from mocov3_hf.processing import PixelFormat, build_image_processor


BACKBONE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LOAD = """
import sys

import torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel

folder, vit_folder = sys.argv[1:3]
trust = {"trust_remote_code": True}
images = torch.load(f"{folder}/images.pt")
with torch.no_grad():
    config = AutoConfig.from_pretrained(folder, out_indices=[1, 2], **trust)
    # `AutoBackbone.from_pretrained` of transformers 5 takes names on the Hub only, not folders.
    backbone_class = type(AutoBackbone.from_config(config, **trust))
    backbone = backbone_class.from_pretrained(folder, config=config).eval()
    vit = AutoModel.from_pretrained(vit_folder, **trust).eval()
    processor = AutoImageProcessor.from_pretrained(folder, **trust)
    results = {"maps": list(backbone(images).feature_maps), "tokens": vit(images).last_hidden_state}
assert type(backbone).__name__ == "MoCoV3Backbone"
assert type(processor).__name__ == "MoCoV3ImageProcessor"
assert processor.pixel_range == [0, 4095]
assert processor(images[0] * 1000, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
assert type(vit).__name__ == "MoCoV3ViTModel"
assert type(vit.config).__name__ == "MoCoV3ViTConfig"
assert not [name for name in sys.modules if name.split(".")[0] == "mocov3_hf"]
torch.save(results, f"{folder}/results.pt")
"""


@pytest.mark.slow
def test_backbone_and_bare_vit_load_without_the_package(tmp_path):
    config = MoCoV3Config(
        backbone_config={"model_type": "mocov3_vit", **BACKBONE}, projection_dim=8, head_hidden_size=16
    )
    vit = MoCoV3ViTModel(MoCoV3ViTConfig(**BACKBONE)).eval()
    MoCoV3ForPreTraining(config).save_pretrained(tmp_path / "whole")
    build_image_processor(32, pixel_format=PixelFormat(3, (0, 4095))).save_pretrained(tmp_path / "whole")
    vit.save_pretrained(tmp_path / "vit")
    for name in ("whole", "vit"):
        add_code(tmp_path / name)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "whole" / "images.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "whole"), str(tmp_path / "vit")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "whole" / "results.pt")
    backbone = MoCoV3Backbone.from_pretrained(tmp_path / "whole", out_indices=[1, 2]).eval()
    with torch.no_grad():
        torch.testing.assert_close(results["maps"], list(backbone(images).feature_maps))
        torch.testing.assert_close(results["tokens"], vit(images).last_hidden_state)


def test_auto_maps_name_what_the_files_contain(tmp_path):
    for model_type, auto_map in AUTO_MAPS.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        add_code(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == auto_map
        for reference in (*auto_map.values(), *PROCESSOR_MAP.values()):
            file, name = reference.split(".")
            assert f"\nclass {name}(" in (CODE_FOLDER / f"{file}.py").read_text()
