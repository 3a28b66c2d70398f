"""
Classes or features of images over HTTP, with FastAPI.

    pip install "mocov3_hf[serve]"
    python examples/serve.py runs/my-classifier --port 8000
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/classify?top_k=3"
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/features"

The body of a request is one encoded image. Errors are one line of JSON: 413 for more than `--max_megabytes`, 415 for
bytes that cannot be decoded as an image or for one of more than `--max_megapixels`, 422 for a parameter that is not
valid.
"""

import argparse

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool

from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.loading import load_config
from mocov3_hf.reporting import reporting


def create_app(model: str, max_bytes: int = 10_000_000, **options) -> FastAPI:
    """
    An application with `/classify`, `/features` and `/health`.

    Args:
        model: Folder, Hub id or published name. Without a classification head, there is no `/classify`.
        max_bytes: Size of the largest body that is accepted.
        options: Of `FeatureExtractor` and `ImageClassifier`; `max_pixels` is 25 million by default, because each
            request at the same time holds a decoded image.
    """
    app = FastAPI(title="mocov3_hf")
    options = {"batch_size": 1, "num_workers": 0, "max_pixels": 25_000_000} | options  # a request has one image
    extract = FeatureExtractor(model, **options)
    is_classifier = any(name.endswith("ForImageClassification") for name in load_config(model).architectures or [])
    classify = ImageClassifier(model, **options) if is_classifier else None

    async def body_of(request: Request) -> bytes:
        """The body, of which no more is read than `max_bytes`."""
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > max_bytes:
                raise HTTPException(413, f"the image has more than {max_bytes:,} bytes")
        return bytes(data)

    async def answer(function, *arguments):
        try:
            return await run_in_threadpool(function, *arguments)
        except ValueError as error:
            raise HTTPException(415, f"the image {getattr(error.__cause__, 'reason', error)}") from error

    @app.get("/health")
    def health() -> dict:
        return {"model": model, "classify": classify is not None}

    @app.post("/features")
    async def features(request: Request) -> dict:
        rows = await answer(extract, await body_of(request))
        return {"features": rows[0].tolist()}

    if classify is not None:

        @app.post("/classify")
        async def classes(request: Request, top_k: int = Query(5, ge=1)) -> dict:
            return {"labels": await answer(classify, await body_of(request), top_k)}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts requests from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_megabytes", type=float, default=10)
    parser.add_argument("--max_megapixels", type=float, default=25)
    options = parser.parse_args()
    with reporting():
        app = create_app(options.model, int(options.max_megabytes * 1e6), max_pixels=int(options.max_megapixels * 1e6))
    uvicorn.run(app, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
