"""Components, attention, neighbors and the confusion matrix against slow derivations."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from mocov3_hf.options import parse
from mocov3_hf.report.confusion import labels_for_head, most_confused, worst_classes, worst_table
from mocov3_hf.report.image_sections import (
    chance_of_agreement,
    component_colors,
    embed,
    heat_map,
    medoid,
    most_frequent,
    nearest_others,
    over_image,
)
from mocov3_hf.report.images import Viewer, choose_rows, cls_attention, open_samples, patch_maps
from mocov3_hf.report.write import COMMAND
from mocov3_hf.run_folder import read_run_folder
from tests.factories import AWKWARD_NAMES, save_classifier


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_colors_are_the_principal_components_of_all_patches():
    maps = (random(7, 3, 4, 6) @ random(6, 6, seed=1) + 50.0).numpy()
    colors, explained = component_colors(maps)
    patches = maps.reshape(-1, 6)
    mean = patches.mean(axis=0)
    covariance = sum(np.outer(patch - mean, patch - mean) for patch in patches) / len(patches)
    variances, vectors = np.linalg.eigh(covariance)
    for component in range(3):
        variance, direction = variances[-1 - component], vectors[:, -1 - component]
        expected = [0.5 + (patch - mean) @ direction / (4 * math.sqrt(variance)) for patch in patches]
        found = colors[..., component].ravel()
        sign = np.sign((found - 0.5) @ (np.array(expected) - 0.5))  # a direction is known up to its sign
        np.testing.assert_allclose(found, np.clip(0.5 + sign * (np.array(expected) - 0.5), 0, 1), atol=1e-9)
    assert explained == pytest.approx(variances[-3:].sum() / variances.sum())


def test_colors_are_gray_without_variance():
    colors, explained = component_colors(np.ones((2, 2, 2, 2), dtype=np.float32))
    np.testing.assert_array_equal(colors, np.full((2, 2, 2, 3), 0.5))
    assert explained == 0
    one_direction = np.zeros((3, 2, 2, 5))
    one_direction[..., 1] = random(3, 2, 2)
    colors, explained = component_colors(one_direction)
    assert colors[..., 0].std() > 0.1
    np.testing.assert_array_equal(colors[..., 1:], 0.5)
    assert explained == pytest.approx(1)


def test_attention_is_softmax_of_query_and_keys(run, labeled):
    samples = open_samples(str(labeled), num_images=3)
    viewer = Viewer(read_run_folder(run))
    attention = viewer.attention(samples, 2)
    assert attention.shape == (2, 2, 4, 4)
    # Derived again from the weights: the input of the last block, its norm, and each head separately.
    model = AutoModel.from_pretrained(run).eval()
    layer = model.backbone.encoder.layer[-1]
    with torch.no_grad():
        batch = viewer.preprocess(samples, range(2))
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


def test_attention_without_a_cls_token_is_refused():
    with pytest.raises(ValueError, match="there is no CLS token"):
        cls_attention(torch.zeros(1, 2, 16, 16), (4, 4))


def test_patches_are_the_last_tokens_row_by_row(run):
    config = AutoModel.from_pretrained(run).config.backbone_config
    tokens = torch.arange(17.0).view(1, 17, 1).expand(1, 17, 32)
    maps = patch_maps(tokens, torch.zeros(1, 3, 32, 32), config)
    assert maps[0, :, :, 0].tolist() == [[1 + 4 * row + column for column in range(4)] for row in range(4)]
    feature_map = random(2, 5, 3, 4)
    assert patch_maps(feature_map, None, config)[1, 2, 0, 4] == pytest.approx(float(feature_map[1, 4, 2, 0]))


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_features_are_those_of_the_model_and_logits_of_the_head(backbone, classifier, labeled, tmp_path):
    path = classifier if backbone == "vit" else save_classifier(tmp_path / "resnet", "resnet", AWKWARD_NAMES)
    samples = open_samples(str(labeled), num_images=5)
    viewer = Viewer(read_run_folder(path))
    seen = viewer.look(samples, batch_size=2)
    with torch.no_grad():
        batch = viewer.preprocess(samples, range(5))
        features = viewer.model.mocov3(batch).pooler_output
    torch.testing.assert_close(seen.features, features)
    torch.testing.assert_close(seen.logits, viewer.model.classifier(features).detach())


def test_views_are_what_the_model_sees(run, labeled):
    samples = open_samples(str(labeled), num_images=2)
    viewer = Viewer(read_run_folder(run))
    view = viewer.view(viewer.preprocess(samples, range(1))[0])
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
    color = np.argmax(view.reshape(-1, 3).mean(axis=0))
    assert color == samples.labels[0]  # red, green or blue


def test_weights_that_are_missing_are_refused(run):
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match="lacks 16 weights"):
        Viewer(read_run_folder(run))


def test_neighbors_match_a_loop():
    features = random(12, 5)
    similarities, rows = nearest_others(features, 4)
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


def test_an_image_is_never_its_own_neighbor_even_among_duplicates():
    _, rows = nearest_others(torch.ones(9, 3), 2)
    assert all(image not in found for image, found in enumerate(rows.tolist()))
    assert rows.shape == (9, 2)


def test_chance_of_agreement_matches_a_loop():
    labels = np.array([0, 0, 1, 1, 1, 2])
    pairs = [labels[one] == labels[other] for one in range(6) for other in range(6) if one != other]
    assert chance_of_agreement(labels) == pytest.approx(sum(pairs) / len(pairs))
    assert chance_of_agreement(np.arange(4)) == 0


def test_map_keeps_groups_apart_and_is_the_same_twice():
    features = torch.cat([random(20, 8) * 0.05 + center for center in random(3, 8, seed=3)]).float()
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


def test_worst_classes_and_what_they_are_confused_with():
    matrix = np.array([[3, 1, 0, 0], [2, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 4]])
    assert worst_classes(matrix) == [1, 0, 3]
    assert [most_confused(matrix, label) for label in (1, 0, 3)] == [0, 1, 3]
    table = worst_table(matrix, ["a", "b", "c", "d"])
    assert table.rows == [["b", "4", "0.0 %", "a (2×)"], ["a", "4", "75.0 %", "b (1×)"], ["d", "4", "100.0 %", ""]]
    more_images_first = np.array([[1, 1], [3, 3]])
    assert worst_classes(more_images_first) == [1, 0]


def test_labels_are_matched_by_name_then_by_number():
    labels = np.array([0, 1, 1])
    assert labels_for_head(labels, ["a", "b"], ["b", "c", "a"]).tolist() == [2, 0, 0]
    assert labels_for_head(labels, ["a", "b"], ["LABEL_0", "LABEL_1"]).tolist() == [0, 1, 1]
    assert labels_for_head(labels, ["0", "1"], ["x", "y"]).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="does not have 1 of the 2 classes of the dataset"):
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


def test_unlabeled_images(unlabeled, labeled):
    samples = open_samples(str(unlabeled), num_images=100)
    assert len(samples) == 12
    assert samples.labels is None
    assert "The images have no labels" in samples.why_unlabeled
    assert samples.name_of(0) == f"row {samples.rows[0]}"
    with pytest.raises(ValueError, match="'kind' does not exist"):
        open_samples(str(labeled), label_column="kind")
    with pytest.raises(ValueError, match="at least 2"):
        open_samples(str(labeled), num_images=1)


def test_several_label_columns(tmp_path):
    rows = [f"{number}.png,{number % 2},{number // 2}" for number in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,ant,bee", *rows]))
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    options = parse(COMMAND, ["folder", "--dataset_name", str(tmp_path), "--label_column", "ant", "bee"])[1]
    samples = open_samples(options.dataset_name, split="train", label_column=options.label_column)
    assert (len(samples), samples.labels) == (4, None)
    assert "multi label classification" in samples.why_unlabeled
    text = [f"{number}.png,ant|bee" for number in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *text, "4.png,"]))
    Image.new("RGB", (8, 8)).save(tmp_path / "4.png")
    samples = open_samples(str(tmp_path), split="train", problem_type="multi_label_classification")
    assert len(samples) == 5


def test_heat_maps_are_brightest_at_the_largest_value():
    values = np.array([[0.0, 0.1], [0.2, 0.4]])
    brightness = heat_map(values).astype(int).sum(axis=2)
    assert brightness[0, 0] < 20
    assert (np.argsort(brightness.ravel()) == [0, 1, 2, 3]).all()
    assert heat_map(np.zeros((2, 2))).max() < 20
    over = over_image(values, np.full((8, 8, 3), 100, dtype=np.uint8)).astype(int).sum(axis=2)
    assert np.unravel_index(over.argmax(), over.shape) == (7, 7)
    assert over[0, 0] == pytest.approx(0.35 * 300, abs=20)
