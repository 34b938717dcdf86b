"""What a person sees while files are processed: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30


class Meter:
    """Counts bytes of input and tokens. `with Meter("tokenize", total_bytes, quiet) as meter: meter.add(...)`"""

    def __init__(self, what: str, total_bytes: int, quiet: bool = False) -> None:
        self.what, self.total_bytes = what, total_bytes
        self.bytes = self.tokens = 0
        self.started = self._spoke = time.monotonic()
        self._lines = not quiet and not sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet or self._lines)
        self._task = self._bar.add_task(what, total=total_bytes, speed="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def speed(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.tokens / seconds if self.tokens else self.bytes / seconds
        unit = "tokens/s" if self.tokens else "B/s"
        return f"{rate / 1e6:.2f}M {unit}" if rate >= 1e5 else f"{rate:,.0f} {unit}"

    def skip(self, size: int) -> None:
        """Work that an earlier run did."""
        self.total_bytes -= size
        self._bar.update(self._task, total=self.total_bytes)

    def add(self, size: int, tokens: int = 0) -> None:
        self.bytes += size
        self.tokens += tokens
        self._bar.update(self._task, completed=self.bytes, speed=self.speed)
        now = time.monotonic()
        if self._lines and now - self._spoke > LINE_SECONDS and self.bytes < self.total_bytes:
            self._spoke = now
            share = self.bytes / self.total_bytes
            left = (now - self.started) * (1 - share) / share
            print(f"{self.what}: {share:.0%}, {self.speed}, about {left:,.0f} s left", file=sys.stderr, flush=True)
