"""The account of a data set: what was found, what of it is used, and what was skipped for which reason."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from .references import reference_of, shown


_SHOWN_REASONS = 12


class Tally:
    """
    Files that are not used, by reason.

    Attributes:
        counts: Reason to number.
        examples: Reason to the first such file, printable.
    """

    def __init__(self, counts: dict[str, int] | None = None, examples: dict[str, str] | None = None):
        self.counts, self.examples = dict(counts or {}), dict(examples or {})

    def add(self, reason: str, example: str | bytes, number: int = 1) -> None:
        """Count files. The example is a path (bytes), or text that can be printed."""
        if number:
            if reason not in self.counts:
                self.examples[reason] = example if isinstance(example, str) else shown(reference_of(example))
            self.counts[reason] = self.counts.get(reason, 0) + number

    def merge(self, other: "Tally") -> None:
        for reason, number in other.counts.items():
            self.add(reason, other.examples.get(reason, ""), number)

    def copy(self) -> "Tally":
        return Tally(self.counts, self.examples)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Account:
    """
    What a data set holds, and what of it is used.

    Attributes:
        dataset_name, split: As opened.
        kind: Such as "image folder", "parquet files", "tar files".
        num_files: Files found, members of archives included, or rows of tables; the sum of `num_images` and `skipped`.
            None if it is not known.
        num_images: Used in this split; None if the length of a stream is unknown.
        skipped: Reason to number of files.
        examples: Reason to one such file.
        splits: Split to its number of images; empty for a data set without splits.
        num_classes: None without labels.
        notes: What a user should know, one sentence each.
    """

    dataset_name: str
    split: str
    kind: str
    num_files: int | None
    num_images: int | None
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    num_classes: int | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON."""
        return asdict(self) | {"dataset_name": shown(reference_of(os.fsencode(self.dataset_name)))}

    def lines(self) -> list[str]:
        """For people: what is used, a line per reason, and the notes."""
        used = "an unknown number of" if self.num_images is None else f"{self.num_images:,}"
        of = f" of {self.num_files:,} files" if self.num_files is not None else ""
        splits = f"; splits: {', '.join(f'{name} {n:,}' for name, n in self.splits.items())}" if self.splits else ""
        classes = f"; {self.num_classes} classes" if (self.num_classes or 0) > 1 else ""
        lines = [f"data: {used} images{of}, split {self.split!r}, {self.kind}{splits}{classes}"]
        reasons = sorted(self.skipped.items(), key=lambda item: -item[1])
        for reason, number in reasons[:_SHOWN_REASONS]:
            example = f", such as {self.examples[reason]}" if self.examples.get(reason) else ""
            lines.append(f"data: skipped {number:,}: {reason}{example}")
        if len(reasons) > _SHOWN_REASONS:
            rest = sum(number for _, number in reasons[_SHOWN_REASONS:])
            lines.append(f"data: skipped {rest:,} for {len(reasons) - _SHOWN_REASONS} other reasons")
        return lines + [f"data: {note}" for note in self.notes]
