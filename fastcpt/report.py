"""One page out of runs: what each arm learned, what it forgot, and how fast.

`report` writes an HTML page (`report.html` is its body) and beside it every figure as PNG and PDF. Runs are read by
`arms.py`, drawn by `figures.py`, and written by `pages.py`.
"""

import html
import math
import re
import string
from collections.abc import Sequence
from pathlib import Path

from fastcpt import UserError, reading
from fastcpt.arms import Arm, column, differences, finite, number, origin, printable, read_arms, set_names
from fastcpt.figures import Drawing, draw
from fastcpt.pages import arm_name, cell, figure, table, write
from fastcpt.progress import short_count, short_time

ROLES = ("upstream", "downstream", "other")
EARLY = 0.45  # the part of a schedule by which rates rank the other way round
SECTIONS = {
    "plane": "forgetting and adaptation", "validation": "validation loss", "training-loss": "training loss",
    "learning-rate": "learning rate", "throughput": "throughput",
}  # fmt: skip


def _results(arms: Sequence[Arm]) -> str:
    """The last figures of each arm."""
    sets = set_names(arms)
    head = ["run", "steps", "tokens"]
    for name, role in sets.items():
        head += [f"{html.escape(name)}<small>{html.escape(role)} loss</small>", "<small>bits/byte</small>"]
    head += ["forgetting", "adaptation", "tokens/s<small>median</small>", "peak memory", "wall time"]
    rows = []
    for i, arm in enumerate(arms):
        final = arm.evaluations[-1] if arm.evaluations else {}
        row = [arm_name(i, arm.name), f"{arm.last['step']:,}", f"{arm.last['tokens']:,}"]
        for name in sets:
            entry = final.get("eval", {}).get(name, {})
            row += [cell(number(entry.get(key)), ".4f") for key in ("loss", "bits_per_byte")]
        star = "*" if arm.scratch else ""
        row += [cell(number(final.get(key)), "+z.4f") + star for key in ("forgetting", "adaptation")]
        memory = max(finite(column(arm.training, "peak_memory_bytes")), default=math.nan)
        row += [
            cell(arm.throughput, ",.0f"),
            cell(memory / 2**30, lambda value: f"{value:.2f} GiB"),
            cell(arm.seconds, short_time),
        ]
        rows.append(row)
    return table(head, rows)


def _reading(arms: Sequence[Arm], control: Arm | None) -> str:
    """What the curves say: how much of the upstream text was lost on the way, for how long, and how much of it by the end."""
    head = ["run", "highest forgetting", "<small>at tokens</small>", "back at the start's loss<small>after tokens</small>",
            "mean forgetting<small>over the tokens</small>", "mean adaptation<small>over the tokens</small>"]  # fmt: skip
    if control:
        head += ["against the control<small>at the end</small>", "<small>mean over the tokens</small>"]
    rows = []
    for i, arm in enumerate(arms):
        lost, learned = (reading.changes(arm, what) for what in ("forgetting", "adaptation"))
        row, count = [arm_name(i, arm.name)], len(head) - 1
        if arm.scratch:  # against a random start there is no forgetting
            rows.append(row + ["–"] * count)
            continue
        if lost:
            peak = reading.peak(lost)
            never = peak.height == 0
            back = (
                "not within the run" if peak.back is None else "never above" if never else short_count(round(peak.back))
            )
            row += [cell(peak.height, "+.4f"), "–" if never else short_count(round(peak.tokens)), back]
        else:
            row += ["–"] * 3
        row += [cell(reading.mean(curve), "+z.4f") for curve in (lost, learned)]
        if control:
            apart = [] if arm is control else reading.forgetting(arm, control)
            row += [cell(apart[-1][1] if apart else math.nan, "+z.4f"), cell(reading.mean(apart), "+z.4f")]
        rows.append(row)
    return table(head, rows)


def _sets(arms: Sequence[Arm]) -> str:
    """Each validation set by role, with its loss at the end and what has changed; the mean of a role where it has several."""
    sets, rows = set_names(arms), []
    for role in sorted(set(sets.values()), key=lambda role: [*ROLES, role].index(role)):
        names = [name for name, each in sets.items() if each == role]
        title = f"mean of {len(names)}<small>{html.escape(role)}</small>"
        groups = [(f"{html.escape(name)}<small>{html.escape(role)}</small>", [name]) for name in names]
        for label, group in [*groups, *([(title, names)] if len(names) > 1 else [])]:
            cells = []
            for arm in arms:
                curve = reading.losses(arm, group)
                change = "" if arm.scratch or len(curve) < 2 else f" ({curve[-1][1] - curve[0][1]:+z.4f})"
                cells.append(f"{curve[-1][1]:.4f}{change}" if curve else "–")
            rows.append([label, *cells])
    return (
        table(["set", *(arm_name(i, arms[i].name) for i in range(len(arms)))], rows)
        if rows
        else "<p>There are none.</p>"
    )


def _footnotes(arms: Sequence[Arm], control: Arm | None) -> list[str]:
    """What to know of the tables, in sentences."""
    notes = ["* against its own random start."] if any(arm.scratch and arm.evaluations for arm in arms) else []
    if control:
        notes.append(
            f"Control: {control.name}, which went on with upstream text. Against it, positive is what more of that text would "
            "have spared; at equal tokens, interpolated between evaluations, as far as both runs go."
        )
        for arm in arms:
            if arm is not control and not arm.scratch and (apart := reading.unlike(arm, control)):
                notes.append(f"{arm.name} differs from the control in more than its text: {', '.join(apart)}.")
    early = [
        arm.name for arm in arms if arm.planned and arm.last["step"] - arm.first < EARLY * (arm.planned - arm.first)
    ]
    if early and len(arms) > 1:
        notes.append(
            f"Before {EARLY:.0%} of its schedule: {', '.join(early)}. Do not rank learning rates by it: for the first 100B of 240B "
            "tokens the smallest led on the new text, and ended behind (arXiv 2308.04014, figure 2)."
        )
    return [printable(note) for note in notes]


def _breakable(text: str) -> str:
    """Escaped; a long path or setting may break after its dots and slashes."""
    return re.sub("[./](?=.)", r"\g<0><wbr>", html.escape(text))


def _differences(arms: Sequence[Arm]) -> str:
    rows = [
        [f"<code>{_breakable(printable(key))}</code>", *map(_breakable, values)]
        for key, values in differences(arms).items()
    ]
    if not rows:
        return "<p>In nothing but where they are.</p>" if len(arms) > 1 else "<p>There is one run alone.</p>"
    return table(["setting", *(arm_name(i, arms[i].name) for i in range(len(arms)))], rows, "differences")


def _card(arms: Sequence[Arm], i: int) -> str:
    arm = arms[i]
    notes = "".join(f'<p class="warn">{html.escape(note[0].upper() + note[1:])}.</p>' for note in arm.notes)
    where = f'<p class="soft"><code>{_breakable(printable(str(arm.folder)))}</code></p>'
    return (
        f"<li><p><strong>{arm_name(i, arms[i].name)}</strong></p><p>{html.escape(origin(arm))}</p>{where}{notes}</li>"
    )


def _body(arms: Sequence[Arm], drawings: Sequence[Drawing], folder: Path, control: Arm | None) -> str:
    missing = [title for key, title in SECTIONS.items() if not any(each.key.startswith(key) for each in drawings)]
    return string.Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8")).substitute(
        arms="\n".join(_card(arms, i) for i in range(len(arms))),
        results=_results(arms),
        footnotes="\n".join(f'<p class="soft">{html.escape(note)}</p>' for note in _footnotes(arms, control)),
        reading=_reading(arms, control),
        sets=_sets(arms),
        figures="\n".join(figure(drawing, folder) for drawing in drawings),
        omitted=f'<p class="soft">Not drawn, no run has the numbers: {", ".join(missing)}.</p>' if missing else "",
        differences=_differences(arms),
    )


def _with_control(runs: Sequence[str], control: str | None) -> tuple[list[Arm], Arm | None]:
    """The arms, the control among them, and the control. Raises UserError for one that nothing can be held against."""
    if control is None:
        return read_arms(runs), None
    places = [Path(run).resolve() for run in runs]
    alone = Path(control).resolve() not in places
    arms = read_arms([*runs, control] if alone else runs)
    found = arms[-1] if alone else arms[places.index(Path(control).resolve())]
    if not any(reading.forgetting(arm, found) for arm in arms if arm is not found):
        raise UserError(
            "control-incomparable",
            f"{control}: no run has an upstream set in common with this control, at tokens that it reached; name the run "
            "that went on with upstream text, with the same data.val",
        )
    return arms, found


def report(runs: Sequence[str], output: str | Path, control: str | None = None) -> list[Path]:
    """Writes a page about the runs to `output` and its figures to a folder beside it, FILE-figures.

    control: the run that went on with upstream text on the same schedule; forgetting is held against it, too. Returns the
    files written, the page first. Raises UserError for a folder that is no run, or without matplotlib.
    """
    arms, held_against = _with_control(runs, control)
    names = ", ".join(arm.name for arm in arms)

    def make(folder: Path) -> tuple[str, Sequence[Drawing]]:
        drawings = draw(arms, held_against)
        return _body(arms, drawings, folder, held_against), drawings

    return write(f"{names}: a report" if len(names) < 60 else f"A report on {len(arms)} runs", make, output)
