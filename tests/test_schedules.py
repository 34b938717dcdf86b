"""Learning rates against transformers' schedules and closed forms."""

import itertools
import math

import pytest
import torch
import transformers

from fastcpt import UserError
from fastcpt.schedules import Plan, warmup_steps

# Both sides take some ten float64 operations; the cosine's argument, at most pi, carries their error on.
RELATIVE = 1e-14
CASES = [(1, 0), (1, 1), (2, 1), (7, 0), (7, 3), (7, 6), (100, 1), (101, 17), (1000, 10)]


def their_rates(kind: str, steps: int, warmup: int, peak: float, ratio: float) -> list[float]:
    """transformers' factor at 0, 1, ..., steps. Its scheduler applies the factor of 0 to the first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler: torch.optim.lr_scheduler.LambdaLR
    if kind == "cosine":
        scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, min_lr_rate=ratio
        )
    else:
        scheduler = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), CASES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_rates_are_those_of_transformers_one_step_ahead(kind, steps: int, warmup: int, ratio: float) -> None:
    """Ours counts steps from 1 (as GPT-NeoX does since its PR 1379): the first step is not lost on a rate of 0, and
    the last has the rate where the schedule ends."""
    expected = their_rates(kind, steps, warmup, 3e-4, ratio)
    plan = Plan(kind, 0, steps, warmup, 3e-4, ratio)
    for step in range(1, steps + 1):
        assert plan.rate(step) == pytest.approx(expected[step], rel=RELATIVE, abs=RELATIVE * 3e-4)


@pytest.mark.parametrize(("steps", "warmup"), CASES)
def test_cosine_starts_above_zero_and_ends_at_its_minimum(steps: int, warmup: int) -> None:
    plan = Plan("cosine", 0, steps, warmup, 2e-3, 0.1)
    rates = [plan.rate(step) for step in range(1, steps + 1)]
    if warmup:
        assert rates[0] == 2e-3 / warmup and rates[warmup - 1] == 2e-3
        assert rates[:warmup] == pytest.approx([2e-3 * step / warmup for step in range(1, warmup + 1)], rel=RELATIVE)
    if warmup < steps:
        assert rates[-1] == pytest.approx(2e-4, rel=RELATIVE)
        falling = [2e-3, *rates[warmup:]]
        assert all(after < before for before, after in itertools.pairwise(falling))
        assert plan.rate(steps + 1) == plan.rate(3 * steps) == rates[-1], "it stays where it ended"


def test_cosine_is_half_way_at_half_time() -> None:
    plan = Plan("cosine", 0, 110, 10, 1.0, 0.2)
    assert plan.rate(60) == pytest.approx(0.6, rel=RELATIVE)
    assert plan.rate(35) == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)), rel=RELATIVE)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_a_branch_starts_at_the_rate_it_was_given(kind) -> None:
    whole = Plan("cosine", 0, 500, 20, 3e-4, 0.1)
    reached = whole.rate(300)
    branch = Plan(kind, 300, 80, 0, reached, 0.0)
    alone = Plan(kind, 0, 80, 0, reached, 0.0)
    assert branch.rate(300) == reached
    assert [branch.rate(300 + step) for step in range(1, 81)] == [alone.rate(step) for step in range(1, 81)]
    assert branch.rate(380) == (reached if kind == "constant" else pytest.approx(0.0, abs=RELATIVE * reached))


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0, 100, 0),
        (0.01, 100, 1),
        (0.01, 101, 2),
        (0.01, 1, 1),
        (0.07, 100, 7),  # 7.000000000000001 in floats
        (0.29, 100, 29),  # 28.999999999999996
        (0.999, 10, 10),
        (1, 100, 1),
        (250, 1000, 250),
        (0.01, 110_574, 1106),
    ],
)
def test_warmup_is_a_fraction_rounded_up_or_a_number(warmup: float, steps: int, expected: int) -> None:
    assert warmup_steps(warmup, steps) == expected


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup is 11 steps, but the run has 10; shorten the warm-up"):
        Plan("cosine", 0, 10, 11, 1e-3, 0.1)
    assert Plan("cosine", 0, 10, 10, 1e-3, 0.1).rate(10) == 1e-3


def test_a_plan_survives_a_checkpoint() -> None:
    plan = Plan("constant", 7, 10, 3, 1e-3, 0.1)
    assert Plan(**plan.to_dict()) == plan
