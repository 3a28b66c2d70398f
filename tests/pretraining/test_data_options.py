"""The options of the data path, through whole runs."""

import json
import shutil

import pytest

from mocov3_hf.pretraining.pretrain import main
from tests.pretraining.test_run import read_metrics, without_times


def test_files_or_parquet_are_the_same_run(tmp_path, tiny, shards, fresh):
    main([*tiny, "--output_dir", str(tmp_path / "files")])
    fresh()
    main([*tiny, "--dataset_name", str(shards), "--output_dir", str(tmp_path / "parquet")])
    assert without_times(read_metrics(tmp_path / "files")) == without_times(read_metrics(tmp_path / "parquet"))


def test_a_cache_on_the_device_has_nearly_the_same_pixels(tmp_path, tiny, fresh):
    main([*tiny, "--output_dir", str(tmp_path / "decoded")])
    fresh()
    main([*tiny, "--cache_images_on_device", "--output_dir", str(tmp_path / "cached")])
    decoded, cached = read_metrics(tmp_path / "decoded"), read_metrics(tmp_path / "cached")
    # Some pixels differ by one level of 255, which batch normalization over 8 images amplifies.
    assert cached[0]["loss"] == pytest.approx(decoded[0]["loss"], rel=2e-2)


def test_steps_per_epoch_shortens_the_epochs(tmp_path, tiny):
    main([*tiny, "--steps_per_epoch", "2", "--output_dir", str(tmp_path)])
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [0.5, 1.0, 1.5, 2.0]


@pytest.fixture
def damaged(pictures, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(pictures, folder)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:100])
    return folder


def test_a_bad_image_is_replaced_and_listed(tmp_path, tiny, damaged):
    main([*tiny, "--dataset_name", str(damaged), "--max_bad_fraction", "0.1", "--output_dir", str(tmp_path / "run")])
    assert len(read_metrics(tmp_path / "run")) == 4
    (listed,) = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert listed["id"] == 3
    assert listed["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_bad_fraction", "0.01"], "1 of 24 images are bad, more than the allowed fraction of 0.01"),
        (["--max_bad_fraction", "0.5", "--on_bad_image", "stop"], "--on_bad_image skip"),
    ],
)
def test_bad_images_end_the_run_in_one_line(tmp_path, tiny, damaged, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--dataset_name", str(damaged), *options, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 1
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
