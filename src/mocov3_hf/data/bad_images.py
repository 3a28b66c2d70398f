"""What happens to images that cannot be used: replaced, counted, listed, and a stop when they are too many."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used, and why."""

    sample_id: int
    reason: str


class TooManyBadImagesError(RuntimeError):
    """More images of the data set are bad than allowed."""

    def __init__(self, message: str):
        # Out of a worker torch makes a new one, of the whole traceback there, which ends in the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class BadImageLog:
    """Counts bad images by id and lists them in a file, one JSON object `{"id": ..., "reason": ...}` a line.

    An id counts once, however often it is met. When several processes write to one file, or a run goes on after an
    interruption, the ids already in the file count too.

    Args:
        num_samples: size of the data set.
        action: "skip" (a neighbour stands in) or "error" (the first bad image ends the run).
        max_fraction: share of the data set's images allowed to be bad.
        file: path of `bad_images.jsonl`; None for no file.
    """

    def __init__(self, num_samples: int, action: str = "skip", max_fraction: float = 0.01, file=None):
        if action not in ("skip", "error"):
            raise ValueError(f"on_bad_image must be 'skip' or 'error', got {action!r}")
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_fraction}")
        self.num_samples, self.action, self.max_fraction = num_samples, action, max_fraction
        self.file = None if file is None else Path(file)
        self._ids: set[int] = set()
        self._position = 0
        self._read_new_lines()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, bad: list[BadImage]) -> None:
        """Record bad images.

        Raises:
            TooManyBadImagesError: they are more than allowed, or any at all under "error".
        """
        new = [image for image in bad if image.sample_id not in self._ids]
        if not new:
            return
        self._read_new_lines()
        new = {image.sample_id: image for image in new if image.sample_id not in self._ids}
        if new and self.file is not None:
            lines = "".join(json.dumps({"id": i, "reason": image.reason}) + "\n" for i, image in new.items())
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode: lines of several processes do not mix.
            with open(self.file, "ab", buffering=0) as file:
                file.write(lines.encode())
        self._ids.update(new)
        where = f" They are listed in {self.file}." if self.file is not None else ""
        last = bad[-1]
        if self.action == "error":
            raise TooManyBadImagesError(
                f"image {last.sample_id} {last.reason}. Remove it from the data set, or pass --on_bad_image skip."
            )
        if len(self._ids) > self.max_fraction * self.num_samples:
            raise TooManyBadImagesError(
                f"{len(self._ids)} of {self.num_samples} images are bad, more than the share of {self.max_fraction:g} "
                f"allowed (the last: image {last.sample_id} {last.reason}).{where} Repair the data set, or raise "
                f"--max_bad_fraction."
            )

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
                continue  # a line cut by a crash


def describe_exit(code: int | None) -> str:
    """In words, why a worker process ended with this exit code."""
    causes = {
        -9: "killed (signal 9), most often for want of memory: use fewer workers or a smaller batch",
        -7: "bus error (signal 7), most often a full /dev/shm: give the container more shared memory",
        -11: "segmentation fault (signal 11) in a decoder: look for the image with num_workers=0",
        -15: "terminated (signal 15) from outside",
    }
    return causes.get(code, f"exit code {code}") if code is not None else f"still running under {os.getpid()}"
