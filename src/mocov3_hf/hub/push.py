"""The command `scripts/push_to_hub.py`: a model folder to a Hub repository, whole, and again where it broke off."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever client the Hub's library is built on
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from ..remote_code import add_code
from .run_card import MARKER, read_json, run_card


# What a model folder gives to the Hub: weights, settings, record and plots; never checkpoints with optimizer states.
PUSHED = (
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "results.json",
    "recipe.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "knn.jsonl",
    "conversion.json",
    "README.md",
    "*.png",
    "*.svg",
    "plots/*",
    "report.html",
)
MAX_SHARD_BYTES = 5 * 10**9
AUTO_CLASSES = {"ForPreTraining": AutoModelForPreTraining, "ForImageClassification": AutoModelForImageClassification}


class PushError(RuntimeError):
    """A push that did not succeed: what the Hub answered and what to do, in one line."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    message: str | None = None,
    attempts: int = 5,
    pause_seconds: float = 2.0,
    api: HfApi | None = None,
) -> str:
    """
    Push a model folder to the Hub: weights (in shards where they are large), processor, code, card, record and plots.

    What was uploaded before is not uploaded again, so a push that broke off is resumed by the next one.

    Args:
        folder (`str` or `Path`):
            Of a saved model.
        repo_id (`str`):
            `USER/NAME`, or `NAME` for the user of the token; made where missing.
        private (`bool`, *optional*, defaults to `False`):
            Whether a repository that is made now is private.
        revision (`str`, *optional*):
            A branch, made where missing.
        license (`str`, *optional*):
            Identifier of the weights' license for the card.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB):
            A larger file of weights is cut into shards.
        attempts (`int`, *optional*, defaults to 5):
            How often to try while the Hub does not answer; the pauses between double.
        api (`HfApi`, *optional*):
            With another endpoint or token.

    Returns:
        URL of the commit.

    Raises:
        PushError: no model in the folder, no or a wrong token, no permission, or no answer.
    """
    api = api or HfApi()
    folder = Path(folder)
    remove_stale(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "mocov3":
        raise PushError(f"{folder} holds no MoCo v3 model: expected a config.json with model_type 'mocov3'")
    if not list(folder.glob("model*.safetensors")):
        raise PushError(f"{folder} holds no weights: expected model*.safetensors")
    for attempt in range(1, attempts + 1):
        try:
            name = full_name(api, repo_id)
            with tempfile.TemporaryDirectory(prefix=staging_prefix(), dir=staging_place(folder)) as staging:
                stage(folder, Path(staging), config, name, license, max_shard_bytes)
                api.create_repo(name, private=private or None, exist_ok=True)
                if revision is not None:
                    api.create_branch(name, branch=revision, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=name,
                    folder_path=staging,
                    revision=revision,
                    commit_message=message or "Upload model with mocov3_hf",
                )
            return commit.commit_url
        except Exception as error:
            reason = permanent_reason(error, api, repo_id)
            if reason is not None:
                raise PushError(reason) from error
            if attempt == attempts:
                raise PushError(
                    f"the Hub at {api.endpoint} does not answer ({one_line(error)}): run the same command again, what"
                    " was uploaded is kept"
                ) from error
            time.sleep(pause_seconds * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def full_name(api: HfApi, repo_id: str) -> str:
    """`USER/NAME`; asks who the token belongs to, so that a bad one is told before anything is read or sent."""
    user = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def permanent_reason(error: Exception, api: HfApi, repo_id: str) -> str | None:
    """One line for an error that no repetition mends; None for the others, of the network or the server."""
    if isinstance(error, PushError):
        return str(error)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return permanent_reason(error.__cause__, api, repo_id)  # how the client wraps what an upload met
    if isinstance(error, LocalTokenNotFoundError):
        return "no token for the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE: unset it to push"
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no name of a repository, expected USER/NAME: {one_line(error)}"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return f"the Hub knows no {repo_id!r} or hides it from this token: {one_line(error)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            return f"the token is not valid at {api.endpoint}: make a new one and run `hf auth login` or set HF_TOKEN"
        if status == 403:
            return f"the token may not write to {repo_id!r}: take one with write access, or another name"
        if 400 <= status < 500 and status not in (408, 409, 412, 429):
            return f"the Hub refuses the push to {repo_id!r} ({status}): {one_line(error)}"
        return None
    if isinstance(error, HTTPError | OSError):
        return f"{error}" if isinstance(error, FileNotFoundError) else None
    if isinstance(error, ValueError):  # what upload_folder and the card's metadata raise for content
        return one_line(error)
    raise error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__


def stage(folder: Path, staging: Path, config: dict, repo_id: str, license: str | None, max_shard_bytes: int) -> None:
    """Fill `staging` with exactly what goes to the Hub; files are linked where possible, at no cost in space."""
    for pattern in PUSHED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                link_or_copy(path, staging / path.relative_to(folder))
    weights = sorted(staging.glob("model*.safetensors"))
    if any(path.stat().st_size > max_shard_bytes for path in weights):
        reshard(folder, staging, config, weights, max_shard_bytes)
    add_code(replaceable(staging / "config.json").parent)
    card = staging / "README.md"
    if not card.exists() or MARKER in card.read_text(encoding="utf-8"):
        text = run_card(staging, repo_id, license)
        card.unlink(missing_ok=True)
        card.write_text(text, encoding="utf-8")


def staging_place(folder: Path) -> Path | None:
    """The folder itself, where hard links work, unless it cannot be written; then the system's temporary folder."""
    return folder if os.access(folder, os.W_OK) else None


def staging_prefix() -> str:
    """How temporary folders of this process begin."""
    return f".push_{os.getpid()}_"


def remove_stale(folder: Path) -> None:
    """Delete temporary folders of processes that were killed in the middle of a push."""
    for path in folder.glob(".push_*_*"):
        owner = path.name.split("_")[1]
        if owner.isdecimal() and not is_alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def replaceable(path: Path) -> Path:
    """Make a linked file a copy: what is written to it must not reach the original."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def reshard(folder: Path, staging: Path, config: dict, weights: list[Path], max_shard_bytes: int) -> None:
    """Replace the linked weights by shards of at most `max_shard_bytes`."""
    architecture = (config.get("architectures") or [""])[0]
    auto_class = next((c for suffix, c in AUTO_CLASSES.items() if architecture.endswith(suffix)), AutoModel)
    model = auto_class.from_pretrained(folder, dtype="auto")
    for path in [*weights, staging / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=staging) as written:
        model.save_pretrained(written, max_shard_size=max_shard_bytes)
        for path in Path(written).glob("model*"):
            path.rename(staging / path.name)


def main(argv: list[str] | None = None) -> int:
    """Run the command; gives back its exit status. Errors are one line on stderr."""
    parser = argparse.ArgumentParser(description="Push a model folder to the Hub, with its code, card and results.")
    parser.add_argument("path", metavar="PATH", help="the model folder")
    parser.add_argument(
        "--hub_model_id", required=True, metavar="USER/NAME", help="the repository; made where missing"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="a branch; made where missing")
    parser.add_argument("--license", help="license of the weights, for the card: apache-2.0, cc-by-nc-4.0, ...")
    parser.add_argument("--message", help="of the commit")
    args = parser.parse_args(argv)
    try:
        url = push_folder(
            args.path,
            args.hub_model_id,
            private=args.private,
            revision=args.revision,
            license=args.license,
            message=args.message,
        )
    except PushError as error:
        print(f"push_to_hub: {one_line(error)}", file=sys.stderr)
        return 1
    print(url)
    return 0
