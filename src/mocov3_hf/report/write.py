"""The command `mocov3 report`: one HTML page about a run or a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..options import Command, option, parse
from ..reporting import UsageError, reporting, warn
from ..requirements import require_packages
from ..run_folder import CONFIG, RunFolder, read_run_folder
from ..storage import write_text


NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "jinja2": "jinja2"}


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Report"""

    model: list[str] = option(
        help="Output folder of a run, a model folder, or a folder of results; several are compared.", metavar="FOLDER"
    )
    output: str | None = option(
        None,
        "HTML file to write. Defaults to report.html in the folder, or comparison.html beside the first of several.",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Images"""

    dataset_name: str | None = option(
        None, "Data set for the sections about images, with or without labels: Hub id or folder.", metavar="DATASET"
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    test_split: str = option("test", "Split of the data set.", old=["split"])
    image_column: str | None = option(None, "Column of images. Found if there is only one.")
    label_column: list[str] | None = option(None, "Column of labels, or several. Found if there is only one.")
    display_channels: list[int] | None = option(
        None,
        "One or three channels to show, numbered from 0, such as 3 2 1. Defaults to the first three, or the first.",
        at_least=0,
    )
    num_images: int = option(500, "Number of images, balanced over the classes.", at_least=2)
    on_bad_image: Literal["stop", "skip"] = option(
        "stop", "What to do with images that cannot be decoded.", old=["bad_images"]
    )
    batch_size: int = option(32, "Images per forward pass.", at_least=1)
    seed: int = option(0, "Seed of the sample and of the t-SNE map.", at_least=0, at_most=2**32 - 1)


COMMAND = Command(
    "report",
    "Write an HTML report about a run or a model: training curves and results; with images also augmented views,\n"
    "attention maps, patch features, a t-SNE map, nearest neighbors before and after training, and the confusion\n"
    "matrix. The plots are also saved as PNG in plots/ next to the report, for the model card. Several runs are\n"
    "compared on one page.",
    (FolderOptions, ImageOptions),
    "model",
)


def write_report(chosen: FolderOptions, images: ImageOptions) -> Path:
    """
    Write the report and return its path. What the folders hold and the report cannot show is left out, and named on
    the page and on stderr.

    Raises:
        ValueError: not a run or model, unreadable images or weights, or a missing package.
        OSError: a folder that cannot be written.
    """
    paths = [chosen.model] if isinstance(chosen.model, str) else chosen.model
    folders = [read_run_folder(path) for path in paths]
    require_packages("a report", "report", NEEDED)
    first, is_comparison = folders[0].path, len(folders) > 1
    usual = first.absolute().parent / "comparison.html" if is_comparison else first / "report.html"
    output = usual if chosen.output is None else Path(chosen.output).expanduser()
    if output.is_dir():
        raise UsageError(f"--output {str(output)!r} is a folder: pass a file, such as {str(output / 'report.html')!r}")
    if is_comparison and images.dataset_name is not None:
        raise UsageError("--dataset_name shows images of one model: leave it out, or pass one folder")
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise UsageError(f"a folder is named twice among {', '.join(map(repr, paths))}: pass each once")
    # Imported here, because the checks above must work without the plotting packages.
    from .comparison import render_comparison
    from .page import render_page

    looked = look(folders[0], images)
    plots = output.parent / (f"{output.stem}_plots" if is_comparison else "plots")
    plots.mkdir(parents=True, exist_ok=True)
    if is_comparison:
        page = render_comparison(folders, plots)
    else:
        earlier = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
        page = render_page(folders[0], looked, plots, images.seed, earlier)
    write_text(output, page.encode("utf-8", errors="replace").decode("utf-8"))  # JSON can hold halves of characters
    for folder in folders:
        for note in folder.notes:
            warn(f"{f'{folder.path.name}: ' if is_comparison else ''}{note.removesuffix('.')}")
    return output


def look(folder: RunFolder, options: ImageOptions) -> tuple | None:
    """
    Load images and model and run the model.

    Returns:
        `(viewer, samples, seen, start)`, where `start` is what the same architecture sees with random weights, None
        for a classifier. None without images. Called before anything is written, because bad input fails here.
    """
    if options.dataset_name is None:
        return None
    if not folder.config:
        has_run = folder.kind != "evaluation"
        fix = " or wait for the first checkpoint" if has_run else " or pass the folder of the model"
        raise UsageError(
            f"folder {str(folder.path)!r} has no {CONFIG}{' yet' if has_run else ''}, so there is no model to run on"
            f" images: leave out --dataset_name{fix}"
        )
    from .images import Viewer, open_samples

    samples = open_samples(
        options.dataset_name,
        options.dataset_config_name,
        options.test_split,
        options.image_column,
        options.label_column,
        problem_type=folder.config.get("problem_type") or "auto",
        num_images=options.num_images,
        seed=options.seed,
        bad_images=options.on_bad_image,
    )
    viewer = Viewer(folder, options.display_channels)
    seen = viewer.look(samples, options.batch_size)
    start = None if viewer.is_classifier else viewer.untrained(options.seed).look(samples, options.batch_size)
    return viewer, samples, seen, start


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 report`. Bad input ends with one line on stderr and exit code 2."""
    with reporting():
        output = write_report(*parse(COMMAND, arguments))
        print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
