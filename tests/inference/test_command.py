"""The commands classify and extract from end to end, and their messages."""

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mocov3_cli import main
from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.inference.feature_files import read_feature_folder
from mocov3_hf.inference.files import opened


def run(command, *arguments):
    main([command, *map(str, arguments)])


def test_classify(vit, files, tmp_path):
    output = tmp_path / "labels.jsonl"
    folder = Path(files[0]).parent
    run("classify", "--model", vit, folder, "--output", output, "--device", "cpu", "--top_k", 2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == files
    assert [row["labels"] for row in rows] == ImageClassifier(vit, device="cpu")(files, top_k=2)


def test_a_failed_command_leaves_the_file_as_it_was(vit, files, tmp_path, capsys):
    output, broken = tmp_path / "labels.jsonl", tmp_path / "broken.png"
    output.write_text("earlier")
    broken.write_bytes(b"")
    with pytest.raises(SystemExit):
        run("classify", files[0], broken, "--model", vit, "--device", "cpu", "--batch_size", 1, "--output", output)
    assert "broken.png" in capsys.readouterr().err
    assert output.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "labels.jsonl"]


def test_labels_to_what_cannot_be_replaced(vit, files, tmp_path):
    """A link keeps its name, and a pipe is written to."""
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    run("classify", files[0], "--model", vit, "--device", "cpu", "--output", link)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run("classify", files[0], "--model", vit, "--device", "cpu", "--output", pipe)
    assert os.read(reader, 1 << 16) == target.read_bytes() != b""
    os.close(reader)
    assert link.is_symlink()
    assert pipe.is_fifo()


def test_the_file_of_the_standard_output_is_not_replaced(tmp_path):
    """As `--output /dev/stdout >> log`."""
    log, before = tmp_path / "log", os.dup(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
    try:
        with opened(str(log)) as file:
            assert file is sys.stdout
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_extract_features(vit, files, tmp_path):
    output, broken = tmp_path / "features.safetensors", tmp_path / "broken.png"
    broken.write_bytes(b"")
    arguments = ("--model", vit, files[0], broken, *files[1:], "--device", "cpu", "--batch_size", 2)
    run("extract", *arguments, "--on_bad_image", "skip", "--output", output)
    with safe_open(output, "pt") as file:
        names, features = json.loads(file.metadata()["images"]), file.get_tensor("features")
    assert names == files
    expected = FeatureExtractor(vit, device="cpu", batch_size=2)(files)
    assert features.shape == expected.shape
    assert (features - expected).abs().max() < 0.1  # other batches, in bfloat16 where the CPU has it


def test_archives(vit, files, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for path in files[:2]:
            tar.add(path, Path(path).name)
    run("extract", tmp_path / "some.tar", files[2], "--model", vit, "--device", "cpu", "--output_dir", tmp_path / "f")
    folder = read_feature_folder(tmp_path / "f")
    members = [f"{tmp_path}/some.tar/{Path(path).name}" for path in files[:2]]
    assert folder.index["image"].to_pylist() == [*members, files[2]]
    expected = FeatureExtractor(vit, device="cpu")(files[:3])
    torch.testing.assert_close(folder.features, expected)


def test_data_set(capsys, vit, files, tmp_path):
    folder = tmp_path / "test" / "some"
    folder.mkdir(parents=True)
    for path in files[:3]:
        (folder / Path(path).name).write_bytes(Path(path).read_bytes())
    run("classify", "--model", vit, "--dataset_name", tmp_path, "--split", "test", "--device", "cpu")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == ["test[0]", "test[1]", "test[2]"]
    assert [row["labels"] for row in rows] == ImageClassifier(vit, device="cpu")(files[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "--model", "{vit}", "no.jpg"], "image 'no.jpg' does not exist"),
        (["classify", "--model", "{tmp}/no", "{image}"], "no' does not exist: pass a folder"),
        (
            ["extract", "--model", "{vit}", "{image}", "--output", "{tmp}/no/f.safetensors"],
            "does not exist: create it first",
        ),
        (["extract", "--model", "{vit}", "{image}", "--output", "{tmp}"], "is a folder: pass a file"),
        (["extract", "--model", "{vit}", "{image}"], "--output_dir is missing"),
        (["extract", "--model", "{vit}", "{image}", "--output_dir", "{tmp}/.."], "--overwrite_output_dir to replace"),
        (["extract", "--model", "{vit}", "{image}", "--output_dir", "a", "--output", "b"], "not both"),
        (["extract", "--model", "{vit}", "a.parquet", "--output_dir", "a"], "is a table: pass it as --dataset_name"),
        (["extract", "--model", "{vit}", "--dataset_name", "{images}", "--output_dir", "a"], "as --test_split"),
        (["classify", "{image}"], "--model is missing"),
        (["classify", "--model", "{vit}"], "no images: pass files and folders, or --dataset_name"),
        (["classify", "--model", "{vit}", "{image}", "--dataset_name", "{tmp}"], "not both"),
        (["classify", "--model", "{vit}", "{image}", "--dtype", "int8"], "--dtype takes one of auto, float32"),
        (["classify", "--model", "{vit}", "{image}", "--top_k", "0"], "--top_k must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, vit, files, tmp_path, arguments, message):
    names = {"vit": vit, "tmp": tmp_path, "image": files[0], "images": Path(files[0]).parent}
    with pytest.raises(SystemExit) as ended:
        run(*(argument.format(**names) for argument in arguments))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_old_spellings_work_with_a_deprecation_line(capsys, vit, files, tmp_path):
    run("classify", files[0], "--model", vit, "--device", "cpu", "--num_workers", 0, "--output", tmp_path / "l.jsonl")
    assert "warning: --num_workers is deprecated: use --dataloader_num_workers" in capsys.readouterr().err
