"""Runs on a GPU: no waiting for the device, bit-identical resumed runs, and what is compiled."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mocov3_hf.data.views import draw_view, two_views
from mocov3_hf.pretraining.hardware import choose_settings, compile_augmentation, set_up
from mocov3_hf.pretraining.instability import GradientWatch
from mocov3_hf.pretraining.pixels import build_photometric
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.pretraining.step import train_step
from tests.pretraining.test_hardware import RESNET, VIT, build_model


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Large enough for the kernels that real models get: heads of 64, a sequence of 65 tokens.
LARGER_VIT = {**VIT, "patch_size": 4, "hidden_size": 128, "intermediate_size": 256}
LARGER_RESNET = {**RESNET, "embedding_size": 64, "hidden_sizes": [64, 128]}
LARS = ["--optimizer", "lars", "--base_learning_rate", "0.3"]


@pytest.mark.parametrize(("backbone", "chunk_size"), [(VIT, None), (VIT, 4), (RESNET, None)])
def test_a_step_never_waits_for_the_device(backbone, chunk_size):
    recipe = load_recipe("quickstart", ["--mixed_precision", "bf16"])
    accelerator = Accelerator(mixed_precision="bf16")
    model = build_model(backbone).float()
    set_up(model, choose_settings(recipe, model, accelerator.device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, fused=True))
    watch = GradientWatch(model)
    size = backbone.get("image_size", 32)
    views = torch.randn(2, 8, 3, size, size, device=accelerator.device)
    for mode in ("default", "error"):  # the first step of all sets up streams and handles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train_step(
                model,
                optimizer,
                (views[0], views[1]),
                learning_rate=1e-3,
                ema_decay=0.9,
                max_grad_norm=1.0,
                accelerator=accelerator,
                gradient_cache_chunk_size=chunk_size,
                watch=watch,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize(
    ("backbone", "arguments"), [(LARGER_VIT, []), (LARGER_VIT, ["--cache_images_on_device"]), (LARGER_RESNET, LARS)]
)
def test_resumed_runs_are_bit_identical(tmp_path, tiny, fresh, backbone, arguments, compiled):
    backbone = {key: value for key, value in backbone.items() if key != "image_size"}
    run = [
        *tiny,
        *arguments,
        *("--backbone_config", json.dumps(backbone), "--image_size", "32", "--save_steps", "2"),
        *("--torch_compile", compiled, "--mixed_precision", "bf16"),
    ]
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


@pytest.mark.parametrize("backbone", [LARGER_VIT, LARGER_RESNET])
def test_the_compiled_step_has_the_same_loss_and_gradient(fresh, backbone):
    losses, gradients = [], []
    for compiled in ("false", "true"):
        fresh()
        recipe = load_recipe("quickstart", ["--mixed_precision", "no", "--torch_compile", compiled])
        model = build_model(backbone).cuda()
        set_up(model, choose_settings(recipe, model, torch.device("cuda")))
        size = backbone.get("image_size", 32)
        views = torch.randn(2, 8, 3, size, size, generator=torch.Generator().manual_seed(1)).double().cuda()
        loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-8 * gradients[0].norm()


def test_the_compiled_augmentation_makes_the_same_images():
    recipe = load_recipe("quickstart", ["--torch_compile", "--image_size", "64"])
    device = torch.device("cuda")
    choice = choose_settings(recipe, build_model(VIT), device)
    pixels = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8, device=device)
    for settings in two_views(image_size=64):
        parameters = draw_view(settings, 0, 0, torch.arange(16), 0).parameters.to(device)
        expected = build_photometric(recipe, device)(pixels, parameters)
        compiled = build_photometric(recipe, device)
        compile_augmentation(compiled, choice, device)
        torch.testing.assert_close(compiled(pixels, parameters), expected, rtol=1e-4, atol=1e-4)
