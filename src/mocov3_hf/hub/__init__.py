"""Models on the Hub: pushes, model cards, and the model's code beside its weights."""

from .push import BackgroundPusher, check_repo_id, push_folder


__all__ = ["BackgroundPusher", "check_repo_id", "push_folder"]
