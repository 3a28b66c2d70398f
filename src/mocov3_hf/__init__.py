"""MoCo v3 self-supervised pre-training for any vision backbone, native to Hugging Face transformers."""

from ._version import __version__


__all__ = ["__version__"]
