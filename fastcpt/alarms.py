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
    """One loss over a schedule. start: its value before it; low: the lowest that later ones are held against."""

    values: deque[float]
    start: float = math.nan
    low: float = math.inf
    part: int = -1  # the step that its schedule began after
    far: bool = False


@dataclass
class Alarms:
    """The losses of a run: of each source in training, and of each upstream validation set."""

    plan: Plan
    _series: dict[str, _Series] = field(default_factory=dict)

    def quiet_until(self, step: int) -> int:
        """The step from which on a rise is one, of the schedule that a step belongs to: a later phase may re-warm, too."""
        return self.plan.part(step).warmup_end + math.ceil(QUIET * self.plan.steps)

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
        if series.part != (begin := self.plan.part(step).first):
            series.part, series.low, series.far = begin, math.inf, False
            series.start = series.values[-1] if series.values else loss
        series.values.append(loss)
        mean = sum(series.values) / len(series.values)
        quiet = self.quiet_until(step)
        if step <= quiet:
            far, series.far = mean > series.start + FAR and not series.far, mean > series.start + FAR
            return f"is {loss:.4f}, more than {FAR:g} nat above its {series.start:.4f} at the start" if far else ""
        if len(series.values) < series.values.maxlen:  # type: ignore[operator]
            return ""
        if mean > series.low + RISE:
            low, series.low = series.low, mean
            return (
                f"rose to {mean:.4f}, {mean - low:.2f} above its lowest since step {quiet:,}, when what re-warming "
                "costs was over"
            )
        series.low = min(series.low, mean)
        return ""
