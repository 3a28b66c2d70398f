"""Callbacks of a pre-training run, with the interface of `transformers.TrainerCallback`."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from .plan import Plan
from .recipe import Recipe


class Callbacks:
    """
    Calls `on_train_begin`, `on_step_begin`, `on_step_end`, `on_log`, `on_evaluate`, `on_save` and `on_train_end` of
    every callback with `(args, state, control, model=..., ...)`.

    `args` has the options of the recipe, under the names of `Trainer` where it has them. `state` has `global_step`,
    `max_steps`, `epoch`, `log_history` and `is_world_process_zero`. `control.should_training_stop` ends the run with a
    checkpoint after the step; the run ignores the other switches.

    Args:
        callbacks: In the order in which they are called, on every process.
        recipe, plan: Of the run.
        is_main_process: Of several processes, whether this is the first.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], recipe: Recipe, plan: Plan, is_main_process: bool):
        self.callbacks, self.steps_per_epoch = callbacks, plan.steps_per_epoch
        self.error: Exception | None = None
        self.args, self.control = SimpleNamespace(**recipe.to_dict()), TrainerControl()
        self.state = TrainerState(max_steps=plan.total_steps, is_world_process_zero=is_main_process)

    def __call__(self, event: str, model: nn.Module, step: int, **values: Any) -> None:
        """
        Args:
            event: Name of the method.
            model: `MoCoV3ForPreTraining`, not wrapped.
            step: Steps done.
            values: More arguments of the method: `logs` or `metrics`.

        Raises:
            Exception: Whatever a callback raises, kept in `error` as well.
        """
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        if event == "on_log":
            self.state.log_history.append({**values["logs"], "step": step})
        for callback in self.callbacks:
            try:
                getattr(callback, event)(self.args, self.state, self.control, model=model, **values)
            except Exception as error:
                self.error = error
                raise
