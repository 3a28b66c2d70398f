"""Files: what is read, what is refused and how, and that a refused file leaves nothing behind."""

import argparse
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from mocov3_hf.interop import convert_checkpoint, convert_state_dict
from mocov3_hf.interop.convert import main, verify_folder
from mocov3_hf.interop.files import read_labels
from mocov3_hf.reporting import RunError
from tests.fork_server import Forked
from tests.interop.conftest import encoder_of, mmpretrain_classification, mmpretrain_pretraining, official


SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "convert_checkpoint.py"


def convert(*arguments):
    """The exit code of the command."""
    try:
        main([*map(str, arguments), "--num_attention_heads", "2"])
    except SystemExit as end:
        return end.code
    return 0


def test_official_file_becomes_a_folder_that_every_class_loads(official_file, tmp_path, capsys):
    folder = tmp_path / "models" / "tiny"
    assert convert(official_file, "--output_dir", folder) == 0
    printed = capsys.readouterr().out
    assert "layout official_pretraining -> MoCoV3ForPreTraining (pretrained, 300 epochs)" in printed
    assert "81,472 parameters" in printed
    assert "not converted: epoch, arch, optimizer" in printed
    report = json.loads((folder / "conversion.json").read_text())
    assert (report["stage"], report["epochs"], report["source"]["file"]) == ("pretrained", 300, official_file.name)
    assert sum(part["tensors"] for part in report["parts"]) == 118
    converted = convert_state_dict(official("vit"), num_attention_heads=2)
    loaded = AutoModelForPreTraining.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in converted.state_dict.items())
    encoder = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[f"mocov3.{key}"]) for key, value in encoder.items())
    processor = AutoImageProcessor.from_pretrained(folder)
    assert (dict(processor.size), dict(processor.crop_size)) == ({"shortest_edge": 37}, {"height": 32, "width": 32})
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_processor_loads_with_both_backends(official_file, tmp_path, backend):
    convert(official_file, "--output_dir", tmp_path / "tiny")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tiny", backend=backend)
    image = torch.randint(0, 256, (3, 50, 40), generator=torch.manual_seed(0), dtype=torch.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("form", ["pth", "legacy", "safetensors", "deit", "half"])
def test_every_form_of_file_gives_the_same_model(form, tmp_path):
    encoder = encoder_of(official("vit"), "vit")
    if form == "half":
        encoder = {key: value.half() for key, value in encoder.items()}
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        save_file(encoder, path)
    elif form == "deit":
        torch.save({"model": encoder}, path)
    else:
        torch.save(encoder, path, _use_new_zipfile_serialization=form != "legacy")
    assert convert(path, "--output_dir", tmp_path / "out") == 0
    loaded = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    expected = convert_state_dict(encoder, num_attention_heads=2).state_dict
    assert {value.dtype for value in loaded.values()} == {torch.float16 if form == "half" else torch.float32}
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_mmpretrain_file_gives_epochs_labels_stage_and_normalization(tmp_path):
    state_dict = mmpretrain_pretraining("resnet")
    state_dict["data_preprocessor.mean"] = torch.full((3, 1, 1), 127.5)
    torch.save({"meta": {"epoch": 800, "cfg": "x = 1"}, "state_dict": state_dict}, tmp_path / "pre.pth")
    report = convert_checkpoint(tmp_path / "pre.pth", tmp_path / "pre", image_size=64)
    assert (report["epochs"], report["stage"], report["model"]) == (800, "pretrained", "MoCoV3ForPreTraining")
    assert report["ignored"] == ["momentum_encoder.steps", "data_preprocessor.mean", "data_preprocessor.std"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "pre")
    assert (*processor.image_mean, *processor.image_std) == (0.5, 0.5, 0.5, 0.229, 0.224, 0.225)

    meta = {"epoch": 90, "dataset_meta": {"classes": ["a", "b", "c", "d", "e"]}, "cfg": "frozen_stages = 4"}
    torch.save({"meta": meta, "state_dict": mmpretrain_classification("resnet")}, tmp_path / "lin.pth")
    report = convert_checkpoint(tmp_path / "lin.pth", tmp_path / "lin")
    assert (report["epochs"], report["stage"], report["labels"]) == (90, "linear", "checkpoint")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "lin").config
    assert config.id2label == {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    assert config.label2id["e"] == 4


def test_labels_come_from_a_file_and_must_fit(tmp_path, capsys):
    path = tmp_path / "classifier.pth"
    torch.save({"state_dict": mmpretrain_classification("vit")}, path)
    (tmp_path / "labels.txt").write_text("cat\ndog\nhen\nowl\npig\n")
    (tmp_path / "labels.json").write_text('{"1": "dog", "0": "cat", "2": "hen", "3": "owl", "4": "pig"}')
    for name in ("labels.txt", "labels.json"):
        assert convert(path, "--output_dir", tmp_path / name[7:], "--labels", tmp_path / name) == 0
        config = AutoModelForImageClassification.from_pretrained(tmp_path / name[7:]).config
        assert [config.id2label[index] for index in range(5)] == ["cat", "dog", "hen", "owl", "pig"]
    assert convert(path, "--output_dir", tmp_path / "no", "--labels", "imagenet-1k") == 2
    assert "1000 labels for a classification head of 5 classes" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    names = read_labels("imagenet-1k")
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet tissue")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def refused_files(folder):
    """Paths of files that no one should get a model from, with a pattern of the reason."""
    good = folder / "good.pth"
    torch.save({"state_dict": official("vit")}, good)
    torch.save({"state_dict": official("vit"), "args": Hostile()}, folder / "hostile.pth")
    torch.save({"state_dict": {}, "args": Hostile()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": official("vit"), "args": argparse.Namespace(lr=1)}, folder / "deit.pth")
    (folder / "truncated.pth").write_bytes(good.read_bytes()[:-3000])
    (folder / "text.pth").write_text("<html>not found</html>")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save([torch.ones(2)], folder / "list.pth")
    torch.save({"epoch": 3, "weights": official("vit")}, folder / "entries.pth")
    swapped = official("vit")
    for layer in ("0", "3"):
        a, b = f"predictor.{layer}.weight", f"base_encoder.head.{layer}.weight"
        swapped[a], swapped[b] = swapped[b], swapped[a]
    torch.save({"state_dict": swapped}, folder / "swapped.pth")
    return {
        "hostile.pth": "is refused: besides tensors it contains posix.system, which loading would execute",
        "old.pth": "is refused: besides tensors it contains posix.system",
        "deit.pth": "contains argparse.Namespace, which loading would execute. If you trust its origin",
        "truncated.pth": "is truncated: its zip archive has no end",
        "text.pth": "is not a checkpoint: it begins with b'<html>not found</html>'",
        "empty.pth": "is not a checkpoint: it begins with b''",
        "cut.safetensors": "cannot be read as a safetensors file",
        "list.pth": "holds a list, expected a dictionary of tensors",
        "entries.pth": "has no state dict; its entries are epoch, weights: pass the right one as --entry",
        "swapped.pth": "misshaped keys: .*predictor.0.weight",
        "missing.pth": "does not exist",
        ".": "is a folder, expected a file",
    }


def test_bad_files_are_refused_in_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, reason in refused_files(tmp_path).items():
        assert convert(tmp_path / name, "--output_dir", tmp_path / "out" / "model") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, name
        assert re.search(reason, error), f"{name}: {error}"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "hacked").exists()
    assert convert(tmp_path / "entries.pth", "--output_dir", tmp_path / "out", "--entry", "weights") == 0


@pytest.mark.slow
def test_script_shows_no_traceback(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    process = Forked([str(SCRIPT), str(tmp_path / "text.pth"), "--output_dir", str(tmp_path / "out")])
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith(f"error: {tmp_path}/text.pth is not a checkpoint: it begins with b'hello'")
    assert output.count("\n") == 1


def test_existing_folder_is_kept_unless_told(official_file, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    assert convert(official_file, "--output_dir", folder) == 0  # an empty one is taken
    (folder / "mine.txt").write_text("mine")
    assert convert("missing.pth", "--output_dir", folder) == 2  # noticed before any work
    error = capsys.readouterr().err
    assert "is not an empty folder: pass another --output_dir, or --overwrite_output_dir to replace a folder" in error
    assert (folder / "mine.txt").exists()
    assert convert(official_file, "--output_dir", folder, "--overwrite_output_dir") == 0
    assert not (folder / "mine.txt").exists()
    capsys.readouterr()
    assert convert(official_file, "--output_dir", folder, "--overwrite") == 0
    assert capsys.readouterr().err == "warning: --overwrite is deprecated: use --overwrite_output_dir\n"
    source = folder / official_file.name
    source.write_bytes(official_file.read_bytes())
    assert convert(source, "--output_dir", folder, "--overwrite_output_dir") == 2
    assert f"--overwrite_output_dir would delete {source}, which is read" in capsys.readouterr().err
    assert source.exists()
    (tmp_path / "file").write_text("mine")
    assert convert(official_file, "--output_dir", tmp_path / "file", "--overwrite_output_dir") == 2
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "file").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", official_file.name]


def test_failure_in_the_middle_leaves_nothing(official_file, tmp_path, monkeypatch):
    def fail(folder, model_class, expected):
        assert (folder / "model.safetensors").exists()
        raise RunError("the disk is gone")

    monkeypatch.setattr("mocov3_hf.interop.convert.verify_folder", fail)
    with pytest.raises(RunError, match="the disk is gone"):
        convert_checkpoint(official_file, tmp_path / "out", num_attention_heads=2)
    assert [path.name for path in tmp_path.iterdir()] == [official_file.name]


def test_verification_finds_a_changed_tensor(official_file, tmp_path):
    convert_checkpoint(official_file, tmp_path / "out", num_attention_heads=2)
    converted = convert_state_dict(official("vit"), num_attention_heads=2)
    verify_folder(tmp_path / "out", converted.model_class, converted.state_dict)
    changed = converted.state_dict | {"predictor.layers.0.dense.weight": torch.zeros(64, 16)}
    with pytest.raises(RunError, match="loads back differently: predictor"):
        verify_folder(tmp_path / "out", converted.model_class, changed)
