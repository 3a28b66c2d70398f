"""Top-1 and top-5 of a saved or published classifier on a labelled data set: python scripts/evaluate.py --help."""

from mocov3_hf.evaluation.evaluate import main
from mocov3_hf.zoo import fetch, load_zoo


def published(name: str) -> str:
    """The folder of a published model, fetched where needed; any other name as it is."""
    return fetch(name) if name in load_zoo() else name


if __name__ == "__main__":
    main(published=published)
