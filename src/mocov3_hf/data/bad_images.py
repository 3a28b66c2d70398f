"""Images that cannot be used: replace them, count and list them, and stop the run when there are too many."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..processing import PixelFormat
from ..storage import RecordFile
from .decode import BadImageError, printable
from .pixels import RGB8, Decoded, decode_image


# After this many unusable images in a row, the storage is not available.
MAX_NEIGHBOURS = 64


@dataclass(frozen=True)
class BadImage:
    """The id of an image that could not be used, the reason, and its file, if it has one."""

    sample_id: int
    reason: str
    path: str | None = None

    def __str__(self) -> str:
        return f"image {self.sample_id} {self.reason}" + ("" if self.path is None else f" ({printable(self.path)})")


class TooManyBadImagesError(RuntimeError):
    """The data set has more bad images than allowed."""

    def __init__(self, message: str):
        # torch re-raises a worker's exception with the whole traceback as its message. The original message is last.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class BadImageLog:
    """Counts bad images by id and appends them to a file, one JSON object per line: `{"id", "path", "reason"}`.

    Each id counts once. Ids already in the file count too, so that several processes can share it and a resumed run
    continues the count. Lines that cannot be written, as on a full disk, are kept and written later.

    Args:
        num_samples: Length of the data set.
        action: "skip" replaces a bad image by a neighbor; "error" stops at the first bad image.
        max_fraction: Largest fraction of the data set that may be bad.
        file: Path of `bad_images.jsonl`, or None for no file.

    Raises:
        ValueError: `action` or `max_fraction` is not valid.
    """

    def __init__(self, num_samples: int, action: str = "skip", max_fraction: float = 0.01, file=None):
        if action not in ("skip", "error"):
            raise ValueError(f"on_bad_image must be 'skip' or 'error', got {action!r}")
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_fraction}")
        self.num_samples, self.action, self.max_fraction = num_samples, action, max_fraction
        self.file = None if file is None else Path(file)
        self._records = None if file is None else RecordFile(file)
        self._ids: set[int] = set()
        self._position = 0
        self._read_new_lines()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, bad: list[BadImage]) -> None:
        """Record bad images.

        Raises:
            TooManyBadImagesError: There are more than allowed, or any at all with "error".
        """
        new = [image for image in bad if image.sample_id not in self._ids]
        if not new:
            return
        self._read_new_lines()
        new = {image.sample_id: image for image in new if image.sample_id not in self._ids}
        if new and self._records is not None:
            listed = [{"id": i, "path": image.path, "reason": image.reason} for i, image in new.items()]
            self._records.append(*listed)
        self._ids.update(new)
        where = f" See {self.file}." if self.file is not None else ""
        last = bad[-1]
        if self.action == "error":
            raise TooManyBadImagesError(f"{last}. Remove it from the data set, or pass --on_bad_image skip.")
        if len(self._ids) > self.max_fraction * self.num_samples:
            raise TooManyBadImagesError(
                f"{len(self._ids)} of {self.num_samples} images are bad, more than the allowed fraction of "
                f"{self.max_fraction:g} (last: {last}).{where} Repair the data set, or "
                f"raise --max_bad_fraction."
            )

    def close(self) -> None:
        """Report lines that could not be written."""
        if self._records is not None:
            self._records.close()

    def _read_new_lines(self) -> None:
        if self.file is None or not self.file.exists():
            return
        with open(self.file, "rb") as file:
            file.seek(self._position)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self._position += end
        for line in text[:end].splitlines():
            try:
                self._ids.add(int(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a crash


class ImageReader(partial):
    """
    `source.read` with the place of an image. `source.describe` says where that is, for messages: a file, a member of
    an archive or a row, or None.
    """

    def describe(self) -> str | None:
        return self.func.__self__.describe(*self.args)


def decode_first_usable(candidates, choose_shrink, bad: list[BadImage], pixel_format: PixelFormat = RGB8) -> Decoded:
    """Decode the first usable image of some candidates.

    Args:
        candidates: Pairs (sample id, `ImageReader` of the encoded image).
        choose_shrink, pixel_format: See `decode_image`.
        bad: Receives the unusable images.

    Raises:
        TooManyBadImagesError: None of the first `MAX_NEIGHBOURS` candidates is usable.
    """
    tried = 0
    for sample_id, read in candidates:
        try:
            return decode_image(read(), pixel_format, choose_shrink)
        except BadImageError as error:
            bad.append(BadImage(sample_id, error.reason, error.path or read.describe()))
        tried += 1
        if tried == MAX_NEIGHBOURS:
            break
    raise TooManyBadImagesError(
        f"{tried} images in a row are unusable (last: {bad[-1]}): check that the storage is available"
    )
