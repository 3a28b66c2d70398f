"""The batches of a run, and the time spent waiting for them."""

import time
from collections.abc import Iterator

from ..data.loader import TwoViewLoader
from ..plan import Plan
from .monitors import TrainingLog


def batches(loader: TwoViewLoader, plan: Plan, step: int, skipped_batches: int = 0) -> Iterator[dict]:
    """Batches of the steps from `step` to the end of the run, epoch after epoch, after those passed over."""
    first, end = step + skipped_batches, plan.total_steps + skipped_batches
    while first < end:
        epoch, step_in_epoch = divmod(first, plan.steps_per_epoch)
        for batch in loader.epoch(epoch, step_in_epoch):
            yield batch
            first += 1
            if first == end:
                return


def timed(iterator: Iterator, log: TrainingLog) -> Iterator:
    """The same items, with the time spent waiting for each noted in `log`."""
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        log.waited_for_data(time.perf_counter() - start)
        yield item
