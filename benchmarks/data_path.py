"""Throughput of data loading, from image files to batches of views, compared with the classic pipeline.

    python benchmarks/data_path.py --images DIR --reference [--device_stage] [--output FILE.json]
    python benchmarks/data_path.py --images DIR --before SRC [--output FILE.json]

Table 1, one core: (a) the classic pipeline, PIL and torchvision transforms, with both views from one decoded file;
(b) ours, the CPU stage; (c) decoding alone, the limit of any pipeline. The three alternate round by round over the
same images. Reported are medians of the CPU time, and medians of the ratios within a round.
Table 2: whole DataLoaders with 1 and 2 workers, in CPU time of all processes and in wall time.
Table 3 (--device_stage): the photometric stage, and its share of the time of a ViT-S pre-training step.

--before compares only (c), with the package of another source tree, in two processes that take turns.

The last line is JSON with every measurement.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mocov3_hf.data import decode as decode_module
from mocov3_hf.data.decode import decode_rgb
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.photometric import IMAGENET_MEAN, IMAGENET_STD, PhotometricStage
from mocov3_hf.data.sources import MapBatch, open_source
from mocov3_hf.data.views import draw_view, make_views, two_views


SIZE = 224
SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class PilBlur:
    """Gaussian blur with a standard deviation drawn from 0.1 to 2.0."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class PilSolarize:
    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image)


def classic_view(blur_probability: float, solarize_probability: float) -> transforms.Compose:
    """One view by the usual transforms: per image, on PIL images, to a normalized float tensor."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PilBlur()], p=blur_probability),
            transforms.RandomApply([PilSolarize()], p=solarize_probability),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class Classic(Dataset):
    """The classic pipeline over a list of files."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.views = (classic_view(1.0, 0.0), classic_view(0.1, 0.2))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return [view(image) for view in self.views]


class Files:
    """A list of files with the interface that the CPU stage needs."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample_id: int) -> str:
        return self.paths[sample_id]


def cpu_seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def one_core(paths: list[str], rounds: int, with_reference: bool, batch: int = 64) -> dict:
    """Table 1: images per second of CPU time, and ratios."""
    classic, files, settings = Classic(paths), Files(paths), two_views(image_size=SIZE)
    batches = [torch.arange(start, min(start + batch, len(paths))) for start in range(0, len(paths), batch)]

    def run_classic():
        for index in range(len(paths)):
            classic[index]

    def run_ours(epoch: int):
        for ids in batches:
            make_views(MapBatch(files, ids), settings, 0, epoch)

    def run_decode():
        for path in paths:
            decode_rgb(path)

    seconds = {"classic": [], "ours": [], "decode": []}
    for round_index in range(-1, rounds):
        # The order within a round alternates; round -1 is a warm-up.
        runs = [("ours", lambda epoch=round_index + 1: run_ours(epoch)), ("decode", run_decode)]
        if with_reference:
            runs.insert(0, ("classic", run_classic))
        for name, run in runs if round_index % 2 else reversed(runs):
            elapsed = cpu_seconds(run)
            if round_index >= 0:
                seconds[name].append(elapsed)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    rates = {name: len(paths) / statistics.median(taken) for name, taken in seconds.items() if taken}
    table = {
        "images_per_second_per_core": rates,
        "milliseconds_per_image": {name: 1000 / rate for name, rate in rates.items()},
        "ours_over_decode": ratio("decode", "ours"),
        "cpu_seconds": seconds,
    }
    if with_reference:
        table["ours_over_classic"] = ratio("classic", "ours")
        table["decode_over_classic"] = ratio("classic", "decode")
        classic_bytes = classic[0][0].numel() * classic[0][0].element_size()
        table["bytes_per_view"] = {"classic": classic_bytes, "ours": 3 * SIZE * SIZE}
    return table


# Decodes all files once per line of stdin, and prints the CPU seconds.
DECODE = """
import sys, time
import torch
from mocov3_hf.data.decode import decode_rgb
torch.set_num_threads(1)
for line in sys.stdin:
    start = time.process_time()
    for path in sys.argv[1:]:
        decode_rgb(path)
    print(time.process_time() - start, flush=True)
"""


def in_turns(before: str, program: str, arguments: list[str], rounds: int, line: str = "") -> dict:
    """
    CPU seconds of a program with the package of another source tree and of this one, and the median of their ratios.

    Args:
        before: Folder src of the other tree.
        program: Python code that measures once per line of stdin, and prints the seconds.
        arguments: Of the program.
        rounds: Measurements of each, in turns.
        line: What to send on stdin.
    """
    children = []
    for tree in (before, str(Path(decode_module.__file__).parents[2])):
        command = [sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "PYTHONPATH": tree}
        children.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    seconds = ([], [])
    for round_index in range(-1, rounds):
        for child in (0, 1) if round_index % 2 else (1, 0):
            children[child].stdin.write(f"{line}\n")
            children[child].stdin.flush()
            taken = float(children[child].stdout.readline())
            if round_index >= 0:
                seconds[child].append(taken)
    for child in children:
        child.stdin.close()
        child.wait()
    speedup = statistics.median(before / after for before, after in zip(*seconds, strict=True))
    return {"before": statistics.median(seconds[0]), "after": statistics.median(seconds[1]), "speedup": speedup}


def cpu_of_workers(loader: DataLoader) -> float:
    """CPU seconds used so far by the workers of a loader (Linux)."""
    ticks = 0
    for worker in [] if loader._iterator is None else loader._iterator._workers:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def loaders(directory: str, paths: list[str], workers: int, rounds: int, with_reference: bool, batch: int) -> dict:
    """Table 2: a whole loader, including workers and transport."""
    source = open_source(directory)
    ours = TwoViewLoader(source, two_views(image_size=SIZE), global_batch_size=batch, num_workers=workers)
    classic = DataLoader(
        Classic(paths), batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    candidates = {"ours": (ours._loader, ours.epoch)}
    if with_reference:
        candidates["classic"] = (classic, lambda epoch: iter(classic))
    cpu, wall = {name: [] for name in candidates}, {name: [] for name in candidates}
    for round_index in range(-1, rounds):
        for name, (loader, epoch) in candidates.items():
            before, start, own = cpu_of_workers(loader), time.perf_counter(), time.process_time()
            count = 0
            for views in epoch(round_index + 1):
                count += batch
                del views
            taken = time.process_time() - own + cpu_of_workers(loader) - before
            if round_index >= 0:
                cpu[name].append(taken / count)
                wall[name].append((time.perf_counter() - start) / count)
    table = {
        "images_per_cpu_second": {name: 1 / statistics.median(taken) for name, taken in cpu.items()},
        "images_per_wall_second": {name: 1 / statistics.median(taken) for name, taken in wall.items()},
        "cpu_seconds_per_image": cpu,
        "wall_seconds_per_image": wall,
    }
    if with_reference:
        pairs = zip(cpu["classic"], cpu["ours"], strict=True)
        table["ours_over_classic"] = statistics.median(a / b for a, b in pairs)
    return table


def device_stage(device: torch.device, batch: int, rounds: int, compiled: bool) -> dict:
    """Table 3: the photometric stage on both views, and a ViT-S step, in milliseconds per image."""
    from mocov3_hf.model import MoCoV3Config, MoCoV3ViTConfig
    from mocov3_hf.model.modeling_mocov3_pretraining import MoCoV3ForPreTraining

    def milliseconds(function, repeats: int) -> float:
        times = []
        for index in range(repeats + 1):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter() if device.type == "cuda" else time.process_time()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            end = time.perf_counter() if device.type == "cuda" else time.process_time()
            if index:
                times.append((end - start) * 1000 / batch)
        return statistics.median(times)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings, ids = two_views(image_size=SIZE), torch.arange(batch)
    pixels = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2).to(device)
    parameters = [draw_view(settings[view], 0, 0, ids, view).parameters.to(device) for view in range(2)]
    stage = PhotometricStage().to(device)
    if compiled:
        stage = torch.compile(stage)

    config = MoCoV3Config(
        backbone_config=MoCoV3ViTConfig(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
        )
    )
    model = MoCoV3ForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    views = torch.randn(2, batch, 3, SIZE, SIZE, device=device)

    def step():
        model.update_momentum_encoder(0.99)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    table = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype),
        "compiled": compiled,
        "batch": batch,
        "stage_ms_per_image": milliseconds(lambda: [stage(pixels, p, dtype=dtype) for p in parameters], rounds),
        "vit_small_step_ms_per_image": milliseconds(step, max(1, rounds // 2)),
    }
    table["images_per_second"] = 1000 / table["stage_ms_per_image"]
    table["share_of_step"] = table["stage_ms_per_image"] / table["vit_small_step_ms_per_image"]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of images, searched recursively")
    parser.add_argument("--reference", action="store_true", help="also measure the classic pipeline")
    parser.add_argument("--device_stage", action="store_true", help="also measure the device stage and a ViT-S step")
    parser.add_argument("--compile", action="store_true", help="compile the device stage")
    parser.add_argument(
        "--device_batch", type=int, help="batch size of the device stage; default 256 on a GPU, else 8"
    )
    parser.add_argument("--before", metavar="SRC", help="folder src of another version, to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64, help="batch size of the loaders")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()

    torch.set_num_threads(1)
    paths = [str(path) for path in sorted(Path(options.images).rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not paths:
        parser.error(f"no images in {options.images!r}: pass a folder that contains image files as --images")
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    if options.before:
        result = {"images": len(paths), "rounds": options.rounds, "versions": versions}
        finish(result | {"decoding": in_turns(options.before, DECODE, paths, options.rounds)}, options.output)
        return
    result = {
        "images": len(paths),
        "mean_file_bytes": round(statistics.mean(os.path.getsize(path) for path in paths)),
        "rounds": options.rounds,
        "versions": versions,
        "one_core": one_core(paths, options.rounds, options.reference),
        "loaders": {
            f"{workers} workers": loaders(
                options.images, paths, workers, options.rounds, options.reference, min(options.batch, len(paths))
            )
            for workers in options.workers
        },
    }
    if options.device_stage:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batch = options.device_batch or (256 if device.type == "cuda" else 8)
        result["device_stage"] = device_stage(device, batch, options.rounds, options.compile)
    show(result)
    finish(result, options.output)


def finish(result: dict, output: str | None) -> None:
    """Print the result as JSON, and write it."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def show(result: dict) -> None:
    core = result["one_core"]
    print(f"One core, {result['images']} images:")
    for name, rate in core["images_per_second_per_core"].items():
        print(f"  {name:8s} {rate:8.1f} images/s  {core['milliseconds_per_image'][name]:6.2f} ms per image")
    if "ours_over_classic" in core:
        print(f"  ours / classic {core['ours_over_classic']:.2f}, decode / classic {core['decode_over_classic']:.2f}")
    print(f"  ours / decode  {core['ours_over_decode']:.2f}")
    for name, table in result["loaders"].items():
        rates = ", ".join(f"{who} {rate:.1f}" for who, rate in table["images_per_cpu_second"].items())
        walls = ", ".join(f"{who} {rate:.1f}" for who, rate in table["images_per_wall_second"].items())
        print(f"Loader with {name}: images per CPU second {rates}; per wall second {walls}")
    if "device_stage" in result:
        table = result["device_stage"]
        print(
            f"Device stage on {table['device']} ({table['dtype']}, batch {table['batch']}): "
            f"{table['images_per_second']:.0f} images/s, {100 * table['share_of_step']:.1f} % of a ViT-S step"
        )


if __name__ == "__main__":
    main()
