"""A run without a recipe: the rules, the table of choices, the run that it gives, and budgets of time and memory."""

import re
import shlex
import shutil

import pytest
import torch
import yaml
from PIL import Image

import mocov3_cli
from mocov3_hf import run_folder
from mocov3_hf.pretraining import automatic
from mocov3_hf.pretraining.auto import GIB, Facts, choose, describe_choices
from mocov3_hf.pretraining.automatic import fit_memory, seconds_of
from mocov3_hf.pretraining.loop import main
from mocov3_hf.reporting import UsageError
from tests.pretraining.test_mistakes import error_of
from tests.pretraining.test_resume import assert_same_run


LAPTOP = {"device": "cpu", "memory": 16 * GIB, "precision": "no"}
T4 = {"device": "cuda", "memory": 15 * GIB, "precision": "fp16"}
H200 = {"device": "cuda", "memory": 139 * GIB, "precision": "bf16"}
NANO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def values(given=None, size=None, **facts):
    return choose(Facts(**facts), given, size).values()


def test_digits_on_a_laptop():
    found = values(num_images=1438, short_side=8, labeled_splits=("train", "test"), num_labeled=1797, **LAPTOP)
    assert found["image_size"] == 32
    assert found["crop_scale"] == [0.4, 1.0]
    assert found["backbone_config"]["patch_size"] == 8
    assert found["backbone_config"]["hidden_size"] == 128
    assert (found["num_train_epochs"], found["train_batch_size"]) == (200, 64)
    assert (found["warmup_epochs"], found["ema_decay"]) == (20.0, 0.99)
    assert found["mixed_precision"] == "no"
    assert found["knn_steps"] == 440
    assert found["cache_images_on_device"]


def test_photographs_on_a_t4():
    found = values(num_images=100_000, short_side=480, **T4)
    assert (found["image_size"], found["crop_scale"]) == (224, [0.08, 1.0])
    assert (found["backbone_config"]["hidden_size"], found["backbone_config"]["patch_size"]) == (384, 16)
    assert (found["num_train_epochs"], found["warmup_epochs"]) == (500, 40.0)
    assert found["base_learning_rate"] == 1.5e-4
    assert (found["head_hidden_size"], found["projection_dim"]) == (4096, 256)
    assert found["mixed_precision"] == "fp16"
    assert "blur_probability_1" not in found
    assert "cache_images_on_device" not in found
    assert found["knn_steps"] is None


def test_imagenet_on_many_gpus_is_the_published_schedule():
    found = values(num_images=1_281_167, short_side=375, num_processes=64, **H200)
    assert (found["num_train_epochs"], found["warmup_epochs"]) == (100, 10.0)
    assert found["train_batch_size"] == 4096
    assert found["ema_decay"] == 0.99


@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", None), ("large", 1024)])
def test_sizes_on_a_gpu(size, width):
    found = values(num_images=100_000, short_side=480, size=size, **H200)["backbone_config"]
    assert found.get("hidden_size") == width  # ViT-B is the default of the configuration


@pytest.mark.parametrize(("size", "width"), [(None, 128), ("base", 192), ("large", 384)])
def test_sizes_on_a_cpu(size, width):
    assert values(num_images=1000, short_side=480, size=size, **LAPTOP)["backbone_config"]["hidden_size"] == width


@pytest.mark.parametrize(
    ("side", "size"), [(8, 32), (40, 32), (41, 64), (100, 96), (200, 160), (201, 224), (4000, 224)]
)
def test_views_are_as_large_as_the_images(side, size):
    assert values(num_images=1000, short_side=side, **H200)["image_size"] == size
    assert values(num_images=1000, short_side=side, **LAPTOP)["image_size"] == min(size, 64)


def test_the_batch_fits_the_data_and_the_processes():
    assert values(num_images=40, short_side=32, **LAPTOP)["train_batch_size"] == 16
    for number in (1000, 100_000, 10_000_000):
        batch = values(num_images=number, short_side=224, num_processes=6, **H200)["train_batch_size"]
        assert batch % 6 == 0
        assert batch <= number


def test_what_is_given_is_kept_and_the_rest_follows():
    given = {"train_batch_size": 512, "num_train_epochs": 30, "image_size": 64, "weight_decay": 0.0}
    found = choose(Facts(num_images=5000, short_side=480, **LAPTOP), given)
    rows = {row.option: row for row in found.rows}
    assert {name: rows[name].value for name in given} == given
    assert {rows[name].reason for name in given} == {"given"}
    assert rows["warmup_epochs"].value == 3.0
    assert rows["ema_decay"].value == round(1 - 20 / (30 * (5000 // 512)), 3)
    assert "0.008 for 512 images" in rows["base_learning_rate"].reason
    assert (
        values({"per_device_train_batch_size": 8}, num_images=100, short_side=32)["per_device_train_batch_size"] == 8
    )
    merged = values({"backbone_config": {"patch_size": 4}}, num_images=100, short_side=32, **LAPTOP)["backbone_config"]
    assert (merged["patch_size"], merged["hidden_size"]) == (4, 128)


def test_a_given_resnet_gets_its_published_options():
    found = values({"backbone_config": {"model_type": "resnet"}}, num_images=10_000, short_side=224, **H200)
    assert (found["optimizer"], found["temperature"], found["num_projector_layers"]) == ("lars", 1.0, 2)
    assert found["backbone_config"] == {"model_type": "resnet"}


def test_memory_that_is_too_small_for_the_batch():
    facts = Facts(num_images=1_281_167, short_side=375, **T4)
    choices = choose(facts)
    assert choices.values()["train_batch_size"] == 4096
    fit_memory(choices, facts, {})
    row = choices.rows[-1]
    assert row.option == "gradient_cache_chunk_size"
    assert row.value in (32, 64, 128)
    roomy = Facts(num_images=10_000, short_side=32, **H200)
    choices = choose(roomy)
    fit_memory(choices, roomy, {})
    assert "gradient_cache_chunk_size" not in choices.values()


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [("90s", 90), ("30m", 1800), ("8h", 28800), ("1h30m", 5400), ("1d 12h", 129600), ("0.5h", 1800)],
)
def test_budgets(budget, seconds):
    assert seconds_of(budget) == seconds


@pytest.mark.parametrize("budget", ["", "8", "8 hours", "-3h", "h", "8h later", "0m", "nan", "3y"])
def test_malformed_budgets(budget):
    with pytest.raises(UsageError, match="--time_budget takes a duration such as 30m, 8h or 1d12h, got"):
        seconds_of(budget)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three classes without splits."""
    folder = tmp_path_factory.mktemp("classes") / "photos of mine"
    for index in range(30):
        path = folder / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (80 * (index % 3), 8 * index, 99)).save(path)
    return folder


SHORT = ["--max_steps", "2", "--logging_steps", "1", "--backbone_config", str(NANO).replace("'", '"')]


@pytest.mark.filterwarnings("ignore:skipped k")
def test_one_argument_is_a_run_and_its_next_commands_work(classes, tmp_path, monkeypatch, capsys, fresh):
    monkeypatch.chdir(tmp_path)
    main([str(classes), *SHORT])
    printed = capsys.readouterr()
    assert "no --recipe: chosen for these images and this machine" in printed.err
    assert re.search(r"max_steps +2 +given", printed.err)
    folder = tmp_path / "runs" / "photos_of_mine"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["image_size"], recipe["knn_train_split"], recipe["knn_test_split"]) == (32, "train", "train")
    assert len(run_folder.read_run_folder(folder).knn) == 1  # of a held-out fifth of each class
    commands = [line.strip() for line in printed.out.partition("\nnext\n")[2].splitlines()]
    assert [command.split()[1] for command in commands] == ["knn", "linear-probe"]
    for command in commands:
        short = ["--num_train_epochs", "1"] if "linear-probe" in command else []
        mocov3_cli.main([*shlex.split(command)[1:], *short])
    assert "knn10_top1" in str((folder / "results.json").read_text())
    # The recipe is the run.
    fresh()
    main([str(classes), "--recipe", str(folder / "recipe.yaml"), "--output_dir", "again"])
    assert_same_run(folder, tmp_path / "again")
    # And a run that is cut short continues with it, not with a new choice.
    fresh()
    shutil.rmtree(folder / "checkpoint-2")
    main([str(classes), *SHORT, "--resume_from_checkpoint", "auto"])
    assert "no --recipe" not in capsys.readouterr().err


def test_images_without_labels(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(pictures), *SHORT, "--output_dir", "mine"])
    printed = capsys.readouterr()
    assert re.search(r"knn_steps +null +folder .* holds images without labels: no kNN", printed.err)
    (command,) = [line.strip() for line in printed.out.partition("\nnext\n")[2].splitlines()]
    assert command.startswith("mocov3 extract --images")
    mocov3_cli.main(shlex.split(command)[1:])
    assert (tmp_path / "mine" / "features.safetensors").exists()


def test_the_plan_of_a_dry_run(classes, capsys):
    main([str(classes), "--dry_run", "--size", "base", "--time_budget", "1h"])
    printed = capsys.readouterr()
    assert "ViT-tiny, --size base" in printed.err or "ViT-B, --size base" in printed.err
    assert "--time_budget is measured when the run starts" in printed.err
    assert "estimated memory" in printed.out


def test_a_time_budget_sets_the_length_and_what_follows(classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(automatic, "seconds_per_step", lambda *_: (10.0, 20.0))
    chosen, batch = [], ["--train_batch_size", "16"]
    monkeypatch.setattr("mocov3_hf.pretraining.loop.run_recipe", lambda recipe, *_, **__: chosen.append(recipe))
    main([str(classes), "--output_dir", str(tmp_path), "--time_budget", "1h"])
    options = chosen[0].optimization
    steps = int((3600 - 20) * 0.8 / 10)
    assert abs(options.num_train_epochs - steps) <= 1  # of one step each
    assert options.warmup_epochs == pytest.approx(options.num_train_epochs / 10)
    assert options.ema_decay == pytest.approx(1 - 20 / steps, abs=1e-3)
    assert options.time_budget is None
    assert "what 1h affords" in capsys.readouterr().err
    main([str(classes), "--output_dir", str(tmp_path), "--time_budget", "1h", "--recipe", "quickstart", *batch])
    options = chosen[1].optimization
    assert options.max_steps is None
    assert options.warmup_epochs / options.num_train_epochs == pytest.approx(4 / 36)


@pytest.mark.slow
def test_steps_of_a_trial_leave_nothing_behind(classes, tmp_path, capsys):
    main([str(classes), *SHORT[2:], "--output_dir", str(tmp_path / "run"), "--time_budget", "40s"])
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["num_train_epochs"] > 1
    line = error_of(capsys, [str(classes), *SHORT[2:], "--output_dir", str(tmp_path / "two"), "--time_budget", "0.1s"])
    assert re.search(r"--time_budget 0.1s is too short: starting takes about \d+ s and a step .* s; pass at least", line)


def test_a_step_that_runs_out_of_memory_is_halved(classes, tmp_path, monkeypatch, capsys):
    tried = []

    def step(recipe, *_):
        tried.append(recipe.hardware.gradient_cache_chunk_size)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0, 1.0

    monkeypatch.setattr(automatic, "seconds_per_step", step)
    facts = Facts(num_images=30, short_side=36, **H200)
    monkeypatch.setattr(automatic, "look_at", lambda *_: facts)
    recipe = automatic.automatic_recipe({"dataset_name": str(classes), "output_dir": str(tmp_path)})
    assert tried == [None, 8, 4]
    assert recipe.hardware.gradient_cache_chunk_size == 4
    assert "a real step with more images in a pass ran out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to learn from: pass a folder of images or a Hub id"),
        (["{few}"], "the data set has 3 images, too few to learn from: pass at least 16"),
        (["{videos}"], "video"),
        (["{classes}", "--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
        (["{classes}", "--time_budget", "soon"], "--time_budget takes a duration"),
        (["{classes}", "--time_budget", "1h", "--max_steps", "3"], "--time_budget sets the length of the run"),
        (["{classes}", "--size", "huge"], "--size takes one of small, base, large, got 'huge'"),
        (["{classes}", "--recipe", "quickstart", "--size", "base"], "--size chooses a backbone where there is no"),
    ],
)
def test_mistakes(arguments, message, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few, videos = tmp_path / "few", tmp_path / "videos"
    few.mkdir()
    videos.mkdir()
    for index in range(3):
        Image.new("RGB", (32, 32)).save(few / f"{index}.png")
        (videos / f"{index}.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    folders = {"few": few, "videos": videos, "classes": classes}
    line = error_of(capsys, [argument.format(**folders) for argument in arguments])
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_the_table_is_readable():
    table = describe_choices(choose(Facts(num_images=1438, short_side=8, **LAPTOP)))
    assert all(len(line) <= 140 for line in table.splitlines())
    assert "{" not in table
