"""The command: a page for every kind of folder with all text escaped, and one line for every error."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import mocov3_cli
from mocov3_hf import MoCoV3Config, MoCoV3Model
from mocov3_hf.options import parse, values_of_arguments
from mocov3_hf.recipe_files import find_recipe
from mocov3_hf.report import write
from mocov3_hf.report.images import Viewer, open_samples
from mocov3_hf.run_folder import read_run_folder
from tests.factories import AWKWARD_NAMES, RESNET, save_run


# Where the options of a command are, if not beside its function.
PARSERS = {"pretrain": "mocov3_hf.pretraining.recipe"}
# Rooms that still have parsers of their own, in modules that go with them, cannot be asked.
ROOMS_ARE_READY = not any(map(find_spec, ("mocov3_hf.recipe", "mocov3_hf.evaluation.arguments")))
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags, ids, links, text and suggested commands of a page; fails where tags do not close."""

    def __init__(self, path):
        super().__init__()
        self.source = Path(path).read_text(encoding="utf-8")
        self.open, self.tags, self.ids, self.links, self.images, self.text = [], [], [], [], [], ""
        self.commands = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)

    def handle_startendtag(self, tag, attributes):
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "code":
            self.commands.append(data)


def check(page):
    """Ids are unique, links resolve, images have descriptions, and nothing is loaded from elsewhere."""
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert "script" not in page.tags
    assert {"b", "i", "em", "u"}.isdisjoint(page.tags)
    assert "http://" not in page.source
    assert "https://" not in page.source


def report(*arguments):
    write.main([*map(str, arguments)])


def refused(arguments, capsys):
    """The error of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        write.main([*map(str, arguments)])
    assert raised.value.code == 2
    # Where datasets reads a table for the first time, its progress bar stands above.
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "Generating" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_run_with_images(run, labeled, capsys):
    report(run, "--dataset_name", labeled, "--num_images", "20")
    assert f"{run / 'report.html'} (" in capsys.readouterr().out
    page = Page(run / "report.html")
    check(page)
    assert all(name in page.text for name in AWKWARD_NAMES[:2])
    for words in (
        "Contrastive loss",
        "chance 1.66",
        "floor 0.04",
        "rollback",
        "81.50 %",
        "<em>set",
        "head 2",
        "view 2",
        "random weights",
    ):
        assert words in page.text, words
    assert "/secret" not in page.source
    drawn = {path.stem for path in (run / "plots").glob("*.png")}
    assert drawn == {
        *("loss", "knn", "positives", "gradients", "layers", "schedule", "collapse", "throughput", "blocks"),
        *("views", "attention", "components", "tsne", "neighbors"),
    }
    assert not list(run.glob(".report*"))


@pytest.mark.slow
def test_run_without_images_says_what_shows_them(run, tmp_path):
    report(run, "--output", tmp_path / "elsewhere" / "page.html")
    page = Page(tmp_path / "elsewhere" / "page.html")
    check(page)
    assert "--dataset_name DATA --test_split test" in page.text
    assert page.images == []
    assert (tmp_path / "elsewhere" / "plots" / "loss.png").is_file()
    assert not (run / "plots").exists()


@pytest.mark.slow
def test_damaged_line_is_noted_on_the_page(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    report(run)
    page = Page(run / "report.html")
    check(page)
    assert "1 of 10 lines of metrics.jsonl were left out, they are damaged: line 10." in page.text


def test_run_of_one_line_without_numbers(run):
    (run / "metrics.jsonl").write_text('{"step": 5, "epoch": 1, "loss": null, "grad_norm": null}\n')
    for name in ("knn.jsonl", "events.jsonl", "results.json"):
        (run / name).unlink()
    report(run)
    page = Page(run / "report.html")
    check(page)
    assert "No training metrics found" in page.text
    assert "No results yet" in page.text


@pytest.mark.slow
def test_classifier(classifier, labeled):
    report(classifier, "--dataset_name", labeled)
    page = Page(classifier / "report.html")
    check(page)
    for words in (
        "Training loss",
        "Confusion matrix",
        "Accuracy on 36 images",
        "most often confused with",
        "most confident of",
    ):
        assert words in page.text, words
    assert all(name in page.text for name in AWKWARD_NAMES[:2])
    assert {"loss", "accuracy", "schedule", "confusion-matrix", "wrong-answers"} <= {
        path.stem for path in (classifier / "plots").glob("*.png")
    }


@pytest.mark.slow
def test_accuracy_on_the_page_is_that_of_the_model(classifier, labeled):
    report(classifier, "--dataset_name", labeled)
    samples, viewer = open_samples(str(labeled)), Viewer(read_run_folder(classifier))
    answers = viewer.look(samples, 8).logits.argmax(dim=1).tolist()
    right = sum(viewer.model.config.id2label[answer] == samples.name_of(row) for row, answer in enumerate(answers))
    assert (
        f"Accuracy on 36 images of {labeled.name}, split test: {100 * right / 36:.1f} %."
        in Page(classifier / "report.html").text
    )


@pytest.mark.slow
def test_unlabeled_images_of_a_classifier(classifier, unlabeled):
    report(classifier, "--dataset_name", unlabeled)
    page = Page(classifier / "report.html")
    check(page)
    assert "No confusion matrix: it needs labels." in page.text


@pytest.mark.slow
def test_classes_that_the_head_does_not_know(classifier, labeled):
    config = json.loads((classifier / "config.json").read_text())
    config["id2label"] = {"0": "x", "1": "y", "2": "z"}
    config["label2id"] = {"x": 0, "y": 1, "z": 2}
    (classifier / "config.json").write_text(json.dumps(config))
    report(classifier, "--dataset_name", labeled)
    assert (
        "No confusion matrix: the classifier does not have 3 of the 3 classes" in Page(classifier / "report.html").text
    )


def test_convolutional_encoder_has_no_attention(tmp_path, labeled):
    MoCoV3Model(MoCoV3Config(backbone_config=RESNET)).save_pretrained(tmp_path / "encoder")
    report(tmp_path / "encoder", "--dataset_name", labeled, "--num_images", "9")
    page = Page(tmp_path / "encoder" / "report.html")
    check(page)
    for words in (
        "No attention maps: ResNetModel has no CLS token",
        "28 × 28 patch features",
        "No t-SNE map: 9 images",
    ):
        assert words in page.text, words


@pytest.mark.slow
def test_same_folder_gives_the_same_page(run, labeled):
    pages = []
    for _ in range(2):
        report(run, "--dataset_name", labeled, "--num_images", "12")
        pages.append(re.sub(r"Generated [\d\-: ]+ UTC", "", (run / "report.html").read_text()))
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere"], "does not exist"),
        (["{tmp}"], "is neither a run nor a model"),
        (["{run}", "--output", "{tmp}"], "is a folder: pass a file"),
        (["{run}", "{run}/"], "a folder is named twice"),
        (["{run}", "{tmp}/other", "--dataset_name", "{data}"], "shows images of one model"),
        (["{run}", "--dataset_name", "{tmp}/nothing"], "nothing' does not exist"),
        (["{run}", "--dataset_name", "{data}", "--test_split", "train"], "split 'train' does not exist"),
        (["{run}", "--dataset_name", "{data}", "--image_column", "x"], "image column 'x' does not exist"),
        (["{run}", "--dataset_name", "{data}", "--num_images", "0"], "at least 2"),
        (["{run}", "--dataset_name", "{data}", "--batch_size", "0"], "at least 1"),
        ([], "--model is missing"),
        (["{run}", "--dataset", "{data}"], "there is no option '--dataset'; did you mean '--dataset_name'?"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(arguments, words, run, labeled, tmp_path, capsys):
    save_run(tmp_path / "other")
    given = [argument.format(tmp=tmp_path, run=run, data=labeled) for argument in arguments]
    assert words in refused(given, capsys)
    assert not (run / "report.html").exists()
    assert not (run / "plots").exists()


def test_images_before_the_first_checkpoint(run, labeled, capsys):
    (run / "config.json").unlink()
    assert "no config.json yet" in refused([run, "--dataset_name", labeled], capsys)


def test_missing_packages_are_named(run, monkeypatch, capsys):
    monkeypatch.setitem(write.NEEDED, "no_such_module", "no-such-package")
    assert 'needs no-such-package: pip install "mocov3_hf[report]"' in refused([run], capsys)


@pytest.fixture
def bare_folders(run, classifier, tmp_path):
    """Folders whose pages suggest every command: without metrics, results and images."""
    MoCoV3Model(MoCoV3Config(backbone_config=RESNET)).save_pretrained(tmp_path / "encoder")
    for folder in (run, classifier):
        for name in ("metrics.jsonl", "knn.jsonl", "results.json"):
            (folder / name).unlink(missing_ok=True)
    return [run, save_run(tmp_path / "not measured"), classifier, tmp_path / "encoder"]


@pytest.mark.slow
def test_suggested_commands_run_as_printed(bare_folders):
    (bare_folders[1] / "knn.jsonl").unlink()
    suggested = []
    for folder in bare_folders:
        report(folder)
        page = Page(folder / "report.html")
        check(page)
        suggested += page.commands
    names = set()
    for line in suggested:
        program, name, *arguments = shlex.split(line)
        assert program == "mocov3"
        names.add(name)
        assert name in mocov3_cli.COMMANDS
        if name != "report" and not ROOMS_ARE_READY:
            continue
        module = importlib.import_module(PARSERS.get(name, mocov3_cli.COMMANDS[name][0].split(":")[0]))
        values = values_of_arguments(module.COMMAND, arguments)
        assert values
        if "recipe" in values:
            assert find_recipe(values["recipe"]).is_file()
        if name in ("report", "knn", "evaluate"):
            assert set(values["model"] if name == "report" else [values["model"]]) <= set(map(str, bare_folders))
            assert [group for group in parse(module.COMMAND, arguments) if hasattr(group, "dataset_name")]
    assert names == {"report", "knn", "evaluate", "pretrain", "finetune"}


@pytest.mark.slow
def test_earlier_spelling_of_the_split(run, labeled, capsys):
    report(run, "--dataset_name", labeled, "--split", "test", "--num_images", "4")
    assert capsys.readouterr().err.count("warning: --split is deprecated: use --test_split\n") == 1


@pytest.mark.slow
def test_script():
    script = Path(__file__).parents[2] / "scripts" / "report.py"
    done = subprocess.run([sys.executable, script, "/nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: folder '/nowhere' does not exist")
