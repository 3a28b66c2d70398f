"""Who sees which image when: pure functions of (seed, epoch), the same on every run, worker and process.

Map-style: one permutation of the data set an epoch, cut into global batches. Of the last, incomplete batch nothing is
used; since the permutation changes, other samples are left out each epoch.
"""

import torch

from .draws import STREAM_SAMPLE_ORDER, permutation


def sample_order(seed: int, epoch: int, num_samples: int) -> torch.Tensor:
    """The order of an epoch: int64 (num_samples,), a permutation."""
    return permutation(seed, epoch, num_samples, STREAM_SAMPLE_ORDER)


def steps_in_epoch(num_samples: int, global_batch_size: int) -> int:
    """Full global batches in an epoch.

    Raises:
        ValueError: not even one.
    """
    if num_samples < global_batch_size:
        raise ValueError(
            f"the global batch of {global_batch_size} is larger than the data set of {num_samples} images: "
            f"lower the batch to at most {num_samples} (per device times processes)"
        )
    return num_samples // global_batch_size


def batch_slice(step: int, global_batch_size: int, process_index: int = 0, num_processes: int = 1) -> slice:
    """Positions in the epoch's order that a process takes at a step: contiguous, so that the processes' rows, joined
    in rank order, are the rows of one process with the whole batch."""
    size = global_batch_size // num_processes
    start = step * global_batch_size + process_index * size
    return slice(start, start + size)
