"""What a finished run comes to, read off the files it has left."""

import json
import shlex
import statistics
from datetime import timedelta
from pathlib import Path

from ..plan import Plan
from ..recipe import Recipe


def summarize(recipe: Recipe, plan: Plan) -> str:
    """Length, time, throughput, last loss, best kNN, troubles, where the weights are, and the next command to run."""
    folder = Path(recipe.run.output_dir)
    metrics, measured = read_lines(folder / "metrics.jsonl"), read_lines(folder / "knn.jsonl")
    figures = {"steps": f"{plan.total_steps:,} ({plan.num_epochs:.4g} epochs)"}
    if metrics:
        figures |= describe_training(metrics, plan)
    if measured:
        best = max(measured, key=lambda line: line["knn_top1"])
        last = measured[-1]["knn_top1"]
        figures["best kNN"] = f"{best['knn_top1']:.1%} at step {best['step']:,} (last {last:.1%})"
    figures["weights"] = f"{folder}, loads with AutoModel.from_pretrained"
    figures["next"] = next_command(recipe)
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {figure}" for name, figure in figures.items())


def read_lines(file: Path) -> list[dict]:
    """The lines of a JSON Lines file, none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def describe_training(metrics: list[dict], plan: Plan) -> dict[str, str]:
    """Figures of all parts of an interrupted run together, without the steps that a kill or a rollback undid."""
    steps = [line["step"] for line in metrics]
    lengths = [step - before for step, before in zip(steps, [0, *steps[:-1]], strict=True)]
    seconds = sum(
        length * plan.global_batch_size / line["images_per_second"]
        for length, line in zip(lengths, metrics, strict=True)
    )
    waiting = statistics.fmean(line["data_wait_fraction"] for line in metrics)
    last = metrics[-1]
    figures = {
        "training time": str(timedelta(seconds=round(seconds))),
        "throughput": (
            f"{sum(lengths) * plan.global_batch_size / seconds:,.0f} images/s, {waiting:.1%} of the time waiting for"
            " data"
        ),
    }
    if last["loss"] is not None:
        figures["last loss"] = (
            f"{last['loss']:.4f} ({last['loss_normalized']:.3f} of the way from chance to the floor), positive top-1"
            f" {last['positive_top1']:.1%}"
        )
    troubles = {
        "skipped steps": last["skipped_steps"],
        "gradient spikes": last["gradient_spikes"],
        "rollbacks": last["rollbacks"],
    }
    figures["troubles"] = ", ".join(f"{number} {name}" for name, number in troubles.items() if number) or "none"
    return figures


def next_command(recipe: Recipe) -> str:
    """Nearest neighbours on the labelled images that the recipe names, or on its own, if they have labels."""
    data, folder = recipe.data, recipe.run.output_dir
    command = ["python", "scripts/knn.py", "--model", folder, "--output_dir", folder]
    command += ["--dataset_name", data.knn_dataset_name or data.dataset_name]
    return shlex.join([*command, "--train_split", data.knn_train_split, "--test_split", data.knn_test_split])
