"""What a folder is, how its run went, and what was measured, in words and tables."""

import shlex
from typing import Any

import numpy as np

from ..metrics.collapse import COLLAPSED_STD_RATIO
from .curves import MARKS, Series, count_marks, loss_bounds, series, split_abandoned
from .folder import ModelFolder, shown_name
from .page import Section, Table, Text
from .published import Published, figure_for, published_figures


# From which share of waiting on data follows; how far an accuracy may lie below its best.
MUCH_WAITING, SMALL_FALL = 0.1, 0.01
# The way from chance to floor below which nothing has been learned yet.
LITTLE_PROGRESS = 0.02
KINDS = {"pretraining": "Pre-training run", "classifier": "Classifier", "encoder": "Encoder"}
PARTS = {
    "mocov3": "backbone",
    "backbone": "backbone",
    "projector": "projector",
    "predictor": "predictor",
    "momentum_encoder": "momentum copy",
    "classifier": "classifier",
}
TASKS = {
    "knn": "nearest neighbours",
    "linear": "linear evaluation",
    "linear_cached": "linear, cached features",
    "finetune": "fine-tuning",
    "evaluate": "test of the classifier",
}
Facts = list[tuple[str, str]]


def lead(folder: ModelFolder) -> str:
    """One sentence of what the folder is."""
    body = describe_backbone(folder.backbone)
    if folder.kind == "pretraining":
        return f"Pre-training by MoCo v3 of {body}{trained_on(folder)}."
    if folder.kind == "classifier":
        classes = len(folder.config.get("id2label") or {}) or folder.config.get("num_labels")
        return f"A classifier{f' of {classes} classes' if classes else ''} on {body}."
    return f"An encoder: {body}."


def trained_on(folder: ModelFolder) -> str:
    name = folder.recipe.get("dataset_name")
    return f" on {shown_name(name)}" if name else ""


def describe_backbone(backbone: dict[str, Any]) -> str:
    """A body in words: its type and its sizes."""
    kind = backbone.get("model_type", "an unknown backbone")
    sizes = []
    for key, word in (("num_hidden_layers", "blocks"), ("num_attention_heads", "heads")):
        if isinstance(backbone.get(key), int):
            sizes.append(f"{backbone[key]} {word}")
    if isinstance(backbone.get("hidden_size"), int):
        sizes.insert(0, f"width {backbone['hidden_size']}")
    if isinstance(backbone.get("depths"), list):
        sizes.append(f"depths {'-'.join(map(str, backbone['depths']))}")
    if isinstance(backbone.get("patch_size"), int) and "depths" not in backbone:
        sizes.append(f"patches of {backbone['patch_size']} pixels")
    return f"{kind} ({', '.join(sizes)})" if sizes else kind


def facts(folder: ModelFolder) -> Facts:
    """Name and value of what identifies a model and its run; what is unknown is left out."""
    found: list[tuple[str, Any]] = [
        ("Kind", KINDS[folder.kind]),
        ("Saved as", folder.architecture),
        ("Backbone", describe_backbone(folder.backbone) if folder.backbone else None),
        ("Image size", pixels(folder.backbone.get("image_size") or folder.recipe.get("image_size"))),
        ("Parameters", parameters(folder.parameters)),
    ]
    if folder.conversion:
        source = folder.conversion.get("source", {})
        found.append(("Converted from", source.get("name") or source.get("url") or source.get("file")))
    if folder.kind == "pretraining":
        found += run_facts(folder)
    if folder.results:
        last = folder.results[-1]
        found += [
            ("Evaluated", str(last.get("date") or "")[:10]),
            ("Evaluated with", versions(last.get("versions") or {})),
        ]
        found.append(("Evaluated on", hardware(last.get("hardware") or {})))
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def run_facts(folder: ModelFolder) -> list[tuple[str, Any]]:
    recipe, state = folder.recipe, folder.state
    steps = folder.metrics[-1]["step"] if folder.metrics else state.get("step")
    total, per_epoch = state.get("total_steps") or recipe.get("max_steps"), state.get("steps_per_epoch")
    length = None
    if steps is not None:
        length = f"{steps:,.0f}" + (f" of {total:,}" if total else "")
        length += f" ({steps / per_epoch:.4g} epochs)" if per_epoch else ""
    batch = folder.global_batch_size
    images = f"{batch:,}" if batch else None
    if batch and state.get("num_processes", 1) > 1:
        images += f" on {state['num_processes']} processes"
    return [
        ("Data", shown_name(recipe["dataset_name"]) if recipe.get("dataset_name") else None),
        ("Steps", length),
        ("Global batch", images),
        ("Optimizer", recipe.get("optimizer")),
        ("Learning rate", peak_learning_rate(recipe, batch)),
        ("Weight decay", recipe.get("weight_decay")),
        ("Momentum", f"{recipe['momentum']:g}, {recipe['momentum_schedule']}" if "momentum" in recipe else None),
        ("Temperature", folder.temperature),
        ("Precision", recipe.get("mixed_precision") and recipe["mixed_precision"].replace("no", "float32")),
        ("Seed", recipe.get("seed")),
        ("Trained with", versions({"mocov3_hf": state.get("version"), "torch": state.get("torch_version")})),
    ]


def peak_learning_rate(recipe: dict[str, Any], batch: int | None) -> str | None:
    if recipe.get("learning_rate") is not None:
        return f"{recipe['learning_rate']:g}"
    if recipe.get("base_learning_rate") is None:
        return None
    base = f"{recipe['base_learning_rate']:g} × batch / 256"
    return f"{base} = {recipe['base_learning_rate'] * batch / 256:.4g}" if batch else base


def parameters(counts: dict[str, int]) -> str:
    """Millions altogether and by part."""
    if not counts:
        return ""
    by_part: dict[str, int] = dict.fromkeys(PARTS.values(), 0)
    for part, count in counts.items():
        name = PARTS.get(part, part)
        by_part[name] = by_part.get(name, 0) + count
    by_part = {name: count for name, count in by_part.items() if count}
    total = f"{millions(sum(by_part.values()))} M"
    if len(by_part) == 1:
        return total
    return f"{total}: {', '.join(f'{name} {millions(count)}' for name, count in by_part.items())}"


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count >= 10_000 else f"{count / 1e6:.4f}"


def pixels(size: Any) -> str | None:
    if isinstance(size, list | tuple):
        return " × ".join(map(str, size))
    return None if size is None else f"{size} pixels"


def versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def hardware(found: dict[str, Any]) -> str:
    if found.get("gpu"):
        return f"{found.get('gpu_count', 1)} × {found['gpu']}"
    return f"{found.get('cpu', '')}, {found['cpu_count']} cores" if found.get("cpu_count") else ""


def findings(folder: ModelFolder) -> list[tuple[str, str]]:
    """What a glance at the curves would tell: "good", "look" or "bad", and a sentence."""
    kept, _ = split_abandoned(folder.metrics)
    if folder.kind == "classifier":
        return accuracy_findings("Accuracy on the test split", series(kept, "eval_top1"))
    if not kept:
        return []
    found = loss_findings(folder, series(kept, "loss"))
    found += accuracy_findings("Nearest neighbour accuracy", series(split_abandoned(folder.knn)[0], "knn_top1"))
    counts = count_marks(folder)
    if any(counts.values()):
        words = {kind: kind for kind in MARKS} | {"spike": "gradient spike", "skipped": "skipped step"}
        named = ", ".join(f"{count} {words[kind]}{'s' * (count > 1)}" for kind, count in counts.items() if count)
        serious = counts["divergence"] + counts["rollback"]
        found.append(("bad" if serious else "look", f"Not undisturbed: {named}. See the gradient norm."))
    else:
        found.append(("good", "No gradient spikes, skipped steps or rollbacks."))
    spread, rank = (series(kept, f"projection_{name}").known for name in ("std_ratio", "effective_rank"))
    if len(spread) and spread[-1] < COLLAPSED_STD_RATIO:
        found.append(("bad", f"The projections have collapsed: spread {spread[-1]:.2g}, where 1 is even."))
    elif len(spread) and len(rank):
        text = f"No collapse: the projections' spread is {spread[-1]:.2f} of 1, their effective rank {rank[-1]:.1f}."
        found.append(("good", text))
    waiting = series(kept, "data_wait_fraction").known
    if len(waiting) and np.median(waiting) > MUCH_WAITING:
        share = 100 * np.median(waiting)
        found.append(("look", f"Training waits for data {share:.0f} % of the time: raise --dataloader_num_workers."))
    total = folder.state.get("total_steps")
    if total and kept[-1]["step"] < total:
        text = f"The run stands at step {kept[-1]['step']:,} of {total:,}: --resume_from_checkpoint auto continues it."
        found.append(("look", text))
    return found


def loss_findings(folder: ModelFolder, loss: Series) -> list[tuple[str, str]]:
    bounds = loss_bounds(folder)
    if not len(loss.known) or bounds is None:
        return []
    chance, floor = bounds
    progress = (chance - loss.known[-1]) / (chance - floor)
    where = f"from chance ({chance:.2f}) to the floor ({floor:.2f})"
    if progress < LITTLE_PROGRESS:
        return [("bad", f"The loss of {loss.known[-1]:.3f} is that of chance: nothing has been learned yet.")]
    return [("good", f"The loss of {loss.known[-1]:.3f} has gone {100 * progress:.0f} % of the way {where}.")]


def accuracy_findings(name: str, accuracy: Series) -> list[tuple[str, str]]:
    if not len(accuracy.known):
        return []
    steps = accuracy.steps[np.isfinite(accuracy.values)]
    last, best = accuracy.known[-1], accuracy.known.max()
    if last < best - SMALL_FALL:
        at = steps[accuracy.known.argmax()]
        return [("look", f"{name} has fallen from {100 * best:.1f} % at step {at:,.0f} to {100 * last:.1f} %.")]
    text = f"{name} is {100 * last:.1f} %"
    if len(accuracy.known) > 1:
        text += f", from {100 * accuracy.known[0]:.1f} % at step {steps[0]:,.0f}"
    return [("good", f"{text}.")]


def results_section(folder: ModelFolder) -> Section:
    """Measured figures beside published ones."""
    figures = published_figures(folder)
    parts: list = [results_table(folder, figures)] if folder.results else []
    if not parts:
        command = {
            "classifier": f"python scripts/evaluate.py --model {quoted(folder)} --dataset_name DATA",
        }.get(folder.kind, f"python scripts/knn.py --model {quoted(folder)} --dataset_name DATA")
        parts.append(Text("Nothing has been measured yet. This measures, and adds to results.json:", command))
    if figures:
        parts.append(published_table(figures))
    return Section("results", "Results", parts)


def results_table(folder: ModelFolder, figures: list[Published]) -> Table:
    rows = []
    for result in folder.results:
        dataset = result.get("dataset") if isinstance(result.get("dataset"), dict) else {}
        split = dataset.get("split") or dataset.get("test_split")
        where = shown_name(dataset.get("name", "unknown")) + (f", {split}" if split else "")
        for metric, value in result["metrics"].items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue  # of every class
            figure = figure_for(result, metric, figures, folder.kind)
            rows.append(
                [
                    metric,
                    shown_value(metric, value),
                    "" if figure is None else f"{100 * figure.top1:.2f} %",
                    TASKS.get(result.get("task"), str(result.get("task"))),
                    where,
                    str(result.get("date", ""))[:10],
                ]
            )
    columns = ["metric", "measured", "published, ImageNet-1k", "task", "data set", "date"]
    caption = "From results.json. What the metrics mean: docs/evaluation.md."
    if not any(row[2] for row in rows):
        return Table(columns[:2] + columns[3:], [row[:2] + row[3:] for row in rows], caption, numeric=(1,))
    caption += (
        " A published figure stands only beside a metric of its own protocol and recipe; it compares only where the"
        " data set is ImageNet-1k too."
    )
    return Table(columns, rows, caption, numeric=(1, 2))


def shown_value(metric: str, value: float) -> str:
    """Accuracies in percent, other numbers as they are."""
    return f"{100 * value:.2f} %" if "top" in metric or metric.endswith("mean_per_class") else f"{value:.4g}"


def published_table(figures: list[Published]) -> Table:
    rows = [
        [
            f"{100 * figure.top1:.2f} %",
            {"linear": "linear evaluation", "finetuned": "fine-tuning"}[figure.stage],
            figure.pretraining,
            figure.source,
            "this recipe" if figure.same_recipe else "this backbone only",
        ]
        for figure in figures
    ]
    return Table(
        ["top-1", "protocol", "pre-training", "published by", "compares with"],
        rows,
        "Published, ImageNet-1k: top-1 of models with this backbone, as published by others, not measured here.",
        numeric=(0,),
    )


def quoted(folder: ModelFolder) -> str:
    return shlex.quote(str(folder.path))
