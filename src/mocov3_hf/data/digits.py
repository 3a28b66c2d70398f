"""Handwritten digits as a labelled image folder: real images that need no network.

scikit-learn carries the test set of the UCI "Optical Recognition of Handwritten Digits" (1,797 images, 8×8, 17 grey
levels).
"""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


TEST_FRACTION = 0.2


def write_digits(folder: str | os.PathLike, *, size: int = 32, seed: int = 0) -> Path:
    """Write the digits as `train/<digit>/*.png` and `test/<digit>/*.png`, grey (mode L).

    The split is stratified and a function of `seed` alone: of every digit a fifth, rounded, goes to `test`, which
    makes 1,438 images for training and 359 held out. File names carry the number of the image in scikit-learn's order.

    Args:
        folder: made where missing. Digits from an earlier call with the same arguments are kept as they are; the
            folder appears whole or not at all.
        size: of the images in pixels; the 8×8 originals are enlarged bicubically.
        seed: of the split.

    Returns:
        `folder` as a path.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the folder holds something else already, or `size` is not positive.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    folder = Path(folder)
    note = f"scikit-learn digits, size {size}, seed {seed}\n"
    if folder.exists() and any(folder.iterdir()):
        found = folder / "digits.txt"
        if found.exists() and found.read_text() == note:
            return folder
        raise ValueError(f"folder {str(folder)!r} is not empty and does not hold these digits: give another one")
    digits = load_digits()
    held_out = stratified_split(digits.target, TEST_FRACTION, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            path = aside / ("test" if held_out[number] else "train") / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(path)
        (aside / "digits.txt").write_text(note)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows to hold out: of every class `fraction` of its rows, rounded.

    Args:
        labels: (N,) integers.
        fraction: between 0 and 1.
        seed: of the draw.

    Returns:
        bool (N,).
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        draw = np.random.default_rng([seed, int(label)]).permutation(rows)
        held_out[draw[: round(len(rows) * fraction)]] = True
    return held_out
