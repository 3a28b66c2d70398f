"""Fine-tuning: against closed forms, from every kind of folder, and what it leaves behind."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetModel, pipeline

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation import evaluate
from mocov3_hf.evaluation.classifier import load_with_new_head, unfrozen, with_fresh_backbone
from mocov3_hf.evaluation.finetune import FinetuneOptions, build_finetune_trainer, main
from mocov3_hf.evaluation.supervised import Splits
from mocov3_hf.model.modeling_mocov3_vit_embeddings import sincos_position_embedding
from mocov3_hf.processing import ProcessorTransform, build_image_processor
from mocov3_hf.results import read_results
from tests.evaluation.finetuning import ALL, NAMES, command, same


def trainer_of(model, image_folder, output_dir, **changes):
    train, test = (open_labeled(str(image_folder), split=split) for split in ("train", "test"))
    given = {"num_train_epochs": 2, "train_batch_size": 16, "warmup_epochs": 1, "base_learning_rate": 0.016}
    given |= {"save_strategy": "no", "eval_strategy": "no", "logging_steps": 1, "mixed_precision": "no"}
    options = FinetuneOptions(model="model", dataset_name="data", **(given | changes))
    classifier = unfrozen(load_with_new_head(model, NAMES), options.drop_path_rate)
    transform = ProcessorTransform(build_image_processor(32))
    return build_finetune_trainer(classifier, Splits(train, test, test, train), transform, options, str(output_dir))


@pytest.mark.slow
def test_command_saves_a_classifier_that_evaluates_the_same(model_folder, image_folder, tmp_path, capsys):
    metrics = main(command(model_folder, image_folder, tmp_path, *ALL, "--seed", 3))
    assert "finetune_top1_ema" in capsys.readouterr().out
    (result,) = read_results(tmp_path)
    assert (result["task"], result["seed"], result["metrics"]) == ("finetune", 3, metrics)
    assert {"finetune_top1", "finetune_mean_per_class", "finetune_top1_ema"} <= metrics.keys()
    assert result["settings"]["learning_rate"] == 0.016 * 16 / 256
    tested = evaluate.main(["--model", str(tmp_path), "--dataset_name", str(image_folder)])
    assert tested["top1"] == metrics["finetune_top1_ema"]
    assert read_results(tmp_path)[-1]["model"]["weights"] == result["model"]["classifier"]
    answer = pipeline("image-classification", model=str(tmp_path))(str(next(image_folder.glob("test/cow/*.png"))))
    assert {entry["label"] for entry in answer} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("save_weights", ["ema", "raw"])
def test_both_weights_are_measured_and_the_chosen_ones_saved(model_folder, image_folder, tmp_path, save_weights):
    main(command(model_folder, image_folder, tmp_path, "--ema_decay", 0.8, "--save_weights", save_weights))
    checkpoint = tmp_path / "checkpoint-4"
    saved = {"ema": "average.safetensors", "raw": "model.safetensors"}
    assert same(tmp_path / "model.safetensors", checkpoint / saved[save_weights])
    assert not same(checkpoint / "average.safetensors", checkpoint / "model.safetensors")


def test_the_average_is_the_closed_form(model_folder, image_folder, tmp_path):
    """`a_n = d^n · w_0 + Σ (1 - d) · d^(n - i) · w_i`, of the weights after every step."""
    trainer = trainer_of(model_folder, image_folder, tmp_path, ema_decay=0.7)
    weights = [{name: value.detach().clone().double() for name, value in trainer.model.named_parameters()}]
    step = trainer.optimizer.step

    def recorded(*args, **kwargs):
        step(*args, **kwargs)
        weights.append({name: value.detach().clone().double() for name, value in trainer.model.named_parameters()})

    trainer.optimizer.step = recorded
    trainer.train()
    assert len(weights) == 5
    for name, average in trainer.average.named_parameters():
        expected = 0.7**4 * weights[0][name]
        for number in range(1, 5):
            expected = expected + 0.3 * 0.7 ** (4 - number) * weights[number][name]
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        assert not average.requires_grad
    moved = "mocov3.backbone.encoder.layer.0.mlp.fc1.weight"
    assert not torch.equal(weights[0][moved], weights[-1][moved])


@pytest.mark.slow
def test_steps_are_those_of_the_closed_form(model_folder, image_folder, tmp_path):
    """Label smoothing, clipping, SGD with momentum and decay groups, warm-up: written out on the batches seen."""
    trainer = trainer_of(
        model_folder,
        image_folder,
        tmp_path,
        optimizer="sgd",
        learning_rate=0.5,
        weight_decay=0.1,
        label_smoothing_factor=0.2,
        max_grad_norm=0.05,
        min_learning_rate=0.01,
        augment=False,
        num_train_epochs=3,
    )
    twin = unfrozen(load_with_new_head(model_folder, NAMES)).double()
    batches, compute_loss, losses = [], trainer.compute_loss, []

    def recorded(model, inputs, **options):
        batches.append((inputs["pixel_values"].double(), inputs["labels"].clone()))
        losses.append(compute_loss(model, inputs, **options))
        return losses[-1]

    trainer.compute_loss = recorded
    trainer.train()
    momentum = {name: torch.zeros_like(value) for name, value in twin.named_parameters()}
    # Three epochs of two steps: two of warm-up, then half a cosine in four.
    rates = [0.0005, 0.5]
    rates += [0.01 + 0.49 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * n / 4)).item()) for n in (1, 2, 3, 4)]
    for (pixel_values, labels), loss, rate in zip(batches, losses, rates, strict=True):
        logits = twin(pixel_values=pixel_values).logits
        targets = 0.8 * torch.nn.functional.one_hot(labels, 3) + 0.2 / 3
        expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
        gradients = dict(zip(momentum, torch.autograd.grad(expected, list(twin.parameters())), strict=True))
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        assert norm > 0.05, "the clipping is tested"
        with torch.no_grad():
            for name, value in twin.named_parameters():
                decayed = value.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
                update = gradients[name] * (0.05 / norm) + (0.1 * value if decayed else 0.0)
                momentum[name].mul_(0.9).add_(update)
                value.sub_(rate * momentum[name])
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value.double(), dict(twin.named_parameters())[name], rtol=1e-3, atol=1e-5)


def test_mixed_batches_have_the_loss_of_their_soft_labels(model_folder, image_folder, tmp_path):
    trainer = trainer_of(model_folder, image_folder, tmp_path, mixup_alpha=0.8, label_smoothing_factor=0.1)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 2])
    mixing, seen = trainer.mixing, []
    trainer.mixing = lambda *given: seen.append(mixing(*given)) or seen[-1]
    loss = trainer.compute_loss(trainer.model, {"pixel_values": images.clone(), "labels": labels})
    ((mixed, targets),) = seen
    assert not torch.equal(mixed, images)
    logits = trainer.model(mixed).logits
    smooth = 0.9 * targets + 0.1 / 3
    torch.testing.assert_close(loss, -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean())
    again = trainer_of(model_folder, image_folder, tmp_path, mixup_alpha=0.8, label_smoothing_factor=0.1)
    assert again.compute_loss(again.model, {"pixel_values": images, "labels": labels}).item() == loss.item()


def test_everything_is_trained(model_folder, image_folder, tmp_path):
    main(command(model_folder, image_folder, tmp_path, "--ema_decay", 0))
    before = MoCoV3ForPreTraining.from_pretrained(model_folder).mocov3.state_dict()
    saved = load_file(tmp_path / "model.safetensors")
    assert not [name for name, value in before.items() if torch.equal(value, saved[f"mocov3.{name}"])]
    body = AutoModelForImageClassification.from_pretrained(tmp_path).config.backbone_config
    assert (body.position_embedding, body.freeze_patch_projection) == ("learned", False)


@pytest.mark.slow
def test_from_scratch_is_the_same_network_with_fresh_weights(model_folder, image_folder, tmp_path):
    loaded = load_with_new_head(model_folder, NAMES)
    fresh = unfrozen(with_fresh_backbone(loaded, seed=5))
    table = "mocov3.backbone.embeddings.position_embeddings"
    for name, value in fresh.state_dict().items():
        kept = name.startswith("classifier.") or name == table or value.eq(value.flatten()[0]).all()
        assert torch.equal(value, loaded.state_dict()[name]) == kept, name
        assert value.shape == loaded.state_dict()[name].shape
    torch.testing.assert_close(fresh.state_dict()[table], sincos_position_embedding(32, (4, 4)))
    assert same(fresh.state_dict(), unfrozen(with_fresh_backbone(loaded, seed=5)).state_dict())
    assert not same(fresh.state_dict(), unfrozen(with_fresh_backbone(loaded, seed=1)).state_dict())
    main(command(model_folder, image_folder, tmp_path, "--from_scratch"))
    (result,) = read_results(tmp_path)
    assert result["settings"]["from_scratch"] is True
    assert result["model"]["weights"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the same class is predicted for all 21 images")  # after four steps it may be so
@pytest.mark.parametrize("kind", ["base", "vit", "classifier", "fine-tuned", "resnet", "native"])
def test_every_folder_is_fine_tuned(model_folder, image_folder, tmp_path, kind):
    torch.manual_seed(0)
    body = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    pretraining = MoCoV3ForPreTraining.from_pretrained(model_folder)
    model = {
        "base": lambda: pretraining.mocov3,
        "vit": lambda: pretraining.mocov3.backbone,
        "classifier": lambda: MoCoV3ForImageClassification.from_pretrained(model_folder, num_labels=7),
        "fine-tuned": lambda: unfrozen(load_with_new_head(model_folder, ["a", "b"]), 0.1),
        "resnet": lambda: MoCoV3ForPreTraining(
            MoCoV3Config(backbone_config=body.to_dict(), head_hidden_size=16, projection_dim=8)
        ),
        "native": lambda: ResNetModel(body),
    }[kind]()
    model.save_pretrained(tmp_path / "model")
    options = ["--image_size", 32] if kind in ("resnet", "native") else []
    metrics = main(command(tmp_path / "model", image_folder, tmp_path / "out", "--ema_decay", 0.8, *options))
    assert 0 <= metrics["finetune_top1"] <= 1
    saved, average = (
        load_file(tmp_path / "out" / "checkpoint-4" / f"{name}.safetensors") for name in ("model", "average")
    )
    assert saved.keys() == average.keys()
    # Statistics of BatchNorm are the model's own in both.
    for name in saved:
        if "running" in name:
            assert torch.equal(saved[name], average[name])
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert [classifier.config.id2label[number] for number in range(3)] == NAMES


@pytest.mark.slow
def test_log_is_what_a_report_reads(model_folder, image_folder, tmp_path):
    main(command(model_folder, image_folder, tmp_path, "--ema_decay", 0.5))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["epoch"] for line in steps] == [0.5, 1.0, 1.5, 2.0]
    assert steps[0]["learning_rate"] == pytest.approx(0.001 * 1e-3)
    assert steps[-1]["learning_rate"] == pytest.approx(1e-5)
    evaluations = [line for line in lines if "eval_top1" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert all({"eval_top1_ema", "eval_loss", "epoch"} <= line.keys() for line in evaluations)
    assert not any("train_runtime" in line for line in lines)


@pytest.mark.slow
def test_best_epoch_is_kept_and_chosen_on_held_out_images(model_folder, image_folder, tmp_path, monkeypatch):
    """The second of four epochs is made the best one: its weights must be the saved ones."""
    found = iter([0.2, 0.9, 0.5, 0.4])
    sizes, measure = [], evaluate.accuracy_metrics

    def measured(scores, labels, names=None):
        sizes.append(len(labels))
        value = next(found, None)
        return measure(scores, labels, names) | ({} if value is None else {"top1": value})

    monkeypatch.setattr(evaluate, "accuracy_metrics", measured)
    options = ["--load_best_model_at_end", "--validation_fraction", 0.2, "--save_total_limit", 2]
    main(command(model_folder, image_folder, tmp_path, *options, "--num_train_epochs", 4))
    assert sizes == [9, 9, 9, 9, 21]
    (result,) = read_results(tmp_path)
    assert result["settings"]["best"] == {
        "step": 4,
        "metric": 0.9,
        "measured_on": "held-out part of the training split",
    }
    assert result["dataset"]["train_size"] == 45
    assert same(tmp_path / "model.safetensors", tmp_path / "checkpoint-4" / "model.safetensors")
    assert not same(tmp_path / "model.safetensors", tmp_path / "checkpoint-8" / "model.safetensors")


def test_training_ends_early_without_progress(model_folder, image_folder, tmp_path, monkeypatch):
    measure = evaluate.accuracy_metrics
    monkeypatch.setattr(evaluate, "accuracy_metrics", lambda *given: measure(*given) | {"top1": 0.5})
    main(command(model_folder, image_folder, tmp_path, "--early_stopping_patience", 2, "--num_train_epochs", 9))
    assert read_results(tmp_path)[0]["settings"]["steps"] == 6, (
        "the first epoch is the best, two more do not better it"
    )


@pytest.mark.slow
def test_parts_of_a_batch_are_the_batch(model_folder, image_folder, tmp_path):
    options = ["--no_augment", "--optimizer", "sgd", "--base_learning_rate", 1.6]
    main(command(model_folder, image_folder, tmp_path / "1", *options))
    main(command(model_folder, image_folder, tmp_path / "4", *options, "--gradient_accumulation_steps", 4))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in "14")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)
    settings = read_results(tmp_path / "4")[0]["settings"]
    assert (settings["train_batch_size"], settings["steps"]) == (16, 4), "13 images of an epoch are left out"


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_bit_of_the_result(model_folder, image_folder, tmp_path):
    main(command(model_folder, image_folder, tmp_path / "plain", *ALL))
    main(command(model_folder, image_folder, tmp_path / "again", *ALL, "--gradient_checkpointing"))
    assert same(tmp_path / "plain" / "model.safetensors", tmp_path / "again" / "model.safetensors")


def test_bf16_and_another_size_and_interpolation(model_folder, image_folder, tmp_path):
    options = ["--mixed_precision", "bf16", "--image_size", 48, "--interpolation", "bicubic"]
    main(command(model_folder, image_folder, tmp_path, *options))
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (processor["crop_size"]["height"], processor["resample"]) == (48, 3)
    assert load_file(tmp_path / "model.safetensors")["classifier.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor must be at least 0 and below 1, got 1"),
        (["--mixup_alpha", "-1"], "--mixup_alpha must be at least 0, got -1"),
        (
            ["--rand_augment_num_ops", "2", "--rand_augment_magnitude", "30"],
            "--rand_augment_magnitude must be at least 0 and at most 10, got 30",
        ),
        (
            ["--cutmix_alpha", "1", "--train_batch_size", "15"],
            "an even number of images per forward pass, got 15: pass another",
        ),
        (["--layer_decay", "2"], "--layer_decay must be above 0 and at most 1, got 2"),
        (["--drop_path_rate", "1"], "--drop_path_rate must be at least 0 and below 1, got 1"),
        (["--min_learning_rate", "1"], "--min_learning_rate 1 exceeds the peak learning rate 0.001"),
        (
            ["--train_batch_size", "15", "--gradient_accumulation_steps", "2"],
            "a batch of 15 images cannot be divided equally among 1 processes x 2 accumulation steps",
        ),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0"),
        (
            ["--early_stopping_patience", "1", "--metric_for_best_model", "top1_ema"],
            "--metric_for_best_model takes one of top1, mean_per_class, loss, got 'top1_ema'",
        ),
        (["--metric_for_best_model", "top_1"], "--metric_for_best_model takes one of top1, .*, got 'top_1'"),
        (["--image_size", "3"], "--image_size 3 is smaller than a patch of the model: pass 8 or more"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (
            ["--load_best_model_at_end", "--metric_for_best_model", "top5", "--ema_decay", "0.5"],
            "one of top1, mean_per_class, loss, top1_ema, mean_per_class_ema, loss_ema, got 'top5'",
        ),
        (["--load_best_model_at_end", "--eval_strategy", "no"], "leave out --eval_strategy no"),
        (["--load_best_model_at_end", "--save_strategy", "no"], "leave out --save_strategy no"),
        (["--validation_fraction", "0.01"], "holds out 0 of 45 images: pass another"),
        (["--interpolation", "lanczos"], "--interpolation takes one of bilinear, bicubic, got 'lanczos'"),
        (["--optimizer", "lion"], "--optimizer takes one of adamw, sgd, got 'lion'"),
        (["--ema_decay", "1"], "--ema_decay must be at least 0 and below 1, got 1"),
        (["--ema_momentum", "2"], "--ema_decay must be at least 0 and below 1, got -1"),
        (["--recipe", "vit-base-p16_mocov3-pre_8xb64-coslr-150e"], "there is no recipe .*; did you mean 'vit-base"),
        (["--test_split", "val"], "it has: train, test"),
        (["--resume_from_checkpoint", "/nowhere"], "checkpoint '/nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(model_folder, image_folder, tmp_path, change, message, fails):
    line = fails(main, command(model_folder, image_folder, tmp_path, *change))
    assert re.search(message, line)
    assert not (tmp_path / "results.json").exists()


def test_divergence_is_a_failure_at_run_time(model_folder, image_folder, tmp_path, fails):
    diverging = ["--learning_rate", "1e38", "--max_grad_norm", "0"]
    line = fails(main, command(model_folder, image_folder, tmp_path, *diverging), code=1)
    assert "training has diverged" in line
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_ema_momentum_of_earlier_versions_means_the_same(model_folder, image_folder, tmp_path, capsys):
    main(command(model_folder, image_folder, tmp_path / "new", "--ema_decay", 0.8))
    main(command(model_folder, image_folder, tmp_path / "old", "--ema_momentum", 0.2))
    assert "warning: --ema_momentum is deprecated: use --ema_decay" in capsys.readouterr().err
    assert same(tmp_path / "new" / "model.safetensors", tmp_path / "old" / "model.safetensors")
    (new,), (old,) = read_results(tmp_path / "new"), read_results(tmp_path / "old")
    assert (old["settings"], old["metrics"]) == (new["settings"], new["metrics"])


def test_what_an_architecture_does_not_have_is_refused(image_folder, tmp_path, fails):
    body = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(body).save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    for option, message in (
        (["--drop_path_rate", "0.1"], "a resnet model has no stochastic depth: pass --drop_path_rate 0"),
        (["--gradient_checkpointing"], "has no gradient checkpointing: leave out --gradient_checkpointing"),
    ):
        line = fails(main, command(tmp_path / "model", image_folder, tmp_path / "out", *option))
        assert message in line
