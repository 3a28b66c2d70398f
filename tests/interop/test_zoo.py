"""Downloads from a loopback server that breaks, lies and changes; and `fetch` from the zoo."""

import concurrent.futures
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import logging
from transformers import AutoModel, pipeline

from mocov3_hf import zoo as zoo_module
from mocov3_hf.interop import ConversionError
from mocov3_hf.interop import convert as convert_module
from mocov3_hf.interop.convert import main
from mocov3_hf.reporting import RunError, UsageError
from mocov3_hf.zoo import download, fetch, find_entry, hash_in_name, load_zoo
from tests.interop.conftest import mmpretrain_classification, official


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. `break_after` cuts the next answers short, `failures` are statuses to send first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.break_after, self.requests, self.etag, self.failures = {}, [], [], '"one"', []
        self.tokens, self.redirects = [], {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(0)

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        self.answer(int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0)

    def answer(self, start):
        server = self.server
        server.tokens.append(self.headers.get("Authorization"))
        if server.failures:
            return self.send_error(server.failures.pop(0))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path not in server.files:
            return self.send_error(404)
        content = server.files[self.path]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        if self.command == "GET":
            body = content[start:]
            self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    # No pauses between attempts, and no buffer that holds a whole file.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


CONTENT = bytes(range(256)) * 40


def test_download_resumes_where_it_broke(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["/a/model.pth"] = CONTENT
    server.break_after = [3000, 2000]
    path = download(f"{server.url}/a/model.pth", tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=3000-", "bytes=5000-"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    assert download(f"{server.url}/a/model.pth", tmp_path) == path
    assert len(server.requests) == 3  # a finished file is not requested again
    assert set(server.tokens) == {None}  # the Hub's token stays here


def test_download_resumes_in_a_later_run(server, tmp_path):
    server.files["/model.pth"] = CONTENT
    server.break_after = [3000, *[0] * 6]
    with pytest.raises(RunError, match=r"cannot be downloaded .*run the command again to resume"):
        download(f"{server.url}/model.pth", tmp_path)
    (partial,) = tmp_path.iterdir()
    assert partial.stat().st_size == 3000
    server.break_after = []
    assert download(f"{server.url}/model.pth", tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=3000-"


def test_a_file_that_changed_in_the_meantime_is_downloaded_from_the_start(server, tmp_path):
    server.files["/model.pth"] = CONTENT
    server.break_after = [3000, *[0] * 6]
    with pytest.raises(RunError):
        download(f"{server.url}/model.pth", tmp_path)
    server.files["/model.pth"], server.etag, server.break_after = CONTENT[::-1], '"two"', []
    assert download(f"{server.url}/model.pth", tmp_path).read_bytes() == CONTENT[::-1]
    assert server.requests[-1] is None


def test_server_errors_are_retried_and_absence_is_not(server, tmp_path):
    server.files["/model.pth"] = CONTENT
    server.failures = [503, 500]
    assert download(f"{server.url}/model.pth", tmp_path).read_bytes() == CONTENT
    with pytest.raises(RunError, match=r"other.pth cannot be downloaded: the server answers 404 Not Found"):
        download(f"{server.url}/other.pth", tmp_path)
    assert len(server.requests) == 1
    with pytest.raises(RunError, match=r"cannot be downloaded .*refused"):
        download("http://127.0.0.1:9/model.pth", tmp_path / "none")
    with pytest.raises(UsageError, match="does not end in a file name"):
        download(server.url, tmp_path)


def test_no_connection_is_one_line(tmp_path, monkeypatch, caplog):
    def unreachable(*_, **options):
        assert options["retry_on_errors"]
        logging.get_logger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("Name or service not known")

    monkeypatch.setattr(zoo_module, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(logging.get_logger("huggingface_hub"), "propagate", True)  # to caplog
    with pytest.raises(RunError, match=r"cannot be downloaded \(Name or service not known\): run the command again"):
        download("https://example.org/a.pth", tmp_path)
    assert caplog.text == ""


def test_without_a_network_by_choice_the_error_names_the_switch(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set"):
        download(f"{server.url}/model.pth", tmp_path)
    assert server.requests == []


def test_wrong_hash_is_refused_and_deleted(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    right, wrong = f"model_20220927-{digest[:8]}.pth", "model_20220927-00000000.pth"
    server.files |= {f"/{right}": CONTENT, f"/{wrong}": CONTENT, "/plain.pth": CONTENT}
    download(f"{server.url}/{right}", tmp_path)
    message = f"has a wrong hash: its SHA-256 begins with {digest[:8]}, published is 00000000; the file was deleted"
    with pytest.raises(RunError, match=message):
        download(f"{server.url}/{wrong}", tmp_path)
    assert not list(tmp_path.glob(f"*{wrong}*"))
    assert download(f"{server.url}/plain.pth", tmp_path, sha256=digest.upper()).is_file()
    with pytest.raises(RunError, match="wrong hash"):
        download(f"{server.url}/plain.pth", tmp_path, sha256="0" * 64)  # a kept file is verified as well


def test_what_was_downloaded_wrong_is_downloaded_again(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    server.files["/model.pth"] = CONTENT
    (tmp_path / "model.pth").write_bytes(b"<html>log in first</html>")
    assert download(f"{server.url}/model.pth", tmp_path, sha256=digest).read_bytes() == CONTENT
    (tmp_path / "model.pth").unlink()
    server.files["/model.pth"], server.break_after = CONTENT[::-1], [3000, *[0] * 6]
    with pytest.raises(RunError):
        download(f"{server.url}/model.pth", tmp_path)
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(bytes(2 * len(CONTENT)))  # more than the server has
    server.break_after = []
    assert download(f"{server.url}/model.pth", tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/model.pth", "gopher://127.0.0.1/"])
def test_redirects_lead_to_http_only(server, tmp_path, target):
    server.redirects["/model.pth"] = target
    with pytest.raises(RunError, match="cannot be downloaded"):
        download(f"{server.url}/model.pth", tmp_path)
    with pytest.raises(UsageError, match="expected a URL that begins with https:// or http://"):
        download(target, tmp_path)
    with pytest.raises(UsageError, match=r"https://\[::1 is not a URL: Invalid IPv6 URL"):
        download("https://[::1", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]
    server.redirects["/model.pth"] = f"{server.url}/other.pth"
    server.files["/other.pth"] = CONTENT
    assert download(f"{server.url}/model.pth", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["", "..", "%2e%2e", "..%2f..%2fevil", "a%00b", "a%0ab", "x" * 300])
def test_names_in_urls_stay_in_their_folder(server, tmp_path, name):
    with pytest.raises(UsageError, match="does not end in a file name"):
        download(f"{server.url}/{name}", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_hash_must_be_one(server, tmp_path, capsys):
    torch.save(official("vit"), tmp_path / "model.pth")
    tail = ["--output_dir", str(tmp_path / "out"), "--sha256"]
    for source in (f"{server.url}/model.pth", str(tmp_path / "model.pth"), "official_vit-s-300ep"):
        for sha256 in ("", "xyz", "0" * 65):
            fails([source, *tail, sha256], 2, f"--sha256 {sha256!r} is not a SHA-256", capsys)
    fails([str(tmp_path / "model.pth"), *tail, "0" * 64], 2, "has a wrong hash", capsys)
    assert server.requests == []


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_module, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mocov3_hf"


def published(server, name, content):
    """Serve `content` under the path that the zoo has for `name`, with its real hash in the table."""
    path = load_zoo()[name].url.split("://", 1)[1].split("/", 1)[1]
    server.files[f"/{path}"] = content
    return hashlib.sha256(content).hexdigest()


def saved(payload, tmp_path):
    torch.save(payload, tmp_path / "payload.pth")
    return (tmp_path / "payload.pth").read_bytes()


def with_tiny_heads(monkeypatch):
    convert = convert_module.convert_checkpoint
    monkeypatch.setattr(
        convert_module, "convert_checkpoint", lambda *args, **options: convert(*args, **options, num_attention_heads=2)
    )


def test_fetch_downloads_converts_once_and_needs_no_server_after(server, home, tmp_path, monkeypatch):
    name = "official_vit-s-300ep"  # its file name carries no hash
    content = saved({"epoch": 300, "state_dict": {f"module.{k}": v for k, v in official("vit").items()}}, tmp_path)
    published(server, name, content)
    with pytest.raises(ConversionError, match="pass --num_attention_heads"):
        fetch(name, mirror=server.url)  # a tiny model is none of MoCo v3's
    assert not (home / "models" / name).exists()
    with_tiny_heads(monkeypatch)
    folder = fetch(name, mirror=server.url)
    assert folder == str(home / "models" / name)
    assert not (home / "downloads" / name).exists()
    count = len(server.requests)
    assert count == 1  # what the first attempt had downloaded was kept
    assert fetch(name, mirror="http://127.0.0.1:9") == folder
    assert AutoModel.from_pretrained(folder)(torch.zeros(1, 3, 32, 32)).pooler_output.shape == (1, 32)
    assert fetch(name, mirror=server.url, cache_dir=tmp_path / "elsewhere") == str(tmp_path / "elsewhere" / name)


def test_a_damaged_download_is_not_kept(server, home, tmp_path, monkeypatch):
    name = "official_vit-s-300ep"
    content = saved({"state_dict": official("vit")}, tmp_path)
    place = content.index(official("vit")["predictor.0.weight"].numpy().tobytes()) + 50
    damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    with_tiny_heads(monkeypatch)
    published(server, name, damaged)
    with pytest.raises(ConversionError, match=r"the checksum of its record payload/data/\d+ is wrong"):
        fetch(name, mirror=server.url)
    assert not list((home / "downloads" / name).iterdir())
    published(server, name, content)
    (home / "downloads" / name / "vit-s-300ep.pth.tar").write_bytes(damaged)  # kept by an earlier run
    assert fetch(name, mirror=server.url) == str(home / "models" / name)


def test_two_at_once_download_once(server, home, tmp_path, monkeypatch):
    name = "official_vit-s-300ep"
    published(server, name, saved({"state_dict": official("vit")}, tmp_path))
    with_tiny_heads(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: fetch(name, mirror=server.url), range(3)))
    assert folders == {str(home / "models" / name)}
    assert len(server.requests) == 1


def test_fetched_classifier_works_in_a_pipeline(server, home, tmp_path, monkeypatch):
    name = "vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k"
    state_dict = mmpretrain_classification("vit")
    state_dict["head.layers.head.weight"], state_dict["head.layers.head.bias"] = (
        torch.randn(1000, 32),
        torch.zeros(1000),
    )
    digest = published(server, name, saved({"meta": {}, "state_dict": state_dict}, tmp_path))
    with_tiny_heads(monkeypatch)
    with pytest.raises(RunError, match=f"wrong hash: its SHA-256 begins with {digest[:8]}, published is f1e6c442"):
        fetch(name, mirror=server.url)
    monkeypatch.setattr(
        zoo_module, "find_entry", lambda name: zoo_module.ZooEntry(**vars(load_zoo()[name]) | {"sha256": digest})
    )
    classify = pipeline("image-classification", model=fetch(name, mirror=server.url))
    config = classify.model.config
    assert (config.id2label[0], config.num_labels) == ("tench", 1000)
    assert config.backbone_config.position_embedding == "learned"  # the zoo says fine-tuned
    assert classify.image_processor.resample == 3  # bicubic


def fails(arguments, code, message, capsys):
    """Run the command, which must end with this exit code and one line."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == code
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_command_takes_names_and_urls(server, home, tmp_path, capsys):
    content = saved({"state_dict": official("vit")}, tmp_path)
    server.files["/some/file.pth"] = content
    url = f"{server.url}/some/file.pth"
    tail = ["--output_dir", str(tmp_path / "out"), "--num_attention_heads", "2"]
    main([url, *tail, "--sha256", hashlib.sha256(content).hexdigest()])
    published(server, "official_vit-s-300ep", content)
    main(["official_vit-s-300ep", "--mirror", server.url, *tail, "--overwrite_output_dir"])
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["source"]["name"] == "official_vit-s-300ep"
    assert report["source"]["url"] == "https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"
    capsys.readouterr()
    tail[1] = str(tmp_path / "other")
    fails([url, *tail, "--sha256", "00"], 1, "wrong hash", capsys)
    fails(["vit-s-300ep", *tail], 2, "did you mean official_vit-s-300ep", capsys)
    fails(["vit-s-300ep.pth", *tail], 2, "checkpoint 'vit-s-300ep.pth' does not exist", capsys)
    fails(tail, 2, "--source is missing", capsys)
    fails([url], 2, "--output_dir is missing", capsys)
    fails([url, *tail, "--num_attention_head", "3"], 2, "did you mean '--num_attention_heads'", capsys)


def test_unknown_name_is_answered_with_close_ones():
    with pytest.raises(UsageError, match="is called 'official_vit-s-300': did you mean official_vit-s-300ep"):
        fetch("official_vit-s-300")


def test_zoo_holds_every_published_model(capsys):
    zoo = load_zoo()
    assert len(zoo) == 23
    zoo_module.main([])
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 24
    main(["--list"])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (table, "warning: --list is deprecated: use mocov3 zoo\n")
    for name, entry in zoo.items():
        assert name in table
        assert find_entry(name) is entry
        assert entry.pretrained is None or zoo[entry.pretrained].stage == "pretrained"
        file = Path(entry.url).name
        assert (hash_in_name(file) is not None) == (entry.source == "openmmlab")
    hashes = {hash_in_name(Path(entry.url).name) for entry in zoo.values()} - {None}
    assert len(hashes) == 13
