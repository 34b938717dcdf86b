"""What a run's losses say: pure functions of curves, which are (tokens, nats a token) points in the order of tokens.

Tokens count from the run's own start. Between evaluations losses are taken as straight lines; beyond them nothing is
said. The sets of a role count the same, however large they are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastcpt.arms import Arm, differences, number

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Peak:
    """Of a curve above its first value. height: 0 where it never was above; tokens: of the highest point. back: tokens at
    which it is at its first value again, and None if that is not within the curve."""

    height: float
    tokens: float
    back: float | None


def at(curve: Curve, tokens: float) -> float:
    """The value at a number of tokens, interpolated; not a number outside the curve."""
    for (t, y), (u, z) in itertools.pairwise(curve):
        if t <= tokens <= u:
            return y if t == u else y + (z - y) * (tokens - t) / (u - t)
    return curve[0][1] if len(curve) == 1 and tokens == curve[0][0] else math.nan


def against(curve: Curve, control: Curve) -> Curve:
    """The difference at equal tokens, at the curve's own points that lie within the control."""
    differences = [(tokens, value - at(control, tokens)) for tokens, value in curve]
    return [point for point in differences if math.isfinite(point[1])]


def peak(curve: Curve) -> Peak:
    start = curve[0][1]
    top = max(range(len(curve)), key=lambda i: curve[i][1])  # the first of equals
    if curve[top][1] <= start:
        return Peak(0.0, curve[0][0], curve[0][0])
    for (t, y), (u, z) in itertools.pairwise(curve[top:]):
        if z <= start:
            return Peak(curve[top][1] - start, curve[top][0], t + (u - t) * (y - start) / (y - z))
    return Peak(curve[top][1] - start, curve[top][0], None)


def mean(curve: Curve) -> float:
    """The area under the curve (trapezoids) over its tokens; not a number for fewer than two points."""
    span = curve[-1][0] - curve[0][0] if curve else 0
    return sum((u - t) * (y + z) / 2 for (t, y), (u, z) in itertools.pairwise(curve)) / span if span else math.nan


def changes(arm: Arm, what: str) -> Curve:
    """what: forgetting or adaptation, as the run's files have it: the mean over the sets of a role, from its start on."""
    points = [(line["tokens"], number(line.get(what))) for line in arm.evaluations]
    return _from_start(arm, points)


def losses(arm: Arm, names: Sequence[str]) -> Curve:
    """The mean loss of validation sets, where all of them were evaluated."""
    points = []
    for line in arm.evaluations:
        each = [number(line["eval"].get(name, {}).get("loss")) for name in names]
        points.append((line["tokens"], sum(each) / len(each) if each else math.nan))
    return _from_start(arm, points)


def _from_start(arm: Arm, points: Curve) -> Curve:
    first = arm.evaluations[0]["tokens"] if arm.evaluations else 0
    return [(tokens - first, value) for tokens, value in points if math.isfinite(value)]


def upstream(arm: Arm) -> list[str]:
    """Its upstream sets, in the order of its last evaluation."""
    entries = arm.evaluations[-1]["eval"] if arm.evaluations else {}
    return [name for name, entry in entries.items() if entry.get("role") == "upstream"]


def forgetting(arm: Arm, control: Arm) -> Curve:
    """Upstream loss of the arm minus that of the control at equal tokens: what more text of the old kind would have spared."""
    names = [name for name in upstream(arm) if name in upstream(control)]
    return against(losses(arm, names), losses(control, names))


def unlike(arm: Arm, control: Arm) -> list[str]:
    """Settings that a control should share with the arm and does not: all but what text it reads, that the model knows it
    (init.force), and what only reports."""
    apart = ("data.train", "data.val", "init.force", "run.")
    return [key for key in differences([arm, control]) if not key.startswith(apart)]
