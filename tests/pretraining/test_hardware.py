"""The fast step against the plain one in float64: first loss and the whole gradient; and what is chosen when."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3ViTModel
from mocov3_hf.pretraining import build, hardware
from mocov3_hf.pretraining.dry_run import describe
from mocov3_hf.pretraining.estimate import estimate
from mocov3_hf.pretraining.gradient_cache import cached_backward
from mocov3_hf.pretraining.hardware import (
    KEEP_FREED_MEMORY,
    HardwareSettings,
    choose_algorithms,
    choose_settings,
    has_glibc,
    has_tf32,
    set_up,
)
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.pretraining.step import unwrap
from mocov3_hf.reporting import UsageError
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


def choose(arguments, backbone, device="cpu"):
    recipe = load_recipe("quickstart", arguments)
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone))
    return choose_settings(recipe, model, torch.device(device))


@pytest.mark.parametrize(
    ("backbone", "precision", "chosen"),
    [
        (VIT, "no", {"attn_implementation": "sdpa"}),
        (VIT, "bf16", {"attn_implementation": "sdpa"}),
        (CONV_STEM, "no", {"attn_implementation": "sdpa", "channels_last": True}),
        (RESNET, "bf16", {"channels_last": True}),
        (DINOV2, "no", {}),
    ],
)
@pytest.mark.parametrize("glibc", [True, False])
def test_choice_on_a_cpu(monkeypatch, backbone, precision, chosen, glibc):
    monkeypatch.setattr(hardware, "has_glibc", lambda: glibc)
    assert choose(["--mixed_precision", precision], backbone) == replace(PLAIN, keep_freed_memory=glibc, **chosen)


@pytest.mark.parametrize(("capability", "precision", "tf32"), [((8, 0), "no", True), ((7, 5), "no", False)])
def test_choice_on_a_gpu(monkeypatch, capability, precision, tf32):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose(["--mixed_precision", precision], VIT, "cuda").tf32 is tf32
    bf16 = choose(["--mixed_precision", "bf16"], VIT, "cuda")
    assert bf16.tf32 is False
    assert bf16.keep_freed_memory is False
    assert bf16.deterministic is True
    assert bf16.attn_implementation == "sdpa"
    assert choose(["--deterministic", "false"], VIT, "cuda").deterministic is False
    assert has_tf32(torch.device("cuda")) is tf32


def test_what_is_asked_for_is_what_is_chosen(monkeypatch):
    monkeypatch.setattr(hardware, "has_glibc", lambda: False)
    arguments = ["--attn_implementation", "eager", "--torch_compile", "--gradient_checkpointing"]
    asked = {"attn_implementation": "eager", "torch_compile": True, "gradient_checkpointing": True}
    assert choose(arguments, VIT) == replace(PLAIN, **asked)


@pytest.mark.parametrize(
    "option",
    ["tf32", "channels_last", "in_place_relu", "views_in_one_pass", "pooled_query_only", "keep_freed_memory", "fsdp"],
)
def test_options_of_earlier_versions(option, tmp_path):
    with pytest.raises(UsageError, match=rf"^--{option} no longer exists: \w"):
        load_recipe("quickstart", [f"--{option}", "true"])
    load_recipe("quickstart", [f"--{option}", "false"])
    recipe = load_recipe("quickstart")
    recipe.save(tmp_path / "recipe.yaml")
    for value in ("null", "false", "true"):  # of a run of an earlier version
        (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text() + f"{option}: {value}\n")
        assert load_recipe(tmp_path / "recipe.yaml") == recipe
        recipe.save(tmp_path / "recipe.yaml")


class CLibrary:
    """Stands in for the C library and notes what it is asked for."""

    def __init__(self, answer=1):
        self.answer, self.asked = answer, []

    def mallopt(self, name, value):
        self.asked.append((name, value))
        return self.answer


@pytest.mark.slow
def test_the_c_library_is_asked_to_keep_memory_only_where_that_is_chosen(monkeypatch):
    library = CLibrary()
    monkeypatch.setattr(hardware, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    set_up(build_model(VIT), PLAIN)
    estimate(build_model(VIT).config, 16, 2, "adamw", "no", settings=choose([], VIT))
    assert library.asked == []
    set_up(build_model(VIT), replace(PLAIN, keep_freed_memory=True))
    assert library.asked == list(KEEP_FREED_MEMORY)


@pytest.mark.parametrize("strictly", [True, False])
def test_algorithms_are_chosen_for_the_process(monkeypatch, strictly):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_algorithms(deterministic=True, strictly=strictly)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is not strictly
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    estimate(build_model(VIT).config, 16, 2, "adamw", "no", settings=choose([], VIT))
    assert torch.are_deterministic_algorithms_enabled()  # a plan leaves the process as it is
    choose_algorithms(deterministic=False, strictly=strictly)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.slow
@torch_warns_of_itself
def test_the_model_is_found_inside_what_launchers_make_of_it():
    model = build_model(VIT)
    wrapped = nn.Module()
    wrapped.module = model  # as DDP holds it
    for outer in (model, wrapped, torch.compile(wrapped), torch.compile(model)):
        assert unwrap(outer) is model


COUNT_PAGE_FAULTS = """
import ctypes, resource
from mocov3_hf.pretraining.hardware import keep_freed_memory

def faults(size=1 << 28, times=4):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        buffer = libc.malloc(size)
        ctypes.memset(buffer, 1, size)
        libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_glibc(), reason="only glibc is asked")
def test_freed_memory_is_kept():
    """In a process of its own, which it changes: large buffers after the first ones touch no new page."""
    done = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert usual > 100
    assert kept <= usual / 10


@pytest.mark.parametrize(
    ("arguments", "backbone", "message"),
    [
        (["--gradient_checkpointing"], RESNET, "--gradient_checkpointing is not supported by the backbone 'resnet'"),
        (["--attn_implementation", "sdpa"], RESNET, "--attn_implementation is not supported by the backbone 'resnet'"),
        (["--attn_implementation", "spda"], VIT, "--attn_implementation spda"),
        (["--attn_implementation", "flash_attention_2"], VIT, "needs half precision"),
    ],
)
def test_what_cannot_be_is_refused(capsys, tmp_path, tiny, arguments, backbone, message):
    backbone = {key: value for key, value in backbone.items() if key != "image_size"}
    tiny = [*tiny, "--mixed_precision", "no"]
    tiny[tiny.index("--backbone_config") + 1] = json.dumps(backbone)
    with pytest.raises(SystemExit) as stop:
        main([*tiny, *arguments, "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_gradient_accumulation_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--recipe", "quickstart", "--gradient_accumulation_steps", "4"])
    assert stop.value.code == 2
    assert "pass --gradient_cache_chunk_size" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--gradient_cache_chunk_size.* accelerate launch sets it to 4"):
        build.check_launch({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    build.check_launch({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory():
    config = build_model(VIT).config
    settings = replace(PLAIN, attn_implementation="sdpa")
    plain, checkpointed = (
        estimate(config, 16, 32, "adamw", "bf16", settings=replace(settings, gradient_checkpointing=enabled))
        for enabled in (False, True)
    )
    assert checkpointed.activation_bytes < 0.6 * plain.activation_bytes


def test_the_plan_names_the_settings():
    text = describe(load_recipe("quickstart", ["--num_train_images", "1000", "--gradient_checkpointing"]))
    (line,) = (line for line in text.splitlines() if line.startswith("settings for "))
    assert "sdpa attention" in line
    assert line.endswith("gradient_checkpointing")


def test_a_run_keeps_the_precision_that_it_started_with(tmp_path, tiny, fresh, monkeypatch, capsys):
    """On a CPU with bfloat16, then on one without, whose choice would be float32."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    run = [*tiny, "--mixed_precision", "auto", "--output_dir", str(tmp_path), "--save_steps", "2"]
    main(run)
    assert "settings for cpu: mixed_precision bf16 (this CPU has avx512_bf16), sdpa" in capsys.readouterr().err
    assert load_recipe(tmp_path / "recipe.yaml").hardware.mixed_precision == "bf16"
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "checkpoint-4")
    fresh()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    main([*run, "--resume_from_checkpoint", "auto"])
    errors = capsys.readouterr().err
    assert "settings for cpu: mixed_precision bf16 (as in the checkpoint), sdpa" in errors
    assert errors.count("warning: ") == 1
    assert "warning: mixed_precision bf16, as in the checkpoint, is slow: this CPU has no instructions" in errors
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in again] == [json.loads(line)["loss"] for line in metrics]
    fresh()
    with pytest.raises(SystemExit):
        main([*run, "--resume_from_checkpoint", "auto", "--mixed_precision", "no"])
    assert "mixed_precision ('bf16' there, 'no' now)" in capsys.readouterr().err
    plan = describe(load_recipe("quickstart", ["--num_train_images", "1000", "--mixed_precision", "auto"]))
    assert "settings for cpu: mixed_precision no (this CPU has no instructions for bfloat16)" in plan
    assert "mixed_precision: 'no'" in plan


def test_processes_of_different_precision_are_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(build, "gather_object", lambda values: [*values, "bf16"])
    recipe = load_recipe(tiny[1], [*tiny[2:], "--output_dir", str(tmp_path)])
    with pytest.raises(UsageError, match="process 0 would use mixed_precision no and another process bf16"):
        build.build_accelerator(recipe)


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
