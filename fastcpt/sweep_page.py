"""One page about a sweep: `fastcpt report SWEEP.yaml`. Its frame and its files are those of `pages.py`, its figures those of
`sweep_figures.py`; the numbers come from the sweep's results.csv, and nothing else is read."""

import html
from collections.abc import Sequence
from pathlib import Path

from fastcpt import grid, pages
from fastcpt.figures import Drawing
from fastcpt.results import Interval, Results, interval
from fastcpt.sweep_figures import draw


def _bounded(found: Interval, form: str) -> str:
    """The mean, and the interval in small print below it."""
    if len(found.values) < 2:
        return format(found.mean, form)
    return f"{found.mean:{form}}<small>{found.low:{form}} to {found.high:{form}}</small>"


def table(results: Results, arms: Sequence[str]) -> str:
    """Final losses of each arm, and how they differ from the first arm's with the same seeds: means and 95% intervals."""
    first = arms[0]
    names = [name for name in results.roles if any(results.seeds(arm, name=name) for arm in arms)]
    head = ["arm", "seeds", "tokens"]
    for name in names:
        title = f"{html.escape(name)}<small>{html.escape(results.roles[name])} loss</small>"
        head += [title, f"<small>minus {html.escape(first)}</small>"]
    rows = []
    for i, arm in enumerate(arms):
        tokens = max(point.tokens for seed in results.seeds(arm) for point in results.points(arm, seed))
        row = [pages.arm_name(i, arm), str(len(results.seeds(arm))), f"{tokens:,}"]
        for name in names:
            own, both = results.seeds(arm, name=name), results.seeds(arm, first, name=name)
            row.append(_bounded(interval([results.final(arm, s, name) for s in own]), ".4f") if own else "–")
            gaps = [results.final(arm, s, name) - results.final(first, s, name) for s in both]
            row.append(_bounded(interval(gaps), "+.4f") if gaps and arm != first else "–")
        rows.append(row)
    return pages.table(head, rows)


def sweep_report(file: str, output: str | Path) -> list[Path]:
    """Writes the page and, beside it, every figure. Returns the files written, the page first. Raises UserError."""
    where, figures = grid.outline(file)
    results = Results.read(where / "results.csv")
    known = {title: [arm for arm in arms if arm in results.arms] for title, arms in figures.items()}
    known = {title: arms for title, arms in known.items() if arms}

    def body(folder: Path) -> tuple[str, list[Drawing]]:
        drawn = draw(results, known)
        parts = [
            f"<p>{len(results.arms)} arms of {html.escape(str(where))}; intervals are Student's, 95%, over seeds.</p>"
        ]
        for title, arms in known.items():
            shown = "\n".join(pages.figure(drawing, folder) for drawing in drawn[title])
            parts.append(
                f'<h2>{html.escape(title)}</h2>\n{table(results, arms)}\n<div class="figures">\n{shown}\n</div>'
            )
        return "\n".join(parts), [drawing for drawings in drawn.values() for drawing in drawings]

    return pages.write(f"{Path(file).stem}: a sweep", body, output)
