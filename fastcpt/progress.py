"""What a person sees while something long runs: a bar at the bottom of the terminal, and nothing where there is none."""

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

REDRAW_SECONDS = 0.5


class Bar:
    """`what ━━━━━━╸━━━  12%  text`, below the lines that scroll by. `with Bar("train", total) as bar: bar.update(done, text)`

    stream: where it is drawn; by default the first of stdout and stderr that is a terminal. Where that is none, or rich
    is not installed, there is no bar: `print` is Python's, and nothing else is ever written. stays: the full bar is
    left there at the end. quiet: no bar.

    No thread draws it: it moves when it is told to, twice a second at most, and costs a clock reading otherwise.
    """

    def __init__(
        self, what: str, total: int, stream: TextIO | None = None, stays: bool = False, quiet: bool = False
    ) -> None:
        self.total = total
        self._what = what
        self._drawn = 0.0
        self._progress: Any = None
        terminals = [each for each in ([stream] if stream else [sys.stdout, sys.stderr]) if each.isatty()]
        if quiet or not terminals:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        except ImportError:
            return
        self._bar = BarColumn()
        columns = (TextColumn(what), self._bar, TaskProgressColumn(), TextColumn(" {task.fields[text]}", markup=False))
        self._progress = Progress(
            *columns,
            console=Console(file=terminals[0], highlight=False),
            auto_refresh=False,
            transient=not stays,
            # What others write, warnings for one, goes above the bar; what is sent to a file stays out of the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(what, total=total, text="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._fit("")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, text: str = "", now: bool = False) -> None:
        """`done` of the total, and `text` behind it. now: draw at once, whatever was drawn a moment ago."""
        if self._progress is None:
            return
        clock = time.monotonic()
        draws = now or done >= self.total or clock - self._drawn > REDRAW_SECONDS
        if draws:
            self._drawn = clock
            self._fit(text)
        self._progress.update(self._task, completed=done, total=self.total, text=text, refresh=draws)

    def _fit(self, text: str) -> None:
        """The text comes first: the bar takes what it leaves of the line, in a narrow terminal hardly anything."""
        self._bar.bar_width = max(1, min(40, self._progress.console.width - len(self._what) - len(text) - 9))

    def print(self, line: str) -> None:
        """A line for stdout, above the bar."""
        if self._progress is not None and sys.stdout.isatty():
            # As it is: not wrapped at words nor coloured, so that it can be copied.
            self._progress.console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
        else:
            print(line, flush=True)


def short_count(value: float) -> str:
    """Three digits and a unit; what rounds up to 1000 of a unit is 1 of the next."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"
