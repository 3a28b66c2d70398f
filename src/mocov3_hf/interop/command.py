"""The command `scripts/convert_checkpoint.py`: a file, a URL or a name of the zoo to a model folder."""

import argparse
import sys

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from .convert import convert_checkpoint, format_report
from .download import download
from .errors import CheckpointError
from .layouts import LAYOUTS
from .zoo import at_mirror, cache_folder, convert_entry, list_zoo, load_zoo


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert a MoCo v3 checkpoint of the official code, mmpretrain, DeiT, timm or torchvision.",
        epilog="Without --output_dir, --list shows the published models that a name can stand for.",
    )
    parser.add_argument("source", nargs="?", metavar="FILE|URL|NAME", help="a file, a URL, or a name of the zoo")
    parser.add_argument("--output_dir", help="the new folder; it appears whole or not at all")
    parser.add_argument("--list", action="store_true", help="show the published models and exit")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_dir where it exists")
    parser.add_argument("--with_code", action="store_true", help="carry the model's code, for trust_remote_code")
    parser.add_argument("--mirror", metavar="URL", help="a server with the publisher's paths to download from")
    parser.add_argument("--sha256", metavar="HEX", help="the file's SHA-256 or its beginning, for a URL")
    parser.add_argument("--labels", metavar="FILE", help="class names: one a line, JSON, or 'imagenet-1k'")
    what = parser.add_argument_group("what the file tells otherwise or not at all")
    what.add_argument("--entry", help="the entry of the file that holds the state dict")
    what.add_argument("--layout", choices=sorted(LAYOUTS), help="naming of the keys; recognised by itself")
    what.add_argument("--stage", choices=("pretrained", "linear", "finetuned"))
    what.add_argument("--epochs", type=int, help="for how long the model was trained")
    what.add_argument("--num_attention_heads", type=int, help="12, 12 and 16 for ViT-Small, Base and Large")
    what.add_argument("--image_size", type=int, help="side of the images in pixels")
    what.add_argument("--temperature", type=float, help="0.2 for ViT and 1.0 for ResNet where left out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; gives back its exit status. Errors are one line on stderr."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.list:
        print(list_zoo())
        return 0
    if args.source is None or args.output_dir is None:
        parser.error("FILE|URL|NAME and --output_dir are needed, or --list")
    names = ("entry", "layout", "stage", "epochs", "labels", "num_attention_heads", "image_size", "temperature")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options |= {"overwrite": args.overwrite, "with_code": args.with_code}
    logging.disable_progress_bar()
    try:
        report = convert_source(args.source, args.output_dir, args.mirror, args.sha256, options)
    except (CheckpointError, ValueError, TypeError, StrictDataclassError) as error:
        if isinstance(error, StrictDataclassError):
            error = error.__cause__  # has the message of the failed validation
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(format_report(report, args.output_dir))
    return 0


def convert_source(source: str, output_dir: str, mirror: str | None, sha256: str | None, options: dict) -> dict:
    if source in load_zoo():
        return convert_entry(source, output_dir, mirror, **options)
    if source.startswith(("http://", "https://")):
        file = download(at_mirror(source, mirror), cache_folder() / "downloads", sha256)
        return convert_checkpoint(file, output_dir, origin={"url": source}, **options)
    return convert_checkpoint(source, output_dir, **options)
