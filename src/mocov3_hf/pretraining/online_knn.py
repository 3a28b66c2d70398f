"""Nearest neighbour accuracy while training: the curve in which the paper (§4) sees the dips of unstable runs."""

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from ..data.labelled import EvaluationTransform, LabelledDataset, LabelledImages, open_labelled
from ..model.modeling_mocov3 import MoCoV3Model
from ..metrics.knn import knn_accuracy
from ..recipe import Recipe, RecipeError
from .sharding import is_sharded, whole_copy


BATCH_SIZE = 256


class OnlineKNN:
    """
    Classifies a labelled test split by the features of a training split, with all processes sharing the images.

    Args:
        recipe: Names the data set and the splits.
        accelerator: The processes.
        num_workers: Processes that decode, for each process.

    Raises:
        RecipeError, ValueError: no data set, a split without labels, or fewer training images than neighbours.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, num_workers: int):
        data = recipe.data
        name = data.knn_dataset_name or data.dataset_name
        if name is None:
            raise RecipeError("--knn_steps needs labelled images: pass --knn_dataset_name")
        self.train = open_labelled(name, data.dataset_config_name, data.knn_train_split, data.image_column)
        self.test = open_labelled(
            name,
            data.dataset_config_name,
            data.knn_test_split,
            data.image_column,
            class_names=self.train.class_names,
        )
        self.k, self.accelerator, self.num_workers = data.knn_k, accelerator, num_workers
        if len(self.train) < self.k:
            raise RecipeError(f"--knn_k {self.k} is more than the {len(self.train)} images of the training split")
        self.transform = EvaluationTransform(recipe.views.image_size)
        self.path = Path(recipe.run.output_dir) / "knn.jsonl"

    def measure(self, encoder: MoCoV3Model, steps_done: int, epoch: float) -> float:
        """Top-1 accuracy at this moment, also written to `knn.jsonl`. The encoder is left as it was."""
        if is_sharded(encoder):  # the processes have unequal numbers of batches, and could not gather it together
            encoder = whole_copy(encoder)
        was_training = encoder.training
        encoder.eval()
        (features, labels), (bank, bank_labels) = (self.features(encoder, part) for part in (self.test, self.train))
        encoder.train(was_training)
        accuracy = knn_accuracy(features, labels, bank, bank_labels, self.k)[self.k]
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": steps_done, "epoch": epoch, "knn_top1": accuracy}) + "\n")
        self.accelerator.log({"knn_top1": accuracy}, step=steps_done)
        return accuracy

    @torch.no_grad()
    def features(self, encoder: MoCoV3Model, images: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(N, D)` float32 of all images, in order, and their labels `(N,)`."""
        share = math.ceil(len(images) / self.accelerator.num_processes)
        start = share * self.accelerator.process_index
        rows = range(min(start, len(images)), min(start + share, len(images)))
        loader = DataLoader(
            Subset(LabelledDataset(images, self.transform), rows), batch_size=BATCH_SIZE, num_workers=self.num_workers
        )
        # Every process gives as many rows; those beyond the last image are at the very end, and cut off.
        own = torch.zeros(share, encoder.pooled_width, device=self.accelerator.device)
        done = 0
        for pixel_values, _ in loader:
            with self.accelerator.autocast():
                # `forward`, since a call would compile a compiled encoder anew, for this mode and each batch size.
                pooled = encoder.forward(pixel_values.to(self.accelerator.device)).pooler_output
            own[done : done + len(pooled)] = pooled.float()
            done += len(pooled)
        return self.accelerator.gather(own)[: len(images)].cpu(), torch.from_numpy(images.labels)
