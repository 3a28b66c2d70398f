"""
Model cards of the published models, generated from `zoo.yaml`:

    python -m mocov3_hf.hub.cards --output_dir model_cards
"""

import argparse
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..storage import write_text
from ..zoo import ZooEntry, load_zoo
from .run_card import CITATION, LIBRARY, PAPER, compose


ARCHITECTURES = {
    "resnet50": "ResNet-50",
    "vit-small": "ViT-S/16 with 12 heads",
    "vit-base": "ViT-B/16",
    "vit-large": "ViT-L/16",
}
STAGES = {"pretrained": "pre-trained", "linear": "linear evaluation", "finetuned": "fine-tuned"}
FEATURE_WIDTHS = {"resnet50": 2048, "vit-small": 384, "vit-base": 768, "vit-large": 1024}
RECIPE_NAMES = {
    "optimizer": "optimizer",
    "learning_rate": "peak learning rate",
    "weight_decay": "weight decay",
    "momentum": "SGD momentum",
    "ema_decay": "EMA decay of the momentum encoder",
    "batch_size": "global batch size",
    "epochs": "epochs",
    "warmup_epochs": "warmup epochs",
    "schedule": "learning rate schedule",
    "temperature": "temperature",
    "min_crop_scale": "minimum crop scale (fraction of the area)",
    "patch_projection": "patch projection",
    "clip_grad_norm": "gradient norm clipping",
    "backbone": "backbone",
    "drop_path_rate": "stochastic depth rate",
    "label_smoothing": "label smoothing",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "rand_augment": "RandAugment",
    "random_erasing": "random erasing",
    "weight_ema_decay": "EMA decay of the weights",
}


def carded_models() -> list[ZooEntry]:
    """The published models that have a card: those published with mmpretrain's recipes."""
    return [entry for entry in load_zoo().values() if entry.source == "openmmlab"]


def zoo_card(model: ZooEntry) -> str:
    """The card of a published model: YAML metadata and Markdown."""
    sections = [
        f"# {model.name}",
        introduction(model),
        "## Get it",
        get_it(model),
        "## Use it",
        *(f"{text}\n\n```python\n{code}\n```" for text, code in snippets(model)),
        "## Training",
        training(model),
        "## Accuracy",
        accuracy(model),
        "## Size",
        f"{model.params_m:.2f} M parameters"
        + ("" if model.is_classifier else " (encoder, projector, predictor and momentum encoder)")
        + f"; {model.gflops:.2f} G multiply-adds for a forward pass of the encoder at 224×224.",
        "## License",
        f"{model.publisher.license_note} The conversion adds no restriction; the code of `mocov3_hf` is Apache-2.0.",
        "## Limitations",
        limitations(model),
        "## Citation",
        CITATION,
    ]
    return compose(metadata(model), sections)


def metadata(model: ZooEntry) -> ModelCardData:
    results = None
    if model.top1:
        results = [
            EvalResult(
                task_type="image-classification",
                task_name=f"Image classification, {STAGES[model.stage]}",
                dataset_type="ILSVRC/imagenet-1k",
                dataset_name="ImageNet-1k",
                dataset_split="validation",
                metric_type="accuracy",
                metric_name="Top-1 accuracy",
                metric_value=model.top1,
                verified=False,
                source_name=f"published by {model.publisher.title}, not re-measured",
                source_url=model.publisher.homepage,
            )
        ]
    return ModelCardData(
        license=model.publisher.license,
        library_name=LIBRARY,
        pipeline_tag="image-classification" if model.is_classifier else "image-feature-extraction",
        tags=["moco-v3", "self-supervised-learning", "vision", model.architecture],
        datasets=["ILSVRC/imagenet-1k"],
        metrics=["accuracy"] if results else None,
        model_name=model.name,
        eval_results=results,
    )


def introduction(model: ZooEntry) -> str:
    what = (
        f"A {ARCHITECTURES[model.architecture]} pre-trained without labels with MoCo v3 ([Chen et al., 2021]({PAPER}))"
        " on ImageNet-1k"
    )
    if model.is_classifier:
        pretrained = load_zoo()[model.pretrained]
        head = "a linear classifier was trained on its frozen features"
        how = head if model.stage == "linear" else "all its weights were fine-tuned for classification"
        what += (
            f" for {pretrained.epochs} epochs ([`{pretrained.name}`]({pretrained.name}.md)); then {how} on ImageNet-1k"
            f" for {model.epochs} epochs."
        )
    else:
        what += f" for {model.epochs} epochs: encoder, projector, predictor and momentum encoder."
    return f"{what}\n\nThe weights are those published by {model.publisher.title}, converted exactly."


def get_it(model: ZooEntry) -> str:
    return (
        f"```bash\nmocov3 convert {model.name} --output_dir models/{model.name}\n```\n\n"
        f"downloads [the published file]({model.url}), verifies the hash in its name, converts it and verifies the"
        " result by loading it back. From Python, `mocov3_hf.zoo.fetch` does so once and keeps the folder in Hugging"
        " Face's cache."
    )


def snippets(model: ZooEntry) -> list[tuple[str, str]]:
    """Three ways to use the model: a sentence and code that runs beside an `image.jpg`."""
    fetch = f'from mocov3_hf.zoo import fetch\n\nfolder = fetch("{model.name}")'
    width = FEATURE_WIDTHS[model.architecture]
    load = (
        "import torch\nfrom PIL import Image\nfrom transformers import AutoImageProcessor, {classes}\n\n"
        f"{fetch}\nprocessor = AutoImageProcessor.from_pretrained(folder)\n"
    )
    inputs = 'inputs = processor(Image.open("image.jpg"), return_tensors="pt")\nwith torch.no_grad():\n'
    features = (
        "Features for retrieval, clustering or a classifier:",
        load.format(classes="AutoModel")
        + "model = AutoModel.from_pretrained(folder).eval()\n"
        + inputs
        + f"    features = model(**inputs).pooler_output  # (1, {width})",
    )
    if model.is_classifier:
        return [
            (
                "As a classifier, in one line:",
                f"from transformers import pipeline\n\n{fetch}\n"
                'classify = pipeline("image-classification", model=folder)\nprint(classify("image.jpg"))',
            ),
            (
                "The same step by step, for batches and probabilities:",
                load.format(classes="AutoModelForImageClassification")
                + "model = AutoModelForImageClassification.from_pretrained(folder).eval()\n"
                + inputs
                + "    probabilities = model(**inputs).logits.softmax(dim=-1)  # (1, 1000)\n"
                + "best = probabilities[0].topk(5)\n"
                + "print([(model.config.id2label[int(i)], float(p)) for p, i in zip(*best)])",
            ),
            features,
        ]
    return [
        features,
        (
            "The same as a pipeline:",
            f"from transformers import pipeline\n\n{fetch}\n"
            'extract = pipeline("image-feature-extraction", model=folder, pool=True)\n'
            f'features = extract("image.jpg")  # [[{width} numbers]]',
        ),
        (
            "To continue pre-training, or to fine-tune on other classes:",
            "import torch\nfrom transformers import AutoModelForImageClassification, AutoModelForPreTraining\n\n"
            f"{fetch}\n"
            "model = AutoModelForPreTraining.from_pretrained(folder)\n"
            'size = getattr(model.config.backbone_config, "image_size", 224)\n'
            "views = torch.randn(2, 4, 3, size, size)  # two views of four images\n"
            "loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss\n"
            "classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=10)",
        ),
    ]


def training(model: ZooEntry) -> str:
    lines = [f"- {RECIPE_NAMES[key]}: {value}" for key, value in model.recipe.items()]
    if model.is_classifier:
        command = "linear-probe" if model.stage == "linear" else "finetune"
        tail = f"This is the published recipe; `mocov3 {command}` follows the same protocol."
    else:
        lines.insert(0, f"- epochs: {model.epochs}")
        tail = f"To train it yourself: `accelerate launch -m mocov3_hf pretrain --recipe {model.name}`."
    return "On ImageNet-1k, in mixed precision:\n\n" + "\n".join(lines) + f"\n\n{tail}"


def accuracy(model: ZooEntry) -> str:
    source = f"[{model.publisher.title}]({model.publisher.homepage})"
    if model.top1:
        return f"ImageNet-1k validation, top-1: **{model.top1:.2f} %** as published by {source}; not re-measured here."
    heads = [other for other in carded_models() if other.pretrained == model.name]
    if not heads:
        return f"{source} publishes no accuracy for this model."
    lines = [f"- {STAGES[other.stage]}: {other.top1:.2f} % ([`{other.name}`]({other.name}.md))" for other in heads]
    return f"ImageNet-1k validation, top-1, as published by {source}; not re-measured here:\n\n" + "\n".join(lines)


def limitations(model: ZooEntry) -> str:
    text = (
        "Trained on ImageNet-1k only: photographs with one centered object, with the geographic, cultural and other"
        " biases of that data set. Test the features on other kinds of images (medical, satellite, drawings, text)"
        " before you rely on them. Do not infer the identity, origin or character of people from them."
    )
    if model.is_classifier:
        text += " The classifier always returns one of ImageNet's 1000 classes, even if none fits."
    return text


def index_card() -> str:
    """The table of contents of the cards."""
    lines = [
        "# Model cards",
        "",
        "One card per published model, generated from `src/mocov3_hf/zoo.yaml` with",
        "`python -m mocov3_hf.hub.cards --output_dir model_cards`; do not edit them by hand. `mocov3 push` writes the",
        "card of a model of your own. Accuracy is ImageNet-1k top-1 as published, not re-measured here.",
        "",
        "| model | architecture | stage | epochs | parameters (M) | GFLOPs | top-1 (%) |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in carded_models():
        top1 = f"{model.top1:.2f}" if model.top1 else ""
        lines.append(
            f"| [{model.name}]({model.name}.md) | {ARCHITECTURES[model.architecture]} | {STAGES[model.stage]}"
            f" | {model.epochs} | {model.params_m:.2f} | {model.gflops:.2f} | {top1} |"
        )
    return "\n".join(lines) + "\n"


def all_cards() -> dict[str, str]:
    """Every file of `model_cards/` by name."""
    return {"README.md": index_card()} | {f"{model.name}.md": zoo_card(model) for model in carded_models()}


def main(arguments: list[str] | None = None) -> None:
    """Write all cards to a folder."""
    parser = argparse.ArgumentParser(description="Write the model cards of the published models.")
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"))
    output_dir = parser.parse_args(arguments).output_dir
    for name, text in all_cards().items():
        write_text(output_dir / name, text)
    print(f"{len(all_cards())} files written to {output_dir}")


if __name__ == "__main__":
    main()
