"""A scan finds every image and accounts for every other file, whatever the folder looks like."""

import os
import pickle
import socket
import stat
import sys
import threading

import pytest

from mocov3_hf.data import scan_index
from mocov3_hf.data.file_kinds import HIDDEN, has_image_magic
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.references import path_of, read_reference, reference_of, shown
from mocov3_hf.data.remote import read_file
from mocov3_hf.data.scan import scan_folder
from mocov3_hf.data.sources import open_source


def write(folder, *names, content=b"x"):
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def names(scan) -> list[str]:
    return [os.fsdecode(image) for image in scan.images]


def test_images_are_found_at_any_depth_sorted_by_bytes(tmp_path):
    files = ["b/1.jpg", "a/x/y/z/2.PNG", "a-1/3.JpEg", "Z.tif", "ä.webp", "a.jpg", "1.npy", "10.avif", "2.bmp"]
    write(tmp_path, *files)
    assert names(scan_folder(tmp_path)) == sorted(files, key=os.fsencode)


def test_junk_side_files_and_other_formats_are_counted_by_reason(tmp_path):
    write(tmp_path, "a.jpg", ".DS_Store", "._a.jpg", "Thumbs.db", "desktop.ini", ".hidden/b.jpg", "__MACOSX/c.jpg")
    write(tmp_path, "a.txt", "b.TXT", "a.xml", "a.json", "a.heic", "a.tgz", "README", "noise.xyz")
    scan = scan_folder(tmp_path)
    assert names(scan) == ["a.jpg"]
    assert scan.tally.counts == {
        HIDDEN: 6,
        "side file (.txt)": 2,
        "side file (.xml)": 1,
        "side file (.json)": 1,
        "format is not supported (.heic)": 1,
        "compressed file, unpack it to use it (.tgz)": 1,
        "not an image (no extension)": 1,
        "not an image (.xyz)": 1,
    }
    assert scan.tally.examples["side file (.txt)"] == "a.txt"


def test_backups_and_unfinished_downloads_are_skipped_and_a_class_may_be_called_icon(tmp_path):
    write(tmp_path, "icon/a.jpg", "Icon/b.jpg", "~a.jpg")
    assert names(scan_folder(tmp_path)) == ["Icon/b.jpg", "icon/a.jpg", "~a.jpg"]
    write(tmp_path, "a.jpg~", "~$a.jpg", "Icon\r", "$RECYCLE.BIN/a.jpg", "#recycle/a.jpg", "b.jpg.tmp", "b.jpg.part")
    scan = scan_folder(tmp_path)
    assert names(scan) == ["Icon/b.jpg", "icon/a.jpg", "~a.jpg"]
    assert scan.tally.counts == {HIDDEN: 5, "side file (.tmp)": 1, "side file (.part)": 1}


def test_links_are_followed_and_each_folder_is_used_once(tmp_path):
    write(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    root = tmp_path / "root"
    write(root, "0.jpg", "real/3.jpg")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")  # sorted first, so this is the one that is used
    (root / "alias").symlink_to("real")
    (root / "real" / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    (root / "broken").symlink_to("nothing")
    (root / "broken.jpg").symlink_to("nothing.jpg")
    (root / "link.jpg").symlink_to("0.jpg")
    scan = scan_folder(root)
    assert names(scan) == ["0.jpg", "again/1.jpg", "again/deep/2.jpg", "link.jpg", "real/3.jpg"]
    assert scan.tally.counts == {
        "link to a folder that is used already": 3,
        "link that leads to itself": 1,
        "broken link": 2,
    }


def test_folders_that_link_to_each_other_end(tmp_path):
    for name in "abcdefgh":
        write(tmp_path, f"{name}/{name}.jpg")
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert len(scan_folder(tmp_path).images) == 8


def test_splits_may_link_to_the_same_folder(tmp_path, jpeg_folder):
    jpeg_folder(3, "all", classes=0)
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(tmp_path / "all")
    for split in ("train", "test"):
        assert len(open_source(str(tmp_path / "data"), split=split)) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_fifos_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    write(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.png").symlink_to("fifo.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    server.bind("s.jpg")
    found = []
    reader = threading.Thread(target=lambda: found.append(scan_folder(tmp_path)), daemon=True)
    reader.start()
    reader.join(20)
    server.close()
    (scan,) = found
    assert names(scan) == ["a.jpg"]
    assert scan.tally.counts == {"FIFO, never opened": 3, "device, never opened": 1, "socket, never opened": 1}


NAMES = [b"\xff\xfe.jpg", b"a\nb.jpg", b"a b[1]*?.jpg", b"\xe9/\x80.png", b"a\\b'\".jpg"]
NAMES += ["\u00e9.jpg".encode(), "e\u0301.jpg".encode()]  # one letter in two Unicode forms: two files


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
def test_any_bytes_in_file_names_and_glob_characters_are_harmless(tmp_path, make_jpeg):
    root = os.path.join(os.fsencode(tmp_path), b"ro[o]t \xf0*")
    for index, name in enumerate(NAMES):
        write(root, name, content=make_jpeg(index))
    for streaming in (False, True):
        source = open_source(os.fsdecode(root), streaming=streaming)
        assert source.num_samples == len(NAMES)
    source = open_source(os.fsdecode(root))
    found = [source.read(row) for row in range(len(NAMES))]
    assert [os.fsencode(path) for path in found] == [os.path.join(root, name) for name in sorted(NAMES)]
    contents = [read_file(path) for path in found]
    assert sorted(contents) == sorted(make_jpeg(index) for index in range(len(NAMES)))
    assert all(line.isprintable() for line in source.account.lines())


@pytest.mark.parametrize("name", [*NAMES, b"/plain/path.jpg", bytes(range(1, 256)).replace(b"/", b"")])
def test_references_are_valid_text_that_gives_the_path_back(name):
    reference = reference_of(name)
    reference.encode()
    assert os.fsencode(path_of(reference)) == name
    assert read_reference(reference) == os.fsdecode(name)
    assert shown(reference).isprintable()


def test_names_that_say_nothing_are_sniffed(tmp_path, make_jpeg, make_png, encode, make_picture):
    from PIL import Image

    images = {"photo": make_jpeg(), "photo.jpg_large": make_png(), "x.dat": make_jpeg(), "y.bak": make_png()}
    picture = Image.fromarray(make_picture(16, 16))
    for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM"):
        images[f"as_{kind}"] = encode(picture, kind)
        assert has_image_magic(images[f"as_{kind}"][:32])
    for name, data in images.items():
        write(tmp_path, name, content=data)
    write(tmp_path, "text", content=b"BM is no bitmap, nor is this P5")
    write(tmp_path, "label.txt", content=make_jpeg())
    write(tmp_path, "nothing", content=b"")
    scan = scan_folder(tmp_path)
    assert names(scan) == sorted(images)
    assert scan.tally.counts == {"not an image (no extension)": 2, "side file (.txt)": 1}


def test_masks_are_left_out_where_their_name_says_so(tmp_path):
    write(tmp_path, "images/1.jpg", "images/2.jpg", "masks/1.png", "masks/2.png", "masks/3.png")
    write(tmp_path, "flat/a.jpg", "flat/a_mask.png", "flat/lone_mask.png")
    scan = scan_folder(tmp_path)
    kept = ["flat/a.jpg", "flat/lone_mask.png", "images/1.jpg", "images/2.jpg", "masks/3.png"]
    assert names(scan) == kept
    assert scan.tally.counts == {"segmentation mask of an image": 3}


def test_classes_called_mask_are_classes(tmp_path):
    files = ["mask/1.jpg", "no_mask/1.jpg", "with_mask/1.jpg", "with_mask/2_seg.jpg"]
    write(tmp_path, *files)
    assert names(scan_folder(tmp_path)) == files


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is unreadable for this user")
def test_folders_and_files_without_permission_are_skipped(tmp_path, jpeg_folder):
    folder = jpeg_folder(4)
    (folder / "class0").chmod(0)
    (folder / "class1" / "00003.jpg").chmod(0)
    try:
        source = open_source(str(folder))
    finally:
        (folder / "class0").chmod(stat.S_IRWXU)
    assert source.num_samples == 1
    assert source.account.skipped["folder cannot be read: Permission denied"] == 1
    assert source.account.skipped["file cannot be read: no permission"] == 1


def test_a_folder_that_cannot_be_read_is_skipped(tmp_path, monkeypatch):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refusing(path):
        if os.fsencode(path).endswith(b"/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    scan = scan_folder(tmp_path)
    assert names(scan) == ["b/2.jpg"]
    assert scan.tally.counts == {"folder cannot be read: Permission denied": 1}


def test_an_index_is_used_until_a_folder_changes(tmp_path, monkeypatch):
    write(tmp_path / "data", "a/1.jpg", "b/2.jpg", "b/3.txt", "c.tar", "labels.csv")
    monkeypatch.setattr(scan_index, "INDEX_FROM", 1)
    monkeypatch.setattr(scan_index, "_SETTLED_NS", 0)
    root = tmp_path / "data"
    first = scan_index.scan(root)
    path = scan_index.index_path(os.fsencode(root))
    assert path.is_file()
    monkeypatch.setattr(scan_index, "scan_folder", lambda *_: pytest.fail("scanned again"))
    again = scan_index.scan(root)
    assert again.__dict__ | {"tally": None} == first.__dict__ | {"tally": None}
    assert again.tally.__dict__ == first.tally.__dict__
    monkeypatch.setattr(scan_index, "scan_folder", scan_folder)
    write(root, "b/4.jpg")
    assert names(scan_index.scan(root)) == ["a/1.jpg", "b/2.jpg", "b/4.jpg"]
    os.rename(root / "b" / "4.jpg", root / "a" / "4.jpg")
    assert names(scan_index.scan(root)) == ["a/1.jpg", "a/4.jpg", "b/2.jpg"]
    path.write_bytes(path.read_bytes()[:50])
    assert len(scan_index.scan(root).images) == 3


def test_a_folder_that_has_just_changed_is_not_indexed(tmp_path, monkeypatch):
    write(tmp_path / "data", "1.jpg")
    monkeypatch.setattr(scan_index, "INDEX_FROM", 1)
    scan_index.scan(tmp_path / "data")
    assert not scan_index.index_path(os.fsencode(tmp_path / "data")).exists()


def test_a_large_table_is_shared_by_workers(jpeg_folder, monkeypatch):
    folder = str(jpeg_folder(6))
    small = open_source(folder)
    monkeypatch.setattr(scan_index, "MAPPED_FROM", 1)
    for _ in range(2):
        mapped = open_source(folder)
        assert mapped._dataset.cache_files
        assert mapped.column().to_pylist() == small.column().to_pylist()
        again = pickle.loads(pickle.dumps(mapped))
        assert [again.read(row) for row in range(6)] == [small.read(row) for row in range(6)]
    assert open_labeled(folder, split="train").labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    write(tmp_path / "data", "1.jpg")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(scan_index.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(scan_index, "INDEX_FROM", 1)
    monkeypatch.setattr(scan_index, "_SETTLED_NS", 0)
    assert len(scan_index.scan(tmp_path / "data").images) == 1
