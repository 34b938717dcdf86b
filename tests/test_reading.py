"""The numbers of a report's reading, by hand."""

import math
from typing import Any

import pytest

from fastcpt import reading
from fastcpt.arms import Arm
from fastcpt.reading import Peak


def test_interpolation_stays_within_the_curve() -> None:
    curve = [(0.0, 4.0), (10.0, 5.0), (30.0, 4.0)]
    assert [reading.at(curve, tokens) for tokens in (0, 5, 10, 15, 30)] == [4, 4.5, 5, 4.75, 4]
    assert all(math.isnan(reading.at(curve, tokens)) for tokens in (-1, 31))
    assert (
        reading.at([(3.0, 2.0)], 3) == 2 and math.isnan(reading.at([(3.0, 2.0)], 4)) and math.isnan(reading.at([], 0))
    )


def test_the_difference_at_equal_tokens() -> None:
    control = [(0.0, 4.0), (20.0, 3.0)]
    assert reading.against([(0.0, 4.0), (5.0, 4.25), (10.0, 4.0), (20.0, 3.5), (25.0, 3.0)], control) == [
        (0, 0), (5, 0.5), (10, 0.5), (20, 0.5)
    ]  # fmt: skip
    assert reading.against([(30.0, 1.0)], control) == []


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        ([(0, 2.0), (10, 2.5), (20, 2.25), (30, 1.75)], Peak(0.5, 10, 25)),  # half of the last stretch is above
        ([(0, 2.0), (10, 2.5), (20, 2.25)], Peak(0.5, 10, None)),
        ([(0, 2.0), (10, 1.5), (20, 2.5), (30, 1.5), (40, 3.0)], Peak(1.0, 40, None)),  # the higher peak counts
        ([(0, 2.0), (10, 2.5), (20, 2.0), (30, 2.5)], Peak(0.5, 10, 20)),  # of equals the first
        ([(0, 2.0), (10, 1.5), (20, 2.0)], Peak(0.0, 0, 0)),
        ([(5, 2.0)], Peak(0.0, 5, 5)),
    ],
)
def test_peak_and_recovery(curve: Any, found: Peak) -> None:
    assert reading.peak(curve) == found


def test_the_mean_is_by_tokens_not_by_evaluations() -> None:
    """Five evaluations in the first tenth weigh a tenth: (0.1 * 1 + 0.9 * 0) plus the stretch between, 0.1 * 0.5."""
    curve = [(0, 1.0), (2, 1.0), (5, 1.0), (7, 1.0), (10, 1.0), (20, 0.0), (100, 0.0)]
    assert reading.mean(curve) == pytest.approx(0.15)
    assert (
        reading.mean([(0, 0.0), (4, 2.0)]) == 1
        and math.isnan(reading.mean([(3, 1.0)]))
        and math.isnan(reading.mean([]))
    )


def arm(*rows: tuple[int, float | None, float | None, float], first: int = 0, **config: Any) -> Arm:
    """Rows of (tokens, loss of pile, of books, of code); the first two are upstream."""
    evaluations = [
        {
            "step": first + tokens, "tokens": first + tokens,
            "eval": {
                name: {"loss": loss, "role": "downstream" if name == "code" else "upstream"}
                for name, loss in zip(("pile", "books", "code"), losses)
            },
            "forgetting": None if None in losses else (losses[0] + losses[1] - rows[0][1] - rows[0][2]) / 2,  # type: ignore[operator]
        }
        for tokens, *losses in rows
    ]  # fmt: skip
    return Arm("x", None, config, None, [], evaluations, None)  # type: ignore[arg-type]


def test_forgetting_against_a_control() -> None:
    """The mean of both upstream sets; the control is a branch, whose tokens count from its own start."""
    run = arm((0, 2.0, 4.0, 9.0), (10, 2.5, 4.5, 8.0), (20, 2.5, None, 7.0), (30, 2.5, 4.0, 6.0), (40, 1.0, 1.0, 1.0))
    control = arm((0, 2.0, 4.0, 9.0), (20, 1.5, 3.5, 9.0), (30, 1.5, 3.0, 9.0), first=1000)
    assert reading.losses(run, ["pile", "books"]) == [(0, 3), (10, 3.5), (30, 3.25), (40, 1)]
    assert reading.changes(run, "forgetting") == [(0, 0), (10, 0.5), (30, 0.25), (40, -2)]
    assert reading.forgetting(run, control) == [(0, 0), (10, 3.5 - 2.75), (30, 1)]
    del control.evaluations[-1]["eval"]["books"]
    assert reading.upstream(control) == ["pile"]
    assert reading.forgetting(run, control) == [(0, 0), (10, 0.75), (20, 1), (30, 1)], "of the sets that both have"
    assert reading.forgetting(run, arm()) == [] == reading.losses(run, [])


def test_a_control_differs_in_its_text_alone() -> None:
    def config(lr: float, **more: Any) -> dict[str, Any]:
        train = [{"name": "a", "path": "a", "weight": lr}]
        return {"optim": {"lr": lr}, "data": {"seq_len": 16, "train": train, **more}, "run": {"output": str(lr)}}

    assert reading.unlike(arm(**config(1.0)), arm(**config(1.0))) == []
    assert reading.unlike(arm(**config(1.0)), arm(**config(2.0, seq_len=32))) == ["optim.lr", "data.seq_len"]
