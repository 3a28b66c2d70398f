"""Mutated recipes and command lines: each is accepted, or refused in one line, and nothing of either takes long."""

import json
import random
import time

import pytest
import yaml

from mocov3_hf.pretraining.build import build_config, check_buildable
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import COMMAND, load_recipe
from mocov3_hf.recipe_files import RECIPES


NUM_RECIPES = NUM_COMMAND_LINES = 250
BACKBONES = [
    {"model_type": "mocov3_vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
    {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
]
# As YAML texts: what people and machines write by mistake.
VALUES = [
    *(
        "null",
        "true",
        "no",
        "-1",
        "0",
        "1",
        "3",
        "7",
        "1.5",
        "1e-6",
        "1e400",
        ".nan",
        "-.inf",
        "''",
        "abc",
        '"32"',
        "~",
    ),
    *(
        "[]",
        "[1]",
        "[32, 64]",
        "[a, b]",
        "[[1]]",
        "{}",
        "{a: 1}",
        "2024-01-01",
        "0x10",
        "1_000",
        "!!binary aGk=",
        "1:30",
    ),
    *("1000000000000000000000000000000", "10000000", "&a [1, 2]", "*a", "{model_type: resnet}", "'\\0'", "é" * 300),
]
# The keys of a backbone's configuration that are mutated, some of which it does not have.
BACKBONE_KEYS = [
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size", "depths"),
    *(
        "hidden_sizes",
        "embedding_size",
        "stem",
        "num_channels",
        "layer_type",
        "hiden_size",
        "out_indices",
        "hidden_act",
    ),
    *("intermediate_size", "drop_path_rate", "layer_norm_eps", "position_embedding", "id2label", "dtype"),
]


def mutated_recipe(draw: random.Random) -> str:
    """The text of a recipe with some mistakes."""
    lines = {
        "image_size": draw.choice(["32", "32", "64"]),
        "seed": "1",
        "train_batch_size": "8",
        "projection_dim": "16",
        "head_hidden_size": "32",
    }
    backbone = {key: json.dumps(value) for key, value in draw.choice(BACKBONES).items()}
    for _ in range(draw.randint(0, 2)):
        backbone[draw.choice(BACKBONE_KEYS)] = draw.choice(VALUES)
    lines["backbone_config"] = "{" + ", ".join(f"{key}: {value}" for key, value in backbone.items()) + "}"
    for _ in range(draw.randint(0, 2)):
        lines[draw.choice([*COMMAND.fields(), *COMMAND.removed, *COMMAND.old_names(), "sede"])] = draw.choice(VALUES)
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        place = draw.randrange(len(text))
        text = (
            text[:place]
            + draw.choice(["", "\t", ":", "{", "]", "\n", "'", "#", "é", "\x00", text[:20]])
            + text[place + 1 :]
        )
    return text


def mutated_command_line(draw: random.Random) -> list[str]:
    """Arguments over a recipe with some mistakes."""
    arguments = []
    for _ in range(draw.randint(1, 4)):
        name = draw.choice([*COMMAND.fields(), *COMMAND.removed, *COMMAND.old_names(), "sede"])
        if draw.random() < 0.1:
            place = draw.randrange(len(name))
            name = name[:place] + draw.choice("_-=x") + name[place + 1 :]
        option = draw.choice(["--", "--", "--", "--", "-", "--no_", ""]) + draw.choice([name, name.replace("_", "-")])
        values = [draw.choice(VALUES) for _ in range(draw.choice([0, 1, 1, 1, 2]))]
        arguments += draw.choice([[option, *values], [f"{option}={''.join(values)}"]])
    if draw.random() < 0.5:
        backbone = dict(draw.choice(BACKBONES))
        backbone[draw.choice(BACKBONE_KEYS)] = yaml.safe_load(
            draw.choice(["-5", "a", "[1, 2]", "1e3", "10000000", "{}"])
        )
        arguments += ["--backbone_config", json.dumps(backbone)]
    return arguments


def check(text: object, name: str, arguments: list[str]) -> str:
    """Whether the options are valid up to a model without data: "accepted", or the line that refuses them."""
    started = time.process_time()
    try:
        recipe = load_recipe(name, arguments)
        plan = make_plan(recipe, 10_000, 1)
        assert plan.total_steps >= 1
        check_buildable(build_config(recipe))
    except ValueError as error:
        message = str(error)
        assert message.strip(), text
        assert "\n" not in message, (text, message)
        assert len(message) < 1500, text
        return message
    finally:
        assert time.process_time() - started < 5, text
    return "accepted"


@pytest.mark.slow
def test_mutated_recipes(tmp_path):
    draw, file = random.Random(0), tmp_path / "mutated.yaml"
    answers = []
    for _ in range(NUM_RECIPES):
        text = mutated_recipe(draw)
        file.write_text(text, encoding="utf-8")
        answers.append(check(text, str(file), []))
    assert 20 < answers.count("accepted") < NUM_RECIPES - 100
    assert len(set(answers)) > 60


def test_mutated_command_lines():
    draw = random.Random(1)
    answers = []
    for _ in range(NUM_COMMAND_LINES):
        arguments = mutated_command_line(draw)
        answers.append(check(arguments, "quickstart", arguments))
    assert 5 < answers.count("accepted") < NUM_COMMAND_LINES - 100
    assert len(set(answers)) > 60


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"num_hidden_layers": 10**30}, "numbers in a mapping must not exceed 1e+12"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in backbone_config must be 0 to 1,000,000"),
        ({"num_hidden_layers": 1001}, "backbone_config has 1,001 layers, more than 1,000"),
        ({"model_type": "resnet", "depths": [400, 400, 400]}, "backbone_config has 1,200 layers, more than 1,000"),
        ({"hidden_size": -4}, "hidden_size in backbone_config must be 1 to 1,000,000, got -4"),
        ({"hidden_size": 0}, "hidden_size in backbone_config must be 1 to 1,000,000, got 0"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 10**6, "num_attention_heads": 10}, "parameters, more than 10,000,000,000"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size must be a multiple of num_attention_heads"),
        ({"image_size": [32, 64]}, "backbone_config has image_size [32, 64] and the views 32: leave the former out"),
        ({"model_type": "vitt"}, "'vitt'"),
        ({"model_type": ["vit"]}, "model_type in backbone_config takes text, got ['vit']"),
        ({"model_type": "bert"}, "'bert' cannot be the backbone: it takes input_ids, not images"),
    ],
)
def test_backbones_that_cannot_be_built(backbone, message):
    line = check(backbone, "quickstart", ["--backbone_config", json.dumps(backbone)])
    assert message in line


def test_every_recipe_of_the_package_is_accepted():
    for path in RECIPES.glob("*.yaml"):
        assert check(path, str(path), []) == "accepted", path
