"""The table of a sweep, and the statistics that are read off it, against scipy and by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fastcpt import UserError
from fastcpt.results import COLUMNS, Results, above, equivalent, interval

ROWS = [
    # arm, seed, start, step, tokens, set, role, loss, bits_per_byte
    ("base", 0, "scratch", 0, 0, "a", "upstream", 5.0, 7.0),
    ("base", 0, "scratch", 9, 90, "a", "upstream", 2.0, 3.0),
    ("new", 0, "warm", 0, 0, "a", "upstream", 2.0, 3.0),
    ("new", 0, "warm", 0, 0, "b", "downstream", 4.0, 3.0),
    ("new", 0, "warm", 4, 40, "a", "upstream", 2.5, 3.0),
    ("new", 0, "warm", 4, 40, "b", "downstream", 3.0, 3.0),
    ("new", 0, "warm", 8, 80, "a", "upstream", 2.25, 3.0),
    ("new", 0, "warm", 8, 80, "b", "downstream", 2.5, 3.0),
    ("new", 1, "warm", 0, 0, "a", "upstream", 3.0, 3.0),
    ("new", 1, "warm", 0, 0, "b", "downstream", 5.0, 3.0),
    ("new", 1, "warm", 8, 80, "a", "upstream", 4.0, 3.0),
    ("new", 1, "warm", 8, 80, "b", "downstream", 3.0, 3.0),
]


def written(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in [COLUMNS, *rows]) + "\n")
    return path


def test_what_the_table_says(tmp_path: Path) -> None:
    table = Results.read(written(tmp_path / "results.csv"))
    assert table.arms == ["base", "new"] and table.scratch == {"base"}
    assert table.roles == {"a": "upstream", "b": "downstream"}
    assert table.seeds("new") == [0, 1] and table.seeds("new", "base") == [0] and table.seeds("base", name="b") == []
    assert table.final("new", 0, "a") == 2.25 and table.final("new", 0, "a", last=2) == 2.375
    assert table.within("new", 0, "a", 1, 8) == 2.375
    assert table.peak("new", 0, "a") == 0.5 and table.peak("base", 0, "a") == 0
    assert [(p.step, p.mean, p.low, p.high) for p in table.mean_curve("new", "a")] == [
        (0, 2.5, 2, 3),
        (8, 3.125, 2.25, 4),
    ]
    assert table.mean_plane("new") == [(0, 0), (0.625, 1.75)] and table.mean_plane("base") == []


@pytest.mark.parametrize(
    "content, id",
    [(None, "results-missing"), ("a,b\n1,2\n", "results-wrong"), (",".join(COLUMNS) + "\nx,y,z\n", "results-wrong")],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str | None, id: str) -> None:
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"results\.csv") as caught:
        Results.read(path)
    assert caught.value.id == id


@pytest.mark.parametrize("count", [2, 3, 5, 17])
def test_intervals_are_students(count: int) -> None:
    values = np.random.default_rng(count).normal(0.3, 1.7, count)
    for confidence in (0.9, 0.95):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        found = interval(values.tolist(), confidence)
        assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert math.isinf(interval([1.0]).half)


def test_equivalence_is_two_one_sided_tests() -> None:
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        values, delta = generator.normal(generator.normal(0, 0.01), 0.004, 4), 0.01
        p = max(stats.ttest_1samp(values, -delta, alternative="greater").pvalue,
                stats.ttest_1samp(values, delta, alternative="less").pvalue)  # fmt: skip
        assert equivalent(values.tolist(), delta) == (p < 0.05)
        outcomes.add(bool(p < 0.05))
    assert outcomes == {True, False}


def test_a_sign_wants_all_seeds_and_twice_the_standard_error() -> None:
    assert above([0.1, 0.11, 0.12]) and not above([-0.1, -0.11, -0.12])
    assert not above([0.1, 0.1, -0.001]) and not above([0.1]) and not above([0.0, 0.1, 0.1])
    values = [0.01, 0.01, 1.0]  # mean 0.34, standard error 0.33
    assert not above(values) and values == sorted(values)
