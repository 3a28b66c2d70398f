"""The model card of a run or a converted model, from what its folder holds."""

import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model.image_processing_mocov3 import MoCoV3ImageProcessor
from ..problem_types import MULTI_LABEL, REGRESSION
from ..results import TASKS, is_share
from ..run_folder import PROCESSOR, RunFolder, read_object
from ..storage import is_local
from ..zoo import load_zoo


# A card without this line is a user's own and is never replaced.
MARKER = "<!-- written by mocov3_hf; a card without this line is left alone -->"
DEFAULT_LICENSE = "other"
LIBRARY = "transformers"
PAPER = "https://arxiv.org/abs/2104.02057"
CITATION = """```bibtex
@inproceedings{chen2021mocov3,
  title     = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author    = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}
```"""
# Last part of a metric's name: its type in the Hub's metadata, and its name.
METRICS = {
    "top1": ("accuracy", "Top-1 accuracy"),
    "top5": ("accuracy", "Top-5 accuracy"),
    "map": ("mean_average_precision", "Mean average precision"),
    "micro_f1": ("f1", "Micro F1"),
    "macro_f1": ("f1", "Macro F1"),
    "r2": ("r_squared", "R²"),
    "mae": ("mae", "Mean absolute error"),
    "rmse": ("rmse", "Root mean squared error"),
}
SHARES = ("accuracy", "mean_average_precision", "f1")
PROBLEMS = {MULTI_LABEL: ", multi-label", REGRESSION: ", regression"}
PLOTS = (".png", ".svg")


def compose(data: ModelCardData, sections: list[str]) -> str:
    """A model card: metadata and sections of Markdown."""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def run_card(run: RunFolder, repo_id: str, license: str | None = None) -> str:
    """
    The card of a model folder: how to use it, results, recipe and plots.

    Args:
        run: The folder.
        repo_id: `USER/NAME` on the Hub.
        license: License of the weights; that of the original by default, for a converted model.
    """
    title = repo_id.rpartition("/")[2]
    results = eval_results(run)
    sections = [
        MARKER,
        f"# {title}",
        introduction(run),
        "## Use it",
        f"```python\n{usage(run, repo_id)}\n```",
        "## Results",
        results_table(results),
        "## Training",
        training(run),
        "## Limitations",
        "Only the results above were measured. Test the features on your own images before you rely on them.",
        "## Citation",
        CITATION,
    ]
    return compose(metadata(run, title, results, license), sections)


def metadata(run: RunFolder, title: str, results: list[EvalResult], license: str | None) -> ModelCardData:
    datasets = [str(row["dataset"]["name"]) for row in run.results if (row.get("dataset") or {}).get("name")]
    if run.recipe.get("dataset_name"):
        datasets.append(str(run.recipe["dataset_name"]))
    starts = [run.recipe.get("model"), run.recipe.get("model_name_or_path")]
    starts += [(row.get("settings") or {}).get("base_model") for row in run.results]
    base_model = next((str(name) for name in starts if name), None)
    return ModelCardData(
        license=license or original_license(run) or DEFAULT_LICENSE,
        library_name=LIBRARY,
        pipeline_tag="image-classification" if run.kind == "classifier" else "image-feature-extraction",
        tags=["moco-v3", "self-supervised-learning", "vision", "mocov3_hf"] + ["converted"] * bool(run.conversion),
        datasets=sorted({name for name in datasets if is_hub_id(name)}) or None,
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        metrics=list(dict.fromkeys(entry.metric_type for entry in results)) or None,
        model_name=title,
        eval_results=results or None,
    )


def original_license(run: RunFolder) -> str | None:
    """License of the published weights that a folder was converted from; None for other weights."""
    entry = load_zoo().get((run.conversion.get("source") or {}).get("name"))
    return entry.publisher.license if entry is not None else None


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub; the name of a local folder has no place in a public card."""
    parts = name.split("/")
    return len(parts) in (1, 2) and all(parts) and not is_local(name)


def eval_results(run: RunFolder) -> list[EvalResult]:
    """The last value of every metric on every data set, for the card's `model-index`; shares in percent."""
    entries = {}
    for row in run.results:
        dataset = row.get("dataset") or {}
        name = str(dataset.get("name", "unknown"))
        shown = name if is_hub_id(name) else Path(name).name
        task_type, task_name = TASKS.get(row.get("task"), ("image-classification", str(row.get("task"))))
        for metric, value in row["metrics"].items():
            kind = next((kind for kind in METRICS if metric == kind or metric.endswith(f"_{kind}")), None)
            if kind is None or not isinstance(value, int | float):
                continue
            prefix, (metric_type, metric_name) = metric.removesuffix(kind).rstrip("_"), METRICS[kind]
            entries[(row.get("task"), name, metric)] = EvalResult(
                task_type=task_type,
                task_name=task_name + PROBLEMS.get(dataset.get("problem_type"), ""),
                dataset_type=shown,
                dataset_name=shown,
                dataset_config=dataset.get("config"),
                dataset_split=dataset.get("test_split") or dataset.get("split"),
                metric_type=metric_type,
                metric_name=metric_name + (f" ({prefix})" if prefix else ""),
                metric_value=round(100 * value, 2) if is_share(metric) else float(f"{value:.4g}"),
            )
    return list(entries.values())


def introduction(run: RunFolder) -> str:
    backbone = run.backbone.get("model_type", "vision")
    kind = "classifier" if run.kind == "classifier" else "encoder"
    kind = {MULTI_LABEL: "multi-label classifier", REGRESSION: "regression model"}.get(problem_type(run), kind)
    method = f"MoCo v3 ([Chen et al., 2021]({PAPER}))"
    text = f"A `{backbone}` {kind}, pre-trained with {method} in `mocov3_hf`."
    if run.conversion:
        source = run.conversion.get("source") or {}
        name = source.get("name") or source.get("url") or source.get("file")
        text = (
            f"A `{backbone}` {kind} of {method}, converted exactly from `{name}` (SHA-256 `{source.get('sha256')}`)"
            " with `mocov3_hf`."
        )
    if run.recipe.get("num_train_epochs"):
        text += f" Pre-trained without labels for {run.recipe['num_train_epochs']} epochs."
    return text


def problem_type(run: RunFolder) -> str | None:
    """What the outputs of a classifier mean, if its configuration says it."""
    return run.config.get("problem_type") if run.kind == "classifier" else None


def usage(run: RunFolder, repo_id: str) -> str:
    processor = read_object(run.path / PROCESSOR, [])
    if processor.get("image_processor_type") == MoCoV3ImageProcessor.__name__:
        return usage_with_arrays(run, repo_id, processor["num_channels"])
    if run.kind == "classifier":
        return (
            "from transformers import pipeline\n\n"
            f'classify = pipeline("image-classification", model="{repo_id}", trust_remote_code=True)\n'
            + {
                MULTI_LABEL: 'classify("image.jpg", top_k=None)  # the probability of each class on its own',
                REGRESSION: 'classify("image.jpg", top_k=None)  # scores are the values of the targets',
            }.get(problem_type(run), 'classify("image.jpg")')
        )
    return (
        "from transformers import pipeline\n\n"
        f'extract = pipeline("image-feature-extraction", model="{repo_id}", pool=True, trust_remote_code=True)\n'
        'features = extract("image.jpg")\n\n'
        "# With mocov3_hf installed, `import mocov3_hf` replaces trust_remote_code."
    )


def usage_with_arrays(run: RunFolder, repo_id: str, num_channels: int) -> str:
    """For images that PIL does not hold, and that the pipelines would convert to 8-bit RGB."""
    model_class, result = "AutoModel", "features = model(**inputs).pooler_output"
    if run.kind == "classifier":
        model_class = "AutoModelForImageClassification"
        function = {MULTI_LABEL: ".sigmoid()", REGRESSION: ""}.get(problem_type(run), ".softmax(-1)")
        result = f"scores = model(**inputs).logits{function}"
    return (
        f"import numpy as np\nimport torch\nfrom transformers import AutoImageProcessor, {model_class}\n\n"
        f'options = {{"pretrained_model_name_or_path": "{repo_id}", "trust_remote_code": True}}\n'
        "processor = AutoImageProcessor.from_pretrained(**options)\n"
        f"model = {model_class}.from_pretrained(**options).eval()\n"
        f'image = np.load("image.npy")  # ({num_channels}, height, width), as stored: the processor scales it\n'
        'inputs = processor(image, input_data_format="channels_first", return_tensors="pt")\n'
        f"with torch.no_grad():\n    {result}\n\n"
        "# With mocov3_hf installed, `import mocov3_hf` replaces trust_remote_code."
    )


def results_table(results: list[EvalResult]) -> str:
    if not results:
        return "No results yet."
    shares = [entry.metric_type in SHARES for entry in results]
    unit = "" if all(shares) else " %"
    lines = [f"| task | data set | split | metric | value{'' if unit else ' (%)'} |", "|---|---|---|---|---|"]
    lines += [
        f"| {entry.task_name} | {entry.dataset_name} | {entry.dataset_split or ''} | {entry.metric_name}"
        f" | {f'{entry.metric_value:.2f}{unit}' if share else f'{entry.metric_value:g}'} |"
        for entry, share in zip(results, shares, strict=True)
    ]
    return "\n".join(lines)


def training(run: RunFolder) -> str:
    """The recipe, without local paths, and the plots."""
    public = {key: value for key, value in run.recipe.items() if not names_a_path(value)}
    parts = [f"```yaml\n{yaml.safe_dump(public, sort_keys=False).strip()}\n```"] if public else []
    plots = sorted(path.relative_to(run.path) for path in run.path.rglob("*") if path.suffix in PLOTS)
    parts += [f"![{plot.stem}]({plot.as_posix()})" for plot in plots]
    return "\n\n".join(parts) or "No training metadata available."


def names_a_path(value: Any) -> bool:
    return isinstance(value, str) and is_local(value) and ("/" in value or os.path.exists(value))
