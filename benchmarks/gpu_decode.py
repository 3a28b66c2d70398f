"""Decoding JPEGs on a GPU beside the CPU: images per second, and how far the pixels are apart.

    python -m benchmarks.gpu_decode --images DIR [--count 2000] --output FILE.json

torchvision's `decode_jpeg` on the GPU is nvJPEG; on the CPU it is libjpeg-turbo, here in one thread and in one per
core. The files are read before. Reported are medians of alternated rounds, and the differences of the pixels, between
0 and 255. Without a GPU, the CPU takes its place, and nothing differs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import torch
from torchvision.io import decode_jpeg

from mocov3_hf.data import workers

from .data_path import finish
from .limits import cpu_name


BATCH_SIZE = 128


def on_device(files: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Decoded images; on a GPU in batches, each of them in one call."""
    if device == "cpu":
        return [decode_jpeg(file) for file in files]
    images: list[torch.Tensor] = []
    for start in range(0, len(files), BATCH_SIZE):
        images += decode_jpeg(files[start : start + BATCH_SIZE], device=device)
    torch.cuda.synchronize()
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=2000, help="images of a round; files are repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = sorted(Path(options.images).glob("*.jpg"))
    read = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    files, cores = list(islice(cycle(read), options.count)), workers.cores_of_process()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores) as pool:
        ways: dict[str, Callable[[], list[torch.Tensor]]] = {
            "gpu": lambda: on_device(files, device),
            "cpu_all_cores": lambda: list(pool.map(decode_jpeg, files)),
            "cpu_one_core": lambda: on_device(files[: max(1, len(files) // 10)], "cpu"),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        on_device(files[:BATCH_SIZE], device)  # sets nvJPEG up
        for _ in range(options.rounds):
            for name, decode in ways.items():
                start = time.perf_counter()
                number = len(decode())
                rates[name].append(number / (time.perf_counter() - start))
    pairs = zip(on_device(read, device), on_device(read, "cpu"), strict=True)
    apart = torch.cat([(one.cpu().int() - other.int()).abs().flatten() for one, other in pairs]).float()
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": cores,
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": rates,
        "pixel_difference": {"mean": apart.mean().item(), "largest": apart.max().item()},
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
