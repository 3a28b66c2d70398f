"""Pushes to a Hub on loopback with the real client: what arrives, what resumes, what is told when it fails."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from huggingface_hub import HfApi

from mocov3_hf.hub import BackgroundPusher, PushError, push_folder
from mocov3_hf.hub import push as push_module
from mocov3_hf.hub.push import main
from tests.hub.stand_in import READ_TOKEN


# The Hub's client uploads raw bytes in a manner that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def push(folder, api, name="someone/tiny", **options):
    return push_folder(folder, name, api=api, pause_seconds=0, **options)


def test_push_brings_weights_settings_code_card_and_record(run_folder, hub, api):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    url = push(run_folder, api)
    files = hub.files("someone/tiny")
    assert url.startswith(f"{hub.url}/someone/tiny/commit/")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "batchnorm_mocov3.py",
        "config.json",
        "configuration_mocov3.py",
        "loss_mocov3.py",
        "metrics.jsonl",
        "model.safetensors",
        "modeling_mocov3.py",
        "modeling_mocov3_pretraining.py",
        "modeling_mocov3_vit.py",
        "plots/loss.png",
        "preprocessor_config.json",
        "recipe.yaml",
        "results.json",
    }
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForPreTraining"}
    # the folder itself is as it was: no code, no card, nothing left over
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_card_holds_what_the_folder_tells_and_nothing_of_the_machine(run_folder, hub, api):
    push(run_folder, api, license="apache-2.0")
    _, front, body = hub.files("someone/tiny")["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-feature-extraction"
    assert metadata["datasets"] == ["someone/digits"]
    assert "moco-v3" in metadata["tags"]
    (index,) = metadata["model-index"]
    values = {
        (result["task"]["type"], metric["name"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert values == {
        ("image-classification", "Top-1 accuracy"): 81.25,
        ("image-classification", "Top-5 accuracy"): 97.5,
        ("image-feature-extraction", "Top-1 accuracy (knn20)"): 50.0,
    }
    assert 'model="someone/tiny", pool=True, trust_remote_code=True' in body
    assert "| Image classification, linear evaluation | someone/digits | test | Top-1 accuracy | 81.25 |" in body
    assert "base_learning_rate: 0.001" in body or "base_learning_rate: 1.0e-3" in body
    assert "![loss](plots/loss.png)" in body
    assert str(run_folder.parent) not in front + body


def test_card_of_a_converted_model_names_its_origin_and_keeps_its_license(run_folder, hub, api):
    source = {"name": "official_vit-s-300ep", "file": "vit-s-300ep.pth.tar", "sha256": "ab" * 32}
    (run_folder / "conversion.json").write_text(json.dumps({"source": source}))
    push(run_folder, api)
    card = hub.files("someone/tiny")["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-nc-4.0"
    assert f"converted exactly from `official_vit-s-300ep` (SHA-256 `{'ab' * 32}`)" in card


def test_own_card_is_left_alone_and_a_written_one_renewed(run_folder, hub, api):
    (run_folder / "README.md").write_text("# Mine\n")
    push(run_folder, api)
    assert hub.files("someone/tiny")["README.md"] == b"# Mine\n"
    (run_folder / "README.md").unlink()
    push(run_folder, api)
    card = hub.files("someone/tiny")["README.md"]
    (run_folder / "README.md").write_bytes(card.replace(b"# tiny", b"# old"))
    push(run_folder, api)
    assert hub.files("someone/tiny")["README.md"] == card


def test_name_without_user_private_and_revision(run_folder, hub, api):
    push(run_folder, api, name="tiny", private=True, revision="second-try", message="Try again")
    assert hub.private == {"models/someone/tiny"}
    assert "model.safetensors" in hub.files("someone/tiny", branch="second-try")
    assert "model.safetensors" not in hub.files("someone/tiny")
    assert hub.commits == [("someone/tiny", "second-try", "Try again")]
    push(run_folder, api, name="tiny", revision="second-try")  # both exist now


def test_large_weights_are_cut_into_shards(run_folder, hub, api):
    push(run_folder, api, max_shard_bytes=100_000)
    files = hub.files("someone/tiny")
    index = json.loads(files["model.safetensors.index.json"])
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert "model.safetensors" not in files
    assert shards <= set(files)
    assert all(len(files[name]) <= 110_000 for name in shards)


def test_push_goes_on_after_errors_of_the_server_and_resends_nothing(run_folder, hub, api):
    hub.fail = [("whoami", 503), ("preupload", 500), ("/commit/", 502)]
    push(run_folder, api, attempts=5)
    assert "model.safetensors" in hub.files("someone/tiny")
    assert len([request for request in hub.requests if request.startswith("PUT /lfs/")]) == 1


def test_push_that_broke_off_is_resumed_by_the_next(run_folder, hub, api):
    hub.fail = [("/commit/", 400)]
    with pytest.raises(PushError, match=r"the Hub refuses the push to 'someone/tiny' \(400\)"):
        push(run_folder, api)
    assert "model.safetensors" not in hub.files("someone/tiny")
    push(run_folder, api)
    assert "model.safetensors" in hub.files("someone/tiny")
    assert len([request for request in hub.requests if request.startswith("PUT /lfs/")]) == 1


def test_failures_are_told_in_one_line(run_folder, hub, api, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    cases = [
        (run_folder, "someone/tiny", HfApi(endpoint=hub.url), "no token for the Hub: run `hf auth login`"),
        (run_folder, "someone/tiny", HfApi(endpoint=hub.url, token="hf_bad"), "the token is not valid at http"),
        (
            run_folder,
            "someone/tiny",
            HfApi(endpoint=hub.url, token=READ_TOKEN),
            "the token may not write to 'someone/",
        ),
        (run_folder, "some one/tiny", api, "'some one/tiny' is no name of a repository, expected USER/NAME"),
        (tmp_path, "someone/tiny", api, "holds no MoCo v3 model: expected a config.json"),
        (run_folder / "plots", "someone/tiny", api, "holds no MoCo v3 model"),
        (run_folder, "someone/tiny", HfApi(endpoint="http://127.0.0.1:9", token="x"), "does not answer"),
    ]
    for folder, name, its_api, message in cases:
        monkeypatch.setattr(push_module, "HfApi", lambda its_api=its_api: its_api)
        monkeypatch.setattr(push_module.time, "sleep", lambda seconds: None)
        assert main([str(folder), "--hub_model_id", name]) == 1
        error = capsys.readouterr().err
        assert error.startswith("push_to_hub: ")
        assert message in error
        assert error.count("\n") == 1
    assert not hub.commits


def test_background_pushes_keep_the_latest_and_survive_an_absent_hub(run_folder, hub, api, caplog):
    pusher = BackgroundPusher("someone/tiny", api=api, pause_seconds=0, attempts=1)
    hub.fail = [("whoami", 503)]
    pusher.push(run_folder, "first")
    deadline = time.monotonic() + 20
    while pusher.last_error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "does not answer" in pusher.last_error
    assert "push_to_hub: the Hub at" in caplog.text

    hub.stall.set()  # uploads hang from here on
    start = time.monotonic()
    pusher.push(run_folder, "second")
    while not any("/lfs/" in request and request.startswith("PUT") for request in hub.requests):
        time.sleep(0.01)
        assert time.monotonic() < deadline
    for number in range(3, 6):
        (run_folder / "metrics.jsonl").write_text(f"{number}\n")
        pusher.push(run_folder, str(number))
    (run_folder / "metrics.jsonl").unlink()  # a snapshot keeps what a run replaces
    assert time.monotonic() - start < 10
    assert not pusher.finish(timeout=0.05)  # gives up in time
    hub.stall.clear()
    assert pusher.finish(timeout=60)
    assert [message for _, _, message in hub.commits] == ["second", "5"]
    assert hub.files("someone/tiny")["metrics.jsonl"] == b"5\n"
    assert not list(run_folder.glob(".push_*"))


def test_leftovers_of_killed_pushes_are_removed_and_of_living_ones_kept(run_folder, hub, api):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for owner in (dead.stdout.strip(), str(os.getppid())):
        (run_folder / f".push_{owner}_x").mkdir()
    push(run_folder, api)
    assert [path.name for path in run_folder.glob(".push_*")] == [f".push_{os.getppid()}_x"]


def test_background_push_never_raises(tmp_path, api, caplog):
    pusher = BackgroundPusher("someone/tiny", api=api, pause_seconds=0)
    pusher.push(tmp_path / "missing")
    pusher.push(tmp_path)  # no model in it
    assert not pusher.finish(timeout=30)
    assert "no snapshot of" in caplog.text
    assert "holds no MoCo v3 model" in caplog.text
