"""A plain `Trainer` with the collator and the callback: the losses of our loop, evaluation, and what is refused."""

import copy
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

import mocov3_hf
from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.data.order import sample_order
from mocov3_hf.reporting import UsageError
from mocov3_hf.trainer import MoCoV3Callback, TwoViewCollator
from tests.factories import smooth
from tests.launch import ROOT


BACKBONE = {
    "model_type": "mocov3_vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
BATCH = 8
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # without a GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    for number in range(25):
        Image.fromarray(smooth(40 + number, 60, number)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    files = [str(file) for file in sorted(folder.glob("*.png"))]
    dataset = datasets.Dataset.from_dict({"image": files, "row": range(len(files))})
    return dataset.cast_column("image", datasets.Image(decode=False))


class InOrder:
    """The order of `mocov3 pretrain`, epoch after epoch."""

    def __init__(self, number):
        self.number, self.epoch = number, 0

    def __len__(self):
        return self.number

    def __iter__(self):
        yield from sample_order(0, self.epoch, self.number).at(torch.arange(self.number)).tolist()
        self.epoch += 1


class TrainerInOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return InOrder(len(self.train_dataset))


def arguments(output_dir, **changes):
    usual = {"per_device_train_batch_size": BATCH, "max_steps": 2, "dataloader_drop_last": True, "report_to": "none"}
    usual |= {"remove_unused_columns": False, "logging_steps": 1, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(str(output_dir), **usual | changes)


def model(seed=0):
    torch.manual_seed(seed)
    return MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(BACKBONE), head_hidden_size=16, projection_dim=8))


@pytest.mark.slow
def test_the_documented_example_has_the_losses_of_our_loop(folder, tmp_path, monkeypatch):
    options = {"backbone_config": BACKBONE, "image_size": 32, "train_batch_size": BATCH, "num_train_epochs": 2}
    options |= {"mixed_precision": "no", "dataloader_num_workers": 0, "logging_steps": 1}
    run = mocov3_hf.pretrain(folder, options | {"warmup_epochs": 1 / 3}, tmp_path / "run")
    text = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.setattr("transformers.Trainer", TrainerInOrder)
    torch.manual_seed(0)
    names = {"folder": str(folder), "backbone": dict(BACKBONE), "output_dir": str(tmp_path / "trainer")}
    exec(example, {"torch": torch, "batch_size": BATCH, **names}, variables := {})
    losses = [line["loss"] for line in variables["trainer"].state.log_history if "loss" in line]
    assert len(losses) == 6
    np.testing.assert_allclose(losses, run.metrics["loss"], rtol=2e-5)
    assert losses[0] != pytest.approx(losses[3], rel=1e-4)


def trainer_of(images, output_dir, callback=None, collator=None, **changes):
    callbacks = [callback or MoCoV3Callback()]
    collator = collator or TwoViewCollator(32, id_column="row")
    split = {"train_dataset": images, "eval_dataset": images.select(range(16))}
    return Trainer(model(), arguments(output_dir, **changes), data_collator=collator, callbacks=callbacks, **split)


def test_evaluation_and_the_best_model(images, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(
        images,
        tmp_path,
        max_steps=3,
        load_best_model_at_end=True,
        learning_rate=0.5,
        per_device_eval_batch_size=8,
        **options,
    )
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) == 3
    best = int(np.argmin(losses)) + 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = MoCoV3ForPreTraining.from_pretrained(tmp_path / f"checkpoint-{best}").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_momentum_encoder_is_updated_before_every_step(images, tmp_path, schedule, monkeypatch):
    decays = []
    monkeypatch.setattr(MoCoV3ForPreTraining, "update_momentum_encoder", lambda self, decay: decays.append(decay))
    trainer_of(images, tmp_path, MoCoV3Callback(0.9, schedule), max_steps=4).train()
    cosine = [1 - 0.1 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert decays == pytest.approx(cosine if schedule == "cosine" else [0.9] * 4)


def test_views_are_a_function_of_seed_epoch_and_sample(images):
    rows = [images[row] for row in range(4)]
    pixels = [{"image": np.asarray(Image.open(row["image"]["path"]))} for row in rows]
    first, second = TwoViewCollator(32, seed=1), TwoViewCollator(32, seed=1)
    for collator in (first, second):
        collator.set_epoch(3)
    views = first(pixels)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "pixel_values": (4, 3, 32, 32),
        "pixel_values_2": (4, 3, 32, 32),
    }
    again = second(pixels[::-1])
    assert all(torch.equal(view, again[name].flip(0)) for name, view in views.items())
    as_pil = [{"image": Image.fromarray(row["image"])} for row in pixels]
    as_tensor = [{"image": torch.from_numpy(row["image"].copy()).permute(2, 0, 1)} for row in pixels]
    assert torch.equal(first(as_pil)["pixel_values"], views["pixel_values"])
    assert torch.equal(TwoViewCollator(32, seed=1, id_column="n").photometric.mean, first.photometric.mean)
    numbered = TwoViewCollator(32, seed=1, id_column="row")
    numbered.set_epoch(3)
    kinds = [[{"image": row["image"], "row": n} for n, row in enumerate(kind)] for kind in (pixels, as_tensor, rows)]
    of_kinds = [numbered(kind)["pixel_values"] for kind in kinds]
    assert torch.equal(of_kinds[0], of_kinds[1])
    assert torch.equal(of_kinds[0], of_kinds[2])
    first.set_epoch(4)
    assert not torch.equal(first(pixels)["pixel_values"], views["pixel_values"])
    assert not torch.equal(TwoViewCollator(32)(pixels)["pixel_values"], TwoViewCollator(32)(pixels)["pixel_values"])


def test_persistent_workers_see_the_epoch(images):
    collator = TwoViewCollator(32, id_column="row")
    loader = torch.utils.data.DataLoader(
        images, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=collator
    )
    seen = []
    for epoch in (0, 1, 0):
        collator.set_epoch(epoch)
        seen.append(next(iter(loader))["pixel_values"].clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_mistakes(images, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"^gradient_accumulation_steps is 2: small batches have fewer negatives"):
        trainer_of(images, tmp_path, gradient_accumulation_steps=2).train()
    with pytest.raises(UsageError, match="remove_unused_columns=False"):
        trainer_of(images.rename_column("image", "pixel_values"), tmp_path, remove_unused_columns=True).train()
    with pytest.raises(UsageError, match="no column 'number'"):
        trainer_of(images, tmp_path, collator=TwoViewCollator(32, id_column="number")).train()
    damaged = [images[0], {"image": b"not an image", "row": 7}]
    with pytest.raises(
        UsageError, match=r"^image 7 cannot be decoded: it is not JPEG.*: remove it from the data set$"
    ):
        TwoViewCollator(32, id_column="row")(damaged)
    with pytest.raises(UsageError, match="ema_decay must be between 0 and 1, got 2"):
        MoCoV3Callback(2)
    with pytest.raises(UsageError, match=r"trains a MoCoV3ForPreTraining, got a Linear"):
        MoCoV3Callback().on_train_begin(arguments(tmp_path), None, None, model=torch.nn.Linear(1, 1))
    several = copy.copy(arguments(tmp_path))
    several._n_gpu = 2
    with pytest.raises(UsageError, match=r"^2 GPUs in one process each see"):
        MoCoV3Callback().on_train_begin(several, None, None, model=model())
    MoCoV3Callback().on_train_begin(arguments(tmp_path, dataloader_drop_last=False), None, None, model=model())
    assert "pass dataloader_drop_last=True" in capsys.readouterr().err
