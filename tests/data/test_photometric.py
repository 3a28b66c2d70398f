"""The device stage compared with PIL and torchvision, operation by operation and as a whole."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn import functional as F

from mocov3_hf.data import photometric, photometric_cpu, photometric_operations
from mocov3_hf.data.photometric import IMAGENET_MEAN, IMAGENET_STD, PhotometricStage
from mocov3_hf.data.views import JITTER_ORDERS, NO_SOLARIZE, PARAMETER_NAMES, draw_view, two_views


SIZE = 96


@pytest.fixture
def pictures(make_picture):
    return np.stack([make_picture(SIZE, SIZE, seed) for seed in range(6)])


def to_float(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def levels(image: torch.Tensor) -> np.ndarray:
    return (image * 255).permute(0, 2, 3, 1).numpy()


def parameters(rows: int, **values) -> torch.Tensor:
    neutral = dict.fromkeys(PARAMETER_NAMES, 0.0)
    neutral.update(brightness=1, contrast=1, saturation=1, solarize_threshold=NO_SOLARIZE)
    return torch.tensor([[{**neutral, **values}[name] for name in PARAMETER_NAMES]] * rows)


def identity_stage() -> PhotometricStage:
    return PhotometricStage(mean=(0, 0, 0), std=(1, 1, 1))


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("name", ENHANCERS)
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.83, 1.0, 1.27, 1.4])
def test_blends_agree_with_pil_and_torchvision(pictures, name, factor):
    ours = getattr(photometric, f"adjust_{name}")(to_float(pictures), factor)
    for picture, found in zip(pictures, levels(ours), strict=True):
        expected = np.asarray(ENHANCERS[name](Image.fromarray(picture)).enhance(factor)).astype(float)
        assert np.abs(expected - found).max() <= 1.51  # PIL cuts its results, and its grayscale, to whole levels
    theirs = getattr(reference, f"adjust_{name}")(to_float(pictures), factor)
    # torchvision's grayscale weights have four digits (0.2989, 0.587, 0.114).
    assert torch.allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1])
def test_hue_agrees_with_torchvision(pictures, shift):
    image = to_float(pictures)
    image[0, :, :8] = 0.5  # no chroma
    image[1, :, :8] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    expected = reference.adjust_hue(image, shift)
    assert torch.allclose(photometric.adjust_hue(image, shift), expected, atol=5e-6)
    assert torch.allclose(photometric_cpu.turn_hues(image.clone(), list(range(6)), [shift] * 6), expected, atol=5e-6)
    # PIL quantizes hue to steps of 1/256 turn, 6 levels of a pure color, twice.
    ours = levels(photometric.adjust_hue(to_float(pictures), shift))
    for picture, found in zip(pictures, ours, strict=True):
        expected = np.asarray(reference.adjust_hue(Image.fromarray(picture), shift)).astype(float)
        assert np.abs(expected - found).max() <= 14
        assert np.abs(expected - found).mean() <= 3


def test_every_shift_of_hue_on_every_color():
    """All sixths of the circle and their borders, in one batch in which neighbors are shifted in other ways."""
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25)
    shifts = [step / 120 for step in range(-60, 61)]
    image = colors.expand(len(shifts), -1, -1, -1)
    expected = photometric.adjust_hue(image, torch.tensor(shifts, dtype=torch.float64).view(-1, 1, 1, 1))
    rows = [row for row, shift in enumerate(shifts) if shift != 0]
    found = photometric_cpu.turn_hues(image.clone(), rows, [shifts[row] for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found[60], colors[0])


def test_grayscale_agrees_with_pil(pictures):
    found = levels(photometric.grayscale(to_float(pictures)))[..., 0]
    expected = np.stack([np.asarray(Image.fromarray(picture).convert("L")) for picture in pictures])
    assert np.abs(expected - found).max() <= 1


@pytest.mark.parametrize("threshold", [0, 100, 128, 255])
def test_solarize_is_pils(pictures, threshold):
    found = levels(photometric.solarize(to_float(pictures), threshold))
    expected = np.stack([np.asarray(ImageOps.solarize(Image.fromarray(picture), threshold)) for picture in pictures])
    assert np.abs(expected - found).max() < 1e-3
    assert torch.equal(photometric.solarize(to_float(pictures), NO_SOLARIZE), to_float(pictures))
    in_place = photometric_cpu.solarize_in_place(to_float(pictures), threshold)
    assert torch.allclose(in_place, photometric.solarize(to_float(pictures), threshold), atol=2e-7)


def blurred_on_cpu(image: torch.Tensor, sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    return photometric_cpu.Blur(sigma, max_sigma, image.shape[-1])(image.clone())


@pytest.mark.parametrize("blur", [photometric.gaussian_blur, blurred_on_cpu])
@pytest.mark.parametrize("size", [SIZE, 20, 5])
@pytest.mark.parametrize("sigma", [0.1, 0.37, 0.7, 1.0, 1.6, 2.0])
def test_blur_agrees_with_pil_up_to_the_edges(pictures, sigma, size, blur):
    pictures = pictures[:, :size, :size]
    ours = levels(blur(to_float(pictures).contiguous(), torch.full((6,), sigma), 2.0))
    for picture, found in zip(pictures, ours, strict=True):
        expected = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma))).astype(float)
        assert np.abs(expected - found).max() <= 3  # PIL rounds after each of six passes
        assert np.abs(expected - found).mean() <= 1


@pytest.mark.parametrize("max_sigma", [0.5, 2.0, 9.0])
@pytest.mark.parametrize("size", [5, 64, 65, 97])
def test_blur_on_cpus_is_box_after_box(size, max_sigma, monkeypatch):
    """With and without oneDNN: small and large images, kernels wider than the image, samples with fewer taps."""
    generator = torch.Generator().manual_seed(size)
    image = torch.rand(3, 2, size, size, generator=generator)
    sigma = max_sigma * torch.tensor([1.0, 0.6, 0.2])
    expected, weights = image.double(), photometric_operations.box_weights(sigma, max_sigma).double()
    for dim in (-1, -2):
        expected = photometric_operations._box_passes(expected, weights, dim)
    torch.testing.assert_close(blurred_on_cpu(image, sigma, max_sigma).double(), expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(blurred_on_cpu(image, sigma, max_sigma).double(), expected, rtol=0, atol=1e-6)


def test_blur_has_the_variance_it_should_and_zero_is_none():
    point = torch.zeros(4, 3, 65, 65)
    point[:, :, 32, 32] = 1
    sigma = torch.tensor([0.0, 0.5, 1.3, 2.5])
    blurred = photometric.gaussian_blur(point, sigma, 2.5)
    assert torch.equal(blurred[0], point[0])
    distance = torch.arange(65) - 32.0
    for row in range(1, 4):
        profile = blurred[row, 0].sum(0)
        assert profile.sum().item() == pytest.approx(1, abs=1e-5)
        assert (profile * distance**2).sum().sqrt().item() == pytest.approx(sigma[row].item(), rel=1e-4)


def test_all_orders_of_the_jitter(pictures):
    functions = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation]
    functions.append(reference.adjust_hue)
    amounts = (1.35, 0.65, 1.2, 0.09)
    pixels = torch.from_numpy(pictures[:1]).permute(0, 3, 1, 2).expand(24, -1, -1, -1)
    values = parameters(24, brightness=amounts[0], contrast=amounts[1], saturation=amounts[2], hue=amounts[3])
    values[:, PARAMETER_NAMES.index("order")] = torch.arange(24.0)
    stage = identity_stage()
    one_by_one, batched = stage(pixels, values), stage.batched(pixels, values, torch.float32)
    results = []
    for order in JITTER_ORDERS:
        image = to_float(pictures[:1])
        for operation in order:
            image = functions[operation](image, amounts[operation])
        results.append(image)
    expected = torch.cat(results)
    assert torch.allclose(batched, expected, atol=1.5e-3)  # four digits of torchvision's grayscale
    assert torch.allclose(one_by_one, batched, atol=2e-5)
    # Different orders must produce different images, otherwise this test proves nothing.
    apart = [(a - b).abs().max() for a, b in itertools.combinations(expected, 2)]
    assert torch.stack(apart).median() > 0.01


def test_the_whole_stage_against_pil(pictures):
    """The operations in the order of the paper, on integer levels between operations as in PIL."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    values = parameters(
        6, brightness=1.2, contrast=0.8, saturation=0.9, blur_sigma=1.1, solarize_threshold=128, flip=1, order=0
    )
    values[3:, PARAMETER_NAMES.index("grayscale")] = 1
    stage = PhotometricStage()
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    for found in (stage(pixels, values), stage.batched(pixels, values, torch.float32)):
        for row, picture in enumerate(pictures):
            image = Image.fromarray(picture)
            image = ImageEnhance.Brightness(image).enhance(1.2)
            image = ImageEnhance.Contrast(image).enhance(0.8)
            image = ImageEnhance.Color(image).enhance(0.9)
            if row >= 3:
                image = image.convert("L").convert("RGB")
            image = image.filter(ImageFilter.GaussianBlur(1.1))
            image = ImageOps.mirror(ImageOps.solarize(image, 128))
            back = found[row].permute(1, 2, 0).numpy() * std + mean
            assert np.abs(back * 255 - np.asarray(image)).max() <= 5
            assert np.abs(back * 255 - np.asarray(image)).mean() <= 1.5


def test_neutral_parameters_only_normalize(pictures):
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    stage = PhotometricStage()
    expected = reference.normalize(pixels.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.allclose(stage(pixels, parameters(6)), expected, atol=1e-6)
    assert torch.allclose(stage.batched(pixels, parameters(6), torch.float32), expected, atol=1e-5)
    assert list(stage.parameters()) == []
    assert stage.state_dict() == {}


@pytest.mark.parametrize("view", [0, 1])
def test_batched_equals_one_by_one_on_drawn_parameters(pictures, view):
    values = draw_view(two_views()[view], 0, 0, torch.arange(48), view).parameters
    pixels = torch.from_numpy(np.concatenate([pictures] * 8)).permute(0, 3, 1, 2)
    stage = PhotometricStage()
    exact = stage(pixels, values)
    batched = stage.batched(pixels, values, torch.float32)
    apart = (exact - batched).abs()
    # A value at the threshold may fall on either side. At 128 the two sides are one level apart.
    assert apart.max() < 0.02
    assert (apart > 1e-4).float().mean() < 1e-4
    half = stage(pixels, values, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())
    assert torch.equal(stage.batched(pixels, values, torch.bfloat16), batched.bfloat16())


def random_parameters(number: int, seed: int) -> torch.Tensor:
    """Every operation on about half of the samples, with any amount."""
    generator = torch.Generator().manual_seed(seed)
    columns = {
        "order": torch.randint(0, 24, (number,), generator=generator).float(),
        "hue": torch.rand(number, generator=generator) - 0.5,
        "blur_sigma": 0.1 + 1.9 * torch.rand(number, generator=generator),
        "solarize_threshold": 255 * torch.rand(number, generator=generator),
        "rotation": torch.randint(0, 4, (number,), generator=generator).float(),
        "dropped_channel": torch.rand(number, generator=generator),
    }
    columns |= {name: 2 * torch.rand(number, generator=generator) for name in ("brightness", "contrast", "saturation")}
    columns |= {name: torch.ones(number) for name in ("grayscale", "flip", "vertical_flip")}
    neutral = dict(zip(PARAMETER_NAMES, parameters(1)[0].tolist(), strict=True))
    return torch.stack(
        [
            torch.where(torch.rand(number, generator=generator) < 0.5, columns[name], neutral[name])
            for name in PARAMETER_NAMES
        ],
        dim=1,
    )


def one_sample(pixels: torch.Tensor, row: list[float], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The stage written out for one sample (C, S, S), in float64, with the filter of the blur box by box."""
    values = dict(zip(PARAMETER_NAMES, row, strict=True))
    image = pixels[None].double() / (255 if pixels.dtype == torch.uint8 else 65535)
    for operation in JITTER_ORDERS[int(values["order"])]:
        name = ("brightness", "contrast", "saturation", "hue")[operation]
        if len(pixels) == 3 or operation < 2:
            image = getattr(photometric, f"adjust_{name}")(image, values[name])
    if values["grayscale"]:
        image = photometric.grayscale(image).expand_as(image)
    weights = photometric_operations.box_weights(torch.tensor([values["blur_sigma"]]), 2.0).double()
    for dim in (-1, -2):
        image = photometric_operations._box_passes(image, weights, dim)
    image = photometric.solarize(image, values["solarize_threshold"])
    image = image.flip(-1) if values["flip"] else image
    image = image.flip(-2) if values["vertical_flip"] else image
    image = image.rot90(int(values["rotation"]), (-2, -1))[0].clone()
    if values["dropped_channel"] > 0:
        dropped = int(values["dropped_channel"] * len(pixels))
        image[dropped] = mean[dropped]
    return (image - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize(("dtype", "size", "chunk"), [("uint8", 32, 2**18), ("uint8", 9, 5000), ("uint16", 70, 20000)])
def test_the_stage_of_cpus_is_that_of_each_sample_alone(monkeypatch, channels, dtype, size, chunk):
    """Also where chunks do not divide the batch, and for sizes with and without the blur by matrix products."""
    monkeypatch.setattr(photometric_cpu, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(size)
    largest = 256 if dtype == "uint8" else 65536
    pixels = torch.randint(0, largest, (23, channels, size, size), generator=generator).to(getattr(torch, dtype))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    values = random_parameters(23, seed=channels)
    mean, std = 0.3 + 0.3 * torch.rand(2, channels, generator=generator)
    before = pixels.clone(), values.clone()
    found = PhotometricStage(mean.tolist(), std.tolist(), optional_operations=True)(pixels, values)
    assert torch.equal(pixels, before[0])
    assert torch.equal(values, before[1])
    assert found.is_contiguous()
    expected = torch.stack([one_sample(*sample, mean, std) for sample in zip(pixels, values.tolist(), strict=True)])
    apart = (found - expected).abs()
    # A value at the threshold of solarize may fall on either side.
    assert (apart > 2e-5).float().mean() < 1e-4


def test_a_sample_does_not_depend_on_its_batch(pictures):
    values = draw_view(two_views()[0], 0, 0, torch.arange(6), 0).parameters
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    stage = PhotometricStage()
    for run in (stage, lambda *arguments: stage.batched(*arguments, torch.float32)):
        whole, alone = run(pixels, values), run(pixels[2:3], values[2:3])
        assert torch.allclose(whole[2:3], alone, atol=1e-6)


@pytest.mark.slow
def test_the_batched_stage_is_one_graph_without_data_dependent_shapes(pictures):
    values = draw_view(two_views()[1], 0, 0, torch.arange(6), 1).parameters
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    stage = PhotometricStage()
    # fullgraph raises an error for a graph break; the "eager" backend needs no compiler.
    compiled = torch.compile(stage, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(pixels, values), stage.batched(pixels, values, torch.float32), atol=1e-6)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shift_and_add_is_a_convolution(dim, memory_format):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 20, 24, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    kernel = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    added = photometric_operations._shift_and_add(image, kernel, dim)
    taps = kernel[:, None, :, None] if dim == -2 else kernel[:, None, None, :]
    expected = [F.conv2d(sample[:, None], tap[None])[:, 0] for sample, tap in zip(image, taps, strict=True)]
    torch.testing.assert_close(added, torch.stack(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_the_stage_that_gpus_compile(pictures):
    values = draw_view(two_views()[0], 0, 0, torch.arange(6), 0).parameters
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    stage = PhotometricStage()
    expected = stage(pixels, values)
    compiled = torch.compile(stage, fullgraph=True, dynamic=False, backend="aot_eager")
    apart = (compiled(pixels, values) - expected).abs()
    assert apart.max() < 0.02
    assert (apart > 1e-4).float().mean() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same(pictures):
    values = draw_view(two_views()[0], 0, 0, torch.arange(6), 0).parameters
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    stage = PhotometricStage()
    found = stage.cuda()(pixels.cuda(), values.cuda()).cpu()
    assert torch.allclose(found, PhotometricStage()(pixels, values), atol=1e-3)
