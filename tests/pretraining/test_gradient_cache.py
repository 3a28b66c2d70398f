"""The chunked step against the plain one, in float64."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining.estimate import estimate
from mocov3_hf.pretraining.gradient_cache import cached_backward, check_chunkable
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.step import train_step
from tests.factories import NANO_VIT
from tests.fork_server import ranks


def build(**backbone):
    torch.manual_seed(0)
    config = MoCoV3Config(backbone_config={**NANO_VIT, **backbone}, projection_dim=8, head_hidden_size=16)
    model = MoCoV3ForPreTraining(config).double()
    with torch.no_grad():  # apart, so that keys and queries differ
        for parameter in model.momentum_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def one_step(chunk_size, images=10):
    """Loss, gradient norm and weights after one step of SGD on this process's images."""
    accelerator = Accelerator(cpu=True)
    model = build()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    views = torch.randn(2, images, 3, 16, 16, generator=generator, dtype=torch.float64)
    model, optimizer = accelerator.prepare(model, optimizer)
    output = train_step(
        model,
        optimizer,
        (views[0], views[1]),
        learning_rate=1.0,
        ema_decay=0.9,
        max_grad_norm=None,
        accelerator=accelerator,
        gradient_cache_chunk_size=chunk_size,
    )
    return {
        "loss": output.loss,
        "grad_norm": output.grad_norm,
        "positive_top1": output.positive_top1,
        "weights": accelerator.unwrap_model(model).state_dict(),
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
    }


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 64])
def test_chunks_give_the_plain_step(chunk_size):
    plain, cached = one_step(None), one_step(chunk_size)
    torch.testing.assert_close(cached, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_processes_with_chunks(tmp_path):
    worker = Path(__file__).parent / "gradient_cache_worker.py"
    ranks(2, worker, str(tmp_path / "results"))
    results = torch.load(tmp_path / "results", weights_only=True)
    torch.testing.assert_close(results["cached"], results["plain"], rtol=1e-9, atol=1e-12)


def test_stochastic_depth_and_dropout_are_replayed():
    """The gradient pass must use the masks of the feature pass: compared with one graph over all chunks."""
    settings = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}
    views = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for chunked in (True, False):
        model = build(**settings)
        torch.manual_seed(5)
        if chunked:
            loss = cached_backward(model, (views[0], views[1]), 2, Accelerator(cpu=True)).loss
        else:
            features = [torch.cat([model.encode(model.mocov3, (c,))[0] for c in pixels.split(2)]) for pixels in views]
            with torch.no_grad():
                keys = [torch.cat([model.momentum_features((c,))[0] for c in pixels.split(2)]) for pixels in views]
            loss = model.contrast(*features, *keys).loss
            loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-13)
    again = build(**settings)
    torch.manual_seed(6)
    other = cached_backward(again, (views[0], views[1]), 2, Accelerator(cpu=True)).loss
    assert not torch.equal(other, gradients[0][0]), "without random masks there is nothing to replay"


@pytest.mark.parametrize(
    "backbone",
    [
        {"model_type": "resnet"},
        {**NANO_VIT, "stem": "conv", "patch_size": 16},
        {**NANO_VIT, "mlp_norm": "batch_norm"},
    ],
)
def test_batch_normalization_in_the_backbone_is_refused(backbone):
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone))
    with pytest.raises(ValueError, match="normalize a chunk by its own statistics"):
        check_chunkable(model)


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_refusal_on_the_command_line(dry_run, tmp_path, tiny, capsys):
    resnet = '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}'
    chunks = ["--backbone_config", resnet, "--gradient_cache_chunk_size", "4"]
    with pytest.raises(SystemExit) as stop:
        main([*tiny, *chunks, *dry_run, "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "error: --gradient_cache_chunk_size cannot be used with" in capsys.readouterr().err


@pytest.mark.slow
def test_vit_small_with_4096_images_fits_80_gb():
    backbone = {"model_type": "mocov3_vit", "hidden_size": 384, "intermediate_size": 1536}
    config = MoCoV3Config(backbone_config=backbone)
    cached = estimate(config, 224, 4096, "adamw", "bf16", chunk_size=256)
    plain = estimate(config, 224, 4096, "adamw", "bf16")
    assert cached.memory_bytes < 20 * 2**30
    assert plain.activation_bytes > 20 * cached.activation_bytes
    # The backbone's share does not grow with the batch; at a small batch it is all there is.
    small = estimate(config, 224, 256, "adamw", "bf16", chunk_size=256)
    half = estimate(config, 224, 512, "adamw", "bf16", chunk_size=256)
    assert small.activation_bytes == half.activation_bytes
