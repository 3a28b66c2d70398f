"""ViT-BN: batch normalization over all images and tokens before each MLP (over processes: test_distributed.py)."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining, MoCoV3ViTConfig, MoCoV3ViTModel
from mocov3_hf.model.batchnorm_mocov3 import MoCoV3BatchNorm2d, MoCoV3TokenBatchNorm, use_global_statistics
from mocov3_hf.optim import LARS, parameter_groups
from tests.factories import NANO_VIT


VIT_BN = {**NANO_VIT, "mlp_norm": "batch_norm"}
# Those that every transformers of our range knows; later ones deprecate them.
old_names = pytest.mark.filterwarnings(r"ignore:.gradient_checkpointing(_enable)?. is deprecated:FutureWarning")


def build(seed=0, **backbone):
    torch.manual_seed(seed)
    config = MoCoV3Config(backbone_config={**VIT_BN, **backbone}, projection_dim=8, head_hidden_size=16)
    model = MoCoV3ForPreTraining(config).double()
    with torch.no_grad():  # apart, so that keys and queries differ and no normalization is the identity
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def draw_views(batch=6):
    return torch.randn(2, batch, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def step_of(model):
    """Loss, gradients and running statistics of a step."""
    views = draw_views()
    loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def assert_same(results, expected):
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-12)


def test_only_the_norms_before_the_mlps_are_batch_norms():
    model = build()
    assert len(model.mocov3.backbone.encoder.layer) == 2
    for name, module in model.mocov3.backbone.named_modules():
        if name.endswith("norm2"):
            assert type(module) is MoCoV3TokenBatchNorm
            assert (module.eps, module.momentum, module.affine) == (1e-5, 0.1, True)
        elif name.endswith(("norm", "norm1")):
            assert type(module) is nn.LayerNorm
    plain = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=NANO_VIT, projection_dim=8, head_hidden_size=16))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not [module for module in plain.mocov3.modules() if isinstance(module, MoCoV3TokenBatchNorm)]
    before = model.mocov3.backbone.encoder.layer[0].norm2
    assert use_global_statistics(model).mocov3.backbone.encoder.layer[0].norm2 is before
    assert type(before) is MoCoV3TokenBatchNorm


def test_normalization_written_out():
    """Each channel by the mean and variance over all tokens of all images, with the running average of torch."""
    norm = MoCoV3TokenBatchNorm(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6))
        norm.bias.copy_(torch.arange(5.0))
    tokens = torch.randn(3, 4, 5, dtype=torch.float64) * 3 + 1
    output = norm(tokens)
    for channel in range(5):
        values = [tokens[image, token, channel].item() for image in range(3) for token in range(4)]
        mean = sum(values) / 12
        squares = sum((value - mean) ** 2 for value in values)
        scale = (channel + 1) / (squares / 12 + 1e-5) ** 0.5
        torch.testing.assert_close(output[..., channel], (tokens[..., channel] - mean) * scale + channel)
        assert norm.running_mean[channel].item() == pytest.approx(0.1 * mean)
        assert norm.running_var[channel].item() == pytest.approx(0.9 + 0.1 * squares / 11)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("settings", [{}, {"num_hidden_layers": 1}, {"drop_path_rate": 0.5}])
def test_statistics_are_those_of_all_tokens_where_only_one_is_needed(settings):
    whole, fast = build(**settings), build(**settings)
    whole.pooled_query_only = False
    lengths = []
    fast.mocov3.backbone.encoder.layer[-1].mlp.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0]))
    results = []
    for model in (whole, fast):
        torch.manual_seed(3)
        results.append(step_of(model))
    assert_same(*results)
    assert [tokens.shape[1] for tokens in lengths] == [1, 1], "the last MLP computes the CLS token alone"


@old_names
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(use_reentrant):
    plain, checkpointed = build(), build()
    checkpointed.mocov3.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    checkpointed.mocov3.backbone.encoder.layer[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = step_of(plain)
    assert_same(step_of(checkpointed), expected)
    assert len(calls) == 4, "two views, and each once more in the backward pass"
    assert expected["mocov3.backbone.encoder.layer.0.norm2.num_batches_tracked"] == 2
    second = step_of(checkpointed)
    assert second["mocov3.backbone.encoder.layer.0.norm2.num_batches_tracked"] == 4


def test_checkpointing_counts_once_in_every_global_norm():
    norm = MoCoV3BatchNorm2d(3)
    images = torch.randn(4, 3, 2, 2, requires_grad=True)
    checkpoint(norm, images, use_reentrant=False).square().sum().backward()
    assert norm.num_batches_tracked == 1
    once = MoCoV3BatchNorm2d(3)
    once(images)
    assert torch.equal(norm.running_mean, once.running_mean)
    assert torch.equal(norm.running_var, once.running_var)


def test_each_encoder_keeps_its_own_statistics():
    model = build()
    step_of(model)
    own, momentum = (
        encoder.backbone.encoder.layer[0].norm2 for encoder in (model.mocov3, model.momentum_encoder.encoder)
    )
    assert own.num_batches_tracked == momentum.num_batches_tracked == 2
    assert not torch.equal(own.running_mean, momentum.running_mean)
    buffers = copy.deepcopy(dict(model.momentum_encoder.named_buffers()))
    weight = momentum.weight.clone()
    model.update_momentum_encoder(0.75)
    torch.testing.assert_close(momentum.weight, 0.75 * weight + 0.25 * own.weight)
    for name, buffer in model.momentum_encoder.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_features_of_an_image_do_not_depend_on_the_others(tmp_path):
    """In evaluation mode, also with the speed-up of inference, after saving and loading."""
    model = build()
    step_of(model)
    encoder = model.mocov3.eval()
    images = draw_views()[0]
    buffers = copy.deepcopy(dict(encoder.named_buffers()))
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]).pooler_output for image in images])
        encoder.backbone.pooled_query_only = True
        fast = encoder(images)
    torch.testing.assert_close(alone, together.pooler_output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.pooler_output, together.pooler_output, rtol=1e-10, atol=1e-12)
    assert fast.last_hidden_state is None
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    model.save_pretrained(tmp_path)
    loaded, info = MoCoV3ForImageClassification.from_pretrained(
        tmp_path, num_labels=3, dtype=torch.float64, output_loading_info=True
    )
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert loaded.config.backbone_config.mlp_norm == "batch_norm"
    torch.testing.assert_close(loaded.eval().mocov3(images).pooler_output, together.pooler_output)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_without_graph_breaks(checkpointing):
    """Also under checkpointing, where the compiler itself repeats the forward pass."""
    images = draw_views()[0]
    torch.compiler.reset()
    config = MoCoV3ViTConfig(**{**VIT_BN, "num_hidden_layers": 1})
    plain, compiled = MoCoV3ViTModel(config).double(), MoCoV3ViTModel(config).double()
    compiled.load_state_dict(plain.state_dict())
    if checkpointing:
        compiled._set_gradient_checkpointing(True, checkpoint_without_reentry)
    run = torch.compile(compiled, backend="aot_eager" if checkpointing else "eager", fullgraph=True)
    results = []
    for model, call in ((plain, plain), (compiled, run)):
        call(images).pooler_output.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(gradients | dict(model.named_buffers()))
    assert_same(*results)
    assert compiled.encoder.layer[0].norm2.num_batches_tracked == 1


def checkpoint_without_reentry(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


def test_weight_decay_and_lars_leave_the_norms_out():
    model = build()
    norms = {name: p for name, p in model.mocov3.named_parameters() if ".norm2." in name}
    assert len(norms) == 4
    decayed, kept = parameter_groups(model, 0.1, exclude_norms_and_biases=True)
    assert {id(p) for p in norms.values()} <= {id(p) for p in kept["params"]}
    assert not {id(p) for p in norms.values()} & {id(p) for p in decayed["params"]}
    (everything,) = parameter_groups(model, 0.1)  # of the method: all that is trained
    assert {id(p) for p in norms.values()} <= {id(p) for p in everything["params"]}
    step_of(model)
    before = {name: p.detach().clone() for name, p in norms.items()}
    LARS(model.parameters(), lr=0.5, momentum=0.0, weight_decay=0.9, trust_coefficient=0.001).step()
    for name, parameter in norms.items():
        torch.testing.assert_close(parameter, before[name] - 0.5 * parameter.grad, msg=name)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        pixel_values = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixel_values, "labels": index % 2}


@old_names
def test_fine_tuning_with_trainer(tmp_path):
    """Statistics follow the training batches, once each although activations are recomputed."""
    torch.manual_seed(0)
    model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=VIT_BN, num_labels=2))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        gradient_checkpointing=True,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())
    trainer.train()
    norm = model.mocov3.backbone.encoder.layer[-1].norm2
    assert norm.num_batches_tracked == 3
    assert not torch.equal(norm.running_mean, torch.zeros(16))
    evaluated = trainer.evaluate()["eval_loss"]
    assert norm.num_batches_tracked == 3
    trainer.save_model(tmp_path / "saved")
    loaded = MoCoV3ForImageClassification.from_pretrained(tmp_path / "saved")
    images = torch.stack([row["pixel_values"] for row in map(Images().__getitem__, range(8))])
    labels = torch.tensor([0, 1] * 4)
    assert loaded.eval()(images, labels=labels).loss.item() == pytest.approx(evaluated, rel=1e-5)


def test_patch_size_7():
    """The paper's sequence of 1,024 patches and CLS, and other image sizes by interpolation."""
    config = MoCoV3ViTConfig(
        patch_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = MoCoV3ViTModel(config).eval()
    assert model.embeddings.grid == (32, 32)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).last_hidden_state.shape == (1, 1025, 8)
        larger = torch.randn(1, 3, 238, 224)
        assert model(larger, interpolate_pos_encoding=True).last_hidden_state.shape == (1, 1 + 34 * 32, 8)
    table = model.embeddings.position_embeddings[0, 1:].unflatten(0, (32, 32))
    quarter = 10000.0 ** (-torch.arange(2) / 2)
    torch.testing.assert_close(table[5, 9, :2], (5 * quarter).sin())
    torch.testing.assert_close(table[5, 9, 6:], (9 * quarter).cos())


@pytest.mark.parametrize("mlp_norm", ["batchnorm", "BatchNorm", ""])
def test_other_names_are_refused(mlp_norm):
    with pytest.raises(Exception, match=r"mlp_norm must be one of \('layer_norm', 'batch_norm'\), got"):
        MoCoV3ViTConfig(mlp_norm=mlp_norm)
