"""Numbers out of the lines that a run writes: series, what a rollback threw away, and what went wrong when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.loss_mocov3 import chance_loss, floor_loss
from .folder import Lines, ModelFolder


@dataclass(frozen=True)
class Series:
    """
    Attributes:
        steps, values: (n,) float64; a value that is missing or not finite is NaN, so that the line has a gap.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def known(self) -> np.ndarray:
        """The finite values."""
        return self.values[np.isfinite(self.values)]


# Events that are marked: a gradient far above its usual norm, a step without finite gradients, a loss that gave up
# much of its gain, and a return to an earlier checkpoint.
MARKS = ("spike", "skipped", "divergence", "rollback")
# Those of them that the lines of `metrics.jsonl` count, and under which key.
COUNTERS = (("spike", "gradient_spikes"), ("skipped", "skipped_steps"), ("rollback", "rollbacks"))


@dataclass(frozen=True)
class Mark:
    """
    Something that went wrong.

    Attributes:
        kind: one of `MARKS`.
        step: where.
        value: gradient norm, None where it is unknown.
        to_step: where a rollback went back to.
    """

    kind: str
    step: float
    value: float | None = None
    to_step: float | None = None


def series(lines: Lines, key: str) -> Series:
    """The lines that have a key, by step."""
    lines = [line for line in lines if key in line]
    return Series(
        np.array([line["step"] for line in lines], dtype=np.float64),
        np.array([number(line[key]) for line in lines], dtype=np.float64),
    )


def number(value: Any) -> float:
    """A finite number as it is; NaN for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else math.nan


def split_abandoned(lines: Lines) -> tuple[Lines, Lines]:
    """
    The lines of the run as it stands, and those of steps that a rollback, further down, did again; both by step.
    """
    kept: Lines = []
    abandoned: Lines = []
    for line in lines:
        while kept and _is_done_again(kept[-1], line):
            abandoned.append(kept.pop())
        kept.append(line)
    return kept, sorted(abandoned, key=lambda line: line["step"])


def _is_done_again(before: dict[str, Any], line: dict[str, Any]) -> bool:
    # One step has two lines without a rollback too: of training, and of the evaluation after it, with other keys.
    return before["step"] > line["step"] or (before["step"] == line["step"] and before.keys() == line.keys())


def marks(folder: ModelFolder) -> list[Mark]:
    """
    What `events.jsonl` tells, else the lines of `metrics.jsonl` in which a counter rose.
    """
    if folder.events:
        found = []
        for event in folder.events:
            if event.get("event") in MARKS:
                value, to_step = number(event.get("grad_norm")), number(event.get("to_step"))
                found.append(
                    Mark(
                        event["event"],
                        event["step"],
                        None if math.isnan(value) else value,
                        None if math.isnan(to_step) else to_step,
                    )
                )
        return found
    found = []
    for kind, key in COUNTERS:
        before = 0
        for line in folder.metrics:
            count = number(line.get(key))
            if count > before:
                value = number(line.get("grad_norm"))
                found.append(Mark(kind, line["step"], None if math.isnan(value) else value))
            before = before if math.isnan(count) else count
    return sorted(found, key=lambda mark: mark.step)


def count_marks(folder: ModelFolder) -> dict[str, int]:
    """How often each kind happened: the counters of the last line where they are, else the events."""
    counts = dict.fromkeys(MARKS, 0)
    for mark in marks(folder):
        counts[mark.kind] += 1
    for kind, key in COUNTERS:
        counted = series(folder.metrics, key).known
        if len(counted):
            counts[kind] = max(counts[kind], int(counted[-1]))
    return counts


def loss_bounds(folder: ModelFolder) -> tuple[float, float] | None:
    """Loss by chance, and where positives coincide and negatives are orthogonal; None where temperature or batch are
    unknown."""
    temperature, batch = folder.temperature, folder.global_batch_size
    if not temperature or not batch:
        return None
    return chance_loss(temperature, batch), floor_loss(temperature, batch)


def block_norms(lines: Lines) -> tuple[np.ndarray, list[str], np.ndarray] | None:
    """
    Steps (n,), names of the blocks (m) in the order of the file, and gradient norms (m, n), NaN where a line does not
    have a block; None without any.
    """
    lines = [line for line in lines if isinstance(line.get("block_grad_norms"), dict)]
    names = list(dict.fromkeys(name for line in lines for name in line["block_grad_norms"]))
    if not names:
        return None
    norms = [[number(line["block_grad_norms"].get(name)) for line in lines] for name in names]
    return np.array([line["step"] for line in lines], dtype=np.float64), names, np.array(norms)


def edges(centres: Sequence[float]) -> np.ndarray:
    """(n + 1,) borders of cells around n increasing centres: half way between neighbours."""
    centres = np.asarray(centres, dtype=np.float64)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
