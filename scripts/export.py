"""
Export a model to transformers' own classes, timm, ONNX or a `torch.export` program, verified on the spot.

    python scripts/export.py models/vit-small --format vit --output_dir exports/vit-small
"""

import sys

from mocov3_hf.interop.export import main


if __name__ == "__main__":
    sys.exit(main())
