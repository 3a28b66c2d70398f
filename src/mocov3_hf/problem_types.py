"""What the outputs of a classifier mean, in the words of transformers' `config.problem_type`."""

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

# What `config.json` of a classifier also holds: the probability from which a multi-label one predicts each class, and
# the superclass of each class.
THRESHOLDS, SUPERCLASSES = "label_thresholds", "superclasses"
# Of a checkpoint within the training of a regression: its outputs are not in the units of the targets yet.
STANDARDIZED = "standardized_targets"
