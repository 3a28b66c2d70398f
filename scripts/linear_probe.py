"""Linear evaluation of a model on a labelled data set: python scripts/linear_probe.py [--cached] --help."""

from mocov3_hf.evaluation.linear_probe import main


if __name__ == "__main__":
    main()
