"""Pushes to a Hub on loopback with the real client: what arrives, what resumes, what is reported when it fails."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from huggingface_hub import HfApi

from mocov3_hf import MoCoV3ForPreTraining, MoCoV3ViTConfig, MoCoV3ViTModel
from mocov3_hf.hub import BackgroundPusher, push_folder
from mocov3_hf.hub import push as push_module
from mocov3_hf.hub.push import main
from mocov3_hf.reporting import RunError, UsageError
from tests.factories import VIT
from tests.hub.stand_in import READ_TOKEN, TOKEN


# The Hub's client uploads raw bytes in a manner that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Of the client between its attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", TimeWithoutPauses)


class TimeWithoutPauses:
    sleep = staticmethod(lambda seconds: None)
    time = staticmethod(time.time)


def push(folder, api, name="someone/tiny", **options):
    return push_folder(folder, name, api=api, **options)


def test_push_brings_weights_settings_code_card_and_record(run_folder, hub, api):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    url = push(run_folder, api)
    files = hub.files("someone/tiny")
    assert url.startswith(f"{hub.url}/someone/tiny/commit/")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "backbone_mocov3.py",
        "batchnorm_mocov3.py",
        "config.json",
        "configuration_mocov3.py",
        "configuration_mocov3_vit.py",
        "feature_maps_mocov3.py",
        "heads_mocov3.py",
        "image_processing_mocov3.py",
        "loss_mocov3.py",
        "metrics.jsonl",
        "model.safetensors",
        "modeling_mocov3.py",
        "modeling_mocov3_backbone.py",
        "modeling_mocov3_pretraining.py",
        "modeling_mocov3_vit.py",
        "modeling_mocov3_vit_embeddings.py",
        "plots/loss.png",
        "preprocessor_config.json",
        "recipe.yaml",
        "results.json",
    }
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    auto_map = json.loads(files["config.json"])["auto_map"]
    classes = {"AutoModel", "AutoModelForImageClassification", "AutoModelForPreTraining"}
    assert set(auto_map) == {"AutoBackbone", "AutoConfig", *classes}
    # the folder itself is as it was: no code, no card, nothing left over
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_card_holds_what_the_folder_has_and_nothing_of_the_machine(run_folder, hub, api):
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
    assert "| linear probe | someone/digits | test | Top-1 accuracy | 81.25 |" in body
    assert "base_learning_rate: 0.001" in body or "base_learning_rate: 1.0e-3" in body
    assert "![loss](plots/loss.png)" in body
    assert str(run_folder.parent) not in front + body


def test_card_without_records_says_so(run_folder, hub, api):
    for name in ("results.json", "recipe.yaml", "metrics.jsonl", "plots/loss.png"):
        (run_folder / name).unlink()
    push(run_folder, api)
    card = hub.files("someone/tiny")["README.md"].decode()
    assert "No results yet." in card
    assert "No training metadata available." in card
    assert "model-index" not in card


def test_damaged_records_are_named_and_left_out_of_the_card(run_folder, hub, api, caplog):
    (run_folder / "results.json").write_text('{"format": 1, "results"')
    push(run_folder, api)
    assert "No results yet." in hub.files("someone/tiny")["README.md"].decode()
    assert "results.json was left out" in caplog.text


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


def test_shards_are_pushed_as_they_were_saved(run_folder, hub, api):
    model = MoCoV3ForPreTraining.from_pretrained(run_folder)
    (run_folder / "model.safetensors").unlink()
    model.save_pretrained(run_folder, max_shard_size=100_000)
    push(run_folder, api)
    files = hub.files("someone/tiny")
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1
    assert "model.safetensors" not in files
    assert all(files[name] == (run_folder / name).read_bytes() for name in shards)


def test_client_retries_uploads_after_errors_of_the_server(run_folder, hub, api):
    hub.fail = [("preupload", 500), ("/lfs/objects", 503), ("/lfs/verify", 502)]
    push(run_folder, api)
    assert hub.fail == []
    assert "model.safetensors" in hub.files("someone/tiny")
    assert len([request for request in hub.requests if request.startswith("PUT /lfs/")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 502])
def test_failed_push_is_resumed_by_the_next(run_folder, hub, api, status):
    hub.fail = [("/commit/", status)]
    message = {400: r"the Hub refuses the push to 'someone/tiny' \(400\)", 502: "does not answer .*: push again"}[
        status
    ]
    with pytest.raises(RunError, match=message):
        push(run_folder, api)
    assert "model.safetensors" not in hub.files("someone/tiny")
    push(run_folder, api)
    assert "model.safetensors" in hub.files("someone/tiny")
    assert len([request for request in hub.requests if request.startswith("PUT /lfs/")]) == 1
    assert not list(run_folder.glob(".push_*"))


def test_failures_are_reported_in_one_line(run_folder, hub, api, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    no_token, bad_token, read_token, no_hub = (
        HfApi(endpoint=hub.url),
        HfApi(endpoint=hub.url, token="hf_bad"),
        HfApi(endpoint=hub.url, token=READ_TOKEN),
        HfApi(endpoint="http://127.0.0.1:9", token="x"),
    )
    cases = [
        (run_folder, "someone/tiny", no_token, 1, "no valid token for http"),
        (
            run_folder,
            "someone/tiny",
            bad_token,
            1,
            "run `hf auth login`, or set HF_TOKEN to a token with write access",
        ),
        (run_folder, "someone/tiny", read_token, 1, "the token may not write to 'someone/"),
        (run_folder, "someone/tiny", no_hub, 1, "does not answer"),
        (
            run_folder,
            "some one/tiny",
            api,
            2,
            "'some one/tiny' is not a valid repository name: pass USER/NAME",
        ),
        (tmp_path, "someone/tiny", api, 2, "holds no model (no config.json)"),
        (run_folder / "plots", "someone/tiny", api, 2, "holds no model (no config.json)"),
        (tmp_path / "none", "someone/tiny", api, 2, "does not exist"),
        ("someone/tiny", "someone/tiny", api, 2, "model folder 'someone/tiny' does not exist"),
    ]
    for folder, name, its_api, code, message in cases:
        monkeypatch.setattr(push_module, "HfApi", lambda its_api=its_api: its_api)
        with pytest.raises(SystemExit) as end:
            main([str(folder), "--hub_model_id", name])
        error = capsys.readouterr().err
        assert end.value.code == code
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not hub.commits


def test_bare_backbone_is_pushed_with_its_code(tmp_path, hub, api):
    options = {key: value for key, value in VIT.items() if key != "model_type"}
    MoCoV3ViTModel(MoCoV3ViTConfig(**options)).save_pretrained(tmp_path)
    push(tmp_path, api)
    files = hub.files("someone/tiny")
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_mocov3_vit.MoCoV3ViTModel"
    assert b"A `mocov3_vit` encoder" in files["README.md"]


def test_folders_that_are_no_model_are_a_mistake_in_python_too(tmp_path, run_folder, api):
    (run_folder / "model.safetensors").unlink()
    for folder, message in ((tmp_path, "is not a MoCo v3 model"), (run_folder, "has no weights")):
        with pytest.raises(UsageError, match=message):
            push(folder, api)


def test_command_takes_old_spellings(run_folder, hub, api, capsys, monkeypatch):
    monkeypatch.setattr(push_module, "HfApi", lambda: api)
    old = ["--private", "--revision", "second", "--message", "Try again"]
    main([str(run_folder), "--hub_model_id", "tiny", *old])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{hub.url}/someone/tiny/commit/")
    assert "warning: --private is deprecated: use --hub_private_repo" in printed.err
    assert "warning: --revision is deprecated: use --hub_revision" in printed.err
    assert hub.private == {"models/someone/tiny"}
    assert hub.commits == [("someone/tiny", "second", "Try again")]


def wait_until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_uploading(hub):
    return any(request.startswith("PUT /lfs/") for request in hub.requests)


@pytest.mark.slow
def test_background_pushes_keep_the_latest_and_survive_an_absent_hub(run_folder, hub, api, caplog):
    pusher = BackgroundPusher("someone/tiny", api=api)
    hub.fail = [("repos/create", 503)]
    pusher.push(run_folder, "first")
    wait_until(lambda: pusher.last_error is not None)
    assert "does not answer" in pusher.last_error
    assert "push: the Hub at" in caplog.text

    hub.stall.set()  # uploads hang from here on
    pusher.push(run_folder, "second")
    wait_until(lambda: is_uploading(hub))
    start = time.monotonic()
    for number in range(3, 6):
        (run_folder / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
        pusher.push(run_folder, str(number))
    assert len(list(run_folder.glob(".push_*"))) == 2  # the one on its way and the newest
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write("written after the push")
    assert time.monotonic() - start < 10
    assert not pusher.finish(timeout=0.05)  # gives up in time
    hub.stall.clear()
    assert pusher.finish(timeout=60)
    assert [message for _, _, message in hub.commits] == ["second", "5"]
    assert hub.files("someone/tiny")["metrics.jsonl"] == b'{"step": 5}\n'
    assert not list(run_folder.glob(".push_*"))
    pusher.push(run_folder, "sixth")  # after a pause
    assert pusher.finish(timeout=60)
    assert hub.commits[-1][2] == "sixth"


HANGING = """
import sys
from huggingface_hub import HfApi
from mocov3_hf.hub import BackgroundPusher

folder, url, token = sys.argv[1:]
pusher = BackgroundPusher("someone/tiny", api=HfApi(endpoint=url, token=token))
pusher.push(folder)
assert not pusher.finish(timeout=3)
print("the run has ended")
"""


@pytest.mark.slow
def test_hub_that_hangs_does_not_keep_the_process_alive(run_folder, hub):
    hub.stall.set()
    command = [sys.executable, "-c", HANGING, str(run_folder), hub.url, TOKEN]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, "the run has ended\n"), done.stderr
    assert "did not end in 3 s: run mocov3 push" in done.stderr
    assert is_uploading(hub)


def test_leftovers_of_killed_pushes_are_removed_and_of_living_ones_kept(run_folder, hub, api):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for owner in (dead.stdout.strip(), str(os.getppid())):
        (run_folder / f".push_{owner}_x").mkdir()
    push(run_folder, api)
    assert [path.name for path in run_folder.glob(".push_*")] == [f".push_{os.getppid()}_x"]


def test_background_push_never_raises(tmp_path, hub, api, caplog):
    pusher = BackgroundPusher("someone/tiny", api=api)
    pusher.push(tmp_path / "missing")
    assert "missing is not pushed: " in caplog.text
    pusher.push(tmp_path)  # no model in it
    assert caplog.text.count("does not exist") == 1
    assert caplog.text.count("is not a MoCo v3 model") == 1
    assert not pusher.finish(timeout=30)
    assert not hub.requests
