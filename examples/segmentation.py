"""
Fine-tune a pre-trained encoder for semantic segmentation (UperNet), beside the same model from random weights.

    pip install "mocov3_hf[examples]"
    python examples/segmentation.py --dataset_name NAME_OR_FOLDER --model runs/first --output_dir runs/segmentation

The data set has a column of images and one of masks, whose pixels are classes (255 is ignored): on the Hub for example
segments/sidewalk-semantic (`--image_column pixel_values --mask_column label`). Prints the mean IoU of both, and writes
it to comparison.json.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comparison import Options, compare, open_split, pyramid_config, statistics_of
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from mocov3_hf.options import Command, option, parse
from mocov3_hf.reporting import UsageError, reporting
from mocov3_hf.requirements import require_packages


IGNORED = 255


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(Options):
    """Segmentation"""

    mask_column: str = option("mask", "Column of the masks.")
    num_labels: int | None = option(
        None, "Number of classes; by default one more than the largest in the training masks."
    )


COMMAND = Command("segmentation", "Fine-tune an encoder for segmentation.", (SegmentationOptions,))


class Collator:
    """From rows to `pixel_values` float32 (B, 3, S, S) and `labels` int64 (B, S, S)."""

    def __init__(self, options: SegmentationOptions, num_labels: int, is_training: bool):
        size = (options.image_size, options.image_size)
        crop = v2.RandomResizedCrop(size, scale=tuple(options.crop_scale))
        self.transform = v2.Compose(
            [
                *([crop, v2.RandomHorizontalFlip(options.flip_probability)] if is_training else [v2.Resize(size)]),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                v2.Normalize(*statistics_of(options)),
            ]
        )
        self.columns, self.num_labels = (options.image_column, options.mask_column), num_labels

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images, masks = zip(*(self.transform(*self.read(row)) for row in rows), strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.stack(masks)}

    def read(self, row: dict[str, Any]) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = (row[name] for name in self.columns)
        mask = classes_of(mask)
        if largest_class(mask) >= self.num_labels:
            raise UsageError(f"a mask has class {largest_class(mask)} of {self.num_labels}: pass --num_labels")
        return tv_tensors.Image(v2.functional.pil_to_tensor(image.convert("RGB"))), tv_tensors.Mask(mask)


def classes_of(mask: Image.Image) -> torch.Tensor:
    """The pixels of a mask, uint8 or int32 (H, W); ValueError if it has colors."""
    values = torch.from_numpy(np.array(mask))
    if values.dim() != 2:
        raise UsageError(f"masks need one channel, whose values are classes, got mode {mask.mode}")
    return values


def largest_class(mask: torch.Tensor) -> int:
    """The largest class of a mask without the pixels that are ignored."""
    return int(torch.where(mask == IGNORED, 0, mask).max())


def main(arguments: list[str]) -> dict[str, Any]:
    require_packages("this example", "examples", {"torchmetrics": "torchmetrics"})
    from torchmetrics.classification import MulticlassJaccardIndex

    (options,) = parse(COMMAND, arguments)
    columns = {options.image_column: "--image_column", options.mask_column: "--mask_column"}
    train, test = (open_split(options, split, columns) for split in (options.train_split, options.test_split))
    masks = train[options.mask_column]
    num_labels = options.num_labels or 1 + max(largest_class(classes_of(mask)) for mask in masks)

    def build() -> UperNetForSemanticSegmentation:
        config = UperNetConfig(
            backbone_config=pyramid_config(options, ["stage1", "stage2", "stage3", "stage4"]),
            hidden_size=options.decoder_width,
            auxiliary_channels=options.decoder_width,
            num_labels=num_labels,
            loss_ignore_index=IGNORED,
        )
        return UperNetForSemanticSegmentation(config)

    return compare(
        options,
        build,
        train=train,
        test=test,
        collators=(Collator(options, num_labels, True), Collator(options, num_labels, False)),
        metric=MulticlassJaccardIndex(num_labels, ignore_index=IGNORED),
        read=lambda predictions, labels: (torch.as_tensor(predictions), torch.as_tensor(labels)),
        select=lambda logits, labels: logits.argmax(1),
        names={"": "mean IoU"},
    )


if __name__ == "__main__":
    with reporting():
        main(sys.argv[1:])
