"""Pre-training, kNN and linear probe on images that are not 8-bit RGB, against the untrained network.

radiographs  handwritten digits as 12-bit values with an offset in 16-bit grayscale PNG (1 channel)
bands        the same digits in 5 bands of different information (coarse structure, gradients, strokes of two
             directions), each in its own unit: float32 TIFF, LZW, NaN where there is no data, with an illumination
             that differs from image to image
sentinel2    tiles of real Sentinel-2 scenes: 13 spectral bands, float32, NaN; the classes are quartiles of the cloud
             probability, a product that is not among the inputs. Training tiles are west of the test tiles

    python benchmarks/channels.py --work_dir DIR [--scenes FOLDER] [--output benchmarks/results/channels_cpu.json]
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor

from mocov3_hf import pretrain
from mocov3_hf.data.labeled import stratified_split
from mocov3_hf.evaluation import knn, linear_probe
from mocov3_hf.interop.export import export_model
from mocov3_hf.processing import pixel_format_of


BACKBONE = {
    "model_type": "mocov3_vit",
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
OPTIONS = {
    "recipe": "quickstart",
    "backbone_config": BACKBONE,
    "image_size": 16,
    "head_hidden_size": 256,
    "projection_dim": 64,
    "train_batch_size": 128,
    "blur_sigma": [0.1, 1.0],
    "logging_steps": 50,
    "save_steps": 1000,
}
CHANGES = {
    # The illumination varies more than that of photographs; the mean of such bands shows little.
    "bands": {"brightness": 0.6, "contrast": 0.6, "grayscale_probability": 0.0},
    # Reflectances are absolute: a cloud is not a brighter meadow. Satellites have no upper side.
    "sentinel2": {
        "brightness": 0.1,
        "contrast": 0.1,
        "grayscale_probability": 0.0,
        "solarize_probability_2": 0.0,
        "flip_probability": 0.5,
        "vertical_flip_probability": 0.5,
        "rotation_probability": 0.75,
        "train_batch_size": 64,
    },
}
TILE, STRIDE, SPECTRAL = 16, 6, 13


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 16, 16) in 0..1, labels (N,), and which are for testing (N,)."""
    found = load_digits()
    images = [Image.fromarray(image.astype(np.float32)).resize((16, 16), Image.BICUBIC) for image in found.images]
    return np.stack(images).clip(0, 16) / 16, found.target, stratified_split(found.target, 0.2, 0)


def write_radiographs(folder: Path) -> None:
    images, labels, held_out = digits()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / ("test" if held_out[index] else "train") / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 4095 + 1024).round().astype(np.uint16)).save(path)


def write_bands(folder: Path) -> None:
    """Five parts of an image: coarse structure, gradients in both directions, and strokes of two directions."""
    images, labels, held_out = digits()
    rng = np.random.default_rng(0)
    units = np.array([1, 10, 1e3, 1e4, 0.1])[:, None, None]
    rows: dict[str, list] = {"train": [], "test": []}
    for index, image in enumerate(images):
        down, right = np.gradient(image)
        parts = [gaussian_filter(image, 2), down + 0.5, right + 0.5, (down * right + 0.1) * 4, image * (down > 0)]
        gain, offset = rng.uniform(0.4, 1.2) * rng.uniform(0.9, 1.1, (5, 1, 1)), rng.uniform(0, 0.5)
        bands = np.stack(parts) * gain + offset + rng.normal(0, 0.02, (5, 16, 16))
        bands = (bands * units).astype(np.float32)
        bands[:, : rng.integers(0, 3)] = np.nan
        rows["test" if held_out[index] else "train"].append({"bands": tiff(bands), "label": int(labels[index])})
    save_tables(folder, rows, [str(number) for number in range(10)])


def write_sentinel2(folder: Path, scenes: Path) -> None:
    """Tiles of the scenes of Lahinch."""
    import tifffile

    tiles: dict[str, list] = {"train": [], "test": []}
    clouds: dict[str, list] = {"train": [], "test": []}
    for path in sorted(scenes.glob("lahinch*.tif")):
        scene = np.moveaxis(tifffile.imread(path), 2, 0)
        height, width = scene.shape[1:]
        border = int(width * 0.7)
        for top in range(0, height - TILE + 1, STRIDE):
            for left in range(0, width - TILE + 1, STRIDE):
                if left < border < left + TILE:
                    continue
                tile = scene[:, top : top + TILE, left : left + TILE]
                if np.isfinite(tile[14]).mean() > 0.5:
                    split = "train" if left + TILE <= border else "test"
                    tiles[split].append(tile[:SPECTRAL])
                    clouds[split].append(np.nanmean(tile[14]))
    quartiles = np.quantile(clouds["train"], [0.25, 0.5, 0.75])
    rows = {
        split: [
            {"bands": tiff(tile), "label": int(np.searchsorted(quartiles, cloud))}
            for tile, cloud in zip(tiles[split], clouds[split], strict=True)
        ]
        for split in tiles
    }
    save_tables(folder, rows, ["clear", "mostly clear", "mostly cloudy", "cloudy"])


def tiff(bands: np.ndarray) -> bytes:
    import io

    import tifffile

    buffer = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"}
    tifffile.imwrite(buffer, np.moveaxis(bands, 0, 2), **options)
    return buffer.getvalue()


def save_tables(folder: Path, rows: dict[str, list], names: list[str]) -> None:
    features = datasets.Features({"bands": datasets.Value("binary"), "label": datasets.ClassLabel(names=names)})
    for split, listed in rows.items():
        datasets.Dataset.from_list(listed, features=features).to_parquet(folder / f"{split}.parquet")


def measure(name: str, data: Path, work_dir: Path, num_channels: int, num_epochs: int) -> dict:
    """Accuracies of the untrained and of the pre-trained network."""
    result: dict = {}
    options = OPTIONS | {"num_channels": num_channels, "num_train_epochs": num_epochs} | CHANGES.get(name, {})
    for stage, changes in {"untrained": {"max_steps": 1, "learning_rate": 0.0}, "pretrained": {}}.items():
        folder = work_dir / name / stage
        started = time.process_time()
        pretrain(data, output_dir=folder, overwrite_output_dir=True, **{**options, **changes})
        seconds = time.process_time() - started
        arguments = [str(folder), "--dataset_name", str(data), "--output_dir", str(folder)]
        found = knn.main([*arguments, "--k", "10"])
        found |= linear_probe.main([*arguments, "--cached", "--train_batch_size", "128"])
        result[stage] = {
            "knn10_top1": found["knn10_top1"],
            "linear_top1": found["linear_top1"],
            "pretraining_cpu_seconds": round(seconds, 1),
        }
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_format = pixel_format_of(processor)
    exported = export_model(folder, work_dir / name / "onnx", "onnx", overwrite=True)
    return result | {
        "num_channels": pixel_format.num_channels,
        "pixel_range": pixel_format.pixel_range,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "num_epochs": num_epochs,
        "onnx_max_error": exported.max_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, help="folder of the Sentinel-2 scenes; without it they are left out")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--num_epochs", type=int, default=24)
    parser.add_argument("--only", help="radiographs, bands or sentinel2")
    chosen = parser.parse_args()
    kinds = {"radiographs": (write_radiographs, 1), "bands": (write_bands, 5)}
    if chosen.scenes is not None:
        kinds["sentinel2"] = (lambda folder: write_sentinel2(folder, chosen.scenes), SPECTRAL)
    results = {"cpu_count": os.cpu_count(), "machine": platform.machine()}
    kinds = {name: value for name, value in kinds.items() if chosen.only in (None, name)}
    for name, (write, num_channels) in kinds.items():
        data = chosen.work_dir / "data" / name
        if not data.exists():
            data.mkdir(parents=True)
            write(data)
        results[name] = measure(name, data, chosen.work_dir, num_channels, chosen.num_epochs)
        print(json.dumps({name: results[name]}, indent=2))
        if chosen.output is not None:
            chosen.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
