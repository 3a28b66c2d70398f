"""What is pushed says nothing about the machine, and what is local stays as it is."""

import base64
import html
import json
import os
import re

import pytest
import yaml
from huggingface_hub import HfApi
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mocov3_hf.hub import privacy
from mocov3_hf.hub.privacy import hide, hide_machine
from mocov3_hf.hub.push import push_folder
from tests.hub.conftest import save_run


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
USER, HOST = "somebody", "gpu17.secret-cluster.org"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The home of somebody on a machine of their own."""
    monkeypatch.setattr(privacy.platform, "node", lambda: HOST)
    monkeypatch.setattr(privacy.getpass, "getuser", lambda: USER)
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    return home


def save_telling_run(home):
    """A run whose every file names the machine in some way."""
    folder = home / "my runs" / "first"
    folder.parent.mkdir()
    save_run(folder)
    paths = [
        f"{home}/data/train images",
        f"/home/{USER}/data/pets",
        f"/Users/{USER}/x",
        f"C:\\Users\\{USER}\\data\\cats",
        f"file:///home/{USER}/lists/a.csv",
        f"~{USER}/b.txt",
        f"{USER}@{HOST}:/scratch/{USER}/c",
        f"\\\\{HOST}\\share\\d",
        f"/home/{USER}/o'brien & sons/é",
    ]
    recipe = {
        "dataset_name": f"{home}/data/train images",
        "output_dir": str(folder),
        "run_name": f"{USER}_vit",
        "mean": [0.5],
        "long": f"{home}/a path with so many words in its name that YAML needs to wrap it/" + "word " * 30 + "end",
        "num_train_epochs": 60,
        "hub_model_id": "someone/digits",
    }
    (folder / "recipe.yaml").write_text(f"# mocov3 pretrain {paths[1]} on {HOST}\n" + yaml.safe_dump(recipe))
    results = json.loads((folder / "results.json").read_text())
    results["results"][0]["settings"] |= {"model": str(folder), "list": paths, "lr": 0.1}
    results["results"][0]["dataset"]["files"] = dict.fromkeys(paths, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    event = {"step": 3, "event": "lost process", "host": "other-node", "text": f"on other-node, see {paths[0]}/1.jpg"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n" + f"damaged {paths[1]}\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(folder), "id2label": {"0": USER, "1": "dog"}}
    config["label2id"] = {USER: 0, "dog": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "conversion.json").write_text(
        json.dumps({"source": {"file": paths[1], "url": f"http://{HOST}/x/y.pth"}})
    )
    listed = "".join(f"<li title='{html.escape(path)}'>{html.escape(path)}</li>" for path in paths)
    note = base64.b64encode(b"\xff\xd8" + os.urandom(300)).decode()
    (folder / "report.html").write_text(
        f"<html><style>p {{ margin: 0 }} /* a/b */</style><body class='a/b'>{listed}<p>12 images/s, and/or 1/2</p>"
        f'<a href="https://arxiv.org/abs/2104.02057">paper</a><img src="data:image/jpeg;base64,{note}"><br/>'
        f"<script>x.replace(/home/g, '')</script></body></html>"
    )
    information = PngImagePlugin.PngInfo()
    information.add_text("Source", str(folder))
    information.add_text("Packed", str(folder) * 20, zip=True)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(folder / "plots" / "loss.png", pnginfo=information)
    (folder / "curve.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><desc>{folder}</desc></svg>")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "source": str(folder)})
    return folder


def forms_of(content):
    """A file as bytes, as text without escapes, and what it embeds in base64."""
    text = content.decode("utf-8", errors="replace")
    yield content
    yield html.unescape(text).encode("utf-8", errors="replace")
    yield re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found.group(1), 16)), text).encode(
        "utf-8", errors="replace"
    )
    for embedded in re.findall(r"base64,([A-Za-z0-9+/=]+)", text):
        yield base64.b64decode(embedded)


def test_nothing_that_arrives_names_the_machine(machine, hub, api, tmp_path):
    folder = save_telling_run(machine)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push_folder(folder, "someone/tiny", api=api)
    files = hub.files("someone/tiny")
    assert {"recipe.yaml", "results.json", "events.jsonl", "report.html", "plots/loss.png", "curve.svg"} <= set(files)
    for name, content in files.items():
        for form in forms_of(content):
            if name == "config.json":
                form = form.replace(f'"{USER}"'.encode(), b"")  # a class of this name
            for secret in (USER, "gpu17", "secret-cluster", "other-node", str(tmp_path), "my runs", "o'brien"):
                assert secret.encode() not in form, (name, secret, form[:2000])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_says_nothing_of_the_machine_stays(machine, hub, api):
    folder = save_telling_run(machine)
    push_folder(folder, "someone/tiny", api=api)
    files = hub.files("someone/tiny")
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert (recipe["num_train_epochs"], recipe["hub_model_id"]) == (60, "someone/digits")
    assert (recipe["dataset_name"], recipe["output_dir"], recipe["run_name"]) == ("train images", "first", "user_vit")
    assert json.loads(files["results.json"])["results"][0]["metrics"]["top1"] == 0.8125
    event = json.loads(files["events.jsonl"].splitlines()[0])
    assert (event["step"], event["host"]) == (3, "host")
    assert json.loads(files["config.json"])["label2id"] == {USER: 0, "dog": 1}
    page, original = files["report.html"].decode(), (folder / "report.html").read_text()
    for part in (
        "12 images/s, and/or 1/2",
        "https://arxiv.org/abs/2104.02057",
        "x.replace(/home/g, '')",
        "class='a/b'",
    ):
        assert part in page
    assert re.findall(r"base64,[^\"]+", page) == re.findall(r"base64,[^\"]+", original)
    (folder / "pushed.safetensors").write_bytes(files["model.safetensors"])
    with safe_open(folder / "pushed.safetensors", framework="pt") as pushed:
        assert pushed.metadata() == {"format": "pt", "source": "first"}
    found, expected = load_file(folder / "pushed.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[key] == expected[key]).all() for key in found)
    card = files["README.md"].decode()
    assert "train images" not in yaml.safe_load(card.split("---\n")[1]).get("datasets", [])  # not a name on the Hub


def test_an_own_card_is_not_changed(machine, tmp_path):
    (tmp_path / "README.md").write_text(f"written by {USER} in /home/{USER}/x")
    hide_machine(tmp_path, keep=("README.md",))
    assert USER in (tmp_path / "README.md").read_text()
    hide_machine(tmp_path)
    assert (tmp_path / "README.md").read_text() == "written by user in x"


@pytest.mark.parametrize(
    "text",
    [
        "12.5 images/s at 224/16",
        "https://host.org/a/b/c.html?x=/d",
        "s3://bucket/a/b hf://datasets/x/y",
        "someone/digits and plots/loss.png",
        "</td><br/></div>",
        "a // b, */ and /* c",
        "m = 1 - (1 - m0) / 2",
        "image/png; text/html",
        "backbone.layers.0/weight",
    ],
)
def test_what_only_looks_like_a_path_stays(text):
    assert hide(text, set(), {}) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/data", "data"),
        ("/home/ann", "home"),
        ("see /home/ann/data/x.jpg, line 3", "see x.jpg, line 3"),
        ('{"a":"/lustre/p/ann/run","b":1}', '{"a":"run","b":1}'),
        ("--data=/mnt/a/b --x", "--data=b --x"),
        ("PATH=/a/b:/c/d", "PATH=b:d"),
        ("C:\\Users\\ann\\x y", "x y"),
        ('"C:\\\\Users\\\\ann\\\\x"', '"x"'),
        ("~/runs/a", "a"),
        ("file:///home/ann/a.csv", "a.csv"),
        ("(/a/b/)", "(b)"),
    ],
)
def test_paths_become_their_last_component(text, expected):
    assert hide(text, set(), {}) == expected


def test_names_are_hidden_as_words_only():
    assert hide("ann, Ann_1, annotation, ANN-2", set(), {"ann": "user"}) == "user, user_1, annotation, user-2"


def test_the_token_of_the_hub_is_in_no_file(machine, hub, api, monkeypatch):
    assert isinstance(api, HfApi)
    folder = save_telling_run(machine)
    push_folder(folder, "someone/tiny", api=api)
    assert not [name for name, content in hub.files("someone/tiny").items() if str(api.token).encode() in content]
