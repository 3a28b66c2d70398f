"""Evaluations on a full disk end in one line, and what was measured is printed first."""

import errno
import os

import pytest
from transformers import Trainer

from mocov3_hf import results
from mocov3_hf.evaluation import finetune, knn
from tests.evaluation.finetuning import command


def refuse(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.json")


def test_knn_prints_its_metrics_first(tmp_path, model_folder, image_folder, monkeypatch, capsys):
    monkeypatch.setattr(results, "write_json", refuse)
    arguments = ["--model", model_folder, "--dataset_name", image_folder, "--output_dir", tmp_path, "--k", "5"]
    with pytest.raises(SystemExit) as ended:
        knn.main([str(argument) for argument in arguments])
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert "knn5_top1" in output.out
    assert "recorded in" not in output.out
    assert output.err.splitlines()[-1] == "error: [Errno 28] No space left on device: 'results.json'"


def test_a_checkpoint_of_finetuning(tmp_path, model_folder, image_folder, fails, monkeypatch):
    def torn(self, folder):
        with open(os.path.join(folder, "optimizer.pt"), "wb") as file:
            file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", torn)
    line = fails(finetune.main, command(model_folder, image_folder, tmp_path, "--save_strategy", "epoch"), code=1)
    assert line == (
        f"error: {tmp_path / 'checkpoint-2'} could not be written: torch.save failed, probably on a full disk"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
