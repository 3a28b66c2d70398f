"""Archives and parquet files: which of their images are used, the same map-style and streamed."""

import io
import tarfile
import zipfile

import datasets
import pytest
from PIL import Image

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.sources import open_source
from tests.data.test_folders import classes, used


def tar_of(path, members: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zip_of(path, members: dict[str, bytes], method=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def pictures(make_jpeg, make_png):
    """Encoded images by number, of two formats."""
    return [(make_jpeg if n % 2 else make_png)(n, width=16, height=12) for n in range(12)]


def test_tars_hold_images_of_any_extension_within_and_across(tmp_path, pictures):
    names = ["0.png", "1.jpg", "2.PNG", "3.JPEG", "4.weird", "5.jpg"]
    tar_of(tmp_path / "data" / "a.tar", dict(zip(names, pictures[:6], strict=True)) | {"0.cls": b"1", "x.json": b"{}"})
    tar_of(tmp_path / "data" / "b.tar", {f"{n}.png": pictures[n] for n in range(6, 12)})
    assert used(tmp_path / "data") == pictures
    assert open_source(str(tmp_path / "data")).account.skipped == {
        "label of an image (.cls)": 1,
        "side file (.json)": 1,
    }
    assert used(tmp_path / "data" / "b.tar") == pictures[6:]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips(tmp_path, pictures, method):
    members = {f"set/{'cat' if n < 5 else 'dog'}/{n}": pictures[n] for n in range(8)}
    members |= {"set/readme.txt": b"x", "__MACOSX/set/._1": b"x", "set/inner.zip": b"PK", "set/": b""}
    path = zip_of(tmp_path / "data.zip", members, method)
    assert used(path) == pictures[:8]
    account = open_source(str(path)).account
    assert account.skipped == {"side file (.txt)": 1, "hidden or system file": 1, "archive inside an archive": 1}
    assert classes(path) == (["cat", "dog"], [0] * 5 + [1] * 3)


def test_a_large_archive_is_indexed_until_it_changes(tmp_path, pictures, monkeypatch):
    from mocov3_hf.data import archives

    monkeypatch.setattr(archives, "INDEX_FROM_BYTES", 0)
    members = {f"{n}.jpg": pictures[n] for n in range(4)} | {f"{n}.cls": b"1" for n in range(4)}
    members |= {"\u00e9/x.txt": b"x"}
    path = tar_of(tmp_path / "a.tar", members)
    assert used(path) == pictures[:4]
    first = open_source(str(path)).account
    monkeypatch.setattr(archives, "list_members", lambda *_: pytest.fail("listed again"))
    assert used(path) == pictures[:4]
    assert open_source(str(path)).account == first
    assert open_labeled(str(path), split="train", label_column="cls").account == first
    monkeypatch.undo()
    monkeypatch.setattr(archives, "INDEX_FROM_BYTES", 0)
    tar_of(path, members | {"4.jpg": pictures[4]})
    assert used(path) == pictures[:5]


def test_splits_in_archives(tmp_path, pictures):
    inside = {f"root/{'train' if n < 5 else 'test'}/{'ab'[n % 2]}/{n}.jpg": pictures[n] for n in range(8)}
    path = zip_of(tmp_path / "all.zip", inside)
    assert (used(path), used(path, "test")) == (pictures[:5], pictures[5:8])
    assert classes(path, "test") == (["a", "b"], [1, 0, 1])
    for number, split in enumerate(("train", "val")):
        tar_of(tmp_path / "tars" / f"x-{split}-000.tar", {"1.jpg": pictures[number]})
    assert (used(tmp_path / "tars"), used(tmp_path / "tars", "val")) == (pictures[:1], pictures[1:2])
    tar_of(tmp_path / "tars" / "extra.tar", {"1.jpg": pictures[2]})
    assert len(used(tmp_path / "tars")) == 3


def test_files_and_archives_together(tmp_path, put, pictures):
    folder = put("a.jpg", "z.jpg")
    tar_of(folder / "m.tar", {"1.jpg": pictures[0], "cat/2.jpg": pictures[1]})
    loose = [(folder / name).read_bytes() for name in ("a.jpg", "z.jpg")]
    assert used(folder) == [loose[0], *pictures[:2], loose[1]]


def test_labels_beside_images_in_tars(tmp_path, pictures):
    members = {}
    for n in range(4):
        members |= {f"{n}.png": pictures[n], f"{n}.cls": str(n % 3).encode(), f"{n}.txt": f"a {n}".encode()}
    path = tar_of(tmp_path / "train.tar", members)
    images = open_labeled(str(path), split="train")
    assert (images.class_names, images.labels.tolist()) == (None, [0, 1, 2, 0])
    assert open_labeled(str(path), split="train", label_column="txt").class_names == [f"a {n}" for n in range(4)]


def test_columns_of_images_in_tars(tmp_path, pictures):
    members = {}
    for n in range(4):
        members |= {f"{n}.jpg": pictures[n], f"{n}.depth.png": pictures[n + 4]}
    path = tar_of(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"several image columns \(depth.png, jpg\) in .*: choose one"):
        open_source(str(path))
    assert used(path, image_column="depth.png") == pictures[4:8]
    # Numbers after a dot are not columns.
    frames = {f"clip{c}.{n}.jpg": pictures[3 * c + n] for c in range(2) for n in range(3)}
    assert used(tar_of(tmp_path / "b.tar", frames)) == pictures[:6]


@pytest.mark.parametrize("kind", ["cut", "garbage", "damaged header"])
def test_damaged_tars_are_reported_and_their_images_used(tmp_path, pictures, kind):
    path = tar_of(tmp_path / "a.tar", {f"{n}.jpg": pictures[n] for n in range(4)})
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: data.index(b"3.jpg") + 600]
    elif kind == "damaged header":
        data[data.index(b"3.jpg") + 150] ^= 0xFF
    else:
        data = bytearray(b"no tar at all" * 100)
    path.write_bytes(data)
    if kind == "garbage":
        with pytest.raises(
            ValueError, match=r"no images found in .*, only 1 of the kind: archive is damaged or cut short"
        ):
            open_source(str(path))
    else:
        assert used(path) == pictures[:3]
        assert open_source(str(path)).account.skipped == {"archive is damaged or cut short": 1}


def test_damaged_and_encrypted_zips(tmp_path, pictures):
    path = zip_of(tmp_path / "a.zip", {f"{n}.png": pictures[n] for n in range(3)})
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[:-30])
    with pytest.raises(ValueError, match="archive is damaged or cut short"):
        open_source(str(tmp_path / "cut.zip"))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first member in the central directory
    path.write_bytes(data)
    assert used(path) == pictures[1:3]
    assert open_source(str(path)).account.skipped == {"encrypted, in a zip file": 1}


def test_an_archive_that_changes_is_a_bad_image(tmp_path, pictures):
    from mocov3_hf.data.decode import BadImageError

    path = zip_of(tmp_path / "a.zip", {"0.png": pictures[0]})
    source = open_source(str(path))
    path.write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(BadImageError, match="damaged or has changed"):
        source.read(0)
    path.unlink()
    with pytest.raises(BadImageError, match=r"cannot be read: .*a.zip/0.png"):
        source.read(0)


def parquet(path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": data, "path": None} for data in pictures]
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(path)
    return path


def test_single_parquet_files_and_folders(tmp_path, pictures):
    path = parquet(tmp_path / "o[n]e" / "photos.parquet", pictures[:3])
    assert used(path) == pictures[:3] == used(path.parent)
    parquet(tmp_path / "two" / "train-0.parquet", pictures[:4])
    parquet(tmp_path / "two" / "data" / "test.parquet", pictures[4:6])
    assert (used(tmp_path / "two"), used(tmp_path / "two", "test")) == (pictures[:4], pictures[4:6])
    parquet(tmp_path / "two" / "more.parquet", pictures[6:])
    assert len(used(tmp_path / "two")) == 12
    parquet(tmp_path / "three" / "val" / "x.parquet", pictures[:2])
    parquet(tmp_path / "three" / "train" / "x.parquet", pictures[2:])
    assert (used(tmp_path / "three", "validation"), len(used(tmp_path / "three"))) == (pictures[:2], 10)


def test_parquet_beside_images(tmp_path, put, pictures):
    folder = put("logo.jpg")
    parquet(folder / "data.parquet", pictures[:3])
    assert used(folder) == pictures[:3]
    assert open_source(str(folder)).account.skipped == {"image or archive beside parquet files": 1}
    put("2.jpg", "3.jpg")
    with pytest.raises(ValueError, match="holds 3 images and parquet files of 3 rows: pass the folder of the one or"):
        open_source(str(folder))
    datasets.Dataset.from_dict({"id": [1]}).to_parquet(folder / "data.parquet")
    assert len(used(folder)) == 3
    assert open_source(str(folder)).account.skipped == {"table without images (.parquet)": 1}


def test_other_files_are_refused_by_name(tmp_path, put, pictures):
    folder = put("1.jpg")
    with pytest.raises(ValueError, match="is a single image: pass the folder that holds the images"):
        open_source(str(folder / "1.jpg"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(
        ValueError, match="is a file: pass the folder that holds the data, or a parquet, tar, zip or CSV"
    ):
        open_source(str(tmp_path / "a.json"))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"b.parquet' cannot be read as a parquet file"):
        open_source(str(tmp_path / "b.parquet"))
