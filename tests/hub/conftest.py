"""Tiny models in folders as runs leave them, and a Hub on loopback."""

import json

import pytest
import torch
from huggingface_hub import HfApi

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining
from mocov3_hf.processing import build_image_processor
from tests.factories import VIT
from tests.hub.stand_in import TOKEN, HubStandIn


def tiny_config(**values):
    return MoCoV3Config(
        backbone_config=dict(VIT),
        head_hidden_size=64,
        projection_dim=16,
        **values,
    )


def save_run(folder, classifier=False):
    """A model folder with everything that a run leaves beside the weights, and some that must stay at home."""
    torch.manual_seed(0)
    if classifier:
        model = MoCoV3ForImageClassification(tiny_config(id2label={0: "cat", 1: "dog", 2: "hen"}))
    else:
        model = MoCoV3ForPreTraining(tiny_config())
    model.eval().save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    result = {
        "task": "linear",
        "dataset": {"name": "someone/digits", "config": None, "test_split": "test"},
        "metrics": {"top1": 0.8125, "top5": 0.975, "loss": 0.5},
        "settings": {"lr": 0.1},
    }
    local = {"task": "knn", "dataset": {"name": str(folder)}, "metrics": {"knn20_top1": 0.5}, "settings": {}}
    (folder / "results.json").write_text(json.dumps({"format": 1, "results": [result, local]}))
    (folder / "recipe.yaml").write_text(
        f"dataset_name: someone/digits\nnum_train_epochs: 60\nbase_learning_rate: 1.0e-3\noutput_dir: {folder}\n"
    )
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"\x89PNG")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.safetensors").write_bytes(b"secret")
    (folder / ".env").write_text("HF_TOKEN=secret")
    return model


@pytest.fixture
def run_folder(tmp_path):
    save_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in takes plain uploads
    hub = HubStandIn()
    yield hub
    hub.stall.clear()
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)
