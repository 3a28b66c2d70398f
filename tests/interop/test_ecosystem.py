"""The libraries that `docs/interop.md` lists as working: PEFT, device maps with offloading, one graph in compile."""

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForPreTraining

from mocov3_hf.interop import convert_state_dict
from tests.interop.conftest import mmpretrain_classification, official


@pytest.fixture
def classifier(tmp_path):
    model = convert_state_dict(mmpretrain_classification("vit"), num_attention_heads=2).build_model()
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.manual_seed(0))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_saves_and_merges(classifier, images, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(AutoModelForImageClassification.from_pretrained(classifier), config)
    before = model(pixel_values=images).logits.detach()
    model(pixel_values=images, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.eval()
    with torch.no_grad():
        adapted = model(pixel_values=images).logits
        assert (adapted - before).abs().max() > 1e-3
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForImageClassification.from_pretrained(classifier)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(pixel_values=images).logits, adapted, rtol=0, atol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(images).logits, adapted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_leaves_the_momentum_branch_frozen_where_it_is_excluded(tmp_path):
    peft = pytest.importorskip("peft")
    convert_state_dict(official("vit"), num_attention_heads=2).build_model().save_pretrained(tmp_path)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    for exclude, expected in ((r".*momentum_encoder.*", 0), (None, 8)):
        config = peft.LoraConfig(exclude_modules=exclude, **options)
        model = peft.get_peft_model(AutoModelForPreTraining.from_pretrained(tmp_path), config)
        momentum = [n for n, p in model.named_parameters() if p.requires_grad and "momentum_encoder" in n]
        assert len(momentum) == expected


def test_device_map_offloads_to_disk(classifier, images, tmp_path):
    whole = AutoModelForImageClassification.from_pretrained(classifier)
    offloaded = AutoModelForImageClassification.from_pretrained(
        classifier, device_map="auto", max_memory={"cpu": 90_000}, offload_folder=tmp_path / "offload"
    )
    assert {"cpu", "disk"} <= set(offloaded.hf_device_map.values())
    with torch.no_grad():
        torch.testing.assert_close(offloaded(images).logits, whole(images).logits, rtol=0, atol=0)
