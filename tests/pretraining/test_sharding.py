"""Weights that FSDP2 spreads over two processes: the step, the run and its checkpoints are those of whole ones."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3Model
from mocov3_hf.pretraining.acceleration import choose_acceleration
from mocov3_hf.pretraining.build import build_config
from mocov3_hf.pretraining.dry_run import describe
from mocov3_hf.pretraining.loop import main
from mocov3_hf.pretraining.sharding import unit_parameters, units
from mocov3_hf.recipe import RecipeError, load_recipe
from tests.launch import ROOT, torchrun
from tests.pretraining.test_resume import assert_same_run
from tests.pretraining.test_run import read_metrics


WORKER = Path(__file__).parent / "sharding_worker.py"


@pytest.mark.slow
def test_spread_weights_take_the_step_of_whole_ones(tmp_path):
    torchrun(2, WORKER, str(tmp_path / "results"))
    results = torch.load(tmp_path / "results", weights_only=True)
    actual, expected = results["actual"], results["expected"]
    scale = max(gradient.abs().max() for gradient in expected["gradients"].values()).item()
    for name, values in expected.items():
        atol = 1e-10 * scale if name == "gradients" else 1e-10
        torch.testing.assert_close(
            actual[name], values, rtol=1e-8, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )
    for name in ("adamw", "lars"):
        moved, refused = actual[name], actual[f"{name}, step refused"]
        assert all(torch.equal(moved[key], refused[key]) for key in moved)
    # Each of these has moved something, so that there was something to compare.
    before = expected["momentum encoder before"]
    assert not all(torch.equal(value, expected["momentum encoder"][key]) for key, value in before.items())
    assert not all(torch.equal(value, expected["lars"][key]) for key, value in expected["adamw"].items())


SCRIPT = ROOT / "scripts" / "pretrain.py"
LENGTH = ["--max_steps", "6", "--save_steps", "4", "--logging_steps", "2"]


@pytest.fixture(scope="module")
def run_of_parts(tmp_path_factory, tiny, labelled):
    """Six steps on two processes that share the weights, and the arguments of the run."""
    images = ["--dataset_name", str(labelled), "--knn_steps", "3", "--knn_k", "3"]
    memory = ["--fsdp", "true", "--gradient_checkpointing", "true"]
    arguments = [*tiny, *LENGTH, *images, "--mixed_precision", "bf16", "--max_grad_norm", "1.0", *memory]
    folder = tmp_path_factory.mktemp("parts")
    torchrun(2, SCRIPT, *arguments, "--output_dir", str(folder))
    return folder, arguments


@pytest.mark.slow
def test_a_run_on_parts_is_that_on_copies(tmp_path, run_of_parts):
    folder, arguments = run_of_parts
    torchrun(2, SCRIPT, *arguments, "--fsdp", "false", "--output_dir", str(tmp_path))
    # Two shares add up to the same sum in either order.
    for file in ("model.safetensors", "checkpoint-6/optimizer.safetensors"):
        parts, copies = load_file(folder / file), load_file(tmp_path / file)
        assert parts.keys() == copies.keys()
        for key, value in copies.items():
            torch.testing.assert_close(
                parts[key], value, rtol=1e-4, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
            )
    for parts, copies in zip(read_metrics(folder), read_metrics(tmp_path), strict=True):
        for name in ("loss", "grad_norm", "first_layer_grad_max", "last_layer_grad_max"):
            assert parts[name] == pytest.approx(copies[name], rel=1e-5), name
        assert parts["block_grad_norms"] == pytest.approx(copies["block_grad_norms"], rel=1e-4, abs=1e-6)
    assert (folder / "knn.jsonl").read_text() == (tmp_path / "knn.jsonl").read_text()
    assert MoCoV3Model.from_pretrained(folder).config.architectures == ["MoCoV3ForPreTraining"]


@pytest.mark.slow
def test_a_checkpoint_of_parts_continues_to_the_same_bits(tmp_path, run_of_parts):
    folder, arguments = run_of_parts
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
    torchrun(2, SCRIPT, *arguments, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto")
    assert_same_run(tmp_path, folder)


def test_a_checkpoint_of_parts_continues_on_one_process(tmp_path, run_of_parts):
    folder, arguments = run_of_parts
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    main([*arguments, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"])
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 6
    assert line["loss"] == pytest.approx(read_metrics(folder)[-1]["loss"], rel=1e-2)


def test_what_cannot_be_spread_is_refused():
    refused = {
        ("--mixed_precision", "fp16"): "--fsdp true has no gradient scaler",
        ("--channels_last", "true"): "--channels_last true: --fsdp true gathers weights",
        ("--torch_compile", "true"): "--torch_compile true: encoders are compiled as a whole",
    }
    recipe = load_recipe("quickstart", [])
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(build_config(recipe))
    for options, message in refused.items():
        recipe = load_recipe("quickstart", ["--fsdp", "true", *options])
        with pytest.raises(RecipeError, match=message):
            choose_acceleration(recipe, model, torch.device("cpu"), num_processes=2)
        if "fp16" not in options:  # alone, a process has nothing to spread and nothing to refuse
            assert not choose_acceleration(recipe, model, torch.device("cpu"), num_processes=1).fsdp
    recipe = load_recipe("quickstart", ["--fsdp", "true"])
    assert "fsdp" in choose_acceleration(recipe, model, torch.device("cpu"), num_processes=2).describe()


def test_units_hold_every_parameter_once():
    """Where blocks are inside of blocks (ConvNeXt), too."""
    for backbone in (
        {"model_type": "convnext", "depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {
            "model_type": "mocov3_vit",
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "stem": "conv",
        },
    ):
        with torch.device("meta"):
            model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, head_hidden_size=8, projection_dim=8))
        held = [parameter for _, parameters in unit_parameters(model, model) for parameter in parameters]
        assert len(held) == len(set(held)) == len(list(model.parameters())), backbone["model_type"]
        order = units(model)
        for index, outer in enumerate(order):
            assert not set(outer.modules()) & set(order[index + 1 :]), "inner units come first"


@pytest.mark.slow
def test_the_plan_of_parts(monkeypatch):
    """Weights, gradients and AdamW's two moments of ViT-L on 64 processes, with what two units take meanwhile."""
    monkeypatch.setenv("WORLD_SIZE", "64")
    name = "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k"
    lines = describe(load_recipe(name, ["--fsdp", "true", "--num_train_images", "1281167"])).splitlines()
    (memory,) = (line for line in lines if line.startswith("estimated memory per"))
    states = 652_781_568 + 3 * 326_454_272
    head = (
        1024 * 4096 + 4096 * 4096 + 4096 * 256 + 4 * 4096
    )  # the projector, larger than a block; its last norm has no scale
    expected = 4 * (states / 64 + 3 * head) / 2**30
    assert f"({expected:.1f} weights, gradients and optimizer" in memory
    (exchanged,) = (line for line in lines if line.startswith("communication per step"))
    assert " weights, " in exchanged
