"""What a run reports: metrics.jsonl, events.jsonl, trackers, the progress bar and the summary at the end."""

import math
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..metrics.collapse import collapse_summary
from ..model.loss_mocov3 import chance_loss, floor_loss
from ..reporting import RunError
from ..run_folder import EVENTS, KNN, METRICS, has_throughput, training_time
from ..storage import RecordFile, is_number, read_lines
from .instability import DivergenceDetector, GradientWatch, Instability
from .next_commands import next_commands
from .plan import Plan
from .recipe import Recipe
from .resume import truncate_lines
from .step import StepOutput
from .trackers import Trackers


# Values kept for every step until the next line, all 0-dim; the norms of the blocks follow. Gradients are the same on
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


# Data-loading stall, as a fraction of the time, above which the progress bar shows it.
LARGEST_SILENT_STALL = 0.05
# Consecutive skipped steps after which a run has diverged: more than the scaler of fp16 needs to find its scale.
MAX_SKIPPED_IN_A_ROW = 50


def normalized_loss(loss: float, temperature: float, global_batch_size: int) -> float:
    """0 at chance, 1 where positives coincide and negatives are orthogonal: comparable across recipes."""
    chance, floor = chance_loss(temperature, global_batch_size), floor_loss(temperature, global_batch_size)
    return (chance - loss) / (chance - floor)


def signs_of_collapse(projection: torch.Tensor) -> dict[str, float]:
    """Spread of the keys `(B, P)` of all processes; empty if the last step was skipped."""
    if not projection.isfinite().all():
        return {}
    summary = collapse_summary(projection)
    return {"projection_std_ratio": summary.std_ratio, "projection_effective_rank": summary.effective_rank}


class DivergedError(RunError):
    """The gradients of many consecutive steps were not finite, or rollbacks did not help."""


class TrainingLog:
    """
    Collects what the steps return and reads it on request. Only reading waits for the device.

    Args:
        accelerator: The processes and their device.
        trackers: Receive the same metrics.
        plan: Length of the run and its batch.
        temperature: Of the loss, for its normalization.
        output_dir: Folder of `metrics.jsonl`, `events.jsonl` and `knn.jsonl`; lines are appended.
        watch: Of the gradients; has the names of the blocks.
        start_step: Steps done before.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trackers: Trackers,
        plan: Plan,
        temperature: float,
        output_dir: Path,
        watch: GradientWatch,
        start_step: int = 0,
    ):
        self.accelerator, self.trackers = accelerator, trackers
        self.plan, self.temperature, self.watch = plan, temperature, watch
        self.metrics, self.events, self.knn = (RecordFile(output_dir / name) for name in (METRICS, EVENTS, KNN))
        self.progress = tqdm(
            total=plan.total_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process
        )
        self.num_skipped = self.num_skipped_in_a_row = self.num_spikes = self.num_events = self.num_rollbacks = 0
        self.is_alone = False  # whether the other processes can no longer be asked
        self.notes: dict[str, str] = {}
        self.divergence = DivergenceDetector()
        self.start_window()

    def start_window(self) -> None:
        self.steps: list[torch.Tensor] = []  # STEP_VALUES and block norms of every step since the last line
        self.num_examined = 0
        self.num_timed, self.data_wait, self.started = 0, 0.0, time.perf_counter()

    def rows(self) -> list[list[float]]:
        """The steps since the last line, averaged over the processes; of this one if it is the last."""
        if not self.steps:
            return []
        if self.is_alone:
            return torch.stack(self.steps).tolist()
        return self.accelerator.reduce(torch.stack(self.steps), reduction="mean").tolist()

    def state(self) -> dict:
        """What a resumed run needs to write the same lines; to be read when all steps have been examined."""
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
        """Restore the state of a checkpoint, and drop the lines of steps that will be repeated."""
        self.go_back(state, steps_done, num_rollbacks)
        self.num_events = state["num_events"]
        if self.accelerator.is_main_process:
            truncate_lines(self.events, number=self.num_events)

    def go_back(self, state: dict, steps_done: int, num_rollbacks: int) -> None:
        """The same within a run, at a rollback: events stay."""
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
            truncate_lines(self.metrics, steps_done=steps_done)
            truncate_lines(self.knn, steps_done=steps_done)

    def exclude(self, seconds: float) -> None:
        """Exclude time from the throughput that was not training."""
        self.started += seconds

    def waited_for_data(self, seconds: float) -> None:
        self.data_wait += seconds

    def record(self, output: StepOutput) -> None:
        """Add the output of a step, without reading it."""
        values = torch.stack([getattr(output, name).double() for name in STEP_VALUES])
        self.steps.append(torch.cat([values, output.block_grad_norms.double()]))
        self.num_timed += 1
        self.progress.update()

    def examine(self, steps_done: int) -> Instability | None:
        """
        Examine the steps since the last call: count, report and record instabilities. Returns the first.

        Raises:
            DivergedError: too many consecutive skipped steps. A few are normal, above all with fp16 and its scaler.
        """
        rows = self.rows()[self.num_examined :]
        self.num_examined = len(self.steps)
        found = []
        for step, row in enumerate(rows, start=steps_done - len(rows) + 1):
            found += self.examine_step(step, dict(zip(STEP_VALUES, row, strict=False)))
        return found[0] if found else None

    def examine_step(self, step: int, row: dict[str, float]) -> list[Instability]:
        """Examine a step. With fp16, infinite gradients are how the scaler finds its scale, and normal."""
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
                f"the gradients of all {MAX_SKIPPED_IN_A_ROW} steps up to step {step} were infinite or NaN: the run"
                " has diverged. Resume from an earlier checkpoint with --allow_recipe_change and a lower"
                " --base_learning_rate, or a --max_grad_norm; --on_instability rollback does it automatically"
            )
        if row["times_usual"] > 0:
            found.append(self.report_spike(step, row))
        if not row["skipped"]:
            gain = normalized_loss(row["loss"], self.temperature, self.plan.global_batch_size)
            if self.divergence.add(gain):
                found.append(self.report_divergence(step, gain))
        return found

    def report_spike(self, step: int, row: dict[str, float]) -> Instability:
        """A spike of the gradient norm: accuracy may dip some tens of steps later."""
        self.num_spikes += 1
        layers = {name: row[name] for name in ("first_layer_grad_max", "last_layer_grad_max")}
        self.record_event(step, "spike", grad_norm=row["grad_norm"], times_usual=row["times_usual"], **layers)
        what = f"the gradient norm {row['grad_norm']:.3g} is {row['times_usual']:.1f} times the median"
        self.print(
            f"warning: step {step}: {what} (largest component in the first layer {row['first_layer_grad_max']:.2g}, in"
            f" the last {row['last_layer_grad_max']:.2g}{'; step skipped' if row['skipped'] else ''})"
        )
        return Instability(step, what)

    def report_divergence(self, step: int, gain: float) -> Instability:
        self.record_event(step, "divergence", loss_normalized=gain)
        what = "the loss has lost more than half of its gain over chance"
        self.print(f"warning: step {step}: {what} (normalized loss {gain:.3f}, 0 is chance)")
        return Instability(step, what)

    def print(self, message: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            self.progress.write(message, file=sys.stderr)

    def record_event(self, step: int, event: str, **values: float | str | None) -> None:
        self.num_events += 1
        if self.accelerator.is_main_process:
            self.events.append({"step": step, "event": event, **values})

    def write(
        self,
        steps_done: int,
        projection: torch.Tensor,
        learning_rate: float,
        ema_decay: float,
        num_bad_images: int,
    ) -> dict[str, float]:
        """
        Write a line about the steps since the last, which have been examined. Returns what trackers receive.

        Args:
            steps_done: Steps done.
            projection: `(B, P)` of the last step.
            learning_rate, ema_decay: Of the last step.
            num_bad_images: Replaced in the whole run.
        """
        rows = self.rows()
        counted = [row for row in rows if not row[STEP_VALUES.index("skipped")]]
        # If all steps were skipped, there is nothing to average: null.
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
            "ema_decay": ema_decay,
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
            self.metrics.append(metrics)
            self.show(metrics, num_bad_images)
        self.trackers.log(METRICS, flat(metrics), steps_done)
        self.start_window()
        return flat(metrics)

    def write_knn(self, steps_done: int, measured: dict[str, float]) -> None:
        """Write a line about a kNN evaluation, `OnlineKNN.measure`."""
        if self.accelerator.is_main_process:
            self.knn.append({"step": steps_done, "epoch": steps_done / self.plan.steps_per_epoch} | measured)
        accuracy = measured["knn_top1"]
        self.trackers.log(KNN, {"knn_top1": accuracy}, steps_done)
        self.notes["kNN"] = f"{accuracy:.3f}"

    def unwritten(self) -> str | None:
        """Which records cannot be written, and why, after another attempt; None if all are."""
        for records in (self.metrics, self.events, self.knn):
            records.flush()
            if records.error is not None:
                return f"{records.path} cannot be written: {records.error}"
        return None

    def show(self, metrics: dict, num_bad_images: int) -> None:
        """The end of the progress bar: what matters at a glance, and problems only if there are any."""
        shown = {"epoch": f"{metrics['epoch']:.1f}"}
        if metrics["loss"] is not None:
            shown |= {"loss": f"{metrics['loss']:.3f}", "top1": f"{metrics['positive_top1']:.3f}"}
        shown |= self.notes
        shown["images/s"] = f"{metrics['images_per_second']:.0f}"
        if metrics["data_wait_fraction"] > LARGEST_SILENT_STALL:
            shown["data stall"] = f"{metrics['data_wait_fraction']:.0%}"
        problems = {
            "bad images": num_bad_images,
            "skipped steps": self.num_skipped,
            "spikes": self.num_spikes,
            "rollbacks": self.num_rollbacks,
        }
        self.progress.set_postfix(shown | {name: number for name, number in problems.items() if number})

    def close(self) -> None:
        self.progress.close()
        for records in (self.metrics, self.events, self.knn):
            records.close()


def flat(metrics: dict) -> dict[str, float]:
    """For trackers, which accept neither None nor mappings."""
    blocks = {f"block_grad_norms/{name}": norm for name, norm in metrics["block_grad_norms"].items()}
    numbers = {name: value for name, value in metrics.items() if name not in ("step", "block_grad_norms")}
    return {name: value for name, value in (numbers | blocks).items() if value is not None}


def summarize(recipe: Recipe, plan: Plan) -> str:
    """Length, time, throughput, last loss, best kNN, problems, weights and a next command, from a finished run."""
    folder = Path(recipe.run.output_dir)
    metrics, knn = read_lines(folder / METRICS)[0], read_lines(folder / KNN)[0]
    # Lines written before a disk was damaged can have lost some of their values.
    metrics = [line for line in metrics if is_number(line.get("data_wait_fraction")) and has_throughput(line)]
    knn = [line for line in knn if is_number(line.get("knn_top1"))]
    facts = {"steps": f"{plan.total_steps:,} ({plan.num_epochs:.4g} epochs)"}
    if metrics:
        facts |= describe_training(metrics, plan)
    if knn:
        best, last = max(knn, key=lambda line: line["knn_top1"]), knn[-1]["knn_top1"]
        facts["best kNN"] = f"{best['knn_top1']:.1%} at step {best['step']:,} (last {last:.1%})"
    facts["weights"] = f"{folder}, loads with AutoModel.from_pretrained"
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    return "\n".join([*lines, "next:", *(f"  {command}" for command in next_commands(recipe))])


def describe_training(metrics: list[dict], plan: Plan) -> dict[str, str]:
    """Numbers of all parts of an interrupted run together, without the steps that a kill or a rollback undid."""
    seconds, images = training_time(metrics, plan.global_batch_size)
    stall, last = statistics.fmean(line["data_wait_fraction"] for line in metrics), metrics[-1]
    facts = {
        "training time": str(timedelta(seconds=round(seconds))),
        "throughput": f"{images / seconds:,.0f} images/s, data-loading stall {stall:.1%} of the time",
    }
    if all(is_number(last.get(name)) for name in ("loss", "loss_normalized", "positive_top1")):
        facts["last loss"] = (
            f"{last['loss']:.4f} (normalized {last['loss_normalized']:.3f}: 0 is chance, 1 the minimum), positive"
            f" top-1 {last['positive_top1']:.1%}"
        )
    problems = {
        "skipped steps": last.get("skipped_steps"),
        "gradient spikes": last.get("gradient_spikes"),
        "rollbacks": last.get("rollbacks"),
    }
    facts["problems"] = ", ".join(f"{number} {name}" for name, number in problems.items() if number) or "none"
    return facts
