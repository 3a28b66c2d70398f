"""Exports: every format reproduces the model, loads with the other library alone, and is refused where it differs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)
from transformers.utils import logging

from mocov3_hf import MoCoV3Config, MoCoV3Model, MoCoV3ViTConfig
from mocov3_hf.interop import convert_checkpoint, convert_state_dict
from mocov3_hf.interop import export as export_module
from mocov3_hf.interop.export import export_model, largest_difference, main
from mocov3_hf.interop.export_timm import vit_arguments
from mocov3_hf.processing import build_image_processor
from mocov3_hf.reporting import RunError
from tests.factories import randomize, save_classifier
from tests.interop.conftest import (
    IMAGE_SIZES,
    OVERRIDES,
    mmpretrain_classification,
    official,
)
from tests.interop.test_onnx_metadata import assert_metadata_suffice


@pytest.fixture(scope="module", params=["vit", "resnet"])
def body(request):
    return request.param


@pytest.fixture(scope="module")
def folders(body, tmp_path_factory):
    """A pre-training model and a classifier with labels of this body."""
    root = tmp_path_factory.mktemp(body)
    torch.save(official(body), root / "pre.pth")
    convert_checkpoint(root / "pre.pth", root / "pre", **OVERRIDES[body])
    torch.save(mmpretrain_classification(body), root / "cls.pth")
    convert_checkpoint(root / "cls.pth", root / "cls", labels=["cat", "dog", "hen", "owl", "pig"], **OVERRIDES[body])
    return root


@pytest.fixture
def images(body):
    return torch.randn(4, 3, IMAGE_SIZES[body], IMAGE_SIZES[body], generator=torch.manual_seed(3))


@pytest.fixture
def features(folders, images):
    with torch.no_grad():
        return AutoModel.from_pretrained(folders / "pre")(images).pooler_output


@pytest.fixture
def logits(folders, images):
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folders / "cls")(images).logits


NATIVE = {"vit": (ViTModel, ViTForImageClassification), "resnet": (ResNetModel, ResNetForImageClassification)}


@pytest.mark.slow
@torch.no_grad()
def test_native_encoder_is_transformers_own(body, folders, images, features, tmp_path):
    exported = export_model(folders / "pre", tmp_path / "out", body)
    assert exported.max_error <= 1e-5
    model, info = NATIVE[body][0].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model(images).pooler_output.flatten(1), features, rtol=0, atol=1e-5)
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is NATIVE[body][0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert body == "resnet" or config["layer_norm_eps"] == 1e-6
    ours, theirs = (AutoImageProcessor.from_pretrained(path) for path in (folders / "pre", tmp_path / "out"))
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.slow
@torch.no_grad()
def test_native_classifier_keeps_labels(body, folders, images, logits, tmp_path):
    export_model(folders / "cls", tmp_path / "out", body)
    model, info = NATIVE[body][1].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model(images).logits, logits, rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "hen", 3: "owl", 4: "pig"}
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    results = [
        pipeline("image-classification", model=str(path))(to_image(pixels))
        for path in (folders / "cls", tmp_path / "out")
    ]
    assert [row["label"] for row in results[0]] == [row["label"] for row in results[1]]


def to_image(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


@pytest.mark.slow
@torch.no_grad()
def test_timm_takes_the_state_dict_and_the_folder(body, folders, images, features, logits, tmp_path):
    timm = pytest.importorskip("timm")
    for name, expected in {"pre": features, "cls": logits}.items():
        exported = export_model(folders / name, tmp_path / name, "timm")
        printed = eval(exported.usage, {"timm": timm}).eval()
        torch.testing.assert_close(printed(images), expected, rtol=0, atol=1e-5)
        whole = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        torch.testing.assert_close(whole(images), expected, rtol=0, atol=1e-5)
    settings = timm.data.resolve_data_config(whole.pretrained_cfg)
    size = IMAGE_SIZES[body]
    assert settings["input_size"] == (3, size, size)
    assert round(size / settings["crop_pct"]) == round(size * 256 / 224)
    assert json.loads((tmp_path / "cls" / "config.json").read_text())["label_names"][4] == "pig"


def test_timm_needs_twelve_heads_for_the_small_vit():
    small = MoCoV3ViTConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    assert vit_arguments(small) == ("vit_small_patch16_224", {"num_heads": 12})
    assert vit_arguments(MoCoV3ViTConfig()) == ("vit_base_patch16_224", {})
    large = MoCoV3ViTConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=24, image_size=384
    )
    assert vit_arguments(large) == ("vit_large_patch16_224", {"img_size": 384})
    large.image_size, large.patch_size = 224, 7
    assert vit_arguments(large) == ("vit_large_patch16_224", {"patch_size": 7})


# Which head a program ends in changes nothing about how it is traced: one kind for each body keeps this fast.
KINDS = {"vit": "cls", "resnet": "pre"}


@pytest.mark.slow
def test_onnx_runs_any_batch(body, folders, images, features, logits, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exported = export_model(folders / KINDS[body], tmp_path / "out", "onnx")
    assert exported.max_error <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    expected = logits if body == "vit" else features
    for batch in (images, images[:1]):
        (result,) = session.run([exported.outputs], {"pixel_values": batch.numpy()})
        np.testing.assert_allclose(result, expected[: len(batch)].numpy(), rtol=0, atol=1e-5)
    assert session.get_inputs()[0].shape[0] == "batch"
    if body == "vit":
        assert_metadata_suffice(session, folders / "cls")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out") is not None


@pytest.mark.slow
def test_torch_export_runs_any_batch(body, folders, images, features, logits, tmp_path):
    exported = export_model(folders / KINDS[body], tmp_path / "out", "torch_export")
    assert exported.max_error <= 1e-5
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    expected = logits if body == "vit" else features
    for batch in (images, images[:1]):
        torch.testing.assert_close(program(batch), expected[: len(batch)], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def vit_bn(tmp_path_factory):
    """A folder with a ViT-BN of patch size 7, and its outputs with statistics that are not the initial ones."""
    folder = tmp_path_factory.mktemp("vit_bn")
    config = MoCoV3ViTConfig(
        mlp_norm="batch_norm",
        patch_size=7,
        image_size=28,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = MoCoV3Model(MoCoV3Config(backbone_config=config)).eval()
    randomize(model)
    model.save_pretrained(folder)
    build_image_processor(28).save_pretrained(folder)
    images = torch.randn(4, 3, 28, 28, generator=torch.manual_seed(3))
    with torch.no_grad():
        return folder, images, model(images).pooler_output


def test_differences_of_a_regression_are_relative_to_each_target(tmp_path):
    folder = save_classifier(tmp_path, names=["seconds", "meters"], problem_type="regression")
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(torch.tensor([[1e5], [1e-5]]))
        model.classifier.bias.copy_(torch.tensor([1e9, 1e-3]))

    def changed(factors):
        return lambda images: model(images).logits * torch.tensor(factors)

    assert largest_difference(model, changed([1 + 2e-7, 1.0]), (3, 32, 32)) < export_module.MAX_ERROR
    assert largest_difference(model, changed([1.0, 1.01]), (3, 32, 32)) > export_module.MAX_ERROR
    model.config.problem_type = None  # of classes, whose logits have no units, absolute as ever
    assert largest_difference(model, changed([1 + 2e-7, 1.0]), (3, 32, 32)) > 10


@pytest.mark.slow
def test_onnx_of_a_vit_bn_uses_the_running_statistics(vit_bn, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, images, expected = vit_bn
    assert export_model(folder, tmp_path / "out", "onnx").max_error <= 1e-5  # which begins as torch_export
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for batch in (images, images[:1]):
        (result,) = session.run(None, {"pixel_values": batch.numpy()})
        np.testing.assert_allclose(result, expected[: len(batch)].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["vit", "timm"])
def test_a_vit_bn_has_no_other_class(vit_bn, format, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(vit_bn[0]), "--format", format, "--output_dir", str(tmp_path / "out")])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: --format {format} has no batch normalization in a ViT (mlp_norm): pass --format onnx or --format"
        " torch_export\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_refused(folders, body, tmp_path, monkeypatch):
    write = export_module.WRITERS[body]

    def write_badly(*arguments):
        run, usage = write(*arguments)
        return (lambda images: run(images) + 2e-4), usage

    monkeypatch.setitem(export_module.WRITERS, body, write_badly)
    with pytest.raises(RunError, match=r"is not written: its outputs differ from the model's by 2\.0.e-04"):
        export_model(folders / "pre", tmp_path / "out", body)
    assert not list(tmp_path.iterdir())


def test_wrong_eps_or_heads_would_be_seen(tmp_path, monkeypatch):
    convert_state_dict(official("vit"), num_attention_heads=2).build_model().save_pretrained(tmp_path / "pre")

    def config_of(**values):
        return ViTConfig(**values | {"num_attention_heads": 4})

    monkeypatch.setattr("mocov3_hf.interop.export_native.ViTConfig", config_of)
    with pytest.raises(RunError, match="outputs differ from the model's by"):
        export_model(tmp_path / "pre", tmp_path / "out", "vit")


def test_command_reports_what_cannot_be_exported(folders, body, tmp_path, capsys):
    other = {"vit": "resnet", "resnet": "vit"}[body]
    stem = MoCoV3Config(
        backbone_config=MoCoV3ViTConfig(
            stem="conv",
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
        )
    )
    MoCoV3Model(stem).save_pretrained(tmp_path / "stem")
    dino = MoCoV3Config(
        backbone_config={
            "model_type": "dinov2",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
    )
    MoCoV3Model(dino).save_pretrained(tmp_path / "dino")
    (tmp_path / "vit").mkdir()
    ViTConfig().save_pretrained(tmp_path / "vit")
    capsys.readouterr()
    for path, format, message in [
        (folders / "pre", other, f"--format {other} is for a {other} backbone, but this model has a {body}"),
        (tmp_path / "stem", "vit", "has no convolutional stem: pass --format onnx or --format torch_export"),
        (tmp_path / "stem", "timm", "has no convolutional stem"),
        (tmp_path / "dino", "timm", "the backbone is a 'dinov2', which other codebases have no names for"),
        (tmp_path / "vit", "vit", "is a model of type 'vit', expected 'mocov3'"),
        (tmp_path, "vit", "holds no model (no config.json)"),
        (tmp_path / "none", "vit", "does not exist"),
    ]:
        with pytest.raises(SystemExit) as end:
            main([str(path), "--format", format, "--output_dir", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_prints_the_error_and_the_use(folders, body, tmp_path, capsys):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    main(["--model", str(folders / "cls"), "--format", body, "--output_dir", str(tmp_path / "out")])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    printed = capsys.readouterr().out
    assert "max error of logits " in printed
    assert f"{NATIVE[body][1].__name__}.from_pretrained('{tmp_path / 'out'}')" in printed
    assert Path(tmp_path / "out" / "preprocessor_config.json").is_file()


def test_a_missing_package_is_a_mistake(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="2"):
        main([str(folders / "pre"), "--format", "onnx", "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err == 'error: --format onnx needs onnxscript: pip install "mocov3_hf[export]"\n'


def test_existing_folder_is_kept_unless_told(folders, body, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    command = [str(folders / "cls"), "--format", body, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "--overwrite_output_dir to replace a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--overwrite_output_dir"])
    assert "was not written by this command (no config.json in it)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "config.json").touch()
    main([*command, "--overwrite"])
    assert "--overwrite is deprecated: use --overwrite_output_dir" in capsys.readouterr().err
    assert not (tmp_path / "mine.txt").exists()


def test_a_folder_without_processor_is_exported_with_the_default_one(folders, body, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folders / "cls")
    model.save_pretrained(tmp_path / "bare")
    export_model(tmp_path / "bare", tmp_path / "out", body)
    crop = AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size
    assert crop["height"] == {"vit": 32, "resnet": 224}[body]


@pytest.mark.parametrize("format", ["vit", "timm"])
def test_vit_formats_refuse_the_mean_of_patches(format, tmp_path):
    backbone = MoCoV3ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    MoCoV3Model(MoCoV3Config(backbone_config=backbone, pooling="mean")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="pooled by the mean of its patches: pass --format onnx or"):
        export_model(tmp_path / "model", tmp_path / "out", format)
