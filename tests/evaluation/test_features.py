"""One pass over a split: every image once, in order, on any number of processes, and kept on disk."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3Model
from mocov3_hf.data.labeled import EvaluationTransform, open_labeled
from mocov3_hf.evaluation import feature_cache
from mocov3_hf.evaluation import features as features_module
from mocov3_hf.evaluation.feature_cache import data_fingerprint
from mocov3_hf.evaluation.features import extract_features, labeled_features, select_features
from mocov3_hf.loading import base_encoder, load_encoder, load_processor
from mocov3_hf.processing import ProcessorTransform, build_image_processor
from tests.factories import VIT, pretraining_model, write_images
from tests.fork_server import ranks


WORKER = Path(__file__).parent / "features_worker.py"


@pytest.fixture(scope="module")
def images(image_folder):
    return open_labeled(str(image_folder), split="train")


@pytest.fixture
def encoder(model_folder):
    return load_encoder(model_folder)


@pytest.fixture
def transform(model_folder, encoder):
    return ProcessorTransform(load_processor(model_folder, encoder.config))


@pytest.fixture
def no_pass(monkeypatch):
    """From here on a pass over the images is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("another pass over the images")

    monkeypatch.setattr(features_module, "extract_features", refuse)


def test_features_are_those_of_image_after_image(images, encoder, transform):
    found = extract_features(encoder, images, transform, batch_size=7, progress=False)
    with torch.no_grad():
        expected = torch.cat(
            [encoder(transform(images.decode(row))[None]).pooler_output for row in range(len(images))]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (45, 32)
    assert found.dtype == torch.float32
    assert not torch.allclose(found[:15].mean(0), found[15:30].mean(0), atol=1e-2), "the classes differ"


def test_workers_and_labels(images, encoder, transform):
    found = labeled_features(encoder, images, transform, batch_size=8, progress=False)
    assert torch.equal(found.labels, torch.tensor([0] * 15 + [1] * 15 + [2] * 15))
    assert (found.class_names, found.num_classes, len(found)) == (["ant", "bee", "cow"], 3, 45)
    with_workers = extract_features(encoder, images, transform, batch_size=8, num_workers=2, progress=False)
    assert torch.equal(with_workers, found.features)


def test_default_transform_is_that_of_the_model(images, encoder):
    found = labeled_features(encoder, images, progress=False)
    expected = ProcessorTransform(build_image_processor(32))
    assert torch.equal(found.features, extract_features(encoder, images, expected, progress=False))


def test_modes_gradients_and_statistics_are_left_alone(images, transform, model_folder):
    model = MoCoV3ForPreTraining.from_pretrained(model_folder).train()
    model.mocov3.backbone.encoder.eval()  # frozen inside a training model
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = extract_features(model, images, transform, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not found.requires_grad
    assert torch.equal(found, extract_features(base_encoder(model).eval(), images, transform, progress=False))


def test_layers_hold_all_choices_of_features(images, transform):
    torch.manual_seed(0)
    config = MoCoV3Config(backbone_config=VIT | {"num_hidden_layers": 5}, head_hidden_size=16, projection_dim=8)
    model = MoCoV3Model(config).eval()
    found = extract_features(model, images, transform, layers=True, progress=False)
    pixel_values = torch.stack([transform(images.decode(row)) for row in range(len(images))])
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
        cls = [model.backbone.layernorm(states)[:, 0] for states in output.hidden_states]
    assert len(cls) == 6, "the embeddings and five layers"
    mean = output.last_hidden_state[:, 1:].mean(dim=1)
    for choice, parts in {
        "pooled": [output.pooler_output],
        "pooled_mean": [output.pooler_output, mean],
        "last4": cls[2:],
    }.items():
        torch.testing.assert_close(select_features(found, choice), torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5)


def test_layers_of_models_without_them_are_an_error(images, transform, encoder):
    with pytest.raises(ValueError, match="MoCoV3ViTModel has 2 layers, expected at least 4"):
        extract_features(encoder, images, transform, layers=True, progress=False)
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ValueError, match="ResNetModel has no CLS token in every layer"):
        extract_features(resnet, images, transform, layers=True, progress=False)


def test_bf16_is_near_and_float32(images, encoder, transform):
    exact = extract_features(encoder, images, transform, progress=False)
    half = extract_features(encoder, images, transform, mixed_precision="bf16", progress=False)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert torch.nn.functional.cosine_similarity(half, exact).min() > 0.999
    low = extract_features(encoder.bfloat16(), images, transform, progress=False)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low, exact).min() > 0.99


def test_rows_are_exchanged_in_pieces(monkeypatch):
    """The exchange of three processes, played by one: every process has rows that name themselves."""
    edges = [0, 5, 7, 12]
    rows = torch.arange(12.0)[:, None].repeat(1, 2)
    shares = [rows[begin:end] for begin, end in pairwise(edges)]
    state = type("State", (), {"num_processes": 3})()
    offsets = iter([0, 2, 4])

    def gather(piece):
        offset = next(offsets)
        pieces = torch.full((3, *piece.shape), -1.0)
        for rank, share in enumerate(shares):
            mine = share[offset : offset + len(piece)]
            pieces[rank, : len(mine)] = mine
        return pieces.flatten(0, 1)

    monkeypatch.setattr(features_module, "process_state", lambda: state)
    monkeypatch.setattr(features_module, "gather_object", lambda values: [2, 2, 2])
    monkeypatch.setattr(features_module, "gather", gather)
    monkeypatch.setattr(features_module, "_GATHER_ROWS", 6)
    assert torch.equal(features_module._gather_rows(shares[0], edges, torch.device("cpu")), rows)


@pytest.fixture(scope="module")
def damaged_folder(image_folder, tmp_path_factory):
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("damaged") / "images")
    path = folder / "train" / "bee" / "002.png"
    path.write_bytes(path.read_bytes()[:100])
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_images_are_named_not_skipped(damaged_folder, encoder, transform, num_workers):
    images = open_labeled(str(damaged_folder), split="train")
    with pytest.raises(ValueError, match=r"image in row 17 .*: repair or remove it") as error:
        extract_features(encoder, images, transform, batch_size=4, num_workers=num_workers, progress=False)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def two_processes(image_folder, damaged_folder, model_folder, tmp_path_factory):
    """What two processes received, for three jobs: [rank][job]."""
    folder = tmp_path_factory.mktemp("processes")
    jobs = [(image_folder, "train", 4), (image_folder, "test", 64), (damaged_folder, "train", 4)]
    arguments = [str(part) for job in jobs for part in job]
    ranks(2, WORKER, str(model_folder), str(folder / "out"), *arguments)
    found = [torch.load(folder / f"out-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [result["num_processes"] for result in found] == [2, 2]
    return [result["jobs"] for result in found]


@pytest.mark.slow
def test_two_processes_change_no_bit(two_processes, images, encoder, transform):
    """45 images in batches of 4: the last is a single image, and the shares of the processes differ in length."""
    expected = extract_features(encoder, images, transform, batch_size=4, progress=False)
    for jobs in two_processes:
        assert torch.equal(jobs[0]["features"], expected)
        assert torch.equal(jobs[0]["labels"], torch.from_numpy(images.labels))


@pytest.mark.slow
def test_a_process_without_a_batch_takes_part(two_processes, image_folder, encoder, transform):
    test = open_labeled(str(image_folder), split="test")
    expected = extract_features(encoder, test, transform, batch_size=64, progress=False)
    for jobs in two_processes:
        assert torch.equal(jobs[1]["features"], expected)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(two_processes):
    for jobs in two_processes:
        assert jobs[2]["error"].startswith("image in row 17 ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line(images, encoder, transform, options, message):
    with pytest.raises(ValueError, match=message):
        extract_features(encoder, images, transform, **options)


def test_cache_saves_the_second_pass(images, encoder, transform, tmp_path, request):
    first = labeled_features(encoder, images, transform, cache_dir=tmp_path / "cache", progress=False)
    request.getfixturevalue("no_pass")
    # Another object with the same weights, another batch size, another order of opening: one and the same.
    again = labeled_features(
        load_encoder(request.getfixturevalue("model_folder")),
        images,
        transform,
        batch_size=5,
        cache_dir=tmp_path / "cache",
    )
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.labels, first.labels)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"], "nothing left beside it"


@pytest.mark.parametrize("what", ["weights", "transform", "precision", "split", "labels", "pixels"])
def test_cache_is_not_used_for_anything_else(what, encoder, transform, tmp_path, request):
    folder = write_images(tmp_path / "images", {"train": 4, "test": 4})
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    labeled_features(encoder, open_labeled(str(folder), split="train"), transform, **options)
    images = open_labeled(str(folder), split="test" if what == "split" else "train")
    if what == "weights":
        encoder = base_encoder(pretraining_model(seed=1))
    elif what == "transform":
        transform = EvaluationTransform(32, 32)
    elif what == "precision":
        options["mixed_precision"] = "bf16"
    elif what == "labels":
        images.labels = np.roll(images.labels, 1)
    elif what == "pixels":
        source = next((folder / "train" / "bee").iterdir())
        shutil.copy(next((folder / "train" / "cow").iterdir()), source)
        images = open_labeled(str(folder), split="train")
    request.getfixturevalue("no_pass")
    with pytest.raises(AssertionError, match="another pass over the images"):
        labeled_features(encoder, images, transform, **options)


def test_damaged_cache_is_made_again(images, encoder, transform, tmp_path):
    first = labeled_features(encoder, images, transform, cache_dir=tmp_path, progress=False).features.clone()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(UserWarning, match="are damaged, computing them again"):
        again = labeled_features(encoder, images, transform, cache_dir=tmp_path, progress=False)
    assert torch.equal(again.features, first)
    assert torch.equal(labeled_features(encoder, images, transform, cache_dir=tmp_path).features, first)


def test_fingerprint_sees_what_times_and_names_do_not(tmp_path):
    folder = write_images(tmp_path / "images", {"train": 4})
    images = open_labeled(str(folder), split="train")
    before = data_fingerprint(images)
    path = folder / "train" / "bee" / "001.png"
    times = path.stat()
    path.write_bytes((folder / "train" / "cow" / "002.png").read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert data_fingerprint(images) != before


def test_fingerprint_of_a_large_split_reads_some_images_only(image_folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "_SAMPLED_IMAGES", 5)
    images = open_labeled(str(image_folder), split="train")
    read, rows = images.read, []
    monkeypatch.setattr(images, "read", lambda row: rows.append(row) or read(row))
    data_fingerprint(images)
    assert rows == [0, 9, 18, 27, 36]
    rows.clear()
    del images.source._dataset  # of another kind: nothing but the images tells it apart
    data_fingerprint(images)
    assert rows == list(range(45))


def test_fingerprint_is_of_the_data(image_folder):
    train, again, test = (open_labeled(str(image_folder), split=split) for split in ("train", "train", "test"))
    assert data_fingerprint(train) == data_fingerprint(again)
    assert data_fingerprint(train) != data_fingerprint(test)
