"""What was measured: the results of a folder and of others about the same weights, next to published ones."""

import json
import re
from functools import partial
from typing import Any, NamedTuple

from ..loading import load_classifier, load_encoder
from ..problem_types import MULTI_LABEL, REGRESSION
from ..results import RESULTS, TASKS, is_share, read_results
from ..run_folder import CONFIG, RunFolder
from ..weights import weights_hash
from ..zoo import load_zoo
from .parts import Section, Table, Text, attempt, mapping, percent, quoted, shorten, shown_name
from .published import Reference, find_references, reference_for


WORDS = {"map": "mAP", "r2": "R²", "mae": "MAE", "rmse": "RMSE", "ece": "ECE", "f1": "F1"}
STAGES = {"linear": "linear probe", "finetuned": "fine-tuning"}
# Evaluations that learn from a training split.
LEARNING_TASKS = ("knn", "linear", "linear_cached", "finetune")


class Measured(NamedTuple):
    """An evaluation, the folder that holds it if it is another one, and whether it is of the weights of today."""

    result: dict[str, Any]
    folder: str = ""
    is_current: bool = True


def results_section(folder: RunFolder, found: list[Measured] | None = None) -> Section:
    """Measured metrics, those of `all_results` unless they are given, and published accuracies."""
    notes = folder.notes
    references = attempt(notes, "the comparison with published results", lambda: find_references(folder), [])
    found = known_results(folder) if found is None else found
    if found:
        parts: list = [results_table(folder, found, references)]
    else:
        command = f"mocov3 {'evaluate' if folder.kind == 'classifier' else 'knn'} --model {quoted(folder.path)}"
        text = f"No results yet. Evaluation adds them to {RESULTS}:"
        parts = [Text(text, f"{command} --dataset_name DATA")]
    if references:
        rows = []
        for entry, is_same_recipe in references:
            epochs = load_zoo()[entry.pretrained].epochs
            same = "recipe and backbone" if is_same_recipe else "backbone"
            rows.append([f"{entry.top1:.2f} %", STAGES[entry.stage], f"{epochs} epochs", entry.publisher.title, same])
        columns = ["top-1", "protocol", "pre-training", "published by", "same"]
        caption = "Published ImageNet-1k accuracy of models with this backbone. Not measured here."
        parts.append(Table(columns, rows, caption, numeric=(0,)))
    return Section("results", "Results", parts)


def known_results(folder: RunFolder) -> list[Measured]:
    """Those of `all_results`, or only of the folder, with a note, where they cannot be found."""
    own = [Measured(result) for result in folder.results]
    return attempt(folder.notes, "the results of other folders", lambda: all_results(folder), own)


def all_results(folder: RunFolder) -> list[Measured]:
    """The results of the folder, and those of the same weights in folders inside it and beside it."""
    paths = [path for place in (folder.path, folder.path.absolute().parent) for path in place.glob(f"*/{RESULTS}")]
    others = []
    for path in sorted({path.resolve().parent for path in paths} - {folder.path.resolve()}):
        what = f"{path.name}/{RESULTS}"
        others += [(path.name, result) for result in attempt(folder.notes, what, partial(read_results, path), [])]
    if not any(weights_of(result) for result in [*folder.results, *(result for _, result in others)]):
        return [Measured(result) for result in folder.results]  # of versions that did not record the weights
    own = hashes(folder)

    def is_current(result: dict[str, Any]) -> bool:
        return not own or not weights_of(result) or bool(own & weights_of(result))

    found = [Measured(result, "", is_current(result)) for result in folder.results]
    return found + [Measured(result, name) for name, result in others if own & weights_of(result)]


def weights_of(result: dict[str, Any]) -> set[str]:
    """Hashes of the weights that were evaluated, and of the classifier that was trained on them."""
    model = mapping(result.get("model"))
    return {model[key] for key in ("weights", "classifier") if isinstance(model.get(key), str)}


def hashes(folder: RunFolder) -> set[str]:
    """Hashes of the weights of a folder, as results hold them; empty without weights."""
    if folder.kind == "evaluation":
        return weights_of(folder.results[-1]) if folder.results else set()
    if not (folder.path / CONFIG).is_file() or not folder.parameters:
        return set()
    load = load_classifier if folder.kind == "classifier" else load_encoder
    return {weights_hash(load(folder.path))}


def results_table(folder: RunFolder, found: list[Measured], references: list[Reference]) -> Table:
    groups: dict[str, list[Measured]] = {}
    for index, measured in enumerate(found, start=1):
        key = attempt(folder.notes, f"result {index}", partial(protocol_of, measured), "")
        if key:
            groups.setdefault(key, []).append(measured)
    rows: list = []
    for index, (_, group) in enumerate(sorted(groups.items(), key=lambda item: not item[1][-1].is_current), start=1):
        rows += attempt(folder.notes, f"result {index}", partial(group_rows, folder, group, references), [])
    columns = ["metric", "measured", "top-5", "range", "published, ImageNet-1k"]
    caption = f"From {RESULTS}; of several runs, the newest. docs/evaluation.md defines the metrics."
    used = [0, 1, *(place for place in (2, 3, 4) if any(row[place] for row in rows if not isinstance(row, str)))]
    if 4 in used:
        caption += (
            " Published values are of the same protocol and recipe; they are comparable only if the dataset is"
            " ImageNet-1k."
        )
    rows = [row if isinstance(row, str) else [row[place] for place in used] for row in rows]
    return Table([columns[place] for place in used], rows, caption, numeric=tuple(range(1, len(used))))


def protocol_of(measured: Measured) -> str:
    """The same for results that differ only in seed and date."""
    result = measured.result
    settings = {key: value for key, value in mapping(result.get("settings")).items() if key not in ("seed", "chosen")}
    dataset = {key: value for key, value in mapping(result.get("dataset")).items() if key != "skipped"}
    model = measured.is_current or sorted(weights_of(result))
    if not isinstance(result.get("task"), str | None):
        raise TypeError("the task is not a text")
    return json.dumps([result.get("task"), dataset, settings, model], sort_keys=True)


def group_rows(folder: RunFolder, group: list[Measured], references: list[Reference]) -> list:
    """A heading, and the metrics of evaluations by one protocol: the newest, and the range if they differ."""
    result, place, is_current = group[-1]
    metrics = {name: value for name, value in result["metrics"].items() if is_value(value)}  # others: by class
    rows: list = []
    for metric, value in metrics.items():
        if metric.endswith("top5") and f"{metric[:-1]}1" in metrics:
            continue  # beside top-1
        top5 = metrics.get(f"{metric[:-1]}5") if metric.endswith("top1") else None
        measured = [each.result["metrics"].get(metric) for each in group]
        low, high = (shown(metric, end(filter(is_value, measured))) for end in (min, max))
        reference = reference_for(result, metric, references, folder.kind)
        published = f"{reference.entry.top1:.2f} %" if reference else ""
        row = [name_of(metric), shown(metric, value), shown(metric, top5) if top5 is not None else ""]
        rows.append([shorten(cell, 100) for cell in (*row, "" if low == high else f"{low} to {high}", published)])
    words = [describe_protocol(result), str(result.get("date", ""))[:10], f"in folder {place}" if place else ""]
    words.append("" if is_current else "of other weights than today's")
    if len(group) > 1:
        words.append(f"{len(group)} runs{'' if any(row[3] for row in rows) else ' with the same result'}")
    return [shorten("; ".join(filter(None, words)), 300), *rows]


def describe_protocol(result: dict[str, Any]) -> str:
    """Task, data set, splits and classes of an evaluation."""
    dataset = mapping(result.get("dataset"))
    task = TASKS.get(result.get("task"), ("", str(result.get("task"))))[1]
    number, problem_type = dataset.get("num_classes"), dataset.get("problem_type")
    if result.get("task") == "evaluate" and problem_type == REGRESSION:
        task = "test"
    precision = mapping(result.get("settings")).get("mixed_precision", "no")
    words = f"{task[:1].upper()}{task[1:]}{'' if precision == 'no' else f' in {precision}'}"
    words += f" on {shown_name(dataset.get('name', 'unknown'))}"
    if split := dataset.get("split") or dataset.get("test_split"):
        words += f", split {split}{size_of(dataset.get('size'))}"
    if result.get("task") in LEARNING_TASKS and dataset.get("train_split"):
        source = "neighbors from" if result["task"] == "knn" else "trained on"
        words += f", {source} {dataset['train_split']}{size_of(dataset.get('train_size'))}"
    if problem_type in (MULTI_LABEL, REGRESSION) and is_value(number):
        words += f"; {'regression, targets' if problem_type == REGRESSION else 'multi-label, classes'}: {number:,}"
    elif is_value(number) and number > 1:
        words += f"; {number:,} classes, chance {100 / number:.3g} %"
    return words


def size_of(images: Any) -> str:
    return f" ({images:,} images)" if is_value(images) else ""


def is_value(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(metric: str, value: float) -> str:
    return percent(value, 2) if is_share(metric) else f"{value:.4g}"


def name_of(metric: str) -> str:
    """A metric in words: `knn20_top1` is "top-1, k = 20"."""
    knn = re.fullmatch(r"knn(\d+)_top(\d+)", metric)
    if knn is not None:
        return f"top-{knn[2]}, k = {knn[1]}"
    knn = re.fullmatch(r"knn(\d+)_(map|r2|mae|rmse)", metric)
    if knn is not None:
        return f"{WORDS[knn[2]]}, k = {knn[1]}"
    own = re.fullmatch(r"(?:linear|linear_cached|finetune|evaluate)_(top\d+)", metric)
    words = (own[1] if own else metric).replace("_", " ")
    words = re.sub(r"\b(map|r2|mae|rmse|ece|f1)\b", lambda found: WORDS[found[1]], words)
    return re.sub(r"\btop(\d+)", r"top-\1", words)
