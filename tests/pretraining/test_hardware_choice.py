"""Which settings are chosen on which hardware, what is refused, and what a plan says."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining import build, hardware
from mocov3_hf.pretraining.dry_run import describe
from mocov3_hf.pretraining.estimate import estimate
from mocov3_hf.pretraining.hardware import (
    KEEP_FREED_MEMORY,
    choose_algorithms,
    choose_settings,
    has_glibc,
    has_tf32,
    set_up,
)
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.reporting import UsageError
from tests.pretraining.test_hardware import CONV_STEM, DINOV2, PLAIN, RESNET, VIT, build_model


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
