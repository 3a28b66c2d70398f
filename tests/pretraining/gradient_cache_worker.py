"""A step without and with the gradient cache in two processes, for test_gradient_cache.py."""

import sys

import torch

from tests.pretraining.test_gradient_cache import one_step


if __name__ == "__main__":
    plain, cached = one_step(None, images=6), one_step(4, images=6)
    assert plain["num_processes"] == 2
    if plain["process_index"] == 0:
        torch.save({"plain": plain, "cached": cached}, sys.argv[1])
    torch.distributed.destroy_process_group()
