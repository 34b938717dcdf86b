"""Reports: what the figures and tables hold is what the runs' files say, and the page stands alone."""

import html.parser
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from fastcpt import UserError, arms, figures
from fastcpt.report import report

SVG = "{http://www.w3.org/2000/svg}"


def evaluation(
    step: int, up: float | None, down: float | None, start: tuple[float, float] = (4.0, 5.0)
) -> dict[str, Any]:
    """A line of metrics.jsonl; 100 tokens a step."""
    sets = {"pile": (up, "upstream"), "code": (down, "downstream")}
    results = {
        name: {"loss": loss, "bits_per_byte": (loss or 0) / 4, "tokens": 512, "role": role}
        for name, (loss, role) in sets.items()
    }
    changes = {"forgetting": (up or start[0]) - start[0], "adaptation": start[1] - (down or start[1])}
    return {"step": step, "tokens": 100 * step, "eval": results, **changes}


def training(step: int, loss: float | None, lr: float, rate: float, seconds: float, **more: Any) -> dict[str, Any]:
    line = {"step": step, "tokens": 100 * step, "loss": loss, "lr": lr, "grad_norm": 0.5, "skipped": 0, "mfu": 0.3,
            "tokens_per_second": rate, "seconds": seconds, "eta_seconds": 1.0, "peak_memory_bytes": 3 * 2**29}  # fmt: skip
    return line | more


# A run of 30 steps, as its file has it.
LINES = [
    evaluation(0, 4.0, 5.0),
    training(10, 4.5, 1e-3, 50.0, 20.0),
    evaluation(10, 4.3, 4.4),
    training(20, 4.1, 6e-4, 210.0, 25.0, peak_memory_bytes=2**31),
    evaluation(20, 4.25, 4.2),
    training(30, 3.9, 1e-4, 190.0, 90.0),
    evaluation(30, 4.2, 4.125),
]
PLAN = {"kind": "cosine", "first": 0, "steps": 30, "warmup": 3, "peak": 1e-3, "min_lr_ratio": 0.1}


@pytest.fixture
def write_run(tmp_path: Path, tiny_config: Callable[..., Any]) -> Callable[..., str]:
    return writer(tmp_path, tiny_config)


def writer(root: Path, tiny_config: Callable[..., Any]) -> Callable[..., str]:
    """write(name, lines, plan=PLAN or None for no checkpoint, tail="", **sections of the configuration) -> folder."""
    from fastcpt.config import Count, ValidationSet, to_dict

    def write(
        name: str, lines: list[dict[str, Any]] | None = None, plan: dict[str, Any] | None = PLAN, tail: str = "",
        **sections: Any,
    ) -> str:  # fmt: skip
        folder = root / name
        folder.mkdir(parents=True)
        val = [
            ValidationSet(name="pile", path="p", role="upstream"),
            ValidationSet(name="code", path="c", role="downstream"),
        ]
        values = to_dict(tiny_config(folder, data={"val": val}, train={"tokens": Count(2880)}))
        values["init"] |= {"from": "base/model"}
        for section, changes in sections.items():
            values[section] |= changes
        (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        text = "".join(json.dumps(line) + "\n" for line in (LINES if lines is None else lines))
        (folder / "metrics.jsonl").write_text(text + tail)
        if plan is not None:
            saved = folder / "checkpoints" / "step-30"
            saved.mkdir(parents=True)
            (saved / "state.json").write_text(json.dumps({"step": 30, "plan": plan, "config": values}))
        return str(folder)

    return write


def drawn(runs: list[str]) -> dict[str, figures.Drawing]:
    return {drawing.key: drawing for drawing in figures.draw(arms.read_arms(runs))}


def curves(drawing: figures.Drawing) -> list[tuple[list[float], list[float]]]:
    """The arms' lines of a figure, without marks and rules: those that a legend's line or a track is of."""
    lines = [line for line in drawing.figure.axes[0].lines if line.get_zorder() == 3]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in lines]


def marks(drawing: figures.Drawing, zorder: int) -> list[tuple[list[float], list[float]]]:
    lines = [line for line in drawing.figure.axes[0].lines if line.get_zorder() == zorder]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in lines]


class Page(html.parser.HTMLParser):
    """Tables as rows of text, every attribute, the text, and whether tags are balanced."""

    VOID = ("meta", "wbr", "br", "img", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
            if "th" in self._open or "td" in self._open:
                self.tables[-1][-1][-1] += data

    def figures(self) -> list[str]:
        return re.findall(r"<svg (?!class).*?</svg>", self.source, re.DOTALL)


def test_figures_hold_the_numbers_of_the_files(write_run: Callable[..., str]) -> None:
    """One line an arm, in the order given, each with looks of its own."""
    other = [training(15, 2.0, 5e-4, 400.0, 9.0), evaluation(15, 4.1, 4.9), evaluation(25, 4.05, 4.8)]
    found = drawn([write_run("first"), write_run("other", [evaluation(5, 4.0, 5.0), *other])])
    assert list(found) == [
        "plane",
        "validation-1-pile",
        "validation-2-code",
        "training-loss",
        "learning-rate",
        "throughput",
    ]
    assert curves(found["learning-rate"]) == [([1000, 2000, 3000], [1e-3, 6e-4, 1e-4]), ([1500], [5e-4])]
    assert curves(found["training-loss"]) == [([1000, 2000, 3000], [4.5, 4.1, 3.9]), ([1500], [2.0])]
    assert curves(found["throughput"]) == [([10, 20, 30], [50, 210, 190]), ([15], [400])]
    assert curves(found["validation-1-pile"]) == [
        ([0, 1000, 2000, 3000], [4.0, 4.3, 4.25, 4.2]), ([500, 1500, 2500], [4.0, 4.1, 4.05])
    ]  # fmt: skip
    assert curves(found["validation-2-code"])[0] == ([0, 1000, 2000, 3000], [5.0, 4.4, 4.2, 4.125])
    (x, y), (other_x, other_y) = curves(found["plane"])
    assert (x, y) == ([line["forgetting"] for line in LINES if "eval" in line], pytest.approx([0, 0.6, 0.8, 0.875]))
    assert (other_x, other_y) == (pytest.approx([0, 0.1, 0.05]), pytest.approx([0, 0.1, 0.2]))
    # Rings: the start of an evaluation curve, the interval with compilation. Large marks: the ends.
    assert marks(found["validation-1-pile"], 4) == [([0], [4.0]), ([500], [4.0])]
    assert marks(found["throughput"], 4) == [([10], [50]), ([15], [400])]
    assert marks(found["validation-1-pile"], 5) == [([3000], [4.2]), ([2500], [4.05])]
    assert marks(found["plane"], 5)[0] == ([pytest.approx(0.2)], [0.875])
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker()) for line in found["throughput"].figure.axes[0].lines
    }
    assert len({(color, marker) for color, style, marker in looks if style != "None"}) == 2
    legend = [text.get_text() for text in found["validation-1-pile"].figure.legends[0].get_texts()]
    assert legend == ["first  4.200", "other  4.050"]
    assert found["throughput"].figure.axes[0].get_ylim()[0] == 0 and "compilation" in found["throughput"].caption


def test_looks_do_not_rest_on_colour(write_run: Callable[..., str]) -> None:
    looks = [figures.look(i) for i in range(84)]
    assert len({str(look) for look in looks}) == 84
    for first, second in itertools.pairwise(looks):
        assert first["linestyle"] != second["linestyle"] and first["marker"] != second["marker"]


def test_the_plane_is_of_continued_arms(write_run: Callable[..., str]) -> None:
    """It says which corner is good, labels the ends, has the origin in view, and leaves out a random start."""
    scratch = [evaluation(0, 8.5, 8.4, (8.5, 8.4)), evaluation(30, 4.0, 5.0, (8.5, 8.4))]
    found = drawn([write_run("base", scratch, init={"from": "scratch"}), write_run("a"), write_run("young", LINES[:2])])
    axes, caption = found["plane"].figure.axes[0], found["plane"].caption
    assert len(curves(found["plane"])) == 1
    assert {text.get_text() for text in axes.texts} == {"a"} and axes.texts[0].xy == (LINES[-1]["forgetting"], 0.875)
    assert "random start: base." in caption and "Without two evaluations of both: young." in caption
    assert (
        axes.get_title(loc="left").startswith("↖ better")
        and "worse" in axes.get_xlabel()
        and "better" in axes.get_ylabel()
    )
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1] < 1 and axes.get_ylim()[0] < 0
    rules = [line for line in axes.lines if line.get_zorder() == 2]
    assert [0, 0] in [list(line.get_xdata()) for line in rules] and [0, 0] in [list(line.get_ydata()) for line in rules]
    assert "plane" not in drawn([write_run("alone", scratch, init={"from": "scratch"})])


def test_a_random_start_does_not_flatten_the_others(write_run: Callable[..., str]) -> None:
    """Every value of a continued arm and the end of one from scratch are on the scale; what is not is said."""
    scratch = [evaluation(0, 8.5, 8.4), evaluation(10, 5.0, 6.0), evaluation(20, 3.5, 5.2), evaluation(30, 3.4, 5.1)]
    base = write_run("base", scratch, init={"from": "scratch"})
    drawing = drawn([base, write_run("a")])["validation-1-pile"]
    low, high = drawing.figure.axes[0].get_ylim()
    assert low < 3.4 and 4.3 < high < 5
    assert "base at 8.500" in drawing.caption and "8.500" in drawing.figure.axes[0].get_title(loc="left")
    assert drawn([base])["validation-1-pile"].figure.axes[0].get_ylim()[1] > 8.5


def test_runs_of_different_lengths_share_an_axis(write_run: Callable[..., str]) -> None:
    short, long = write_run("short"), write_run("long", [evaluation(0, 4.0, 5.0), evaluation(300, 4.1, 4.0)])
    axes = drawn([short, long])["validation-1-pile"].figure.axes[0]
    assert axes.get_xscale() == "linear" and axes.get_xlim()[1] > 30_000
    longest = write_run("longest", [evaluation(0, 4.0, 5.0), evaluation(90_000, 4.1, 4.0)])
    drawing = drawn([short, longest])["validation-1-pile"]
    axes = drawing.figure.axes[0]
    ends = axes.transAxes.inverted().transform(axes.transData.transform([(3000, 4.2), (9_000_000, 4.1)]))
    assert axes.get_xscale() == "symlog" and "logarithmic" in drawing.caption
    assert 0.1 < ends[0][0] < ends[1][0] < 1


def test_labels_keep_clear_of_each_other() -> None:
    """Ends in a heap: labels lie apart, within the area, and each next to its end."""
    ends = [(100.0 + 3 * n, 90.0 + 2 * n) for n in range(6)]
    spots = figures.place(ends, [60.0] * 6, 14, ends, (320, 200))
    for n, (x, y) in enumerate(spots):
        assert 0 <= x <= 260 and 0 <= y <= 186 and math.dist((x + 30, y + 7), ends[n]) < 100
        for other_x, other_y in spots[:n]:
            assert abs(x - other_x) >= 60 or abs(y - other_y) >= 14 - 1e-9


def test_no_text_is_cut_or_covered(write_run: Callable[..., str]) -> None:
    """With long names and many arms, every text lies within its figure, the legend above the axes."""
    from matplotlib import style

    names = ["W" * 70, "_b", "c $x$ <&>", "dé", "e", "f" * 30, "m" * 20, "lr3e-4-replay05-warm0.01-a-very-long-name"]
    runs = [write_run(name, [*LINES[:-1], evaluation(30, 4.2 + n / 9, 4.1 - n / 50)]) for n, name in enumerate(names)]
    with style.context(["default", figures.STYLE]):
        for drawing in drawn(runs).values():
            figure = drawing.figure
            figure.draw_without_rendering()
            axes = figure.axes[0]
            texts = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            for legend in figure.legends:
                texts += legend.get_texts()
                assert legend.get_window_extent().y0 >= axes.get_window_extent().y1 - 1
                assert legend.get_texts()[1].get_text().startswith("_b")
            for text in texts:
                box = text.get_window_extent()
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
            assert axes.get_window_extent().height > 0.5 * figures.HEIGHT * figure.dpi


@pytest.fixture(scope="module")
def page(tiny_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of two runs whose names and settings are hostile, one from scratch."""
    root = tmp_path_factory.mktemp("page")
    write_run = writer(root, tiny_config)
    first = write_run('a<b>&"$1', optim={"lr": 3e-4}, model={"preset": "<script>alert(1)</script>"})
    second = write_run("base", [*LINES[:-1], {**LINES[-1], "forgetting": None}], init={"from": "scratch"})
    files = report([first, second], root / "out" / "r&d.html")
    assert [path.name for path in files[:3]] == ["r&d.html", "plane.png", "plane.pdf"]
    assert {path.parent.name for path in files[1:]} == {"r&d-figures"} and len(files) == 13
    return Page(files[0])


def test_the_page_stands_alone_and_its_svg_is_sound(page: Page) -> None:
    assert "script" not in page.tags and "b" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert not re.search(r"@import|url\((?!#)", page.source)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not value.startswith("#"):
            target = page.path.parent / value.replace("%26", "&")
            assert tag == "a" and target.is_file() and target.read_bytes()[:4] in (b"\x89PNG", b"%PDF")
    assert ("meta", "name", "viewport") in page.attributes and "prefers-color-scheme: dark" in page.source
    identities = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(identities)) == len(identities)
    assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", page.source)) <= set(identities)
    pictures = page.figures()
    assert len(pictures) == 6 and page.tags.count("figure") == page.tags.count("figcaption") == 6
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None and title.text and description is not None and description.text
        assert root.attrib["aria-labelledby"] == f"{title.attrib['id']} {description.attrib['id']}"
        assert root.attrib["role"] == "img" and "viewBox" in root.attrib and "width" not in root.attrib
        # Nothing has a colour of its own: axes and text are the page's ink, arms its variables.
        bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", picture)
        assert not re.findall("#[0-9a-f]{6}\\b(?!-)", bare) and "currentColor" in bare and "var(--arm-0" in picture
        sizes = [float(size) for size in re.findall(r"font-size: ([0-9.]+)px", picture)]
        width = float(root.attrib["viewBox"].split()[2])
        assert sizes and min(sizes) * 366 / width >= 10, "too small on a phone, 390 pixels wide"


def test_names_are_text_not_markup(page: Page) -> None:
    assert 'a<b>&"$1' in page.text and "<script>alert(1)</script>" in page.text
    labels = [text.text for picture in page.figures() for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert 'a<b>&"$1  4.200' in labels and 'a<b>&"$1' in labels


def test_the_tables_hold_the_final_figures_and_the_differences(page: Page) -> None:
    results, way, sets, differences = page.tables
    assert results[0][:7] == [
        "run",
        "steps",
        "tokens",
        "pileupstream loss",
        "bits/byte",
        "codedownstream loss",
        "bits/byte",
    ]
    assert results[0][7:] == ["forgetting", "adaptation", "tokens/smedian", "peak memory", "wall time"]
    same = ["30", "3,000", "4.2000", "1.0500", "4.1250", "1.0312"]
    speed = ["200", "2.00 GiB", "1m30s"]  # the median of 210 and 190: the interval of 50 compiled
    assert results[1] == ['a<b>&"$1', *same, "+0.2000", "+0.8750", *speed]
    assert results[2] == ["base", *same, "–*", "+0.8750*", *speed]
    # Forgetting 0, 0.3, 0.25, 0.2 at 0, 1000, 2000, 3000 tokens: its mean by trapezoids is (0.15 + 0.275 + 0.225) / 3.
    assert way[0] == ["run", "highest forgetting", "at tokens", "back at the start's lossafter tokens", "mean forgettingover the tokens", "mean adaptationover the tokens"]  # fmt: skip
    assert way[1] == ['a<b>&"$1', "+0.3000", "1K", "not within the run", "+0.2167", "+0.6125"]
    assert way[2] == ["base", *["–"] * 5]
    assert sets == [
        ["set", 'a<b>&"$1', "base"],
        ["pileupstream", "4.2000 (+0.2000)", "4.2000"],
        ["codedownstream", "4.1250 (-0.8750)", "4.1250"],
    ]
    assert differences == [
        ["setting", 'a<b>&"$1', "base"],
        ["model.preset", "<script>alert(1)</script>", "null"],
        ["init.from", "base/model", "scratch"],
        ["optim.lr", "0.0003", "0.001"],
    ]
    assert "Continues base/model; Adam's moments reset, data from its start." in page.text
    assert "From scratch. Schedule: cosine, 30 steps, 3 of warm-up, peak 0.001." in page.text


def sets_of(step: int, **losses: tuple[str, float]) -> dict[str, Any]:
    entries = {
        name: {"loss": loss, "bits_per_byte": 1.0, "tokens": 512, "role": role} for name, (role, loss) in losses.items()
    }
    return {"step": step, "tokens": 100 * step, "eval": entries, "forgetting": 0.5 if step else 0.0}


def test_sets_go_by_their_roles(write_run: Callable[..., str], tmp_path: Path) -> None:
    """The domains of a role together, and their mean, each counting the same; what an arm lacks is a dash."""
    lines = [
        sets_of(step, new=("downstream", 5.0 - change), books=("upstream", 3.0 + change), side=("other", 1.0), code=("upstream", 2.0 + 3 * change))
        for step, change in ((0, 0.0), (30, 0.25))
    ]  # fmt: skip
    run = write_run("a", lines)
    table = Page(report([run, write_run("b")], tmp_path / "r.html")[0]).tables[2]
    assert ["pileupstream", "–", "4.2000 (+0.2000)"] in table
    assert table[-1] == ["codeupstream/downstream", "2.7500 (+0.7500)", "4.1250 (-0.8750)"]
    alone = Page(report([run], tmp_path / "alone.html")[0]).tables[2]
    assert alone == [
        ["set", "a"],
        ["booksupstream", "3.2500 (+0.2500)"],
        ["codeupstream", "2.7500 (+0.7500)"],
        ["mean of 2upstream", "3.0000 (+0.5000)"],
        ["newdownstream", "4.7500 (-0.2500)"],
        ["sideother", "1.0000 (+0.0000)"],
    ]


def test_forgetting_is_held_against_a_control(write_run: Callable[..., str], tmp_path: Path) -> None:
    """The control's upstream loss goes from 4.0 straight to 3.6: the arm's 4.3, 4.25, 4.2 are 0.4333, 0.5167, 0.6 above."""
    control = write_run("control", [evaluation(0, 4.0, 5.0), evaluation(30, 3.6, 5.0)], optim={"lr": 0.5})
    run = write_run("a")
    for runs in ([run], [control, run]):
        files = report(runs, tmp_path / "r.html", control)
        page = Page(files[0])
        rows = {row[0]: row[-2:] for row in page.tables[1]}
        assert rows["run"] == ["against the controlat the end", "mean over the tokens"]
        assert rows["a"] == [
            "+0.6000",
            f"+{(0.4333333 / 2 + (0.4333333 + 0.5166667) / 2 + (0.5166667 + 0.6) / 2) / 3:.4f}",
        ]
        assert rows["control"] == ["–", "–"] and len(page.tables[0]) == 3
        assert "Control: control, which went on with upstream text." in page.text
        assert "a differs from the control in more than its text: optim.lr." in page.text
        assert (tmp_path / "r-figures" / "control.png") in files
    both = arms.read_arms([run, control])
    drawing = {each.key: each for each in figures.draw(both, both[1])}["control"]
    ((xs, ys),) = curves(drawing)
    assert xs == [0, 1000, 2000, 3000] and ys == pytest.approx([0, 0.4333333, 0.5166667, 0.6])
    assert "control" not in drawn([run, control])
    nothing = write_run("nothing", [line for line in LINES if "eval" not in line])
    with pytest.raises(UserError, match=r"nothing: no run has an upstream set in common with this control"):
        report([run], tmp_path / "r.html", nothing)
    with pytest.raises(UserError, match="in common"):
        report([run], tmp_path / "r.html", run)


def test_the_page_says_what_not_to_read_into_it(write_run: Callable[..., str], tmp_path: Path) -> None:
    young, done = write_run("young", LINES[:3], None), write_run("done")
    text = Page(report([young, done], tmp_path / "r.html")[0]).text
    assert "Before 45% of its schedule: young. Do not rank learning rates by it" in text and "figure 2" in text
    assert "rank" not in Page(report([done], tmp_path / "r.html")[0]).text
    assert "rank" not in Page(report([young], tmp_path / "r.html")[0]).text
    for limit in (
        "arXiv 2308.04014",
        "arXiv 2403.08763",
        "arXiv 2406.14833",
        "German",
        "410M",
        "Larger models want lower rates",
    ):
        assert limit in " ".join(text.split())


def test_alarms_and_pretraining_are_on_the_card(write_run: Callable[..., str]) -> None:
    alarm = {
        "step": 20,
        "tokens": 2000,
        "event": {"kind": "alarm", "of": "evaluation", "text": "upstream loss of pile rose"},
    }
    skip = {"step": 9, "tokens": 900, "event": {"kind": "spike", "samples": [1, 2], "not_finite": [], "ranks": []}}
    once, twice = write_run("once", [*LINES, skip, alarm]), write_run("twice", [*LINES, alarm, {**alarm, "step": 25}])
    path = Path(once) / "checkpoints" / "step-30" / "state.json"
    known = {"peak": 3e-4, "optimizer": "Adam", "told_by": "published"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"history": {"pretraining": known}}))
    one, two = arms.read_arms([once, twice])
    assert one.notes == ["an alarm at step 20: upstream loss of pile rose"]
    assert two.notes == ["2 alarms, the first at step 20: upstream loss of pile rose"]
    assert arms.origin(one).endswith(" Pre-trained by Adam at a peak rate of 0.0003 (published).")
    assert "re-trained by" not in arms.origin(two)


def test_settings_are_compared_by_name() -> None:
    config = {
        "data": {"train": [{"name": "b", "weight": 1}, {"name": "a", "weight": 2}], "val": []},
        "x": {"betas": [1, 2]},
    }
    assert arms.flat(config) == {
        "data.train": "b, a", "data.train.b.weight": 1, "data.train.a.weight": 2, "data.val": [], "x.betas": [1, 2]
    }  # fmt: skip


def test_where_an_arm_started(write_run: Callable[..., str]) -> None:
    branch = {"from": "runs/x", "branch": True}
    runs = [
        write_run("kept", init={"from": "runs/x", "optimizer": "keep"}),
        write_run("branch", [evaluation(70, 4.0, 5.0)], PLAN | {"first": 70}, init=branch),
        write_run("young", [evaluation(70, 4.0, 5.0)], None, init=branch),
        write_run("mute", [training(80, 4.0, 1e-3, 9.0, 1.0)], None, init=branch),
    ]
    kept, branched, young, mute = arms.read_arms(runs)
    assert arms.origin(kept).startswith("Continues runs/x; Adam's moments kept")
    assert arms.origin(branched).startswith("A branch of runs/x at step 70; moments and data position kept.")
    assert arms.origin(young) == "A branch of runs/x; moments and data position kept."
    # 2,880 tokens of 96 a step; a branch counts on from its checkpoint's step, told by its plan or first evaluation.
    assert (kept.planned, branched.planned, young.planned, mute.planned) == (30, 100, 100, None)


def test_what_is_wrong_with_a_run_is_said(write_run: Callable[..., str], tmp_path: Path) -> None:
    unfinished = write_run("unfinished", LINES[:-2], tail='{"step": 30, "tok')
    quiet = write_run("quiet", [line for line in LINES if "eval" not in line], None, data={"val": []})
    waiting = write_run("waiting", [LINES[1]])
    resumed = write_run("resumed", [
        training(10, 4.0, 1e-3, 50.0, 20.0), training(20, 4.0, 1e-3, 200.0, 30.0), training(25, 4.0, 1e-3, 60.0, 5.0, skipped=2),
        training(30, None, 1e-3, 220.0, 9.0, grad_norm=None, skipped=7), training(35, 0.0, 1e-3, 240.0, 12.0, skipped=12),
    ])  # fmt: skip
    damaged = write_run("damaged")
    (Path(damaged) / "checkpoints" / "step-30" / "state.json").write_text('{"plan":')
    young = write_run("young", LINES[:1])
    notes = {
        arm.name: " ".join(arm.notes) for arm in arms.read_arms([unfinished, quiet, waiting, resumed, damaged, young])
    }
    assert (
        notes["unfinished"]
        == "the last line of metrics.jsonl, line 6, is torn and left out unfinished: at step 20 of 30"
    )
    assert notes["quiet"] == "there is no checkpoint in its folder no validation sets"
    assert notes["waiting"] == "unfinished: at step 10 of 30 no evaluation yet"
    assert notes["resumed"].startswith("started 2 times") and "12 steps skipped" in notes["resumed"]
    assert notes["damaged"] == "step-30/state.json, of its newest checkpoint, cannot be read"
    assert notes["young"] == "unfinished: at step 0 of 30 no training line yet only one evaluation, at step 0"

    (arm,) = arms.read_arms([resumed])
    assert arm.starts == [0, 2] and arm.throughput == 220 and arm.seconds == 30 + 12
    xs, ys = curves(drawn([resumed])["training-loss"])[0]
    assert xs == [1000, 2000, 2500, 3000, 3500] and ys[:3] == [4, 4, 4] and all(map(math.isnan, ys[3:]))
    # What nobody has numbers for is no empty figure, and the page says so.
    text = Page(report([quiet], tmp_path / "quiet.html")[0]).text
    assert (
        "no run has the numbers: forgetting and adaptation, validation loss." in text and "No validation sets." in text
    )
    assert "There is one run alone." in text
    together = drawn([quiet, unfinished])["validation-1-pile"]
    assert "Without values: quiet." in together.caption and len(curves(together)) == 1


def test_one_evaluation_alone_is_a_page(write_run: Callable[..., str], tmp_path: Path) -> None:
    page = Page(report([write_run("young", LINES[:1])], tmp_path / "young.html")[0])
    assert page.tables[0][1] == [
        "young",
        "0",
        "0",
        "4.0000",
        "1.0000",
        "5.0000",
        "1.2500",
        "+0.0000",
        "+0.0000",
        "–",
        "–",
        "–",
    ]
    assert len(page.figures()) == 2


def test_levels_that_do_not_compare_are_named(write_run: Callable[..., str]) -> None:
    fewer = json.loads(json.dumps(LINES))
    for line in fewer:
        for entry in line.get("eval", {}).values():
            entry["tokens"] = 64
    assert "different tokens" in drawn([write_run("a"), write_run("b", fewer)])["validation-1-pile"].caption
    other = write_run("c")
    for run, print_ in ((write_run("d"), "x"), (other, "y")):
        path = Path(run) / "checkpoints" / "step-30" / "state.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"data": {"fingerprints": {"val": {"pile": print_}}}})
        )
    found = drawn([str(Path(other).with_name("d")), other])
    assert "different tokens" in found["validation-1-pile"].caption
    assert "different tokens" not in found["validation-2-code"].caption


def test_names_tell_runs_apart(write_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("x/run", "y/run", "solo", "p/q/z", "r/q/z", "a\x01b"):
        write_run(name)
    monkeypatch.chdir(tmp_path / "solo")
    runs = [".", *(str(tmp_path / name) for name in ("x/run/", "y/run", "p/q/z", "r/q/z", "a\x01b"))]
    assert [arm.name for arm in arms.read_arms(runs)] == ["solo", "x/run", "y/run", "p/q/z", "r/q/z", "a\ufffdb"]


def test_the_same_runs_give_the_same_bytes(write_run: Callable[..., str], tmp_path: Path) -> None:
    """PNG and PDF are such files, and nothing in any of them depends on when and where they were written."""
    run = write_run("a", [line for line in LINES if "eval" not in line])
    first, again = (report([run], tmp_path / folder / "r.html") for folder in ("one", "two"))
    assert [path.relative_to(tmp_path / "one") for path in first] == [
        path.relative_to(tmp_path / "two") for path in again
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    from PIL import Image

    for path in first[1:]:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert image.width > 1000 and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        else:
            content = path.read_bytes()
            assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF") and b"/MediaBox" in content


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "a: no run, it has no metrics.jsonl"),
        (lambda run: (run / "config.yaml").unlink(), "a: no run, it has no config.yaml"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl: no whole line in it"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "to'), "metrics.jsonl: no whole line in it"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1, "tokens": 1}\n'), "metrics.jsonl, line 1"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1, "tokens": 1}\n'), "metrics.jsonl, line 1"),
        (lambda run: (run / "config.yaml").write_text("[1"), "config.yaml: not a run's configuration"),
        (lambda run: (run / "config.yaml").write_text("train: {tokens: 1}"), "config.yaml: not a run's configuration"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_named(
    spoil: Callable[[Path], Any], said: str, write_run: Callable[..., str], tmp_path: Path
) -> None:
    good, bad = write_run("good"), write_run("a")
    spoil(Path(bad))
    with pytest.raises(UserError, match=re.escape(said)):
        report([good, bad], tmp_path / "r.html")
    assert not list(tmp_path.glob("r*"))


def test_other_mistakes_are_named(
    write_run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run("a")
    with pytest.raises(UserError, match="name at least one run"):
        report([], tmp_path / "r.html")
    with pytest.raises(UserError, match="nowhere: no run"):
        report([str(tmp_path / "nowhere")], tmp_path / "r.html")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="link: this run is given twice"):
        report([run, str(tmp_path / "link")], tmp_path / "r.html")
    with pytest.raises(UserError, match="a folder; name the page's file"):
        report([run], tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        report([run], Path(run) / "metrics.jsonl" / "r.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape("pip install 'fastcpt[report]'")):
        report([run], tmp_path / "r.html")


def test_importing_it_needs_neither_torch_nor_matplotlib() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None; import fastcpt.report; print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout == "imported\n", done.stderr
