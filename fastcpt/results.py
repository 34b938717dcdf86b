"""The results of a sweep: every evaluation of every complete run in one table, and what is read off it.

results.csv has one row for each validation set of each evaluation: arm, seed, start (scratch or warm), step, tokens, set, role,
loss (nats a token), bits_per_byte. Arms of one seed saw the same text in the same order, so arms are compared seed by seed: of differences the
interval is Student's, over the seeds.
"""

import csv
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastcpt import UserError
from fastcpt.arms import read_arms
from fastcpt.grid import Grid

COLUMNS = ("arm", "seed", "start", "step", "tokens", "set", "role", "loss", "bits_per_byte")


class Point(NamedTuple):
    """An evaluation of one set. tokens: trained on; loss: nats a token."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float


def write(plan: Grid, complete: Container[Path]) -> Path:
    """The table of the runs that are complete, by their folders, in the order of the sweep's file. Returns its path.

    A run that was stopped is not in it: its last losses would be compared with those of others at their ends.
    """
    path = plan.output / "results.csv"
    rows = []
    for job in plan.jobs:
        if job.folder not in complete:
            continue
        (arm,) = read_arms([str(job.folder)])
        for line in arm.evaluations:
            for name, entry in line["eval"].items():
                values = (f"{entry['loss']:.6f}", f"{entry['bits_per_byte']:.6f}")
                start = "scratch" if arm.scratch else "warm"
                rows.append((job.arm, job.seed, start, line["step"], line["tokens"], name, entry["role"], *values))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return path


@dataclass(frozen=True)
class Results:
    """A table, read. curves: {(arm, seed, set): its evaluations, oldest first}; roles: of the sets; scratch: arms that began with
    new weights."""

    curves: dict[tuple[str, int, str], list[Point]]
    roles: dict[str, str]
    scratch: set[str]

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """Raises UserError for what is no table of a sweep."""
        path = Path(path)
        if not path.is_file():
            raise UserError("results-missing", f"{path}: there is no such table; `fastcpt sweep` writes it")
        curves: dict[tuple[str, int, str], list[Point]] = {}
        roles: dict[str, str] = {}
        scratch: set[str] = set()
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError("results-wrong", f"{path}: its columns are not {', '.join(COLUMNS)}")
            for number, row in enumerate(reader, 2):
                try:
                    key = row["arm"], int(row["seed"]), row["set"]
                    point = Point(int(row["step"]), int(row["tokens"]), float(row["loss"]), float(row["bits_per_byte"]))
                except (TypeError, ValueError):
                    raise UserError(
                        "results-wrong", f"{path}, line {number}: not a row of results; remove it"
                    ) from None
                curves.setdefault(key, []).append(point)
                roles[row["set"]] = row["role"]
                if row["start"] == "scratch":
                    scratch.add(row["arm"])
        return cls(curves, roles, scratch)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, _, _ in self.curves))

    def seeds(self, *arms: str, name: str | None = None) -> list[int]:
        """Those that all the arms have, with evaluations of the set `name` if one is given."""
        found = [{s for each, s, of in self.curves if each == arm and name in (None, of)} for arm in arms]
        return sorted(set.intersection(*found)) if found else []

    def mean_curve(self, arm: str, name: str) -> list["Mean"]:
        """Over the seeds, at the steps that all of them have."""
        curves = [{p.step: p for p in self.curve(arm, seed, name)} for seed in self.seeds(arm, name=name)]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        means = []
        for step in steps:
            losses = [curve[step].loss for curve in curves]
            means.append(Mean(step, curves[0][step].tokens, sum(losses) / len(losses), min(losses), max(losses)))
        return means

    def mean_plane(self, arm: str) -> list[tuple[float, float]]:
        """(forgetting, adaptation) at each evaluation, means over sets and seeds; of one that begins with new weights none."""
        changes = []
        for role, sign in (("upstream", 1), ("downstream", -1)):
            tracks = [self.mean_curve(arm, name) for name, of in self.roles.items() if of == role]
            tracks = [track for track in tracks if track]
            if not tracks or arm in self.scratch:
                return []
            changes.append(
                [sum(sign * (p.mean - t[0].mean) for p, t in zip(at, tracks)) / len(tracks) for at in zip(*tracks)]
            )
        return list(zip(*changes))

    def curve(self, arm: str, seed: int, name: str) -> list[Point]:
        return self.curves[arm, seed, name]

    def points(self, arm: str, seed: int) -> list[Point]:
        """Of all sets."""
        return [p for (each, s, _), points in self.curves.items() if (each, s) == (arm, seed) for p in points]

    def final(self, arm: str, seed: int, name: str, last: int = 1) -> float:
        """Mean loss of the last evaluations."""
        points = self.curve(arm, seed, name)[-last:]
        return sum(point.loss for point in points) / len(points)

    def within(self, arm: str, seed: int, name: str, first: int, last: int) -> float:
        """Mean loss of the evaluations of steps from `first` to `last`."""
        losses = [point.loss for point in self.curve(arm, seed, name) if first <= point.step <= last]
        return sum(losses) / len(losses)

    def peak(self, arm: str, seed: int, name: str) -> float:
        """How far the loss rose above that at the start, at most."""
        points = self.curve(arm, seed, name)
        return max(point.loss for point in points) - points[0].loss


class Mean(NamedTuple):
    """An evaluation of one set, of all seeds: mean loss, the lowest and the highest."""

    step: int
    tokens: int
    mean: float
    low: float
    high: float


class Interval(NamedTuple):
    """mean and the bounds of a two-sided interval; values: what it is of."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's, for the mean of independent values; of one value it is unbounded."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf, tuple(values))
    from scipy import stats

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, tuple(values))


def equivalent(differences: Sequence[float], delta: float) -> bool:
    """Two one-sided tests at 5%: whether the 90% interval lies within (-delta, delta)."""
    found = interval(differences, 0.9)
    return -delta < found.low and found.high < delta


def above(differences: Sequence[float]) -> bool:
    """Whether all are above 0 and their mean is over twice its standard error."""
    count, mean = len(differences), sum(differences) / len(differences)
    if count < 2 or min(differences) <= 0:
        return False
    error = math.sqrt(sum((value - mean) ** 2 for value in differences) / (count - 1) / count)
    return mean > 2 * error
