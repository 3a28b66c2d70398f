"""Recipes: the published ones, precedence, types, errors, plans."""

import re

import pytest
import yaml

from mocov3_hf.model.batchnorm_mocov3 import MoCoV3TokenBatchNorm
from mocov3_hf.option_help import help_text
from mocov3_hf.pretraining.build import build_config, check_buildable
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import COMMAND, load_recipe, parse, recipe_of_call
from mocov3_hf.recipe_files import RECIPES, find_recipe, recipe_names
from mocov3_hf.reporting import UsageError


VIT_B = "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k"
# name: (learning rate at 4096, weight decay, EMA decay, temperature, epochs, warm-up, optimizer, smallest crop, clip)
PUBLISHED = {
    "mocov3_resnet50_8xb512-amp-coslr-100e_in1k": (9.6, 1e-6, 0.99, 1.0, 100, 10, "lars", 0.2, None),
    "mocov3_resnet50_8xb512-amp-coslr-300e_in1k": (4.8, 1e-6, 0.99, 1.0, 300, 10, "lars", 0.2, None),
    "mocov3_resnet50_8xb512-amp-coslr-800e_in1k": (4.8, 1.5e-6, 0.996, 1.0, 800, 10, "lars", 0.2, None),
    "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
    VIT_B: (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
    "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, 5.0),
    "mocov3_vit-huge-p14_64xb64-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
    "mocov3_vit-bn-huge-p14_64xb64-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
    "mocov3_vit-bn-large-p7_64xb64-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
}
# Millions of parameters with a classifier for ImageNet-1k, as the paper counts them, and patches of an image.
PAPER = {
    "vit-small-p16": (22, 196),
    "vit-base-p16": (86, 196),
    "vit-large-p16": (304, 196),
    "vit-huge-p14": (632, 256),
    "vit-bn-huge-p14": (632, 256),
    "vit-bn-large-p7": (304, 1024),
}
# Linear evaluation in the paper, where the recipe names no other source first.
LINEAR = {"vit-large-p16": 77.6, "vit-huge-p14": 78.1, "vit-bn-huge-p14": 79.1, "vit-bn-large-p7": 81.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    recipe = load_recipe(name)
    rate, decay, ema_decay, temperature, epochs, warmup, optimizer, crop, clip = PUBLISHED[name]
    options = recipe.optimization
    plan = make_plan(recipe, 1_281_167, 8)
    assert plan.global_batch_size == 4096
    assert plan.learning_rate == pytest.approx(rate)
    assert plan.total_steps == epochs * 312
    assert plan.warmup_steps == warmup * 312
    assert (options.weight_decay, options.ema_decay, options.optimizer, options.max_grad_norm) == (
        decay,
        ema_decay,
        optimizer,
        clip,
    )
    assert recipe.model.temperature == temperature
    assert (recipe.views.image_size, recipe.views.crop_scale) == (224, [crop, 1.0])
    is_vit = optimizer == "adamw"
    assert recipe.model.num_projector_layers == (3 if is_vit else 2)
    assert recipe.model.predictor_final_norm is is_vit
    assert recipe.views.blur_probability_1 == 1.0
    assert recipe.views.blur_probability_2 == 0.1
    assert recipe.views.solarize_probability_1 == 0.0
    assert recipe.views.solarize_probability_2 == 0.2


@pytest.mark.parametrize("name", recipe_names("pretrain"))
def test_every_recipe_has_a_model(name):
    config = build_config(load_recipe(name))
    model = check_buildable(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000
    backbone = next((short for short in PAPER if f"_{short}_" in name), None)
    assert (backbone is None) is not name.startswith("mocov3_vit-")
    if backbone is None:
        return
    millions, patches = PAPER[backbone]
    classifier = 1000 * (config.hidden_size + 1)
    assert (sum(p.numel() for p in model.mocov3.parameters()) + classifier) // 10**6 == millions
    embeddings = model.mocov3.backbone.embeddings
    assert embeddings.grid[0] * embeddings.grid[1] == patches
    assert not any(parameter.requires_grad for parameter in embeddings.patch_embeddings.parameters())
    norms = [layer.norm2 for layer in model.mocov3.backbone.encoder.layer]
    assert all(isinstance(norm, MoCoV3TokenBatchNorm) is backbone.startswith("vit-bn-") for norm in norms)


@pytest.mark.parametrize("backbone", LINEAR)
def test_the_accuracies_of_the_paper_are_named(backbone):
    text = find_recipe(backbone).read_text(encoding="utf-8").replace("\n# ", " ")
    assert f"{LINEAR[backbone]} % " in text.partition("Expected: ")[2]
    assert "by linear evaluation in the paper" in text


@pytest.mark.parametrize("name", recipe_names("pretrain"))
def test_every_recipe_begins_with_command_cost_and_expectation(name):
    head = "".join(line for line in (RECIPES / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#"))
    first = head.splitlines()[0]
    assert re.match(
        r"# (mocov3|accelerate launch .*-m mocov3_hf) pretrain .*--recipe " + re.escape(name) + r"\b", first
    )
    assert " --output_dir runs/" in first
    assert "# Cost: " in head
    assert "# Expected: " in head
    assert "TODO" not in head


def test_precedence_and_merging():
    recipe = load_recipe(VIT_B, ["--temperature", "0.5", "--backbone_config", '{"num_hidden_layers": 6}'])
    assert recipe.model.temperature == 0.5  # command line over file
    assert recipe.optimization.warmup_epochs == 40  # file over default
    assert recipe.optimization.adam_beta2 == 0.999  # default
    assert recipe.model.backbone_config["num_hidden_layers"] == 6
    assert recipe.model.backbone_config["patch_size"] == 16
    other = load_recipe(VIT_B, ["--backbone_config", '{"model_type": "dinov2"}'])
    assert other.model.backbone_config == {"model_type": "dinov2"}


def test_values_have_types(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base_learning_rate: 1e-4\nseed: 3\npredictor_final_norm: false\nblur_sigma: [1, 2]\n")
    recipe = load_recipe(str(file), ["--report_to", "tensorboard", "wandb", "--max_steps=7"])
    assert recipe.optimization.base_learning_rate == 1e-4  # YAML itself reads 1e-4 as a string
    assert recipe.run.seed == 3
    assert recipe.model.predictor_final_norm is False
    assert recipe.views.blur_sigma == [1.0, 2.0]
    assert recipe.monitoring.report_to == ["tensorboard", "wandb"]
    assert recipe.optimization.max_steps == 7


@pytest.mark.parametrize("name", recipe_names("pretrain"))
def test_resolved_recipe_reloads_to_itself(tmp_path, name):
    recipe = load_recipe(name, ["--seed", "5", "--max_grad_norm", "1.5", "--no_zero_init_residual"])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_recipes_are_frozen():
    with pytest.raises(AttributeError):
        load_recipe(VIT_B).run.seed = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temprature", "1"], "there is no option '--temprature'; did you mean '--temperature'?"),
        (["--temperature", "warm"], "--temperature takes one finite number, got 'warm'"),
        (["--seed", "1.5"], "--seed takes one integer, got '1.5'"),
        (["--optimizer", "sgd"], "--optimizer takes one of adamw, lars, got 'sgd'"),
        (["--backbone_config", "{oops"], "--backbone_config takes a mapping (JSON on the command line), got '{oops'"),
        (["--flip_probability", "2"], "--flip_probability must be at least 0 and at most 1, got 2.0"),
        (["--crop_scale", "0.5", "0.2"], "crop_scale takes two positive numbers, the smaller first, got [0.5, 0.2]"),
        (["--crop_scale", "0.5"], "crop_scale takes two positive numbers"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--ema_decay", "1.2"], "--ema_decay must be at least 0 and at most 1, got 1.2"),
        (["--base_learning_rate", "nan"], "--base_learning_rate takes one finite number, got 'nan'"),
        (["--image_size", "[32, 64]"], "--image_size takes one integer, got"),
        (["--spike_factor", "1"], "--spike_factor must be above 1"),
        (["--weight_decay", "-1"], "--weight_decay must be at least 0, got -1.0"),
    ],
)
def test_command_line_mistakes(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_recipe("quickstart", arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 1", "mine.yaml: there is no option 'temprature'; did you mean 'temperature'?"),
        ("seed: many", "mine.yaml: seed takes one integer, got 'many'"),
        ("- a list", "must hold a mapping of options, got a list"),
        ("seed: [1", "mine.yaml cannot be read as a recipe"),
        ("image_size: [32, 64]", "mine.yaml: image_size takes one integer, got [32, 64]"),
        ("seed: 1\nseed: 2", "the key 'seed' occurs twice"),
    ],
)
def test_file_mistakes(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_wrong_recipe_name_offers_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k'"):
        find_recipe("mocov3_vit-small-p16_16xb256-amp")
    with pytest.raises(UsageError, match=r"recipe file 'missing\.yaml' does not exist"):
        find_recipe("missing.yaml")


def test_per_device_batch_scales_the_learning_rate():
    recipe = load_recipe(VIT_B, ["--per_device_train_batch_size", "64"])
    plan = make_plan(recipe, 10_000, 4)
    assert (plan.global_batch_size, plan.batch_size, plan.steps_per_epoch) == (256, 64, 39)
    assert plan.learning_rate == pytest.approx(1.5e-4)
    fixed = load_recipe(VIT_B, ["--per_device_train_batch_size", "64", "--learning_rate", "0.1"])
    assert make_plan(fixed, 10_000, 4).learning_rate == 0.1


def test_max_steps_keeps_the_fraction_of_the_warmup():
    plan = make_plan(load_recipe(VIT_B, ["--max_steps", "300"]), 1_281_167, 8)
    assert (plan.total_steps, plan.warmup_steps) == (300, 40)


@pytest.mark.parametrize(
    ("arguments", "num_images", "num_processes", "message"),
    [
        (["--train_batch_size", "100"], 1000, 3, "a global batch of 100 images cannot be shared by 3 processes"),
        (["--train_batch_size", "1"], 1000, 1, "cannot train on a batch of 1"),
        (["--per_device_train_batch_size", "1"], 1000, 1, "cannot train on a batch of 1"),
        (["--train_batch_size", "64"], 50, 1, "50 images, fewer than one global batch of 64"),
    ],
)
def test_plans_refuse_what_cannot_work(arguments, num_images, num_processes, message):
    with pytest.raises(UsageError, match=message):
        make_plan(load_recipe("quickstart", arguments), num_images, num_processes)


def test_help_documents_every_option():
    text = help_text(COMMAND, everything=True)
    for name in load_recipe("quickstart").to_dict():
        assert text.count(f"\n  --{name} ") == 1, name
    short = help_text(COMMAND)
    assert len(short.splitlines()) < 150
    for section in (
        "Data:",
        "Views:",
        "Model:",
        "Optimization:",
        "Hardware and speed:",
        "Run:",
        "Monitoring:",
        "Hub:",
    ):
        assert f"\n{section}\n" in short


RENAMED = {"momentum": "ema_decay", "momentum_schedule": "ema_schedule", "model_name_or_path": "model"}
OLD_VALUES = {"momentum": "0.5", "momentum_schedule": "constant", "model_name_or_path": "some/model"}


@pytest.mark.parametrize("old", RENAMED)
def test_old_spellings(old, tmp_path, capsys):
    new, value = RENAMED[old], OLD_VALUES[old]
    expected = load_recipe("quickstart", [f"--{new}", value])
    assert capsys.readouterr().err == ""
    assert load_recipe("quickstart", [f"--{old}", value]) == expected
    assert capsys.readouterr().err == f"warning: --{old} is deprecated: use --{new}\n"
    saved = expected.to_dict()
    saved[old] = saved.pop(new)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    assert load_recipe(tmp_path / "recipe.yaml") == expected
    assert capsys.readouterr().err == "", "a run of an earlier version resumes silently"


def test_the_data_set_may_stand_without_its_name():
    recipe = parse(["path/to/images", "--recipe", "quickstart", "--output_dir", "runs/first"])
    assert recipe.data.dataset_name == "path/to/images"


def test_recipes_of_python_calls():
    options = {"seed": 3, "torch_compile": True, "crop_scale": [0.5, 1.0], "save_total_limit": None}
    backbone = {"backbone_config": {"num_hidden_layers": 2}}
    arguments = ["--seed", "3", "--torch_compile", "--crop_scale", "0.5", "1", "--save_total_limit", "null"]
    expected = load_recipe("quickstart", [*arguments, "--backbone_config", '{"num_hidden_layers": 2}'])
    assert recipe_of_call("quickstart", options | backbone) == expected
    for wrong, message in {
        "sede": "pretrain(): there is no option 'sede'; did you mean 'seed'?",
        "seed": "pretrain(): seed takes one integer, got 'x'",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            recipe_of_call("quickstart", {wrong: "x"})
