"""From a model folder to figures: features, nearest neighbours, linear classifiers, and the record of results."""
