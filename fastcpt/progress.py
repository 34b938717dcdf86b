"""What a person sees while something long runs: a bar at the bottom of the terminal, and nothing where there is none."""

import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

REDRAW_SECONDS = 0.5
SHORTEST, LONGEST = 4, 40  # columns of the bar itself


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
        self._what, self._stays = what, stays
        streams = [] if quiet else [stream] if stream else [sys.stdout, sys.stderr]
        self._terminal = next((each for each in streams if each.isatty()), None)
        self._drawn = 0.0
        self._progress: Any = None

    def __enter__(self) -> Self:
        if self._terminal is None:
            return self
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        except ImportError:
            return self
        # Another file of the same terminal: W&B records what is written to stdout, and should get the lines alone.
        self._file = open(os.dup(self._terminal.fileno()), "w", encoding=self._terminal.encoding, errors="replace")
        self._bar = BarColumn()
        self._progress = Progress(
            TextColumn(self._what, markup=False),
            self._bar,
            TaskProgressColumn(),
            TextColumn(" {task.fields[text]}", markup=False),
            console=Console(file=self._file),
            auto_refresh=False,
            transient=not self._stays,
            # What others write, warnings for one, goes above the bar; what is sent to a file stays out of the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(self._what, total=self.total, text="")
        self._fit("")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._file.close()

    def update(self, done: int, text: str = "", now: bool = False) -> None:
        """`done` of the total, and `text` behind it. now: it matters, so this and the next are drawn at once."""
        if self._progress is None:
            return
        clock = time.monotonic()
        draws = now or done >= self.total or clock - self._drawn > REDRAW_SECONDS
        if draws:
            self._drawn = 0.0 if now else clock
            text = self._fit(text)
        self._progress.update(self._task, completed=done, total=self.total, text=text, refresh=draws)

    def _fit(self, text: str) -> str:
        """What there is room for of the text, which comes first: the bar takes what it leaves of the line."""
        room = self._progress.console.width - len(self._what) - len(" 100%  ") - 2
        text = text[: max(0, room - SHORTEST)]
        self._bar.bar_width = max(SHORTEST, min(LONGEST, room - len(text)))
        return text

    def print(self, line: str) -> None:
        """A line for stdout, above the bar, which makes way for it: so the line is written as it would be without one."""
        if self._progress is None or not sys.stdout.isatty():
            print(line, flush=True)
            return
        assert not self._stays
        self._progress.stop()
        print(line, flush=True)
        self._progress.start()


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
