"""Make a small data set with masks and boxes, without a download.

    python benchmarks/dense_data.py DIR [--unlabeled 3000 --train 300 --test 500] [--seed 0]

Gray images of 32×32 pixels with a handwritten digit of scikit-learn, rotated and somewhere in the image, on a noisy
background with up to two strokes. The columns are those of data sets on the Hub: `image` and `mask` (0 for the
background, then the digits 0 to 9) for segmentation; `objects` with `bbox` (x, y, width, height in pixels) and
`category` as in CPPE-5 for detection. Digits of the split `test` occur in no other split.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw


SIZE = 32
SIDES = (16, 24)  # of a digit in pixels, before rotation
VISIBLE = 0.3  # smallest value of a pixel, in [0, 1], that belongs to a digit
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            "category": datasets.List(datasets.ClassLabel(names=[str(digit) for digit in range(10)])),
        },
    }
)


def make_scene(digits: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> dict:
    """
    One image with its mask and its box.

    Args:
        digits: To draw from, float (n, 8, 8) in [0, 1].
        labels: Of the digits, (n,).
        random: Where everything is drawn from.

    Returns:
        A row of `FEATURES`.
    """
    scene = np.full((SIZE, SIZE), random.uniform(0.0, 0.3))
    strokes = Image.new("L", (SIZE, SIZE))
    for _ in range(random.integers(0, 3)):
        ends = random.integers(0, SIZE, 4).tolist()
        ImageDraw.Draw(strokes).line(ends, fill=int(random.integers(60, 160)), width=2)
    scene = np.maximum(scene, np.asarray(strokes) / 255)
    chosen, side = random.integers(len(digits)), int(random.integers(*SIDES, endpoint=True))
    glyph = Image.fromarray((255 * digits[chosen]).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(glyph.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)) / 255
    top, left = (int(random.integers(0, SIZE - length + 1)) for length in pixels.shape)
    digit = np.pad(
        pixels, [(start, SIZE - start - length) for start, length in zip((top, left), pixels.shape, strict=True)]
    )
    mask = digit > VISIBLE
    scene = np.where(mask, np.maximum(scene, digit * random.uniform(0.75, 1.0)), scene)
    y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]
    noisy = scene + random.normal(0, 0.06, scene.shape)
    image = Image.fromarray((255 * noisy.clip(0, 1)).astype(np.uint8)).convert("RGB")
    return {
        "image": image,
        "mask": Image.fromarray(np.where(mask, 1 + labels[chosen], 0).astype(np.uint8)),
        "objects": {"bbox": [box], "category": [int(labels[chosen])]},
    }


def make_data(folder: str | Path, counts: dict[str, int], seed: int = 0) -> Path:
    """
    Write the data set, which `datasets.load_from_disk` and `mocov3 pretrain` read.

    Args:
        folder: Must not exist.
        counts: Number of images by split; the digits of `test` are those of no other split.
        seed: Of everything.

    Returns:
        `folder` as a path.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    is_test = np.random.default_rng(seed).random(len(data.target)) < 0.2
    splits = {}
    for number, (split, count) in enumerate(counts.items()):
        chosen = is_test if split == "test" else ~is_test
        random = np.random.default_rng((seed, number))
        rows = [make_scene(data.images[chosen] / 16, data.target[chosen], random) for _ in range(count)]
        splits[split] = datasets.Dataset.from_list(rows, features=FEATURES)
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="folder to write; must not exist")
    for split, count in {"unlabeled": 3000, "train": 300, "test": 500}.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="number of images of the split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = {"unlabeled": options.unlabeled, "train": options.train, "test": options.test}
    print(make_data(options.directory, counts, options.seed))


if __name__ == "__main__":
    main()
