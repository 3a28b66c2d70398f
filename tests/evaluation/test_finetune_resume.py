"""Interrupted fine-tuning is bit-identical to an uninterrupted run, on one process and on two."""

import json
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from mocov3_hf.evaluation.classifier import load_with_new_head
from mocov3_hf.evaluation.finetune import main
from mocov3_hf.evaluation.supervised_options import SupervisedOptions
from mocov3_hf.evaluation.trainer_checkpoints import (
    check_readable,
    check_settings,
    load_average,
    save_average,
    save_settings,
)
from mocov3_hf.results import read_results
from mocov3_hf.run_folder import CheckpointError
from tests.evaluation.finetuning import ALL, NAMES, SCRIPT, command, same
from tests.fork_server import ranks


def log_of(folder):
    return (folder / "metrics.jsonl").read_text()


def continue_from(whole, step, folder):
    """A folder as a run leaves it that was killed after the checkpoint of a step, and wrote to its log since."""
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / f"checkpoint-{2 * step}").mkdir()  # and while it was saving
    (folder / "metrics.jsonl").write_text(log_of(whole) + '{"step": 99, "loss": 1.0}\n')


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_interrupted_and_resumed_it_is_bit_identical(model_folder, image_folder, tmp_path, num_processes):
    def run(folder, *more):
        argv = command(model_folder, image_folder, folder, *ALL, "--save_total_limit", 3, *more)
        if num_processes == 1:
            main(argv)
        else:
            ranks(num_processes, SCRIPT, *argv)

    run(tmp_path / "whole")
    continue_from(tmp_path / "whole", 2, tmp_path / "resumed")
    run(tmp_path / "resumed", "--resume_from_checkpoint", "auto")
    for name in ("model.safetensors", "checkpoint-4/model.safetensors", "checkpoint-4/average.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "resumed" / name), name
    (whole,), (resumed,) = read_results(tmp_path / "whole"), read_results(tmp_path / "resumed")
    assert whole["metrics"] == resumed["metrics"]
    assert whole["hardware"]["num_processes"] == num_processes
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "resumed")
    assert not same(
        tmp_path / "whole" / "checkpoint-2" / "model.safetensors", tmp_path / "whole" / "model.safetensors"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scheduler.pt", "trainer_state.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    model_folder, image_folder, tmp_path, capsys, fails, name
):
    def run(*more):
        return command(model_folder, image_folder, tmp_path / "run", "--save_total_limit", 3, *more)

    main(run())
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    file = tmp_path / "run" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-9])
    capsys.readouterr()
    main(run("--resume_from_checkpoint", "auto"))
    assert f"checkpoint-4 is damaged: {name} cannot be read (" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / name).write_bytes(b"")
    line = fails(main, run("--resume_from_checkpoint", "auto"))
    assert f"is damaged: {name} cannot be read (" in line


def test_weights_are_compared_with_their_hashes(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    weights = {name: tmp_path / f"{name}.safetensors" for name in ("model", "average")}
    for file in weights.values():
        save_file({"weight": torch.arange(64.0)}, file)
    check_readable(tmp_path)  # of earlier versions
    save_settings({"seed": 0}, tmp_path)
    check_readable(tmp_path)
    check_settings({"seed": 0}, tmp_path)
    for name, file in weights.items():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=rf"{name}.safetensors cannot be read \(its content is not what was"):
            check_readable(tmp_path)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{name}.safetensors is missing"):
            check_readable(tmp_path)
        file.write_bytes(content)


def test_every_flipped_bit_of_a_file_of_torch_is_noticed(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    file = tmp_path / "optimizer.pt"
    torch.save({"state": {0: {"momentum_buffer": torch.arange(64.0)}}}, file)
    check_readable(tmp_path)
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith("data/0"))
    data = content.index(torch.arange(64.0).numpy().tobytes(), record.header_offset)
    for place in range(data, data + record.file_size, 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"optimizer.pt cannot be read \(the checksum of"):
            check_readable(tmp_path)


@pytest.mark.slow
def test_patience_counts_on_after_an_interruption(model_folder, image_folder, tmp_path, monkeypatch):
    from mocov3_hf.evaluation import evaluate

    measure = evaluate.accuracy_metrics
    monkeypatch.setattr(evaluate, "accuracy_metrics", lambda *given: measure(*given) | {"top1": 0.5})
    options = ["--early_stopping_patience", 2, "--num_train_epochs", 9, "--save_total_limit", 5]
    main(command(model_folder, image_folder, tmp_path / "whole", *options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    main(command(model_folder, image_folder, tmp_path / "resumed", *options, "--resume_from_checkpoint", "auto"))
    assert read_results(tmp_path / "whole")[0]["settings"]["steps"] == 6
    assert read_results(tmp_path / "resumed")[0]["settings"]["steps"] == 6


@pytest.mark.slow
def test_one_process_and_two_train_the_same_classifier(model_folder, image_folder, tmp_path):
    """Crops, operations and erasing are those of seed, epoch and image. 32 images are two whole steps."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for path in sorted(images.glob("train/*/*.png"))[:39:3]:
        path.unlink()
    options = ["--rand_augment_num_ops", 2, "--random_erasing_probability", 0.25, "--ema_decay", 0.8]
    main(command(model_folder, images, tmp_path / "1", *options))
    ranks(2, SCRIPT, *command(model_folder, images, tmp_path / "2", *options))
    (one,), (two,) = read_results(tmp_path / "1"), read_results(tmp_path / "2")
    assert two["hardware"]["num_processes"] == 2
    assert one["settings"] == two["settings"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    # Adam takes steps of one size where a gradient is nearly zero: single weights may differ by a step.
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0.05, atol=1e-4, msg=name)
    rows = [[json.loads(line) for line in log_of(tmp_path / name).splitlines()] for name in "12"]
    losses = [[line["loss"] for line in side if "loss" in line] for side in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_averages_that_do_not_fit_are_refused(model_folder, image_folder, tmp_path):
    classifier = load_with_new_head(model_folder, NAMES)
    with pytest.raises(ValueError, match=r"has no EMA of the weights .* its run had no --ema_decay"):
        load_average(classifier, tmp_path)
    save_average(classifier, tmp_path)
    load_average(classifier, tmp_path)
    path = tmp_path / "average.safetensors"
    state = load_file(path)
    state["classifier.old"] = state.pop("classifier.bias")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"does not match this model: .*classifier.bias.*") as error:
        load_average(classifier, tmp_path)
    assert "\n" not in str(error.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="does not match this model"):
        load_average(classifier, tmp_path)


@pytest.mark.slow
def test_a_run_resumes_with_the_same_options_only(model_folder, image_folder, tmp_path, fails):
    main(command(model_folder, image_folder, tmp_path))
    for changes, named in (
        (["--ema_decay", 0.8], r"ema_decay \(0.0, now 0.8\)"),
        (["--num_train_epochs", 3, "--seed", 1], r"num_train_epochs \(2, now 3\), seed \(0, now 1\)"),
        (["--train_batch_size", 8], r"learning_rate \(0.001, now 0.0005\), train_batch_size \(16, now 8\)"),
    ):
        arguments = command(model_folder, image_folder, tmp_path, "--resume_from_checkpoint", "auto", *changes)
        assert re.search(named, fails(main, arguments))
    free = ["--gradient_accumulation_steps", 2, "--batch_size", 5, "--save_total_limit", 2]
    main(command(model_folder, image_folder, tmp_path, "--resume_from_checkpoint", "auto", *free))
    (tmp_path / "checkpoint-4" / "settings.json").unlink()
    line = fails(main, command(model_folder, image_folder, tmp_path, "--resume_from_checkpoint", "auto"))
    assert "the options of the run" in line
    assert "cannot be read (settings.json)" in line


def test_a_run_keeps_the_precision_that_it_started_with(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    given = {"model": "m", "dataset_name": "d", "output_dir": str(tmp_path), "mixed_precision": "auto"}
    assert SupervisedOptions(**given).precision == "no"
    for step, content in ((1, "{}"), (2, '{"mixed_precision": "bf16"}'), (3, "{"), (4, "[]")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "settings.json").write_text(content)
    assert SupervisedOptions(**given).precision == "no", "a new run"
    assert SupervisedOptions(**given, resume_from_checkpoint="auto").precision == "bf16"
    assert SupervisedOptions(**given, resume_from_checkpoint=str(tmp_path / "checkpoint-1")).precision == "no"
    assert SupervisedOptions(**given, resume_from_checkpoint=str(tmp_path / "checkpoint-2")).precision == "bf16"
    given["mixed_precision"] = "no"
    assert SupervisedOptions(**given, resume_from_checkpoint="auto").precision == "no", "it was asked for"


@pytest.mark.parametrize(("momentum", "decay"), [(0.2, 0.8), (4e-5, 0.99996), (0.0, 0.0)])
def test_settings_of_earlier_versions_are_understood(tmp_path, momentum, decay):
    (tmp_path / "settings.json").write_text(json.dumps({"seed": 0, "ema_momentum": momentum}))
    check_settings({"seed": 0, "ema_decay": decay}, tmp_path)
    with pytest.raises(ValueError, match=r"is of a run with other options, ema_decay \(.*, now 0.5\): pass the same"):
        check_settings({"seed": 0, "ema_decay": 0.5}, tmp_path)


@pytest.mark.parametrize(("saved", "meant"), [({}, "stop"), ({"bad_images": "skip"}, "skip")])
def test_images_that_earlier_versions_left_out_are_understood(tmp_path, saved, meant):
    (tmp_path / "settings.json").write_text(json.dumps({"seed": 0, **saved}))
    check_settings({"seed": 0, "on_bad_image": meant}, tmp_path)
    with pytest.raises(ValueError, match="is of a run with other options, on_bad_image"):
        check_settings({"seed": 0, "on_bad_image": {"stop": "skip", "skip": "stop"}[meant]}, tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "{", "3"])
def test_settings_that_are_not_an_object_are_refused(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read \(settings.json\)") as error:
        check_settings({"seed": 0}, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"num_train_images": 50, "train_fingerprint": "b"}, "training split of 48 images, there are 50 now"),
        (
            {"num_train_images": 48, "train_fingerprint": "b"},
            "training split of other 48 images: restore the data set",
        ),
        ({"num_train_images": 50, "train_fingerprint": "b", "seed": 1}, "is of a run with other options, "),
    ],
)
def test_other_training_images_are_refused_by_name(tmp_path, now, message):
    (tmp_path / "settings.json").write_text('{"seed": 0, "num_train_images": 48, "train_fingerprint": "a"}')
    with pytest.raises(ValueError, match=message):
        check_settings({"seed": 0, **now}, tmp_path)
    (tmp_path / "settings.json").write_text('{"seed": 0}')  # as earlier versions wrote it
    check_settings({"num_train_images": 48, "train_fingerprint": "a", "seed": 0}, tmp_path)
