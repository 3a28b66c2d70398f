"""Components, attention, neighbours and confusions against slow derivations."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from transformers import AutoModel

from mocov3_hf.report.components import PatchStatistics, component_colors
from mocov3_hf.report.confusion import confusion_matrix, labels_for_head, worst_classes
from mocov3_hf.report.encoding import Viewer, cls_attention, patch_maps
from mocov3_hf.report.folder import ReportError, read_folder
from mocov3_hf.report.image_sections import chance_of_agreement, medoid, most_frequent
from mocov3_hf.report.neighbors import agreement, embed, neighbors_of_each
from mocov3_hf.report.pictures import heat_map, over_image
from mocov3_hf.report.samples import choose_rows, open_samples
from tests.factories import AWKWARD_NAMES, save_classifier


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_components_are_those_of_all_patches_together():
    maps = random(7, 3, 4, 6) @ random(6, 6, seed=1) + 50.0
    statistics = PatchStatistics(6)
    for batch in maps.split(3):
        statistics.add(batch)
    patches = maps.reshape(-1, 6).numpy()
    mean = patches.mean(axis=0)
    covariance = sum(np.outer(patch - mean, patch - mean) for patch in patches) / len(patches)
    variances, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(statistics.mean.numpy(), mean, rtol=1e-12)
    directions, found = statistics.components(3)
    np.testing.assert_allclose(found.numpy(), variances[::-1][:3], rtol=1e-9)
    for direction, expected in zip(directions.numpy(), vectors.T[::-1], strict=False):
        assert abs(direction @ expected) == pytest.approx(1.0, abs=1e-9)
        assert direction[np.abs(direction).argmax()] > 0
    assert statistics.explained(3) == pytest.approx(variances[::-1][:3].sum() / variances.sum())


def test_component_colors():
    maps = random(5, 2, 2, 8)
    statistics = PatchStatistics(8)
    statistics.add(maps)
    colors = component_colors(maps, statistics)
    directions, variances = statistics.components(3)
    for picture, row, column in ((0, 0, 0), (4, 1, 0)):
        for component in range(3):
            along = float((maps[picture, row, column] - statistics.mean) @ directions[component])
            expected = min(max(0.5 + along / (4 * math.sqrt(variances[component])), 0), 1)
            assert colors[picture, row, column, component] == pytest.approx(expected, abs=1e-6)
    mean = component_colors(statistics.mean.view(1, 1, 1, -1), statistics)
    np.testing.assert_allclose(mean.numpy(), 0.5)


def test_colors_of_features_without_variance_are_grey():
    statistics = PatchStatistics(2)
    statistics.add(torch.ones(2, 2, 2, 2))
    np.testing.assert_array_equal(component_colors(torch.ones(1, 2, 2, 2), statistics).numpy(), 0.5)
    assert statistics.explained() == 0


def test_attention_is_softmax_of_query_and_keys(run, labelled):
    samples = open_samples(str(labelled), num_images=3)
    viewer = Viewer(read_folder(run))
    attention = viewer.attention(samples, 2)
    assert attention.shape == (2, 2, 4, 4)
    # Once more from the weights: the input of the last block, its norm, and every head by itself.
    model = AutoModel.from_pretrained(run).eval()
    layer = model.backbone.encoder.layer[-1]
    with torch.no_grad():
        batch = torch.stack([viewer.preprocess(samples.decode(index)) for index in range(2)])
        before = model(batch, output_hidden_states=True).hidden_states[-2]
        states = layer.norm1(before)
        query, key = layer.attention.q_proj(states[:, 0]), layer.attention.k_proj(states)
    for picture in range(2):
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            scores = [float(query[picture, part] @ one[part]) / 4 for one in key[picture]]
            total = sum(map(math.exp, scores))
            for row in range(4):
                for column in range(4):
                    expected = math.exp(scores[1 + 4 * row + column]) / total
                    assert attention[picture, head, row, column] == pytest.approx(expected, rel=1e-4)


def test_attention_without_a_token_of_its_own_is_refused():
    with pytest.raises(ValueError, match="without a CLS token"):
        cls_attention(torch.zeros(1, 2, 16, 16), (4, 4))


def test_patches_are_the_last_tokens_row_by_row(run):
    config = AutoModel.from_pretrained(run).config.backbone_config
    tokens = torch.arange(17.0).view(1, 17, 1).expand(1, 17, 32)
    maps = patch_maps(tokens, torch.zeros(1, 3, 32, 32), config)
    assert maps[0, :, :, 0].tolist() == [[1 + 4 * row + column for column in range(4)] for row in range(4)]
    feature_map = random(2, 5, 3, 4)
    assert patch_maps(feature_map, None, config)[1, 2, 0, 4] == pytest.approx(float(feature_map[1, 4, 2, 0]))


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_features_are_those_of_the_model_and_logits_of_the_head(backbone, classifier, labelled, tmp_path):
    path = classifier if backbone == "vit" else save_classifier(tmp_path / "resnet", "resnet", AWKWARD_NAMES)
    samples = open_samples(str(labelled), num_images=5)
    viewer = Viewer(read_folder(path))
    seen = viewer.look(samples, batch_size=2)
    with torch.no_grad():
        batch = torch.stack([viewer.preprocess(samples.decode(index)) for index in range(5)])
        features = viewer.model.mocov3(batch).pooler_output
    torch.testing.assert_close(seen.features, features)
    torch.testing.assert_close(seen.logits, viewer.model.classifier(features).detach())
    assert seen.patches.count == 5 * 16


def test_views_are_what_the_model_sees(run, labelled):
    samples = open_samples(str(labelled), num_images=2)
    viewer = Viewer(read_folder(run))
    view = viewer.view(viewer.preprocess(samples.decode(0)))
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
    colour = np.argmax(view.reshape(-1, 3).mean(axis=0))
    assert colour == samples.labels[0]  # red, green or blue


def test_weights_that_are_missing_are_refused(run):
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ReportError, match="lacks 16 weights"):
        Viewer(read_folder(run))


def test_neighbors_are_those_of_a_loop():
    features = random(12, 5)
    similarities, rows = neighbors_of_each(features, 4)
    for image in range(12):
        cosines = []
        for other in range(12):
            if other != image:
                one, two = features[image].tolist(), features[other].tolist()
                product = sum(a * b for a, b in zip(one, two, strict=True))
                cosines.append((product / math.hypot(*one) / math.hypot(*two), other))
        expected = sorted(cosines, reverse=True)[:4]
        assert rows[image].tolist() == [other for _, other in expected]
        assert similarities[image].tolist() == pytest.approx([cosine for cosine, _ in expected])


def test_an_image_is_never_its_own_neighbour_even_among_twins():
    _, rows = neighbors_of_each(torch.ones(9, 3), 2)
    assert all(image not in found for image, found in enumerate(rows.tolist()))
    assert rows.shape == (9, 2)


def test_agreement_and_its_chance_are_those_of_a_loop():
    labels = np.array([0, 0, 1, 1, 1, 2])
    rows = np.array([[1, 2], [0, 3], [3, 4], [2, 0], [2, 3], [0, 1]])
    hits = [labels[other] == labels[image] for image in range(6) for other in rows[image]]
    assert agreement(labels, rows) == pytest.approx(sum(hits) / 12)
    pairs = [labels[one] == labels[other] for one in range(6) for other in range(6) if one != other]
    assert chance_of_agreement(labels) == pytest.approx(sum(pairs) / len(pairs))


def test_map_keeps_groups_apart_and_is_the_same_twice():
    features = torch.cat([random(20, 8) * 0.05 + centre for centre in random(3, 8, seed=3)]).float()
    points = embed(features, seed=0)
    assert points.shape == (60, 2)
    np.testing.assert_array_equal(points, embed(features, seed=0))
    groups = points.reshape(3, 20, 2)
    for number, group in enumerate(groups):
        inside = np.linalg.norm(group[:, None] - group[None], axis=2).max()
        for other in groups[number + 1 :]:
            assert np.linalg.norm(group.mean(axis=0) - other.mean(axis=0)) > inside


def test_medoid_and_most_frequent():
    assert medoid(np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [50.0, 0.0]])).tolist() in ([1.0, 0.0], [2.0, 0.0])
    assert most_frequent(np.array([3, 3, 1, 2, 2, 0]), 2) == [2, 3]
    assert most_frequent(np.array([3, 1, 2]), 2) == [1, 2]
    assert most_frequent(np.array([3, 3, 1, 2, 2, 2]), 5, at_least=3) == [2]


def test_confusion_matrix_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 6, 200), draw.integers(0, 7, 200)
    expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(8))
    np.testing.assert_array_equal(confusion_matrix(labels, predicted, 8), expected)


def test_worst_classes():
    found = worst_classes(np.array([[3, 1, 0, 0], [2, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 4]]))
    assert [one.label for one in found] == [1, 0, 3]
    assert [(one.images, one.accuracy, one.taken_for, one.times) for one in found] == [
        (4, 0.0, 0, 2),
        (4, 0.75, 1, 1),
        (4, 1.0, None, 0),
    ]


def test_labels_are_matched_by_name_then_by_number():
    labels = np.array([0, 1, 1])
    assert labels_for_head(labels, ["a", "b"], ["b", "c", "a"]).tolist() == [2, 0, 0]
    assert labels_for_head(labels, ["a", "b"], ["LABEL_0", "LABEL_1"]).tolist() == [0, 1, 1]
    assert labels_for_head(labels, ["0", "1"], ["x", "y"]).tolist() == [0, 1, 1]
    with pytest.raises(ReportError, match="1 of the 2 classes of the data set are not among the 2"):
        labels_for_head(labels, ["a", "z"], ["a", "b"])


def test_rows_are_spread_over_the_classes():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    rows = choose_rows(73, labels, 12, seed=0)
    assert len(set(rows)) == 12
    assert np.bincount(labels[rows]).tolist() == [5, 3, 4] or np.bincount(labels[rows]).tolist() == [4, 3, 5]
    for turn in range(3):
        assert sorted(labels[rows[3 * turn : 3 * turn + 3]]) == [0, 1, 2]
    np.testing.assert_array_equal(rows, choose_rows(73, labels, 12, seed=0))
    assert sorted(choose_rows(73, labels, 100, seed=1)) == list(range(73))
    assert len(set(choose_rows(73, None, 12, seed=0))) == 12


def test_unlabelled_images(unlabelled, labelled):
    samples = open_samples(str(unlabelled), num_images=100)
    assert len(samples) == 12
    assert samples.labels is None
    assert "taken as unlabelled" in samples.why_unlabelled
    assert samples.name_of(0) == f"row {samples.rows[0]}"
    with pytest.raises(ValueError, match="'kind' does not exist"):
        open_samples(str(labelled), label_column="kind")
    with pytest.raises(ReportError, match="at least 2"):
        open_samples(str(labelled), num_images=1)


def test_heat_maps_are_brightest_at_the_largest_value():
    values = np.array([[0.0, 0.1], [0.2, 0.4]])
    brightness = heat_map(values).astype(int).sum(axis=2)
    assert brightness[0, 0] < 20
    assert (np.argsort(brightness.ravel()) == [0, 1, 2, 3]).all()
    assert heat_map(np.zeros((2, 2))).max() < 20
    over = over_image(values, np.full((8, 8, 3), 100, dtype=np.uint8)).astype(int).sum(axis=2)
    assert np.unravel_index(over.argmax(), over.shape) == (7, 7)
    assert over[0, 0] == pytest.approx(0.35 * 300, abs=20)
