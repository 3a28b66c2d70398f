"""The automatic plan: rules on facts, a run without a recipe, and the mistakes of users."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig

import mocov3_cli
from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3ViTConfig, api
from mocov3_hf.pretraining import probe
from mocov3_hf.pretraining.auto import GIB, Facts, MemoryModel, choose
from mocov3_hf.pretraining.facts import look, memory_model
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe, resolve
from mocov3_hf.reporting import UsageError


LAPTOP = Facts(5_000, side=32, num_cores=4, num_workers=1, precision_reason="this CPU has no bfloat16")
T4 = Facts(100_000, side=375, device="cuda", memory_bytes=16 * GIB, precision="fp16", num_workers=7, num_cores=8)
H200 = Facts(1_281_167, side=375, device="cuda", memory_bytes=140 * GIB, precision="bf16", num_cores=16)
MANY = dataclasses.replace(H200, num_processes=64)
SMALL = MemoryModel(fixed=GIB // 10, per_image=2**16, per_image_in_backbone=2**20)
VIT_S = MemoryModel(fixed=GIB, per_image=2**20, per_image_in_backbone=80 * 2**20)
RESNET = MemoryModel(fixed=GIB, per_image=0, per_image_in_backbone=2**24, can_chunk=False)


def plan(facts, given=(), memory=SMALL, size=None):
    return {choice.option: choice for choice in choose(facts, dict(given), lambda values: memory, size)}


def values(*arguments, **options):
    return {option: choice.value for option, choice in plan(*arguments, **options).items()}


def test_a_small_vit_for_small_images_on_a_cpu():
    chosen = values(LAPTOP)
    assert chosen["backbone_config"]["hidden_size"] == 128
    assert chosen["backbone_config"]["patch_size"] == 8
    assert (chosen["image_size"], chosen["crop_scale"], chosen["blur_probability_1"]) == (32, [0.2, 1.0], 0.0)
    assert (chosen["train_batch_size"], chosen["gradient_cache_chunk_size"]) == (64, None)
    assert chosen["num_train_epochs"] == 40
    assert chosen["warmup_epochs"] == 4.0
    assert chosen["ema_decay"] == 0.9
    assert chosen["knn_steps"] is None
    assert (chosen["mixed_precision"], chosen["dataloader_num_workers"]) == ("no", 1)


def test_a_gradient_cache_where_the_batch_exceeds_a_t4():
    chosen = values(T4, memory=VIT_S)
    assert chosen["backbone_config"]["hidden_size"] == 384
    assert chosen["image_size"] == 224
    assert chosen["crop_scale"] == [0.08, 1.0]
    assert chosen["mixed_precision"] == "fp16"
    chunk, batch = chosen["gradient_cache_chunk_size"], chosen["train_batch_size"]
    assert batch == 512
    assert batch % chunk == 0
    assert VIT_S.needed(batch, chunk) <= 0.7 * 16 * GIB < VIT_S.needed(batch, 2 * chunk)
    assert chosen["num_train_epochs"] * (100_000 // 512) * 512 == pytest.approx(40e6, rel=0.01)
    assert chosen["ema_decay"] == 0.99


def test_batch_norm_gets_a_smaller_batch_instead():
    facts = dataclasses.replace(T4, num_images=50_000, side=32)
    chosen = values(facts, memory=RESNET)
    assert chosen["backbone_config"]["model_type"] == "resnet"
    assert chosen["optimizer"] == "lars"
    assert (chosen["train_batch_size"], chosen["gradient_cache_chunk_size"]) == (512, None)
    assert chosen["image_size"] == 64
    assert chosen["cache_images_on_device"] is True


def test_the_recipe_of_the_paper_for_imagenet():
    chosen = values(H200, memory=VIT_S)
    backbone = chosen["backbone_config"]
    assert (backbone["hidden_size"], backbone["patch_size"], backbone["num_attention_heads"]) == (768, 16, 12)
    assert (chosen["train_batch_size"], chosen["base_learning_rate"], chosen["weight_decay"]) == (4096, 1.5e-4, 0.1)
    assert (chosen["head_hidden_size"], chosen["projection_dim"], chosen["temperature"]) == (4096, 256, 0.2)
    assert (chosen["num_train_epochs"], chosen["warmup_epochs"], chosen["ema_decay"]) == (100, 10.0, 0.99)


def test_64_processes_share_the_batch():
    assert values(MANY, memory=VIT_S)["train_batch_size"] == 4096
    assert values(MANY, memory=VIT_S)["gradient_cache_chunk_size"] is None
    few = plan(dataclasses.replace(MANY, num_images=300, side=64), memory=SMALL)["train_batch_size"]
    assert few.value == 128
    assert few.reason.startswith("2 for each of 64 processes")
    three = values(dataclasses.replace(LAPTOP, num_processes=3))["train_batch_size"]
    assert three == 63


def test_what_is_given_decides_and_the_later_rules_see_it():
    chosen = plan(LAPTOP, {"image_size": 16, "train_batch_size": 128, "max_steps": 20_000})
    assert (chosen["image_size"].value, chosen["image_size"].reason) == (16, "given")
    assert chosen["backbone_config"].value["patch_size"] == 4
    assert chosen["num_train_epochs"].value == 513  # of 39 steps
    assert chosen["ema_decay"].value == 0.99
    own = plan(LAPTOP, {"backbone_config": {"model_type": "resnet"}})
    assert own["backbone_config"].reason == "given"
    assert own["optimizer"].value == "lars"
    assert values(LAPTOP, {"per_device_train_batch_size": 32})["train_batch_size"] == 32


@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", 768), ("large", 1024)])
def test_size_is_that_of_the_vit(size, width):
    chosen = values(LAPTOP, size=size)
    assert chosen["backbone_config"]["hidden_size"] == width
    assert chosen["head_hidden_size"] == 4096


def test_characters_are_not_flipped_and_many_channels_not_made_gray():
    digits = values(dataclasses.replace(LAPTOP, is_grayscale=True))
    assert (digits["crop_scale"], digits["flip_probability"], digits["blur_sigma"]) == ([0.4, 1.0], 0.0, [0.1, 2.0])
    bands = values(dataclasses.replace(LAPTOP, num_channels=5, side=16))
    assert bands["grayscale_probability"] == 0.0
    assert bands["crop_scale"] == [0.39, 1.0]
    assert "flip_probability" not in bands
    assert bands["blur_sigma"] == [0.1, 1.0]


def test_knn_where_labels_are_and_at_most_a_tenth_of_the_time():
    labeled = dataclasses.replace(LAPTOP, num_classes=10, knn_splits=("train", "test"), num_labeled=6_000)
    chosen = values(labeled)
    assert (chosen["knn_steps"], chosen["knn_test_split"], chosen["knn_k"]) == (312, "test", 20)
    many = values(dataclasses.replace(labeled, num_labeled=80_000))
    assert many["knn_steps"] == 3120 // 1  # once
    assert plan(dataclasses.replace(LAPTOP, num_classes=1))["knn_steps"].reason == "the images have a single class"


def test_a_time_budget_sets_the_length_up_to_1000_epochs():
    short = values(dataclasses.replace(LAPTOP, steps_in_budget=200))
    assert (short["max_steps"], short["num_train_epochs"]) == (200, 3)
    assert short["warmup_epochs"] == 0.3
    long = plan(dataclasses.replace(LAPTOP, steps_in_budget=10**9))
    assert long["num_train_epochs"].value == 1000
    assert "less than the budget" in long["max_steps"].reason


def test_too_few_images_and_too_little_memory():
    with pytest.raises(UsageError, match=r"^3 images are too few to learn from: .* at least 16, better thousands$"):
        plan(dataclasses.replace(LAPTOP, num_images=3))
    with pytest.raises(
        UsageError, match=r"^a batch of 2 images needs 1\.2 GiB, and cpu has 1 GiB: pass a smaller --size"
    ):
        plan(dataclasses.replace(LAPTOP, memory_bytes=GIB), memory=VIT_S)


def test_the_table_has_a_reason_in_every_row():
    choices = choose(LAPTOP, {}, lambda values: SMALL)
    assert all(choice.reason for choice in choices)
    lines = probe.table(LAPTOP, choices).splitlines()
    assert lines[0] == "plan for 5,000 images of 32 pixels, 3 channels, on cpu with 8 GiB, 1 process:"
    assert len(lines) == len(choices) + 1
    assert re.search(r"^  image_size +32 +the shorter side of the images is 32 pixels", "\n".join(lines), re.MULTILINE)


def test_the_memory_model_is_the_estimate():
    from mocov3_hf.pretraining.build import build_config
    from mocov3_hf.pretraining.estimate import estimate

    chosen = values(LAPTOP)
    model, config = memory_model(chosen), build_config(resolve({}, chosen))
    for chunk in (None, 8):
        expected = estimate(config, 32, 64, "adamw", "no", chunk).memory_bytes
        # Of chunks, heads and backbone are added, while the estimate takes the larger one.
        assert expected * 0.98 < model.needed(64, chunk) < expected * (1.03 if chunk is None else 1.15)
    assert model.can_chunk


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h", 28_800), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5 h", 5400), ("2d", 172_800)],
)
def test_time_budgets(text, seconds):
    assert probe.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["8", "h", "", "8 hours", "-1h", "0s", "1h 30", "1e3s", "inf"])
def test_budgets_that_are_no_time(text):
    with pytest.raises(UsageError, match="--time_budget takes a time such as 8h, 90m or 1h30m"):
        probe.seconds_of(text)


# Runs


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two class folders without a split, of 15 images each."""
    folder = tmp_path_factory.mktemp("data") / "my images"
    write_images(folder, {"cat": 15, "dog": 15})
    return folder


def write_images(folder, counts):
    """Noise around a brightness of each class, 40 pixels high."""
    draw = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 60, (40, 48, 3)) + 180 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


SHORT = ["--max_steps", "3", "--head_hidden_size", "32"]


def error_of(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in captured.err
    return captured.err.rstrip("\n").splitlines()[-1]


def test_facts_of_folders(classes, pictures):
    facts, _ = look({"dataset_name": str(classes)})
    assert (facts.num_images, facts.side, facts.num_channels, facts.num_classes) == (30, 40, 3, 2)
    assert facts.knn_splits == ("train", "train")
    assert facts.num_labeled == 30
    facts, _ = look({"dataset_name": str(pictures)})
    assert (facts.num_images, facts.num_classes, facts.knn_splits) == (24, 0, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:skipped k")
def test_one_line_and_every_printed_command_runs(classes, tmp_path, capsys, monkeypatch, fresh):
    monkeypatch.chdir(tmp_path)
    api.pretrain_command([str(classes), "--output_dir", "my run", *SHORT])
    printed = capsys.readouterr().out
    assert "head_hidden_size" in printed
    assert "given" in printed
    assert "report: my run/report.html" in printed
    assert (tmp_path / "my run" / "report.html").exists()
    assert (tmp_path / "my run" / "knn.jsonl").exists()
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  mocov3 ")]
    assert [command[1] for command in commands] == ["report", "knn", "linear-probe"]
    for command in commands:
        fresh()
        mocov3_cli.main(command[1:])
    # The saved recipe is the same run.
    fresh()
    main(["--recipe", "my run/recipe.yaml", "--output_dir", "again"])
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("my run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (load_recipe(tmp_path / run / "recipe.yaml").to_dict() for run in ("my run", "again"))
    assert {**one, "output_dir": None} == {**two, "output_dir": None}


def test_without_labels_the_next_command_extracts_features(tmp_path, capsys, monkeypatch, fresh):
    write_images(tmp_path / "images", {"": 36})
    monkeypatch.chdir(tmp_path)
    main(["images", *SHORT])
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  mocov3 ")]
    assert [command[1] for command in commands] == ["report", "extract"]
    fresh()
    mocov3_cli.main(commands[1][1:])
    features = load_file(tmp_path / "runs" / "images" / "features" / "features-00000.safetensors")
    assert features["features"].shape[0] == 36


@pytest.mark.slow
def test_a_resumed_run_keeps_its_plan(classes, tmp_path, capsys, monkeypatch, fresh):
    monkeypatch.setattr(probe, "steps_within", lambda *_: 12)
    monkeypatch.setattr(probe, "memory_model", lambda _: SMALL)
    arguments = [str(classes), "--output_dir", str(tmp_path), *SHORT[2:], "--time_budget", "1h", "--knn_steps", "99"]
    main(arguments)
    assert load_recipe(tmp_path / "recipe.yaml").optimization.max_steps == 12
    monkeypatch.setattr(probe, "steps_within", lambda *_: 99)
    fresh()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert "all 12 steps are done" in capsys.readouterr().out


def test_a_time_budget_with_a_recipe_keeps_the_rest_of_it(classes, monkeypatch):
    monkeypatch.setattr(probe, "timed_steps", lambda *_: (0.9, 100.0))
    monkeypatch.setattr(probe.time, "time", lambda: 0.0)
    given = {"recipe": "quickstart", "dataset_name": str(classes), "train_batch_size": 8, "time_budget": "20d"}
    recipe = probe.automatic_recipe(given, 0.0)
    assert recipe.optimization.max_steps == 1_727_900  # 20 days less 100 s, of which a tenth is kept in reserve
    expected = resolve("quickstart", {name: given[name] for name in ("dataset_name", "train_batch_size")}).to_dict()
    assert recipe.to_dict() == {**expected, "max_steps": 1_727_900}


def test_dry_run_prints_the_plan_and_makes_no_step(classes, capsys, monkeypatch):
    monkeypatch.setattr(probe, "timed_steps", lambda *_: pytest.fail("a step"))
    main([str(classes), "--dry_run"])
    printed = capsys.readouterr().out
    assert printed.startswith("plan for 30 images of 40 pixels, 3 channels, 2 classes, on cpu")
    assert "warmup steps" in printed


def test_the_plan_of_a_model_has_its_architecture(classes, tmp_path, capsys):
    config = MoCoV3ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=80,
        mlp_norm="batch_norm",
    )
    MoCoV3Config(backbone_config=config, head_hidden_size=24, projection_dim=6).save_pretrained(tmp_path / "bn")
    main([str(classes), "--model", str(tmp_path / "bn"), "--dry_run"])
    printed = capsys.readouterr().out
    given = {"backbone_config": config, "head_hidden_size": 24, "projection_dim": 6}
    parameters = sum(value.numel() for value in MoCoV3ForPreTraining(MoCoV3Config(**given)).parameters())
    assert f"parameters (whole model) {parameters:,}" in re.sub(" +", " ", printed)
    assert "mlp_norm: batch_norm" in printed
    ViTConfig().save_pretrained(tmp_path / "vit")
    line = error_of(capsys, [str(classes), "--model", str(tmp_path / "vit"), "--dry_run"])
    assert "is a 'vit' model: pass a MoCo v3 pre-training model" in line


def test_out_of_memory_halves_what_is_kept_at_once(classes, monkeypatch):
    tried = []

    def step(recipe, *_):
        tried.append((recipe.optimization.train_batch_size, recipe.hardware.gradient_cache_chunk_size))
        if (tried[-1][1] or tried[-1][0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0, 0.0

    monkeypatch.setattr(probe, "timed_steps", step)
    monkeypatch.setattr(probe, "memory_model", lambda _: SMALL)
    given = {"dataset_name": str(classes), "output_dir": "unused", "max_steps": 3}
    recipe = probe.automatic_recipe(given, 0.0)
    assert tried == [(4, None), (4, 2)]
    assert recipe.hardware.gradient_cache_chunk_size == 2
    tried.clear()
    monkeypatch.setattr(probe, "memory_model", lambda _: RESNET)
    recipe = probe.automatic_recipe(
        {
            **given,
            "backbone_config": {"model_type": "resnet", "depths": [1], "hidden_sizes": [8], "embedding_size": 8},
        },
        0.0,
    )
    assert tried == [(4, None), (2, None)]
    assert recipe.optimization.train_batch_size == 2
    monkeypatch.setattr(probe, "memory_model", lambda _: SMALL)
    with pytest.raises(UsageError, match="runs out of memory: pass a smaller --gradient_cache_chunk_size"):
        probe.automatic_recipe({**given, "gradient_cache_chunk_size": 4}, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{three}"], "error: 3 images are too few to learn from"),
        (["{videos}"], "error: no images, parquet files or tars found in"),
        (["{classes}", "--time_budget", "1s"], "--time_budget 1s is too short: starting takes"),
        (
            ["{classes}", "--time_budget", "soon"],
            "--time_budget takes a time such as 8h, 90m or 1h30m (d, h, m, s), got",
        ),
        (["{classes}", "--time_budget", "1h", "--max_steps", "3"], "both set the length of the schedule: pass one"),
        (["{classes}", "--size", "huge"], "--size takes one of nano, tiny, small, base, large, got 'huge'"),
        (["{classes}", "--size", "base", "--recipe", "quickstart"], "--size and --recipe both choose the backbone"),
        (["{classes}", "--recipe", "{videos}/recipe.yaml"], "recipe: time_budget is an option of the command line"),
    ],
)
def test_mistakes_in_one_line(capsys, tmp_path, classes, arguments, message):
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (tmp_path / "recipe.yaml").write_text("command: pretrain\ntime_budget: 8h\n")
    if "{three}" in arguments:
        write_images(tmp_path / "three", {"": 3})
    names = {"{three}": str(tmp_path / "three"), "{videos}": str(tmp_path), "{classes}": str(classes)}
    for word, path in names.items():
        arguments = [argument.replace(word, path) for argument in arguments]
    assert message in error_of(capsys, [*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("options", [[], ["--recipe", "quickstart", "--time_budget", "1h"]])
def test_a_folder_in_use_is_refused_before_anything_is_tried(capsys, tmp_path, classes, monkeypatch, options):
    monkeypatch.setattr(probe, "look", lambda _: pytest.fail("the images are opened"))
    monkeypatch.setattr(probe, "timed_steps", lambda *_: pytest.fail("a step"))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    message = error_of(capsys, [str(classes), *options, "--output_dir", str(tmp_path)])
    assert message.startswith(f"error: {tmp_path} already holds a run: pass --resume_from_checkpoint auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine on a GPU")
def test_fp16_without_a_gpu(capsys, tmp_path, classes):
    message = error_of(capsys, [str(classes), "--mixed_precision", "fp16", "--output_dir", str(tmp_path / "out")])
    assert message == "error: --mixed_precision fp16 needs a GPU: use auto, bf16 or no on this machine"


def test_a_single_class_trains_without_knn(tmp_path):
    write_images(tmp_path / "data", {"cat": 36})
    facts, _ = look({"dataset_name": str(tmp_path / "data")})
    assert (facts.num_classes, facts.knn_splits) == (1, None)
