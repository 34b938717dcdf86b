"""What a person sees while files are processed: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

from fastcpt.progress import Bar, short_time

LINE_SECONDS = 30


class Meter:
    """Counts bytes of input and tokens. `with Meter("tokenize", total_bytes, quiet) as meter: meter.add(...)`"""

    def __init__(self, what: str, total_bytes: int, quiet: bool = False) -> None:
        self.what, self.total_bytes = what, total_bytes
        self.bytes = self.tokens = 0
        self.started = self._spoke = time.monotonic()
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = Bar(what, total_bytes, stream=sys.stderr, stays=True, quiet=quiet)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    @property
    def speed(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.tokens / seconds if self.tokens else self.bytes / seconds
        unit = "tokens/s" if self.tokens else "B/s"
        return f"{rate / 1e6:.2f}M {unit}" if rate >= 1e5 else f"{rate:,.0f} {unit}"

    def skip(self, size: int) -> None:
        """Work that an earlier run did."""
        self.total_bytes -= size
        self._bar.total = self.total_bytes

    def add(self, size: int, tokens: int = 0) -> None:
        self.bytes += size
        self.tokens += tokens
        now = time.monotonic()
        share = self.bytes / self.total_bytes if self.total_bytes else 1.0
        left = (now - self.started) * (1 - share) / share if share else 0.0
        sizes = f"{self.bytes / 1e6:,.1f}/{self.total_bytes / 1e6:,.1f} MB"
        self._bar.update(self.bytes, f"{sizes}  {self.speed}  {short_time(left)} left")
        if self._lines and now - self._spoke > LINE_SECONDS and self.bytes < self.total_bytes:
            self._spoke = now
            print(f"{self.what}: {share:.0%}, {self.speed}, about {left:,.0f} s left", file=sys.stderr, flush=True)
