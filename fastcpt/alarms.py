"""Losses that rise when they should not: a line in `metrics.jsonl` and on the console, never a stop.

A rise after re-warming is expected (arXiv 2308.04014, and the stability gap of arXiv 2406.14833): until the warm-up and
another 5% of the run are over, only a loss one nat above the start's, or one that is not finite, is an alarm. From then
on a loss RISE above its lowest since then is, and each further RISE.

What is told follows from the lines of the log alone: a run that goes on reads those it has, and goes on as if it had
never stopped.
"""

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcpt.schedules import Plan

QUIET = 0.05  # of the run, after the warm-up
FAR = 1.0  # nats above the start
RISE = 0.2  # nats: twice what re-warming alone cost on the same data at the usual rate (arXiv 2403.08763, figure 8)
SMOOTH = 5  # training lines whose mean is looked at: a line's own loss is that of few batches


@dataclass
class _Series:
    """One loss over the run. start: its first value; low: the lowest that later ones are held against."""

    values: deque[float]
    start: float = math.nan
    low: float = math.inf
    far: bool = False


@dataclass
class Alarms:
    """The losses of a run: of each source in training, and of each upstream validation set."""

    plan: Plan
    _series: dict[str, _Series] = field(default_factory=dict)

    @property
    def quiet_until(self) -> int:
        """The step from which on a rise is one."""
        return self.plan.first + self.plan.warmup + math.ceil(QUIET * self.plan.steps)

    def read(self, log: Path) -> None:
        """Takes in the lines that an earlier start of the run wrote."""
        for line in log.read_bytes().splitlines() if log.exists() else ():
            self.see(json.loads(line))

    def see(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """The alarms, as event lines, that a training or evaluation line gives rise to."""
        losses = {f"training loss of {name}": (loss, SMOOTH) for name, loss in line.get("loss_by_source", {}).items()}
        for name, entry in line.get("eval", {}).items():
            if entry["role"] == "upstream":
                losses[f"upstream loss of {name}"] = (entry["loss"], 1)
        events = []
        for name, (loss, smooth) in losses.items():
            series = self._series.setdefault(name, _Series(deque(maxlen=smooth)))
            if text := self._look(series, line["step"], math.nan if loss is None else loss):
                event = {
                    "kind": "alarm",
                    "of": "evaluation" if "eval" in line else "training",
                    "text": f"{name} {text}",
                }
                events.append({"step": line["step"], "tokens": line["tokens"], "event": event})
        return events

    def _look(self, series: _Series, step: int, loss: float) -> str:
        """What is alarming about a value, or nothing."""
        if not math.isfinite(loss):
            return "is not finite"
        if math.isnan(series.start):
            series.start = loss
        series.values.append(loss)
        mean = sum(series.values) / len(series.values)
        if step <= self.quiet_until:
            far, series.far = mean > series.start + FAR and not series.far, mean > series.start + FAR
            return f"is {loss:.4f}, more than {FAR:g} nat above its {series.start:.4f} at the start" if far else ""
        if len(series.values) < series.values.maxlen:  # type: ignore[operator]
            return ""
        if mean > series.low + RISE:
            low, series.low = series.low, mean
            return (
                f"rose to {mean:.4f}, {mean - low:.2f} above its lowest since step {self.quiet_until:,}, when what re-warming "
                "costs was over"
            )
        series.low = min(series.low, mean)
        return ""
