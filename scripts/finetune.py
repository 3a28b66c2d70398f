"""Fine-tune a model on a labelled data set: python scripts/finetune.py --recipe NAME --model PATH --output_dir DIR."""

from mocov3_hf.evaluation.finetune import main
from mocov3_hf.hub.push import push_folder


if __name__ == "__main__":
    main(push=push_folder)
