"""Models on the Hub: pushes, model cards, and the model's code beside its weights."""

from .push import BackgroundPusher, push_folder


__all__ = ["BackgroundPusher", "push_folder"]
