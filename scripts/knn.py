"""Weighted kNN evaluation of a model on a labelled data set: python scripts/knn.py --help."""

from mocov3_hf.evaluation.knn import main


if __name__ == "__main__":
    main()
