"""What segmentation.py and detection.py share: options, data, and training from pre-trained and random weights."""

import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from mocov3_hf import MoCoV3Config, dense
from mocov3_hf.data.sources import open_dataset
from mocov3_hf.loading import load_processor
from mocov3_hf.model.configuration_mocov3 import is_plain_vit
from mocov3_hf.options import option
from mocov3_hf.reporting import UsageError
from mocov3_hf.storage import write_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Data, model and training"""

    dataset_name: str = option(
        help="Name on the Hub, or folder: images as `datasets.load_dataset` reads them, or written by `save_to_disk`.",
        metavar="DATASET",
    )
    model: str = option(help="Pre-trained encoder: run or model folder, Hub id or published name.", metavar="MODEL")
    output_dir: str = option(help="Folder for both models and comparison.json.", metavar="DIR")
    train_split: str = option("train", "Split to train on; slices such as `train[:500]` work.")
    test_split: str = option("test", "Split to evaluate on.")
    image_column: str = option("image", "Column of the images.")
    image_size: int = option(
        224, "Side length of the images in pixels. The encoder may have been trained at another.", at_least=32
    )
    crop_scale: list[float] = option([0.5, 1.0], "Range of areas of random crops for training.", above=0, at_most=1)
    flip_probability: float = option(0.5, "Probability of a horizontal flip.", at_least=0, at_most=1)
    decoder_width: int = option(256, "Width of the decoder.", at_least=32)
    num_train_epochs: int = option(20, "Epochs of training.", at_least=1)
    max_steps: int = option(-1, "Number of training steps, instead of epochs.")
    train_batch_size: int = option(16, "Images per step.", at_least=1)
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW, with a linear warmup and cosine decay.", above=0)
    weight_decay: float = option(0.05, "Decoupled weight decay.", at_least=0)
    seed: int = option(0, "Seed of weights, order and augmentation.")


def open_split(
    options: Options, split: str, columns: dict[str, str], others: Mapping[str, str] | None = None
) -> Dataset:
    """
    One split of the data, with decoded images.

    Args:
        options: Name of the data.
        split: Name, possibly of a slice.
        columns: Columns of images, with the options that name them.
        others: More columns that must be there, in the same way.

    Raises:
        ValueError: No such data set, split or column.
    """
    data = open_dataset(options.dataset_name, split=split)
    for name, flag in {**columns, **(others or {})}.items():
        if name not in data.features:
            raise UsageError(f"there is no column {name!r} among {', '.join(data.features)}: pass {flag}")
    for name in columns:
        data = data.cast_column(name, Image())
    return data


def pyramid_config(options: Options, levels: list[str]) -> MoCoV3Config:
    """The encoder as a backbone that returns maps of several strides: those of a ResNet, or a pyramid on a ViT."""
    config = dense.backbone_config(options.model)
    if config.num_channels != 3:
        raise UsageError(f"this example reads RGB images, and {options.model!r} takes {config.num_channels} channels")
    return dense.backbone_config(options.model, out_features=levels, add_fpn=is_plain_vit(config.backbone_config))


def statistics_of(options: Options) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that the encoder was trained with, for values in [0, 1]."""
    processor = load_processor(options.model, dense.backbone_config(options.model))
    return list(processor.image_mean), list(processor.image_std)


def compare(
    options: Options,
    build: Callable[[], PreTrainedModel],
    *,
    train: Dataset,
    test: Dataset,
    collators: tuple[Callable, Callable],
    metric: Any,
    read: Callable[[Any, Any], tuple[Any, Any]],
    select: Callable[[Any, Any], Any],
    names: Mapping[str, str],
) -> dict[str, Any]:
    """
    Train the same model from pre-trained and from random weights, print one table, and write `comparison.json`.

    Args:
        options: Of the command.
        build: The model, with random weights.
        train, test: Splits.
        collators: From rows to a batch, for training and for evaluation.
        metric: Of torchmetrics.
        read: From predictions and labels of a batch to the arguments of `metric`.
        select: From the outputs of the model and the labels to the predictions to keep.
        names: What to report: key of the result of `metric` to its heading; `""` for a result that is one number.

    Returns:
        The content of `comparison.json`.
    """
    results: dict[str, Any] = {}
    for start in ("pre-trained", "random"):
        set_seed(options.seed)
        model = build()
        if start == "pre-trained":
            dense.load_backbone(model, options.model)
        measured = copy.deepcopy(metric)

        def compute(batch, compute_result, measured=measured):
            measured.update(*read(batch.predictions, batch.label_ids))
            if not compute_result:
                return {}
            found = measured.compute()
            measured.reset()
            return {title: float(found[key] if key else found) for key, title in names.items()}

        arguments = TrainingArguments(
            os.path.join(options.output_dir, start),
            num_train_epochs=options.num_train_epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.train_batch_size,
            per_device_eval_batch_size=options.train_batch_size,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=1.0,
            seed=options.seed,
            remove_unused_columns=False,  # the collators need the images
            label_names=["labels"],
            batch_eval_metrics=True,
            eval_do_concat_batches=False,
            logging_steps=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train,
            data_collator=collators[0],
            compute_metrics=compute,
            preprocess_logits_for_metrics=select,
        )
        begin = time.monotonic()
        trainer.train()
        trainer.data_collator = collators[1]
        scores = trainer.evaluate(test)
        trainer.save_model()
        results[start] = {title: scores[f"eval_{title}"] for title in names.values()} | {
            "train_loss": trainer.state.log_history[-2]["train_loss"],
            "steps": trainer.state.global_step,
            "seconds": round(time.monotonic() - begin, 1),
        }
    content = {"options": asdict(options), "train_images": len(train), "test_images": len(test), "results": results}
    write_json(Path(options.output_dir) / "comparison.json", content)
    print(table(results))
    return content


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One line per start in Markdown; metrics between 0 and 1 in percent."""
    titles = [title for title in next(iter(results.values())) if title not in ("steps", "seconds", "train_loss")]
    lines = [f"| start | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for start, values in results.items():
        lines.append(f"| {start} | {' | '.join(f'{100 * values[title]:.1f} %' for title in titles)} |")
    return "\n".join(lines)
