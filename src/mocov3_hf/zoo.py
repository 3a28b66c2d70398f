"""The published models by name: `fetch(NAME)` gives back a folder for `from_pretrained` and `pipeline`."""

from .interop.zoo import ZooEntry, fetch, find_entry, list_zoo, load_zoo


__all__ = ["ZooEntry", "fetch", "find_entry", "list_zoo", "load_zoo"]
