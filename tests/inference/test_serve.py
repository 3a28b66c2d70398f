"""examples/serve.py on the loopback interface."""

import importlib.util
import io
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from mocov3_hf.inference import FeatureExtractor, ImageClassifier


pytestmark = pytest.mark.slow
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f'needs {package}: pip install "mocov3_hf[serve]"')
SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
OPTIONS = {"device": "cpu", "dtype": "float32", "num_workers": 0}


def bomb():
    """A small file with many pixels."""
    file = io.BytesIO()
    Image.new("L", (1100, 1000)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def address(vit):
    import uvicorn

    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    app = serve.create_app(vit, max_bytes=20_000, max_pixels=1_000_000, **OPTIONS)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def ask(url, data=None):
    """Status and JSON of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_answers_are_those_of_python(address, vit, files):
    data = Path(files[0]).read_bytes()
    assert ask(f"{address}/health") == (200, {"model": vit, "classify": True})
    expected = ImageClassifier(vit, **OPTIONS)(files[0], top_k=2)
    assert ask(f"{address}/classify?top_k=2", data) == (200, {"labels": expected})
    expected = FeatureExtractor(vit, **OPTIONS)(files[0])[0].tolist()
    status, found = ask(f"{address}/features", data)
    assert (status, found["features"]) == (200, pytest.approx(expected, abs=1e-6))


def test_many_requests_at_a_time(address, vit, files):
    expected = [{"labels": labels} for labels in ImageClassifier(vit, **OPTIONS)(files)]
    answers = {}

    def one(index):
        answers[index] = ask(f"{address}/classify", Path(files[index]).read_bytes())

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answer in enumerate(expected):
        assert answers[index][0] == 200
        for found, wanted in zip(answers[index][1]["labels"], answer["labels"], strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "data", "status", "message"),
    [
        ("classify", b"\xff\xd8\xff no image", 415, "the image cannot be decoded"),
        ("features", b"no image", 415, "the image cannot be decoded"),
        ("classify", b"", 415, "the image is empty"),
        ("features", bomb(), 415, "the image is 1100x1000 pixels, more than the allowed 1000000"),
        ("features", bytes(30_000), 413, "the image has more than 20,000 bytes"),
    ],
)
def test_bad_images_get_one_line(address, path, data, status, message):
    code, answer = ask(f"{address}/{path}", data)
    assert code == status
    assert answer["detail"].startswith(message)
    assert "\n" not in answer["detail"]


def test_bad_parameters_are_refused(address, files):
    code, answer = ask(f"{address}/classify?top_k=0", Path(files[0]).read_bytes())
    assert code == 422
    assert "greater than or equal to 1" in answer["detail"][0]["msg"]
