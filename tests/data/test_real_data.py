"""The loader on real images: CIFAR-10 as parquet and ImageNet JPEGs, as a folder, as tars, over HTTP.

Set MOCOV3_TEST_DATA to a folder that holds cifar10/ (parquet) and imagenet-sample/ (folders of JPEGs).
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from mocov3_hf.data import photometric
from mocov3_hf.data.decode import decode_rgb
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.photometric import PhotometricStage
from mocov3_hf.data.sources import open_source
from mocov3_hf.data.views import two_views


ROOT = os.environ.get("MOCOV3_TEST_DATA")
pytestmark = pytest.mark.skipif(not ROOT, reason="set MOCOV3_TEST_DATA to a folder with cifar10/ and imagenet-sample/")


def name(kind: str) -> str:
    return str(Path(ROOT) / kind)


def photos() -> list[Path]:
    return sorted(
        path for path in Path(name("imagenet-sample")).rglob("*") if path.suffix.lower() in (".jpeg", ".jpg")
    )


def first_batches(source, size, number=2, **options):
    loader = TwoViewLoader(source, two_views(image_size=size), global_batch_size=48, lanes=4, **options)
    found = []
    for batch in loader.epoch(0):
        found.append(batch)
        if len(found) == number:
            return loader, found
    raise AssertionError("the epoch is too short")


def test_imagenet_decodes_as_pil_does():
    for path in photos():
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(decode_rgb(path).permute(1, 2, 0).numpy(), expected), path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("kind", "size", "number"), [("cifar10", 32, 50_000), ("imagenet-sample", 224, 300)])
def test_both_sets_load_the_same_with_and_without_workers(kind, size, number, streaming):
    source = open_source(name(kind), streaming=streaming)
    assert source.num_samples == number
    loader, batches = first_batches(source, size)
    assert loader.steps_per_epoch == number // 48
    assert loader.num_bad_images == 0
    _, again = first_batches(source, size, num_workers=2)
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one["pixels"], other["pixels"])
    views = PhotometricStage()(batches[0]["pixels"][0], batches[0]["parameters"][0])
    assert views.isfinite().all()
    assert views.mean().abs() < 0.6
    assert 0.6 < views.std() < 1.5


def test_a_whole_streamed_epoch_of_cifar10_is_every_image_once():
    source = open_source(name("cifar10"), streaming=True)
    loader = TwoViewLoader(source, two_views(image_size=32), global_batch_size=512)
    reader = loader._loader.dataset.reader
    ids = [reader.open_batch(0, step, range(512)).sample_ids for step in range(loader.steps_per_epoch)]
    ids = torch.cat(ids)
    assert len(ids) == len(ids.unique()) == 50_000 // 512 * 512


def test_tars_of_imagenet(tmp_path):
    folder = tmp_path / "tars"  # the name of the test's own folder would be taken for that of a split
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for path in photos()[shard::4]:
                data = path.read_bytes()
                member = tarfile.TarInfo(f"{path.stem}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    source = open_source(str(folder), streaming=True)
    assert source.num_samples == 300
    _, batches = first_batches(source, 224)
    _, again = first_batches(source, 224, num_workers=2)
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one["pixels"], other["pixels"])
    assert open_source(str(folder)).num_samples == 300


def test_labels():
    cifar = open_labeled(name("cifar10"))
    assert (len(cifar), cifar.class_names[3], cifar.num_classes) == (10_000, "cat", 10)
    assert np.bincount(cifar.labels).tolist() == [1000] * 10
    assert open_labeled(name("imagenet-sample"), split="train").num_classes == 300


def turned_by_pil(image: Image.Image, steps: int) -> np.ndarray:
    """Shift hue by a number of PIL's steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(steps))
    return np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


def test_hue_and_blur_stay_within_the_levels_of_the_reference():
    for path in photos()[:40]:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((224, 224), Image.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        hue = (photometric.adjust_hue(pixels, 18 / 256)[0] * 255).permute(1, 2, 0).numpy()
        assert np.abs(hue - turned_by_pil(image, 18)).max() <= 10.5
        for sigma in (0.3, 1.1, 2.0):
            blurred = photometric.gaussian_blur(pixels, torch.tensor([sigma]), 2.0)[0] * 255
            expected = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(float)
            assert np.abs(blurred.permute(1, 2, 0).numpy() - expected).max() <= 3  # PIL: six times half a level


def test_decoding_large_photos_smaller_changes_nothing_visible():
    """A mosaic of 12 photos, 2000 x 1500 with real detail: compare views of a reduced and a full decode."""
    from mocov3_hf.data.decode import decode_shrunk

    mosaic = Image.new("RGB", (2000, 1500))
    for index, path in enumerate(photos()[:12]):
        with Image.open(path) as image:
            mosaic.paste(image.convert("RGB").resize((500, 500)), (index % 4 * 500, index // 4 * 500))
    buffer = io.BytesIO()
    mosaic.save(buffer, "JPEG", quality=92)
    full = decode_rgb(buffer.getvalue())[None].float()
    small = decode_shrunk(buffer.getvalue(), lambda height, width: 2)[0][None].float()
    views = [
        torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
        for image in (full, small)
    ]
    assert (views[0] - views[1]).abs().mean() < 1
