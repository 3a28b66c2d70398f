"""One parser for recipes and command lines: what it accepts, converts and refuses."""

import json
import re
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from mocov3_hf.evaluation import finetune, knn, linear_probe
from mocov3_hf.hints import OTHER_NAMES
from mocov3_hf.hub import push
from mocov3_hf.inference import files
from mocov3_hf.interop import export
from mocov3_hf.option_help import help_text
from mocov3_hf.options import (
    PATH_WORDS,
    Command,
    option,
    parse,
    values_of_arguments,
    values_of_keywords,
    values_of_recipe,
)
from mocov3_hf.pretraining import recipe
from mocov3_hf.reporting import UsageError


@dataclass(frozen=True)
class Data:
    """Data"""

    dataset_name: str = option(help="Folder or Hub id.", metavar="DATASET")
    streaming: bool = option(False, "Read in place.")


@dataclass(frozen=True)
class Rest:
    """Training"""

    mixed_precision: Literal["no", "bf16"] = option("bf16", "Precision.")
    k: list[int] = option([1, 5], "Neighbors.", at_least=1)
    crop_scale: list[float] = option([0.08, 1.0], "Area.", above=0, at_most=1)
    backbone_config: dict = option({}, "Backbone.")
    learning_rate: float | None = option(None, "Peak learning rate, 10 % of it.", above=0, old=["lr"])
    pixel_range: list[float] | Literal["auto"] | None = option(None, "Range.", metavar="auto|LOW HIGH")
    image_size: int = option(224, "Side.", at_least=1)
    on_error: Literal["skip", "stop"] = option("skip", "What to do.", old_values={"error": "stop"})
    ema_decay: float = option(0.5, "EMA.", old={"ema_momentum": lambda value: 1 - value})
    rare: int = option(7, "Rarely needed.", advanced=True)


@pytest.fixture
def recipes(tmp_path):
    return tmp_path


def command(recipes=None):
    removed, hints = {"fsdp": "use fewer layers"}, {"gradient_accumulation_steps": "there is no accumulation"}
    return Command("try", "Try.", (Data, Rest), "dataset_name", recipes, hints, removed)


def values(*arguments, recipes=None):
    data, rest = parse(command(recipes), ["d", *arguments])
    return vars(data) | vars(rest)


def of_recipe(recipes, text, *arguments):
    (recipes / "r.yaml").write_text(text, encoding="utf-8")
    return values("--recipe", "r", *arguments, recipes=recipes)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--streaming"], "streaming", True),
        (["--streaming", "true"], "streaming", True),
        (["--streaming=no"], "streaming", False),
        (["--no_streaming"], "streaming", False),
        (["--no-streaming"], "streaming", False),
        (["--mixed-precision", "no"], "mixed_precision", "no"),
        (["--k", "1", "2", "3"], "k", [1, 2, 3]),
        (["--k", "[4, 5]"], "k", [4, 5]),
        (["--crop_scale", "0.2", "1"], "crop_scale", [0.2, 1.0]),
        (["--image_size", "1e2"], "image_size", 100),
        (["--pixel_range", "Auto"], "pixel_range", "auto"),
        (["--pixel_range", "-1e3", "4095"], "pixel_range", [-1000.0, 4095.0]),
        (["--learning_rate", "1e-6"], "learning_rate", 1e-6),
        (["--learning_rate", "null"], "learning_rate", None),
        (["--lr", "0.1"], "learning_rate", 0.1),
        (["--ema_momentum", "0.25"], "ema_decay", 0.75),
        (["--backbone_config", '{"a": "1e-6", "b": [2]}'], "backbone_config", {"a": 1e-6, "b": [2]}),
        (["--backbone_config", '{"a": 1}', "--backbone_config", '{"b": 2}'], "backbone_config", {"a": 1, "b": 2}),
        (["--fsdp", "false"], "rare", 7),
    ],
)
def test_command_line(arguments, name, value):
    assert values(*arguments)[name] == value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: off", "mixed_precision", "no"),
        ("streaming: on", "streaming", True),
        ("learning_rate: 1e-6", "learning_rate", 1e-6),
        ("image_size: 040", "image_size", 40),
        ("backbone_config: {num_channels: 040}", "backbone_config", {"num_channels": 40}),
        ("learning_rate: null", "learning_rate", None),
        ("backbone_config: {eps: 1e-6, names: [a, 2E5]}", "backbone_config", {"eps": 1e-6, "names": ["a", 2e5]}),
        ("k: 3", "k", [3]),
        ("image_size: [32]", "image_size", 32),
        ("fsdp: false", "rare", 7),
        ("lr: null", "learning_rate", None),
        ("", "rare", 7),
    ],
)
def test_recipe(recipes, text, name, value):
    found = of_recipe(recipes, text)[name]
    assert found == value
    assert type(found) is type(value)


def test_the_command_line_wins_and_mappings_are_merged(recipes):
    text = "image_size: 32\nk: [7]\nbackbone_config: {a: 1, b: 2}"
    found = of_recipe(recipes, text, "--image_size", "64", "--backbone_config", '{"b": 3}')
    assert (found["image_size"], found["k"], found["backbone_config"]) == (64, [7], {"a": 1, "b": 3})


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ("patch_size: 8", '{"model_type": "resnet", "b": 3}', {"model_type": "resnet", "b": 3}),
        ("model_type: mocov3_vit, a: 1", '{"model_type": "resnet"}', {"model_type": "resnet"}),
        ("model_type: resnet, a: 1", '{"b": 2}', {"model_type": "resnet", "a": 1, "b": 2}),
        ("a: 1", '{"model_type": "mocov3_vit"}', {"model_type": "mocov3_vit", "a": 1}),
    ],
)
def test_a_backbone_of_another_type_replaces_that_of_the_recipe(recipes, below, above, expected):
    text = f"backbone_config: {{{below}}}"
    assert of_recipe(recipes, text, "--backbone_config", above)["backbone_config"] == expected
    twice = ["--backbone_config", json.dumps(yaml.safe_load(f"{{{below}}}")), "--backbone_config", above]
    assert of_recipe(recipes, "image_size: 32", *twice)["backbone_config"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imag_size", "3"], "there is no option '--imag_size'; did you mean '--image_size'?"),
        (["--zzz"], "there is no option '--zzz'; mocov3 try --help all lists all options"),
        (["--gradient_accumulation_steps", "2"], "there is no accumulation"),
        (["--fsdp", "true"], "--fsdp no longer exists: use fewer layers"),
        (["-k", "3"], "there is no option '-k': options begin with two dashes"),
        (["e"], "unexpected argument 'e': try takes one dataset_name"),
        (["--image_size"], "--image_size needs a value: one integer"),
        (["--image_size", "2.5"], "--image_size takes one integer, got '2.5'"),
        (["--image_size", "-3"], "--image_size must be at least 1, got -3"),
        (["--image_size", "1" + 30 * "0"], "--image_size must not exceed 1e+12"),
        (["--learning_rate", "nan"], "--learning_rate takes one finite number, got 'nan'"),
        (["--learning_rate", "-inf"], "--learning_rate takes one finite number"),
        (["--learning_rate", "0"], "--learning_rate must be above 0, got 0.0"),
        (["--crop_scale", "0.2", "1.5"], "--crop_scale must be above 0 and at most 1, got 1.5"),
        (["--mixed_precision", "bf61"], "--mixed_precision takes one of no, bf16, got 'bf61'; did you mean 'bf16'?"),
        (["--backbone_config", "{"], "--backbone_config takes a mapping (JSON on the command line), got '{'"),
        (["--backbone_config", '{"a": NaN}'], "--backbone_config: numbers in a mapping must be finite"),
        (["--backbone_config", '{"a": {"b": 1, "b": 2}}'], "--backbone_config: the key 'b' occurs twice"),
        (["--image_size", "32", "64"], "--image_size takes one integer, got '32 64'"),
        (["--learning_rate", "1", "-2.5"], "--learning_rate takes one finite number, got '1 -2.5'"),
        (["--streaming", "maybe"], "--streaming takes true or false, got 'maybe'"),
        (["--mixed_precision", "no", "e"], "unexpected argument 'e': try takes one dataset_name"),
        (["--k", "1", "a"], "--k takes one integer, got 'a'"),
        (["--recipe", "quikstart"], "there is no option '--recipe'"),
        (["--pixel_range", "wide"], "pixel_range takes auto, or finite numbers, got 'wide'"),
        (["--pixel_range", "0", "wide"], "pixel_range takes one finite number, got 'wide'"),
    ],
)
def test_mistakes_of_the_command_line(arguments, message):
    with pytest.raises(UsageError) as raised:
        values(*arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_value_after_an_option_may_be_the_positional():
    found = values_of_arguments(command(), ["--image_size", "32", "2024", "--streaming"])
    assert found == {"image_size": 32, "dataset_name": "2024", "streaming": True}


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_size: [32, 64]", "r.yaml: image_size takes one integer, got [32, 64]"),
        ("image_size: {a: 1}", "r.yaml: image_size takes one integer, got {'a': 1}"),
        ("image_size: true", "r.yaml: image_size takes one integer, got True"),
        ("learning_rate: .nan", "r.yaml: learning_rate takes one finite number, got nan"),
        ("learning_rate: .inf", "takes one finite number"),
        ("dataset_name: no", "r.yaml: dataset_name takes text, got False"),
        ("k: [[1]]", "r.yaml: k takes a list of integers, got [[1]]"),
        ("imagesize: 3", "r.yaml: there is no option 'imagesize'; did you mean 'image_size'?"),
        ("image_size: 3\nimage_size: 4", "the key 'image_size' occurs twice"),
        ("backbone_config: {a: 1, a: 2}", "the key 'a' occurs twice"),
        (1000 * "[", "nested more than 20 levels deep"),
        ("backbone_config: " + 30 * "{a: " + "1" + 30 * "}", "nested more than 20 levels deep"),
        (BOMB, "aliases"),
        ("backbone_config: &a {b: *a}", "aliases expand to more"),
        ("image_size: " + "9" * 50_000, "cannot be read as a recipe"),
        ("image_size: 1" + "0" * 30, "must not exceed 1e+12"),
        ("backbone_config: {num_hidden_layers: 1" + "0" * 30 + "}", "must not exceed 1e+12"),
        ("#" * 200_000, "a recipe has at most 100,000"),
        ("- 1", "must hold a mapping of options, got a list"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as a recipe"),
        ("\0", "cannot be read as a recipe"),
        ("a: b: c", "cannot be read as a recipe"),
    ],
)
def test_mistakes_of_a_recipe_are_told_in_one_line_and_at_once(recipes, text, message):
    started = time.process_time()
    with pytest.raises(UsageError) as raised:
        of_recipe(recipes, text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert time.process_time() - started < 5


def test_unknown_recipe_offers_the_nearest(recipes):
    (recipes / "quickstart.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"there is no recipe 'quikstart'; did you mean 'quickstart'\?"):
        values("--recipe", "quikstart", recipes=recipes)
    with pytest.raises(UsageError, match=r"recipe file 'no.yaml' does not exist"):
        values("--recipe", "no.yaml", recipes=recipes)


def test_a_required_option_is_named():
    with pytest.raises(UsageError, match=r"^--dataset_name is missing: folder or Hub id"):
        parse(command(), [])


def test_deprecated_spellings_say_what_to_use(recipes, capsys):
    values("--lr", "1")
    assert capsys.readouterr().err == "warning: --lr is deprecated: use --learning_rate\n"
    of_recipe(recipes, "lr: 1")
    assert capsys.readouterr().err == "warning: lr is deprecated: use learning_rate\n"
    assert values("--on_error", "error")["on_error"] == "stop"
    assert capsys.readouterr().err == "warning: --on_error error is deprecated: use stop\n"


def test_help_is_grouped_and_short_unless_asked_for_all(recipes):
    (recipes / "some.yaml").write_text("", encoding="utf-8")
    short, everything = help_text(command(recipes)), help_text(command(recipes), everything=True)
    assert short.startswith("usage: mocov3 try DATASET [--recipe NAME|FILE] [--option value ...]")
    assert [line for line in short.splitlines() if line.endswith(":")] == ["Recipe:", "Data:", "Training:"]
    assert "(default: 0.08 1)" in short
    assert "10 % of it" in short
    assert "--rare" not in short
    assert "1 more options: mocov3 try --help all" in short
    assert "--rare" in everything
    assert "--lr" not in everything
    assert "--no" not in everything


@dataclass(frozen=True)
class Needed:
    """Needed"""

    output_dir: str = option(help="Hub folder.", metavar="DIR")
    format: Literal["a", "b", "c"] = option(help="What to write.")
    seed: int = option(0, "Seed.")


@dataclass(frozen=True)
class Nothing:
    """Nothing"""


def test_help_marks_what_is_required():
    text = help_text(Command("try", "Try.", (Needed,), "output_dir"))
    assert text.startswith("usage: mocov3 try DIR --format {a,b,c} [--option value ...]\n")
    required = [line.split()[0] for line in text.splitlines() if line.endswith("(required)")]
    assert required == ["--output_dir", "--format"]
    text = help_text(Command("try", "Try.", (Needed,)))
    assert text.startswith("usage: mocov3 try --output_dir DIR --format {a,b,c} [--option value ...]\n")
    assert help_text(Command("try", "Try.", (Nothing,))).startswith("usage: mocov3 try [--help]\n")


def test_a_missing_choice_lists_the_choices():
    with pytest.raises(UsageError, match=r"^--format is missing: what to write \(one of a, b, c\)$"):
        parse(Command("try", "Try.", (Needed,)), ["--output_dir", "o"])
    with pytest.raises(UsageError, match=r"^there is no option '--x'; the command takes none$"):
        parse(Command("try", "Try.", (Nothing,)), ["--x"])


@pytest.mark.parametrize(
    ("command", "written", "meant"),
    [
        (recipe.COMMAND, "--epochs", "'--num_train_epochs'"),
        (recipe.COMMAND, "--wd", "'--weight_decay'"),
        (recipe.COMMAND, "--workers", "'--dataloader_num_workers'"),
        (recipe.COMMAND, "--batch-size", "'--train_batch_size' or '--per_device_train_batch_size'"),
        (recipe.COMMAND, "--lr", "'--learning_rate' or '--base_learning_rate'"),
        (recipe.COMMAND, "-b", "'--train_batch_size'"),
        (recipe.COMMAND, "--moco-m", "'--ema_decay'"),
        (finetune.COMMAND, "-b", "'--train_batch_size' or '--batch_size'"),
        (finetune.COMMAND, "-j", "'--dataloader_num_workers'"),
        (finetune.COMMAND, "-model", "'--model'"),
        (finetune.COMMAND, "--fp16", "'--mixed_precision'"),
        (knn.COMMAND, "--model_name_or_path", "'--model'"),
        (knn.COMMAND, "--split", "'--test_split' or '--train_split'"),
    ],
)
def test_names_of_other_tools_get_the_name_here(command, written, meant):
    with pytest.raises(UsageError, match=rf"there is no option '{written}'.*; did you mean {meant}\?$"):
        values_of_arguments(command, [written, "3"])


def test_every_other_name_leads_to_an_option():
    commands = [recipe.COMMAND, linear_probe.COMMAND, finetune.COMMAND, knn.COMMAND, export.COMMAND, push.COMMAND]
    known = {name for command in [*commands, files.CLASSIFY, files.EXTRACT] for name in command.fields()}
    assert {name for names in OTHER_NAMES.values() for name in names} <= known


def test_help_wins_over_mistakes(capsys):
    for arguments in (["--help"], ["--nonsense", "--help", "all"]):
        with pytest.raises(SystemExit) as ended:
            parse(command(), arguments)
        assert ended.value.code == 0
    assert "--rare" in capsys.readouterr().out


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    pretraining = values_of_arguments(
        recipe.COMMAND,
        [
            "~/data",
            "--output_dir",
            "~/runs/x",
            "--model",
            "~/m",
            "--resume_from_checkpoint",
            "~/c",
            "--hub_revision",
            "~",
        ],
    )
    assert pretraining["dataset_name"] == "/home/user/data"
    assert (pretraining["output_dir"], pretraining["model"]) == ("/home/user/runs/x", "/home/user/m")
    assert (pretraining["resume_from_checkpoint"], pretraining["hub_revision"]) == ("/home/user/c", "~")
    (tmp_path / "mine.yaml").write_text("dataset_name: ~/data\nknn_dataset_name: ~/labeled\n")
    from_file = values_of_recipe(recipe.COMMAND, tmp_path / "mine.yaml")
    assert from_file == {"dataset_name": "/home/user/data", "knn_dataset_name": "/home/user/labeled"}
    images = values_of_arguments(files.CLASSIFY, ["~/a.jpg", "~/b", "--model", "~/m", "--output", "~/o"])
    assert images["images"] == ["/home/user/a.jpg", "/home/user/b"]
    assert (images["model"], images["output"]) == ("/home/user/m", "/home/user/o")
    assert values_of_keywords(recipe.COMMAND, {"dataset_name": "~/data"}) == {"dataset_name": "/home/user/data"}


def test_options_that_take_a_path_say_so():
    """The placeholder of an option decides whether "~" is the home folder."""
    for command in (recipe.COMMAND, knn.COMMAND, finetune.COMMAND, export.COMMAND, files.CLASSIFY, files.EXTRACT):
        for name, item in command.fields().items():
            if (
                any(word in name for word in ("_dir", "dataset_name", "output", "from_checkpoint"))
                and "overwrite" not in name
                and name != "output_dtype"
            ):
                assert PATH_WORDS & set(re.findall("[A-Z_]+", item.metadata["metavar"])), f"{command.name} --{name}"
