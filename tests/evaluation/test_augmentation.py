"""Fine-tuning augmentation: timm's published semantics, driven by torch's generator."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from mocov3_hf.data.labeled import TrainingTransform
from mocov3_hf.evaluation.augmentation import RandAugmentOptions, SeededByTorch, batch_mixing, random_erasing
from mocov3_hf.evaluation.training_images import training_transform
from mocov3_hf.processing import ProcessorTransform, build_image_processor


MEAN, BICUBIC = (0.485, 0.456, 0.406), 3


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augmented(image, options, seed=0):
    torch.manual_seed(seed)
    return v2.functional.pil_to_tensor(options.build(MEAN, BICUBIC)(v2.functional.to_pil_image(image)))


def test_the_recipe_is_timms_rand_m9_mstd05_inc1(image):
    """The published recipes say `rand-m9-mstd0.5-inc1`, with timm's default of applying half of the operations."""
    ours = RandAugmentOptions(2, 9.0, 0.5, probability=0.5).build(MEAN, BICUBIC).augmentation
    hparams = {"img_mean": (124, 116, 104), "interpolation": BICUBIC}
    timms = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    assert ours.num_layers == timms.num_layers == 2
    assert len(ours.ops) == len(timms.ops) == 15
    for ours_op, timms_op in zip(ours.ops, timms.ops, strict=True):
        names = ("name", "prob", "magnitude", "magnitude_std", "kwargs", "level_fn")
        assert [getattr(ours_op, name) for name in names] == [getattr(timms_op, name) for name in names]
        assert (ours_op.prob, ours_op.magnitude, ours_op.magnitude_std) == (0.5, 9, 0.5)
        assert ours_op.magnitude_max == pytest.approx(10, abs=1e-3)  # timm's default, but for the black image at 10
        assert ours_op.kwargs == {"fillcolor": (124, 116, 104), "resample": BICUBIC}
    increasing = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
    assert {f"{name}Increasing" for name in increasing} <= {op.name for op in ours.ops}
    pil = v2.functional.to_pil_image(image)
    for seed in range(20):
        outputs = []
        for augmentation in (ours, timms):
            torch.manual_seed(seed)
            outputs.append(SeededByTorch(augmentation)(pil).tobytes())
        assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_strength_increases_with_the_magnitude(image):
    """The mean change over many draws, which are the same at every magnitude."""

    def change(magnitude):
        options = RandAugmentOptions(1, magnitude, 0.0)
        return sum((augmented(image, options, seed).float() - image.float()).abs().mean() for seed in range(200))

    changes = [change(magnitude) for magnitude in (1.0, 4.0, 7.0, 10.0)]
    assert changes == sorted(changes)
    assert changes[-1] > 1.2 * changes[0]


def test_operations_are_skipped_by_probability(image):
    assert torch.equal(augmented(image, RandAugmentOptions(2, probability=0.0)), image)
    assert torch.equal(augmented(image, RandAugmentOptions(0)), image)
    flat = image.clone()
    flat[:, 0, 0], flat[:, 0, 1] = 0, 255  # so that only autocontrast changes nothing
    kept = sum(torch.equal(augmented(flat, RandAugmentOptions(1, probability=0.5), seed), flat) for seed in range(400))
    assert kept / 400 == pytest.approx(0.5 + 0.5 / 15, abs=0.08)


@pytest.mark.parametrize(
    "values", [{"num_ops": -1}, {"magnitude": 11.0}, {"std": -1.0}, {"probability": 1.5}, {"magnitude": math.nan}]
)
def test_bad_values_are_one_line(values):
    with pytest.raises(ValueError, match=r"RandAugment needs .* got") as error:
        RandAugmentOptions(**values)
    assert "\n" not in str(error.value)


def test_draws_depend_on_torchs_generator_alone_and_leave_the_others_as_they_were(image):
    """Also across workers and resumed runs, where `random` and NumPy are in another state."""
    transform = ProcessorTransform(build_image_processor(32, "bicubic"))
    augmentation = training_transform(transform, (0.3, 1.0), RandAugmentOptions(2), 0.5)
    mixing = batch_mixing(0.8, 1.0, 5)

    def draw(seed, others):
        random.seed(others), np.random.seed(others)
        torch.manual_seed(seed)
        images = torch.stack([augmentation(image) for _ in range(8)])
        outputs = (images.clone(), *mixing(images, torch.arange(8) % 5))
        left = random.random(), np.random.rand()
        random.seed(others), np.random.seed(others)
        assert left == (random.random(), np.random.rand())
        return outputs

    first, again, other = draw(1, 1), draw(1, 2), draw(2, 1)
    for index in range(3):
        assert torch.equal(first[index], again[index])
        assert not torch.equal(first[index], other[index])


def test_the_state_is_restored_when_an_augmentation_fails():
    def failing():
        random.random()
        raise RuntimeError("no image")

    state = random.getstate()
    with pytest.raises(RuntimeError, match="no image"):
        SeededByTorch(failing)()
    assert random.getstate() == state


def test_erased_areas_are_those_of_the_paper():
    """One rectangle of 2 to 33 % of the area with a ratio of sides of 0.3 to 3.3, in a quarter of the images."""
    torch.manual_seed(0)
    erasing, shares, pixels = random_erasing(0.25), [], []
    for _ in range(800):
        erased = erasing(torch.full((3, 64, 64), 9.0))
        inside = erased[0] != 9.0
        assert torch.equal((erased != 9.0).all(dim=0), inside)
        if inside.any():
            rows, columns = inside.any(dim=1).sum().item(), inside.any(dim=0).sum().item()
            assert inside.sum() == rows * columns, "a rectangle"
            assert 0.3 * 0.8 < rows / columns < 1 / 0.3 / 0.8
            shares.append(inside.float().mean().item())
            pixels.append(erased[:, inside].flatten())
    assert len(shares) / 800 == pytest.approx(0.25, abs=0.05)
    assert 0.015 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.35
    assert sum(shares) / len(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    noise = torch.cat(pixels)
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0.0, 1.0), abs=0.02)


def test_training_sees_crop_operations_normalization_and_erasing_in_this_order(image):
    transform = ProcessorTransform(build_image_processor(32, "bicubic"))
    whole = training_transform(transform, (0.3, 1.0), RandAugmentOptions(2), 0.25)
    crop, _, rand_augment, _, _, normalize, erasing = whole.transforms
    assert crop == TrainingTransform(32, (0.3, 1.0), interpolation="bicubic", mean=None, std=None)
    assert rand_augment.augmentation.ops[3].kwargs == {"fillcolor": (124, 116, 104), "resample": BICUBIC}
    assert list(normalize.mean) == [0.485, 0.456, 0.406]
    assert (erasing.augmentation.probability, erasing.augmentation.mode) == (0.25, "pixel")
    assert "m=9.0, mstd=0.5" in repr(whole)
    assert "RandomErasing(p=0.25, mode=pixel" in repr(whole)
    # With nothing drawn by RandAugment and no erasing, it is the plain crop.
    plain = training_transform(transform, (0.3, 1.0))
    assert plain == TrainingTransform(32, (0.3, 1.0), interpolation="bicubic")
    torch.manual_seed(0)
    expected = plain(image)
    torch.manual_seed(0)
    found = training_transform(transform, (0.3, 1.0), RandAugmentOptions(0))(image)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def mixed_by(mixing, batch, seed):
    torch.manual_seed(seed)
    return mixing(batch[0].clone(), batch[1])


def soft_labels(labels, share):
    one_hot = F.one_hot(labels, 5).float()
    return share * one_hot + (1 - share) * one_hot.flip(0)


def test_mixup_mixes_images_and_labels_by_the_same_share(batch):
    images, labels = batch
    shares = []
    for seed in range(200):
        mixed, targets = mixed_by(batch_mixing(0.8, 0.0, 5), batch, seed)
        share = targets[1, 1].item()  # image 1 of class 1 and image 4 of class 4 are partners
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
        torch.testing.assert_close(targets, soft_labels(labels, share))
        shares.append(share)
    shares = torch.tensor(shares)
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1)).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.07)
    assert shares.var().item() == pytest.approx(1 / (4 * 2.6), rel=0.2)


def test_cutmix_weighs_labels_by_the_area_that_was_pasted(batch):
    images, labels = batch
    for seed in range(20):
        mixed, targets = mixed_by(batch_mixing(0.0, 1.0, 5), batch, seed)
        pasted = (mixed != images).all(dim=1)  # (B, H, W)
        share = 1 - pasted[0].float().mean().item()
        assert torch.equal(pasted[0], pasted[3]), "one rectangle for the whole batch"
        assert torch.equal(mixed[1][:, pasted[1]], images[4][:, pasted[1]])
        torch.testing.assert_close(targets, soft_labels(labels, share))


def test_mixup_and_cutmix_are_equally_likely(batch):
    mixing, kinds = batch_mixing(0.8, 1.0, 5), []
    for seed in range(200):
        mixed, _ = mixed_by(mixing, batch, seed)
        # CutMix leaves every pixel one of two values; Mixup changes them all.
        kinds.append(((mixed == batch[0]) | (mixed == batch[0].flip(0))).all().item())
    assert sum(kinds) / 200 == pytest.approx(0.5, abs=0.1)
    assert batch_mixing(0.0, 0.0, 5) is None


def test_smoothing_in_the_loss_is_timms_smoothing_of_the_labels(batch):
    _, targets = mixed_by(batch_mixing(0.8, 1.0, 5), batch, 3)
    smoothing = SeededByTorch(Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5))
    _, smoothed = mixed_by(smoothing, batch, 3)
    torch.testing.assert_close(smoothed, 0.9 * targets + 0.1 / 5)
    torch.testing.assert_close(smoothed.sum(dim=1), torch.ones(6))
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    timms_loss = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1), timms_loss)
