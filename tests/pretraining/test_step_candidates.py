"""The candidates for a faster step against the plain step: loss, gradient, EMA, running statistics, random numbers.

On a CPU all of them compute the plain step to the last digit. torch.compile uses backends that compile in seconds; its
options are checked without being used. Kernels, graphs and streams are compared on a GPU.
"""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from mocov3_hf.data.views import draw_view, two_views
from mocov3_hf.pretraining import candidates, loop
from mocov3_hf.pretraining.candidates import CUDNN_ATTENTION, one_batch_ahead
from mocov3_hf.pretraining.gradient_cache import cached_backward
from mocov3_hf.pretraining.hardware import choose_settings, set_up
from mocov3_hf.pretraining.pixels import build_photometric
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.pretraining.step import train_step
from tests.pretraining.test_hardware import PLAIN, RESNET, VIT, build_model


# With random numbers in the forward pass.
VIT = {**VIT, "num_hidden_layers": 2, "hidden_dropout_prob": 0.2}
BACKBONES = {"vit": VIT, "resnet": RESNET}
COMPILED = {
    "cuda_graphs": {"torch_compile": True, "cuda_graphs": True},
    "max_autotune": {"torch_compile": True, "max_autotune": True},
    "compile_regions": {"torch_compile": True, "compile_regions": True},
}
UNCOMPILED = {
    "cudnn_attention": {"attn_implementation": CUDNN_ATTENTION},
    "momentum_low_precision": {"momentum_low_precision": True},
    "momentum_inference_mode": {"momentum_inference_mode": True},
}
TOGETHER = COMPILED["cuda_graphs"] | COMPILED["max_autotune"] | dict.fromkeys(list(UNCOMPILED)[1:], True)


# torch looks at the gradients of all inputs of a compiled block.
torch_warns_of_itself = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def compile_with(monkeypatch):
    """Choose the backend of torch.compile. Options that its usual one does not have are still refused."""
    original = nn.Module.compile

    def choose(backend):
        def compile_module(module, *, options, **arguments):
            torch._TorchCompileInductorWrapper(mode=None, options=options, dynamic=False)
            original(module, backend=backend, **arguments)

        monkeypatch.setattr(nn.Module, "compile", compile_module)

    torch.compiler.reset()
    yield choose
    torch.compiler.reset()


def steps(backbone, changes, mixed_precision="bf16", chunk_size=None, number=2, device="cpu"):
    """Loss, gradient norms, keys and the next random number of every step; weights and statistics at the end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    model = build_model(backbone).float()
    set_up(model, replace(PLAIN, **changes))
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    size, found = backbone.get("image_size", 32), []
    views = torch.randn(2, 6, 3, size, size, generator=torch.Generator().manual_seed(1)).to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for step in range(number):
        torch.manual_seed(step)
        output = train_step(
            model,
            optimizer,
            (views[0], views[1]),
            learning_rate=0.1,
            ema_decay=0.9,
            max_grad_norm=1.0,
            accelerator=accelerator,
            gradient_cache_chunk_size=chunk_size,
        )
        found.append([output.loss, output.grad_norm, output.block_grad_norms, output.projection, torch.rand(())])
    return found, dict(accelerator.unwrap_model(model).state_dict())


@cache
def plain_steps(name, attention=None, **arguments):
    return steps(BACKBONES[name], {"attn_implementation": attention}, **arguments)


def assert_equal(found, expected, rtol=0, atol=0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("backbone", "name"),
    [("vit", name) for name in UNCOMPILED]
    + [("resnet", "momentum_low_precision"), ("resnet", "momentum_inference_mode")]
    + [pytest.param("vit", name, marks=pytest.mark.slow) for name in ("cuda_graphs", "compile_regions")],
)
@torch_warns_of_itself
def test_the_step_is_the_plain_one(compile_with, backbone, name):
    compile_with("eager")
    changes = (COMPILED | UNCOMPILED)[name]
    attention = "sdpa" if name == "cudnn_attention" else None
    assert_equal(steps(BACKBONES[backbone], changes), plain_steps(backbone, attention))


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_the_gradient_cache_with_the_candidates_of_the_momentum_encoder(mixed_precision):
    arguments = {"mixed_precision": mixed_precision, "chunk_size": 4}
    changes = dict.fromkeys(list(UNCOMPILED)[1:], True)
    assert_equal(steps(VIT, changes, **arguments), plain_steps("vit", **arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "chunk_size", "mixed_precision"), [("vit", 3, "bf16"), ("resnet", None, "no")])
def test_all_together(compile_with, backbone, chunk_size, mixed_precision):
    """
    With autograd's half of the compiler, which decides what is saved for the backward pass. Compiled, autocast casts
    weights once per view, so that in bfloat16 the gradients of two views have other sums than without compilation; not
    with the gradient cache, which leaves autocast after every chunk.
    """
    compile_with("aot_eager")
    attention = {"vit": CUDNN_ATTENTION, "resnet": None}[backbone]
    arguments = {"chunk_size": chunk_size, "mixed_precision": mixed_precision}
    plain = plain_steps(backbone, attention and "sdpa", **arguments)
    assert_equal(steps(BACKBONES[backbone], TOGETHER | {"attn_implementation": attention}, **arguments), plain)


def test_options_of_the_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **arguments: asked.append((type(module).__name__, arguments))
    )
    for changes in ({}, *({name: True} for name in COMPILED)):
        set_up(build_model(VIT), replace(PLAIN, torch_compile=True, **changes))
    names = [name for name, _ in asked]
    assert names[:6] == ["MoCoV3Model"] * 6
    assert names.count("MoCoV3ViTLayer") == 2 * 2
    usual = {"fallback_random": True, "deterministic": False}
    tuned = usual | {"max_autotune": True, "coordinate_descent_tuning": True}
    graphs = usual | {"triton.cudagraphs": True}
    assert [arguments["options"] for _, arguments in asked[:6:2]] == [usual, graphs, tuned]
    assert all(arguments == {"dynamic": False, "options": usual} for _, arguments in asked[6:])


@pytest.mark.parametrize("is_candidate", [True, False])
def test_features_outlive_the_next_replay(monkeypatch, is_candidate):
    """Graphs write their output to the same place every time, as here; without copies the gradient cache is wrong."""

    def replay(module, **_):
        buffer = torch.empty(3, 16)

        def call(*arguments, **values):
            output = module._call_impl(*arguments, **values)
            if not torch.is_grad_enabled():
                output.pooler_output = buffer.copy_(output.pooler_output)
            return output

        module._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", replay)
    changes = {"torch_compile": True, "cuda_graphs": is_candidate}
    arguments = {"mixed_precision": "no", "chunk_size": 3}
    found, plain = steps(VIT, changes, **arguments), plain_steps("vit", **arguments)
    if is_candidate:
        assert_equal(found, plain)
    else:
        assert not torch.equal(found[0][0][0], plain[0][0][0])


def test_kernels_of_attention(monkeypatch):
    used = []
    monkeypatch.setattr(candidates, "sdpa_attention_forward", lambda *_: used.append(kernels()))

    def kernels():
        return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)

    before = kernels()
    candidates.cudnn_attention_forward()
    assert used == [candidates.KERNELS]
    assert kernels() == before


def test_low_precision_weights_are_what_the_momentum_encoder_computes_with():
    """float32 weights stay where they are saved and updated; copies follow them, and only then are made again."""
    model = build_model(VIT).float()
    encoder, seen, copied = model.momentum_encoder.encoder, [], []
    weight = encoder.backbone.encoder.layer[0].mlp.fc1.weight
    names, masters = list(model.state_dict()), list(model.parameters())
    set_up(model, replace(PLAIN, momentum_low_precision=True))
    layer = encoder.backbone.encoder.layer[0].mlp.fc1
    layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight))
    views = torch.randn(2, 2, 3, 16, 16).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        for change in (None, 0.5, None):
            if change is not None:
                model.update_momentum_encoder(change)
            model.momentum_features(views)
            assert torch.equal(seen[-1], weight.to(torch.bfloat16))
            copied.append(seen[-1]._version)
    assert {each.dtype for each in seen} == {torch.bfloat16}
    assert copied[0] < copied[1] == copied[2]
    model.momentum_features(views)
    assert seen[-1] is weight
    layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError):
        model.momentum_features(views)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), masters, strict=True))


def test_autograd_does_not_see_tensors_of_inference_mode():
    """They cannot be saved for a backward pass. Those that are come from the projector, outside of it."""
    model = build_model(VIT)
    set_up(model, replace(PLAIN, momentum_inference_mode=True))
    views = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64).unbind()
    features = model.momentum_features(views)
    assert all(each.is_inference() for each in features)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        features[0] * torch.ones(16, requires_grad=True)
    for run in (
        lambda: model(*views).loss.backward(),
        lambda: cached_backward(model, views, 3, Accelerator(cpu=True)),
    ):
        run()
    assert not model(*views).projection.is_inference()


def test_one_batch_is_made_ahead():
    events = []

    def loaded():
        for number in range(3):
            events.append(f"load {number}")
            yield number

    def augment(batch):
        events.append(f"augment {batch}")
        return batch, batch

    for views in one_batch_ahead(augment, loaded(), torch.device("cpu")):
        events.append(f"step {views[0]}")
    assert " ".join(event.replace(" ", "") for event in events) == (
        "load0 augment0 load1 augment1 step0 load2 augment2 step1 step2"
    )
    assert list(one_batch_ahead(augment, [], torch.device("cpu"))) == []


def test_runs_with_prefetched_views_are_the_same_and_resume(tmp_path, tiny, fresh, monkeypatch):
    """With the candidates of the momentum encoder, whose checkpoints hold its own weights."""
    run = [*tiny, "--mixed_precision", "bf16", "--save_steps", "2"]
    changes = dict.fromkeys(("prefetch_views", *list(UNCOMPILED)[1:]), True)
    main([*run, "--output_dir", str(tmp_path / "plain")])
    monkeypatch.setattr(loop, "choose_settings", lambda *arguments: replace(choose_settings(*arguments), **changes))
    fresh()
    main([*run, "--output_dir", str(tmp_path / "changed")])
    shutil.copytree(tmp_path / "changed", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    fresh()
    main([*run, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "auto"])
    for name in ("changed", "resumed"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            found, plain = (load_file(tmp_path / each / "checkpoint-4" / file) for each in (name, "plain"))
            assert_equal(found, plain)
        found, plain = (
            [json.loads(line)["loss"] for line in (tmp_path / each / "metrics.jsonl").read_text().splitlines()]
            for each in (name, "plain")
        )
        assert found == plain


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# One block with heads of 64 and 65 tokens, and a ResNet of two.
LARGER = {
    "vit": {**VIT, "patch_size": 2, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1},
    "resnet": {**RESNET, "embedding_size": 64, "hidden_sizes": [64, 128]},
}
ON_GPUS = {
    # Changed fields, the fields of the step to compare with, and the largest relative difference of loss and norm.
    "cuda_graphs": (COMPILED["cuda_graphs"], {"torch_compile": True}, 0),
    "momentum": ({"momentum_low_precision": True, "momentum_inference_mode": True}, {}, 0),
    "compile_regions": (COMPILED["compile_regions"], {"torch_compile": True}, 2e-2),
    "cudnn_attention": (UNCOMPILED["cudnn_attention"], {"attn_implementation": "sdpa"}, 2e-2),
    # Without deterministic algorithms, as they would be chosen.
    "together": (TOGETHER | {"deterministic": False}, {"torch_compile": True}, 2e-2),
}


@pytest.mark.parametrize(
    ("backbone", "name", "chunk_size"),
    [
        pytest.param(backbone, name, chunk_size, marks=[*needs_gpu, *([pytest.mark.slow] if is_slow else [])])
        for backbone, name, chunk_size, is_slow in (
            ("vit", "cuda_graphs", None, False),
            ("vit", "cuda_graphs", 3, False),
            ("vit", "momentum", None, False),
            ("vit", "cudnn_attention", None, False),
            ("resnet", "cuda_graphs", None, True),
            ("resnet", "momentum", None, True),
            ("vit", "compile_regions", None, True),
            ("vit", "together", None, True),
            ("resnet", "together", None, True),
        )
    ],
)
def test_the_step_on_a_gpu(backbone, name, chunk_size):
    """Enough steps for graphs to be recorded and replayed. bfloat16 has 8 significant bits."""
    changes, usual, largest = ON_GPUS[name]
    arguments = {"chunk_size": chunk_size, "number": 5, "device": "cuda"}
    expected, weights = steps(LARGER[backbone], {"deterministic": True, **usual}, **arguments)
    found, changed_weights = steps(LARGER[backbone], {"deterministic": True, **changes}, **arguments)
    for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(found, expected, strict=True):
        assert_equal(loss, expected_loss, rtol=largest)
        assert_equal(norm, expected_norm, rtol=5 * largest)
    if largest == 0:
        assert_equal((found, changed_weights), (expected, weights))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetched_views_on_a_gpu():
    """Beside matrix products that keep the GPU busy, with the memory of earlier views in use again."""
    device, recipe = torch.device("cuda"), load_recipe("quickstart", ["--image_size", "64"])
    stage, settings = build_photometric(recipe, device), two_views(image_size=64)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(256, (2, 32, 3, 64, 64), dtype=torch.uint8, generator=generator).pin_memory(),
            torch.stack([draw_view(view, 0, 0, torch.arange(32), n).parameters for n, view in enumerate(settings)]),
        )
        for _ in range(8)
    ]
    matrix = torch.randn(4096, 4096, device=device)

    def augment(batch):
        pixels, parameters = (values.to(device, non_blocking=True) for values in batch)
        return stage(pixels[0], parameters[0]), stage(pixels[1], parameters[1])

    def train(views_of_all):
        found = []
        for views in views_of_all:
            busy = matrix @ matrix @ matrix
            found.append(torch.stack([view.double().square().sum() for view in views]) + 0 * busy[0, 0])
        return torch.stack(found)

    assert_equal(train(one_batch_ahead(augment, batches, device)), train(map(augment, batches)))
