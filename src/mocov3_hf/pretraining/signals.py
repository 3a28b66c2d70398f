"""Asking a run to stop: signals that reach any process end all of them after the same step."""

import signal

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """
    Catches SIGTERM, SIGINT and SIGUSR1 while it is entered.

    Args:
        accelerator: The processes that must agree.

    The processes tell each other after every step. On a GPU the answer to one step's question is read after the next
    step, so that asking never waits for the device.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self.pending: torch.Tensor | None = None
        self.before: dict = {}

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether all processes stop after this step; to be called by all of them, after every step."""
        if self.accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.float32, device=self.accelerator.device)
        flag = self.accelerator.reduce(flag, reduction="sum")
        answer, self.pending = (flag, None) if self.accelerator.device.type == "cpu" else (self.pending, flag)
        return answer is not None and bool(answer.item() > 0)

    def describe(self) -> str:
        return self.received.name if self.received is not None else "a signal to another process"
