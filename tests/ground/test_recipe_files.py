"""Recipes name their command; a recipe of another command is refused by the name of the right one."""

import pytest

from mocov3_hf import recipe_files
from mocov3_hf.evaluation import finetune, linear_probe
from mocov3_hf.option_help import help_text
from mocov3_hf.options import given_values, values_of_recipe
from mocov3_hf.pretraining import recipe
from mocov3_hf.recipe_files import find_recipe, recipe_names
from mocov3_hf.reporting import UsageError


COMMANDS = {command.name: command for command in (recipe.COMMAND, linear_probe.COMMAND, finetune.COMMAND)}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_for_one_command(name):
    (owner,) = (command for command in COMMANDS if name in recipe_names(command))
    for command in COMMANDS.values():
        if command.name == owner:
            assert values_of_recipe(command, find_recipe(name))
            continue
        with pytest.raises(UsageError) as raised:
            values_of_recipe(command, find_recipe(name))
        assert str(raised.value) == (
            f"recipe {name!r} is for mocov3 {owner}, not mocov3 {command.name}: run mocov3 {owner} --recipe {name}, or"
            f" pass another recipe to mocov3 {command.name}"
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_recipes_of_the_command(name):
    text = help_text(COMMANDS[name])
    for other in COMMANDS:
        assert all((f"\n  {own}\n" in text) is (other == name) for own in recipe_names(other))


def test_a_misspelled_recipe_of_another_command():
    wrong = "vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1"
    for name in ("linear-probe", "finetune"):
        with pytest.raises(
            UsageError, match=f"^there is no recipe '{wrong}'; did you mean '[a-z0-9-]*_mocov3-pre_8xb"
        ):
            given_values(COMMANDS[name], ["m", "--recipe", wrong])
    with pytest.raises(UsageError, match="did you mean 'vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k'"):
        given_values(COMMANDS["linear-probe"], ["m", "--recipe", wrong])


def test_the_backbone_is_name_enough_where_it_has_one_recipe():
    assert find_recipe("vit-bn-large-p7").stem == "mocov3_vit-bn-large-p7_64xb64-amp-coslr-300e_in1k"
    assert find_recipe("vit-small-p16").stem == "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k"
    with pytest.raises(UsageError, match=r"^there is no recipe 'resnet50'; did you mean"):
        find_recipe("resnet50", command="pretrain")
    with pytest.raises(UsageError, match=r"-300e_in1k' is for mocov3 pretrain, not mocov3 finetune: run mocov3 pre"):
        given_values(COMMANDS["finetune"], ["m", "--recipe", "vit-bn-large-p7"])


def test_recipes_of_users(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\n")
    assert [values_of_recipe(command, file) for command in COMMANDS.values()] == 3 * [{"seed": 3}]
    file.write_text("command: linear_probe\nseed: 3\n")
    assert values_of_recipe(linear_probe.COMMAND, file) == {"seed": 3}
    with pytest.raises(
        UsageError, match=f"recipe '{file}' is for mocov3 linear-probe, not mocov3 finetune: run mocov3"
    ):
        values_of_recipe(finetune.COMMAND, file)
    file.write_text("command: [1]\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: command takes text, got "):
        values_of_recipe(finetune.COMMAND, file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dirr.yaml", "recipe 'dirr.yaml' is a folder: pass a YAML file"),
        ("mine.yml", "recipe file 'mine.yml' does not exist; did you mean 'mine.yaml'?"),
        ("deep/mine.yaml", "recipe file 'deep/mine.yaml' does not exist"),
        ("quickstart.yaml", "recipe file 'quickstart.yaml' does not exist; did you mean the recipe 'quickstart'?"),
        ("quikstart", "there is no recipe 'quikstart'; did you mean 'quickstart'? mocov3 recipes lists all"),
        ("a\0b", "there is no recipe 'a\\x00b'; mocov3 recipes lists all"),
        ("[a-z]*", "there is no recipe '[a-z]*'; mocov3 recipes lists all"),
    ],
)
def test_mistakes(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dirr.yaml").mkdir()
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    with pytest.raises(UsageError) as raised:
        find_recipe(given, recipe_files.RECIPES, "pretrain")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: [1",
            ": line 1, column 9: expected ',' or ']', but got '<stream end>'",
        ),
        (
            "a: 1\nb: c: d",
            ": line 2, column 5: mapping values are not allowed here",
        ),
        ("a: \x01", ": character 4: special characters are not allowed"),
        ("a: !!x 1", ": line 1, column 4: could not determine a constructor"),
    ],
)
def test_yaml_errors_name_the_place(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError) as raised:
        values_of_recipe(recipe.COMMAND, tmp_path / "mine.yaml")
    assert f"mine.yaml cannot be read as a recipe{message}" in str(raised.value)
    assert "unicode string" not in str(raised.value)
