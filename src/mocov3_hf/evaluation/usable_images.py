"""Leave images that cannot be decoded out of a labeled split, on request."""

import sys
from dataclasses import replace

import numpy as np
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..data.decode import BadImageError
from ..data.labeled import LabeledImages
from ..data.pixels import check_image
from ..data.workers import LostWorkerError, iterate
from ..process_group import process_state
from ..reporting import RunError, is_first_process


# Bad images that are named; the rest is counted.
_NAMED = 20
_REASON = "cannot be decoded"


class _Reasons(Dataset):
    """Why an image cannot be used, or None."""

    def __init__(self, images: LabeledImages, rows: range):
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | None:
        try:
            check_image(self.images.read(self.rows[index]))
        except BadImageError as error:
            return str(error)
        return None


def without_bad_images(images: LabeledImages, split: str, num_workers: int = 0) -> LabeledImages:
    """
    Decode every image of a split once, and return the split without those that fail, which are named on stderr.

    With several processes, all must call it; each decodes a part.

    Args:
        images: The split.
        split: Its name.
        num_workers: Processes that decode, per process.

    Raises:
        ValueError: No image is left.
        RunError: A data-loading worker died.
    """
    state = process_state()
    edges = [len(images) * rank // state.num_processes for rank in range(state.num_processes + 1)]
    own = range(edges[state.process_index], edges[state.process_index + 1])
    bad, lost_worker = {}, None
    loader = DataLoader(_Reasons(images, own), batch_size=64, num_workers=num_workers, collate_fn=list)
    try:
        reasons = (reason for batch in iterate(loader) for reason in batch)
        bad = {row: reason for row, reason in zip(own, reasons, strict=True) if reason is not None}
    except LostWorkerError as lost:
        lost_worker = str(lost)
    # Every process learns of an error in one of them, or it would wait for it forever.
    answers = gather_object([(bad, lost_worker)])
    lost = next((why for _, why in answers if why is not None), None)
    if lost is not None:
        raise RunError(lost)
    bad = {row: reason for found, _ in answers for row, reason in found.items()}
    if not bad:
        return images
    if is_first_process():
        for row, reason in list(bad.items())[:_NAMED]:
            print(f"skipped: image in row {row} of split {split!r} {reason}", file=sys.stderr)
        print(f"skipped {len(bad)} of the {len(images)} images of split {split!r}", file=sys.stderr)
    if len(bad) == len(images):
        raise ValueError(f"none of the {len(images)} images of split {split!r} can be decoded: repair the data set")
    kept, account = images.select(np.setdiff1d(np.arange(len(images)), list(bad))), images.account
    if account is not None:
        skipped = {**account.skipped, _REASON: len(bad)}
        examples = {**account.examples, _REASON: images.source.describe(min(bad)) or ""}
        account = replace(account, num_images=len(kept), skipped=skipped, examples=examples)
    return LabeledImages(kept.source, kept.labels, kept.class_names, account)
