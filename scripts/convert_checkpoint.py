"""
Convert a checkpoint of another codebase to a folder that `from_pretrained` loads.

    python scripts/convert_checkpoint.py vit-s-300ep.pth.tar --output_dir models/vit-small
    python scripts/convert_checkpoint.py mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k --output_dir models/vit-small
    python scripts/convert_checkpoint.py --list
"""

import sys

from mocov3_hf.interop.command import main


if __name__ == "__main__":
    sys.exit(main())
