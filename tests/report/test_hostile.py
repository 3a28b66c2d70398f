"""A report comes whatever the run folder holds: what cannot be shown is left out and named, everything else stays."""

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from mocov3_hf.report import image_sections, write
from mocov3_hf.report.parts import attempt
from tests.factories import save_run
from tests.report.test_report import Page, check, report


JSON_FILES = ("config.json", "results.json", "conversion.json", "checkpoint-40/state.json")
LINES = ("metrics.jsonl", "knn.jsonl", "events.jsonl")
HUGE = int("9" * 400)
VALUES = (
    None, True, -1, 0, 0.5, 10**9, HUGE, -HUGE, 1e300, float("nan"), float("inf"), "", "text", "x" * 100_000,
    "\ud800", "<b>&", "a\nb\x00", [], [1], [[]], {}, {"a": {}}, {"name": [1]}, [HUGE] * 3,
    {str(number): number for number in range(300)},
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = save_run(tmp_path_factory.mktemp("whole") / "run")
    source = {"name": "official_vit-s-300ep", "file": "vit-s-300ep.pth.tar"}
    (folder / "conversion.json").write_text(json.dumps({"source": source, "epochs": 300}))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def places(value, path=()):
    """Every place in a record."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


def replaced(record, path, value):
    if not path:
        return value
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


def mutate_record(folder, draw):
    path = folder / draw.choice(JSON_FILES)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(replaced(record, draw.choice(list(places(record))), draw.choice(VALUES))))


def mutate_line(folder, draw):
    path = folder / draw.choice(LINES)
    lines = path.read_text().splitlines()
    index = draw.randrange(len(lines))
    record = json.loads(lines[index])
    lines[index] = json.dumps(replaced(record, draw.choice(list(places(record))), draw.choice(VALUES)))
    path.write_text("\n".join(lines) + "\n")


def mutate_recipe(folder, draw):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe[draw.choice(list(recipe))] = draw.choice([value for value in VALUES if value != "\ud800"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def spoil_file(folder, draw):
    path = folder / draw.choice((*JSON_FILES, *LINES, "recipe.yaml", "model.safetensors"))
    content = path.read_bytes()
    path.unlink()
    match draw.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            path.write_bytes(draw.randbytes(500))
        case 2:
            path.write_bytes(content[: draw.randrange(len(content))])
        case 3:
            path.write_bytes(b"[" * 100_000)
        case 4:
            path.write_bytes(b'{"a":' * 100_000)
        case 5:
            path.write_text(f'{{"step": {"9" * 5000}, "format": 1, "results": [{"7" * 5000}]}}\n')


MUTATIONS = (mutate_record, mutate_record, mutate_line, mutate_line, mutate_recipe, spoil_file, spoil_file)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_mutated_folders_are_reported(whole, tmp_path, quick_charts, capsys, seed):
    for number in range(20):
        draw = random.Random(f"{seed} {number}")
        folder = shutil.copytree(whole, tmp_path / f"run{number}")
        done = [draw.choice(MUTATIONS) for _ in range(draw.choice((1, 1, 2, 4)))]
        for mutate in done:
            try:
                mutate(folder, draw)
            except (OSError, ValueError, KeyError, TypeError, IndexError):  # a file that an earlier one has spoiled
                continue
        report(folder)
        page = Page(folder / "report.html")
        check(page)
        written = capsys.readouterr().err.splitlines()
        assert all(line.startswith("warning: ") for line in written), (seed, number, written)
        assert len(page.source) < 3_000_000
        noted = [line for line in written if "left out" in line or "cannot be read" in line]
        assert page.text.count("left out") + page.text.count("cannot be read") >= len(noted)
        shutil.rmtree(folder)


def test_a_whole_folder_has_no_notes(run, quick_charts, capsys):
    report(run)
    assert capsys.readouterr().err == ""
    page = Page(run / "report.html")
    assert "left out" not in page.text
    for words in ("Contrastive loss", "kNN accuracy", "Gradient norm by block", "81.50 %", "official_vit-s-300ep"):
        assert words in page.text, words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("config.json", None, "config.json was left out, it cannot be read"),
        ("results.json", None, "results.json was left out"),
        ("metrics.jsonl", None, "metrics.jsonl was left out, it cannot be read"),
        ("recipe.yaml", None, "recipe.yaml was left out"),
        ("config.json", "[1]", "config.json was left out, it holds a list instead of an object"),
        (
            "knn.jsonl",
            '{"step": 1e300, "knn_top1": 1}\n',
            "1 lines of knn.jsonl were left out, no run has their steps",
        ),
        (
            "results.json",
            '{"format": 1, "results": [{"metrics": {"top1": %s}}]}' % ("9" * 400),
            "result 1 was left out",
        ),
        ("results.json", '{"format": 1, "results": [{"task": [], "metrics": {"a": 1}}]}', "result 1 was left out"),
        ("model.safetensors", "rubbish", "model.safetensors cannot be read"),
    ],
)
def test_what_is_left_out_is_named_twice_and_the_rest_stays(run, quick_charts, capsys, name, content, note):
    (run / name).unlink()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_text(content)
    report(run)
    written, page = capsys.readouterr().err, Page(run / "report.html")
    check(page)
    assert note in written
    assert note in page.text
    for words in ("Contrastive loss", "kNN accuracy", "81.50 %", "Global batch size"):
        is_of_file = {"metrics.jsonl": "Contrastive", "knn.jsonl": "kNN", "results.json": "81.50"}.get(name, "none")
        assert (words in page.text) or words.startswith(is_of_file), words


@pytest.mark.slow
def test_a_folder_in_the_place_of_a_plot_leaves_the_other_plots(run, capsys):
    (run / "plots" / "loss.png").mkdir(parents=True)
    report(run)
    page = Page(run / "report.html")
    check(page)
    assert "the chart 'Contrastive loss' was left out: IsADirectoryError" in page.text
    assert "the chart 'Contrastive loss' was left out" in capsys.readouterr().err
    assert (run / "plots" / "knn.png").is_file()


@pytest.mark.slow
def test_a_section_of_images_that_fails_leaves_the_others(run, labeled, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such map")

    monkeypatch.setattr(image_sections, "map_parts", fail)
    report(run, "--dataset_name", labeled, "--num_images", "12")
    page = Page(run / "report.html")
    check(page)
    assert "the section 't-SNE map' was left out: RuntimeError: no such map." in page.text
    assert "Nearest neighbors" in page.text


def test_an_interruption_is_not_taken_for_a_bad_part():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt([], "a part", stop, None)


def test_the_command_ends_well(run, quick_charts, capsys):
    (run / "knn.jsonl").write_bytes(b"\xff\xfe\n")
    write.main([str(run)])
    assert str(Path(run) / "report.html") in capsys.readouterr().out
