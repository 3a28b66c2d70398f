"""kNN accuracy during training: the curve in which the paper (§4) sees the dips of unstable runs."""

import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset

from ..data.bad_images import TooManyBadImagesError
from ..data.classes import open_labeled_splits
from ..data.decode import BadImageError
from ..data.labeled import LabeledImages
from ..data.pixels import RGB8
from ..data.workers import LostWorkerError, iterate
from ..metrics.knn import knn_accuracy
from ..model.modeling_mocov3 import MoCoV3Model
from ..reporting import UsageError, warn
from .pixels import evaluation_transform
from .recipe import Recipe


BATCH_SIZE = 256


class OnlineKNN:
    """
    Classifies a labeled test split by the features of a training split; the processes share the images.

    Args:
        recipe: Names the data set and the splits.
        accelerator: The processes.
        num_workers: Data-loading workers per process.

    Raises:
        UsageError, ValueError: no data set, a split without labels, or fewer training images than neighbors.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, num_workers: int):
        options, data = recipe.monitoring, recipe.data
        name = options.knn_dataset_name or data.dataset_name
        self.train, self.test = open_labeled_splits(
            name,
            data.dataset_config_name,
            options.knn_train_split,
            options.knn_test_split,
            data.image_column,
            split_options=("--knn_train_split", "--knn_test_split"),
        )
        self.k, self.accelerator, self.num_workers = options.knn_k, accelerator, num_workers
        if len(self.train) < self.k:
            raise UsageError(f"--knn_k {self.k} is more than the {len(self.train)} images of the training split")
        self.lost_worker: LostWorkerError | None = None
        self.skips_bad_images, self.reported = data.on_bad_image == "skip", {"test": 0, "training": 0}
        self.transform = evaluation_transform(recipe)

    def measure(self, encoder: MoCoV3Model) -> dict[str, float]:
        """Top-1 accuracy, that of always answering the most frequent class, and the number of images classified. The
        encoder is left in its mode."""
        was_training = encoder.training
        encoder.eval()
        (features, labels), (bank, bank_labels) = (self.features(encoder, part) for part in (self.test, self.train))
        encoder.train(was_training)
        return {
            "knn_top1": knn_accuracy(features, labels, bank, bank_labels, self.k)[self.k],
            "knn_chance": labels.bincount().max().item() / len(labels),
            "knn_test_images": len(labels),
        }

    @torch.no_grad()
    def features(self, encoder: MoCoV3Model, images: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Features `(N, D)` float32 of all images that can be decoded, in order, and their labels `(N,)`.

        Raises:
            TooManyBadImagesError: None can be decoded, or the run stops at the first one that cannot.
        """
        share = math.ceil(len(images) / self.accelerator.num_processes)
        start = share * self.accelerator.process_index
        rows = range(min(start, len(images)), min(start + share, len(images)))
        # Every process contributes as many rows; those beyond the last image are at the end, and cut off.
        # The last column is 1 for an image and 0 for one that cannot be decoded.
        own = torch.zeros(share, encoder.pooled_width + 1, device=self.accelerator.device)
        done, reason = 0, None
        for pixel_values, reasons in self.load(images, rows):
            usable = [done + place for place, why in enumerate(reasons) if why is None]
            if usable:
                with self.accelerator.autocast():
                    # `forward`: calling a compiled encoder would compile it for this mode and each batch size.
                    pooled = encoder.forward(pixel_values.to(self.accelerator.device)).pooler_output
                own[usable, :-1], own[usable, -1] = pooled.float(), 1.0
            reason = next((why for why in (reason, *reasons) if why is not None), None)
            done += len(reasons)
        found = self.accelerator.gather(own)[: len(images)].cpu()
        is_usable = found[:, -1] > 0
        self.report_bad_images("test" if images is self.test else "training", is_usable, reason)
        return found[is_usable, :-1], torch.from_numpy(images.labels)[is_usable]

    def report_bad_images(self, split: str, is_usable: torch.Tensor, reason: str | None) -> None:
        """Warn of more bad images of a split than before. `reason` is that of one of this process, if any."""
        number, total = int((~is_usable).sum()), len(is_usable)
        example = f", for example the {reason}" if reason is not None else ""
        message = f"{number} of the {total} images of the kNN {split} split cannot be decoded{example}"
        if number == total or (number and not self.skips_bad_images):
            raise TooManyBadImagesError(f"{message}: repair the data set, or pass --on_bad_image skip")
        if number > self.reported[split]:
            self.reported[split] = number
            warn(f"{message}: they are left out")

    def load(self, images: LabeledImages, rows: range) -> Iterator[tuple[torch.Tensor, list[str | None]]]:
        """
        Pixel values `(B', C, H, W)` of the rows that can be decoded, and B times the reason why one cannot, or None.

        If a worker of one of several processes is lost, the process decodes the rest and keeps the error in
        `lost_worker`: the others wait for its features.
        """
        num_workers = self.num_workers if self.lost_worker is None else 0
        try:
            for batch in self.batches(images, rows, num_workers):
                yield batch
                rows = rows[len(batch[1]) :]
        except LostWorkerError as error:
            if self.accelerator.num_processes == 1 or error.is_contagious:
                raise
            self.lost_worker = error
            yield from self.batches(images, rows, num_workers=0)

    def batches(
        self, images: LabeledImages, rows: range, num_workers: int
    ) -> Iterator[tuple[torch.Tensor, list[str | None]]]:
        dataset = Subset(_ImagesOrReasons(images, self.transform), rows)
        yield from iterate(DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=_collate))


class _ImagesOrReasons(Dataset):
    """(pixels, None), or (None, why the image cannot be decoded)."""

    def __init__(self, images: LabeledImages, transform: Callable[[torch.Tensor], torch.Tensor]):
        self.images, self.transform = images, transform
        self.pixel_format = getattr(transform, "pixel_format", RGB8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor | None, str | None]:
        try:
            return self.transform(self.images.decode(row, self.pixel_format)), None
        except BadImageError as error:
            return None, f"image in row {row}, which {error}"


def _collate(samples: list[tuple[torch.Tensor | None, str | None]]) -> tuple[torch.Tensor, list[str | None]]:
    usable = [pixels for pixels, _ in samples if pixels is not None]
    return torch.stack(usable) if usable else torch.empty(0), [reason for _, reason in samples]
