"""kNN accuracy during training: the curve in which the paper (§4) sees the dips of unstable runs."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from ..data.labeled import EvaluationTransform, LabeledDataset, LabeledImages, open_labeled
from ..data.workers import LostWorkerError, iterate
from ..metrics.knn import knn_accuracy
from ..model.modeling_mocov3 import MoCoV3Model
from ..reporting import UsageError
from ..run_folder import KNN
from ..storage import append_line
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
        self.train = open_labeled(name, data.dataset_config_name, options.knn_train_split, data.image_column)
        self.test = open_labeled(
            name,
            data.dataset_config_name,
            options.knn_test_split,
            data.image_column,
            class_names=self.train.class_names,
        )
        self.k, self.accelerator, self.num_workers = options.knn_k, accelerator, num_workers
        if len(self.train) < self.k:
            raise UsageError(f"--knn_k {self.k} is more than the {len(self.train)} images of the training split")
        self.lost_worker: LostWorkerError | None = None
        self.transform = EvaluationTransform(recipe.views.image_size)
        self.path = Path(recipe.run.output_dir) / KNN

    def measure(self, encoder: MoCoV3Model, steps_done: int, epoch: float) -> float:
        """Top-1 accuracy at this step, also appended to `knn.jsonl`. The encoder is left in its mode."""
        was_training = encoder.training
        encoder.eval()
        (features, labels), (bank, bank_labels) = (self.features(encoder, part) for part in (self.test, self.train))
        encoder.train(was_training)
        accuracy = knn_accuracy(features, labels, bank, bank_labels, self.k)[self.k]
        if self.accelerator.is_main_process:
            append_line(self.path, {"step": steps_done, "epoch": epoch, "knn_top1": accuracy})
        self.accelerator.log({"knn_top1": accuracy}, step=steps_done)
        return accuracy

    @torch.no_grad()
    def features(self, encoder: MoCoV3Model, images: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(N, D)` float32 of all images, in order, and their labels `(N,)`."""
        share = math.ceil(len(images) / self.accelerator.num_processes)
        start = share * self.accelerator.process_index
        rows = range(min(start, len(images)), min(start + share, len(images)))
        # Every process contributes as many rows; those beyond the last image are at the end, and cut off.
        own = torch.zeros(share, encoder.pooled_width, device=self.accelerator.device)
        done = 0
        for pixel_values in self.load(images, rows):
            with self.accelerator.autocast():
                # `forward`: calling a compiled encoder would compile it for this mode and each batch size.
                pooled = encoder.forward(pixel_values.to(self.accelerator.device)).pooler_output
            own[done : done + len(pooled)] = pooled.float()
            done += len(pooled)
        return self.accelerator.gather(own)[: len(images)].cpu(), torch.from_numpy(images.labels)

    def load(self, images: LabeledImages, rows: range) -> Iterator[torch.Tensor]:
        """
        Pixel values `(B, 3, H, W)` of these rows. If a worker of one of several processes is lost, the process decodes
        the rest and keeps the error in `lost_worker`: the others wait for its features.
        """
        num_workers = self.num_workers if self.lost_worker is None else 0
        try:
            for pixel_values in self.batches(images, rows, num_workers):
                yield pixel_values
                rows = rows[len(pixel_values) :]
        except LostWorkerError as error:
            if self.accelerator.num_processes == 1 or error.is_contagious:
                raise
            self.lost_worker = error
            yield from self.batches(images, rows, num_workers=0)

    def batches(self, images: LabeledImages, rows: range, num_workers: int) -> Iterator[torch.Tensor]:
        dataset = Subset(LabeledDataset(images, self.transform), rows)
        for pixel_values, _ in iterate(DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers)):
            yield pixel_values
