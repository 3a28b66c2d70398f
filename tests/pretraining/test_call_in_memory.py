"""`mocov3_hf.pretrain()` as in a notebook: data in memory, recipes as mappings, callbacks, and what it returns."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import notebook_launcher
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

import mocov3_hf
from mocov3_hf.reporting import UsageError
from tests.fork_server import Forked


class Recorder(TrainerCallback):
    def __init__(self, stop_after=None, error=None):
        self.events, self.logs, self.stop_after, self.error = [], [], stop_after, error

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert isinstance(model, mocov3_hf.MoCoV3ForPreTraining)
        self.events.append(f"begin {args.max_steps} {state.max_steps}")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_after:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert state.log_history[-1]["loss"] == logs["loss"]
        self.events.append(f"log {state.global_step}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(f"knn {state.global_step} {metrics['knn_top1']:.1f}")

    def on_save(self, args, state, control, **kwargs):
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(f"end {state.global_step} {state.epoch:.2f}")


def weights(run):
    return load_file(run.output_dir / "model.safetensors")


def test_images_in_memory_train_as_files_do(tmp_path, options, pictures):
    files = sorted(pictures.glob("*.png"))
    from_files = mocov3_hf.pretrain(pictures, output_dir=tmp_path / "files", **options)
    images = [Image.open(file) for file in files]
    recorder = Recorder()
    run = mocov3_hf.pretrain(images, output_dir=tmp_path / "memory", callbacks=[recorder], **options)
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(from_files).items())
    assert recorder.events == ["begin 4 4", "log 1", "log 2", "log 3", "log 4", "save 4", "end 4 1.33"]
    assert run.metrics["step"].tolist() == [1, 2, 3, 4]
    assert run.metrics["loss"].tolist() == from_files.metrics["loss"].tolist()
    features = run.model(**run.processor(images[:2], return_tensors="pt")).pooler_output
    assert features.shape == (2, 16)
    with pytest.raises(UsageError, match="images of this recipe were in memory"):
        mocov3_hf.pretrain("data in memory", run.output_dir / "recipe.yaml", tmp_path / "again")


def test_a_callback_stops_the_run_and_it_resumes(tmp_path, options, pictures, capsys):
    images = [Image.open(file) for file in sorted(pictures.glob("*.png"))]
    straight = mocov3_hf.pretrain(images, output_dir=tmp_path / "straight", **options)
    folder = tmp_path / "stopped"
    mocov3_hf.pretrain(images, output_dir=folder, callbacks=[Recorder(stop_after=2)], **options)
    out = capsys.readouterr().out
    assert "stopped by a callback after step 2" in out
    assert "the same mocov3_hf.pretrain(...) with resume_from_checkpoint" in out
    recorder = Recorder()
    run = mocov3_hf.pretrain(images, output_dir=folder, callbacks=[recorder], resume_from_checkpoint="auto", **options)
    assert recorder.events[0:2] == ["begin 4 4", "log 3"]
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(straight).items())


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("mine"), KeyError("mine")])
def test_errors_of_a_callback_propagate(tmp_path, options, pictures, error):
    with pytest.raises(type(error)) as raised:
        mocov3_hf.pretrain(pictures, output_dir=tmp_path, callbacks=[Recorder(2, error)], **options)
    assert raised.value is error


def test_labels_in_memory_are_monitored(tmp_path, options, labeled):
    splits = {
        split: [(Image.open(file), file.parent.name) for file in sorted((labeled / split).glob("*/*.png"))]
        for split in ("train", "test")
    }
    recorder = Recorder()
    run = mocov3_hf.pretrain(
        splits, output_dir=tmp_path, callbacks=[recorder], **options | {"knn_steps": 2, "knn_k": 3}
    )
    assert [event for event in recorder.events if event.startswith("knn")] == ["knn 2 1.0", "knn 4 1.0"]
    assert run.metrics.set_index("step")["knn_top1"].dropna().to_dict() == {2: 1.0, 4: 1.0}


def test_a_recipe_as_a_mapping_and_a_stream(tmp_path, options, pictures):
    def rows():
        for file in sorted(pictures.glob("*.png")):
            yield {"image": Image.open(file).convert("RGB")}

    stream = datasets.IterableDataset.from_generator(rows)
    recipe = options | {"steps_per_epoch": 3}
    recipe.pop("recipe")
    recipe["backbone_config"] |= {"model_type": "mocov3_vit"}
    run = mocov3_hf.pretrain(
        stream, recipe | {"ema_schedule": "cosine"}, tmp_path, image_size=16, mixed_precision="no"
    )
    assert len(run.metrics) == 4
    with pytest.raises(UsageError, match=r"^recipe: there is no option 'sede'; did you mean 'seed'\?$"):
        mocov3_hf.pretrain(stream, {"sede": 1}, tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": None, "time_budget": "soon"}, "^--time_budget takes a time such as 8h"),
        ({"output_dir": None}, "^output_dir is missing: pass a folder"),
        ({"recipe": 3}, "^recipe takes a name, a YAML file or a mapping of options, got 3$"),
        ({"callbacks": print}, "^callbacks takes a list of transformers.TrainerCallback, got a builtin_function"),
        ({"callbacks": [print]}, "^callbacks takes a list of transformers.TrainerCallback, got a builtin_function"),
        ({"callbacks": Recorder()}, "^callbacks takes a list of transformers.TrainerCallback, got a Recorder"),
    ],
)
def test_mistakes(tmp_path, options, pictures, arguments, message):
    with pytest.raises(UsageError, match=message):
        mocov3_hf.pretrain(pictures, **{"output_dir": tmp_path / "run", **options, **arguments})
    assert not (tmp_path / "run").exists()


def test_through_the_notebook_launcher(tmp_path, options, pictures):
    images = [Image.open(file) for file in sorted(pictures.glob("*.png"))]
    notebook_launcher(lambda: mocov3_hf.pretrain(images, output_dir=tmp_path, **options), num_processes=1)
    assert len(mocov3_hf.Run(tmp_path).metrics) == 4


@pytest.mark.slow
def test_in_two_processes_of_the_notebook_launcher_after_a_run(tmp_path, options):
    worker = Forked([str(Path(__file__).parent / "notebook_worker.py"), str(tmp_path), json.dumps(options)])
    output, _ = worker.communicate()
    assert worker.returncode == 0, output
