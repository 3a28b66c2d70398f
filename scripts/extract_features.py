"""Features of images by a saved or published model, to one file: python scripts/extract_features.py --help."""

from mocov3_hf.inference.command import extract_features
from mocov3_hf.zoo import fetch, load_zoo


def published(name: str) -> str:
    """The folder of a published model, fetched where needed; any other name as it is."""
    return fetch(name) if name in load_zoo() else name


if __name__ == "__main__":
    extract_features(published=published)
