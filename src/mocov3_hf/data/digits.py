"""Handwritten digits as a labeled image folder: real images without a network.

scikit-learn includes the test set of the UCI "Optical Recognition of Handwritten Digits" (1,797 images, 8x8 pixels,
17 gray levels).
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..requirements import require_packages
from ..storage import atomic_folder
from .labeled import stratified_split


TEST_FRACTION = 0.2


def write_digits(folder: str | os.PathLike, *, size: int = 32, seed: int = 0) -> Path:
    """Write the digits as `train/<digit>/*.png` and `test/<digit>/*.png`, grayscale (mode L).

    The split is stratified and depends only on `seed`: a fifth of each digit, rounded, goes to `test`. That is 1,438
    training images and 359 test images. File names hold the index of the image in scikit-learn's order.

    Args:
        folder: Created if missing. Digits from an earlier call with the same arguments are kept. The folder appears
            complete or not at all.
        size: Side length of the images in pixels. The 8x8 originals are upscaled with bicubic interpolation.
        seed: Seed of the split.

    Returns:
        `folder` as a path.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: The folder already holds something else, or `size` is not positive.
    """
    require_packages("the data set of digits", "quickstart", {"sklearn": "scikit-learn"})
    from sklearn.datasets import load_digits

    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    folder = Path(folder)
    note = f"scikit-learn digits, size {size}, seed {seed}\n"
    if folder.exists() and any(folder.iterdir()):
        found = folder / "digits.txt"
        if found.exists() and found.read_text() == note:
            return folder
        raise ValueError(f"folder {str(folder)!r} is not empty and does not hold these digits: choose another folder")
    digits = load_digits()
    held_out = stratified_split(digits.target, TEST_FRACTION, seed)
    with atomic_folder(folder, durable=False) as aside:
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            path = aside / ("test" if held_out[number] else "train") / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(path)
        (aside / "digits.txt").write_text(note)
    return folder
