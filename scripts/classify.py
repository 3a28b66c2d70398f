"""Labels and scores of images by a saved or published classifier: python scripts/classify.py --help."""

from mocov3_hf.inference.command import classify
from mocov3_hf.zoo import fetch, load_zoo


def published(name: str) -> str:
    """The folder of a published model, fetched where needed; any other name as it is."""
    return fetch(name) if name in load_zoo() else name


if __name__ == "__main__":
    classify(published=published)
