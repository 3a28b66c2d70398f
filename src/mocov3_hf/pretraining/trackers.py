"""The trackers of `--report_to`: accelerate's own, continued on resume, and never a reason for a run to end."""

import functools
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from ..reporting import RunError, one_line, warn
from ..run_folder import KNN, METRICS, TRACKERS, read_object
from ..storage import read_lines, write_json
from .recipe import Recipe


PROJECT = "mocov3"


@dataclass
class Outbox:
    """What a tracker has received, and what it has not."""

    sent: dict[str, int]  # last step, by file of the same metrics
    waiting: list[tuple[dict[str, float], int]] = field(default_factory=list)  # metrics and step
    latest: list[tuple[dict[str, float], int]] = field(default_factory=list)  # of the last step that has arrived
    error: Exception | None = None  # why the rest waits
    started: int = field(default_factory=lambda: int(time.time()))  # second of the last start


class Trackers:
    """
    Sends metrics to every tracker, each step once. What a tracker does not accept, for example on a full disk, waits
    in memory and is sent with the next metrics.

    The names under which the trackers know the run are kept in `trackers.json`, so that a resumed run continues there.
    Steps that a resumed run repeats have the same metrics; they are sent only where they have not arrived.

    To be entered.

    Args:
        accelerator: Made with `log_with`.
        recipe: Names the run, and is sent as its configuration.
        output_dir: The output folder.
        steps_done: Of the checkpoint from which the run resumes, 0 for a new run. The lines of `metrics.jsonl` and
            `knn.jsonl` beyond it, if there are any, have been sent already.

    Raises:
        RunError: a tracker does not start.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        output_dir: Path,
        steps_done: int = 0,
    ):
        self.accelerator = accelerator
        known = read_object(output_dir / TRACKERS, []) if steps_done > 0 else {}
        name = recipe.run.run_name or output_dir.resolve().name
        token = secrets.token_hex(4)
        options = {
            # Hides what was written after the checkpoint, or by an earlier run in this folder.
            "tensorboard": {"purge_step": steps_done + 1},
            "wandb": {"id": known.get("wandb", token), "name": name, "resume": "allow"},
            "trackio": {
                "name": known.get("trackio", recipe.run.run_name or f"{name}-{token}"),
                "resume": "allow" if "trackio" in known else "never",
            },
        }
        last = {name: last_step(output_dir / name) for name in (METRICS, KNN)}
        self.outboxes: dict[str, Outbox] = {}
        self.excepthook = threading.excepthook
        threading.excepthook = hide_errors_of_tensorboard(self.excepthook)
        try:
            accelerator.init_trackers(PROJECT, init_kwargs=options)
            for tracker in accelerator.trackers:
                start = first_missing_step(tracker, steps_done)
                self.outboxes[tracker.name] = Outbox(dict(last) if start is None else dict.fromkeys(last, start - 1))
                if tracker.name != "tensorboard" or steps_done == 0:  # which would list it as another run
                    tracker.store_init_configuration(tracker_config(recipe))
        except Exception as error:  # every tracker raises its own kinds
            threading.excepthook = self.excepthook
            names = " ".join(recipe.monitoring.report_to)
            raise RunError(f"--report_to {names} does not start: {one_line(error)}") from error
        if accelerator.is_main_process and accelerator.trackers:
            used = {tracker.name for tracker in accelerator.trackers}
            identities = {"wandb": options["wandb"]["id"], "trackio": options["trackio"]["name"]}
            if used & identities.keys():
                write_json(output_dir / TRACKERS, {name: identities[name] for name in identities if name in used})

    def log(self, name: str, values: dict[str, float], step: int) -> None:
        """
        Send the metrics of a step that a line of the file `name` has. Does not raise: a failure is reported once, and
        so is its end.
        """
        if not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers:
            outbox = self.outboxes[tracker.name]
            if step > outbox.sent[name]:
                outbox.sent[name] = step
                outbox.waiting.append((values, step))
            self.send(tracker)

    def send(self, tracker: GeneralTracker, is_last: bool = False) -> None:
        """Send what waits for a tracker, or leave it to the next time unless this is the last."""
        outbox = self.outboxes[tracker.name]
        if not outbox.waiting:
            return
        error = None
        if outbox.error is not None and tracker.name == "tensorboard":
            # Its thread has ended, and a part of a step may be written: hide that step and send it again. Files are
            # named by the second, and read in this order.
            while int(time.time()) == outbox.started:
                if not is_last:
                    return
                time.sleep(0.1)
            outbox.started = int(time.time())
            step = outbox.waiting[0][1]
            outbox.waiting[:0] = [entry for entry in outbox.latest if entry[1] == step]
            outbox.latest = []
            tracker.init_kwargs["purge_step"] = step
            error = attempt(tracker.start)
        number = 0
        while error is None and outbox.waiting:
            values, step = outbox.waiting[0]
            error = attempt(functools.partial(tracker.log, values, step=step))
            if error is None:
                outbox.latest = [entry for entry in outbox.latest if entry[1] == step] + [outbox.waiting.pop(0)]
                number += 1
        if error is None and outbox.error is not None:
            warn(f"--report_to {tracker.name} works again: {number} entries kept in memory were sent")
        elif error is not None and outbox.error is None:
            warn(f"--report_to {tracker.name} failed ({one_line(error)}): its entries are kept in memory")
        outbox.error = error

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """End the trackers; report what could not be sent."""
        for tracker in self.accelerator.trackers:
            if self.accelerator.is_main_process:
                self.send(tracker, is_last=True)
                outbox = self.outboxes[tracker.name]
                if outbox.error is not None:
                    number, reason = len(outbox.waiting), one_line(outbox.error)
                    warn(f"{number} entries for --report_to {tracker.name} are lost ({reason}): see metrics.jsonl")
            end = tracker.finish
            if kind is not None and tracker.name == "wandb" and hasattr(tracker, "run"):
                end = functools.partial(tracker.run.finish, exit_code=1)  # shown as failed
            error = attempt(end)
            if error is not None and self.outboxes[tracker.name].error is None:
                warn(f"--report_to {tracker.name} did not end properly: {one_line(error)}")
        self.accelerator.trackers.clear()
        threading.excepthook = self.excepthook


def hide_errors_of_tensorboard(before: Callable[[threading.ExceptHookArgs], object]) -> Callable:
    """
    A hook for the errors of threads without a traceback from the one that writes for tensorboard: the next call raises
    its error as well. Every thread started meanwhile keeps the hook to its end, so it refers to nothing of the run:
    tensors that a thread releases while the interpreter exits abort the process.
    """

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            before(arguments)

    return hook


def attempt(action: Callable[[], None]) -> Exception | None:
    """The error of an action that must not end the run."""
    try:
        action()
    except Exception as error:  # of any tracker and of its connection
        return error
    return None


def last_step(path: Path) -> int:
    """The largest step in a JSON Lines file, 0 without one."""
    return max((int(line["step"]) for line in read_lines(path)[0]), default=0)


def first_missing_step(tracker: GeneralTracker, steps_done: int) -> int | None:
    """The first step that a tracker does not have; None if it cannot say."""
    if tracker.name == "tensorboard":
        return steps_done + 1
    if tracker.name == "wandb":
        return getattr(getattr(tracker, "run", None), "starting_step", 0) or None  # 0 offline
    return None


def tracker_config(recipe: Recipe) -> dict:
    """The recipe in types that every tracker stores."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in recipe.to_dict().items()
    }
