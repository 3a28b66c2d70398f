"""Pushing while training: after every save, from the main process, and never in the way of the run."""

import pytest

from mocov3_hf.pretraining.loop import main
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


def test_pushes_after_every_save(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(Recorder, "made", ())
    hub = ["--push_to_hub", "--hub_model_id", "me/model", "--hub_private_repo", "--hub_revision", "main"]
    main([*tiny, *hub, "--save_steps", "3", "--output_dir", str(tmp_path)], make_pusher=Recorder)
    (pusher,) = Recorder.made
    assert pusher.name == "me/model"
    assert pusher.options == {"private": True, "revision": "main"}
    assert pusher.calls == [("Step 3", True, True), ("Step 4", True, True), "finish"]


def test_pushes_nothing_unless_asked(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(Recorder, "made", ())
    main([*tiny, "--output_dir", str(tmp_path)], make_pusher=Recorder)
    assert Recorder.made == ()


def test_needs_something_to_push_with(tmp_path, tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--push_to_hub", "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "pass make_pusher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hub_that_is_away_costs_nothing(tmp_path, tiny):
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
    assert "push_to_hub: " in done.stderr, "a failed push is told"
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
