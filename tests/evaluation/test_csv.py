"""Data sets in CSV files, in all commands. Image folders without labels."""

import csv
import shutil

import pytest
from PIL import Image

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.tables import find_csv_files
from mocov3_hf.evaluation import evaluate, finetune, knn, linear_probe
from mocov3_hf.evaluation.classifier import load_with_new_head
from mocov3_hf.evaluation.feature_cache import data_fingerprint
from tests.factories import COLORS


# `datasets` before 5.2 leaves a file that it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*csv:ResourceWarning")


def write(path, rows, header=("file_name", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def csv_folder(image_folder, tmp_path_factory):
    """`train.csv`, `test.csv` and `images/`, the images of `image_folder` in its order."""
    folder = tmp_path_factory.mktemp("csv")
    for split in ("train", "test"):
        rows = []
        for path in sorted(image_folder.glob(f"{split}/*/*.png")):
            name = f"images/{split}_{path.parent.name}_{path.name}"
            (folder / "images").mkdir(exist_ok=True)
            shutil.copy(path, folder / name)
            rows.append([name, path.parent.name])
        write(folder / f"{split}.csv", rows)
    return folder


def test_a_folder_of_csv_files_is_the_image_folder(csv_folder, image_folder):
    for split in ("train", "test", "train+test"):
        listed, found = (open_labeled(str(folder), split=split) for folder in (csv_folder, image_folder))
        assert (listed.class_names, listed.labels.tolist()) == (list(COLORS), found.labels.tolist())
        assert listed.decode(7).equal(found.decode(7))
    again = open_labeled(str(csv_folder), split="train")
    assert data_fingerprint(again) == data_fingerprint(open_labeled(str(csv_folder), split="train"))
    assert data_fingerprint(again) != data_fingerprint(open_labeled(str(csv_folder), split="test"))


def test_one_file_with_a_column_of_splits_numbers_and_other_columns(csv_folder, tmp_path):
    paths = sorted((csv_folder / "images").iterdir())[:4]
    rows = [[str(path), number % 2, "train" if number < 3 else "test", "x"] for number, path in enumerate(paths)]
    file = write(tmp_path / "all.csv", rows, ("photo", "target", "split", "note"))
    images = open_labeled(str(file), split="train", image_column="photo")
    assert (images.class_names, images.labels.tolist()) == (None, [0, 1, 0])
    assert images.decode(0).shape[0] == 3
    assert open_labeled(str(tmp_path), split="test", image_column="photo").labels.tolist() == [1]


def test_paths_and_splits_are_text_and_no_class_name_means_missing(tmp_path):
    rows = []
    for number, label in enumerate(("NA", "null", "x")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"00{number}", "PNG")
        rows.append([f"00{number}", label, "01" if number < 2 else "1"])
    file = write(tmp_path / "all.csv", rows, ("path", "label", "split"))
    images = open_labeled(str(file), split="01")
    assert (images.class_names, images.labels.tolist()) == (["NA", "null"], [0, 1])
    assert images.decode(1)[0, 0, 0] == 1
    assert open_labeled(str(file), split="1+01").labels.tolist() == [2, 0, 1]


def test_the_type_of_a_column_is_that_of_all_its_rows(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [["a.png", number % 3] for number in range(10_001)]
    assert open_labeled(str(write(tmp_path / "ints.csv", rows)), split="ints").labels[-1] == 10_000 % 3
    images = open_labeled(str(write(tmp_path / "text.csv", [*rows, ["a.png", "b"]])), split="text")
    assert images.class_names == ["0", "1", "2", "b"]


def test_a_csv_beside_other_data_is_not_the_data_set(image_folder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    write(folder / "notes.csv", [["train/ant/000.png", "x"]], ("file_name", "note"))
    assert open_labeled(str(folder), split="train").class_names == list(COLORS)
    assert find_csv_files(str(folder), "train") == []
    (folder / "notes.csv").rename(folder / "metadata.csv")  # which `datasets` reads itself
    assert find_csv_files(str(folder), "metadata") == []


@pytest.mark.slow
def test_all_commands_read_csv_files(csv_folder, image_folder, model_folder, tmp_path):
    def command(data, name, *more):
        paths = ["--model", model_folder, "--dataset_name", data, "--output_dir", tmp_path / f"{data.name}_{name}"]
        return [str(value) for value in (*paths, *more)]

    training = ("--num_train_epochs", 1, "--train_batch_size", 15)
    fine = (*training, "--warmup_epochs", 0)
    for name, main, more in (
        ("knn", knn.main, ("--k", 5)),
        ("cached", linear_probe.main, ("--cached", "--num_train_epochs", 2, "--learning_rates", 0.1, "--few_shot", 2)),
        ("linear", linear_probe.main, training),
        ("fine", finetune.main, (*fine, "--base_learning_rate", 0.01)),
    ):
        assert main(command(csv_folder, name, *more)) == main(command(image_folder, name, *more)), name
    load_with_new_head(model_folder, list(COLORS)).save_pretrained(tmp_path / "classifier")
    for data in (csv_folder, image_folder):
        evaluate.main(["--model", str(tmp_path / "classifier"), "--dataset_name", str(data)])


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        (
            "file_name,label\na.png,x\n",
            "test",
            r"image 'b.png' in .* does not exist: paths must be absolute or",
        ),
        ("file_name,label\na.png,x\n", "val", r"split 'val' does not exist in .*it has: test, train"),
        ("file_name,label\na.png\n", "train", r"1 missing labels, the first in row 0"),
        ("file_name,label\n", "train", r"train.csv' is not a CSV table with a header and rows"),
        ("photo,label\na.png,x\n", "train", "no image column found: .* --image_column; columns: photo, label"),
        ("path,image,label\na.png,a.png,x\n", "train", r"several image columns \(path, image\)"),
        ("file_name,score\na.png,x\n", "train", "no label column found: name it with --label_column"),
        ("file_name,label\na.png,x\na.png,\n", "train", r"'label' has 1 missing labels, the first in row 1"),
        ("file_name,label\na.png,-1\n", "train", "column 'label' has 1 negative labels"),
        ("file_name,label\na.png,x\na.png,x,y\n", "train", "Expected 2 fields in line 3, saw 3"),
        ("file_name,label\na.png,x,y\n", "train", "its rows are longer than its header"),
        ('file_name,label\n"a.png,x\n', "train", "is not a CSV table with a header and rows: .*EOF inside string"),
        (b"\xff\xfe\x00", "train", "is not a CSV table with a header and rows: .*codec can't decode"),
        ("", "train", "is not a CSV table with a header and rows: No columns to parse"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, split, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    write(tmp_path / "test.csv", [["b.png", "x"]])
    with pytest.raises(ValueError, match=message) as error:
        open_labeled(str(tmp_path), split=split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["{split}/{name}", "{name}", "images/{split}/{name}"])
def test_folders_without_classes_are_told_what_is_expected(tmp_path, layout):
    for split in ("train", "test"):
        for name in ("0.png", "1.png"):
            path = tmp_path / layout.format(split=split, name=f"{split}{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match=r"holds images without labels: expected class folders \(train/<class>/<im"):
        open_labeled(str(tmp_path), split="train")
