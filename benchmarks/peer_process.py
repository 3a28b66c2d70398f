"""One library in a process of its own, for peers.py: measures the tasks that come as lines of JSON on stdin.

    python benchmarks/peer_process.py NAME FOLDER BATCH STEP_BATCH

Every answer is one line of JSON. The first answer to a data task is a warm-up, in which every output is checked.

- `views`: both views complete, normalized float32, each image or batch by itself;
- `crops`: both crops only, uint8;
- `loader`: the complete views in shuffled batches, from the library's data loader with one worker;
- `step_no`, `step_bf16`: a pre-training step (peer_steps.py) in float32 and bf16.
"""

import json
import os
import sys
import time
import traceback
from importlib import metadata

import numpy as np
import psutil
import torch
from peer_libraries import LIBRARIES, MEAN, SIZE, STD, Library, Pair


IDLE = 0.001  # CPU seconds in 0.1 s


def cpu_seconds() -> float:
    """CPU time so far of this process and of its workers."""
    own = time.process_time()
    return own + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def settled() -> float:
    """CPU time once the process is idle: what a library prepares in advance is paid in the same round."""
    while True:
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < IDLE:
            return cpu_seconds()


def tensors(pair: Pair) -> list[torch.Tensor]:
    return [view if isinstance(view, torch.Tensor) else torch.as_tensor(np.array(view)) for view in pair]


def check(task: str, pair: Pair) -> int:
    """
    The number of images in a pair of views.

    Raises:
        ValueError: They have another shape, type or range than those of the others.
    """
    views = tensors(pair)
    if len(views) != 2 or views[0].shape != views[1].shape:
        raise ValueError(f"{task}: expected two views of one shape, got {[tuple(view.shape) for view in views]}")
    if task == "crops":
        shapes, dtype, low, high = ((3, SIZE, SIZE), (SIZE, SIZE, 3)), torch.uint8, 0, 255
    else:
        shapes, dtype = ((3, SIZE, SIZE),), torch.float32
        low = min(-mean / std for mean, std in zip(MEAN, STD, strict=True)) - 1e-3
        high = max((1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)) + 1e-3
    for view in views:
        least, most = view.min().item(), view.max().item()
        if tuple(view.shape[-3:]) not in shapes or view.dtype != dtype or not low <= least <= most <= high:
            raise ValueError(
                f"{task}: expected {dtype} {shapes[0]} in [{low:.3f}, {high:.3f}], got {view.dtype}"
                f" {tuple(view.shape)} in [{least:.3f}, {most:.3f}]"
            )
    return count(pair)


def count(pair: Pair) -> int:
    """Images in a pair of views."""
    return len(pair[0]) if isinstance(pair[0], torch.Tensor) and pair[0].ndim == 4 else 1


def run_data(library: Library, task: str, warm_up: bool) -> dict:
    """One pass over all images; the outputs of a warm-up are checked."""
    cpu, start, images, same = settled(), time.perf_counter(), 0, warm_up
    for pair in getattr(library, task)():
        images += check(task, pair) if warm_up else count(pair)
        same = same and torch.equal(*tensors(pair))
    if same:
        raise ValueError(f"{task}: both views are the same, of every image")
    wall_seconds = time.perf_counter() - start
    return {"images": images, "cpu_seconds": settled() - cpu, "wall_seconds": wall_seconds}


def run_step(library: Library, name: str, task: str, batch: int) -> dict:
    """One pre-training step."""
    from peer_steps import make_step

    step = library.keep(task, lambda: make_step(name, task.removeprefix("step_"), batch))
    start, cpu = time.perf_counter(), time.process_time()
    loss = step()
    seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - start}
    return {"images": batch, "loss": loss, **seconds}


def describe(library: Library) -> dict:
    names = (library.package, "torch", "torchvision", "pillow", "numpy", "opencv-python-headless", "timm")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    about = {key: getattr(library, key) for key in ("package", "decoder", "resize", "differences")}
    return {**about, "versions": versions, "torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, folder, batch, step_batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    library = LIBRARIES[name](folder, batch)
    done = set()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request == "describe":
                answer = describe(library)
            elif request == "forget":
                library.kept.clear()
                answer = {}
            elif request.startswith("step_"):
                answer = run_step(library, name, request, step_batch)
            else:
                answer = run_data(library, request, request not in done)
                done.add(request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
