"""The pre-training model in a `Trainer` and in loops of others: loss, momentum updates, what the forward pass does."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3ViTModel
from mocov3_hf.model import modeling_mocov3_pretraining
from mocov3_hf.model.modeling_mocov3_vit import eager_attention_forward
from tests.model.distributed_worker import BACKBONES, HEADS


WARNING = "the momentum encoder did not"


def build(backbone="vit", **settings):
    torch.manual_seed(0)
    return MoCoV3ForPreTraining(MoCoV3Config(backbone_config={**BACKBONES[backbone], **settings}, **HEADS))


def draw_views(batch_size=4, size=16):
    return torch.randn(2, batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))


class Views(Dataset):
    def __init__(self, length=8):
        self.views = draw_views(length)

    def __len__(self):
        return self.views.shape[1]

    def __getitem__(self, index):
        return {"pixel_values": self.views[0, index], "pixel_values_2": self.views[1, index]}


class UpdateMomentumEncoder(TrainerCallback):
    """As in the docstring of MoCoV3ForPreTraining."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.update_momentum_encoder(0.99)


def build_trainer(model, folder, callbacks=(), **settings):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, **settings}
    arguments = TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    dataset = Views()
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, callbacks=list(callbacks))


@pytest.fixture
def warned():
    """The messages of the pre-training model, which warns once per process: every test starts a new one."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.get_logger("transformers").warning_once.__func__.cache_clear()
    logger = logging.getLogger(modeling_mocov3_pretraining.__name__)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_trainer_evaluates_the_loss(tmp_path):
    model = build()
    trainer = build_trainer(model, tmp_path)
    found = trainer.evaluate()["eval_loss"]
    views = draw_views(8)
    with torch.no_grad():
        losses = [model.eval()(views[0, rows], views[1, rows]).loss.item() for rows in (slice(4), slice(4, 8))]
    assert found == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_trainer_gives_metrics_the_outputs(tmp_path):
    trainer = build_trainer(build(), tmp_path)
    trainer.compute_metrics = lambda found: {"shape": found.predictions[0].shape}
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == (8, HEADS["projection_dim"])
    assert metrics["eval_loss"] > 0


def test_trainer_averages_over_accumulation_steps(tmp_path):
    """Two batches of the same images accumulate to the gradient of one."""
    gradients = []
    for steps in (1, 2):
        model = build().double()
        trainer = build_trainer(model, tmp_path, gradient_accumulation_steps=steps)
        inputs = {"pixel_values": draw_views()[0].double(), "pixel_values_2": draw_views()[1].double()}
        trainer.current_gradient_accumulation_steps = steps
        for _ in range(steps):
            trainer.training_step(model, dict(inputs))
        gradients.append(model.projector.layers[0].dense.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_return_loss_is_a_choice():
    model, views = build().eval(), draw_views()
    output = model(pixel_values=views[0], pixel_values_2=views[1], return_loss=False)
    assert output.loss is None
    assert output.projection is None
    assert torch.equal(output.prediction, model(pixel_values=views[0]).prediction)


def test_bare_trainer_is_warned_once(tmp_path, warned):
    model = build()
    initial = [average.clone() for average, _ in model.momentum_pairs()]
    build_trainer(model, tmp_path, num_train_epochs=3).train()
    assert len([message for message in warned if WARNING in message]) == 1
    assert "update_momentum_encoder(ema_decay) once per optimizer step" in warned[0]
    torch.testing.assert_close([average for average, _ in model.momentum_pairs()], initial, rtol=0, atol=0)


def test_trainer_with_the_callback_updates_and_is_silent(tmp_path, warned):
    model = build()
    initial = model.momentum_encoder.projector.layers[0].dense.weight.clone()
    build_trainer(
        model, tmp_path, [UpdateMomentumEncoder()], gradient_accumulation_steps=2, per_device_train_batch_size=2
    ).train()
    assert warned == []
    assert not torch.equal(model.momentum_encoder.projector.layers[0].dense.weight, initial)


def test_callback_is_that_of_the_docstring():
    lines = [line.strip() for line in MoCoV3ForPreTraining.__doc__.splitlines()]
    start = lines.index(">>> class UpdateMomentumEncoder(TrainerCallback):")
    shown = [line.removeprefix("...").strip() for line in lines[start + 1 : start + 3]]
    assert shown == [
        "def on_optimizer_step(self, args, state, control, model, **kwargs):",
        "model.update_momentum_encoder(0.99)",
    ]


def one_step(model, optimizer, forwards=1):
    views = draw_views()
    for _ in range(forwards):
        model(pixel_values=views[0], pixel_values_2=views[1]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_every_kind_of_optimizer_is_noticed(options, warned):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **options)
    one_step(model, optimizer, forwards=2)
    assert warned == []
    one_step(model, optimizer)
    one_step(model.double(), torch.optim.SGD(model.parameters(), lr=1e-5))
    assert len(warned) == 1


@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_warning_where_updates_are_made(update, checkpointing, warned):
    model = build()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # later versions of transformers rename the method
            model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        if update == "before":
            model.update_momentum_encoder(0.9)
        one_step(model, optimizer, forwards=2)
        if update == "after":
            model.update_momentum_encoder(0.9)
    assert warned == []


def test_no_warning_without_training(warned):
    model, views = build(), draw_views()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    one_step(model, optimizer)
    with torch.no_grad():
        model(pixel_values=views[0], pixel_values_2=views[1])
    model.eval()(pixel_values=views[0], pixel_values_2=views[1])
    assert warned == []
    one_step(model.train(), optimizer)
    assert len(warned) == 1


def test_ema_decay_and_its_old_name():
    models = [build() for _ in range(3)]
    for model in models:
        with torch.no_grad():
            model.projector.layers[0].dense.weight.add_(1)
    expected = 0.75 * models[0].momentum_encoder.projector.layers[0].dense.weight
    expected = expected + 0.25 * models[0].projector.layers[0].dense.weight
    models[0].update_momentum_encoder(0.75)
    models[1].update_momentum_encoder(ema_decay=0.75)
    with pytest.warns(FutureWarning, match="`momentum` is deprecated, use `ema_decay`"):
        models[2].update_momentum_encoder(momentum=0.75)
    for model in models:
        torch.testing.assert_close(model.momentum_encoder.projector.layers[0].dense.weight, expected.detach())
    for wrong in (None, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"ema_decay must be between 0 and 1, got {wrong}"):
            models[0].update_momentum_encoder(wrong)


def test_speed_is_no_argument_of_the_forward_pass():
    """The encoder inside computes its pooled output only in the forward pass of the whole model."""
    model, views = build().double(), draw_views().double()
    lengths = []
    layer = model.mocov3.backbone.encoder.layer[-1]
    layer.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    output = model(pixel_values=views[0], pixel_values_2=views[1])
    assert lengths == [1, 1]
    assert model.mocov3(views[0]).last_hidden_state.shape == (4, 5, 16)
    model.pooled_query_only = False
    whole = model(pixel_values=views[0], pixel_values_2=views[1])
    assert lengths == [1, 1, 5, 5, 5]
    torch.testing.assert_close(output.loss, whole.loss)
    with pytest.raises(TypeError, match="pooled_query_only"):
        nn.Module.__call__(MoCoV3ViTModel(model.config.backbone_config).embeddings, views[0], pooled_query_only=True)


@pytest.mark.slow
def test_whole_model_compiles_without_graph_breaks():
    model, views = build().double(), draw_views().double()
    model.update_momentum_encoder(0.9)
    expected = model(pixel_values=views[0], pixel_values_2=views[1]).loss
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values=views[0], pixel_values_2=views[1]).loss, expected)
    assert model.mocov3.backbone.pooled_query_only is False


def attention_in_loops(query, key, value, scaling):
    """One query at a time, in float64."""
    output = torch.zeros_like(query, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        image, head, row = index
        scores = (key[image, head].double() @ query[image, head, row].double()) * scaling
        weights = (scores - scores.max()).exp()
        output[image, head, row] = (weights / weights.sum()) @ value[image, head].double()
    return output.transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_eager_attention_is_attention(dtype, tolerance):
    module = nn.Module().eval()
    query, key, value = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    output, weights = eager_attention_forward(module, query, key, value, None)
    expected = attention_in_loops(query, key, value, 8**-0.5)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    assert output.dtype == weights.dtype == dtype
    mask = torch.zeros(5, 5, dtype=dtype)
    mask[:, 3:] = float("-inf")
    masked, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.5)
    expected = attention_in_loops(query, key[:, :, :3], value[:, :, :3], 0.5)
    torch.testing.assert_close(masked.double(), expected, rtol=tolerance, atol=tolerance)


def test_softmax_is_computed_in_float32():
    """Half precision rounds the weights once, at the end."""
    query, key = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 3, 8, dtype=torch.bfloat16)
    key[..., 0] = torch.tensor([0.0, 1.0, 2.0])
    query[..., 0] = 1.0
    _, weights = eager_attention_forward(nn.Module(), query, key, key, None, scaling=1.0)
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0).to(torch.bfloat16)
    assert torch.equal(weights.flatten(), expected)
