"""Pushed models and carried code in fresh processes: with this package, and where it cannot be imported."""

import io
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from mocov3_hf.hub.push import main, push_folder
from mocov3_hf.hub.remote_code import add_code
from tests.hub.conftest import save_run
from tests.hub.stand_in import TOKEN


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

UNIMPORTABLE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mocov3_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import mocov3_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mocov3_hf can be imported")
"""

WITHOUT_PACKAGE = """
import sys

import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, pipeline
)

pretraining, classifier, saved = sys.argv[1:4]
trust = {"trust_remote_code": True}
images = torch.load("images.pt")
config = AutoConfig.from_pretrained(pretraining, **trust)
assert (config.model_type, config.backbone_config.model_type) == ("mocov3", "mocov3_vit")
model = AutoModelForPreTraining.from_pretrained(pretraining, **trust).eval()
assert type(model).__name__ == "MoCoV3ForPreTraining", type(model)
frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
assert any(name.startswith("momentum_encoder.") for name in frozen), frozen
encoder = AutoModel.from_pretrained(pretraining, **trust).eval()
head, info = AutoModelForImageClassification.from_pretrained(classifier, output_loading_info=True, **trust)
assert not any(info.values()), info
fresh, info = AutoModelForImageClassification.from_pretrained(
    pretraining, num_labels=7, output_loading_info=True, **trust
)
assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"], info
with torch.no_grad():
    results = {
        "loss": model(pixel_values=images, pixel_values_2=images.flip(0)).loss,
        "features": encoder(images).pooler_output,
        "logits": head.eval()(images).logits,
    }
extract = pipeline("image-feature-extraction", model=pretraining, pool=True, **trust)
classify = pipeline("image-classification", model=classifier, **trust)
image = Image.open("image.png")
results["extracted"] = torch.tensor(extract(image)[0])
results["labels"] = [row["label"] for row in classify(image)]
batch = classify([image, "image.png", image], batch_size=2)
assert [rows[0]["label"] for rows in batch] == [results["labels"][0]] * 3
encoder.save_pretrained(saved)
again = AutoModel.from_pretrained(saved, **trust).eval()
with torch.no_grad():
    torch.testing.assert_close(again(images).pooler_output, results["features"], rtol=0, atol=0)
assert not [name for name in sys.modules if name.split(".")[0] == "mocov3_hf"]
torch.save(results, "results.pt")
"""

WITH_PACKAGE = """
import sys

import mocov3_hf
import torch
from datasets import load_dataset
from transformers import AutoModelForImageClassification, AutoModelForPreTraining, pipeline

pretraining, classifier, url = sys.argv[1:4]
images = torch.load("images.pt")
model = AutoModelForPreTraining.from_pretrained(pretraining).eval()
assert type(model) is mocov3_hf.MoCoV3ForPreTraining
classify = pipeline("image-classification", model=classifier, revision="v2")
stream = load_dataset("someone/digits", split="train", streaming=True)
rows = list(stream)
assert [row["label"] for row in rows] == [0, 1, 2], rows
assert rows[0]["image"].size == (40, 40)
with torch.no_grad():
    loss = model(pixel_values=images, pixel_values_2=images.flip(0)).loss
answers = [classify(rows[0]["image"]), classify(f"{url}/someone/classifier/resolve/v2/plots/cat.png")]
torch.save({"loss": loss, "labels": [[row["label"] for row in answer] for answer in answers]}, "results.pt")
"""


def run(code, arguments, folder, **environment):
    (folder / "script.py").write_text(textwrap.dedent(code))
    env = {
        **os.environ,
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    command = [sys.executable, "script.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.fixture
def models(tmp_path):
    """The two kinds of models with their outputs here, and the images."""
    pretraining = save_run(tmp_path / "pretraining").eval()
    classifier = save_run(tmp_path / "classifier", classifier=True).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.manual_seed(1))
    torch.save(images, tmp_path / "images.pt")
    Image.radial_gradient("L").convert("RGB").resize((40, 40)).save(tmp_path / "image.png")
    with torch.no_grad():
        expected = {
            "loss": pretraining(pixel_values=images, pixel_values_2=images.flip(0)).loss,
            "features": pretraining.mocov3(images).pooler_output,
            "logits": classifier(images).logits,
        }
    return tmp_path, expected


@pytest.mark.slow
def test_code_of_a_folder_serves_every_class_without_the_package(models):
    folder, expected = models
    for name in ("pretraining", "classifier"):
        add_code(folder / name)
    arguments = [folder / "pretraining", folder / "classifier", folder / "saved"]
    results = run(UNIMPORTABLE + WITHOUT_PACKAGE, arguments, folder, HF_HUB_OFFLINE="1")
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=0, atol=1e-6)
    assert results["extracted"].shape == (32,)
    assert sorted(results["labels"]) == ["cat", "dog", "hen"]
    config = json.loads((folder / "saved" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].endswith("modeling_mocov3.MoCoV3Model")


@pytest.mark.slow
def test_pushed_code_serves_every_class_without_the_package(models, hub, api):
    folder, expected = models
    for name in ("pretraining", "classifier"):
        push_folder(folder / name, f"someone/{name}", api=api, private=True)
    arguments = ["someone/pretraining", "someone/classifier", folder / "saved"]
    results = run(UNIMPORTABLE + WITHOUT_PACKAGE, arguments, folder, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=0, atol=1e-6)


def parquet_of_images():
    import datasets

    rows = {
        "image": [Image.new("RGB", (40, 40), (value, 0, 0)) for value in (10, 100, 200)],
        "label": [0, 1, 2],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_pushed_models_load_with_the_package_and_data_streams(models, hub, api, monkeypatch, capsys):
    folder, expected = models
    Image.open(folder / "image.png").save(folder / "classifier" / "plots" / "cat.png")
    hub.add_dataset("someone/digits", {"data/train-00000-of-00001.parquet": parquet_of_images()})
    monkeypatch.setattr("mocov3_hf.hub.push.HfApi", lambda: api)
    main([str(folder / "pretraining"), "--hub_model_id", "pretraining"])
    main([str(folder / "classifier"), "--hub_model_id", "someone/classifier", "--hub_revision", "v2"])
    assert capsys.readouterr().out.count("/commit/") == 2
    arguments = ["someone/pretraining", "someone/classifier", hub.url]
    results = run(WITH_PACKAGE, arguments, folder, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    torch.testing.assert_close(results["loss"], expected["loss"], rtol=0, atol=1e-6)
    assert all(sorted(labels) == ["cat", "dog", "hen"] for labels in results["labels"])
    assert any("datasets/someone/digits/resolve" in request for request in hub.requests)


def test_code_is_only_added_to_own_models(tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.json is not a configuration of model type 'mocov3' or 'mocov3_vit'"
    ):
        add_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="save a MoCoV3 model to this folder first"):
        add_code(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
