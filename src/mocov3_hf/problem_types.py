"""What the outputs of a classifier mean, in the words of transformers' `config.problem_type`."""

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
