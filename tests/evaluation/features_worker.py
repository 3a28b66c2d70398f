"""Started in several processes: features of some folders; each process writes what it received."""

import sys

import torch

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation.features import labeled_features
from mocov3_hf.loading import load_encoder, load_processor
from mocov3_hf.process_group import joined_processes
from mocov3_hf.processing import ProcessorTransform


if __name__ == "__main__":
    model, output, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    with joined_processes() as state:
        encoder = load_encoder(model)
        transform = ProcessorTransform(load_processor(model, encoder.config))
        jobs = []
        for images, split, batch_size in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
            try:
                found = labeled_features(
                    encoder, open_labeled(images, split=split), transform, batch_size=int(batch_size), progress=False
                )
                jobs.append({"features": found.features, "labels": found.labels})
            except ValueError as error:
                jobs.append({"error": str(error)})
        torch.save({"jobs": jobs, "num_processes": state.num_processes}, f"{output}-{state.process_index}.pt")
