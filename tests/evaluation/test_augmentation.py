"""RandAugment and the mixing of batches against what their papers say."""

import math

import pytest
import torch
from torchvision.transforms import v2

from mocov3_hf.data.labelled import TrainingTransform
from mocov3_hf.evaluation.augmentation import RandAugment, batch_mixing
from mocov3_hf.evaluation.encoder import ProcessorTransform
from mocov3_hf.evaluation.training_images import training_transform
from mocov3_hf.processing import build_image_processor


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_magnitudes_are_normal_around_the_mean_and_cut_off():
    torch.manual_seed(0)
    drawn = torch.tensor([RandAugment(magnitude=5.0, std=0.5).draw_bin() for _ in range(4000)]) / 10
    assert drawn.mean().item() == pytest.approx(5.0, abs=0.05)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.05)
    high = [RandAugment(magnitude=9.0, std=5.0).draw_bin() for _ in range(200)]
    assert min(high) >= 0
    assert max(high) == 100
    assert {RandAugment(magnitude=9.0, std=0.0).draw_bin() for _ in range(5)} == {90}


@pytest.mark.parametrize("magnitude", [0.0, 3.0, 9.0, 10.0])
def test_without_deviation_it_is_torchvisions(image, magnitude):
    own = RandAugment(num_ops=1, magnitude=magnitude, std=0.0, fill=(1, 2, 3))
    torchvisions = v2.RandAugment(
        1, int(magnitude), num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=[1, 2, 3]
    )
    for seed in range(40):
        torch.manual_seed(seed)
        torch.rand(()), torch.randn(())  # whether to apply it, and the magnitude
        expected = torchvisions(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(own(image), expected, rtol=0, atol=0)


def test_strength_increases_with_the_magnitude(image):
    """The mean change over all operations, which draw alike at every magnitude."""

    def change(magnitude):
        total = 0.0
        for seed in range(200):
            torch.manual_seed(seed)
            total += (RandAugment(1, magnitude, 0.0)(image).float() - image.float()).abs().mean().item()
        return total

    changes = [change(magnitude) for magnitude in (1.0, 4.0, 7.0, 10.0)]
    assert changes == sorted(changes)
    assert changes[-1] > 1.2 * changes[0]


def test_operations_are_left_out_by_probability(image):
    assert torch.equal(RandAugment(2, 9.0, 0.5, probability=0.0)(image), image)
    assert torch.equal(RandAugment(0)(image), image)
    torch.manual_seed(0)
    kept = sum(torch.equal(RandAugment(1, 9.0, 0.5, probability=0.5)(image), image) for _ in range(400))
    # One of torchvision's 14 operations is the identity.
    assert kept / 400 == pytest.approx(0.5 + 0.5 / 14, abs=0.08)


@pytest.mark.parametrize(
    "values", [{"num_ops": -1}, {"magnitude": 11.0}, {"std": -1.0}, {"probability": 1.5}, {"magnitude": math.nan}]
)
def test_bad_values_are_one_line(values):
    with pytest.raises(ValueError, match=r"RandAugment needs .* got") as error:
        RandAugment(**values)
    assert "\n" not in str(error.value)


def test_training_sees_crop_operations_normalisation_and_erasing_in_this_order(image):
    transform = ProcessorTransform(build_image_processor(32, "bicubic"))
    whole = training_transform(transform, (0.3, 1.0), RandAugment(2), 0.25)
    crop, rand_augment, _, normalise, erasing = whole.transforms
    assert crop == TrainingTransform(32, (0.3, 1.0), interpolation="bicubic", mean=None, std=None)
    assert rand_augment.fill == (124, 116, 104)
    assert list(normalise.mean) == [0.485, 0.456, 0.406]
    assert (erasing.p, erasing.value) == (0.25, None)
    torch.manual_seed(0)
    seen = torch.stack([training_transform(transform, (1.0, 1.0), None, 1.0)(image) for _ in range(50)])
    torch.manual_seed(0)
    erased = seen[:, 0].flatten(1)
    plain = ProcessorTransform(build_image_processor(32))(image)
    assert seen.shape == (50, 3, 32, 32)
    # Noise of deviation 1 reaches values that no pixel has.
    assert erased.max() > plain[0].max()
    bare = training_transform(transform, (0.3, 1.0))
    assert bare == TrainingTransform(32, (0.3, 1.0), interpolation="bicubic")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def test_mixup_mixes_images_and_labels_by_the_same_share(batch):
    images, labels = batch
    torch.manual_seed(1)
    mixed, targets = batch_mixing(0.8, 0.0, 5)(images, labels)
    torch.manual_seed(1)
    share = torch._sample_dirichlet(torch.tensor([0.8, 0.8])).tolist()[0]
    partner = [5, 0, 1, 2, 3, 4]
    for row in range(6):
        torch.testing.assert_close(mixed[row], share * images[row] + (1 - share) * images[partner[row]])
        expected = torch.zeros(5)
        expected[labels[row]] += share
        expected[labels[partner[row]]] += 1 - share
        torch.testing.assert_close(targets[row], expected)


def test_cutmix_weighs_labels_by_the_area_that_was_pasted(batch):
    images, labels = batch
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = batch_mixing(0.0, 1.0, 5)(images, labels)
        pasted = (mixed != images).all(dim=1)  # (B, H, W)
        share = 1 - pasted[0].float().mean().item()
        assert torch.equal(pasted[0], pasted[3]), "one rectangle for the whole batch"
        assert torch.equal(mixed[1][:, pasted[1]], images[0][:, pasted[1]])
        for row in range(6):
            expected = torch.zeros(5)
            expected[labels[row]] += share
            expected[labels[row - 1]] += 1 - share
            torch.testing.assert_close(targets[row], expected)


def test_a_fair_coin_chooses_between_both(batch):
    mixing, kinds = batch_mixing(0.8, 1.0, 5), []
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, _ = mixing(*batch)
        # CutMix leaves every pixel one of two values; Mixup changes them all.
        partner = batch[0].roll(1, 0)
        kinds.append(((mixed == batch[0]) | (mixed == partner)).all().item())
    assert sum(kinds) / 200 == pytest.approx(0.5, abs=0.1)
    assert batch_mixing(0.0, 0.0, 5) is None
