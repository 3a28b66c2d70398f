"""Signs of collapse against closed forms and plain decompositions."""

import math

import pytest
import torch

from mocov3_hf.metrics import collapse_summary, effective_rank, normalized_std


def gaussian(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_std_is_that_of_numpy_on_normalized_rows():
    features = gaussian(500, 12) + 2
    rows = features.numpy() / (features.numpy() ** 2).sum(axis=1, keepdims=True) ** 0.5
    torch.testing.assert_close(normalized_std(features), torch.from_numpy(rows.std(axis=0)), rtol=1e-12, atol=0)


def test_even_features_have_one_over_root_d():
    summary = collapse_summary(gaussian(20000, 32).float())
    assert summary.std == pytest.approx(1 / math.sqrt(32), rel=0.01)
    assert summary.std_ratio == pytest.approx(1, rel=0.01)
    assert summary.effective_rank == pytest.approx(32, rel=0.01)
    assert (summary.dimensions, summary.num_features, summary.is_collapsed) == (32, 20000, False)


def test_one_vector_for_everything_is_collapse():
    summary = collapse_summary(gaussian(1, 64).expand(300, 64) * torch.linspace(1, 5, 300)[:, None])
    assert summary.is_collapsed
    assert summary.std < 1e-12
    assert summary.effective_rank == pytest.approx(1, abs=1e-9)


def test_offset_of_float32_features_does_not_drown_their_spread():
    """E[x²] - E[x]² in float32 has nothing left at this offset."""
    features = (1000 + gaussian(400, 16)).float()
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    expected = (rows - rows.mean(0)).square().mean(0).sqrt()
    torch.testing.assert_close(normalized_std(features), expected, rtol=1e-9, atol=0)
    assert expected.max() < 1e-3


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (5000, 17), (2, 2)])
def test_effective_rank_is_that_of_the_whole_decomposition(shape):
    features = gaussian(*shape) @ torch.diag(torch.linspace(0.01, 3, shape[1], dtype=torch.float64))
    rows = features / features.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(rows)
    entropy = -sum(p * math.log(p) for p in (values / values.sum()).tolist() if p > 0)
    assert effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-10)


@pytest.mark.parametrize("directions", [1, 3, 10])
def test_effective_rank_counts_directions(directions):
    """Rows along orthogonal directions, equally often: all singular values equal."""
    basis = torch.linalg.qr(gaussian(20, 20)).Q[:directions]
    assert effective_rank(basis.repeat(30, 1)) == pytest.approx(directions, rel=1e-9)


def test_rank_does_not_depend_on_rotation_or_order():
    features = gaussian(300, 10) + 1
    rotation = torch.linalg.qr(gaussian(10, 10, seed=1)).Q
    assert effective_rank(features.flip(0) @ rotation) == pytest.approx(effective_rank(features), rel=1e-10)


def test_zeros_have_rank_one_and_are_collapsed():
    summary = collapse_summary(torch.zeros(10, 4))
    assert summary.effective_rank == 1
    assert summary.is_collapsed


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 4), "features of at least 2 images"),
        (torch.zeros(4), "shape"),
        (torch.zeros(4, 4, dtype=torch.int64), "floating point"),
        (torch.full((4, 4), math.inf), "4 of 4 rows of features contain NaN or infinity"),
    ],
)
def test_bad_input_is_one_line(features, message):
    for function in (normalized_std, effective_rank, collapse_summary):
        with pytest.raises(ValueError, match=message):
            function(features)
