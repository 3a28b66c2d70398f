"""A step without and with the gradient cache, and with spread weights, in two processes for test_gradient_cache.py."""

import os
import sys

import torch

from tests.pretraining.test_gradient_cache import one_step


if __name__ == "__main__":
    plain, cached = one_step(None, images=6), one_step(4, images=6)
    spread = one_step(4, images=6, fsdp=True)
    assert plain["num_processes"] == 2
    if plain["process_index"] == 0:
        torch.save({"plain": plain, "cached": cached, "cached, spread": spread}, sys.argv[1])
    torch.distributed.barrier()
    os._exit(0)  # at once: the threads of FSDP2's collectives can outlive the interpreter's end, which then aborts
