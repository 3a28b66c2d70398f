"""What a run reports about itself: metrics.jsonl, trackers and the progress bar."""

import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..model.loss_mocov3 import chance_loss, floor_loss
from ..recipe import Plan
from .step import StepOutput


def normalized_loss(loss: float, temperature: float, global_batch_size: int) -> float:
    """0 at chance, 1 where positives coincide and negatives are orthogonal: comparable across recipes."""
    chance, floor = chance_loss(temperature, global_batch_size), floor_loss(temperature, global_batch_size)
    return (chance - loss) / (chance - floor)


def is_kept(line: str, steps_done: int) -> bool:
    """Whether a line is whole and of a step that is done; a killed run can leave half a line at the end."""
    try:
        return json.loads(line)["step"] <= steps_done
    except ValueError:
        return False


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
        self.num_skipped = 0
        self.start_window()

    def start_window(self) -> None:
        # Sums of loss, top-1 and gradient norm over the steps that counted, and how many counted and were skipped.
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.accelerator.device)
        self.num_steps, self.data_wait, self.started = 0, 0.0, time.perf_counter()

    def window(self) -> list[float]:
        """Sums since the last line, averaged over the processes, and the number of steps skipped before that."""
        return [*self.accelerator.reduce(self.sums, reduction="mean").tolist(), self.num_skipped]

    def resume(self, window: list[float], steps_done: int) -> None:
        """Take up a window of before, and drop the lines of steps that will be done again."""
        self.sums.copy_(torch.tensor(window[:-1], dtype=torch.float64))
        self.num_skipped = int(window[-1])
        if self.accelerator.is_main_process and self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if is_kept(line, steps_done)]
            aside = self.path.with_name(".metrics.jsonl.incomplete")
            aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(aside, self.path)

    def waited_for_data(self, seconds: float) -> None:
        self.data_wait += seconds

    def record(
        self, step: int, output: StepOutput, learning_rate: float, momentum: float, num_bad_images: int
    ) -> None:
        """Take in what update `step` (from 0) gave; `learning_rate` and `momentum` are those it used."""
        values = torch.stack([output.loss, output.positive_top1, output.grad_norm]).double()
        counts = torch.stack([~output.skipped, output.skipped]).double()
        self.sums += torch.cat([torch.where(output.skipped, 0.0, values), counts])
        self.num_steps += 1
        self.progress.update()
        if (step + 1) % self.logging_steps == 0 or step + 1 == self.plan.total_steps:
            self.write(step + 1, learning_rate, momentum, num_bad_images)

    def write(self, steps_done: int, learning_rate: float, momentum: float, num_bad_images: int) -> None:
        # The gradient norm is the same everywhere; loss and top-1 are each process's own.
        *sums, counted, skipped = self.accelerator.reduce(self.sums, reduction="mean").tolist()
        self.num_skipped += int(skipped)
        if counted == 0:
            raise DivergedError(
                f"the gradients of all {int(skipped)} steps up to step {steps_done} were infinite or NaN: the run has"
                " diverged. Resume from an earlier checkpoint with --allow_recipe_change and a lower"
                " --base_learning_rate, or a --max_grad_norm"
            )
        loss, positive_top1, grad_norm = (value / counted for value in sums)
        seconds = time.perf_counter() - self.started
        metrics = {
            "step": steps_done,
            "epoch": steps_done / self.plan.steps_per_epoch,
            "loss": loss,
            "loss_normalized": normalized_loss(loss, self.temperature, self.plan.global_batch_size),
            "positive_top1": positive_top1,
            "learning_rate": learning_rate,
            "momentum": momentum,
            "grad_norm": grad_norm,
            "images_per_second": self.num_steps * self.plan.global_batch_size / seconds,
            "data_wait_fraction": self.data_wait / seconds,
            "skipped_steps": self.num_skipped,
        }
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            shown = {"loss": f"{loss:.3f}", "top1": f"{positive_top1:.3f}"}
            shown["images/s"] = f"{metrics['images_per_second']:.0f}"
            if num_bad_images:
                shown["bad images"] = num_bad_images
            if self.num_skipped:
                shown["skipped steps"] = self.num_skipped
            self.progress.set_postfix(shown)
        self.accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=steps_done)
        self.start_window()

    def close(self) -> None:
        self.progress.close()
