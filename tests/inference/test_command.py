"""The two scripts from end to end, and their messages."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from mocov3_hf.inference import FeatureExtractor, ImageClassifier


SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def test_classify(monkeypatch, vit, files, tmp_path):
    output = tmp_path / "labels.jsonl"
    folder = Path(files[0]).parent
    run(monkeypatch, "classify", "--model", vit, folder, "--output", output, "--device", "cpu", "--top_k", 2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == files
    assert [row["labels"] for row in rows] == ImageClassifier(vit, device="cpu")(files, top_k=2)


def test_extract_features(monkeypatch, vit, files, tmp_path):
    output, broken = tmp_path / "features.safetensors", tmp_path / "broken.png"
    broken.write_bytes(b"")
    arguments = ("--model", vit, files[0], broken, *files[1:], "--device", "cpu", "--batch_size", 2)
    run(monkeypatch, "extract_features", *arguments, "--bad_images", "skip", "--output", output)
    with safe_open(output, "pt") as file:
        names, features = json.loads(file.metadata()["images"]), file.get_tensor("features")
    assert names == files
    expected = FeatureExtractor(vit, device="cpu", batch_size=2)(files)
    assert features.shape == expected.shape
    assert (features - expected).abs().max() < 0.1  # other batches, in bfloat16 where the CPU has it


def test_data_set(monkeypatch, capsys, vit, files, tmp_path):
    folder = tmp_path / "test" / "some"
    folder.mkdir(parents=True)
    for path in files[:3]:
        (folder / Path(path).name).write_bytes(Path(path).read_bytes())
    run(monkeypatch, "classify", "--model", vit, "--dataset_name", tmp_path, "--split", "test", "--device", "cpu")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == ["test[0]", "test[1]", "test[2]"]
    assert [row["labels"] for row in rows] == ImageClassifier(vit, device="cpu")(files[:3])


def test_mistakes_are_one_line(monkeypatch, vit, files, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: image 'no.jpg' does not exist$"):
        run(monkeypatch, "classify", "--model", vit, "no.jpg")
    with pytest.raises(SystemExit, match=r"^error: model .*is no folder"):
        run(monkeypatch, "classify", "--model", tmp_path / "no", files[0])
    with pytest.raises(SystemExit, match=r"^error: --output .*its folder does not exist"):
        run(monkeypatch, "extract_features", "--model", vit, files[0], "--output", tmp_path / "no" / "f.safetensors")
