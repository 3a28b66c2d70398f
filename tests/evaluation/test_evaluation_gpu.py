"""Evaluation on a GPU returns the metrics of the CPU."""

import pytest
import torch

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation.features import extract_features
from mocov3_hf.evaluation.linear import fit_linear_classifier
from mocov3_hf.evaluation.sweep import sweep_linear_classifiers
from mocov3_hf.loading import load_encoder, load_processor
from mocov3_hf.metrics import collapse_summary, knn_predict, nearest_neighbors
from mocov3_hf.processing import ProcessorTransform


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (500,), generator=generator)
    features = torch.randn(6, 16, generator=generator)[labels] + torch.randn(500, 16, generator=generator)
    return features.double(), labels


def test_neighbors_and_votes(data):
    features, labels = data
    for queries, bank, device in [(features[:50].cuda(), features, None), (features[:50], features.cuda(), "cuda")]:
        similarities, rows = nearest_neighbors(queries, bank, 10, device=device, bank_chunk=64)
        expected, expected_rows = nearest_neighbors(features[:50], features, 10)
        assert similarities.device.type == "cpu"
        torch.testing.assert_close(similarities, expected)
        assert torch.equal(rows, expected_rows)
    predicted = knn_predict(features[:50].cuda(), features, labels.cuda(), [5], top=3)
    assert torch.equal(predicted[5], knn_predict(features[:50], features, labels, [5], top=3)[5])


def test_signs_of_collapse(data):
    on_gpu, on_cpu = collapse_summary(data[0].cuda()), collapse_summary(data[0])
    assert on_gpu.std == pytest.approx(on_cpu.std, rel=1e-9)
    assert on_gpu.effective_rank == pytest.approx(on_cpu.effective_rank, rel=1e-9)


def test_linear_classifiers(data):
    features, labels = data
    on_gpu, on_cpu = (fit_linear_classifier(features, labels, device=device) for device in ("cuda", "cpu"))
    torch.testing.assert_close(on_gpu.weight, on_cpu.weight, rtol=1e-3, atol=1e-4)
    sweeps = [
        sweep_linear_classifiers(features, labels, num_epochs=3, batch_size=64, device=device)
        for device in ("cuda", "cpu")
    ]
    torch.testing.assert_close(sweeps[0].weight.cpu(), sweeps[1].weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(sweeps[0].accuracies(features, labels), sweeps[1].accuracies(features, labels))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_features(model_folder, image_folder, mixed_precision):
    encoder = load_encoder(model_folder)
    images = open_labeled(str(image_folder), split="test")
    transform = ProcessorTransform(load_processor(model_folder, encoder.config))
    expected = extract_features(encoder, images, transform, progress=False)
    found = extract_features(encoder.cuda(), images, transform, mixed_precision=mixed_precision, progress=False)
    assert found.device.type == "cpu"
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999
