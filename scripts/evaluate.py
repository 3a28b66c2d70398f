"""Top-1 and top-5 of a saved classifier on a labelled data set: python scripts/evaluate.py --help."""

from mocov3_hf.evaluation.evaluate import main


if __name__ == "__main__":
    main()
