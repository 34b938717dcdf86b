"""What the pages of `report.py` and `sweep_page.py` share: the frame, tables, figures, and how all is written.

A page needs nothing else (inline SVG, no script; `page.html` is its frame). Figures follow the reader's light or dark theme:
the SVG's colours become variables of the style sheet. The same input gives the same bytes.
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
from fastcpt.figures import COLOURS, DASHES, INK, PAPER, STYLE, Drawing, look

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# What is written beside the page, without dates and versions: the same input gives the same bytes.
FILES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


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


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML; the first of a row is its heading. It scrolls inside its own box."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n' for row in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody>'
        "</table></div>"
    )


def cell(value: float, form: str | Callable[[float], str]) -> str:
    return "–" if math.isnan(value) else form(value) if callable(form) else format(value, form)


def arm_name(i: int, name: str) -> str:
    """The i-th arm's name after a piece of its line."""
    dashes = {"-": "", **{dash: " ".join(map(str, dash[1])) for dash in DASHES[1:]}}[look(i)["linestyle"]]
    return (
        '<span class="name"><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path d="M0 4H26" fill="none" stroke-width="2.5" '
        f'stroke="var(--arm-{i % len(COLOURS)})" stroke-dasharray="{dashes}"/></svg><span>{html.escape(name)}</span></span>'
    )


def figure(drawing: Drawing, folder: Path) -> str:
    links = ", ".join(
        f'<a href="{quote(os.fsencode(f"{folder.name}/{drawing.key}.{suffix}"))}">{suffix.upper()}</a>'
        for suffix in FILES
    )
    title, caption = html.escape(drawing.title), html.escape(drawing.caption)
    return f"<figure><h3>{title}</h3>\n{_inline(drawing)}\n<figcaption>{caption} <span>{links}</span></figcaption></figure>"


def write(title: str, make: Callable[[Path], tuple[str, Sequence[Drawing]]], output: str | Path) -> list[Path]:
    """Writes a page to `output` and its figures to a folder beside it, FILE-figures. make: gets that folder's path and returns
    the page's body and the drawings. Returns the files written, the page first. Raises UserError, also without matplotlib."""
    page = Path(output)
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
    shades = ["".join(f"--arm-{i}: {pair[n]}; " for i, pair in enumerate(COLOURS)) for n in (0, 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style.context(["default", STYLE]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # PNG and PDF have one font; the page has all
            body, drawings = make(folder)
            for drawing in drawings:
                for suffix, metadata in FILES.items():
                    written.append(folder / f"{drawing.key}.{suffix}")
                    drawing.figure.savefig(written[-1], metadata=metadata, facecolor="white")
        frame = string.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
        values = {"light": shades[0], "dark": shades[1], "version": __version__, "body": body}
        page.write_text(frame.substitute(title=html.escape(title), **values), encoding="utf-8")
    except OSError as error:
        raise UserError(
            "output-not-writable",
            f"{error.filename or page}: cannot be written ({error.strerror}); choose another --output",
        ) from None
    return written
