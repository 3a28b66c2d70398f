"""Every decoder on every kind of backbone: what works, works whole; what cannot work is refused with the reason."""

import pytest
import torch

from mocov3_hf import MoCoV3Backbone, MoCoV3Config, MoCoV3ForPreTraining, dense
from mocov3_hf.loading import quiet_transformers
from tests.dense.matrix import BACKBONES, CASES, DECODERS, PAGE, SIZE, with_tables


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A folder of pre-training for each kind of backbone."""
    folders = {}
    for kind, (backbone, _) in BACKBONES.items():
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp("encoder")
        config = MoCoV3Config(
            backbone_config=dict(backbone), head_hidden_size=16, projection_dim=8, zero_init_residual=False
        )
        MoCoV3ForPreTraining(config).save_pretrained(folders[kind])
    return folders


def build(name, kind, folder):
    decoder, (_, options) = DECODERS[name], BACKBONES[kind]
    if kind == "ResNet" and "reshape_hidden_states" in decoder.options:
        with pytest.raises(ValueError, match="returns the tokens of a ViT, and a resnet backbone has maps"):
            dense.backbone_config(folder, **decoder.options)
    config = dense.backbone_config(folder, **options, **decoder.options_of.get(kind, decoder.options))
    if decoder.num_channels != 3:
        config.backbone_config.num_channels = decoder.num_channels
        config.backbone_config.freeze_patch_projection = False
    torch.manual_seed(1)
    with quiet_transformers():  # MaskFormer warns about every backbone but ResNet and Swin
        return decoder.model_class(decoder.config(config, MoCoV3Backbone(config).channels))


def images(decoder, height, width):
    return torch.randn(2, decoder.num_channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_decoder_on_backbone(name, kind, encoders, tmp_path, capsys):
    decoder, folder = DECODERS[name], encoders[kind]
    model = build(name, kind, folder)
    if kind in decoder.refused:
        with pytest.raises(ValueError, match=decoder.refused[kind]):
            dense.load_backbone(model, folder)
        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"[Ss]izes of tensors|shape|unpack|NoneType"):
            model(pixel_values=images(decoder, SIZE, SIZE))
        return
    backbone = dense.load_backbone(model, folder)
    assert f"weights of '{folder}' (pretraining, " in capsys.readouterr().out

    outputs = model.train()(pixel_values=images(decoder, SIZE, SIZE), **decoder.targets(SIZE, SIZE))
    loss = outputs[decoder.output].square().mean() if getattr(outputs, "loss", None) is None else outputs.loss
    loss.backward()
    gradients = {name: value.grad for name, value in backbone.named_parameters() if value.grad is not None}
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    # From the end of the encoder to its beginning, and in every level of the pyramid.
    inner = backbone.mocov3.backbone
    last = inner.encoder.stages[2 if name == "ViTMatte" else 3] if kind == "ResNet" else inner.encoder.layer[-1]
    first = inner.embedder if kind == "ResNet" else inner.encoder.layer[0]
    for part in (first, last, *getattr(backbone, "fpn", {}).values()):
        assert all(parameter.grad.any() for parameter in part.parameters() if parameter.dim() > 1)

    model.eval().save_pretrained(tmp_path)
    with quiet_transformers():
        loaded = decoder.model_class.from_pretrained(tmp_path).eval()
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    for height, width in ((SIZE, SIZE), *decoder.sizes):
        batch = images(decoder, height, width)
        with torch.no_grad():
            expected, found = model(batch)[decoder.output], loaded(batch)[decoder.output]
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected)  # the memory of loaded weights is aligned differently
        if name in ("UperNet", "ViTMatte"):
            assert expected.shape[-2:] == (height, width)


def test_the_page_has_these_tables():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run python -m tests.dense.matrix"
