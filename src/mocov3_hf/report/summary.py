"""The summary of a folder: what it is, and how training went."""

import math
from datetime import timedelta
from typing import Any

import numpy as np

from ..metrics.collapse import COLLAPSED_STD_RATIO
from ..problem_types import MULTI_LABEL, REGRESSION
from ..run_folder import RunFolder, training_time
from .curves import Series, chances, loss_bounds, number, read_curves, series
from .parts import mapping, percent, shorten, shown_name


# Stalls above this share of the time are reported, and accuracies this far below their best.
LONG_STALL, ACCURACY_DROP = 0.1, 0.01
# Share of the way from chance to floor below which nothing has been learned.
LITTLE_PROGRESS = 0.02
KINDS = {
    "pretraining": "Pre-training run",
    "classifier": "Classifier",
    "encoder": "Encoder",
    "evaluation": "Evaluation",
}
PARTS = {"mocov3": "backbone", "momentum_encoder": "momentum encoder"}
SIZES = {
    "hidden_size": "width {}",
    "num_hidden_layers": "{} blocks",
    "num_attention_heads": "{} heads",
    "patch_size": "{} px patches",
}


def lead(folder: RunFolder) -> str:
    """One sentence about what the folder is."""
    backbone = describe_backbone(folder.backbone)
    if folder.kind == "pretraining":
        dataset = folder.recipe.get("dataset_name")
        return f"MoCo v3 pre-training of {backbone}{f' on {shown_name(dataset)}' if dataset else ''}."
    if folder.kind == "classifier":
        classes = len(mapping(folder.config.get("id2label"))) or folder.config.get("num_labels")
        problem_type = folder.config.get("problem_type")
        if problem_type == REGRESSION:
            return f"Regression model{f' (number of targets: {classes})' if classes else ''}, backbone {backbone}."
        kind = "Multi-label classifier" if problem_type == MULTI_LABEL else "Classifier"
        return f"{kind}{f' with {classes} classes' if classes else ''}, backbone {backbone}."
    if folder.kind == "evaluation":
        models = {shown_name(mapping(result.get("model")).get("name", "a model")) for result in folder.results}
        return f"Evaluation of {', '.join(sorted(models))}."
    return f"Encoder: {backbone}."


def describe_backbone(backbone: dict[str, Any]) -> str:
    """Model type and sizes of a backbone in words."""
    depths = backbone.get("depths")
    sizes = [text.format(backbone[key]) for key, text in SIZES.items() if isinstance(backbone.get(key), int)]
    if isinstance(depths, list):
        sizes = [size for size in sizes if "patches" not in size] + [f"depths {'-'.join(map(str, depths))}"]
    kind = str(backbone.get("model_type", "an unknown backbone"))
    return f"{kind} ({', '.join(sizes)})" if sizes else kind


def facts(folder: RunFolder) -> list[tuple[str, str]]:
    """Names and values that identify a model and its run; unknown ones are left out."""
    size = folder.backbone.get("image_size") or folder.recipe.get("image_size")
    is_regression = folder.kind == "classifier" and folder.config.get("problem_type") == REGRESSION
    found: list[tuple[str, Any]] = [
        ("Kind", "Regression model" if is_regression else KINDS[folder.kind]),
        ("Architecture", folder.architecture),
        ("Backbone", describe_backbone(folder.backbone) if folder.backbone else None),
        ("Pooling", folder.config.get("pooling") if folder.config.get("pooling") in ("cls", "mean") else None),
        ("Image size", size and " × ".join(map(str, size if isinstance(size, list | tuple) else (size, size)))),
        ("Parameters", describe_parameters(folder.parameters)),
    ]
    source = mapping(folder.conversion.get("source"))
    found.append(("Converted from", source.get("name") or source.get("url") or source.get("file")))
    if folder.kind == "pretraining":
        found += run_facts(folder)
    if folder.results:
        last = folder.results[-1]
        found += [
            ("Evaluated", str(last.get("date") or "")[:10]),
            ("Evaluated with", versions(mapping(last.get("versions")))),
            ("Evaluated on", describe_hardware(mapping(last.get("hardware")))),
        ]
    return [(name, shorten(str(value), 300)) for name, value in found if value not in (None, "")]


def run_facts(folder: RunFolder) -> list[tuple[str, Any]]:
    recipe, state, batch = folder.recipe, folder.state, folder.global_batch_size
    steps = number(folder.metrics[-1]["step"] if folder.metrics else state.get("step"))
    total, per_epoch = (
        number(state.get("total_steps") or recipe.get("max_steps")),
        number(state.get("steps_per_epoch")),
    )
    length = None
    if not math.isnan(steps):
        length = f"{steps:,.0f}{'' if math.isnan(total) else f' of {total:,.0f}'}"
        length += f" ({steps / per_epoch:.4g} epochs)" if per_epoch > 0 else ""
    processes = number(state.get("num_processes", 1))
    timed = [line for line in read_curves(folder).kept if "images_per_second" in line]
    seconds, images = training_time(timed, batch) if timed and batch else (0.0, 0)
    return [
        ("Dataset", shown_name(recipe["dataset_name"]) if recipe.get("dataset_name") else None),
        ("Images", describe_data(folder.data)),
        ("Steps", length),
        ("Global batch size", batch and f"{batch:,}{f' on {processes:.0f} processes' if processes > 1 else ''}"),
        ("Training time", seconds and str(timedelta(seconds=round(seconds)))),
        ("Throughput", seconds and f"{images / seconds:,.0f} images/s; {images:,} images seen"),
        ("Cost", seconds and f"{seconds * max(1, processes) / 3600:.3g} process-hours"),
        ("Trained on", describe_hardware(mapping(state.get("hardware")))),
        ("Optimizer", recipe.get("optimizer")),
        ("Peak learning rate", peak_learning_rate(recipe, batch)),
        ("Weight decay", recipe.get("weight_decay")),
        ("EMA decay", f"{recipe['ema_decay']}, {recipe.get('ema_schedule')}" if "ema_decay" in recipe else None),
        ("Temperature", folder.temperature),
        ("Precision", str(recipe.get("mixed_precision") or "").replace("no", "float32")),
        ("Seed", recipe.get("seed")),
        ("Trained with", versions({"mocov3_hf": state.get("version"), "torch": state.get("torch_version")})),
    ]


def describe_hardware(hardware: dict[str, Any]) -> str | None:
    if hardware.get("gpu"):
        return f"{hardware.get('gpu_count', 1)} × {hardware['gpu']}"
    return f"{hardware.get('cpu', '')}, {hardware['cpu_count']} cores" if hardware.get("cpu_count") else None


def describe_data(data: dict[str, Any]) -> str | None:
    """Images that were used, and what was skipped, by reason."""
    if not isinstance(data.get("num_images"), int):
        return None
    found = f"{data['num_images']:,}"
    if isinstance(data.get("num_files"), int):
        found += f" of {data['num_files']:,} files"
    skipped = data.get("skipped") if isinstance(data.get("skipped"), dict) else {}
    reasons = sorted(skipped.items(), key=lambda item: -number(item[1]))
    listed = "; ".join(f"{count:,} {reason}" for reason, count in reasons if isinstance(count, int))
    return f"{found}. Skipped: {listed}" if listed else found


def peak_learning_rate(recipe: dict[str, Any], batch: int | None) -> str | None:
    """With the linear scaling rule spelled out."""
    given, base = number(recipe.get("learning_rate")), number(recipe.get("base_learning_rate"))
    if not math.isnan(given):
        return f"{given:g}"
    if math.isnan(base):
        return None
    return f"{base:g} × batch size / 256{f' = {base * batch / 256:.4g}' if batch else ''}"


def describe_parameters(counts: dict[str, int]) -> str:
    """Millions in total and by part."""
    by_part: dict[str, int] = {}
    for part, count in counts.items():
        name = PARTS.get(part, part)
        by_part[name] = by_part.get(name, 0) + count
    parts = ", ".join(f"{name} {millions(count)}" for name, count in by_part.items() if count)
    total = f"{millions(sum(by_part.values()))} M" if by_part else ""
    return f"{total}: {parts}" if len(by_part) > 1 else total


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count >= 10_000 else f"{count / 1e6:.4f}"


def versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def findings(folder: RunFolder) -> list[tuple[str, str]]:
    """What to notice in the curves: "good", "look" or "bad", and a sentence."""
    curves = read_curves(folder)
    kept, chance = curves.kept, chances(folder, curves.kept)
    if folder.kind == "classifier":
        sizes = [number(mapping(result.get("dataset")).get("size")) for result in folder.results]
        accuracy = series(kept, "eval_top1").known
        return accuracy_findings("Test accuracy", accuracy, chance.get("eval_top1"), sizes[-1] if sizes else math.nan)
    images = series(kept, "knn_test_images").known.values
    knn = series(kept, "knn_top1").known
    found = accuracy_findings("kNN accuracy", knn, chance.get("knn_top1"), images[-1] if len(images) else math.nan)
    if not folder.metrics:
        return found
    found = loss_findings(folder, series(kept, "loss").known) + found
    counts = {kind: count for kind, count in curves.counts.items() if count}
    if counts:
        words = {"spike": "gradient spike", "skipped": "skipped step"}
        named = ", ".join(f"{count} {words.get(kind, kind)}{'s' * (count > 1)}" for kind, count in counts.items())
        is_serious = "divergence" in counts or "rollback" in counts
        found.append(("bad" if is_serious else "look", f"Instability: {named}. See the gradient norm."))
    else:
        found.append(("good", "No gradient spikes, skipped steps or rollbacks."))
    spread, rank = (series(kept, f"projection_{name}").known.values for name in ("std_ratio", "effective_rank"))
    if len(spread) and spread[-1] < COLLAPSED_STD_RATIO:
        found.append(("bad", f"The projections have collapsed: spread {spread[-1]:.2g}, uniform is 1."))
    elif len(spread) and len(rank):
        text = (
            f"No collapse: spread of the projections {spread[-1]:.2f} (uniform is 1), effective rank {rank[-1]:.1f}."
        )
        found.append(("good", text))
    stall = series(kept, "data_wait_fraction").known.values
    if len(stall) and np.median(stall) > LONG_STALL:
        text = f"Data loading stalls training for {100 * np.median(stall):.0f} % of the time"
        found.append(("look", f"{text}: raise --dataloader_num_workers."))
    total, step = number(folder.state.get("total_steps")), folder.metrics[-1]["step"]
    if step < total:
        text = f"The run stopped at step {step:,} of {total:,.0f}: --resume_from_checkpoint auto resumes it."
        found.append(("look", text))
    return found


def loss_findings(folder: RunFolder, loss: Series) -> list[tuple[str, str]]:
    bounds = loss_bounds(folder)
    if not len(loss) or bounds is None:
        return []
    (chance, floor), last = bounds, loss.values[-1]
    progress = (chance - last) / (chance - floor)
    if progress < LITTLE_PROGRESS:
        return [("bad", f"The loss, {last:.3f}, is at chance: nothing has been learned yet.")]
    text = f"The loss, {last:.3f}, has covered {100 * progress:.0f} % of the way from chance ({chance:.2f}) to the"
    return [("good", f"{text} floor ({floor:.2f}).")]


def accuracy_findings(name: str, accuracy: Series, chance: float | None, images: float = math.nan) -> list:
    """The last of the accuracies against chance and against the best; good only if it is above chance for sure."""
    if not len(accuracy):
        return []
    first, last, best = accuracy.values[0], accuracy.values[-1], accuracy.values.max()
    if chance is not None and last <= chance + margin(chance, images):
        return [("bad", f"{name} is {percent(last)}, which is at chance ({percent(chance)}).")]
    if last < best - ACCURACY_DROP:
        step = accuracy.steps[accuracy.values.argmax()]
        return [("look", f"{name} fell from {percent(best)} at step {step:,.0f} to {percent(last)}.")]
    start = f", up from {percent(first)} at step {accuracy.steps[0]:,.0f}" if last > first else ""
    if chance is None:
        return [("look", f"{name} is {percent(last)}{start}; chance is unknown.")]
    return [("good", f"{name} is {percent(last)}{start}; chance is {percent(chance)}.")]


def margin(chance: float, images: float) -> float:
    """Two standard deviations of the accuracy at chance on a number of images; 0 if it is unknown."""
    return 2 * math.sqrt(chance * (1 - chance) / images) if images > 0 else 0.0
