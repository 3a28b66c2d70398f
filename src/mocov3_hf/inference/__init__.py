"""Models applied to images in batches: what transformers' pipelines give, sooner."""

from .predictors import FeatureExtractor, ImageClassifier


__all__ = ["FeatureExtractor", "ImageClassifier"]
