"""The command `scripts/report.py`: a folder of a run or a model to one HTML page."""

import argparse
import datetime
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .._version import __version__
from .folder import ModelFolder, ReportError, read_folder


NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "jinja2": "jinja2"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write one HTML page about a run or a model: curves, results and, with images, attention, patch"
        " features, a map of the features, nearest neighbours and confusions. PNG files for a model card go to plots/"
        " beside it.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="output folder of a run, or any model folder")
    parser.add_argument("--output", metavar="FILE", help="the page; PATH/report.html by default")
    images = parser.add_argument_group("images to look at, labelled or not")
    images.add_argument("--dataset_name", help="Hub id, or folder (of images, parquet, Arrow); none by default")
    images.add_argument("--dataset_config_name", help="configuration of a data set that has several")
    images.add_argument("--split", default="test", help="split to take images from (default: %(default)s)")
    images.add_argument("--image_column", help="column of images; found where there is one")
    images.add_argument("--label_column", help="column of labels; found where there is one")
    images.add_argument("--num_images", type=int, default=500, help="how many (default: %(default)s)")
    images.add_argument("--batch_size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    images.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")
    return parser


def write_report(options: argparse.Namespace) -> Path:
    """
    Read, look, draw and write.

    Args:
        options: as `build_parser` gives them.

    Returns:
        The page's file.

    Raises:
        ReportError, ValueError: no run and no model, images or weights that cannot be read, a package that is missing.
        OSError: a folder that cannot be written.
    """
    folder = read_folder(options.path)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ReportError(f"a report needs {', '.join(missing)}: pip install 'mocov3_hf[report]'")
    output = folder.path / "report.html" if options.output is None else Path(options.output).expanduser()
    if output.is_dir():
        raise ReportError(
            f"--output {str(output)!r} is a folder: give a file, such as {str(output / 'report.html')!r}"
        )
    # Only now: nothing above needs the packages that draw.
    from .page import render

    looked = look(folder, options)
    plots = output.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    page = compose(folder, options, looked, plots)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        aside.write_text(render(page), encoding="utf-8")
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    return output


def look(folder: ModelFolder, options: argparse.Namespace):
    """The model, the images and what it makes of them; None without images. Before anything is drawn or written: what
    can fail fails here."""
    if options.dataset_name is None:
        return None
    if not folder.has_model:
        raise ReportError(
            f"{str(folder.path)!r} has no config.json yet, so no model to show images to: leave out --dataset_name, or"
            " wait for the first checkpoint"
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


def compose(folder: ModelFolder, options: argparse.Namespace, looked, plots: Path):
    """The page, section by section; draws into `plots`."""
    from .image_sections import image_sections
    from .page import Page, Section, Text
    from .summary import facts, findings, lead, quoted, results_section

    sections = [training_section(folder, plots), results_section(folder)]
    if looked is not None:
        sections += image_sections(*looked, plots, options.seed)
    else:
        command = f"python scripts/report.py {quoted(folder)} --dataset_name DATA --split test"
        text = "Attention maps, patch features, a map of the features and nearest neighbours need images:"
        if folder.kind == "classifier":
            text = text.replace(" and nearest neighbours", ", nearest neighbours and confusions")
        sections.append(Section("images", "Images", [Text(text, command)]))
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Page(
        title=folder.path.resolve().name,
        lead=lead(folder),
        facts=facts(folder),
        findings=findings(folder),
        notes=folder.notes,
        sections=sections,
        footer=f"Made {now} by scripts/report.py of mocov3_hf {__version__}.",
    )


def training_section(folder: ModelFolder, plots: Path):
    """The curves, or how to come by them."""
    from .page import Charts, Section, Text
    from .training import classifier_charts, pretraining_charts

    draw = classifier_charts if folder.kind == "classifier" else pretraining_charts
    charts = draw(folder, plots)
    parts: list = [Charts(charts)] if charts else []
    if not charts and folder.kind == "classifier":
        parts.append(
            Text(
                "There is no record of the training (metrics.jsonl). This trains a classifier and keeps one:",
                "python scripts/finetune.py --model MODEL --dataset_name DATA --output_dir DIR",
            )
        )
    elif not charts:
        parts.append(
            Text(
                "There is no record of a training (metrics.jsonl). This trains a model and keeps one:",
                "python scripts/pretrain.py --recipe NAME --dataset_name DATA --output_dir DIR",
            )
        )
    elif folder.kind == "pretraining" and not folder.knn:
        parts.append(
            Text(
                "Nearest neighbour accuracy was not measured while training; --knn_steps does:",
                "python scripts/pretrain.py --recipe NAME --dataset_name DATA --output_dir DIR --knn_steps 500",
            )
        )
    return Section("training", "Training", parts)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Command line of the report. Bad input ends in one line and status 2.

    Args:
        argv: None for those of the process.
    """
    options = build_parser().parse_args(argv)
    try:
        output = write_report(options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0
