"""`--help` of the evaluation commands: short, grouped by purpose, with both forms of the linear probe."""

import pytest

from mocov3_hf.evaluation import evaluate, finetune, knn, linear_probe
from mocov3_hf.option_help import help_text


COMMANDS = {module.COMMAND.name: module.COMMAND for module in (knn, evaluate, linear_probe, finetune)}
SHARED = ["Model", "Data", "Computation", "Output"]
TRAINING = ["Optimization", "Augmentation", "Validation", "Hub"]


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("knn", [*SHARED, "Nearest neighbors"]),
        ("evaluate", [*SHARED, "Classes"]),
        ("linear-probe", ["Recipe", *SHARED, *TRAINING, "Protocol", "Cached features"]),
        ("finetune", ["Recipe", *SHARED, *TRAINING]),
    ],
)
def test_help_is_short_and_grouped_by_purpose(name, sections):
    lines = help_text(COMMANDS[name], everything=True).splitlines()
    assert len(lines) < 128
    assert [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")] == [
        section if section != "Cached features" else "Linear classifiers on cached features (with --cached only)"
        for section in sections
    ]
    for option in ("--model MODEL", "--dataset_name DATASET", "--dataloader_num_workers INT", "--output_dir DIR"):
        assert sum(line.strip().startswith(option) for line in lines) == 1, option
    assert not any("--num_workers" in line or "--ema_momentum" in line for line in lines)
