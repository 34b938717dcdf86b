"""Signals that end a run in order: SIGTERM and SIGUSR1, to torchrun or to any one process.

A handler sets a flag. With each step all processes learn whether any of them has it set, by a tiny all-reduce on the CPU
that is started before the step's work and looked at after it: nobody waits for it.
"""

import signal
import threading
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from fastcpt.parallel import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """A signal came and everything is saved: the same command goes on. Exit code 75, EX_TEMPFAIL of sysexits.h."""


class Signals:
    """Whether one came to this process, while this is entered. Later ones change nothing."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # Stopped by one, the process is on its way out, and another must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.received else handler)


class Agreement:
    """Whether any process got a signal, with the same answer on all: `ask`, work, `answer`; all call both equally often.

    timeout: seconds until a process that does not ask is an error.
    """

    def __init__(self, world: World, signals: Signals, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if world.size > 1 else None
        self._signals = signals
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._under_way: dist.Work | None = None
        self._stop = False

    def ask(self) -> None:
        """A question that was not answered yet becomes part of this one."""
        if self._group is not None:
            self._flag = torch.tensor([self.answer() or self._signals.received], dtype=torch.int32)
            self._under_way = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> bool:
        """What was the case when all had asked; of one process, what is now."""
        if self._group is None:
            return self._signals.received
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
            self._stop |= bool(self._flag.item())
        return self._stop
