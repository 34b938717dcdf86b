"""Alarms: silent about the rise that re-warming costs, not about one that comes later; the same after a restart."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastcpt import train
from fastcpt.alarms import SMOOTH, Alarms
from fastcpt.config import Count, Source, ValidationSet
from fastcpt.metrics import JsonLines, console_line
from fastcpt.schedules import Plan

PLAN = Plan("cosine", 0, 100, 2, 1e-3, 0.1)  # quiet until step 2 + 5


def evaluation(step: int, loss: float | None, role: str = "upstream") -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "eval": {"pile": {"loss": loss, "role": role}}}


def training(step: int, **losses: float | None) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 1.0, "loss_by_source": losses}


def heard(lines: Sequence[dict[str, Any]], plan: Plan = PLAN) -> list[tuple[int, str]]:
    alarms = Alarms(plan)
    return [(event["step"], event["event"]["text"]) for line in lines for event in alarms.see(line)]


def test_the_rise_of_rewarming_is_no_alarm_and_a_later_one_is() -> None:
    """Up by 0.9 in the quiet, back, down to 2.1; then 0.19 and 0.21 above that, and 0.2 above the alarm's own level."""
    losses = [
        (0, 2.0),
        (3, 2.9),
        (7, 2.5),
        (8, 2.3),
        (20, 2.1),
        (30, 2.29),
        (40, 2.31),
        (50, 2.32),
        (60, 2.52),
        (70, 2.2),
    ]
    found = heard([evaluation(step, loss) for step, loss in losses])
    assert found == [
        (
            40,
            "upstream loss of pile rose to 2.3100, 0.21 above its lowest since step 7, when what re-warming costs was over",
        ),
        (
            60,
            "upstream loss of pile rose to 2.5200, 0.21 above its lowest since step 7, when what re-warming costs was over",
        ),
    ]
    assert heard([evaluation(step, loss, "downstream") for step, loss in losses]) == []
    later = Plan("cosine", 1000, 100, 2, 1e-3, 0.1)
    assert (
        Alarms(later).quiet_until(1001) == 1007
        and heard([evaluation(step, loss) for step, loss in losses], later) == []
    )


def test_a_phase_that_rewarms_is_quiet_again() -> None:
    """From step 50 on a schedule of its own, with a warm-up of 4 steps: quiet until 59, and then held against itself."""
    plan = Plan("constant", 0, 100, 0, 1e-3, 0.1, later=(Plan("cosine", 50, 50, 4, 2e-3, 0.1),))
    losses = [(0, 2.0), (20, 1.9), (50, 2.0), (51, 2.9), (55, 3.01), (59, 2.8), (60, 2.4), (70, 2.55), (80, 2.61)]
    found = heard([evaluation(step, loss) for step, loss in losses], plan)
    assert [step for step, _ in found] == [55, 80] and "above its 2.0000 at the start" in found[0][1]


def test_far_above_the_start_is_one_at_any_time() -> None:
    found = heard([evaluation(0, 2.0), evaluation(2, 3.0), evaluation(3, 3.01), evaluation(4, 3.5), evaluation(5, 2.9), evaluation(6, 3.1)])  # fmt: skip
    assert [step for step, _ in found] == [3, 6], "once until it is back"
    assert found[0][1] == "upstream loss of pile is 3.0100, more than 1 nat above its 2.0000 at the start"


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_what_is_not_finite_is_one_at_any_time(loss: float | None) -> None:
    for step in (1, 50):
        assert heard([evaluation(0, 2.0), evaluation(step, loss)]) == [(step, "upstream loss of pile is not finite")]


def test_training_losses_are_smoothed_and_told_by_source() -> None:
    """One line of five that is 0.9 higher lifts the mean by 0.18; a source that begins late begins at its own level."""
    steady = [training(step, new=2.0) for step in range(10, 20)]
    assert heard([*steady, training(20, new=2.9), *(training(step, new=2.0) for step in range(21, 40))]) == []
    assert [step for step, _ in heard([*steady, *(training(step, new=2.3) for step in range(20, 40))])] == [23], (
        "4 of 5 lines 0.3 higher"
    )
    late = [*steady, *(training(step, new=2.0, other=4.0) for step in range(20, 40))]
    assert heard(late) == [] and SMOOTH == 5


def test_the_log_alone_tells(tmp_path: Path) -> None:
    """Cut anywhere and read again, the rest is as it was; what an evaluation gave rise to is cut off with it."""
    lines = [
        each
        for step in range(40)
        for each in (training(step, new=2 + step % 7 / 3), evaluation(step, None if step == 9 else 2 + step % 11 / 9))
    ]
    whole = Alarms(PLAN)
    expected = [[line, *whole.see(line)] for line in lines]
    assert 4 < sum(map(len, expected)) - len(lines) < 30
    log = tmp_path / "metrics.jsonl"
    for cut in range(0, len(lines), 5):
        log.write_text("".join(json.dumps(each) + "\n" for group in expected[:cut] for each in group))
        alarms = Alarms(PLAN)
        alarms.read(log)
        assert [[line, *alarms.see(line)] for line in lines[cut:]] == expected[cut:]
    alarms = Alarms(PLAN)
    alarms.read(tmp_path / "none")
    assert not alarms.see(training(0, new=1.0))

    (step,) = {
        group[0]["step"] for group in expected if len(group) > 1 and "eval" in group[0] and group[0]["step"] == 9
    }
    before = [each for group in expected for each in group if each["step"] <= step]
    for evaluated in (True, False):
        log.write_text("".join(json.dumps(each) + "\n" for group in expected for each in group))
        JsonLines(log, step, evaluated).close()
        kept = [json.loads(line) for line in log.read_text().splitlines()]
        assert kept == (before if evaluated else [e for e in before if e["step"] < step or "loss" in e])


def test_a_run_tells_and_goes_on(
    tmp_path: Path, tiny_config: Callable, write_shards: Callable, random_documents: Callable, capsys: Any
) -> None:
    """A rate that wrecks the model: far above the start in the quiet. The console and the log say the same, and the run
    does not stop."""
    for seed, name in enumerate(("old", "new")):
        write_shards(tmp_path / name, random_documents(seed, 40))
    config = tiny_config(
        tmp_path / "run", optim={"lr": 3.0}, schedule={"warmup": 0.0},
        data={
            "train": [Source(name="new", path=str(tmp_path / "new"), weight=1)],
            "val": [ValidationSet(name="old", path=str(tmp_path / "old"), role="upstream")],
        },
        run={"eval_every": 1, "eval_tokens": Count(160)},
    )  # fmt: skip
    assert train.train(config).step == 5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "event" in line]
    assert told and "more than 1 nat above" in told[0]["event"]["text"] and told[0]["event"]["of"] == "evaluation"
    printed = capsys.readouterr().out
    for line in told:
        assert console_line(line, 5) in printed and "  alarm: upstream loss of old" in console_line(line, 5)
    again = Alarms(Plan("cosine", 0, 5, 0, 3.0, 0.1))
    assert [event for line in lines for event in again.see(line)] == told
