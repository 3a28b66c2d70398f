"""Pre-trains as cells of a notebook do: in the process itself, then in two processes of `notebook_launcher`.

Usage: notebook_worker.py FOLDER OPTIONS, a mapping in JSON.
"""

import json
import socket
import sys

import numpy as np
from accelerate import notebook_launcher

import mocov3_hf


def pretrain(folder: str) -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (40, 48, 3), dtype=np.uint8) for _ in range(24)]
    mocov3_hf.pretrain(images, output_dir=folder, **json.loads(sys.argv[2]))


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pretrain(f"{sys.argv[1]}/1")
    notebook_launcher(pretrain, (f"{sys.argv[1]}/2",), num_processes=2, use_port=str(port))
    one, two = (mocov3_hf.Run(f"{sys.argv[1]}/{number}").metrics["loss"] for number in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)
