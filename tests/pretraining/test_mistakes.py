"""Mistakes of users: one line that names the thing, what was expected and the fix, before any work is done."""

import re

import pytest
import torch

from mocov3_hf import MoCoV3Config
from mocov3_hf.precision import this_device
from mocov3_hf.pretraining import build
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.reporting import UsageError


def error_of(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.rstrip("\n").splitlines()[-1]  # progress of reading the data may stand above
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dataset_name is missing: pass a folder of images or a Hub id"),
        (["--output_dir", "{tmp}"], "--dataset_name is missing: pass a folder of images or a Hub id"),
        (["--recipe", "quickstrat"], "there is no recipe 'quickstrat'; did you mean 'quickstart'?"),
        (["--recipe", "quickstart", "--sede", "1"], "there is no option '--sede'; did you mean '--seed'?"),
        (["--recipe", "quickstart"], "--output_dir is missing"),
        (["--recipe", "quickstart", "--output_dir", "{tmp}"], "--dataset_name is missing"),
        (["{tiny}", "--dataset_name", "{tmp}/nowhere"], "nowhere"),
        (["{tiny}", "--dataset_name", "{tmp}"], "image"),
        (["{tiny}", "--train_split", "validation"], "split 'validation' does not exist in "),
        (["{tiny}", "--train_split", "validation"], ". Pass one of them as --train_split"),
        (["{tiny}", "--image_column", "picture"], "picture"),
        (["{tiny}", "--train_batch_size", "1"], "cannot train on a batch of 1"),
        (["{tiny}", "--train_batch_size", "64"], "24 images, fewer than one global batch of 64"),
        (["{tiny}", "--image_size", "30"], "image_size must be divisible by patch_size, got 30 and 8"),
        (["{tiny}", "--backbone_config", '{{"model_type": "resnett"}}'], "Did you mean 'resnet'?"),
        (
            ["{tiny}", "--backbone_config", '{{"image_size": 64}}'],
            "backbone_config has image_size 64 and the views 32: leave the former out",
        ),
        (
            ["{tiny}", "--backbone_config", '{{"num_layers": 4}}'],
            "backbone_config: MoCoV3ViTConfig has no key 'num_layers'; did you mean 'num_hidden_layers'?",
        ),
        (["{tiny}", "--backbone_config", '{{"patch_size": [8, 8, 8]}}'], "must be one integer or a pair"),
        (["{tiny}", "--backbone_config", '{{"hidden_act": "glue"}}'], "from backbone_config: unknown name 'glue'"),
        (["{tiny}", "--report_to", "wandbb"], "--report_to takes aim, "),
        (["{tiny}", "--report_to", "wandbb", "--dry_run"], "--report_to takes aim, "),
        (
            ["{tiny}", "--resume_from_checkpoint", "/nowhere"],
            "--resume_from_checkpoint /nowhere is not a folder: pass a",
        ),
        (
            ["{tiny}", "--resume_from_checkpoint", "/nowhere", "--dry_run"],
            "--resume_from_checkpoint /nowhere is not a folder: pass a checkpoint folder, or auto",
        ),
        (["{tiny}", "--report_to", "aim"], "needs a package that is not installed: pip install aim"),
        (["{tiny}", "--model", "{tmp}/nowhere"], "nowhere' does not exist"),
        (["{tiny}", "--push_to_hub", "--hub_model_id", "a/b/c"], "'a/b/c' is not a valid repository name: pass USER"),
    ],
)
def test_one_line_and_exit_code_2(capsys, tmp_path, tiny, arguments, message):
    expanded = []
    for argument in arguments:
        expanded += (
            [*tiny, "--output_dir", str(tmp_path / "out")]
            if argument == "{tiny}"
            else [argument.replace("{tmp}", str(tmp_path)).replace("{{", "{").replace("}}", "}")]
        )
    assert message in error_of(capsys, expanded)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_key_that_no_backbone_reads_is_warned_of(capsys):
    keys = ["model_type", "architectures", "num_labels", "depths", "colors"]
    config = MoCoV3Config(backbone_config={"model_type": "resnet", "colors": 3}).backbone_config
    build.check_keys(keys, config)
    assert capsys.readouterr().err == "warning: backbone_config: ResNetConfig has no key 'colors', it has no effect\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine on a GPU")
def test_fp16_needs_a_gpu(capsys, tmp_path, tiny):
    error = error_of(capsys, [*tiny, "--output_dir", str(tmp_path), "--mixed_precision", "fp16"])
    assert "--mixed_precision fp16 needs a GPU: use auto, bf16 or no" in error


def test_a_launch_that_fell_back_to_one_process_is_noticed():
    fell_back = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(
        UsageError, match=r"asked for several processes or machines and started one process.*torchrun --nproc"
    ):
        build.check_launch(fell_back)
    build.check_launch({})
    build.check_launch({"ACCELERATE_MIXED_PRECISION": "no"})  # one process was asked for
    machines = {**fell_back, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # --num_machines 2
    with pytest.raises(UsageError, match=r"several processes or machines.*--num_machines 1"):
        build.check_launch(machines)
    build.check_launch({**fell_back, "WORLD_SIZE": "2"})  # torchrun
    build.check_launch({**fell_back, "PMI_SIZE": "2"})  # MPI


def test_compilation_by_the_launcher_is_refused():
    with pytest.raises(UsageError, match=r"\(dynamo_backend inductor\).*--torch_compile true"):
        build.check_launch({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    build.check_launch({"ACCELERATE_DYNAMO_BACKEND": "NO"})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("fp16", "asks for mixed_precision fp16, the recipe for no: using no; for fp16, pass --mixed_precision fp16"),
        ("fp8", "asks for mixed_precision fp8, the recipe for no: using no\n"),
        ("no", None),
    ],
)
def test_another_precision_of_the_launcher_is_contradicted(tmp_path, tiny, monkeypatch, capsys, asked, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    recipe = load_recipe(tiny[1], [*tiny[2:], "--output_dir", str(tmp_path)])
    assert build.build_accelerator(recipe).mixed_precision == "no"
    errors = capsys.readouterr().err
    assert errors == "" if said is None else said in errors


def test_the_cpu_that_the_launcher_chose(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert this_device().type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert this_device().type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lars", "--base_learning_rate", "0.3"], "LARS with a 'mocov3_vit' backbone"),
        (["--base_learning_rate", "0.3"], "AdamW diverges"),
        (["--backbone_config", "RESNET", "--optimizer", "lars", "--base_learning_rate", "1.5e-4"], "hardly change"),
        (["--backbone_config", "RESNET", "--base_learning_rate", "1.5e-4"], "AdamW with a ResNet"),
    ],
)
def test_pairs_known_to_fail_are_warned_of(arguments, message):
    resnet = '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}'
    recipe = load_recipe("quickstart", [argument.replace("RESNET", resnet) for argument in arguments])
    doubts = build.doubtful_choices(recipe, make_plan(recipe, 1000, 1), build.build_model(recipe), 1)
    assert any(message in doubt for doubt in doubts), doubts


@pytest.mark.parametrize("name", ["quickstart", "cifar10_vit-tiny-p4", "mocov3_resnet50_8xb512-amp-coslr-300e_in1k"])
def test_our_own_recipes_raise_no_doubt(name):
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build.MoCoV3ForPreTraining(build.build_config(recipe))
    assert build.doubtful_choices(recipe, make_plan(recipe, 1_281_167, 8), model, 8) == []


def test_statistics_of_one_process_are_warned_of():
    timm = pytest.importorskip("timm")
    del timm
    backbone = '{"model_type": "timm_wrapper", "architecture": "efficientnet_b0"}'
    recipe = load_recipe("quickstart", ["--backbone_config", backbone])
    doubts = build.doubtful_choices(recipe, make_plan(recipe, 1000, 2), build.build_model(recipe), 2)
    assert any(re.search(r"BatchNormAct2d.*statistics of their own process", doubt) for doubt in doubts)
