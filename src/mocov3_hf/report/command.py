"""The command `mocov3 report`: one HTML page about a run or a model."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .folder import ModelFolder, ReportError, read_folder


NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "jinja2": "jinja2"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write an HTML report about a run or a model: training curves and results; with images also"
        " attention maps, patch features, a t-SNE map, nearest neighbors and the confusion matrix. The plots are also"
        " saved as PNG in plots/ next to the report, for the model card.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="output folder of a run, or a model folder")
    parser.add_argument("--output", metavar="FILE", help="HTML file to write (default: PATH/report.html)")
    images = parser.add_argument_group("images, with or without labels")
    images.add_argument("--dataset_name", help="dataset on the Hub or local folder (default: no images)")
    images.add_argument("--dataset_config_name", help="configuration of the dataset")
    images.add_argument("--split", default="test", help="split of the dataset (default: %(default)s)")
    images.add_argument("--image_column", help="column with the images (default: detected)")
    images.add_argument("--label_column", help="column with the labels (default: detected)")
    images.add_argument("--num_images", type=int, default=500, help="number of images (default: %(default)s)")
    images.add_argument("--batch_size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    images.add_argument("--seed", type=int, default=0, help="seed for sampling images (default: %(default)s)")
    return parser


def write_report(options: argparse.Namespace) -> Path:
    """
    Write the report and return its path.

    Args:
        options: as parsed by `build_parser`.

    Raises:
        ReportError, ValueError: not a run or model, unreadable images or weights, or a missing package.
        OSError: a folder that cannot be written.
    """
    folder = read_folder(options.path)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ReportError(f"a report needs {', '.join(missing)}: pip install 'mocov3_hf[report]'")
    output = folder.path / "report.html" if options.output is None else Path(options.output).expanduser()
    if output.is_dir():
        raise ReportError(
            f"--output {str(output)!r} is a folder: pass a file, such as {str(output / 'report.html')!r}"
        )
    # Only here: the checks above must work without the packages that draw.
    from .page import render_page

    looked = look(folder, options)
    plots = output.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.write_text(render_page(folder, options, looked, plots), encoding="utf-8")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def look(folder: ModelFolder, options: argparse.Namespace) -> tuple | None:
    """Load images and model and run the model: `(viewer, samples, seen)`, None without images. Called before anything
    is written, because bad input fails here."""
    if options.dataset_name is None:
        return None
    if not folder.has_model:
        raise ReportError(
            f"{str(folder.path)!r} has no config.json yet, so there is no model to run on images: omit --dataset_name"
            " or wait for the first checkpoint"
        )
    if options.batch_size < 1:
        raise ReportError(f"--batch_size must be at least 1, got {options.batch_size}")
    from .encoding import Viewer
    from .samples import open_samples

    samples = open_samples(
        options.dataset_name,
        options.dataset_config_name,
        options.split,
        options.image_column,
        options.label_column,
        num_images=options.num_images,
        seed=options.seed,
    )
    viewer = Viewer(folder)
    return viewer, samples, viewer.look(samples, options.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Bad input ends with one line on stderr and status 2."""
    options = build_parser().parse_args(argv)
    try:
        output = write_report(options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0
