"""A mistyped path in any command: one line at once, exit code 2, the nearest name, and no network."""

import socket

import pytest

import mocov3_cli


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with some names, and no network."""

    def refused(*_args, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/first", "photos/cats"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "first.pth").write_bytes(b"")
    return tmp_path


DATA = ["--dataset_name", "photos/cats"]
# What else a command needs besides its model.
MODEL_COMMANDS = {
    "knn": DATA,
    "linear-probe": [*DATA, "--output_dir", "out"],
    "finetune": [*DATA, "--output_dir", "out"],
    "evaluate": DATA,
    "extract": ["photos", "--output_dir", "out"],
    "neighbors": ["photos", "--output_dir", "out"],
    "classify": ["photos"],
    "export": ["--format", "vit", "--output_dir", "out"],
    "push": ["--hub_model_id", "me/model"],
    "report": [],
    "pretrain": ["photos", "--recipe", "quickstart", "--output_dir", "out"],
}


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        mocov3_cli.main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not [line for line in lines if "Retry" in line or "Traceback" in line]
    return lines[-1]


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("runs/frist", "; did you mean 'runs/first'?"),
        ("./runs/frist", "; did you mean 'runs/first'?"),
        ("runs/first/checkpoint/10", " (there is no folder 'runs/first/checkpoint')"),
        ("a/b/c", " (there is no folder 'a')"),
        ("no such", ""),
    ],
)
def test_a_mistyped_model(command, name, hint, capsys, place):
    if command in ("extract", "neighbors", "classify"):
        (place / "photos" / "1.png").write_bytes(b"")
    error = error_of([command, *MODEL_COMMANDS[command], "--model", name], capsys)
    assert f"folder {name.removeprefix('./')!r} does not exist{hint}" in error.replace("'./", "'")


@pytest.mark.parametrize("command", ["knn", "linear-probe", "finetune", "evaluate", "export", "pretrain"])
def test_a_mistyped_published_name(command, capsys):
    wrong = "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1"
    error = error_of([command, *MODEL_COMMANDS[command], "--model", wrong], capsys)
    assert error.endswith(f"no published model {wrong!r}; did you mean {wrong + 'k'!r}?")


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "photos/cat", "--recipe", "quickstart", "--output_dir", "out"],
        ["pretrain", "photos/cat", "--recipe", "quickstart", "--output_dir", "out", "--streaming"],
        ["extract", "--dataset_name", "photos/cat", "--model", "runs/first", "--output_dir", "out"],
        ["classify", "--dataset_name", "photos/cat", "--model", "runs/first"],
    ],
)
def test_a_mistyped_data_set(arguments, capsys):
    assert "folder 'photos/cat' does not exist; did you mean 'photos/cats'?" in error_of(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "runs/frist.pth", "--output_dir", "o"], "checkpoint 'runs/frist.pth' does not exist; did you"),
        (["classify", "photos/cat/1.png", "--model", "m"], "image 'photos/cat/1.png' does not exist; did you mean"),
        (
            ["classify", "photos", "--model", "m", "--output", "rnus/x"],
            "folder 'rnus' does not exist; did you mean 'runs'",
        ),
        (["knn", "https://a.org/b.pth", *DATA], "is a URL: convert its checkpoint with mocov3 convert"),
        (["knn", "runs/first.pth", *DATA], "model folder 'runs/first.pth' is a file: pass a folder written by"),
        (
            ["pretrain", "photos", "--recipe", "runs/mine", "--output_dir", "o"],
            "recipe file 'runs/mine' does not exist",
        ),
    ],
)
def test_other_paths(arguments, message, capsys, place):
    (place / "photos" / "1.png").write_bytes(b"")
    assert message in error_of(arguments, capsys)


@pytest.mark.parametrize("command", ["knn", "linear-probe", "finetune", "evaluate"])
def test_an_output_folder_that_is_a_file(command, capsys, place):
    (place / "runs" / "first" / "config.json").write_text("{}")
    arguments = [command, "runs/first", *DATA, "--output_dir", "runs/first.pth"]
    assert "--output_dir 'runs/first.pth' is a file: pass a folder" in error_of(arguments, capsys)


def test_a_data_set_without_its_option(capsys):
    assert error_of(["knn", "runs/first", "photos"], capsys).endswith("; did you mean --dataset_name photos?")
