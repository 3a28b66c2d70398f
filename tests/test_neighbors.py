"""`mocov3 extract` and `mocov3 neighbors`: what is on disk, planted copies and outliers, and the page."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mocov3_hf
from mocov3_cli import main
from mocov3_hf import curation
from mocov3_hf.inference import FeatureExtractor
from mocov3_hf.inference.feature_files import FeatureWriter, read_feature_folder
from mocov3_hf.inference.images import PreparedImage
from mocov3_hf.metrics.search import choose_backend, duplicate_groups, nearest_others, outlier_scores, search
from tests.factories import save_classifier, save_labeled, smooth
from tests.report.browser import Browser, find_chromium


COPIES = ["copy_exact.png", "copy_jpeg.jpg", "copy_small.png", "copy_crop.png"]
OUTLIERS = ["z_black.png", "z_grid.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model"), "resnet")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 different images, four copies of one, two of another kind, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        Image.fromarray(smooth(60 + number % 5, 80, number)).save(folder / f"{number:02}.png")
    original = Image.open(folder / "07.png")
    original.save(folder / COPIES[0], compress_level=1)
    original.save(folder / COPIES[1], quality=80)
    original.resize((60, 47)).save(folder / COPIES[2])
    original.crop((1, 1, 79, 61)).save(folder / COPIES[3])
    Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / OUTLIERS[0])
    grid = np.indices((64, 64)).sum(axis=0) % 16 < 8
    Image.fromarray((grid[..., None] * np.array([255, 0, 255])).astype(np.uint8)).save(folder / OUTLIERS[1])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


@pytest.fixture(scope="module")
def found(model, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("found") / "out"
    arguments = ["--model", model, "--output_dir", str(output), "--dtype", "float32", "--device", "cpu", "--k", "5"]
    main(["neighbors", str(photos), *arguments, "--on_bad_image", "skip", "--query", str(photos / "07.png")])
    return output


def names(images):
    return [Path(image).name for image in images]


def test_planted_copies_are_one_group(found):
    duplicates = pd.read_csv(found / "duplicates.csv")
    assert sorted(names(duplicates["image"])) == sorted([*COPIES, "07.png"])
    assert set(duplicates["group"]) == {1}
    assert duplicates["similarity"].min() > 0.999
    summary = json.loads((found / "summary.json").read_text())
    assert (summary["images"], summary["bad_images"], summary["groups"]) == (30, 1, 1)
    assert 0.9 < summary["threshold"] < 1
    assert "copies of 29 images reach it" in summary["threshold_chosen"]


def test_planted_outliers_are_the_farthest(found):
    outliers = pd.read_csv(found / "outliers.csv")
    assert sorted(names(outliers["image"])[:2]) == sorted(OUTLIERS)
    assert (outliers["outlier_z"] > 3.5).sum() == 2
    assert json.loads((found / "summary.json").read_text())["outliers"] == 2
    assert outliers["outlier_score"].is_monotonic_decreasing


def test_a_query_finds_its_copies_and_not_itself(found):
    queries = pd.read_csv(found / "queries.csv")
    assert sorted(names(queries["image"])[:4]) == sorted(COPIES)
    assert list(queries["rank"]) == [1, 2, 3, 4, 5]
    assert set(names(queries["query"])) == {"07.png"}


def test_the_table_of_all_images(found):
    folder, table = read_feature_folder(found / "features"), pq.read_table(found / "images.parquet").to_pandas()
    unit = torch.nn.functional.normalize(folder.features.double(), dim=1)
    similarities = unit @ unit.T
    similarities.fill_diagonal_(-2)
    expected = similarities.topk(5).values
    np.testing.assert_allclose(np.stack(table["similarities"]), expected, atol=1e-5)
    rows = torch.tensor(np.stack(table["neighbors"]))
    torch.testing.assert_close(similarities.gather(1, rows), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(table["outlier_score"], 1 - expected.mean(dim=1), atol=1e-5)
    assert table["group"].notna().sum() == 5


def test_the_page_has_pictures_and_the_account(found):
    page = (found / "gallery.html").read_text(encoding="utf-8")
    for text in ("Near-duplicates", "Outliers", "Nearest images", "broken.jpg", "Could not be decoded: 1 image."):
        assert text in page
    assert page.count("<img src=") == 5 + 24 + 6  # group, outliers, query and its neighbors
    assert "cannot be read" not in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on the PATH to open the page in")
def test_the_page_in_a_browser(found):
    with Browser() as browser:
        for width in (390, 1400):
            browser.show(width)
            browser.open((found / "gallery.html").as_uri())
            assert browser.complaints == []
            assert browser.run("document.documentElement.scrollWidth") <= width
            ends = "[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right)"
            assert max(browser.run(ends)) <= width + 1
            assert min(browser.run("[...document.images].map(i => i.naturalWidth)")) > 0
            assert browser.run("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_extracted_features_on_disk(found, model, photos):
    folder = read_feature_folder(found / "features")
    assert [image["image"] for image in folder.bad_images] == [str(photos / "broken.jpg")]
    assert (folder.info["rows"], folder.info["width"], folder.info["dtype"]) == (30, 32, "float32")
    assert folder.info["model"] == model
    assert folder.info["image_processor"]["crop_size"] == {"height": 32, "width": 32}
    table = folder.index.to_pydict()
    assert table["row"] == list(range(30))
    assert table["input"] == [number for number in range(31) if number != 24]  # broken.jpg
    expected = FeatureExtractor(model, dtype="float32", device="cpu")(table["image"])
    torch.testing.assert_close(folder.features, expected)


def test_from_python_with_features_and_with_data_in_memory(found, model, photos, tmp_path):
    again = mocov3_hf.neighbors(
        found / "features",
        output_dir=tmp_path / "a",
        query=Image.open(photos / "07.png"),
        threshold=0.9,
        gallery=False,
    )
    assert again.summary["threshold_chosen"] == "as passed"
    assert "07.png" in names(again.queries["image"])[:3]
    images = [Image.open(photos / name) for name in ["00.png", "01.png", "07.png", *COPIES]]
    options = {"dtype": "float32", "device": "cpu", "threshold": 0.999}
    memory = mocov3_hf.neighbors(images, model, tmp_path / "b", **options)
    assert list(memory.duplicates["image"]) == [f"train[{row}]" for row in range(2, 7)]
    assert "cannot be read" not in memory.gallery.read_text(encoding="utf-8")


def test_images_of_a_command_are_not_overwritten(model, photos, tmp_path, capsys):
    (tmp_path / "00.png").write_bytes((photos / "00.png").read_bytes())
    for mark in ("", "features.json"):
        if mark:
            (tmp_path / mark).touch()
        with pytest.raises(SystemExit, match="2"):
            main(["extract", str(tmp_path), "--model", model, "--output_dir", str(tmp_path), "--overwrite_output_dir"])
        assert "--overwrite_output_dir would delete" in capsys.readouterr().err
        assert (tmp_path / "00.png").exists()


def test_queries_of_a_call(found, photos, tmp_path):
    def ask(name, query, **options):
        options = {"threshold": 0.9, "gallery": False, "device": "cpu"} | options
        return mocov3_hf.neighbors(found / "features", output_dir=tmp_path / name, query=query, **options)

    (tmp_path / "asked").mkdir()
    for name in ("07.png", "03.png"):
        (tmp_path / "asked" / name).write_bytes((photos / name).read_bytes())
    folder = ask("a", str(tmp_path / "asked"))
    assert names(folder.queries["query"].unique()) == ["03.png", "07.png"]
    assert ask("b", None).summary["queries"] == 0
    skipped = ask("c", [photos / "broken.jpg"], on_bad_image="skip").summary
    assert (skipped["queries"], skipped["bad_queries"]) == (0, [str(photos / "broken.jpg")])
    assert not (tmp_path / "d").exists()
    for query in (photos / "broken.jpg", [b"text"], photos / "none.jpg"):
        with pytest.raises(ValueError, match=r"broken.jpg cannot be decoded|query image 0 cannot be|does not exist"):
            ask("d", query)
    assert not (tmp_path / "d").exists()
    (tmp_path / "b" / "gallery.html").write_text("of an earlier search")
    ask("b", None, overwrite_output_dir=True)
    assert not (tmp_path / "b" / "gallery.html").exists()


def test_copies_do_not_raise_the_threshold(model, photos, tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes((photos / "07.png").read_bytes())
    Image.open(photos / "07.png").save(tmp_path / "jpeg.jpg", quality=80)
    options = {"dtype": "float32", "device": "cpu", "gallery": False}
    alike = mocov3_hf.neighbors(tmp_path, model, tmp_path / "out", **options)
    assert alike.summary["near_duplicates"] == 7


def test_features_of_a_failed_search_are_kept(model, photos, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    images, output = [str(photos / f"0{number}.png") for number in range(3)], tmp_path / "out"
    rest = ["--output_dir", str(output), "--device", "cpu", "--no_gallery"]
    with monkeypatch.context() as patch:
        patch.setattr(curation, "write_tables", full)
        with pytest.raises(SystemExit):
            main(["neighbors", *images, "--model", model, *rest])
    kept, error = capsys.readouterr().err.strip().splitlines()[-2:]
    assert kept.startswith(f"warning: the features are in {output / 'features'}: pass it in place of the images")
    assert error == "error: [Errno 28] No space left on device"
    main(["neighbors", str(output / "features"), *rest, "--overwrite_output_dir"])
    assert "the features are in" not in capsys.readouterr().err
    assert json.loads((output / "summary.json").read_text())["images"] == 3
    monkeypatch.setattr(curation, "check_features", full)  # as for those of a model that has diverged
    with pytest.raises(SystemExit):
        main(["neighbors", *images, "--model", model, *rest, "--overwrite_output_dir"])
    assert "the features are in" not in capsys.readouterr().err


def test_features_with_nan_are_named(tmp_path):
    writer = FeatureWriter(tmp_path)
    writer.add([PreparedImage(name, torch.zeros(1)) for name in "ab"], torch.tensor([[1.0, 0.0], [np.nan, 1.0]]))
    writer.close({"image_processor": {}, "model": "", "weights_hash": "", "inputs": {}})
    with pytest.raises(ValueError, match=rf"1 of 2 rows of the features in '{tmp_path}' contain NaN"):
        mocov3_hf.neighbors(tmp_path, output_dir=tmp_path / "out", threshold=0.9)


def test_float16_in_shards_with_labels(model, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    save_labeled(tmp_path / "data")
    monkeypatch.setattr(FeatureWriter.__init__, "__defaults__", ("float32", 32 * 2 * 16))
    base = ["--dataset_name", str(tmp_path / "data"), "--model", model, "--device", "cpu", "--dtype", "float32"]
    main(["extract", *base, "--output_dir", str(tmp_path / "half"), "--output_dtype", "float16"])
    half = read_feature_folder(tmp_path / "half")
    assert [shard["rows"] for shard in half.info["shards"]] == [16, 16, 4]
    assert half.features.dtype == torch.float16
    assert half.index["label"].to_pylist()[:4] == half.index["label"].to_pylist()[3:7]
    assert half.index["image"].to_pylist() == [f"test[{row}]" for row in range(36)]
    main(["extract", *base, "--output", str(tmp_path / "old.safetensors")])
    old = load_file(tmp_path / "old.safetensors")["features"]
    torch.testing.assert_close(half.features.float(), old, atol=1e-2, rtol=1e-3)
    assert not torch.equal(half.features.float(), old)
    (tmp_path / "half" / "features-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"features-00001\.safetensors' cannot be read, extract them again"):
        _ = read_feature_folder(tmp_path / "half").features


def test_memory_of_the_writer_is_a_shard(tmp_path):
    writer = FeatureWriter(tmp_path, "float16", shard_bytes=1 << 14)
    most = 0
    for start in range(0, 2000, 50):
        batch = [PreparedImage(f"{start + place}.png", torch.zeros(1)) for place in range(50)]
        writer.add(batch, torch.full((50, 64), float(start)))
        most = max(most, sum(part.nbytes for part in writer._features), 128 * len(writer._columns["row"]))
    writer.close({})
    assert most < 1 << 14
    assert read_feature_folder(tmp_path).features[::50, 0].tolist() == list(range(0, 2000, 50))
    with pytest.raises(RuntimeError, match="do not fit float16"):
        FeatureWriter(tmp_path, "float16").add([PreparedImage("a", torch.zeros(1))], torch.full((1, 4), 1e6))


@pytest.mark.parametrize("backend", ["torch", "sklearn", "faiss"])
def test_backends_agree_with_the_whole_matrix(backend):
    pytest.importorskip(backend)
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(300, 24, generator=generator)
    bank[100:120] = bank[0]  # more equal rows than neighbors
    similarities, rows = nearest_others(bank, 7, backend=backend)
    unit = torch.nn.functional.normalize(bank.double(), dim=1)
    matrix = unit @ unit.T
    torch.testing.assert_close(matrix.gather(1, rows).float(), similarities, atol=2e-6, rtol=0)
    expected = matrix.fill_diagonal_(-2).topk(7).values
    torch.testing.assert_close(similarities.double(), expected, atol=2e-6, rtol=0)
    assert not (rows == torch.arange(300)[:, None]).any()
    found, where = search(bank[:3].half(), bank, 300, backend=backend)
    assert sorted(where[0].tolist()) == list(range(300))
    assert found.dtype == torch.float32


def test_the_backend_is_chosen_by_what_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "faiss" else None)
    assert choose_backend("auto", torch.device("cpu")) == "faiss"
    assert choose_backend("auto", torch.device("meta")) == "torch"
    with pytest.raises(ValueError, match="'sklearn' is not installed: pip install scikit-learn"):
        choose_backend("sklearn", torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="backend must be one of auto, faiss, sklearn, torch, got 'annoy'"):
        choose_backend("annoy", torch.device("cpu"))


def test_groups_are_the_connected_components():
    generator = torch.Generator().manual_seed(1)
    centers = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    features = (centers.repeat(40, 1) + 0.02 * torch.randn(480, 16, generator=generator)).half()
    groups = duplicate_groups(features, nearest_others(features, 3), 0.9)  # a group has many more than 3
    assert groups.tolist() == [row % 12 for row in range(480)]
    # Two tight halves: the three neighbors of each row are in its own half.
    halves = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(10, 1), torch.tensor([[1.0, 0.3]]).repeat(10, 1)])
    halves += 1e-4 * torch.randn(20, 2, generator=generator)
    assert duplicate_groups(halves, nearest_others(halves, 3), 0.9).tolist() == [0] * 20
    chain = torch.stack([torch.tensor([np.cos(angle), np.sin(angle)]) for angle in 0.1 * np.arange(10)]).float()
    assert duplicate_groups(chain, nearest_others(chain, 2), np.cos(0.11)).tolist() == [0] * 10
    assert duplicate_groups(chain, nearest_others(chain, 2), np.cos(0.09)).tolist() == list(range(10))


def test_outlier_scores_by_hand():
    similarities = torch.tensor([[0.9, 0.8], [0.8, 0.8], [0.9, 0.9], [0.1, 0.0]])
    scores, z = outlier_scores(similarities)
    torch.testing.assert_close(scores, torch.tensor([0.15, 0.2, 0.1, 0.95]))
    median = scores.median()
    torch.testing.assert_close(z, 0.6745 * (scores - median) / (scores - median).abs().median())


def test_outlier_scores_among_copies():
    similarities = torch.ones(100, 3)
    similarities[0] += 1e-6  # rounding
    scores, z = outlier_scores(similarities)
    assert scores.min() == 0
    assert z.tolist() == [0] * 100
    similarities[60:] = 0.9 + 1e-3 * torch.arange(40)[:, None]  # the other images: each at a distance of its own
    scores, z = outlier_scores(similarities)
    torch.testing.assert_close(z, scores * (0.7979 / scores.mean()), rtol=1e-3, atol=1e-3)
    assert z.max() < 3.5


def test_exact_copies_reach_the_threshold_1():
    rows = torch.nn.functional.normalize(torch.randn(200, 2048, generator=torch.Generator().manual_seed(0)), dim=1)
    features = rows.repeat(2, 1)
    for backend in ("torch", "sklearn"):
        groups = duplicate_groups(features, nearest_others(features, 3, backend=backend), 1.0)
        assert groups.tolist() == [*range(200)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}"], "holds no features (no features.json): pass a folder that mocov3 extract --output_dir wrote"),
        (["{photos}/no", "--model", "{model}"], "image '{photos}/no' does not exist"),
        (["{features}", "--query", "{photos}/broken.jpg"], "broken.jpg cannot be decoded"),
        (["{features}", "--query", "{photos}/none.jpg"], "query '{photos}/none.jpg' does not exist"),
        (["{features}", "--threshold", "2"], "--threshold must be at least -1 and at most 1, got 2"),
        (["{photos}/00.png", "--model", "{model}", "--threshold", "1"], "neighbors need at least 2 images, got 1"),
        ([], "no features: pass a folder that mocov3 extract --output_dir wrote, or images and --model"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, found, model, photos, tmp_path, capsys):
    places = {"photos": photos, "model": model, "features": found / "features"}
    with pytest.raises(SystemExit) as ended:
        main(["neighbors", *(word.format(**places) for word in arguments), "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert message.format(**places) in error


def test_features_of_other_weights_are_refused(found, tmp_path, photos, capsys):
    other = save_classifier(tmp_path / "other", "vit")
    arguments = [str(found / "features"), "--model", other, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(["neighbors", *arguments])
    assert "are of other weights than the model" in capsys.readouterr().err


def test_pictures_of_moved_images_are_accounted_for(model, photos, tmp_path):
    for name in ("00.png", "01.png", "02.png"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    main(["extract", str(tmp_path), "--model", model, "--device", "cpu", "--output_dir", str(tmp_path / "features")])
    (tmp_path / "01.png").unlink()
    moved = mocov3_hf.neighbors(tmp_path / "features", output_dir=tmp_path / "out", device="cpu")
    page = moved.gallery.read_text(encoding="utf-8")
    assert "1 picture, such as" in page or "pictures, such as" in page
    assert moved.summary["images"] == 3
