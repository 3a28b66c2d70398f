"""Arrays as pictures: heat maps over images, colours of components, and sheets of pictures for a model card.

Legend: H W image, h w grid.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


HEAT = matplotlib.colormaps["inferno"]
GAP = 6


def heat_map(values: np.ndarray) -> np.ndarray:
    """(h, w) not negative to uint8 (h, w, 3): black at 0, bright at its largest value."""
    top = float(values.max())
    shares = values / top if top > 0 else np.zeros_like(values)
    return (HEAT(shares)[..., :3] * 255).round().astype(np.uint8)


def over_image(values: np.ndarray, image: np.ndarray, share: float = 0.65) -> np.ndarray:
    """A heat map (h, w), enlarged smoothly, over the grey of an image uint8 (H, W, 3)."""
    size = image.shape[:2]
    smooth = F.interpolate(torch.as_tensor(values)[None, None].float(), size, mode="bicubic", antialias=True)
    heat = heat_map(smooth[0, 0].clamp(min=0).numpy()).astype(np.float64)
    grey = image.mean(axis=2, keepdims=True)
    return (share * heat + (1 - share) * grey).round().astype(np.uint8)


def colors(values: np.ndarray) -> np.ndarray:
    """(h, w, 3) between 0 and 1 to uint8."""
    return (values * 255).round().astype(np.uint8)


def save_sheet(rows: Sequence[Sequence[np.ndarray]], path: Path, size: int = 128) -> None:
    """Write pictures, row by row on white, each `size` pixels high and wide."""
    width = max(map(len, rows)) * (size + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (size + GAP) + GAP), "white")
    for row, pictures in enumerate(rows):
        for column, pixels in enumerate(pictures):
            # Grids are enlarged as they are, photographs smoothly.
            method = Image.Resampling.NEAREST if max(pixels.shape[:2]) < 32 else Image.Resampling.BICUBIC
            picture = Image.fromarray(pixels).resize((size, size), method)
            sheet.paste(picture, (GAP + column * (size + GAP), GAP + row * (size + GAP)))
    sheet.save(path)
