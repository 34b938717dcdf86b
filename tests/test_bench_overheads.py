"""`fastcpt bench overheads` at a tiny size, and its arithmetic on times that are known."""

import csv
from pathlib import Path

import pytest

from fastcpt.benchmarks import bench_overheads
from fastcpt.benchmarks.bench_overheads import Case, Spans, looping, starting

TINY = Case(
    "tiny",
    ("--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--model.vocab_size", "64",
     "--train.compile", "false", "--run.tensorboard", "false"),
    regional=(), vocab_size=64, seq_len=16, batch=2, steps=8, log_every=2, eval_sequences=4,
)  # fmt: skip


def test_the_real_loop_is_timed_part_by_part(tmp_path: Path) -> None:
    bench_overheads.main(tmp_path / "results", TINY)
    with open(tmp_path / "results" / "overheads.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["what"], row["case"]): float(row["value"]) for row in rows}
    assert len(found) == len(rows) and all(value >= 0 for value in found.values())
    for start in (
        f"{how}{when}" for how in ("", "block by block: ") for when in ("nothing compiled before", "compiled before")
    ):
        parts = [
            v for (what, case), v in found.items() if what == "command to first step" and case.startswith(f"{start}, ")
        ]
        assert len(parts) == 6 and 0 < sum(parts) <= found["command to first step", start]
    shares = {case: v for (what, case), v in found.items() if what == "share of a step outside the model"}
    assert shares.pop("tiny, all") == pytest.approx(sum(shares.values()), rel=1e-3) and len(shares) == 4


def steps_of(seconds: float, count: int) -> Spans:
    """Steps of 90% forward, backward and update, 2% norm, 1% data; before the last an evaluation and a checkpoint, and the
    last takes 3 s longer."""
    names = ("step", "forward", "backward", "update", "norm", "data", "evaluation", "snapshot")
    spans: Spans = {name: [] for name in names}
    now = 10.0
    for number in range(count):
        spans["data"].append((now, 0.01 * seconds))
        spans["step"].append((now + 0.01 * seconds, 0.95 * seconds))
        for name, share in (("forward", 0.3), ("backward", 0.5), ("norm", 0.02), ("update", 0.1)):
            spans[name].append((now + 0.02 * seconds, share * seconds))
        now += seconds
        if number == count - 2:
            spans["evaluation"].append((now - 0.01 * seconds, 4.0))
            spans["forward"].append((now, 3.5))
            spans["snapshot"].append((now + 4.0, 1.0))
            now += 5.0
    spans["step"][-1] = (spans["step"][-1][0], 0.95 * seconds + 3.0)
    return spans


def test_shares_are_of_the_loop_without_what_it_stands_still_for() -> None:
    case = Case("case", seq_len=100, batch=4, log_every=3, eval_sequences=8)
    found = {(row.what, row.case): row.value for row in looping(case, steps_of(2.0, 12))}
    outside = {case: value for (what, case), value in found.items() if what.startswith("share")}
    assert outside == {
        "case, all": pytest.approx(10.0 + 0.05), "case, waiting for data": pytest.approx(1.0),
        "case, norm for clipping": pytest.approx(2.0), "case, log and all else": pytest.approx(7.0),
        "case, snapshot every 1,000 steps": pytest.approx(0.05),
    }  # fmt: skip
    assert found["step", "case"] == pytest.approx(2.0)
    assert found["checkpoint, the loop stands still", "case"] == 1.0
    assert found["checkpoint, steps beside its writing take longer, in all", "case"] == pytest.approx(3.0)
    # 800 tokens in 4 s are as fast as 400 in 2 s.
    assert found["evaluation", "case, tokens a second to those of training"] == pytest.approx(1.0)


def test_the_first_step_counts_from_the_command() -> None:
    spans: Spans = {name: [(0.0, 1.0)] for name in ("interpreter", "imports", "configuration", "setup", "loggers")}
    rows = starting("cold", spans | {"step": [(7.0, 2.5), (9.5, 1.0)]})
    assert (rows[0].value, rows[-1].value) == (9.5, 2.5)


def test_a_run_that_fails_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ended with code 2:\n(.|\n)*manifest"):
        bench_overheads.run(TINY, tmp_path, "run", tmp_path / "cache", 1)
