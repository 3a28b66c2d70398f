"""What a run reports about itself: metrics.jsonl, events.jsonl, trackers and the progress bar."""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..model.loss_mocov3 import chance_loss, floor_loss
from ..plan import Plan
from ..metrics.collapse import collapse_summary
from .instability import DivergenceDetector, GradientWatch, Instability
from .resume import cut_back, keep_lines
from .step import StepOutput


# What is kept of every step until the next line, all 0-dim, before the norms of the blocks. Gradients are the same on
# all processes.
STEP_VALUES = (
    "loss",
    "positive_top1",
    "grad_norm",
    "first_layer_grad_max",
    "last_layer_grad_max",
    "times_usual",
    "skipped",
)


# Share of the time spent waiting for data from which on the progress bar shows it.
LARGEST_SILENT_DATA_WAIT = 0.05
# Skipped steps in a row after which a run has diverged: more than the scaler of fp16 needs to find its scale.
MAX_SKIPPED_IN_A_ROW = 50


def normalized_loss(loss: float, temperature: float, global_batch_size: int) -> float:
    """0 at chance, 1 where positives coincide and negatives are orthogonal: comparable across recipes."""
    chance, floor = chance_loss(temperature, global_batch_size), floor_loss(temperature, global_batch_size)
    return (chance - loss) / (chance - floor)


def signs_of_collapse(projection: torch.Tensor) -> dict[str, float]:
    """Spread of the keys `(B, P)` of all processes; nothing where the last step was a skipped one."""
    if not projection.isfinite().all():
        return {}
    summary = collapse_summary(projection)
    return {"projection_std_ratio": summary.std_ratio, "projection_effective_rank": summary.effective_rank}


class DivergedError(RuntimeError):
    """A run whose gradients have stopped being numbers, or that rollbacks do not help."""


class TrainingLog:
    """
    Keeps what the steps give and reads it when it is asked to, the only moments that wait for the device.

    Args:
        accelerator: Processes, device and trackers.
        plan: Length of the run and its batch.
        temperature: Of the loss, for its normalisation.
        output_dir: Folder of `metrics.jsonl` and `events.jsonl`; lines are appended.
        watch: Of the gradients; gives the names of the blocks.
        start_step: Steps done before this run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: Plan,
        temperature: float,
        output_dir: Path,
        watch: GradientWatch,
        start_step: int = 0,
    ):
        self.accelerator, self.plan, self.temperature, self.watch = accelerator, plan, temperature, watch
        self.metrics_file, self.events_file = output_dir / "metrics.jsonl", output_dir / "events.jsonl"
        self.progress = tqdm(
            total=plan.total_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process
        )
        self.num_skipped = self.num_skipped_in_a_row = self.num_spikes = self.num_events = self.num_rollbacks = 0
        self.notes: dict[str, str] = {}
        self.divergence = DivergenceDetector()
        self.start_window()

    def start_window(self) -> None:
        self.steps: list[torch.Tensor] = []  # STEP_VALUES and block norms of every step since the last line
        self.num_examined = 0
        self.num_timed, self.data_wait, self.started = 0, 0.0, time.perf_counter()

    def rows(self) -> list[list[float]]:
        """The steps since the last line, averaged over the processes."""
        if not self.steps:
            return []
        return self.accelerator.reduce(torch.stack(self.steps), reduction="mean").tolist()

    def state(self) -> dict:
        """What a run that continues needs to write the same lines; to be read when all steps have been examined."""
        return {
            "rows": self.rows(),
            "num_skipped": self.num_skipped,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
            "num_spikes": self.num_spikes,
            "num_events": self.num_events,
            "spikes": self.watch.spikes.state(),
            "divergence": self.divergence.state(),
        }

    def resume(self, state: dict, steps_done: int, num_rollbacks: int) -> None:
        """Take up the state of before, and drop the lines of steps that will be done again."""
        self.go_back(state, steps_done, num_rollbacks)
        self.num_events = state["num_events"]
        if self.accelerator.is_main_process:
            keep_lines(self.events_file, self.num_events)

    def go_back(self, state: dict, steps_done: int, num_rollbacks: int) -> None:
        """The same in the middle of a run: what has happened stays recorded."""
        self.start_window()
        self.num_rollbacks = num_rollbacks
        self.steps = [torch.tensor(row, dtype=torch.float64, device=self.accelerator.device) for row in state["rows"]]
        self.num_examined = len(self.steps)
        self.num_skipped, self.num_spikes = state["num_skipped"], state["num_spikes"]
        self.num_skipped_in_a_row = state["num_skipped_in_a_row"]
        self.watch.spikes.load_state(state["spikes"])
        self.divergence = DivergenceDetector(**state["divergence"])
        self.progress.n = steps_done
        self.progress.refresh()
        if self.accelerator.is_main_process:
            cut_back(self.metrics_file, steps_done)

    def note(self, name: str, value: str) -> None:
        """Show something on the progress bar from now on."""
        self.notes[name] = value

    def leave_out(self, seconds: float) -> None:
        """Take time that was no training out of the throughput."""
        self.started += seconds

    def waited_for_data(self, seconds: float) -> None:
        self.data_wait += seconds

    def record(self, output: StepOutput) -> None:
        """Take in what an update gave, without looking at it."""
        values = torch.stack([getattr(output, name).double() for name in STEP_VALUES])
        self.steps.append(torch.cat([values, output.block_grad_norms.double()]))
        self.num_timed += 1
        self.progress.update()

    def examine(self, steps_done: int) -> Instability | None:
        """
        Look at the steps since the last time: count, tell and record what is not as it was before. Gives the first
        that has gone wrong.

        Raises:
            DivergedError: too many skipped steps in a row. A few are normal, above all with fp16 and its scaler.
        """
        rows = self.rows()[self.num_examined :]
        self.num_examined = len(self.steps)
        found = []
        for step, row in enumerate(rows, start=steps_done - len(rows) + 1):
            found += self.examine_step(step, dict(zip(STEP_VALUES, row, strict=False)))
        return found[0] if found else None

    def examine_step(self, step: int, row: dict[str, float]) -> list[Instability]:
        """Judge one update; infinite gradients under fp16 are how its scaler finds the scale, and no trouble."""
        found = []
        is_finite = math.isfinite(row["grad_norm"])
        self.num_skipped += bool(row["skipped"])
        self.num_skipped_in_a_row = 0 if is_finite else self.num_skipped_in_a_row + 1
        if row["skipped"]:
            self.record_event(step, "skipped", grad_norm=row["grad_norm"] if is_finite else None)
        if not is_finite and self.accelerator.scaler is None:
            found.append(Instability(step, "its gradient was infinite or NaN"))
        if self.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the gradients of all {MAX_SKIPPED_IN_A_ROW} steps up to step {step} were infinite or NaN: the"
                " run has diverged. Resume from an earlier checkpoint with --allow_recipe_change and a lower"
                " --base_learning_rate, or a --max_grad_norm; --on_instability rollback does so by itself"
            )
        if row["times_usual"] > 0:
            found.append(self.tell_spike(step, row))
        if not row["skipped"]:
            gain = normalized_loss(row["loss"], self.temperature, self.plan.global_batch_size)
            if self.divergence.add(gain):
                found.append(self.tell_divergence(step, gain))
        return found

    def tell_spike(self, step: int, row: dict[str, float]) -> Instability:
        """A gradient that stands out: accuracy may dip some tens of steps later."""
        self.num_spikes += 1
        layers = {name: row[name] for name in ("first_layer_grad_max", "last_layer_grad_max")}
        self.record_event(step, "spike", grad_norm=row["grad_norm"], times_usual=row["times_usual"], **layers)
        what = f"the gradient norm {row['grad_norm']:.3g} is {row['times_usual']:.1f} times the usual one"
        self.tell(
            f"warning: step {step}: {what} (largest component in the first layer {row['first_layer_grad_max']:.2g}, in"
            f" the last {row['last_layer_grad_max']:.2g}{'; step skipped' if row['skipped'] else ''})"
        )
        return Instability(step, what)

    def tell_divergence(self, step: int, gain: float) -> Instability:
        self.record_event(step, "divergence", loss_normalized=gain)
        what = "the loss has given up more than half of what it had gained over chance"
        self.tell(f"warning: step {step}: {what} (normalised, it is down at {gain:.3f}: 0 is chance)")
        return Instability(step, what)

    def tell(self, message: str) -> None:
        if self.accelerator.is_main_process:
            self.progress.write(message, file=sys.stderr)

    def record_event(self, step: int, event: str, **values: float | str | None) -> None:
        self.num_events += 1
        if self.accelerator.is_main_process:
            append_line(self.events_file, {"step": step, "event": event, **values})

    def write(
        self,
        steps_done: int,
        projection: torch.Tensor,
        learning_rate: float,
        momentum: float,
        num_bad_images: int,
    ) -> None:
        """
        One line about the steps since the last, which have been examined.

        Args:
            steps_done: Updates done.
            projection: `(B, P)` of the last step.
            learning_rate, momentum: Those the last step used.
            num_bad_images: Replaced in the whole run.
        """
        rows = self.rows()
        counted = [row for row in rows if not row[STEP_VALUES.index("skipped")]]
        # Without a step that counted there is nothing to average: null.
        columns = [statistics.fmean(column) for column in zip(*counted, strict=True)] or [None] * len(rows[0])
        mean = dict(zip(STEP_VALUES, columns, strict=False))
        largest = {
            name: max((row[STEP_VALUES.index(name)] for row in counted), default=None)
            for name in ("first_layer_grad_max", "last_layer_grad_max")
        }
        loss, normalized = mean["loss"], None
        if loss is not None:
            normalized = normalized_loss(loss, self.temperature, self.plan.global_batch_size)
        seconds = time.perf_counter() - self.started
        metrics = {
            "step": steps_done,
            "epoch": steps_done / self.plan.steps_per_epoch,
            "loss": loss,
            "loss_normalized": normalized,
            "positive_top1": mean["positive_top1"],
            "learning_rate": learning_rate,
            "momentum": momentum,
            "grad_norm": mean["grad_norm"],
            "images_per_second": self.num_timed * self.plan.global_batch_size / seconds,
            "data_wait_fraction": self.data_wait / seconds,
            "skipped_steps": self.num_skipped,
            "gradient_spikes": self.num_spikes,
            "rollbacks": self.num_rollbacks,
            **largest,
            **signs_of_collapse(self.accelerator.gather(projection.detach().float())),
            "block_grad_norms": dict(zip(self.watch.names, columns[len(STEP_VALUES) :], strict=True)),
        }
        if self.accelerator.is_main_process:
            append_line(self.metrics_file, metrics)
            self.show(metrics, num_bad_images)
        self.accelerator.log(flat(metrics), step=steps_done)
        self.start_window()

    def show(self, metrics: dict, num_bad_images: int) -> None:
        """The progress bar's end: what matters at a glance, and troubles only where there are any."""
        shown = {"epoch": f"{metrics['epoch']:.1f}"}
        if metrics["loss"] is not None:
            shown |= {"loss": f"{metrics['loss']:.3f}", "top1": f"{metrics['positive_top1']:.3f}"}
        shown |= self.notes
        shown["images/s"] = f"{metrics['images_per_second']:.0f}"
        if metrics["data_wait_fraction"] > LARGEST_SILENT_DATA_WAIT:
            shown["waiting for data"] = f"{metrics['data_wait_fraction']:.0%}"
        troubles = {
            "bad images": num_bad_images,
            "skipped steps": self.num_skipped,
            "spikes": self.num_spikes,
            "rollbacks": self.num_rollbacks,
        }
        self.progress.set_postfix(shown | {name: number for name, number in troubles.items() if number})

    def close(self) -> None:
        self.progress.close()


def append_line(file: Path, values: dict) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")


def flat(metrics: dict) -> dict[str, float]:
    """For trackers, which take neither nothing nor mappings."""
    blocks = {f"block_grad_norms/{name}": norm for name, norm in metrics["block_grad_norms"].items()}
    numbers = {name: value for name, value in metrics.items() if name not in ("step", "block_grad_norms")}
    return {name: value for name, value in (numbers | blocks).items() if value is not None}
