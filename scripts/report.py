"""
One HTML page about a run or a model: curves, results, and what the features see in images.

    python scripts/report.py runs/vit-small --dataset_name imagenet --split validation
"""

import sys

from mocov3_hf.report.command import main


if __name__ == "__main__":
    sys.exit(main())
