"""Make photographs for benchmarks, without a download.

    python benchmarks/photos.py DIR [--count 300] [--seed 0]

Random crops of the two sample photographs of scikit-learn, as JPEG files with the pixels and the bytes of ImageNet's:
500×375 pixels or upright, about 110 KB on average (ImageNet's training set: 147.9 GB in 1.28 million files, 115 KB).
The file size matters because decoding time grows with pixels and with bytes; quality 96 and added grain give that
size.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image


LONG, SHORT = 500, 375
QUALITY = 96
GRAIN = (0.0, 10.0)  # standard deviation of the noise in gray levels, drawn per photograph
SMALLEST_CROP = 0.6  # relative to the sides; smaller crops would be upsampled, and blurred photographs decode faster


def make_photos(directory: str | Path, count: int, seed: int = 0) -> list[Path]:
    """
    Write `count` JPEG files into `directory`. The files are deterministic for a given seed and library versions.

    Args:
        directory: Created if needed; files with the same names are replaced.
        count: Number of files, at least 1.
        seed: Seed of the crops.

    Returns:
        The paths in order: `photo_00000.jpg` and so on.

    Raises:
        ValueError: if `count` is below 1.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    if count < 1:
        raise ValueError(f"cannot make {count} photographs: pass a count of at least 1")
    originals = sample_photographs()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        photo = draw_photo(originals[index % len(originals)], np.random.default_rng((seed, index)))
        paths.append(directory / f"photo_{index:05d}.jpg")
        paths[-1].write_bytes(photo)
    return paths


def sample_photographs() -> list[Image.Image]:
    """The two sample photographs of scikit-learn, 640×427 pixels."""
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the benchmark photographs need scikit-learn: pip install scikit-learn, or pass a folder as --images"
        ) from error
    return [Image.fromarray(array) for array in load_sample_images().images]


def draw_photo(original: Image.Image, random: np.random.Generator) -> bytes:
    """A random crop, possibly flipped, with added grain, as JPEG bytes."""
    share = random.uniform(SMALLEST_CROP, 1.0)
    upright = random.random() < 0.25  # about as often as in ImageNet
    size = (SHORT, LONG) if upright else (LONG, SHORT)
    scale = share * min(original.width / size[0], original.height / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = random.uniform(0, original.width - width), random.uniform(0, original.height - height)
    photo = original.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(photo, dtype=np.float32)
    pixels = pixels + random.uniform(*GRAIN) * random.standard_normal(pixels.shape, dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="folder to write into")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    paths = make_photos(options.directory, options.count, options.seed)
    mean = sum(path.stat().st_size for path in paths) / len(paths)
    print(f"{len(paths)} photographs of {mean / 1000:.0f} KB on average in {options.directory}")


if __name__ == "__main__":
    main()
