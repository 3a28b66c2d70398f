"""Pre-train with MoCo v3: `accelerate launch scripts/pretrain.py --recipe NAME --output_dir DIR`; see --help."""

from mocov3_hf.hub.background import BackgroundPusher
from mocov3_hf.pretraining.loop import main


if __name__ == "__main__":
    main(make_pusher=BackgroundPusher)
