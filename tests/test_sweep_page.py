"""The page of a sweep: what its tables say, that it is well-formed and the same for the same table, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from fastcpt import UserError, cli
from fastcpt.results import COLUMNS
from fastcpt.sweep_figures import plane
from fastcpt.sweep_page import sweep_report


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: Any) -> Path:
    """A sweep's file and its table: two arms after a base from scratch, of two seeds and two sets."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for seed in (0, 1):
        rows += [("base", seed, "scratch", step, step * 10, "old", "upstream", 6 - step / 2, 1.0) for step in (0, 8)]
        for arm, forgot in (("new-1", 0.1), ("new-2", 0.3)):
            for step in (0, 4, 8):
                losses = {"old": 2 + seed + forgot * step, "text & code": 4 + seed - step / 8}
                roles = {"old": "upstream", "text & code": "downstream"}
                rows += [(arm, seed, "warm", step, step * 10, name, roles[name], losses[name], 1.0) for name in losses]
    Path("out").mkdir()
    Path("out/results.csv").write_text("\n".join(",".join(map(str, row)) for row in [COLUMNS, *rows]) + "\n")
    arms: dict[str, Any] = {"base": {}, "new": {"grid": {"optim.lr": [1, 2]}}}
    content = {
        "output": "out",
        "arms": arms,
        "base": {},
        "figures": {"Rates <1>": ["new-2", "new-*"], "Base": ["base"]},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return Path("sweep.yaml")


def test_the_page_has_the_arms_of_each_figure(swept: Path) -> None:
    first, second = sweep_report(str(swept), "page.html"), sweep_report(str(swept), "again.html")
    page = first[0].read_text()
    assert "Rates &lt;1&gt;" in page and "<h2>Base</h2>" in page
    # new-2 is the first of its figure; new-1 ends 8 * (0.1 - 0.3) below it with each seed, so the interval is a point.
    assert "-1.6000<small>-1.6000 to -1.6000</small>" in page
    assert "4.9000<small>" in page  # mean of 2 + 2.4 and 3 + 2.4
    body = page[page.index("<body>") : page.index("</html>")]
    ElementTree.fromstring(body.replace("<small>", "<i>").replace("</small>", "</i>"))  # every element is closed
    assert page.replace("page-figures", "again-figures") == second[0].read_text()
    names = {path.stem for path in first[1:]}
    expected = {
        "rates-1-plane",
        "rates-1-old",
        "rates-1-ends-old",
        "rates-1-text-code",
        "rates-1-ends-text-code",
        "base-old",
    }
    assert names == expected and all(path.stat().st_size > 1000 for path in first)


@pytest.mark.parametrize(("count", "named", "keys"), [(4, 4, 0), (5, 0, 5)])
def test_the_plane_names_a_few_arms_at_their_ends_and_more_in_a_legend(count: int, named: int, keys: int) -> None:
    """Eight labels that began at one point lay on each other."""
    tracks = [(0.0, 0.0), (0.1, 0.2)]
    drawing = plane(SimpleNamespace(mean_plane=lambda arm: tracks), "T", [f"arm-{n}" for n in range(count)])  # type: ignore[arg-type]
    assert drawing is not None
    (axes,) = drawing.figure.axes
    assert len([text for text in axes.texts if text.get_text().startswith("arm-")]) == named
    assert sum(len(legend.get_texts()) for legend in drawing.figure.legends) == keys


def test_figures_are_arms_with_their_grids_unless_said(swept: Path) -> None:
    content = yaml.safe_load(swept.read_text())
    del content["figures"]
    swept.write_text(yaml.safe_dump(content, sort_keys=False))
    assert cli.main(["report", str(swept), "--output", "page.html"]) == 0
    assert "<h2>new</h2>" in (page := Path("page.html").read_text()) and "<h2>base</h2>" in page


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output": "elsewhere"}, "elsewhere/results.csv: there is no such table"),
        ({"figures": {"None": ["gone*"]}}, "figure None: no arm is gone*"),
        ({"figures": {"None": "base"}}, "figure None is 'base', not a list of arms"),
    ],
)
def test_what_cannot_be_drawn_is_refused(swept: Path, change: dict[str, Any], message: str) -> None:
    swept.write_text(yaml.safe_dump(yaml.safe_load(swept.read_text()) | change, sort_keys=False))
    with pytest.raises(UserError) as caught:
        sweep_report(str(swept), "page.html")
    assert message in str(caught.value) and not Path("page.html").exists()
