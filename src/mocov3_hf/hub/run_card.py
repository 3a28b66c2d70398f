"""The model card of a run: what its folder tells, filled into the template `run_card.md`."""

import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from .facts import CITATION, LIBRARY, PAPER, published_models


MARKER = "<!-- written by mocov3_hf; a card without this line is left alone -->"
DEFAULT_LICENSE = "other"
TASKS = {
    "knn": ("image-feature-extraction", "k-nearest-neighbour classification"),
    "linear": ("image-classification", "Image classification, linear evaluation"),
    "linear_cached": ("image-classification", "Image classification, linear evaluation on cached features"),
    "evaluate": ("image-classification", "Image classification"),
    "finetune": ("image-classification", "Image classification, fine-tuned"),
}
METRICS = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
PLOTS = (".png", ".svg")


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def results_of(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in a folder's `results.json`; none where it has none."""
    content = read_json(folder / "results.json")
    results = content.get("results") if isinstance(content, dict) else None
    return [row for row in results or [] if isinstance(row, dict) and isinstance(row.get("metrics"), dict)]


def run_card(folder: str | Path, repo_id: str, license: str | None = None) -> str:
    """
    The card of a model folder: its task, results, recipe and plots.

    Args:
        folder (`str` or `Path`):
            With `config.json`, and what a run leaves beside it: `results.json`, `recipe.yaml`, `conversion.json`,
            plots.
        repo_id (`str`):
            `USER/NAME` on the Hub.
        license (`str`, *optional*):
            Identifier of the license of the weights; of a converted model that of the original where left out.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json") or {}
    recipe, conversion = read_yaml(folder / "recipe.yaml"), read_json(folder / "conversion.json")
    results = results_of(folder)
    architecture = (config.get("architectures") or ["MoCoV3Model"])[0]
    title = repo_id.rpartition("/")[2]
    return Template(files(__package__).joinpath("run_card.md").read_text(encoding="utf-8")).substitute(
        metadata=run_metadata(title, architecture, recipe, conversion, results, license),
        marker=MARKER,
        title=title,
        introduction=introduction(architecture, config, recipe, conversion, results),
        usage=usage(architecture, repo_id),
        results=results_table(results),
        training=training(folder, recipe),
        limits="Only what is listed above was measured. Test the features on your own images before you rely on them.",
        citation=CITATION,
    )


def is_classifier(architecture: str) -> bool:
    return architecture.endswith("ForImageClassification")


def run_metadata(
    title: str,
    architecture: str,
    recipe: dict[str, Any],
    conversion: dict[str, Any] | None,
    results: list[dict[str, Any]],
    license: str | None,
) -> str:
    datasets = [
        str(row["dataset"]["name"])
        for row in results
        if isinstance(row.get("dataset"), dict) and row["dataset"].get("name")
    ]
    if recipe.get("dataset_name"):
        datasets.insert(0, str(recipe["dataset_name"]))
    base_model = recipe.get("model_name_or_path") or next(
        (row["settings"].get("base_model") for row in results if row.get("settings", {}).get("base_model")), None
    )
    entries = eval_results(results)
    return ModelCardData(
        license=license or original_license(conversion) or DEFAULT_LICENSE,
        library_name=LIBRARY,
        pipeline_tag="image-classification" if is_classifier(architecture) else "image-feature-extraction",
        tags=["moco-v3", "self-supervised-learning", "vision", "mocov3_hf"] + (["converted"] if conversion else []),
        datasets=sorted({name for name in datasets if is_hub_id(name)}) or None,
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        metrics=["accuracy"] if entries else None,
        model_name=title,
        eval_results=entries or None,
    ).to_yaml()


def original_license(conversion: dict[str, Any] | None) -> str | None:
    """License of the published weights that a folder was converted from; None where it was from others."""
    model = published_models().get((conversion or {}).get("source", {}).get("name"))
    return model.source["license"] if model is not None else None


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub's; a local folder's has no place in a public card."""
    parts = name.split("/")
    return len(parts) in (1, 2) and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()


def eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    """The last value of every metric on every data set, for the card's `model-index`."""
    entries = {}
    for row in results:
        dataset = row.get("dataset") or {}
        name = str(dataset.get("name", "unknown"))
        shown = name if is_hub_id(name) else Path(name).name
        task_type, task_name = TASKS.get(row.get("task"), ("image-classification", str(row.get("task"))))
        for metric, value in row["metrics"].items():
            kind = metric.rpartition("_")[2]
            if kind not in METRICS or not isinstance(value, int | float):
                continue
            label = METRICS[kind] + (f" ({metric.rpartition('_')[0]})" if "_" in metric else "")
            entries[(row.get("task"), name, metric)] = EvalResult(
                task_type=task_type,
                task_name=task_name,
                dataset_type=shown,
                dataset_name=shown,
                dataset_config=dataset.get("config"),
                dataset_split=dataset.get("test_split") or dataset.get("split"),
                metric_type="accuracy",
                metric_name=label,
                metric_value=round(100 * value, 2),
            )
    return list(entries.values())


def introduction(
    architecture: str,
    config: dict[str, Any],
    recipe: dict[str, Any],
    conversion: dict[str, Any] | None,
    results: list[dict[str, Any]],
) -> str:
    body = (config.get("backbone_config") or {}).get("model_type", "vision")
    kind = "classifier" if is_classifier(architecture) else "encoder"
    text = f"A `{body}` {kind} trained by MoCo v3 ([Chen et al., 2021]({PAPER})) with `mocov3_hf`."
    if conversion:
        source = conversion.get("source", {})
        name = source.get("name") or source.get("url") or source.get("file")
        text = (
            f"A `{body}` {kind} of MoCo v3 ([Chen et al., 2021]({PAPER})), converted exactly from `{name}`"
            f" (SHA-256 `{source.get('sha256')}`) with `mocov3_hf`."
        )
    if recipe.get("num_train_epochs"):
        text += f" Pre-trained for {recipe['num_train_epochs']} epochs without labels."
    if results:
        text += f" Measured: {', '.join(sorted({str(row.get('task')) for row in results}))}."
    return text


def usage(architecture: str, repo_id: str) -> str:
    if is_classifier(architecture):
        return (
            "from transformers import pipeline\n\n"
            f'classify = pipeline("image-classification", model="{repo_id}", trust_remote_code=True)\n'
            'classify("image.jpg")'
        )
    return (
        "from transformers import pipeline\n\n"
        f'extract = pipeline("image-feature-extraction", model="{repo_id}", pool=True, trust_remote_code=True)\n'
        'features = extract("image.jpg")\n\n'
        "# With mocov3_hf installed, `import mocov3_hf` replaces trust_remote_code."
    )


def results_table(results: list[dict[str, Any]]) -> str:
    entries = eval_results(results)
    if not entries:
        return "None measured yet."
    lines = ["| task | data set | split | metric | value (%) |", "|---|---|---|---|---|"]
    lines += [
        f"| {entry.task_name} | {entry.dataset_name} | {entry.dataset_split or ''} | {entry.metric_name}"
        f" | {entry.metric_value:.2f} |"
        for entry in entries
    ]
    return "\n".join(lines)


def training(folder: Path, recipe: dict[str, Any]) -> str:
    """The recipe, without what names the machine it ran on, and the plots."""
    plots = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in PLOTS)
    parts = []
    if recipe:
        public = {key: value for key, value in recipe.items() if not is_local(value)}
        parts.append(f"```yaml\n{yaml.safe_dump(public, sort_keys=False).strip()}\n```")
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts) or "The folder tells nothing of its training."


def is_local(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
