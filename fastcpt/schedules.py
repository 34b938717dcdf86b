"""Learning rates as pure functions of the step: nothing to save, nothing to restore, nothing to drift.

A schedule is a linear warm-up and segments. The shape of a segment is a function of the part of it that is done, u from
0 to 1, and of the rates at its ends, relative to the peak.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastcpt import UserError
from fastcpt.config import Kind, Schedule
from fastcpt.units import steps_of

BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .#"  # the fillings of a cell of the curve, from empty to full


def _constant(u: float, start: float, end: float) -> float:
    return end


def _linear(u: float, start: float, end: float) -> float:
    return end + (start - end) * (1 - u)


def _cosine(u: float, start: float, end: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * u))


def _clipped(u: float, start: float, end: float) -> float:
    """Towards 0, cut off at `end`: GPT-NeoX until August 2023, with which arXiv 2308.04014 was trained."""
    return max(end, start / 2 * (1 + math.cos(math.pi * u)))


def _one_minus_sqrt(u: float, start: float, end: float) -> float:
    """arXiv 2405.18392."""
    return end + (start - end) * (1 - math.sqrt(u))


def _exponential(u: float, start: float, end: float) -> float:
    return start * (end / start) ** u


def _inverse_sqrt(u: float, start: float, end: float) -> float:
    """1 / sqrt(t + c), with the c that leads from `start` to `end`: c is the warm-up where that is end**2 of the run."""
    return 1 / math.sqrt((1 - u) / start**2 + u / end**2)


def _inverse_sqrt_cooldown(u: float, start: float, end: float) -> float:
    """arXiv 2403.08763's: that of a fixed bend, scaled to end at `end`. Its alpha is 10 in the authors' runs."""
    alpha = 10
    return start + (end - start) * (1 / math.sqrt(1 + alpha * u) - 1) / (1 / math.sqrt(1 + alpha) - 1)


SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant, "linear": _linear, "cosine": _cosine, "clipped cosine": _clipped, "1-sqrt": _one_minus_sqrt,
    "exponential": _exponential, "inverse square root": _inverse_sqrt, "scaled inverse square root": _inverse_sqrt_cooldown,
}  # fmt: skip
# Kinds of one shape, and those with a constant rate between a cool-down, if any, and a decay: shapes and usual lengths.
WHOLE: dict[Kind, str] = {
    "constant": "constant", "cosine": "cosine", "cosine_clipped": "clipped cosine", "linear": "linear",
    "inverse_sqrt": "inverse square root", "decay_only": "cosine", "anneal": "exponential",
}  # fmt: skip
STAGED: dict[Kind, tuple[str, float, str, float]] = {
    "wsd": ("", 0, "1-sqrt", 0.1), "wsd_linear": ("", 0, "linear", 0.1), "wsd_cosine": ("", 0, "cosine", 0.1),
    "wsd_exponential": ("", 0, "exponential", 0.1), "infinite": ("cosine", 0.6, "exponential", 0.14),
    "infinite_inverse_sqrt": ("scaled inverse square root", 0.6, "exponential", 0.14),
}  # fmt: skip
NEVER_ZERO = ("exponential", "inverse square root")
IN_A_BRANCH = ("decay_only", "anneal")


class Segment(NamedTuple):
    """length: steps. shape: of SHAPES. end: the rate at its last step, relative to the peak."""

    length: int
    shape: str
    end: float


@dataclass(frozen=True)
class Plan:
    """The learning rate of every step of a run.

    Steps are counted from 1: `rate(first + k)` is the rate of the run's k-th step. first: the step the plan starts
    after (0, or a branch's checkpoint). steps: how many it lasts; of those, warmup: how many rise to the peak, cooldown:
    fall from there to constant_ratio, decay: fall to min_lr_ratio at the end (both 0 where one shape fills the run).
    later: the schedules that phases of the run bring with them; this one ends where the first of them begins, and
    `steps` are those of all.
    """

    kind: Kind
    first: int
    steps: int
    warmup: int
    peak: float
    min_lr_ratio: float
    cooldown: int = 0
    decay: int = 0
    constant_ratio: float = 1.0
    later: tuple["Plan", ...] = ()

    def __post_init__(self) -> None:
        parts = tuple(part if isinstance(part, Plan) else Plan(**part) for part in self.later)  # or a checkpoint's
        object.__setattr__(self, "later", parts)
        if self.warmup > self.length:
            raise UserError(
                "warmup-too-long",
                f"schedule.warmup is {self.warmup} steps, but the run has {self.length}; shorten the warm-up",
            )
        if self.warmup + self.cooldown + self.decay > self.length:
            raise UserError(
                "schedule-too-long",
                f"schedule.warmup, cooldown and decay are {self.warmup} + {self.cooldown} + {self.decay} steps, but the run "
                f"has {self.length}; shorten them",
            )

    @property
    def length(self) -> int:
        """Steps before the first of the later schedules."""
        return self.later[0].first - self.first if self.later else self.steps

    @property
    def last(self) -> int:
        return self.first + self.steps

    @property
    def warmup_end(self) -> int:
        return self.first + self.warmup

    @property
    def parts(self) -> tuple["Plan", ...]:
        return self, *self.later

    @property
    def highest(self) -> float:
        return max(part.peak for part in self.parts)

    def part(self, step: int) -> "Plan":
        """The schedule that a step belongs to."""
        return next((part for part in reversed(self.later) if step > part.first), self)

    def last_step(self, stop_at: int) -> int:
        """The run's: its end, or before that `run.stop_at`, unless that is 0."""
        return min(self.last, max(stop_at, self.first)) if stop_at else self.last

    def segments(self) -> list[Segment]:
        """Those after the warm-up."""
        left = self.length - self.warmup
        if self.kind == "constant":
            return [Segment(left, "constant", 1.0)]
        if self.kind == "cosine_clipped":  # whose period is that of the whole run, the warm-up included
            return [Segment(self.length, WHOLE[self.kind], self.min_lr_ratio)]
        if self.kind in WHOLE:
            return [Segment(left, WHOLE[self.kind], self.min_lr_ratio)]
        cooldown, _, decay, _ = STAGED[self.kind]
        constant = Segment(left - self.cooldown - self.decay, "constant", self.constant_ratio)
        end = self.min_lr_ratio if self.decay else self.constant_ratio
        return [Segment(self.cooldown, cooldown, self.constant_ratio), constant, Segment(self.decay, decay, end)]

    def rate(self, step: int) -> float:
        """Linear from peak/warmup to the peak, never 0; then the segments, each exactly at its end in its last step."""
        if (part := self.part(step)) is not self:
            return part.rate(step)
        done = step - self.first
        if done <= self.warmup:
            return self.peak * done / self.warmup if self.warmup else self.peak
        done, start = done - self.warmup, 1.0
        for length, shape, end in self.segments():
            if done < length:
                return self.peak * SHAPES[shape](done / length, start, end)
            if done == length > 0:
                return self.peak * end
            done, start = done - length, end
        return self.peak * start

    def describe(self) -> str:
        """The plan in words, as "1,106 steps of warm-up to 0.0003, then cosine to 3e-05 over 109,465"."""
        rise = f"{self.warmup:,} steps of warm-up to {self.peak:.3g}" if self.warmup else f"{self.peak:.3g} at once"
        parts = [
            f"{shape} over {length:,}" if shape == "constant" else f"{shape} to {self.peak * end:.3g} over {length:,}"
            for length, shape, end in self.segments()
            if length
        ]
        later = [f"; after step {part.first:,}: {part.describe()}" for part in self.later]
        return ", then ".join([rise, *parts]) + "".join(later)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make(schedule: Schedule, tokens: int, batch_tokens: int, first: int, peak: float, branch: bool) -> Plan:
    """The plan of a run of `tokens` from step `first` on. Raises UserError for what does not fit the kind."""
    kind, steps, end = schedule.kind, -(-tokens // batch_tokens), schedule.min_lr_ratio
    _, cooldown, shape, decay = STAGED.get(kind) or ("", 0, WHOLE[kind], 0)
    used = {"cooldown": cooldown > 0, "decay": decay > 0, "min_lr_ratio": kind != "constant"}
    for name, value in asdict(schedule).items():
        if not used.get(name, True) and value != getattr(Schedule(), name):
            raise UserError("schedule-unused", f"schedule.{name} is {value}, which kind {kind} does not use; remove it")
    if kind in IN_A_BRANCH and not branch:
        raise UserError(
            "schedule-of-a-branch",
            f"schedule.kind {kind} starts at a checkpoint's rate; set init.from and init.branch: true, or take another kind",
        )
    if shape in NEVER_ZERO and end == 0:
        raise UserError(
            "setting-out-of-range", f"schedule.min_lr_ratio is 0, which kind {kind} never reaches; raise it"
        )
    warmup, cools, decays = (
        steps_of(usual if given is None else given, steps, batch_tokens, up)
        for given, usual, up in (
            (schedule.warmup, 0, True), (schedule.cooldown, cooldown, False), (schedule.decay, decay, False),
        )
    )  # fmt: skip
    if used["cooldown"] and cools == 0:
        raise UserError("setting-out-of-range", "schedule.cooldown is 0, a fall at once from the peak; raise it")
    # Half-way is the 1.65e-4 of arXiv 2403.08763 between its peak of 3e-4 and its end of 3e-5.
    return Plan(kind, first, steps, warmup, peak, end, cools, decays, (1 + end) / 2 if cools else 1.0)


def curve(plan: Plan, width: int = 60, height: int = 10, glyphs: str = BLOCKS) -> list[str]:
    """Lines of `width` cells, the top first: bars from 0 to the plan's highest peak.

    Column c stands for the step first + 1 + round(c (steps - 1) / (width - 1)). A bar's length, in parts of a cell
    (`glyphs` has one for each), is rounded up: no rate above 0 is drawn as nothing.
    """
    parts, rows = len(glyphs) - 1, reversed(range(height))
    unit = plan.highest / (height * parts) or 1.0  # a branch of a run that ended at 0 has nothing else
    steps = [plan.first + 1 + round(column * (plan.steps - 1) / (width - 1)) for column in range(width)]
    bars = [math.ceil(plan.rate(step) / unit - 1e-9) for step in steps]
    return ["".join(glyphs[min(parts, max(0, bar - row * parts))] for bar in bars) for row in rows]


def drawing(plan: Plan, glyphs: str = BLOCKS) -> list[str]:
    """The curve under its title, with axes: the peak and 0, the first and the last step and its rate."""
    drawn, last = curve(plan, glyphs=glyphs), plan.last
    labels = [f"{plan.highest:.2e}", *[""] * (len(drawn) - 2), "0"]
    left, right = f"step {plan.first + 1:,}", f"{last:,}: {plan.rate(last):.2e}"
    return [
        f"learning rate, {', then '.join(part.kind for part in plan.parts)}",
        *(f"{label:>13} |{line.rstrip()}" for label, line in zip(labels, drawn)),
        f"{'':<14}+{'-' * len(drawn[0])}",
        f"{'':<15}{left}{right:>{len(drawn[0]) - len(left)}}",
    ]
