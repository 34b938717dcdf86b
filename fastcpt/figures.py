"""The figures of a report, drawn by matplotlib: validation, training, learning rate, throughput, and the plane.

Colours are Okabe and Ito's, told apart by colour-blind readers; an arm's dashes and marker say the same again. Losses
are in nats a token.
"""

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastcpt import reading
from fastcpt.arms import Arm, column, comparable, finite, number, set_names
from fastcpt.progress import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
# (on white, on black)
COLOURS = (("#0072b2", "#56b4f5"), ("#d55e00", "#ff8c42"), ("#009e73", "#2fcf9f"),
           ("#c2608f", "#ee9fcb"), ("#b07d00", "#f0bb3a"), ("#6f4fa0", "#b79ae0"))  # fmt: skip
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1.5, 2)), (0, (1.5, 1.5)))
MARKERS = "os^DvPX"
INK, PAPER = "#1d2733", "#fffffe"
# Inches and points. Small on purpose: a phone shows the page's figures at about this size, and text stays readable.
WIDTH, HEIGHT, FONT = 5.2, 3.9, 11.5
STYLE = {
    "font.size": FONT, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.7, "axes.linewidth": 0.8,
    "axes.axisbelow": True, "axes.titlesize": FONT, "axes.labelsize": FONT,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.fontsize": FONT, "legend.frameon": False,
    "legend.handlelength": 3.0, "svg.fonttype": "none", "svg.hashsalt": "fastcpt", "pdf.fonttype": 42,
    "savefig.dpi": 220,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure of the page. key: its file's name; alt: what it shows, for who cannot see it."""

    key: str
    title: str
    caption: str
    alt: str
    figure: "Figure"


def look(i: int) -> dict[str, Any]:
    """Colour, dashes and marker of the i-th arm."""
    return {"color": COLOURS[i % len(COLOURS)][0], "linestyle": DASHES[i % 4], "marker": MARKERS[i % len(MARKERS)]}


def canvas(x: str, y: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def width(text: str) -> float:
    """About how wide a text is in a figure, in points; rather more than less."""

    def ems(character: str) -> float:
        if character in "mwMW@%—" or unicodedata.east_asian_width(character) in "WF":
            return 1.0
        return 0.78 if character.isupper() else 0.64

    return FONT * sum(map(ems, text))


def fit(text: str, points: float) -> str:
    """The text, or as much of its start and end as fits into so many points."""
    pieces = (f"{text[: (n + 1) // 2]}…{text[len(text) - n // 2 :]}" for n in range(len(text) - 1, 0, -1))
    return next((piece for piece in (text, *pieces) if width(piece) <= points), "…")


def _curves(
    key: str, title: str, caption: str, arms: Sequence[Arm], get: Callable[[Arm], tuple[Sequence[float], Sequence[float]]],
    axis: tuple[str, str], form: Callable[[float], str] = "{:g}".format, loss: bool = False,
    ringed: Callable[[Arm], Sequence[int]] = lambda arm: (),
) -> Drawing | None:  # fmt: skip
    """One line an arm of (x, y); None if no arm has a value. ringed: indexes of points to mark so."""
    curves = [(i, arm, *get(arm)) for i, arm in enumerate(arms)]
    drawn = [curve for curve in curves if finite(curve[3])]
    if not drawn:
        return None
    figure, axes = canvas(*axis)
    handles, labels, ends = [], [], []
    piece, room = 5 * FONT, 72 * WIDTH - 6 * FONT  # in a legend: a line, and what is left for the text
    spans = [max(xs) - min(xs) for _, _, xs, _ in drawn]
    for (i, arm, xs, ys), span in zip(drawn, spans):
        known = [n for n, y in enumerate(ys) if math.isfinite(y)]
        marks = max(3, round(14 * span / (max(spans) or 1)))
        weight = 1.8 if len(xs) < 500 else 1
        handles += axes.plot(xs, ys, **look(i), linewidth=weight, markevery=max(1, len(xs) // marks), zorder=3)
        mark = {**look(i), "linestyle": "none", "markersize": 8}
        rings = [n for n in ringed(arm) if math.isfinite(ys[n])]
        axes.plot([xs[n] for n in rings], [ys[n] for n in rings], **mark, markerfacecolor="none", zorder=4)
        axes.plot([xs[known[-1]]], [ys[known[-1]]], **mark, markeredgecolor=PAPER, markeredgewidth=0.8, zorder=5)
        value = f"  {ys[known[-1]]:.3f}" if loss else ""
        labels.append(fit(arm.name, room - width(value)) + value)
        ends.append(f"{arm.name} ends at {ys[known[-1]]:.4g}")
    if max(spans) == 0:
        axes.set_xticks([xs[0] for _, _, xs, _ in drawn])
    elif max(spans) > 20 * min(positive := [span for span in spans if span > 0]):
        axes.set_xscale("symlog", linthresh=min(positive))
        caption += " The horizontal axis is logarithmic beyond the shortest run's end."
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.yaxis.set_major_formatter(lambda value, _: form(value))
    if loss:
        caption += _scale(axes, drawn)
    else:
        axes.set_ylim(bottom=0)
    if missing := [arm.name for _, arm, _, ys in curves if not finite(ys)]:
        caption += f" Without values: {', '.join(missing)}."
    columns = max(1, int(72 * WIDTH / (max(map(width, labels)) + piece + FONT)))
    figure.set_figheight(HEIGHT + (math.ceil(len(labels) / columns) - 2) * 1.55 * FONT / 72)
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns)
    for text, label in zip(legend.get_texts(), labels):
        text.set_text(label)  # as it is: matplotlib hides labels that start with an underscore
    return Drawing(key, title, caption.strip(), f"{title}: {axis[1]} against {axis[0]}. {'; '.join(ends)}.", figure)


def _scale(axes: "Axes", drawn: Sequence[tuple[int, Arm, Sequence[float], Sequence[float]]]) -> str:
    """A scale for the arms that continue. What a run from scratch starts with would flatten them: it is said instead."""
    shown = finite([y for _, arm, _, ys in drawn for y in (ys[len(ys) // 2 :] if arm.scratch else ys)])
    if all(arm.scratch for _, arm, _, _ in drawn) or not shown:
        return ""
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    above = {}
    for _, arm, _, ys in drawn:
        first = next(y for y in ys if math.isfinite(y))
        if first > max(shown) + margin:
            above[arm.name] = f"{first:.3f}"
    if not above:
        return ""
    lowest = min(above.values(), key=float)
    single = f"{fit(next(iter(above)), 180)} starts at {lowest}"
    axes.set_title(f"↑ {single}" if len(above) == 1 else f"↑ {len(above)} runs start at {lowest} or above", loc="left")
    starts = ", ".join(f"{arm} at {first}" for arm, first in above.items())
    return f" Begun from scratch, above the scale: {starts}."


def _validation(arms: Sequence[Arm], name: str, role: str, n: int) -> Drawing | None:
    doubt = "" if comparable(arms, name) else " Arms measured it on different tokens: their levels do not compare."
    return _curves(
        f"validation-{n}-{re.sub('[^A-Za-z0-9._-]+', '-', name)[:60]}", f"Validation loss: {name} ({role})",
        f"Ringed: where a run began. Large: its last evaluation, with the value above.{doubt}", arms,
        lambda arm: ([t for t, _ in arm.entries(name)], [number(entry.get("loss")) for _, entry in arm.entries(name)]),
        ("tokens", f"{fit(name, 115)} loss ({role})"), loss=True, ringed=lambda arm: [0],
    )  # fmt: skip


def place(
    ends: Sequence[Point], widths: Sequence[float], line: float, taken: Sequence[Point], area: Point
) -> list[Point]:
    """Lower left corners of labels near their ends, where they cover little of what is drawn and not each other.

    widths: of the labels, each `line` high; taken: points of what is drawn; all in points, in an area from the origin.
    """
    boxes: list[tuple[float, float, float]] = []
    for (x, y), size in zip(ends, widths):

        def cost(spot: Point, y: float = y, size: float = size) -> float:
            left, low = spot
            covered = sum(left - 4 < px < left + size + 4 and low - 2 < py < low + line + 2 for px, py in taken)
            others = sum(left < l + w and l < left + size and abs(low - b) < line for l, b, w in boxes)
            outside = left < 0 or left + size > area[0] or low < 0 or low + line > area[1]
            return covered + 50 * others + 200 * outside + 0.2 * abs(low + line / 2 - y)

        steps = (0.0, 0.8, -0.8, 1.6, -1.6, 2.4, -2.4, 3.2, -3.2)
        near = [(left, y + (n - 0.5) * line) for n in steps for left in (x + 12, x - 12 - size)]
        near += [(x - size / 2, y + (n - 0.5) * line) for n in steps[3:]]
        boxes.append((*min(near, key=cost), size))
    return [(left, low) for left, low, _ in boxes]


def label_ends(axes: "Axes", names: Sequence[str], tracks: Sequence[Sequence[Point]]) -> None:
    """Writes each name near the end of its track, a thin line between them."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    # About the size of the axes: labels are placed before the layout is known.
    area, line = (72 * WIDTH * 0.84, 72 * HEIGHT * 0.75), 1.25 * FONT
    across, up = (right - left) / area[0], (high - low) / area[1]  # of a point, in units of the data
    scaled = [[((x - left) / across, (y - low) / up) for x, y in track] for track in tracks]
    taken = [
        (a[0] + (b[0] - a[0]) * n / 20, a[1] + (b[1] - a[1]) * n / 20)
        for track in scaled for a, b in itertools.pairwise(track) for n in range(21)
    ]  # fmt: skip
    taken += [(-left / across, area[1] * n / 60) for n in range(61)]  # the line of no forgetting
    ends = [track[-1] for track in scaled]
    widths = [width(name) for name in names]
    spots = place(ends, widths, line, taken + 10 * ends, area)
    for name, size, track, end, (x, y) in zip(names, widths, tracks, ends, spots):
        # The width is a guess: a label grows away from its end.
        part = 0.0 if x > end[0] else 1.0 if x + size < end[0] else 0.5
        axes.annotate(
            name, track[-1], (left + across * (x + part * size), low + up * (y + line / 2)), zorder=6,
            va="center", ha=("left", "center", "right")[round(2 * part)],
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
        )  # fmt: skip


def _plane(arms: Sequence[Arm]) -> Drawing | None:
    """Where each continued arm went from the origin: right is forgetting, up is adaptation."""
    drawn = [(i, arm.name, arm.plane) for i, arm in enumerate(arms) if not arm.scratch and len(arm.plane) > 1]
    if not drawn:
        return None
    figure, axes = canvas("forgetting (nats a token) →  worse", "adaptation (nats a token) →  better")
    axes.set_title("↖ better: learned more, forgot less", loc="left")
    axes.axhline(0, color=INK, linewidth=1, zorder=2)
    axes.axvline(0, color=INK, linewidth=1, zorder=2)
    for i, _, points in drawn:
        axes.plot(*zip(*points), **look(i), zorder=3)
        axes.plot(*points[-1], **{**look(i), "linestyle": "none"}, markersize=10, markeredgecolor=PAPER, zorder=5)
    axes.margins(0.14)
    label_ends(axes, [fit(name, 140) for _, name, _ in drawn], [points for _, _, points in drawn])
    caption = "Each arm starts at the origin and ends at its large mark; the marks between are evaluations."
    if scratch := [arm.name for arm in arms if arm.scratch]:
        caption += f" Left out, as they compare with their own random start: {', '.join(scratch)}."
    if few := [arm.name for arm in arms if not arm.scratch and len(arm.plane) < 2]:
        caption += f" Without two evaluations of both: {', '.join(few)}."
    ends = "; ".join(f"{name} ends at forgetting {p[-1][0]:+.4f}, adaptation {p[-1][1]:+.4f}" for _, name, p in drawn)
    return Drawing("plane", "Forgetting and adaptation", caption, f"Up and left is better. {ends}.", figure)


def _control(arms: Sequence[Arm], control: Arm) -> Drawing | None:
    """Forgetting against the run that went on with upstream text."""
    apart = [[] if arm is control or arm.scratch else reading.forgetting(arm, control) for arm in arms]

    def of(arm: Arm) -> tuple[list[float], list[float]]:
        points = next(points for each, points in zip(arms, apart) if each is arm)
        return [tokens for tokens, _ in points], [value for _, value in points]

    drawing = _curves(
        "control", "Forgetting against the control",
        f"Upstream loss minus that of {control.name} at equal tokens, as far as both go.", arms, of,
        ("tokens", "forgetting (nats a token)"), loss=True,
    )  # fmt: skip
    if drawing:
        drawing.figure.axes[0].axhline(0, color=INK, linewidth=1, zorder=2)
    return drawing


def draw(arms: Sequence[Arm], control: Arm | None = None) -> list[Drawing]:
    """Every figure that the arms have numbers for. control: one of them, see `reading.forgetting`."""

    def of(x: str, y: str) -> Callable[[Arm], tuple[list[float], list[float]]]:
        return lambda arm: (column(arm.training, x), column(arm.training, y))

    drawings = [
        _plane(arms),
        _control(arms, control) if control else None,
        *(_validation(arms, name, role, n) for n, (name, role) in enumerate(set_names(arms).items(), 1)),
        _curves(
            "training-loss", "Training loss", "Mean of each logging interval, with the last one's value above.", arms,
            of("tokens", "loss"), ("tokens", "training loss (nats a token)"), loss=True,
        ),
        _curves(
            "learning-rate", "Learning rate", "At the logged steps: a warm-up between two of them does not show.", arms,
            of("tokens", "lr"), ("tokens", "learning rate"),
        ),
        _curves(
            "throughput", "Throughput",
            "Ringed: the first interval of a process, which contains compilation; the table's median leaves it out.", arms,
            of("step", "tokens_per_second"), ("step", "tokens a second"), form=short_count, ringed=lambda arm: arm.starts,
        ),
    ]  # fmt: skip
    return [drawing for drawing in drawings if drawing is not None]
