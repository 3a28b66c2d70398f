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

    model: str = option(help="Output folder of a run, or a model folder.", metavar="FOLDER")
    output: str | None = option(None, "HTML file to write. Defaults to report.html in the folder.", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Images"""

    dataset_name: str | None = option(
        None, "Data set for the sections about images, with or without labels: Hub id or folder.", metavar="DATASET"
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    test_split: str = option("test", "Split of the data set.", old=["split"])
    image_column: str | None = option(None, "Column of images. Found if there is only one.")
    label_column: str | None = option(None, "Column of labels. Found if there is only one.")
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
    "Write an HTML report about a run or a model: training curves and results; with images also attention maps,\n"
    "patch features, a t-SNE map, nearest neighbors and the confusion matrix. The plots are also saved as PNG in\n"
    "plots/ next to the report, for the model card.",
    (FolderOptions, ImageOptions),
    "model",
)


def write_report(chosen: FolderOptions, images: ImageOptions) -> Path:
    """
    Write the report and return its path. What the folder holds and the report cannot show is left out, and named on
    the page and on stderr.

    Raises:
        ValueError: not a run or model, unreadable images or weights, or a missing package.
        OSError: a folder that cannot be written.
    """
    folder = read_run_folder(chosen.model)
    require_packages("a report", "report", NEEDED)
    output = folder.path / "report.html" if chosen.output is None else Path(chosen.output).expanduser()
    if output.is_dir():
        raise UsageError(f"--output {str(output)!r} is a folder: pass a file, such as {str(output / 'report.html')!r}")
    # Imported here, because the checks above must work without the plotting packages.
    from .page import render_page

    looked = look(folder, images)
    plots = output.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    page = render_page(folder, looked, plots, images.seed)
    write_text(output, page.encode("utf-8", errors="replace").decode("utf-8"))  # JSON can hold halves of characters
    for note in folder.notes:
        warn(note.removesuffix("."))
    return output


def look(folder: RunFolder, options: ImageOptions) -> tuple | None:
    """Load images and model and run the model: `(viewer, samples, seen)`, None without images. Called before anything
    is written, because bad input fails here."""
    if options.dataset_name is None:
        return None
    if not folder.config:
        raise UsageError(
            f"folder {str(folder.path)!r} has no {CONFIG} yet, so there is no model to run on images: leave out"
            " --dataset_name or wait for the first checkpoint"
        )
    from .images import Viewer, open_samples

    samples = open_samples(
        options.dataset_name,
        options.dataset_config_name,
        options.test_split,
        options.image_column,
        options.label_column,
        num_images=options.num_images,
        seed=options.seed,
        bad_images=options.on_bad_image,
    )
    viewer = Viewer(folder, options.display_channels)
    return viewer, samples, viewer.look(samples, options.batch_size)


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 report`. Bad input ends with one line on stderr and exit code 2."""
    with reporting():
        output = write_report(*parse(COMMAND, arguments))
        print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
