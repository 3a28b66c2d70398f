"""Pushing while training: after every checkpoint, from the main process, without blocking the run."""

import pytest

from mocov3_hf.pretraining import loop
from mocov3_hf.pretraining.pretrain import main
from tests.launch import ROOT, python


class Recorder:
    """Stands in for what pushes to the Hub."""

    made = ()

    def __init__(self, name, **options):
        self.name, self.options, self.calls = name, options, []
        Recorder.made = (*Recorder.made, self)

    def push(self, folder, message):
        weights = (folder / "model.safetensors").stat().st_size
        self.calls.append((message, weights > 0, (folder / "preprocessor_config.json").exists()))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "made", ())
    monkeypatch.setattr(loop, "BackgroundPusher", Recorder)


def test_pushes_after_every_checkpoint(tmp_path, tiny):
    options = ["--push_to_hub", "--hub_model_id", "me/model", "--hub_private_repo", "--hub_revision", "main"]
    main([*tiny, *options, "--save_steps", "3", "--output_dir", str(tmp_path)])
    (pusher,) = Recorder.made
    assert pusher.name == "me/model"
    assert pusher.options == {"private": True, "revision": "main"}
    assert pusher.calls == [("Step 3", True, True), ("Step 4", True, True), "finish"]


def test_the_repository_is_named_after_the_folder(tmp_path, tiny):
    main([*tiny, "--push_to_hub", "--output_dir", str(tmp_path / "my-run")])
    assert [pusher.name for pusher in Recorder.made] == ["my-run"]


def test_pushes_nothing_unless_asked(tmp_path, tiny):
    main([*tiny, "--output_dir", str(tmp_path)])
    assert Recorder.made == ()


@pytest.mark.slow
def test_an_unreachable_hub_does_not_stop_the_run(tmp_path, tiny):
    """The real script and the real client, at an address where nobody listens."""
    done = python(
        ROOT / "scripts" / "pretrain.py",
        *[*tiny, "--push_to_hub", "--hub_model_id", "me/model", "--output_dir", str(tmp_path)],
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_TOKEN="hf_none",
        HF_HUB_DISABLE_XET="1",
    )
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors").exists()
    assert "push: the Hub at http://127.0.0.1:9 does not answer" in done.stderr, "a failed push is reported"
    assert "Traceback" not in done.stderr
