"""
Push a model folder to the Hub with its code, card and results; run it again to resume.

    python scripts/push_to_hub.py runs/vit-small --hub_model_id USER/NAME --private
"""

import sys

from mocov3_hf.hub.push import main


if __name__ == "__main__":
    sys.exit(main())
