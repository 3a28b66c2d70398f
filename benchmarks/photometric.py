"""CPU time of the photometric stage, both views, compared with another source tree.

    python -m benchmarks.photometric --before SRC --output benchmarks/results/photometric_cpu.json

Two processes with one thread take turns over the same pixels and drawn parameters. Reported are medians, also of the
ratios within a round. `quickstart` has the views of that recipe, the other rows those of the paper.
"""

import argparse
import datetime

import torch

from .data_path import finish, in_turns
from .limits import cpu_name


# Name: image size, images of a batch, settings besides the paper's.
CASES = {
    "quickstart": (32, 256, {"flip_probability": 0.0}),
    "32 px": (32, 256, {}),
    "64 px": (64, 128, {}),
    "96 px": (96, 64, {}),
    "128 px": (128, 32, {}),
    "224 px": (224, 16, {}),
}
PROGRAM = """
import sys, time
import torch
from mocov3_hf.data.photometric import PhotometricStage
from mocov3_hf.data.views import draw_view, two_views
torch.set_num_threads(1)
size, batch, overrides = eval(sys.argv[1])
ids = torch.arange(batch)
settings = two_views(image_size=size, **overrides)
generator = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
parameters = [draw_view(settings[view], 0, 0, ids, view).parameters for view in range(2)]
stage = PhotometricStage()
for line in sys.stdin:
    start = time.process_time()
    for values in parameters:
        stage(pixels, values)
    print(time.process_time() - start, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="SRC", required=True, help="folder src of another version")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    rows = {}
    for name, case in CASES.items():
        row = in_turns(options.before, PROGRAM, [repr(case)], options.rounds)
        before, after = (1000 * row[which] / case[1] for which in ("before", "after"))
        rows[name] = {"before": before, "after": after, "speedup": row["speedup"]}
        print(f"{name:10s} {before:7.3f} -> {after:7.3f} ms per image, {row['speedup']:5.2f} times as fast")
    result = {"unit": "CPU ms per image, both views", "rounds": options.rounds, "torch": torch.__version__}
    result |= {"machine": cpu_name(), "rows": rows}
    finish({**result, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"}, options.output)


if __name__ == "__main__":
    main()
