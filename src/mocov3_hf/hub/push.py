"""The command `mocov3 push`, and pushes to the Hub during a run."""

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the HTTP library that the Hub client is built on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..hints import describe_missing, either
from ..loading import resolve_model
from ..options import Command, option, parse
from ..reporting import RunError, UsageError, one_line, reporting
from ..results import RESULTS
from ..run_folder import CONFIG, CONVERSION, EVENTS, KNN, METRICS, PROCESSOR, RECIPE, read_object, read_run_folder
from ..storage import link_or_copy, process_is_alive
from .privacy import hide_machine
from .remote_code import AUTO_MAPS, add_code
from .run_card import MARKER, run_card


logger = logging.getLogger(__name__)

CARD, WEIGHTS = "README.md", "model*.safetensors"
# What of a model folder is pushed; never checkpoints with optimizer states.
PUSHED = (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    "model.safetensors.index.json",
    RESULTS,
    RECIPE,
    METRICS,
    EVENTS,
    KNN,
    CONVERSION,
    CARD,
    "*.png",
    "*.svg",
    "plots/*",
    "report.html",
)


def push_folder(folder: str | Path, repo_id: str, **options: Any) -> str:
    """
    Push a model folder to the Hub: weights, configuration, processor, the model's code, records, plots and a card.

    The folder itself is not changed. Files that the Hub has already are not sent again, so pushing again after a
    failure resumes the upload.

    Args:
        folder (`str` or `Path`):
            Of a saved model of this package.
        repo_id (`str`):
            `USER/NAME`, or `NAME` for the user of the token; created if missing.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        revision (`str`, *optional*):
            A branch; created if missing.
        license (`str`, *optional*):
            License of the weights, for the card.
        message (`str`, *optional*):
            Of the commit.
        api (`HfApi`, *optional*):
            A client with another endpoint or token.

    Returns:
        URL of the commit.

    Raises:
        UsageError: No model in the folder, or a name that is not valid.
        RunError: No valid token, no permission, or no connection.
    """
    check_repo_id(repo_id)
    staged = stage(Path(folder))
    try:
        return upload(staged, repo_id, **options)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def stage(folder: Path) -> Path:
    """
    A temporary folder with the files to push as they are now. Weights are linked where possible: no time, no space.

    Raises:
        UsageError: No model in the folder.
    """
    if not folder.exists():
        raise UsageError(describe_missing(folder, "model folder"))
    if read_object(folder / CONFIG, []).get("model_type") not in AUTO_MAPS:
        expected = either(map(repr, AUTO_MAPS))
        raise UsageError(f"{str(folder)!r} is not a MoCo v3 model: expected a {CONFIG} with model_type {expected}")
    if not list(folder.glob(WEIGHTS)):
        raise UsageError(f"{str(folder)!r} has no weights: expected {WEIGHTS}")
    remove_stale(folder)
    # Links only work on the same file system.
    place = folder if os.access(folder, os.W_OK) else None
    staged = Path(tempfile.mkdtemp(prefix=f".push_{os.getpid()}_", dir=place))
    try:
        for path in {path for pattern in PUSHED for path in folder.glob(pattern) if path.is_file()}:
            target = staged / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if path.suffix == ".safetensors":
                link_or_copy(path, target)
            else:  # a run appends to its records while they are uploaded
                shutil.copyfile(path, target)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def remove_stale(folder: Path) -> None:
    """Delete staged folders of processes that were killed during a push."""
    for path in folder.glob(".push_*_*"):
        owner = path.name.split("_")[1]
        if owner.isdecimal() and not process_is_alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def upload(
    staged: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
    api: HfApi | None = None,
) -> str:
    """
    Add code and card to a staged folder, take what names the machine out of it, upload it and return the URL of the
    commit; errors as `push_folder`.
    """
    api = api or HfApi()
    try:
        name = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        add_code(staged)
        own_card = not write_card(staged, name, license)
        hide_machine(staged, keep=(CARD,) if own_card else ())
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=staged,
            revision=revision,
            commit_message=message or "Upload model with mocov3_hf",
        )
    except Exception as error:
        raise explained(error, api.endpoint, repo_id) from error
    return commit.commit_url


def write_card(staged: Path, repo_id: str, license: str | None) -> bool:
    """Write the model card; a user's own card stays. Returns whether it was written."""
    card = staged / CARD
    if card.exists() and MARKER not in card.read_text(encoding="utf-8"):
        return False
    run = read_run_folder(staged)
    for note in run.notes:
        logger.warning("push: %s", note)
    card.write_text(run_card(run, repo_id, license), encoding="utf-8")
    return True


def check_repo_id(repo_id: str) -> None:
    """UsageError for what cannot be the name of a repository; asked before training, not after."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} is not a valid repository name: pass USER/NAME as --hub_model_id ({one_line(error)})"
        ) from error


def explained(error: Exception, endpoint: str, repo_id: str) -> Exception:
    """The error of a push as one line with the fix; an error of another origin as it is."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return explained(error.__cause__, endpoint, repo_id)  # the Hub client wraps errors of uploads
    if isinstance(error, OfflineModeIsEnabled):
        return RunError("HF_HUB_OFFLINE is set: unset it to push")
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return RunError(f"{repo_id!r} does not exist on the Hub, or this token may not see it: {one_line(error)}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return RunError(
            f"no valid token for {endpoint}: run `hf auth login`, or set HF_TOKEN to a token with write access"
        )
    if status == 403:
        return RunError(f"the token may not write to {repo_id!r}: use a token with write access, or another name")
    if status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429):
        return RunError(f"the Hub refuses the push to {repo_id!r} ({status}): {one_line(error)}")
    if isinstance(error, HTTPError):
        return RunError(
            f"the Hub at {endpoint} does not answer ({one_line(error)}): push again, files that arrived are not sent"
            " again"
        )
    if isinstance(error, ValueError):  # of the content: metadata of the card, a file that the Hub does not take
        return UsageError(one_line(error))
    return error


class BackgroundPusher:
    """
    Pushes the latest state of a folder during a run: one push at a time, without ever stalling or ending the run.

    `push` stages the folder and returns at once. While one push is uploading, only the newest staged state waits. A
    failed push is logged; the next one replaces it. Call `finish` at the end of the run.

    Args:
        repo_id (`str`):
            `USER/NAME`, or `NAME` for the user of the token.
        options:
            Of `push_folder`: `private`, `revision`, `license`, `api`.
    """

    def __init__(self, repo_id: str, **options: Any):
        self.repo_id = repo_id
        self.options = options
        self.lock = threading.Lock()
        self.waiting: tuple[Path, str | None] | None = None
        self.thread: threading.Thread | None = None
        self.last_error: str | None = None

    def push(self, folder: str | Path, message: str | None = None) -> None:
        """Stage the folder for the next push. Raises nothing; failures are logged."""
        try:
            staged = stage(Path(folder))
        except (OSError, UsageError) as error:
            self._fail(f"{folder} is not pushed: {one_line(error)}")
            return
        with self.lock:
            replaced, self.waiting = self.waiting, (staged, message)
            if self.thread is None:
                # Not `HfApi.run_as_future`: the interpreter waits for its threads on exit, and the Hub client has no
                # time limit, so a Hub that hangs would keep the finished process alive.
                self.thread = threading.Thread(target=self._work, name="push_to_hub", daemon=True)
                self.thread.start()
        if replaced is not None:
            shutil.rmtree(replaced[0], ignore_errors=True)

    def finish(self, timeout: float = 600.0) -> bool:
        """Wait up to `timeout` seconds for the last push; return whether it reached the Hub."""
        thread = self.thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                self._fail(f"the push to {self.repo_id} did not end in {timeout:g} s: run mocov3 push")
                return False
        return self.last_error is None

    def _work(self) -> None:
        while True:
            with self.lock:
                if self.waiting is None:
                    self.thread = None
                    return
                (staged, message), self.waiting = self.waiting, None
            try:
                upload(staged, self.repo_id, message=message, **self.options)
                self.last_error = None
            except Exception as error:  # whatever it is, it must not end the run
                self._fail(one_line(error))
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def _fail(self, reason: str) -> None:
        self.last_error = reason
        logger.warning("push: %s", reason)


# The command


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model: str = option(help="Folder of a model, such as the output folder of a run.", metavar="MODEL")


@dataclass(frozen=True)
class HubOptions:
    """Hub"""

    hub_model_id: str = option(help="Repository to push to, created if it does not exist.", metavar="USER/NAME")
    hub_private_repo: bool = option(False, "Make a new repository private.", old=("private",))
    hub_revision: str | None = option(
        None, "Branch, created if it does not exist.", old=("revision",), metavar="BRANCH"
    )
    license: str | None = option(None, "License of the weights for the card, such as apache-2.0.")
    commit_message: str | None = option(None, "Message of the commit.", old=("message",))


COMMAND = Command(
    "push",
    "Push a model folder to the Hub, with its code, card and results.",
    (ModelOptions, HubOptions),
    positional="model",
)


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 push MODEL --hub_model_id USER/NAME`; prints the URL of the commit."""
    with reporting():
        model, hub = parse(COMMAND, arguments)
        url = push_folder(
            resolve_model(model.model),
            hub.hub_model_id,
            private=hub.hub_private_repo,
            revision=hub.hub_revision,
            license=hub.license,
            message=hub.commit_message,
        )
        print(url)
