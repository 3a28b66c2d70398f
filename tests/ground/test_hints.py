"""What is a path and what a Hub id, and what a message offers for a path that does not exist."""

import pytest

from mocov3_hf.hints import describe_missing, either, joined
from mocov3_hf.hub.run_card import names_a_path
from mocov3_hf.storage import is_local


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for folder in ("runs/first/a-10", "runs/second"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)


FOLDERS = [
    "runs",
    "file",
    "runs/nosuch",
    ".",
    "..",
    "./x",
    ".hidden",
    "../x",
    "/x",
    "~",
    "~/x",
    "a/b/c",
    "/a/b",
    "a--b",
    "name.git",
    "C:\\images",
    "a//b",
]


@pytest.mark.parametrize("name", [*FOLDERS, "a b", "a/b c", "x" * 200, ""])
def test_paths(name):
    assert is_local(name)


@pytest.mark.parametrize(
    "name", ["cifar10", "nosuch", "name/data", "na.me/da_ta-1", "https://host/file.pth", "hf://a/b/c"]
)
def test_hub_ids_and_urls(name):
    assert not is_local(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/frist", "folder 'runs/frist' does not exist; did you mean 'runs/first'?"),
        ("rnus/first", "folder 'rnus/first' does not exist; did you mean 'runs/first'?"),
        ("rnus/other", "folder 'rnus/other' does not exist; did you mean 'runs'?"),
        (
            "runs/frist/a-10",
            "folder 'runs/frist/a-10' does not exist; did you mean 'runs/first/a-10'?",
        ),
        (
            "runs/first/a-11",
            "folder 'runs/first/a-11' does not exist; did you mean 'runs/first/a-10'?",
        ),
        ("zzz", "folder 'zzz' does not exist: pass another"),
        ("zzz/yyy", "folder 'zzz/yyy' does not exist: pass another"),
        ("zzz/yyy/xxx", "folder 'zzz/yyy/xxx' does not exist (there is no folder 'zzz'): pass another"),
        ("file/x", "folder 'file/x' does not exist: pass another"),
        ("link", "folder 'link' does not exist: it is a link to 'nowhere'"),
    ],
)
def test_missing_paths(name, said):
    assert describe_missing(name, fix="pass another") == said


@pytest.mark.parametrize(("names", "words"), [("A", "A"), ("AB", "A or B"), ("ABC", "A, B or C")])
def test_choices_in_words(names, words):
    assert either(names) == words


def test_a_card_shows_values_that_are_no_paths():
    assert not any(map(names_a_path, ["train+validation", "cosine", "name/data", 3, None, "two words"]))
    assert all(map(names_a_path, ["runs", "runs/nosuch", "/data/x", "~/x", "../x", "a/b/c"]))


def test_a_clause_after_a_question_is_a_sentence():
    assert joined("it does not exist", "as an id it fails") == "it does not exist, and as an id it fails"
    assert joined("did you mean 'x'?", "as an id it fails") == "did you mean 'x'? As an id it fails"
