"""Models on the Hub: their cards and the push."""

from .background import BackgroundPusher
from .push import PushError, push_folder


__all__ = ["BackgroundPusher", "PushError", "push_folder"]
