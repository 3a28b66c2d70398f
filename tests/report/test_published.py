"""Published accuracies are shown for their own recipe and backbone, and nowhere else."""

import json

import pytest
import yaml

from mocov3_hf.report.measured import results_section
from mocov3_hf.report.published import SHAPING_OPTIONS, find_references, identity, reference_for
from mocov3_hf.run_folder import RENAMED_OPTIONS, read_run_folder
from tests.factories import save_recipe


SMALL = "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k"
LINEAR = "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k"


def result(task, metrics, **settings):
    return {"task": task, "metrics": metrics, "settings": settings, "dataset": {"name": "imagenet", "split": "val"}}


@pytest.fixture
def folder_of(tmp_path):
    """A folder that ran a recipe, with arguments over it."""

    def make(recipe, *arguments, results=(), batch=4096, config=None):
        if recipe is not None:
            save_recipe(tmp_path, recipe, *arguments)
            (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
            state = {"run": {"step": 1, "global_batch_size": batch}}
            (tmp_path / "checkpoint-1" / "state.json").write_text(json.dumps(state))
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "results.json").write_text(json.dumps({"format": 1, "results": list(results)}))
        return read_run_folder(tmp_path)

    return make


def own(folder):
    return [(entry.name, entry.top1) for entry, is_same_recipe in find_references(folder) if is_same_recipe]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (SMALL, [(LINEAR, 73.6)]),
        (
            "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k",
            [
                ("vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k", 76.9),
                ("vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k", 83.0),
            ],
        ),
        *(
            (
                f"mocov3_resnet50_8xb512-amp-coslr-{epochs}e_in1k",
                [(f"resnet50_mocov3-{epochs}e-pre_8xb128-linear-coslr-90e_in1k", top1)],
            )
            for epochs, top1 in ((100, 69.6), (300, 72.8), (800, 74.4))
        ),
        (
            "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k",
            [("vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k", 83.7)],
        ),
    ],
)
def test_a_published_recipe_finds_its_own_accuracies(recipe, expected, folder_of):
    assert own(folder_of(recipe)) == expected


@pytest.mark.parametrize(
    "changed",
    [["--base_learning_rate", "3e-4"], ["--num_train_epochs", "100"], ["--temperature", "0.1"], ["--hue", "0.2"]],
)
def test_another_recipe_with_the_same_backbone_is_distinguished(changed, folder_of):
    folder = folder_of(SMALL, *changed)
    assert own(folder) == []
    assert {entry.top1 for entry, _ in find_references(folder)} == {73.6, 73.2}


@pytest.mark.slow
@pytest.mark.parametrize("key", SHAPING_OPTIONS)
def test_every_option_that_shapes_the_weights_distinguishes(key, folder_of, tmp_path):
    folder_of(SMALL)
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    current = {RENAMED_OPTIONS.get(name, name): value for name, value in written.items()}
    assert key in current  # an option of today
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(current | {key: "another value"}))
    assert own(read_run_folder(tmp_path)) == []


def test_another_batch_is_another_recipe(folder_of):
    assert own(folder_of(SMALL, batch=1024)) == []


def test_six_heads_are_another_backbone(folder_of):
    assert find_references(folder_of(SMALL, "--backbone_config", '{"num_attention_heads": 6}')) == []
    assert find_references(folder_of("quickstart")) == []


@pytest.mark.parametrize("change", ['{"mlp_norm": "batch_norm"}', '{"patch_size": 7}'])
def test_a_vit_bn_and_small_patches_are_another_backbone(change, folder_of):
    assert find_references(folder_of(SMALL, "--backbone_config", change)) == []


@pytest.mark.parametrize(
    "backbone",
    [None, [], {"model_type": []}, {"model_type": "nothing"}, {"model_type": "mocov3_vit", "hidden_size": "wide"}],
)
def test_an_invalid_backbone_has_no_identity(backbone):
    assert identity(backbone) is None


def test_an_accuracy_is_compared_with_top1_of_its_protocol_only(folder_of):
    rows = [
        result("linear", {"linear_top1": 0.7, "linear_top5": 0.9}, recipe=LINEAR),
        result("knn", {"knn20_top1": 0.6}),
        result("finetune", {"finetune_top1": 0.8}),
    ]
    folder = folder_of(SMALL, results=rows)
    references = find_references(folder)
    assert reference_for(rows[0], "linear_top1", references, "pretraining").entry.top1 == 73.6
    assert reference_for(rows[0], "linear_top5", references, "pretraining") is None
    assert reference_for(rows[1], "knn20_top1", references, "pretraining") is None
    assert reference_for(rows[2], "finetune_top1", references, "pretraining") is None  # none was published for ViT-S
    table, published = results_section(folder).parts
    assert table.columns == ["metric", "measured", "top-5", "published, ImageNet-1k"]
    assert table.rows[1] == ["top-1", "70.00 %", "90.00 %", "73.60 %"]
    assert [row[0] for row in published.rows] == ["73.60 %", "73.20 %"]
    assert [row[4] for row in published.rows] == ["recipe and backbone", "backbone"]


def test_a_converted_classifier_is_compared_with_its_source(folder_of, tmp_path):
    backbone = {"model_type": "mocov3_vit", "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    config = {"architectures": ["MoCoV3ForImageClassification"], "backbone_config": backbone}
    (tmp_path / "conversion.json").write_text(json.dumps({"source": {"name": "official_linear-vit-s-300ep"}}))
    rows = [result("evaluate", {"top1": 0.73})]
    folder = folder_of(None, results=rows, config=config)
    references = find_references(folder)
    assert reference_for(rows[0], "top1", references, "classifier").entry.top1 == 73.2
    assert reference_for(rows[0], "top1", references, "encoder") is None


def test_without_results_the_page_names_the_command(folder_of):
    (text,) = results_section(folder_of("quickstart")).parts
    assert text.command.startswith("mocov3 knn --model ")
