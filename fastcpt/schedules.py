"""Learning rates as pure functions of the step: nothing to save, nothing to restore, nothing to drift."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastcpt import UserError

BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .#"  # the fillings of a cell of the curve, from empty to full


@dataclass(frozen=True)
class Plan:
    """The learning rate of every step of a run.

    Steps are counted from 1: `rate(first + k)` is the rate of the run's k-th step. first: the step the plan starts
    after (0, or a branch's checkpoint). steps: how many it lasts. warmup: of those, how many rise to the peak.
    """

    kind: Literal["cosine", "constant"]
    first: int
    steps: int
    warmup: int
    peak: float
    min_lr_ratio: float

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise UserError(
                "warmup-too-long",
                f"schedule.warmup is {self.warmup} steps, but the run has {self.steps}; shorten the warm-up",
            )

    def rate(self, step: int) -> float:
        """Linear from peak/warmup to the peak, never 0; then constant, or half a cosine that ends at min_lr_ratio."""
        done = step - self.first
        if done <= self.warmup:
            return self.peak * done / self.warmup if self.warmup else self.peak
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (done - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (self.min_lr_ratio + (1 - self.min_lr_ratio) / 2 * (1 + math.cos(math.pi * progress)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def warmup_steps(warmup: float, steps: int) -> int:
    """Below 1 a fraction of the steps, rounded up; from 1 on a number of steps."""
    return math.ceil(warmup * steps - 1e-9) if warmup < 1 else int(warmup)


def curve(plan: Plan, width: int = 60, height: int = 10, glyphs: str = BLOCKS) -> list[str]:
    """Lines of `width` cells, the top first: bars from 0 to the plan's peak.

    Column c stands for the step first + 1 + round(c (steps - 1) / (width - 1)). A bar's length, in parts of a cell
    (`glyphs` has one for each), is rounded up: no rate above 0 is drawn as nothing.
    """
    parts, rows = len(glyphs) - 1, reversed(range(height))
    unit = plan.peak / (height * parts) or 1.0  # a branch of a run that ended at 0 has nothing else
    steps = [plan.first + 1 + round(column * (plan.steps - 1) / (width - 1)) for column in range(width)]
    bars = [math.ceil(plan.rate(step) / unit - 1e-9) for step in steps]
    return ["".join(glyphs[min(parts, max(0, bar - row * parts))] for bar in bars) for row in rows]
