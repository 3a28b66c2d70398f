"""
Model cards of the published models, generated from the zoo's table:

    python -m mocov3_hf.hub.cards --output_dir model_cards
"""

import argparse
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from .facts import (
    ARCHITECTURES,
    CITATION,
    FEATURE_WIDTHS,
    LIBRARY,
    PAPER,
    STAGES,
    Published,
    carded_models,
    published_models,
)


RECIPE_NAMES = {
    "optimizer": "optimizer",
    "learning_rate": "learning rate at this batch size",
    "weight_decay": "weight decay",
    "momentum": "momentum",
    "batch_size": "global batch size",
    "epochs": "epochs",
    "warmup_epochs": "warm-up epochs",
    "schedule": "schedule",
    "temperature": "temperature",
    "min_crop_scale": "smallest crop (fraction of the area)",
    "patch_projection": "patch projection",
    "clip_grad_norm": "gradient clipping (norm)",
    "body": "body",
    "drop_path_rate": "drop path rate",
    "label_smoothing": "label smoothing",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "rand_augment": "RandAugment",
    "random_erasing": "random erasing",
    "weight_ema": "momentum of the weight average",
}


def zoo_card(model: Published) -> str:
    """The card of a published model: YAML metadata and Markdown."""
    row = model.row
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
        f"{row['params_m']:.2f} M parameters"
        + (" (encoder, projector, predictor and momentum copy)" if row["stage"] == "pretrained" else "")
        + f"; {row['gflops']:.2f} G multiply-adds for the encoder's forward pass at 224×224.",
        "## License",
        f"{model.source['license_note']} The conversion adds no restriction; the code of `mocov3_hf` is Apache-2.0.",
        "## Limits",
        limits(model),
        "## Citation",
        CITATION,
    ]
    return f"---\n{metadata(model)}\n---\n\n" + "\n\n".join(sections) + "\n"


def metadata(model: Published) -> str:
    row = model.row
    results = None
    if row.get("top1"):
        results = [
            EvalResult(
                task_type="image-classification",
                task_name=f"Image classification, {STAGES[row['stage']]}",
                dataset_type="ILSVRC/imagenet-1k",
                dataset_name="ImageNet-1k",
                dataset_split="validation",
                metric_type="accuracy",
                metric_name="Top-1 accuracy",
                metric_value=row["top1"],
                verified=False,
                source_name=f"published by {model.source['title']}, not re-measured",
                source_url=model.source["homepage"],
            )
        ]
    return ModelCardData(
        license=model.source["license"],
        library_name=LIBRARY,
        pipeline_tag="image-classification" if model.is_classifier else "image-feature-extraction",
        tags=["moco-v3", "self-supervised-learning", "vision", row["architecture"]],
        datasets=["ILSVRC/imagenet-1k"],
        metrics=["accuracy"] if results else None,
        model_name=model.name,
        eval_results=results,
    ).to_yaml()


def introduction(model: Published) -> str:
    row = model.row
    architecture = ARCHITECTURES[row["architecture"]]
    if row["stage"] == "pretrained":
        what = (
            f"A {architecture} pre-trained without labels by MoCo v3 ([Chen et al., 2021]({PAPER})) on ImageNet-1k"
            f" for {row['epochs']} epochs: the encoder with projector, predictor and momentum branch."
        )
    else:
        how = (
            "with a linear classifier trained on its frozen features"
            if row["stage"] == "linear"
            else "then fine-tuned whole as a classifier"
        )
        pretrained = published_models()[row["pretrained"]]
        what = (
            f"A {architecture} pre-trained without labels by MoCo v3 ([Chen et al., 2021]({PAPER})) on ImageNet-1k"
            f" for {pretrained.row['epochs']} epochs, {how} on ImageNet-1k for {row['epochs']} epochs. Its"
            f" pre-training is the model [`{pretrained.name}`]({pretrained.name}.md)."
        )
    source = f"The weights are those published by {model.source['title']}, converted exactly; none is trained here."
    return f"{what}\n\n{source}"


def get_it(model: Published) -> str:
    return (
        f"```bash\npython scripts/convert_checkpoint.py {model.name} --output_dir models/{model.name}\n```\n\n"
        f"downloads [the published file]({model.url}), checks the hash in its name, converts it and verifies the"
        " result by loading it back. From Python, `mocov3_hf.zoo.fetch` does it once and keeps the folder in Hugging"
        " Face's cache."
    )


def snippets(model: Published) -> list[tuple[str, str]]:
    """Three ways to use the model, each with a sentence; every one runs as it stands beside an `image.jpg`."""
    fetch = f'from mocov3_hf.zoo import fetch\n\nfolder = fetch("{model.name}")'
    width = FEATURE_WIDTHS[model.row["architecture"]]
    load = (
        "import torch\nfrom PIL import Image\nfrom transformers import AutoImageProcessor, {classes}\n\n"
        f"{fetch}\nprocessor = AutoImageProcessor.from_pretrained(folder)\n"
    )
    inputs = 'inputs = processor(Image.open("image.jpg"), return_tensors="pt")\nwith torch.no_grad():\n'
    features = (
        "Features for retrieval, clustering or a probe of your own:",
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
            "To go on pre-training, or to fine-tune with fresh classes:",
            "import torch\nfrom transformers import AutoModelForImageClassification, AutoModelForPreTraining\n\n"
            f"{fetch}\n"
            "model = AutoModelForPreTraining.from_pretrained(folder)\n"
            'size = getattr(model.config.backbone_config, "image_size", 224)\n'
            "views = torch.randn(2, 4, 3, size, size)  # two views of four images\n"
            "loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss\n"
            "classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=10)",
        ),
    ]


def training(model: Published) -> str:
    row = model.row
    lines = [f"- {RECIPE_NAMES[key]}: {value}" for key, value in row["recipe"].items()]
    if row["stage"] == "pretrained":
        lines.insert(0, f"- epochs: {row['epochs']}")
        tail = (
            f"The same recipe is part of this package: `accelerate launch scripts/pretrain.py --recipe {model.name}`."
        )
    else:
        tail = "As published; the evaluation scripts of this package follow the same protocol."
    return "On ImageNet-1k, in mixed precision:\n\n" + "\n".join(lines) + f"\n\n{tail}"


def accuracy(model: Published) -> str:
    row = model.row
    source = f"[{model.source['title']}]({model.source['homepage']})"
    if row.get("top1"):
        return (
            f"ImageNet-1k validation, top-1: **{row['top1']:.2f} %** as published by {source}; not re-measured here."
        )
    heads = [other for other in carded_models() if other.row.get("pretrained") == model.name]
    if not heads:
        return f"{source} publishes no accuracy for this pre-training alone."
    lines = [
        f"- {STAGES[other.row['stage']]}: {other.row['top1']:.2f} % ([`{other.name}`]({other.name}.md))"
        for other in heads
    ]
    return f"ImageNet-1k validation, top-1, as published by {source}; not re-measured here:\n\n" + "\n".join(lines)


def limits(model: Published) -> str:
    text = (
        "Trained on ImageNet-1k alone: photographs with one centred object, of the places and habits in which they"
        " were taken, with the biases of that collection. Features of other kinds of images (medical, satellite,"
        " drawings, text) should be tested before they are trusted; people's identity, origin or character cannot be"
        " read from them."
    )
    if model.is_classifier:
        text += " The classifier always answers with one of ImageNet's 1000 classes, also where none fits."
    return text


def index_card() -> str:
    """The table of contents of the cards."""
    lines = [
        "# Model cards",
        "",
        "One card per published model, generated by `python -m mocov3_hf.hub.cards --output_dir model_cards` from the",
        "zoo's table; the card of a run of your own is written by `scripts/push_to_hub.py`. Accuracy is ImageNet-1k",
        "top-1 as published, not re-measured here.",
        "",
        "| model | architecture | stage | epochs | parameters (M) | GFLOPs | top-1 (%) |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in carded_models():
        row = model.row
        top1 = f"{row['top1']:.2f}" if row.get("top1") else ""
        lines.append(
            f"| [{model.name}]({model.name}.md) | {ARCHITECTURES[row['architecture']]} | {STAGES[row['stage']]}"
            f" | {row['epochs']} | {row['params_m']:.2f} | {row['gflops']:.2f} | {top1} |"
        )
    return "\n".join(lines) + "\n"


def all_cards() -> dict[str, str]:
    """Every file of `model_cards/` by name."""
    return {"README.md": index_card()} | {f"{model.name}.md": zoo_card(model) for model in carded_models()}


def main(argv: list[str] | None = None) -> None:
    """Write all cards into a folder."""
    parser = argparse.ArgumentParser(description="Write the model cards of the published models.")
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in all_cards().items():
        (args.output_dir / name).write_text(text, encoding="utf-8")
    print(f"{len(all_cards())} files written to {args.output_dir}")


if __name__ == "__main__":
    main()
