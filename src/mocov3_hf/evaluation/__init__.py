"""From a model folder to metrics: nearest neighbors, linear probe, fine-tuning, test of classifiers."""
