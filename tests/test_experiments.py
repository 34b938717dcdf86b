"""The experiments: a short run of a part of their grid, and the page of claims, which the committed table makes again."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcpt import demo, grid, sweep
from fastcpt.data_prep.pretokenize import prep
from fastcpt.results import Point, Results

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "experiments"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    import claims_page

    yield claims_page
    sys.path.remove(str(FOLDER))


def test_the_page_is_what_the_table_makes(page: Any) -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render()


def test_every_claim_has_three_seeds(page: Any) -> None:
    table = Results.read(page.TABLE)
    planned = yaml.safe_load((FOLDER / "grid.yaml").read_text())
    assert set(grid.expanded(FOLDER / "grid.yaml", planned["arms"])) == set(table.arms)
    assert all(table.seeds(arm) == planned["seeds"] == [0, 1, 2] for arm in table.arms)


def test_a_part_of_the_grid_runs_on_other_text(tmp_path: Path, monkeypatch: Any) -> None:
    """Replay forgets less than none, with the sizes of the grid's models and a fraction of their steps."""
    import corpus

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    corpus.byte_tokenizer(Path("tokenizer.json"))
    for name, documents in zip("ab", demo.texts(600_000)):
        demo.write_jsonl(Path(f"{name}.jsonl"), documents)
        prep([f"{name}.jsonl"], tokenizer="tokenizer.json", output=Path("shards") / name, val_fraction=0.1, workers=1)
    whole = yaml.safe_load((FOLDER / "grid.yaml").read_text())
    whole["base"]["train"]["compile"] = False
    part = {
        "output": "sweep", "seeds": [0], "base": whole["base"], "set": {"train.tokens": 100 * 2048, "run.eval_tokens": 16_384},
        "arms": {
            "base": {"set": {"train.tokens": 200 * 2048}},
            "ab": {"set": whole["arms"]["ab"]["set"]},
            "weak": {"set": whole["arms"]["weak"]["set"], "grid": {"data.train": {"25%": whole["arms"]["weak"]["grid"]["data.train"]["25%"]}}},
        },
    }  # fmt: skip
    Path("part.yaml").write_text(yaml.safe_dump(part))
    assert sweep.run("part.yaml", 1, None, False) == 0
    table = Results.read("sweep/results.csv")
    start, plain, replay = (table.final(arm, 0, "a") for arm in ("base", "ab", "weak-25%"))
    assert plain - replay > 0.3 * (plain - start) > 0
    assert table.final("ab", 0, "b") < table.curve("ab", 0, "b")[0].loss


def curve(*losses: float) -> list[Point]:
    return [Point(step, step * 2048, loss, 0.0) for step, loss in zip((0, 160, 800), losses)]


def test_verdicts(page: Any) -> None:
    """R10, whose arms are few: reproduced where every difference holds, not where one is reversed, else undecided."""
    from claims import ONE, Judge

    def verdict(late: list[float]) -> str:
        curves = {}
        for seed in range(3):
            for name in "ab":
                for arm, loss in ((ONE, late[seed]), ("early-19%", 2.0), ("early-7%", 3.0 + seed / 10)):
                    curves[arm, seed, name] = curve(2.0, 2.0, loss)
        return Judge(Results(curves, {}, set())).r10().verdict

    assert verdict([1.0, 1.1, 1.2]) == "reproduced"
    assert verdict([2.3, 2.4, 2.5]) == "not reproduced"
    assert verdict([1.0, 1.1, 2.2]) == "undecided at this size"


def test_r6_is_of_bits(page: Any) -> None:
    measured = json.loads(page.RESUME.read_text())
    assert page.resume(measured).verdict == "reproduced"
    measured["exact"]["weights and moments"] = False
    assert page.resume(measured).verdict == "not reproduced"


def test_the_papers_arms_are_runs_of_its_preset(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = {job.arm: job.config for job in grid.read(FOLDER / "rewarm-2308.yaml").jobs}
    peaks = {arm: config.optim.lr for arm, config in found.items() if arm.startswith("peak")}
    assert peaks == {"peak-1.5e-4": 1.5e-4, "peak-3.0e-4": 3e-4, "peak-6.0e-4": 6e-4}
    assert {config.schedule.warmup for arm, config in found.items() if arm.startswith(("peak-3", "warmup"))} == {0, 0.005, 0.01, 0.02}  # fmt: skip
    assert all(config.train.tokens == 131_296 * 2_260_992 for config in found.values()) and len(found) == 12
