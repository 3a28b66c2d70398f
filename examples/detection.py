"""
Fine-tune a pre-trained encoder for object detection (RT-DETR), beside the same model from random weights.

    pip install "mocov3_hf[examples]"
    python examples/detection.py --dataset_name rishitdagli/cppe-5 --model runs/first --output_dir runs/detection

The data set has a column `objects` with `bbox` (x, y, width, height in pixels) and `category`, as CPPE-5 and others on
the Hub. Prints the mean average precision of both (COCO's, over IoU 0.5 to 0.95), and writes it to comparison.json.
"""

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from comparison import Options, compare, open_split, pyramid_config, statistics_of
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor

from mocov3_hf import MoCoV3Backbone
from mocov3_hf.options import Command, option, parse
from mocov3_hf.reporting import UsageError, reporting
from mocov3_hf.requirements import require_packages


STRIDE = 32  # of the coarsest map


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(Options):
    """Detection"""

    objects_column: str = option("objects", "Column of the boxes and their classes.")
    num_queries: int = option(100, "Boxes per image.", at_least=1)
    num_denoising: int = option(
        100, "Queries for noisy boxes in training, which RT-DETR divides by the boxes of an image.", at_least=1
    )
    decoder_layers: int = option(3, "Layers of the decoder.", at_least=1)


COMMAND = Command("detection", "Fine-tune an encoder for detection.", (DetectionOptions,))


class Collator:
    """From rows to `pixel_values` float32 (B, 3, S, S) and `labels`: `class_labels` (n,) and `boxes` (n, 4) each."""

    def __init__(self, options: DetectionOptions, is_training: bool):
        self.size = options.image_size
        size = (self.size, self.size)
        crop = v2.RandomResizedCrop(size, scale=tuple(options.crop_scale))
        self.transform = v2.Compose(
            [
                *([crop, v2.RandomHorizontalFlip(options.flip_probability)] if is_training else [v2.Resize(size)]),
                v2.SanitizeBoundingBoxes(min_size=2),
                v2.ConvertBoundingBoxFormat("CXCYWH"),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(*statistics_of(options)),
            ]
        )
        self.columns = options.image_column, options.objects_column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        samples = [self.transform(self.read(row)) for row in rows]
        labels = [{"class_labels": each["labels"], "boxes": each["boxes"].data / self.size} for each in samples]
        return {"pixel_values": torch.stack([each["image"] for each in samples]), "labels": labels}

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        image, objects = (row[name] for name in self.columns)
        boxes = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
        return {
            "image": tv_tensors.Image(v2.functional.pil_to_tensor(image.convert("RGB"))),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(image.height, image.width)),
            "labels": torch.tensor(objects["category"], dtype=torch.int64),
        }


def class_names(objects: Any) -> list[str]:
    """The classes of a column of objects; ValueError if they have no names."""
    fields = objects if isinstance(objects, dict) else getattr(objects, "feature", {})
    category = fields.get("category") if "bbox" in fields else None
    names = getattr(getattr(category, "feature", category), "names", None)
    if names is None:
        raise UsageError("objects need `bbox` and `category` with class names, as in CPPE-5: pass --objects_column")
    return names


def read_predictions(size: int) -> Any:
    """From a batch of predictions and labels to boxes in pixels, as torchmetrics takes them."""
    processor = RTDetrImageProcessor()

    def read(predictions: Any, labels: Any) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
        logits, boxes = map(torch.as_tensor, predictions)
        outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
        found = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(size, size)] * len(boxes)
        )
        (labels,) = labels if isinstance(labels, tuple) else (labels,)
        targets = []
        for each in labels:
            center, extent = (size * torch.as_tensor(each["boxes"]).reshape(-1, 4)).split(2, dim=1)
            corners = torch.cat([center - extent / 2, center + extent / 2], dim=1)
            targets.append({"boxes": corners, "labels": torch.as_tensor(each["class_labels"])})
        return found, targets

    return read


def main(arguments: list[str]) -> dict[str, Any]:
    packages = {"torchmetrics": "torchmetrics", "pycocotools": "pycocotools", "scipy": "scipy"}
    require_packages("this example", "examples", packages)
    from torchmetrics.detection import MeanAveragePrecision

    (options,) = parse(COMMAND, arguments)
    if options.image_size % STRIDE != 0:
        raise UsageError(f"--image_size must be a multiple of {STRIDE} for RT-DETR, got {options.image_size}")
    columns, others = {options.image_column: "--image_column"}, {options.objects_column: "--objects_column"}
    train, test = (open_split(options, split, columns, others) for split in (options.train_split, options.test_split))
    names = class_names(train.features[options.objects_column])

    def build() -> RTDetrForObjectDetection:
        backbone, width = pyramid_config(options, ["stage2", "stage3", "stage4"]), options.decoder_width
        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=MoCoV3Backbone(backbone).channels,
            encoder_hidden_dim=width,
            encoder_ffn_dim=4 * width,
            d_model=width,
            decoder_in_channels=[width] * 3,
            decoder_layers=options.decoder_layers,
            decoder_ffn_dim=4 * width,
            num_queries=options.num_queries,
            num_denoising=options.num_denoising,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )
        return RTDetrForObjectDetection(config)

    return compare(
        options,
        build,
        train=train,
        test=test,
        collators=(Collator(options, True), Collator(options, False)),
        metric=MeanAveragePrecision(),
        read=read_predictions(options.image_size),
        select=lambda outputs, labels: tuple(value for value in outputs if torch.is_tensor(value))[:2],
        names={"map": "mAP", "map_50": "mAP at IoU 0.5"},
    )


if __name__ == "__main__":
    with reporting():
        main(sys.argv[1:])
