"""The model cards: up to date, true, and with snippets that run."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from mocov3_hf import (
    MoCoV3Config,
    MoCoV3ForImageClassification,
    MoCoV3ForPreTraining,
    MoCoV3Model,
    MoCoV3ViTConfig,
)
from mocov3_hf.hub.cards import FEATURE_WIDTHS, carded_models, main
from mocov3_hf.hub.run_card import run_card
from mocov3_hf.pretraining.estimate import multiply_adds
from mocov3_hf.processing import build_image_processor
from mocov3_hf.recipe_files import RECIPES
from mocov3_hf.results import append_result
from mocov3_hf.run_folder import read_run_folder
from mocov3_hf.zoo import VIT_SIZES, load_zoo
from tests.factories import save_classifier
from tests.hub.conftest import tiny_config


CARDS = Path(__file__).parent.parent.parent / "model_cards"


def test_cards_are_up_to_date(tmp_path, capsys):
    main(["--output_dir", str(tmp_path)])
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in CARDS.iterdir()}, (
        "run `python -m mocov3_hf.hub.cards --output_dir model_cards`"
    )
    assert len(written) == 14


def configuration(model):
    labels = {"num_labels": 1000} if model.is_classifier else {}
    if model.architecture == "resnet50":
        heads = {"num_projector_layers": 2, "predictor_final_norm": False, "temperature": 1.0}
        return MoCoV3Config(backbone_config={"model_type": "resnet"}, **heads, **labels)
    return MoCoV3Config(backbone_config=MoCoV3ViTConfig(**VIT_SIZES[model.architecture]), **labels)


@pytest.mark.slow
@pytest.mark.parametrize("name", load_zoo())
def test_parameters_and_operations_are_what_our_code_counts(name):
    model = load_zoo()[name]
    with torch.device("meta"):
        whole = (MoCoV3ForImageClassification if model.is_classifier else MoCoV3ForPreTraining)(configuration(model))
        encoder = MoCoV3Model(configuration(model))
        operations = multiply_adds(encoder, torch.zeros(1, 3, 224, 224))
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    assert round(parameters / 1e6, 2) == model.params_m
    assert round(operations / 1e9, 2) == model.gflops
    assert encoder.pooled_width == FEATURE_WIDTHS[model.architecture]


@pytest.mark.parametrize("model", carded_models(), ids=lambda model: model.name)
def test_card_states_recipe_accuracy_and_metadata(model):
    text = (CARDS / f"{model.name}.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]
    expected = "image-classification" if model.is_classifier else "image-feature-extraction"
    assert card.data.pipeline_tag == expected
    assert f"\nmocov3 convert {model.name} --output_dir models/{model.name}\n" in text
    assert model.url in text
    assert "not re-measured here" in text
    assert "@inproceedings{chen2021mocov3" in text
    assert f"{model.params_m:.2f} M parameters" in text
    if model.is_classifier:
        (result,) = card.data.eval_results
        assert (result.metric_value, result.dataset_type) == (model.top1, "ILSVRC/imagenet-1k")
    else:
        recipe = yaml.safe_load((RECIPES / f"{model.name}.yaml").read_text())
        stated = model.recipe
        assert recipe["num_train_epochs"] == model.epochs
        assert recipe["temperature"] == stated["temperature"]
        assert recipe["weight_decay"] == stated["weight_decay"]
        assert recipe.get("ema_decay", recipe.get("momentum", 0.99)) == stated["ema_decay"]
        assert f"`accelerate launch -m mocov3_hf pretrain --recipe {model.name}`" in text
        assert recipe["base_learning_rate"] * stated["batch_size"] / 256 == pytest.approx(stated["learning_rate"])
    for link in re.findall(r"\]\(([\w.-]+\.md)\)", text):
        assert (CARDS / link).is_file()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A tiny model for every architecture and kind that the zoo has, as a conversion leaves it."""
    root = tmp_path_factory.mktemp("stand_ins")
    torch.manual_seed(0)
    resnet = {
        "backbone_config": {
            "model_type": "resnet",
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 32, 64],
            "embedding_size": 8,
        }
    }
    heads = {"head_hidden_size": 64, "projection_dim": 16, "num_projector_layers": 2, "predictor_final_norm": False}
    for body in ("resnet", "vit"):
        for classifier in (False, True):
            labels = {"num_labels": 1000} if classifier else {}
            config = MoCoV3Config(**resnet, **heads, **labels) if body == "resnet" else tiny_config(**labels)
            model_class = MoCoV3ForImageClassification if classifier else MoCoV3ForPreTraining
            folder = root / f"{body}-{classifier}"
            model_class(config).save_pretrained(folder)
            build_image_processor(32).save_pretrained(folder)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("model", carded_models(), ids=lambda model: model.name)
def test_snippets_of_the_card_run(model, stand_ins, tmp_path, monkeypatch):
    body = model.architecture.split("-")[0].removesuffix("50")
    asked = []

    def fetch(name):
        asked.append(name)
        return str(stand_ins / f"{body}-{model.is_classifier}")

    monkeypatch.setattr("mocov3_hf.zoo.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), (90, 10, 200)).save("image.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (CARDS / f"{model.name}.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    seen = {}
    for snippet in snippets:
        exec(snippet, scope := {})
        seen |= {name: scope[name] for name in ("features", "probabilities", "loss", "classify") if name in scope}
    assert asked == [model.name] * 3
    assert seen.keys() == ({"features", "probabilities", "classify"} if model.is_classifier else {"features", "loss"})
    if model.is_classifier:
        assert seen["probabilities"].shape == (1, 1000)
    else:
        assert torch.isfinite(seen["loss"])


@pytest.mark.parametrize(
    ("problem_type", "metrics", "kinds", "rows", "code"),
    [
        (
            "regression",
            {"linear_r2": 0.75, "linear_mae": 12.3456},
            ["r_squared", "mae"],
            ["| R² (linear) | 0.75 |", "| Mean absolute error (linear) | 12.35 |"],
            "scores are the values of the targets",
        ),
        (
            "multi_label_classification",
            {"linear_map": 0.75, "linear_micro_f1": 0.5},
            ["mean_average_precision", "f1"],
            ["| Mean average precision (linear) | 75.00 |", "| Micro F1 (linear) | 50.00 |"],
            "the probability of each class on its own",
        ),
    ],
)
def test_metrics_of_other_problems(problem_type, metrics, kinds, rows, code, tmp_path):
    save_classifier(tmp_path, names=["age", "size"], problem_type=problem_type)
    dataset = {"name": "someone/pets", "split": "test", "problem_type": problem_type}
    append_result(tmp_path, task="linear", dataset=dataset, metrics=metrics, settings={}, seconds=1.0)
    _, front, body = run_card(read_run_folder(tmp_path), "someone/pets-model").split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["metrics"] == kinds
    words = {"regression": "regression", "multi_label_classification": "multi-label"}[problem_type]
    assert metadata["model-index"][0]["results"][0]["task"]["name"] == f"linear probe, {words}"
    assert all(row in body for row in rows)
    assert code in body
    assert "accuracy" not in body.lower()
