"""What a run reports about itself: metrics.jsonl, trackers and the progress bar."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..model.loss_mocov3 import chance_loss, floor_loss
from ..plan import Plan
from ..probes.collapse import collapse_summary
from .instability import SpikeDetector
from .resume import cut_back
from .step import StepOutput


# What is kept of every step until the next line, all 0-dim. Gradients are the same on all processes.
STEP_VALUES = (
    "loss",
    "positive_top1",
    "grad_norm",
    "first_layer_grad_max",
    "last_layer_grad_max",
    "skipped",
)


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
    """A run whose gradients have stopped being numbers."""


class TrainingLog:
    """
    Averages what the steps give and writes it every `logging_steps`, the only moments that wait for the device.

    Args:
        accelerator: Processes, device and trackers.
        plan: Length of the run and its batch.
        temperature: Of the loss, for its normalisation.
        output_dir: Folder of `metrics.jsonl`; lines are appended.
        logging_steps: Steps between two lines.
        start_step: Steps done before this run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: Plan,
        temperature: float,
        output_dir: Path,
        logging_steps: int,
        start_step: int = 0,
    ):
        self.accelerator, self.plan, self.temperature = accelerator, plan, temperature
        self.logging_steps = logging_steps
        self.path = output_dir / "metrics.jsonl"
        self.progress = tqdm(
            total=plan.total_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process
        )
        self.num_skipped = self.num_skipped_in_a_row = self.num_spikes = 0
        self.notes: dict[str, str] = {}
        self.spikes = SpikeDetector()
        self.start_window()

    def start_window(self) -> None:
        self.steps: list[torch.Tensor] = []  # a row of STEP_VALUES for every step since the last line
        self.num_timed, self.data_wait, self.started = 0, 0.0, time.perf_counter()

    def rows(self) -> list[list[float]]:
        """The steps since the last line, averaged over the processes."""
        if not self.steps:
            return []
        return self.accelerator.reduce(torch.stack(self.steps), reduction="mean").tolist()

    def state(self) -> dict:
        """What a run that continues needs to write the same lines."""
        return {
            "rows": self.rows(),
            "num_skipped": self.num_skipped,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
            "num_spikes": self.num_spikes,
            "grad_norms": list(self.spikes.history),
        }

    def resume(self, state: dict, steps_done: int) -> None:
        """Take up the state of before, and drop the lines of steps that will be done again."""
        self.steps = [torch.tensor(row, dtype=torch.float64, device=self.accelerator.device) for row in state["rows"]]
        self.num_skipped, self.num_spikes = state["num_skipped"], state["num_spikes"]
        self.num_skipped_in_a_row = state["num_skipped_in_a_row"]
        self.spikes = SpikeDetector(history=state["grad_norms"])
        if self.accelerator.is_main_process:
            cut_back(self.path, steps_done)

    def note(self, name: str, value: str) -> None:
        """Show something on the progress bar from now on."""
        self.notes[name] = value

    def leave_out(self, seconds: float) -> None:
        """Take time that was no training out of the throughput."""
        self.started += seconds

    def waited_for_data(self, seconds: float) -> None:
        self.data_wait += seconds

    def record(
        self, step: int, output: StepOutput, learning_rate: float, momentum: float, num_bad_images: int
    ) -> None:
        """Take in what update `step` (from 0) gave; `learning_rate` and `momentum` are those it used."""
        self.steps.append(torch.stack([getattr(output, name).double() for name in STEP_VALUES]))
        self.num_timed += 1
        self.progress.update()
        if (step + 1) % self.logging_steps == 0 or step + 1 == self.plan.total_steps:
            self.write(step + 1, output.projection, learning_rate, momentum, num_bad_images)

    def write(
        self,
        steps_done: int,
        projection: torch.Tensor,
        learning_rate: float,
        momentum: float,
        num_bad_images: int,
    ) -> None:
        rows = [dict(zip(STEP_VALUES, row, strict=True)) for row in self.rows()]
        counted = [row for row in rows if not row["skipped"]]
        self.num_skipped += len(rows) - len(counted)
        self.check_divergence(rows, steps_done)
        self.look_for_spikes(rows, steps_done)
        # Without a step that counted there is nothing to average: null.
        mean = {name: statistics.fmean(row[name] for row in counted) if counted else None for name in STEP_VALUES}
        loss, positive_top1 = mean["loss"], mean["positive_top1"]
        normalized = None
        if loss is not None:
            normalized = normalized_loss(loss, self.temperature, self.plan.global_batch_size)
        seconds = time.perf_counter() - self.started
        metrics = {
            "step": steps_done,
            "epoch": steps_done / self.plan.steps_per_epoch,
            "loss": loss,
            "loss_normalized": normalized,
            "positive_top1": positive_top1,
            "learning_rate": learning_rate,
            "momentum": momentum,
            "grad_norm": mean["grad_norm"],
            "images_per_second": self.num_timed * self.plan.global_batch_size / seconds,
            "data_wait_fraction": self.data_wait / seconds,
            "skipped_steps": self.num_skipped,
            "gradient_spikes": self.num_spikes,
            "first_layer_grad_max": max((row["first_layer_grad_max"] for row in counted), default=None),
            "last_layer_grad_max": max((row["last_layer_grad_max"] for row in counted), default=None),
            **signs_of_collapse(self.accelerator.gather(projection.detach().float())),
        }
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            shown = dict(self.notes)
            if loss is not None:
                shown |= {"loss": f"{loss:.3f}", "top1": f"{positive_top1:.3f}"}
            shown["images/s"] = f"{metrics['images_per_second']:.0f}"
            if num_bad_images:
                shown["bad images"] = num_bad_images
            if self.num_skipped:
                shown["skipped steps"] = self.num_skipped
            self.progress.set_postfix(shown)
        tracked = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        self.accelerator.log(tracked, step=steps_done)
        self.start_window()

    def check_divergence(self, rows: list[dict], steps_done: int) -> None:
        """
        Raises:
            DivergedError: too many skipped steps in a row. A few are normal, above all with fp16 and its scaler.
        """
        for step, row in enumerate(rows, start=steps_done - len(rows) + 1):
            self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if row["skipped"] else 0
            if self.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"the gradients of all {MAX_SKIPPED_IN_A_ROW} steps up to step {step} were infinite or NaN: the"
                    " run has diverged. Resume from an earlier checkpoint with --allow_recipe_change and a lower"
                    " --base_learning_rate, or a --max_grad_norm"
                )

    def look_for_spikes(self, rows: list[dict], steps_done: int) -> None:
        """Count the steps whose gradient stands out, and say so at once: accuracy may dip some tens of steps later."""
        for step, row in enumerate(rows, start=steps_done - len(rows) + 1):
            factor = self.spikes.add(row["grad_norm"])
            if factor is not None:
                self.num_spikes += 1
                if self.accelerator.is_main_process:
                    self.progress.write(
                        f"warning: step {step}: the gradient norm {row['grad_norm']:.3g} is {factor:.1f} times the"
                        f" usual one (largest component in the first layer {row['first_layer_grad_max']:.2g}, in the"
                        f" last {row['last_layer_grad_max']:.2g})",
                        file=sys.stderr,
                    )

    def close(self) -> None:
        self.progress.close()
