"""Pre-train with MoCo v3: `accelerate launch scripts/pretrain.py --recipe NAME --output_dir DIR`; see --help."""

from mocov3_hf.hub.background import BackgroundPusher
from mocov3_hf.pretraining.loop import main
from mocov3_hf.pretraining.sharding import leave_if_sharded


if __name__ == "__main__":
    main(make_pusher=BackgroundPusher)
    leave_if_sharded()
