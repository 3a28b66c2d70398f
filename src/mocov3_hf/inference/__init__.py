"""Models applied to images in batches: the results of transformers' pipelines, faster."""

from .predictors import FeatureExtractor, ImageClassifier


__all__ = ["FeatureExtractor", "ImageClassifier"]
