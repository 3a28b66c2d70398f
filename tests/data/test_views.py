"""Parameters of views: random generator, distributions, asymmetry, crops."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mocov3_hf.data.draws import permutation, philox, random_words, uniforms
from mocov3_hf.data.views import (
    JITTER_ORDERS,
    NO_SOLARIZE,
    PARAMETER_NAMES,
    ViewSettings,
    crop_and_resize,
    crop_box,
    crop_boxes,
    draw_view,
    shrink_factor,
    two_views,
)


MANY = 40_000


def columns(settings, view=0, seed=0, epoch=0, count=MANY):
    draws = draw_view(settings, seed, epoch, torch.arange(count), view)
    return dict(zip(PARAMETER_NAMES, draws.parameters.unbind(1), strict=True))


def share(mask) -> float:
    return mask.float().mean().item()


# Test vectors of Random123 (kat_vectors, philox4x32 10): counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_is_philox(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in words] == expected


def test_draws_depend_on_every_argument_and_on_nothing_else():
    base = random_words(1, 2, torch.arange(5), 0, 9)
    assert torch.equal(random_words(1, 2, torch.tensor([3]), 0, 9)[0], base[3])
    assert torch.equal(random_words(1, 2, torch.arange(5), 0, 4), base[:, :4])
    others = [(9, 2, 0), (1, 9, 0), (1, 2, 1), (1 + (1 << 32), 2, 0)]
    for seed, epoch, stream in others:
        assert (random_words(seed, epoch, torch.arange(5), stream, 9) == base).float().mean() < 0.1
    large = torch.tensor([0, 1 << 32, 1 << 40])
    assert len(random_words(0, 0, large, 0, 1).unique()) == 3


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(0, 0, torch.arange(MANY), 0, 6)
    assert draws.dtype == torch.float64
    assert draws.min() > 0
    assert draws.max() < 1
    deciles = torch.histc(draws.float(), 10, 0, 1) / draws.numel()
    assert torch.allclose(deciles, torch.tensor(0.1), atol=0.004)
    correlation = torch.corrcoef(torch.cat([draws, uniforms(0, 1, torch.arange(MANY), 0, 6)], dim=1).T)
    assert (correlation - torch.eye(12)).abs().max() < 0.03


def test_permutations_are_permutations_and_mix():
    order = permutation(0, 0, 10_000, 5)
    assert torch.equal(order.sort().values, torch.arange(10_000))
    assert abs(torch.corrcoef(torch.stack([order, torch.arange(10_000)]).double())[0, 1]) < 0.05
    assert not torch.equal(order, permutation(0, 1, 10_000, 5))
    assert not torch.equal(order[:100].argsort(), permutation(0, 0, 100, 5, start=100))


def test_the_two_views_are_asymmetric():
    first, second = (columns(settings, view) for view, settings in enumerate(two_views()))
    assert share(first["blur_sigma"] > 0) == 1
    assert share(second["blur_sigma"] > 0) == pytest.approx(0.1, abs=0.01)
    assert share(first["solarize_threshold"] < NO_SOLARIZE) == 0
    assert share(second["solarize_threshold"] < NO_SOLARIZE) == pytest.approx(0.2, abs=0.01)
    assert set(second["solarize_threshold"].unique().tolist()) == {128.0, NO_SOLARIZE}
    for name in ("brightness", "flip", "order", "hue"):
        assert abs(torch.corrcoef(torch.stack([first[name], second[name]]))[0, 1]) < 0.03


@pytest.mark.parametrize("view", [0, 1])
def test_parameters_are_distributed_as_the_paper_says(view):
    values = columns(two_views()[view], view)
    jittered = values["hue"] != 0
    assert share(jittered) == pytest.approx(0.8, abs=0.01)
    for name, width in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        assert torch.equal(values[name] != 1, jittered)
        spread = values[name][jittered]
        assert spread.min() >= 1 - width - 1e-6
        assert spread.max() <= 1 + width + 1e-6
        assert spread.mean().item() == pytest.approx(1, abs=0.01)
        assert spread.std().item() == pytest.approx(2 * width / math.sqrt(12), rel=0.03)
    hue = values["hue"][jittered]
    assert hue.abs().max() <= 0.1
    assert hue.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.03)
    assert torch.bincount(values["order"].long(), minlength=24).min() > 0.8 * MANY / 24
    assert len(JITTER_ORDERS) == len(set(JITTER_ORDERS)) == 24
    assert share(values["grayscale"]) == pytest.approx(0.2, abs=0.01)
    assert share(values["flip"]) == pytest.approx(0.5, abs=0.01)
    sigma = values["blur_sigma"][values["blur_sigma"] > 0]
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2.0
    assert sigma.mean().item() == pytest.approx(1.05, abs=0.04)


def test_overrides_apply_to_both_views():
    views = two_views(image_size=32, crop_scale=[0.4, 1.0], flip_probability=0.0, blur_probability=0.25)
    for view in views:
        assert (view.image_size, view.crop_scale, view.flip_probability) == (32, (0.4, 1.0), 0.0)
        assert view.blur_probability == 0.25
    assert [view.solarize_probability for view in views] == [0.0, 0.2]
    assert share(columns(views[0])["flip"]) == 0
    assert hash(views[0]) != hash(views[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.5, 1.5)},
        {"flip_probability": 1.5},
        {"hue": 0.6},
        {"brightness": -1},
        {"blur_sigma": (0, 1)},
        {"solarize_threshold": 300},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewSettings(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(375, 500), (32, 32), (1, 300), (300, 1), (1, 1), (64, 1000)])
def test_crops_are_distributed_as_torchvisions(shape):
    height, width = shape
    settings = ViewSettings()
    count = 4000
    draws = draw_view(settings, 3, 0, torch.arange(count), 0)
    boxes = crop_boxes(draws, torch.full((count,), height), torch.full((count,), width), settings)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float
    )
    extent = np.array([height, width, height, width])
    assert np.allclose(boxes.numpy().mean(0) / extent, theirs.mean(0) / extent, atol=0.02)
    assert np.allclose(boxes.numpy().std(0) / extent, theirs.std(0) / extent, atol=0.02)


def test_one_crop_at_a_time_is_the_same():
    settings = ViewSettings(crop_scale=(0.01, 1.0), crop_ratio=(0.2, 5.0))
    generator = np.random.default_rng(0)
    heights, widths = torch.tensor(generator.integers(1, 700, (2, 500)))
    draws = draw_view(settings, 0, 0, torch.arange(500), 1)
    boxes = crop_boxes(draws, heights, widths, settings).tolist()
    lists = (draws.crop_area.tolist(), draws.crop_ratio.tolist(), draws.crop_place.tolist())
    for row, box in enumerate(boxes):
        numbers = [values[row] for values in lists]
        assert list(crop_box(*numbers, int(heights[row]), int(widths[row]), settings)) == box


@pytest.mark.parametrize("box", [(0, 0, 210, 280), (31, 52, 120, 100), (5, 7, 40, 30), (0, 0, 224, 224)])
def test_resizing_agrees_with_pil_to_one_level(make_picture, box):
    top, left, height, width = box
    image = make_picture(280, 225)
    expected = Image.fromarray(image[top : top + height, left : left + width]).resize((224, 224), Image.BILINEAR)
    block = torch.full((224, 224, 3), 7, dtype=torch.uint8)
    found = block.permute(2, 0, 1)
    crop_and_resize(torch.from_numpy(image).permute(2, 0, 1), box, found)
    difference = np.abs(np.asarray(expected).astype(int) - block.numpy())
    assert difference.max() <= 1
    assert difference.mean() < 0.05
    planes = torch.empty((3, 224, 224), dtype=torch.uint8)
    crop_and_resize(torch.from_numpy(image).permute(2, 0, 1).contiguous(), box, planes)
    assert torch.equal(planes, found)


def test_images_are_only_shrunk_below_every_crop():
    assert shrink_factor([(0, 0, 900, 1000), (0, 0, 2000, 899)], 224) == 2
    assert shrink_factor([(0, 0, 900, 896)], 224) == 2
    assert shrink_factor([(0, 0, 1792, 1792)], 224) == 4
    assert shrink_factor([(0, 0, 5000, 5000), (0, 0, 300, 5000)], 224) == 1
    assert shrink_factor([(0, 0, 5000, 5000)], 32) == 8
