"""The fast step against the plain one in float64: first loss and the whole gradient; and resumed runs."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3ViTModel
from mocov3_hf.pretraining.estimate import estimate
from mocov3_hf.pretraining.gradient_cache import cached_backward
from mocov3_hf.pretraining.hardware import (
    HardwareSettings,
    set_up,
)
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.step import unwrap
from tests.factories import NANO_VIT


VIT = {**NANO_VIT, "num_hidden_layers": 3}
CONV_STEM = {**VIT, "stem": "conv", "patch_size": 16, "image_size": 32}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DINOV2 = {**VIT, "model_type": "dinov2", "num_hidden_layers": 2}
del DINOV2["intermediate_size"]
PLAIN = HardwareSettings(
    attn_implementation=None,
    tf32=False,
    channels_last=False,
    keep_freed_memory=False,
    deterministic=False,
    torch_compile=False,
    gradient_checkpointing=False,
)
ALL = {"attn_implementation": "sdpa", "gradient_checkpointing": True, "channels_last": True}


def build_model(backbone, **overrides):
    torch.manual_seed(0)
    config = MoCoV3Config(backbone_config={**backbone, **overrides}, projection_dim=8, head_hidden_size=16)
    model = MoCoV3ForPreTraining(config).double()
    if backbone["model_type"] != "resnet":
        model.set_attn_implementation("eager")
    with torch.no_grad():  # apart, so that keys and queries differ
        for parameter in model.momentum_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def first_step(backbone, switches, chunk_size=None, pooled_query_only=True, **overrides):
    """Loss and the whole gradient as one vector."""
    model = build_model(backbone, **overrides)
    model.pooled_query_only = pooled_query_only
    set_up(model, replace(PLAIN, **switches))
    return step_of(model, backbone.get("image_size", 32), chunk_size)


def plain_step(backbone, **overrides):
    return first_step(backbone, {}, pooled_query_only=False, **overrides)


def step_of(model, size, chunk_size):
    model.zero_grad()
    views = torch.randn(2, 6, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(2)
    if chunk_size is None:
        output = model(pixel_values=views[0], pixel_values_2=views[1])
        output.loss.backward()
    else:
        output = cached_backward(model, (views[0], views[1]), chunk_size, Accelerator(cpu=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output.loss.detach(), torch.cat([parameter.grad.flatten() for parameter in trained])


def assert_same_step(fast, plain):
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-10, atol=0)
    assert plain[1].norm() > 0
    assert (fast[1] - plain[1]).norm() <= 1e-10 * plain[1].norm()


@pytest.mark.parametrize("switch", ["none", *ALL, "all"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_vit(switch, chunk_size):
    switches = {"all": ALL, "none": {}}.get(switch) if switch in ("all", "none") else {switch: ALL[switch]}
    assert_same_step(first_step(VIT, switches, chunk_size), plain_step(VIT))


@pytest.mark.parametrize(
    ("backbone", "switches"),
    [
        (RESNET, {"channels_last": True}),
        (CONV_STEM, {"channels_last": True}),
        (CONV_STEM, {"channels_last": True, "gradient_checkpointing": True}),
        (DINOV2, {"attn_implementation": "sdpa", "gradient_checkpointing": True}),
    ],
)
def test_other_backbones(backbone, switches):
    assert_same_step(first_step(backbone, switches), plain_step(backbone))


@pytest.mark.parametrize("switches", [{}, {"gradient_checkpointing": True}, {"channels_last": True}])
def test_stochastic_depth_draws_the_same(switches):
    plain = plain_step(VIT, drop_path_rate=0.5)
    assert_same_step(first_step(VIT, switches, drop_path_rate=0.5), plain)
    assert not torch.equal(plain_step(VIT)[0], plain[0]), "nothing was dropped"


# torch 2.11 warns of its own code when it compiles.
torch_warns_of_itself = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@torch_warns_of_itself
def test_compiled():
    """The trained encoder alone, as compilation is slow; dropout must draw the same numbers."""
    torch.compiler.reset()
    settings = {"hidden_dropout_prob": 0.3, "num_hidden_layers": 1}
    model = build_model(VIT, **settings)
    set_up(model, replace(PLAIN, torch_compile=True))
    model.momentum_encoder.encoder._compiled_call_impl = None
    assert_same_step(step_of(model, 16, None), first_step(VIT, {}, **settings))


@pytest.mark.slow
@torch_warns_of_itself
def test_compilation_has_no_graph_breaks_and_leaves_the_names_alone():
    model = build_model(VIT)
    names = list(model.state_dict())
    model.mocov3.backbone.pooled_query_only = True
    explanation = torch._dynamo.explain(model.mocov3)(torch.randn(2, 3, 16, 16).double())
    assert explanation.graph_break_count == 0
    set_up(model, replace(PLAIN, torch_compile=True))
    assert list(model.state_dict()) == names
    assert Accelerator(cpu=True).unwrap_model(model) is model
    model.update_momentum_encoder(0.5)


def test_pooled_query_only_returns_the_pooled_vector_and_nothing_that_differs():
    model = MoCoV3ViTModel(build_model(VIT).config.backbone_config).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    whole = model(images)
    expected = {asked: model(images, **{asked: True}) for asked in ("output_hidden_states", "output_attentions")}
    model.pooled_query_only = True
    pooled = model(images)
    torch.testing.assert_close(pooled.pooler_output, whole.pooler_output, rtol=1e-12, atol=1e-14)
    assert pooled.last_hidden_state is None
    for asked, output in expected.items():
        torch.testing.assert_close(dict(model(images, **{asked: True})), dict(output), rtol=0, atol=0)
    model.config.output_hidden_states = True
    assert model(images).hidden_states[-1].shape == (2, 5, 16)


def test_pretraining_outputs_what_is_asked_for():
    """Hidden states and attention weights are complete, although the last block computes a single token."""
    views = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    plain, fast = build_model(VIT), build_model(VIT)
    plain.pooled_query_only = False
    for asked in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        outputs = [model(views[0], views[1], **asked) for model in (plain, fast)]
        torch.testing.assert_close(dict(outputs[0]), dict(outputs[1]), rtol=1e-10, atol=1e-12)
        assert set(outputs[1]) >= {name.removeprefix("output_") for name in asked}
    one_view = [model.eval()(views[0], output_hidden_states=True) for model in (plain, fast)]
    torch.testing.assert_close(dict(one_view[0]), dict(one_view[1]), rtol=1e-10, atol=1e-12)
    assert [state.shape for state in one_view[1].hidden_states] == [(4, 5, 16)] * 4


@pytest.mark.slow
@torch_warns_of_itself
def test_the_model_is_found_inside_what_launchers_make_of_it():
    model = build_model(VIT)
    wrapped = nn.Module()
    wrapped.module = model  # as DDP holds it
    for outer in (model, wrapped, torch.compile(wrapped), torch.compile(model)):
        assert unwrap(outer) is model


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory():
    config = build_model(VIT).config
    settings = replace(PLAIN, attn_implementation="sdpa")
    plain, checkpointed = (
        estimate(config, 16, 32, "adamw", "bf16", settings=replace(settings, gradient_checkpointing=enabled))
        for enabled in (False, True)
    )
    assert checkpointed.activation_bytes < 0.6 * plain.activation_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        (RESNET, ["--optimizer", "lars", "--base_learning_rate", "0.3"]),
        (CONV_STEM, ["--optimizer", "adamw"]),
        (VIT, ["--gradient_checkpointing"]),
    ],
)
def test_resumed_runs_are_bit_identical(tmp_path, tiny, fresh, backbone, arguments):
    """Weights in channels_last are saved and loaded like others, and so is their optimizer state."""
    backbone = {key: value for key, value in backbone.items() if key != "image_size"}
    run = [*tiny, *arguments, "--backbone_config", json.dumps(backbone), "--image_size", "32", "--save_steps", "2"]
    for name in ("whole", "resumed"):
        fresh()
        main([*run, "--output_dir", str(tmp_path / name)])
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    fresh()
    main([*run, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "auto"])
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, resumed = (load_file(tmp_path / name / "checkpoint-4" / file) for name in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), key
