"""Linear evaluation of a model on a labelled data set: python scripts/linear_probe.py [--cached] --help."""

from mocov3_hf.evaluation.linear_probe import main
from mocov3_hf.hub.push import push_folder


if __name__ == "__main__":
    main(push=push_folder)
