"""Training curves: time series, rollbacks and instability events from the files of a run."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.loss_mocov3 import chance_loss, floor_loss
from ..run_folder import RunFolder


Lines = list[dict[str, Any]]
LARGEST = float(np.finfo(np.float32).max)

# Kinds of events, and the counter of each in `metrics.jsonl`; divergences have none.
COUNTERS = {"spike": "gradient_spikes", "skipped": "skipped_steps", "divergence": None, "rollback": "rollbacks"}


@dataclass(frozen=True)
class Series:
    """
    Attributes:
        steps, values: (n,) float64; a value that is null or not finite is NaN, which leaves a gap in the line.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def known(self) -> "Series":
        """The finite values."""
        finite = np.isfinite(self.values)
        return Series(self.steps[finite], self.values[finite])

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Event:
    """
    Attributes:
        kind: one of `COUNTERS`.
        grad_norm: NaN if unknown.
        to_step: the step that a rollback returned to, NaN if unknown.
    """

    kind: str
    step: float
    grad_norm: float = math.nan
    to_step: float = math.nan


@dataclass(frozen=True)
class Curves:
    """
    Attributes:
        kept: lines of `metrics.jsonl` and `knn.jsonl` in the final history of the run.
        discarded: lines of steps that were repeated after a rollback.
        events: instability events, from `events.jsonl` if it exists, otherwise from the counters in `metrics.jsonl`.
        counts: number of events of each kind.
    """

    kept: Lines
    discarded: Lines
    events: list[Event]
    counts: dict[str, int]


def read_curves(folder: RunFolder) -> Curves:
    kept, discarded = [], []
    for lines in (folder.metrics, folder.knn):
        for whole, part in zip((kept, discarded), split_discarded(lines), strict=True):
            whole += part
    events = logged_events(folder.events) if folder.events else counted_events(folder.metrics)
    counts = {}
    for kind, key in COUNTERS.items():
        counted = series(folder.metrics, key).known.values
        logged = sum(event.kind == kind for event in events)
        counts[kind] = max(logged, int(counted[-1])) if len(counted) else logged
    return Curves(kept, discarded, events, counts)


def series(lines: Lines, key: str | None) -> Series:
    """The values of a key, from the lines that have it."""
    lines = [line for line in lines if key in line]
    return Series(
        np.array([line["step"] for line in lines], dtype=np.float64),
        np.array([number(line[key]) for line in lines], dtype=np.float64),
    )


def number(value: Any) -> float:
    """A finite number that float32 can hold, as metrics are; NaN for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else math.nan


def split_discarded(lines: Lines) -> tuple[Lines, Lines]:
    """The lines of the final history, and those of steps that a later line repeats after a rollback; both by step."""
    kept: Lines = []
    discarded: Lines = []
    for line in lines:
        while kept and is_repeated(kept[-1], line):
            discarded.append(kept.pop())
        kept.append(line)
    return kept, sorted(discarded, key=lambda line: line["step"])


def is_repeated(before: dict[str, Any], line: dict[str, Any]) -> bool:
    # Without a rollback a step can have two lines with different keys: one of training, one of evaluation.
    return before["step"] > line["step"] or (before["step"] == line["step"] and before.keys() == line.keys())


def logged_events(lines: Lines) -> list[Event]:
    return [
        Event(line["event"], line["step"], number(line.get("grad_norm")), number(line.get("to_step")))
        for line in lines
        if isinstance(line.get("event"), str) and line["event"] in COUNTERS
    ]


def counted_events(lines: Lines) -> list[Event]:
    """One event for every line in which a counter increased."""
    events = []
    for kind, key in COUNTERS.items():
        before = 0
        for line in lines:
            count = number(line.get(key))
            if count > before:
                events.append(Event(kind, line["step"], number(line.get("grad_norm"))))
            before = before if math.isnan(count) else count
    return sorted(events, key=lambda event: event.step)


def chances(folder: RunFolder, lines: Lines) -> dict[str, float]:
    """Accuracy of a model that has learned nothing, by metric; those that are unknown are left out."""
    knn, names = series(lines, "knn_chance").known.values, folder.config.get("id2label")
    classes = len(names) if folder.kind == "classifier" and isinstance(names, dict) else 0
    found = {
        "knn_top1": float(knn[-1]) if len(knn) else 0.0,
        "positive_top1": 1 / (folder.global_batch_size or math.inf),
        "eval_top1": 1 / (classes or math.inf),
        "eval_top1_ema": 1 / (classes or math.inf),
    }
    return {key: chance for key, chance in found.items() if 0 < chance < 1}


def loss_bounds(folder: RunFolder) -> tuple[float, float] | None:
    """Loss at chance, and with aligned positives and orthogonal negatives; None if temperature or batch size are
    unknown."""
    temperature, batch = folder.temperature, folder.global_batch_size
    if not temperature or not batch:
        return None
    return chance_loss(temperature, batch), floor_loss(temperature, batch)
