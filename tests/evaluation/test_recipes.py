"""The recipes of evaluation: what they cost, expect and set."""

import pytest

from mocov3_hf.evaluation import finetune
from mocov3_hf.evaluation.linear_probe import parse_options
from mocov3_hf.options import parse
from mocov3_hf.recipe_files import find_recipe, recipe_names


# Published name to ImageNet-1k top-1 and learning rate at the batch of 1024.
PROBED = {
    "resnet50_mocov3-100e-pre_8xb128-linear-coslr-90e_in1k": (69.60, 0.4),
    "resnet50_mocov3-300e-pre_8xb128-linear-coslr-90e_in1k": (72.80, 0.4),
    "resnet50_mocov3-800e-pre_8xb128-linear-coslr-90e_in1k": (74.40, 0.4),
    "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k": (73.60, 12.0),
    "vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k": (76.90, 12.0),
}


@pytest.mark.parametrize("name", PROBED)
def test_published_recipes_of_the_linear_probe(name):
    top1, learning_rate = PROBED[name]
    argv = ["--recipe", name, "--model", "m", "--output_dir", "o"]
    recipe = parse_options(argv)
    assert recipe.base_learning_rate * recipe.train_batch_size / 256 == pytest.approx(learning_rate)
    assert (recipe.num_train_epochs, recipe.momentum, recipe.weight_decay) == (90, 0.9, 0.0)
    assert (recipe.dataset_name, recipe.test_split) == ("ILSVRC/imagenet-1k", "validation")
    head = find_recipe(name).read_text().split("\n\n")[0]
    assert f"torchrun --nproc_per_node 8 -m mocov3_hf linear-probe --recipe {name} " in head
    assert f"Expected: {top1:.2f} % top-1" in head
    assert "# Cost: " in head
    over = parse_options([*argv, "--num_train_epochs", "3", "--crop_scale", "0.2", "1"])
    assert (over.num_train_epochs, over.crop_scale, over.train_batch_size) == (3, [0.2, 1.0], 1024)


def test_linear_recipes_are_the_published_ones():
    assert set(recipe_names("linear-probe")) == set(PROBED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_train_epoch: 3", "mine.yaml: there is no option 'num_train_epoch'; did you mean 'num_train_epochs'"),
        ("num_train_epochs: ten", "mine.yaml: num_train_epochs takes one integer, got 'ten'"),
        ("- 3", "must hold a mapping of options, got a list"),
        ("a: [", "cannot be read as a recipe: line 1, column 5: expected the node content"),
    ],
)
def test_recipes_of_ones_own_are_checked(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse_options(["--recipe", str(tmp_path / "mine.yaml"), "--model", "m"])
    assert "\n" not in str(error.value)


# Name to ImageNet-1k top-1, epochs and stochastic depth.
FINETUNED = {
    "vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k": (83.00, 150, 0.1),
    "vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k": (83.70, 100, 0.5),
}
TRANSFER = {
    "vit-base-p16_mocov3-pre_transfer-coslr-100e_cifar10": (98.9, "uoft-cs/cifar10"),
    "vit-base-p16_mocov3-pre_transfer-coslr-100e_cifar100": (90.5, "uoft-cs/cifar100"),
    "vit-base-p16_mocov3-pre_transfer-coslr-200e_flowers102": (97.7, "dpdl-benchmark/oxford_flowers102"),
    "vit-base-p16_mocov3-pre_transfer-coslr-100e_pets": (93.2, "timm/oxford-iiit-pet"),
}


def recipe_of(name):
    head = find_recipe(name).read_text().split("\n\n")[0]
    assert f"finetune --recipe {name} --model" in head
    assert "# Cost: " in head
    return head, parse(finetune.COMMAND, ["--recipe", name, "--model", "m", "--output_dir", "o"])[0]


@pytest.mark.parametrize("name", FINETUNED)
def test_published_recipes_of_fine_tuning(name):
    top1, epochs, drop_path_rate = FINETUNED[name]
    head, recipe = recipe_of(name)
    assert f"Expected: {top1:.2f} % top-1" in head
    assert recipe.base_learning_rate * recipe.train_batch_size / 256 == pytest.approx(5e-4)
    assert (recipe.optimizer, recipe.train_batch_size, recipe.weight_decay) == ("adamw", 512, 0.05)
    assert (recipe.num_train_epochs, recipe.drop_path_rate) == (epochs, drop_path_rate)
    assert (recipe.warmup_epochs, recipe.warmup_start_factor, recipe.min_learning_rate) == (5, 1e-3, 1e-5)
    assert (recipe.max_grad_norm, recipe.label_smoothing_factor, recipe.layer_decay) == (5.0, 0.1, 1.0)
    assert (recipe.mixup_alpha, recipe.cutmix_alpha, recipe.random_erasing_probability) == (0.8, 1.0, 0.25)
    assert (recipe.rand_augment_num_ops, recipe.rand_augment_magnitude, recipe.rand_augment_std) == (2, 9.0, 0.5)
    assert (recipe.interpolation, recipe.ema_decay) == ("bicubic", 0.99996)
    assert (recipe.dataset_name, recipe.test_split) == ("ILSVRC/imagenet-1k", "validation")


@pytest.mark.parametrize("name", TRANSFER)
def test_transfer_recipes(name):
    top1, dataset = TRANSFER[name]
    head, recipe = recipe_of(name)
    assert f"Expected: {top1} % top-1" in head
    assert "not re-measured" in head
    assert recipe.dataset_name == dataset


def test_fine_tuning_recipes_are_these():
    others = set(recipe_names("finetune"))
    assert others == {*FINETUNED, *TRANSFER, "cifar10_vit-tiny-p4_finetune"}
    _, recipe = recipe_of("cifar10_vit-tiny-p4_finetune")
    assert recipe.dataset_name == "uoft-cs/cifar10"
