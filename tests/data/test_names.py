"""Names of data sets and splits: what is a folder, what is loaded if it is not one, what messages call a split."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from mocov3_hf.data.builders import report_bare_name
from mocov3_hf.data.classes import open_labeled_splits
from mocov3_hf.data.sources import open_source
from mocov3_hf.data.splits import MissingSplitError, split_option


BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, without the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report_bare_name.cache_clear()


def test_a_copy_in_the_cache_is_reported(jpeg_folder, tmp_path, monkeypatch, capsys):
    """`datasets` keeps what it made of a folder, and finds it by the folder's name from anywhere."""
    jpeg_folder(3, "photos")
    monkeypatch.chdir(tmp_path)
    datasets.load_dataset("photos", cache_dir=str(tmp_path / "hf_cache"))
    assert len(open_source("photos")) == 3
    assert "there is no folder" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(2):
        assert len(open_source("photos")) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "there is no folder" in line]
    assert line.startswith("warning: there is no folder 'photos' here: loading what datasets has kept in '")
    assert str(tmp_path / "hf_cache" / "photos") in line


def test_a_data_set_of_the_hub_is_reported(monkeypatch, capsys, jpeg_folder):
    builder = datasets.load_dataset_builder(str(jpeg_folder(2, "images")))
    fields = ("as_dataset", "config", "download_and_prepare", "info")
    of_hub = SimpleNamespace(repo_id="mnist", name="parquet", **{name: getattr(builder, name) for name in fields})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: of_hub)
    assert len(open_source("mnist")) == 2
    assert capsys.readouterr().err == (
        "warning: there is no folder 'mnist' here: loading the data set 'mnist' of the Hub\n"
    )
    assert len(open_source("ylecun/mnist")) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["csv", "imagefolder", "webdataset"])
def test_the_name_of_a_format_is_not_a_data_set(name, tmp_path, jpeg_folder):
    jpeg_folder(2, "elsewhere/more")
    with pytest.raises(ValueError, match=f"'{name}' is the name of a format: pass a folder of images"):
        open_source(name)


@pytest.mark.parametrize("name", ["photos/", "./photos", "a/b/photos", "~/photos-of-nobody", "/photos", "my photos"])
def test_what_looks_like_a_path_is_never_looked_up(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", None)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(name)


def test_the_message_about_a_split_names_the_option(jpeg_folder, tmp_path):
    for place in ("train/a", "train/b", "test/a"):
        jpeg_folder(2, f"data/{place}")
    name = str(tmp_path / "data")
    with pytest.raises(
        MissingSplitError, match=r"split 'dev' does not exist in .*; it has: train, test. Pass one of them$"
    ):
        open_source(name, split="dev")
    with pytest.raises(MissingSplitError, match=r"Pass one of them as --its_split$"), split_option("--its_split"):
        open_source(name, split="dev")
    for splits, said in ((("dev", "test"), "--train_split"), (("train", "dev"), "--test_split")):
        with pytest.raises(MissingSplitError, match=f"Pass one of them as {said}$"):
            open_labeled_splits(name, None, *splits)
    with pytest.raises(MissingSplitError, match=r"as --knn_test_split$"):
        open_labeled_splits(name, None, "train", "dev", split_options=("--knn_train_split", "--knn_test_split"))


@BOTH
@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "": "the name of the data set is empty",
        " ": "the name of the data set is empty",
        "/dev/zero": "'/dev/zero' is a device, pipe or socket",
        "x" * 5000: "with 5000 characters is too long",
        "/data/" + "x" * 300: "with 306 characters is too long",
    }.items(),
)
def test_names_that_are_none(name, reason, streaming, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=reason) as caught:
        open_source(name, streaming=streaming)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "scripts are no longer supported"),
        (ConnectionError("no route"), "and as a data set on the Hub it cannot be opened"),
        (OSError("503 Server Error\nmore"), "503 Server Error: check the network"),
    ],
)
def test_the_hub_fails(monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=reason) as caught:
            open_source("somebody/something", streaming=streaming)
        assert "\n" not in str(caught.value)


@BOTH
def test_a_local_loading_script_is_not_run(tmp_path, streaming):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"side file \(\.py\), such as"):
        open_source(str(folder), streaming=streaming)
    with pytest.raises(ValueError, match="is a file: pass the folder"):
        open_source(str(folder / "scripted.py"), streaming=streaming)
    assert not (tmp_path / "executed").exists()
