"""The CPU stage of a batch: read, decode once, crop and resize both views into one block of shared memory."""

import torch
from torch.utils.data import get_worker_info

from .bad_images import BadImage, TooManyBadImagesError
from .decode import BadImageError, decode_shrunk
from .views import ViewSettings, crop_and_resize, crop_box, draw_view, shrink_factor


# Unusable images in a row after which no neighbour is tried any more: the storage is gone, not an image.
MAX_NEIGHBOURS = 64


def make_views(batch, settings: tuple[ViewSettings, ViewSettings], seed: int, epoch: int) -> dict:
    """Both views of a batch.

    A bad image is replaced by the first usable one of its candidates. The parameters stay those of the sample drawn.

    Args:
        batch: a `MapBatch` or `StreamBatch`.
        settings: of view 1 and view 2.
        seed, epoch: of the parameters.

    Returns:
        pixels uint8 (2, B, 3, S, S) laid out as (2, B, S, S, 3), parameters float32 (2, B, K), sample_ids int64 (B,)
        of the samples drawn, bad: the `BadImage`s met.
    """
    size, num_rows = settings[0].image_size, len(batch.sample_ids)
    pixels = _empty_pixels(num_rows, size)
    draws = [draw_view(settings[view], seed, epoch, batch.sample_ids, view) for view in range(2)]
    crops = [
        list(zip(draw.crop_area.tolist(), draw.crop_ratio.tolist(), draw.crop_place.tolist(), strict=True))
        for draw in draws
    ]
    bad: list[BadImage] = []
    for row in range(num_rows):

        def boxes(height: int, width: int, row: int = row) -> list[tuple]:
            return [crop_box(*crops[view][row], height, width, settings[view]) for view in range(2)]

        image, height, width = decode_first_usable(
            batch.candidates(row), lambda height, width, boxes=boxes: shrink_factor(boxes(height, width), size), bad
        )
        for view, box in enumerate(boxes(height, width)):
            crop_and_resize(image, _scaled(box, height, width, image), pixels[view, row])
    return {
        "pixels": pixels,
        "parameters": torch.stack([draw.parameters for draw in draws]),
        "sample_ids": batch.sample_ids,
        "bad": bad,
    }


def decode_first_usable(candidates, choose_shrink, bad: list[BadImage]) -> tuple[torch.Tensor, int, int]:
    """Decode the first of some candidates, (sample id, function that reads it), that can be; note others in `bad`.

    Returns:
        What `decode_shrunk` returns.

    Raises:
        TooManyBadImagesError: none of `MAX_NEIGHBOURS` candidates can be used.
    """
    tried = 0
    for sample_id, read in candidates:
        try:
            return decode_shrunk(read(), choose_shrink)
        except BadImageError as error:
            bad.append(BadImage(sample_id, str(error)))
        tried += 1
        if tried == MAX_NEIGHBOURS:
            break
    raise TooManyBadImagesError(
        f"{tried} images in a row are unusable, the last of them ({bad[-1].sample_id}) {bad[-1].reason}: "
        f"is the storage still there?"
    )


def _scaled(box: tuple, height: int, width: int, image: torch.Tensor) -> tuple:
    """The box on an image that was decoded smaller, to the nearest pixel."""
    if image.shape[1] == height and image.shape[2] == width:
        return box
    scale_y, scale_x = image.shape[1] / height, image.shape[2] / width
    top, left = round(box[0] * scale_y), round(box[1] * scale_x)
    bottom, right = round((box[0] + box[2]) * scale_y), round((box[1] + box[3]) * scale_x)
    return top, left, bottom - top, right - left


def _empty_pixels(num_rows: int, size: int) -> torch.Tensor:
    """uint8 (2, B, 3, S, S) over memory (2, B, S, S, 3): as the decoder writes and the resize works fastest."""
    shape = (2, num_rows, size, size, 3)
    if get_worker_info() is None:
        block = torch.empty(shape, dtype=torch.uint8)
    else:
        # Straight into shared memory, as torch's own collate function does: what is sent is then not copied.
        storage = torch.UntypedStorage._new_shared(2 * num_rows * size * size * 3, device="cpu")
        block = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
    return block.permute(0, 1, 4, 2, 3)
