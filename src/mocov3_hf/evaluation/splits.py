"""The images of a training run: training, validation and test split, with one numbering of classes."""

import warnings
from typing import NamedTuple

import numpy as np

from ..data.labeled import LabeledImages
from ..problem_types import MULTI_LABEL, SINGLE_LABEL
from ..reporting import UsageError
from .common import held_out_rows, open_splits
from .problems import LOWER_IS_BETTER, METRICS
from .supervised_options import SupervisedOptions


_SINGLE_LABEL_OPTIONS = (
    *("class_balanced_sampling", "superclass_column", "label_smoothing_factor", "mixup_alpha", "cutmix_alpha"),
)


class Splits(NamedTuple):
    """
    The images of a training run, with one numbering of classes.

    Attributes:
        train: What is trained on.
        validation: Evaluated after every epoch: the held-out part of the training split, or the test split.
        test: Evaluated at the end.
        whole_train: The training split including the held-out part.
    """

    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages
    whole_train: LabeledImages

    def class_names(self) -> list[str]:
        """By label or target; LABEL_0, LABEL_1, ... if the data set has none."""
        number = max(self.whole_train.num_classes, self.test.num_classes)
        return self.whole_train.class_names or [f"LABEL_{label}" for label in range(number)]

    @property
    def problem_type(self) -> str:
        """That of the labels."""
        return self.whole_train.problem_type

    def held_out(self) -> LabeledImages | None:
        """The held-out part of the training split, None without one."""
        return None if self.validation is self.test else self.validation


def open_training_splits(options: SupervisedOptions) -> Splits:
    """The splits of a training run; ValueError as `open_splits`, or if nothing or everything would be held out."""
    whole, test = open_splits(options)
    if options.validation_fraction == 0:
        return Splits(whole, test, test, whole)
    held_out = held_out_rows(whole.labels, options.validation_fraction, options.seed)
    return Splits(whole.select(np.flatnonzero(~held_out)), whole.select(np.flatnonzero(held_out)), test, whole)


def check_problem(options: SupervisedOptions, splits: Splits) -> None:
    """UsageError for options that are defined for one class per image only."""
    if splits.problem_type != SINGLE_LABEL:
        for name in _SINGLE_LABEL_OPTIONS:
            if getattr(options, name, 0):
                raise UsageError(f"--{name} is for one class per image, not {splits.problem_type}: leave it out")
    if splits.problem_type == MULTI_LABEL and splits.held_out() is None:
        warnings.warn(
            "the threshold of every class is 0.5: --validation_fraction 0.1 chooses thresholds on held-out images",
            stacklevel=2,
        )


def metric_of_best(options: SupervisedOptions, splits: Splits, has_average: bool) -> str:
    """`--metric_for_best_model`, by default the first of the problem; UsageError for one that is not computed."""
    known = list(METRICS[splits.problem_type])
    if splits.problem_type == SINGLE_LABEL:
        known += [*(["top5"] if len(splits.class_names()) > 5 else []), "mean_per_class"]
    known.append("loss")
    known += [f"{metric}_ema" for metric in known] if has_average else []
    name = options.metric_for_best_model.replace("top1", METRICS[splits.problem_type][0])
    if name not in known:
        raise UsageError(f"--metric_for_best_model takes one of {', '.join(known)}, got {name!r}")
    return name


def greater_is_better(metric: str) -> bool:
    return metric.removesuffix("_ema") not in LOWER_IS_BETTER
