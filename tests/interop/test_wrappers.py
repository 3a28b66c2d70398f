"""Layouts of other codebases inside the wrappers of launchers, EMAs and compilers, and parts of them."""

import pytest
import torch

from mocov3_hf.interop import ConversionError, convert_state_dict, revert_state_dict
from mocov3_hf.interop.files import read_checkpoint
from tests.interop.conftest import OVERRIDES, encoder_of, mmpretrain_pretraining, official, solo_learn


WRAPPERS = {
    "torch.compile": lambda s: {f"_orig_mod.{key}": value for key, value in s.items()},
    "DDP and torch.compile": lambda s: {f"module._orig_mod.{key}": value for key, value in s.items()},
    "torch.compile of a part": lambda s: {key.replace(".", "._orig_mod.", 1): value for key, value in s.items()},
    "Lightning": lambda s: {f"model.{key}": value for key, value in s.items()},
    "AveragedModel": lambda s: {f"module.{key}": value for key, value in s.items()} | {"n_averaged": torch.tensor(9)},
    "EMA of DDP": lambda s: {f"module.module.{key}": value for key, value in s.items()} | {"steps": torch.tensor(9)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper):
    plain = convert_state_dict(official("vit"), num_attention_heads=2)
    wrapped = convert_state_dict(WRAPPERS[wrapper](official("vit")), num_attention_heads=2)
    assert wrapped.state_dict.keys() == plain.state_dict.keys()
    assert all(torch.equal(wrapped.state_dict[key], value) for key, value in plain.state_dict.items())
    both = official("vit") | WRAPPERS["torch.compile"](official("vit"))
    with pytest.raises(ConversionError, match="appears twice, with and without a prefix"):
        convert_state_dict(both, num_attention_heads=2)


@pytest.mark.slow
def test_solo_learn_converts_as_the_official_file_does(body):
    converted = convert_state_dict(solo_learn(body), **OVERRIDES[body])
    plain = convert_state_dict(official(body), **OVERRIDES[body])
    assert (converted.layout, converted.ignored) == (
        "solo_learn_pretraining",
        ("classifier.weight", "classifier.bias"),
    )
    assert converted.config.to_dict() == plain.config.to_dict()
    assert all(torch.equal(converted.state_dict[key], value) for key, value in plain.state_dict.items())
    back = revert_state_dict(plain.state_dict, plain.config, layout="solo_learn_pretraining")
    assert back.keys() == solo_learn(body).keys() - set(converted.ignored)


def test_encoders_of_solo_learn_convert(body):
    plain = convert_state_dict(encoder_of(official(body), body), **OVERRIDES[body])
    backbone = {key: value for key, value in solo_learn(body).items() if key.startswith("backbone.")}
    found = convert_state_dict(backbone, **OVERRIDES[body])
    assert all(torch.equal(found.state_dict[key], value) for key, value in plain.state_dict.items())
    linear = backbone | {key: value for key, value in solo_learn(body).items() if key.startswith("classifier.")}
    assert convert_state_dict(linear, **OVERRIDES[body]).config.num_labels == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "prefix", "layout"),
    [
        (official, ("momentum_encoder.",), "official_momentum"),
        (mmpretrain_pretraining, ("momentum_encoder.",), "mmpretrain_momentum"),
        (solo_learn, ("momentum_backbone.", "momentum_projector."), "solo_learn_momentum"),
    ],
)
def test_the_momentum_encoder_alone_becomes_an_encoder(make, prefix, layout, body):
    alone = {key: value for key, value in make(body).items() if key.startswith(prefix)}
    converted = convert_state_dict(alone, **OVERRIDES[body])
    assert converted.layout == layout
    whole = convert_state_dict(official(body), **OVERRIDES[body]).state_dict
    assert converted.state_dict
    for key, value in converted.state_dict.items():
        assert torch.equal(whole[f"momentum_encoder.encoder.{key}"], value)
    assert len(converted.state_dict) + len(converted.ignored) >= len(alone)  # q, k and v were one


@pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict"])
def test_the_ema_is_used_where_there_is_nothing_else(entry, tmp_path):
    torch.save({entry: official("vit"), "epoch": 4}, tmp_path / "ema.pth")
    assert read_checkpoint(tmp_path / "ema.pth").entry == entry
    torch.save({entry: official("vit"), "state_dict": official("vit")}, tmp_path / "both.pth")
    assert read_checkpoint(tmp_path / "both.pth").entry == "state_dict"
