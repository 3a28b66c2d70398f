"""Recipes: the published ones, precedence, types, errors, plans."""

import re

import pytest

from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.recipe import RECIPES, UsageError, find_recipe, load_recipe, recipe_help, recipe_names


VIT_B = "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k"
# name: (learning rate at 4096, weight decay, momentum, temperature, epochs, warm-up, optimizer, smallest crop, clip)
PUBLISHED = {
    "mocov3_resnet50_8xb512-amp-coslr-100e_in1k": (9.6, 1e-6, 0.99, 1.0, 100, 10, "lars", 0.2, None),
    "mocov3_resnet50_8xb512-amp-coslr-300e_in1k": (4.8, 1e-6, 0.99, 1.0, 300, 10, "lars", 0.2, None),
    "mocov3_resnet50_8xb512-amp-coslr-800e_in1k": (4.8, 1.5e-6, 0.996, 1.0, 800, 10, "lars", 0.2, None),
    "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
    VIT_B: (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, None),
    "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k": (2.4e-3, 0.1, 0.99, 0.2, 300, 40, "adamw", 0.08, 5.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    recipe = load_recipe(name)
    rate, decay, momentum, temperature, epochs, warmup, optimizer, crop, clip = PUBLISHED[name]
    options = recipe.optimization
    plan = make_plan(recipe, 1_281_167, 8)
    assert plan.global_batch_size == 4096
    assert plan.learning_rate == pytest.approx(rate)
    assert plan.total_steps == epochs * 312
    assert plan.warmup_steps == warmup * 312
    assert (options.weight_decay, options.momentum, options.optimizer, options.max_grad_norm) == (
        decay,
        momentum,
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


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_begins_with_command_cost_and_expectation(name):
    head = "".join(line for line in (RECIPES / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#"))
    first = head.splitlines()[0]
    assert re.match(r"# (accelerate launch .*scripts/pretrain\.py --recipe " + re.escape(name) + r"|make )", first)
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
    assert recipe.run.report_to == ["tensorboard", "wandb"]
    assert recipe.optimization.max_steps == 7


@pytest.mark.parametrize("name", recipe_names())
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
        (["--temprature", "1"], "no option 'temprature'. Did you mean 'temperature'?"),
        (["--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["--seed", "1.5"], "--seed: invalid int value"),
        (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd'"),
        (["--backbone_config", "{oops"], "--backbone_config"),
        (["--flip_probability", "2"], "flip_probability must lie between 0 and 1, got 2.0"),
        (["--crop_scale", "0.5", "0.2"], "crop_scale must be two positive numbers, the smaller first"),
        (["--crop_scale", "0.5"], "crop_scale must be two positive numbers"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
        (["--momentum", "1.2"], "momentum must lie between 0 and 1"),
        (["--weight_decay", "-1"], "weight_decay must not be negative"),
    ],
)
def test_command_line_mistakes(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_recipe("quickstart", arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 1", "mine.yaml: there is no option 'temprature'. Did you mean 'temperature'?"),
        ("seed: many", "mine.yaml: argument --seed: invalid int value: 'many'"),
        ("- a list", "must hold a mapping of options, got a list"),
        ("seed: [1", "is no valid YAML"),
    ],
)
def test_file_mistakes(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_wrong_recipe_name_offers_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k'"):
        find_recipe("mocov3_vit-small")
    with pytest.raises(UsageError, match=r"no recipe file missing\.yaml"):
        find_recipe("missing.yaml")


def test_per_device_batch_scales_the_learning_rate():
    recipe = load_recipe(VIT_B, ["--per_device_train_batch_size", "64"])
    plan = make_plan(recipe, 10_000, 4)
    assert (plan.global_batch_size, plan.batch_size, plan.steps_per_epoch) == (256, 64, 39)
    assert plan.learning_rate == pytest.approx(1.5e-4)
    fixed = load_recipe(VIT_B, ["--per_device_train_batch_size", "64", "--learning_rate", "0.1"])
    assert make_plan(fixed, 10_000, 4).learning_rate == 0.1


def test_max_steps_keeps_the_share_of_the_warm_up():
    plan = make_plan(load_recipe(VIT_B, ["--max_steps", "300"]), 1_281_167, 8)
    assert (plan.total_steps, plan.warmup_steps) == (300, 40)


@pytest.mark.parametrize(
    ("arguments", "num_images", "num_processes", "message"),
    [
        (["--train_batch_size", "100"], 1000, 3, "3 processes cannot share a global batch of 100"),
        (["--train_batch_size", "1"], 1000, 1, "cannot train on a batch of 1"),
        (["--per_device_train_batch_size", "1"], 1000, 1, "cannot train on a batch of 1"),
        (["--train_batch_size", "64"], 50, 1, "50 images, fewer than one global batch of 64"),
    ],
)
def test_plans_refuse_what_cannot_work(arguments, num_images, num_processes, message):
    with pytest.raises(UsageError, match=message):
        make_plan(load_recipe("quickstart", arguments), num_images, num_processes)


def test_help_documents_every_option_once():
    text = recipe_help()
    for name in load_recipe("quickstart").to_dict():
        assert text.count(f"--{name} ") >= 1, name
