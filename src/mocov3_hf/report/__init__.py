"""
HTML reports about a run or a model: training curves, results, and what the model sees in images.

The module is also a function, the command `mocov3 report` as a Python call: see `report_on`.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any


def report_on(run: str | os.PathLike, dataset: Any = None, **options: Any) -> Path:
    """
    Write an HTML report about a run or a model.

    Args:
        run: A `Run`, the output folder of one, or a model folder.
        dataset: Images for the sections about images, as for `mocov3_hf.pretrain`; with labels, if there are any.
            Of data in memory with a single split, that one is used.
        options: Any option of `mocov3 report --help`, as a Python value: `num_images=200`.

    Returns:
        The page, by default `report.html` in the folder.

    Raises:
        UsageError, ValueError: not a run or model, unreadable images, or missing packages:
            `pip install "mocov3_hf[report]"`.
        OSError: a folder that cannot be written.
    """
    from ..data.memory import named
    from ..options import build, values_of_keywords
    from .write import COMMAND, write_report

    given = {**options, "model": run}
    with named("" if dataset is None else dataset) as (name, split):
        if dataset is not None:
            given["dataset_name"] = name
        if split is not None:
            given.setdefault("test_split", split)
        values = values_of_keywords(COMMAND, given)
        return write_report(*(build(group, values) for group in COMMAND.groups))


class _Report(types.ModuleType):
    """This module, which can be called."""

    __call__ = staticmethod(report_on)


sys.modules[__name__].__class__ = _Report
