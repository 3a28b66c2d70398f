"""Streaming over HTTP with connections cut at random: the same samples in the same order, none lost, none twice."""

import http.server
import random
import threading
from pathlib import Path

import datasets
import pytest
import torch

from mocov3_hf.data import remote
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.remote import RemoteFile, is_remote, read_file, retrying
from mocov3_hf.data.shards import PathShard, parquet_shards
from mocov3_hf.data.sources import StreamSource, open_source
from mocov3_hf.data.views import two_views


class CuttingHandler(http.server.BaseHTTPRequestHandler):
    """Serves files by ranges; breaks off `server.cut_share` of the answers in the middle, or refuses them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        headers = {"Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(start), min(int(stop or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            data, status = data[start : stop + 1], 206
        with server.lock:
            server.requests += 1
            server.sent += len(data) if body else 0
            chance = server.chance.random()
            cut_at = server.chance.randrange(len(data) + 1)
        if server.refusals > 0 or chance < server.cut_share / 4:
            server.refusals -= 1
            server.cuts += 1
            self.send_error(503)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if chance < server.cut_share:
            server.cuts += 1
            self.wfile.write(data[:cut_at])
            self.close_connection = True
            return
        self.wfile.write(data)


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(folder: Path, cut_share: float = 0.0):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CuttingHandler)
        server.daemon_threads = True
        server.folder, server.cut_share, server.chance = folder, cut_share, random.Random(7)
        server.lock, server.requests, server.cuts, server.sent = threading.Lock(), 0, 0, 0
        server.refusals = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 30)


@pytest.fixture
def parquet(tmp_path, make_png):
    """Folder with files of 20, 11 and 29 rows in row groups of up to 5."""
    folder = tmp_path / "served"
    folder.mkdir()
    start = 0
    for number, size in enumerate((20, 11, 29)):
        rows = [{"bytes": make_png(index), "path": None} for index in range(start, start + size)]
        columns = {"image": rows, "text": ["no use " * 2000] * size}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{number}.parquet", batch_size=5)
        start += size
    return folder


def batches(source, start_step=0, **options):
    loader = TwoViewLoader(source, two_views(image_size=16), global_batch_size=6, lanes=2, window=3, seed=1, **options)
    return list(loader.epoch(1, start_step))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_over_a_network_that_drops(serve, parquet, impatient, workers):
    steady, url = serve(parquet)
    files = [f"{url}/{number}.parquet" for number in range(3)]
    expected = batches(open_source(str(parquet), streaming=True))
    source = open_source("parquet", data_files=files, streaming=True)
    assert source.num_samples == 60
    assert len(source.shards) == 4 + 3 + 6
    steady.cut_share = 0.4
    found = batches(source, num_workers=workers)
    assert steady.cuts > 5
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["sample_ids"], other["sample_ids"])
        assert torch.equal(one["pixels"], other["pixels"])
    assert sorted(torch.cat([batch["sample_ids"] for batch in found]).tolist()) == list(range(60))
    resumed = batches(source, 6, num_workers=workers)
    assert len(resumed) == 4
    assert torch.equal(resumed[0]["pixels"], expected[6]["pixels"])


def test_opening_survives_cuts_too(serve, parquet, impatient):
    server, url = serve(parquet)
    # What `datasets` itself does to resolve names has its own retries; ours begin with the footers.
    server.cut_share = 0.5
    assert [len(parquet_shards(f"{url}/{number}.parquet", "image")) for number in range(3)] == [4, 3, 6]
    assert server.cuts > 0


def test_a_process_fetches_only_its_share(serve, parquet, impatient):
    server, url = serve(parquet)
    files = [f"{url}/{number}.parquet" for number in range(3)]
    source = open_source("parquet", data_files=files, streaming=True)
    sent = []
    for processes in (1, 2):
        before = server.sent
        batches(source, num_processes=processes, process_index=0)
        sent.append(server.sent - before)
    assert sent[1] < 0.75 * sent[0]


def test_webdataset_over_a_network_that_drops(serve, tmp_path, make_png, impatient):
    import io
    import tarfile

    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for index in range(shard * 9, shard * 9 + 9):
                member = tarfile.TarInfo(f"{index:04d}.png")
                member.size = len(make_png(index))
                archive.addfile(member, io.BytesIO(make_png(index)))
    server, url = serve(folder)
    files = [f"{url}/{number}.tar" for number in range(4)]
    source = open_source("webdataset", data_files=files, streaming=True)
    assert source.num_samples is None
    server.cut_share = 0.5
    found = batches(source, steps_per_epoch=6)
    assert server.cuts > 0
    assert len(torch.cat([batch["sample_ids"] for batch in found]).unique()) == 36
    again = batches(source, 3, steps_per_epoch=6, num_workers=2)
    assert torch.equal(again[0]["pixels"], found[3]["pixels"])


@pytest.mark.slow
def test_images_that_are_files_on_a_network(serve, tmp_path, make_png, impatient):
    folder = tmp_path / "loose"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index:02d}.png").write_bytes(make_png(index))
    server, url = serve(folder, cut_share=0.4)
    source = StreamSource([PathShard(tuple(f"{url}/{index:02d}.png" for index in range(30)))])
    found = batches(source)
    expected = batches(StreamSource([PathShard(tuple(str(path) for path in sorted(folder.iterdir())))]))
    assert server.cuts > 0
    assert all(torch.equal(one["pixels"], other["pixels"]) for one, other in zip(found, expected, strict=True))
    (folder / "07.png").unlink()
    server.cut_share = 0
    loader = TwoViewLoader(source, two_views(image_size=16), global_batch_size=6, max_bad_fraction=0.1)
    assert len(list(loader.epoch(0))) == 5
    assert loader.num_bad_images == 1


def test_a_shard_that_is_gone_is_named(serve, parquet, impatient):
    _, url = serve(parquet)
    source = open_source("parquet", data_files=[f"{url}/{number}.parquet" for number in range(3)], streaming=True)
    (parquet / "1.parquet").unlink()
    with pytest.raises(RuntimeError, match=r"shard \d+ of the stream, .*1\.parquet.*FileNotFoundError"):
        batches(source)


@pytest.mark.slow
def test_ranges_and_whole_files(serve, tmp_path, impatient):
    data = random.Random(0).randbytes(100_000)
    (tmp_path / "file.bin").write_bytes(data)
    _, url = serve(tmp_path, cut_share=0.5)
    file = RemoteFile(f"{url}/file.bin")
    assert file.size() == 100_000
    assert file.seek(-10, 2) == 99_990
    assert file.read() == data[-10:]
    assert file.read(5) == b""
    file.seek(1000)
    assert file.read(5000) == data[1000:6000]
    assert file.tell() == 6000
    assert read_file(f"{url}/file.bin") == data
    assert read_file(str(tmp_path / "file.bin")) == data
    assert is_remote(url)
    assert not is_remote(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        RemoteFile(f"{url}/none.bin")


def test_an_overloaded_server_is_no_missing_file(serve, tmp_path, impatient):
    (tmp_path / "file.bin").write_bytes(b"content")
    server, url = serve(tmp_path)
    server.refusals = 3
    assert read_file(f"{url}/file.bin") == b"content"
    before = server.cuts
    with pytest.raises(FileNotFoundError):
        read_file(f"{url}/none.bin")
    assert before == server.cuts >= 3


def test_waits_double_and_an_end_comes():
    waits, calls = [], []

    def fail():
        calls.append(1)
        raise ConnectionResetError("cut")

    with pytest.raises(ConnectionError, match="a file could not be read in 9 attempts: ConnectionResetError: cut"):
        retrying(fail, "a file", sleep=waits.append)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 32]
    assert len(calls) == 9

    def missing():
        raise FileNotFoundError("none")

    with pytest.raises(FileNotFoundError):
        retrying(missing, "a file", sleep=waits.append)
    assert len(waits) == 8
