"""One page out of runs: what each arm learned, what it forgot, and how fast.

`report` writes an HTML page that needs nothing else (inline SVG, no script; `report.html` is its frame), and beside it
every figure as PNG and PDF. The same input gives the same bytes. Runs are read by `arms.py`, drawn by `figures.py`. In
the page figures follow the reader's light or dark theme: the SVG's colours become variables of the style sheet.
"""

import html
import io
import math
import os
import re
import string
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from fastcpt import UserError, __version__
from fastcpt.arms import Arm, column, differences, finite, number, origin, printable, read_arms, set_names
from fastcpt.figures import COLOURS, DASHES, INK, PAPER, STYLE, Drawing, draw, look
from fastcpt.progress import short_time

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# What is written beside the page, without dates and versions: the same input gives the same bytes.
FILES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
SECTIONS = {
    "plane": "forgetting and adaptation", "validation": "validation loss", "training-loss": "training loss",
    "learning-rate": "learning rate", "throughput": "throughput",
}  # fmt: skip


def _inline(drawing: Drawing) -> str:
    """The figure as SVG for the page: names of its own, the theme's colours, a title and a description."""
    stream = io.StringIO()
    drawing.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(stream.getvalue())
    variables = {on_white: f"var(--arm-{i}, {on_white})" for i, (on_white, _) in enumerate(COLOURS)}
    variables |= {INK: "currentColor", PAPER: f"var(--page, {PAPER})"}
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # its rules would hold for the whole page
                element.remove(child)
        for name, value in element.items():
            if name in ("style", "fill", "stroke"):
                value = re.sub("#[0-9a-f]{6}", lambda match: variables.get(match[0], match[0]), value)
            if name == "id":
                value = f"{drawing.key}-{value}"
            elif name == f"{{{XLINK}}}href":
                value = f"#{drawing.key}-{value.removeprefix('#')}"
            element.set(name, value.replace("url(#", f"url(#{drawing.key}-"))
    for tag, text in (("desc", drawing.alt), ("title", drawing.title)):
        child = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{drawing.key}-{tag}"})
        child.text = text
        root.insert(0, child)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-labelledby": f"{drawing.key}-title {drawing.key}-desc"}
    return ElementTree.tostring(root, encoding="unicode")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML; the first of a row is its heading. It scrolls inside its own box."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n' for row in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody>'
        "</table></div>"
    )


def _cell(value: float, form: str | Callable[[float], str]) -> str:
    return "–" if math.isnan(value) else form(value) if callable(form) else format(value, form)


def _name(arms: Sequence[Arm], i: int) -> str:
    """An arm's name after a piece of its line."""
    dashes = {"-": "", **{dash: " ".join(map(str, dash[1])) for dash in DASHES[1:]}}[look(i)["linestyle"]]
    return (
        '<span class="name"><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path d="M0 4H26" fill="none" stroke-width="2.5" '
        f'stroke="var(--arm-{i % len(COLOURS)})" stroke-dasharray="{dashes}"/></svg><span>{html.escape(arms[i].name)}</span></span>'
    )


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
        row = [_name(arms, i), f"{arm.last['step']:,}", f"{arm.last['tokens']:,}"]
        for name in sets:
            entry = final.get("eval", {}).get(name, {})
            row += [_cell(number(entry.get(key)), ".4f") for key in ("loss", "bits_per_byte")]
        star = "*" if arm.scratch else ""
        row += [_cell(number(final.get(key)), "+z.4f") + star for key in ("forgetting", "adaptation")]
        memory = max(finite(column(arm.training, "peak_memory_bytes")), default=math.nan)
        row += [
            _cell(arm.throughput, ",.0f"),
            _cell(memory / 2**30, lambda value: f"{value:.2f} GiB"),
            _cell(arm.seconds, short_time),
        ]
        rows.append(row)
    return _table(head, rows)


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
    return _table(["setting", *(_name(arms, i) for i in range(len(arms)))], rows, "differences")


def _card(arms: Sequence[Arm], i: int) -> str:
    arm = arms[i]
    notes = "".join(f'<p class="warn">{html.escape(note[0].upper() + note[1:])}.</p>' for note in arm.notes)
    where = f'<p class="soft"><code>{_breakable(printable(str(arm.folder)))}</code></p>'
    return f"<li><p><strong>{_name(arms, i)}</strong></p><p>{html.escape(origin(arm))}</p>{where}{notes}</li>"


def _figure(drawing: Drawing, folder: Path) -> str:
    links = ", ".join(
        f'<a href="{quote(os.fsencode(f"{folder.name}/{drawing.key}.{suffix}"))}">{suffix.upper()}</a>'
        for suffix in FILES
    )
    title, caption = html.escape(drawing.title), html.escape(drawing.caption)
    return f"<figure><h3>{title}</h3>\n{_inline(drawing)}\n<figcaption>{caption} <span>{links}</span></figcaption></figure>"


def _page(arms: Sequence[Arm], drawings: Sequence[Drawing], folder: Path) -> str:
    shades = ["".join(f"--arm-{i}: {pair[n]}; " for i, pair in enumerate(COLOURS)) for n in (0, 1)]
    names = ", ".join(arm.name for arm in arms)
    missing = [title for key, title in SECTIONS.items() if not any(each.key.startswith(key) for each in drawings)]
    star = "* against its own random start." if any(arm.scratch and arm.evaluations for arm in arms) else ""
    return string.Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{names}: a report" if len(names) < 60 else f"A report on {len(arms)} runs"),
        light=shades[0],
        dark=shades[1],
        arms="\n".join(_card(arms, i) for i in range(len(arms))),
        results=_results(arms),
        footnotes=f'<p class="soft">{star}</p>' if star else "",
        figures="\n".join(_figure(drawing, folder) for drawing in drawings),
        omitted=f'<p class="soft">Not drawn, no run has the numbers: {", ".join(missing)}.</p>' if missing else "",
        differences=_differences(arms),
        version=__version__,
    )


def report(runs: Sequence[str], output: str | Path) -> list[Path]:
    """Writes a page about the runs to `output` and its figures to a folder beside it, FILE-figures.

    Returns the files written, the page first. Raises UserError for a folder that is no run, or without matplotlib.
    """
    arms, page = read_arms(runs), Path(output)
    try:
        from matplotlib import style
    except ImportError:
        raise UserError(
            "matplotlib-missing", "figures are drawn by matplotlib, which is not here; pip install 'fastcpt[report]'"
        ) from None
    if "://" in str(output):
        raise UserError("output-remote", f"{output}: a URL; name a file of this machine")
    if page.is_dir():
        raise UserError(
            "output-is-folder", f"{output}: a folder; name the page's file with --output, such as report.html"
        )
    folder = page.with_name(page.stem + "-figures")
    written = [page]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style.context(["default", STYLE]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # PNG and PDF have one font; the page has all
            drawings = draw(arms)
            content = _page(arms, drawings, folder)
            for drawing in drawings:
                for suffix, metadata in FILES.items():
                    written.append(folder / f"{drawing.key}.{suffix}")
                    drawing.figure.savefig(written[-1], metadata=metadata, facecolor="white")
        page.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(
            "output-not-writable",
            f"{error.filename or page}: cannot be written ({error.strerror}); choose another --output",
        ) from None
    return written
