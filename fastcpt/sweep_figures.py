"""A sweep's figures, as the papers draw them: loss against tokens of each arm, the plane, and what arms end with.

A line is the mean over an arm's seeds, its band reaches from the lowest to the highest. Arms of one seed read the same text
in the same order, so ends are compared seed by seed with the first arm of a figure: points are means of differences, bars
Student's 95% intervals over the seeds.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastcpt.figures import FONT, HEIGHT, INK, PAPER, WIDTH, Drawing, canvas, fit, label_ends, look, width
from fastcpt.progress import short_count
from fastcpt.results import Results, interval

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LABELLED = 4  # arms that the plane names at their ends; the labels of more would lie on each other


def _slug(text: str) -> str:
    return re.sub("[^A-Za-z0-9._-]+", "-", text).strip("-")[:60].lower()


def _legend(figure: "Figure", handles: Sequence["Artist"], labels: Sequence[str]) -> None:
    columns = max(1, int(72 * WIDTH / (max(map(width, labels)) + 6 * FONT)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(HEIGHT + (rows - 2) * 1.55 * FONT / 72)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def curves(results: Results, title: str, arms: Sequence[str], name: str) -> Drawing | None:
    """Loss of one validation set against tokens. None where no arm has two evaluations of it."""
    drawn = [(i, arm) for i, arm in enumerate(arms) if len(results.mean_curve(arm, name)) > 1]
    if not drawn:
        return None
    role = results.roles[name]
    figure, axes = canvas("tokens", f"{fit(name, 115)} loss ({role})")
    handles, ends = [], []
    for i, arm in drawn:
        points = results.mean_curve(arm, name)
        tokens = [point.tokens for point in points]
        style = look(i)
        axes.fill_between(
            tokens, [p.low for p in points], [p.high for p in points], color=style["color"], alpha=0.18, linewidth=0
        )
        handles += axes.plot(
            tokens, [point.mean for point in points], **style, markevery=max(1, len(points) // 8), zorder=3
        )
        ends.append(f"{arm} ends at {points[-1].mean:.4f}")
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    note = _scale(results, axes, [arm for _, arm in drawn], name)
    _legend(figure, handles, [fit(arm, 72 * WIDTH - 6 * FONT) for _, arm in drawn])
    caption = f"Means over seeds; bands reach from the lowest to the highest seed.{note}"
    return Drawing(
        f"{_slug(title)}-{_slug(name)}", f"{title}: loss of {name} ({role})", caption, "; ".join(ends) + ".", figure
    )


def _scale(results: Results, axes: "Axes", arms: Sequence[str], name: str) -> str:
    """A scale without the first fifth of arms from scratch, whose start would flatten all others: it is said instead."""
    heights = {arm: [point.mean for point in results.mean_curve(arm, name)] for arm in arms}
    kept = {arm: ys[len(ys) // 5 if arm in results.scratch else 0 :] for arm, ys in heights.items()}
    low, high = min(min(ys) for ys in kept.values()), max(max(ys) for ys in kept.values())
    margin = 0.06 * (high - low) or 0.1
    above = [arm for arm in arms if heights[arm][0] > high + margin]
    if not above:
        return ""
    axes.set_ylim(low - margin, high + margin)
    return " Begun above the scale: " + ", ".join(f"{arm} at {heights[arm][0]:.3f}" for arm in above) + "."


def plane(results: Results, title: str, arms: Sequence[str]) -> Drawing | None:
    """The trade-off: where each arm went from its start. Right is forgetting, up is adaptation."""
    tracks = {arm: results.mean_plane(arm) for arm in arms}
    drawn = [(i, arm) for i, arm in enumerate(arms) if len(tracks[arm]) > 1]
    if not drawn:
        return None
    figure, axes = canvas("forgetting (nats a token) →  worse", "adaptation (nats a token) →  better")
    axes.set_title("↖ better: learned more, forgot less", loc="left")
    axes.axhline(0, color=INK, linewidth=1, zorder=2)
    axes.axvline(0, color=INK, linewidth=1, zorder=2)
    handles: list[Artist] = []
    for i, arm in drawn:
        handles += axes.plot(*zip(*tracks[arm]), **look(i), zorder=3)
        axes.plot(*tracks[arm][-1], **{**look(i), "linestyle": "none"}, markersize=10, markeredgecolor=PAPER, zorder=5)
    axes.margins(0.14)
    if len(drawn) <= LABELLED:
        label_ends(axes, [fit(arm, 140) for _, arm in drawn], [tracks[arm] for _, arm in drawn])
    else:
        _legend(figure, handles, [fit(arm, 72 * WIDTH - 6 * FONT) for _, arm in drawn])
    ends = "; ".join(
        f"{arm} ends at forgetting {tracks[arm][-1][0]:+.4f}, adaptation {tracks[arm][-1][1]:+.4f}" for _, arm in drawn
    )
    return Drawing(
        f"{_slug(title)}-plane", f"{title}: forgetting and adaptation",
        "Means over seeds, from each arm's start. Arms from scratch, whose start knows nothing, are left out.", ends + ".", figure,
    )  # fmt: skip


def finals(results: Results, title: str, arms: Sequence[str], name: str) -> Drawing | None:
    """How much more than the first arm each of the others ends with, of one validation set."""
    first, *others = arms
    rows = []
    for i, arm in enumerate(others, 1):
        if seeds := results.seeds(first, arm, name=name):
            rows.append(
                (i, arm, interval([results.final(arm, s, name) - results.final(first, s, name) for s in seeds]))
            )
    if not rows:
        return None
    figure, axes = canvas(f"{fit(name, 115)} loss minus that of {fit(first, 130)}", "")
    figure.set_figheight(max(2.0, 0.9 + 0.34 * len(rows)))
    axes.axvline(0, color=INK, linewidth=1, zorder=2)
    for row, (i, _, found) in enumerate(rows):
        style = {**look(i), "linestyle": "none"}
        half = [[found.half]] if len(found.values) > 1 else None
        axes.errorbar([found.mean], [-row], xerr=half, **style, markersize=7, capsize=4, elinewidth=1.6, zorder=4)
    axes.set_yticks([-row for row in range(len(rows))], [fit(arm, 150) for _, arm, _ in rows])
    axes.locator_params(axis="x", nbins=5)
    axes.margins(y=0.2 / len(rows) + 0.08)
    said = "; ".join(f"{arm} {found.mean:+.4f} from {found.low:+.4f} to {found.high:+.4f}" for _, arm, found in rows)
    return Drawing(
        f"{_slug(title)}-ends-{_slug(name)}", f"{title}: {name} at the end",
        f"Differences from {first}, seed by seed: mean and 95% interval.", said + ".", figure,
    )  # fmt: skip


def draw(results: Results, figures: dict[str, list[str]]) -> dict[str, list[Drawing]]:
    """{title: its figures} for {title: arms}."""
    out = {}
    for title, arms in figures.items():
        drawings = [plane(results, title, arms)]
        for name in results.roles:
            drawings += [curves(results, title, arms, name), finals(results, title, arms, name)]
        out[title] = [drawing for drawing in drawings if drawing is not None]
    return out
