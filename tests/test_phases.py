"""Runs of several phases against brute force: the rates schedule by schedule, the windows one by one, and stopped runs."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fed_windows import BATCH, STEP, fed, logged, order_of, phase, runs, simulated, write_sets

from fastcpt import UserError, evaluation, metrics, plan, provenance, train
from fastcpt.config import Config, Count, Phase, Schedule, Source, ValidationSet
from fastcpt.phases import Span, lay_out
from fastcpt.schedules import Plan, drawing, make
from fastcpt.shards import ShardSet
from fastcpt.state import named_tensors


@pytest.fixture(scope="module")
def sets(tmp_path_factory: Any, write_shards: Callable, random_documents: Callable) -> dict[str, ShardSet]:
    return write_sets(tmp_path_factory.mktemp("sets"), write_shards, random_documents)


@pytest.fixture
def run(
    tmp_path: Path, tiny_config: Callable, sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    monkeypatch.setattr(metrics, "measured_matmul_rate", lambda *arguments, **options: 1e12)  # takes a while
    return runs(tmp_path, tiny_config, sets)


def rates(found: Plan) -> list[float]:
    return [found.rate(step) for step in range(found.first + 1, found.last + 1)]


def alone(kind: Any, steps: int, peak: float, **settings: Any) -> list[float]:
    return rates(make(Schedule(kind=kind, **settings), steps, 1, 0, peak, branch=True))


# Rates


def test_cosines_over_three_tasks_are_three_cosines(run: Callable) -> None:
    cosine = Schedule(kind="cosine", warmup=0.1)
    later = [phase(20, {"b": 1}, schedule=cosine, lr=5e-4), phase(30, {"c": 1}, schedule=cosine, lr=2e-4)]
    config = run(100, [phase(50), *later], schedule={"warmup": 0.1})
    found, spans = lay_out(config, 0, 1e-3)
    parts = ((50, 1e-3), (20, 5e-4), (30, 2e-4))
    assert rates(found) == [rate for steps, peak in parts for rate in alone("cosine", steps, peak, warmup=0.1)]
    assert spans == [Span(0, {"a": 1}), Span(50, {"b": 1}), Span(70, {"c": 1})]
    assert (
        found.describe().count("; after step ") == 2
        and drawing(found)[0] == "learning rate, cosine, then cosine, then cosine"
    )
    assert Plan(**json.loads(json.dumps(found.to_dict()))) == found and found.highest == 1e-3
    assert (found.first, found.last, found.length) == (0, 100, 50)
    assert [part.first for part in found.parts] == [0, 50, 70]


def test_a_schedule_without_a_peak_goes_on_from_the_rate_before(run: Callable) -> None:
    """Infinite, then its annealing on other text: one run, which does not jump; fractions are of each one's own steps."""
    anneal = Schedule(kind="anneal", warmup=0.0, min_lr_ratio=0.1 / 0.55)
    infinite = {"kind": "infinite", "warmup": 0.01, "cooldown": 0.6, "decay": 0}
    found, _ = lay_out(run(250, [phase(200), phase(50, {"b": 1}, schedule=anneal)], schedule=infinite), 0, 3e-4)
    reached = 3e-4 * 0.55
    first = rates(make(Schedule(**infinite), 200, 1, 0, 3e-4, branch=False))
    assert rates(found) == first + alone("anneal", 50, first[-1], warmup=0.0, min_lr_ratio=0.1 / 0.55)
    assert first[-1] == pytest.approx(reached) and found.rate(250) == pytest.approx(3e-5)


def test_phases_without_a_schedule_share_one(run: Callable) -> None:
    wsd = Schedule(kind="wsd", warmup=0.0)
    phases = [phase(10), phase(30, {"b": 1}), phase(20, {"a": 1}, schedule=wsd), phase(40, {"b": 1})]
    found, spans = lay_out(run(100, phases), 0, 1e-3)
    first = alone("cosine", 40, 1e-3)
    assert rates(found) == first + alone("wsd", 60, first[-1], warmup=0.0)
    assert [span.first for span in spans] == [0, 10, 40, 60]
    assert len(found.parts) == 2


def test_one_phase_is_a_run_without_phases(run: Callable) -> None:
    plain = run(33, [], data={"train": [Source(name="a", path="a", weight=2.0)]})
    assert lay_out(run(33, [phase()]), 0, 1e-3)[0] == lay_out(plain, 0, 1e-3)[0] == Plan("cosine", 0, 33, 1, 1e-3, 0.1)
    assert lay_out(plain, 0, 1e-3)[1] == [Span(0, {"a": 2.0})]


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2, 0.12])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "infinite"])
def test_a_phase_until_the_rate_falls(run: Callable, kind: Any, fraction: float) -> None:
    """Against a search step by step, after the warm-up of 10; the phases around it keep their lengths."""
    phases = [phase(7), phase(weights={"b": 1}, until_lr=fraction), phase(2, {"c": 1}), phase(weights={"a": 1})]
    found, spans = lay_out(run(1000, phases, schedule={"kind": kind}), 0, 1e-3)
    above = [step for step in range(1, 1001) if step > 10 and found.rate(step) > fraction * 1e-3]
    assert above == list(range(11, above[-1] + 1)) and found.rate(above[-1] + 1) <= fraction * 1e-3
    assert [span.first for span in spans] == [0, 7, above[-1], above[-1] + 2]
    assert found == lay_out(run(1000, [phase()], schedule={"kind": kind}), 0, 1e-3)[0], "the mixture changes no rate"


@pytest.mark.parametrize("parts", [[33.5, 33.25, 33.25], [0.5, 1.5, 98], [10.25] * 3 + [69.25], [7.75] * 4 + [69]])
def test_phases_end_at_the_nearest_steps(run: Callable, parts: list[float]) -> None:
    found, spans = lay_out(run(100, [phase(part, {"abc"[i % 3]: 1}) for i, part in enumerate(parts)]), 0, 1e-3)
    ends = [sum(int(part * STEP) for part in parts[:count]) / STEP for count in range(len(parts))]
    assert [abs(span.first - end) <= 0.5 for span, end in zip(spans, ends, strict=True)] == [True] * len(parts)
    assert found.steps == 100


WSD = Schedule(kind="wsd", warmup=0.0)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([phase(10), phase(89)], r"data.phases are 3,168 tokens, train.tokens 3,200; make them the same"),
        ([phase(10), Phase()], r"phase 2: no weights, and in data.train a has none either"),
        ([phase(10, until_lr=0.5), phase()], r"phase 1: tokens and until_lr: both say where it ends"),
        ([phase(10), phase(), phase()], r"phase 2: tokens are missing; only the last phase takes the rest"),
        ([phase(0.4), phase()], r"phase 1: shorter than a step of 32 tokens"),
        ([phase(60), phase(60), phase()], r"phase 3: the phases before it take all of train.tokens 3,200"),
        ([phase(until_lr=0.5), phase(10)], r"phase 2: how much is left is not known before until_lr; remove its tokens"),
        ([phase(until_lr=0.5)], r"phase 1: until_lr 0.5 must be from 0 to 1, and neither the last phase"),
        ([phase(until_lr=0.5), phase(schedule=WSD)], r"phase 1: until_lr 0.5 must be .* a later one with a schedule"),
        ([phase(until_lr=1.5), phase()], r"phase 1: until_lr 1.5 must be from 0 to 1"),
        ([phase(until_lr=0.05), phase()], r"phase 1: until_lr 0.05: the rate falls from 0.001 to 0.0001 only"),
        ([phase(schedule=WSD)], r"phase 1: the first has the run's schedule: write it in schedule and optim.lr"),
        ([phase(9, lr=1e-3), phase()], r"phase 1: the first has the run's schedule"),
        ([phase(9), phase(lr=1e-3)], r"phase 2: lr 0.001: the peak, above 0, of a schedule; give that too"),
        ([phase(9), phase(lr=0.0, schedule=WSD)], r"phase 2: lr 0.0: the peak, above 0"),
        ([phase(9), phase(schedule=Schedule())], r"phase 2: schedule.warmup 0.01: without lr it starts at the rate before"),
        ([phase(9), phase(schedule=Schedule(warmup=0, decay=3))], r"phase 2: schedule.decay is 3, which kind cosine does"),
        ([phase(9), phase(lr=1.0, schedule=Schedule(warmup=99))], r"phase 2: schedule.warmup is 99 steps, but .* 91"),
        ([phase(9, {"a": 1, "d": 1}), phase()], r"phase 1: weights: there is no source 'd'; data.train has \['a'\]"),
        ([phase(9, {"a": -1.0}), phase()], r"phase 1: weights: a: -1.0 is not a number from 0 on"),
        ([phase(9, {"a": 0.0}), phase()], r"phase 1: weights: no source has any"),
        ([phase(9, {"a": 1, "b": 0}), phase()], r"data.phases: no phase reads b; remove it from data.train"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_are_refused(run: Callable, phases: list[Phase], message: str) -> None:
    config = run(100, [phase for phase in phases if "d" not in (phase.weights or {})])
    with pytest.raises(UserError, match=message):
        lay_out(replace(config, data=replace(config.data, phases=phases)), 0, 1e-3)


def test_a_rate_that_ended_at_0_cannot_go_on(run: Callable) -> None:
    config = run(20, [phase(10), phase(schedule=WSD)], schedule={"min_lr_ratio": 0.0})
    with pytest.raises(UserError, match=r"phase 2: the rate before ended at 0, and it would stay there; give lr"):
        lay_out(config, 0, 1e-3)


# Windows

SWITCHES = [
    phase(3, {"a": 3, "b": 1}),
    phase(4, {"b": 3, "a": 1}),
    phase(2, {"b": 1, "c": 0}),
    phase(5, {"a": 4, "c": 1}),
]


def test_a_switch_is_exact_to_the_sample_and_a_run_stopped_anywhere_goes_on(
    run: Callable, sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before, at and after switches: the windows of a simulation, the rates of the plan, and the same bits."""
    phases = [
        replace(each, **more)
        for each, more in zip(SWITCHES, ({}, {"schedule": WSD, "lr": 5e-4}, {}, {"schedule": WSD}))
    ]
    settings: dict[str, Any] = {"init": {"force": True}, "schedule": {"warmup": 1}}
    whole = run(14, phases, "whole", **settings)
    given = fed(whole, monkeypatch)
    expected = {name: tensor.clone() for name, tensor in named_tensors(train.setup(whole)).items()}
    assert given == simulated(SWITCHES, {name: order_of(sets, name, 0) for name in sets})
    rate = [*alone("cosine", 3, 1e-3, warmup=1.0), *alone("wsd", 6, 5e-4, warmup=0.0)]
    assert logged(whole, "lr") == rate + alone("wsd", 5, rate[-1], warmup=0.0)

    class Stopped(Exception):
        pass

    parts, save = run(14, phases, "parts", **settings), train.save

    def stopping(state: train.State) -> Any:
        save(state)
        if state.step in stops:
            state.saver.wait()
            raise Stopped

    stops = (2, 3, 4, 7, 9, 13)
    monkeypatch.setattr(train, "save", stopping)
    for _ in stops:
        with pytest.raises(Stopped):
            train.train(parts)
    monkeypatch.setattr(train, "save", save)
    state = train.train(parts)
    for key in ("lr", "loss", "loss_by_source"):
        assert logged(parts, key) == logged(whole, key)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in named_tensors(state).items())
    for step in (1, 3, 4, 9, 10, 14):  # a step's samples are found in its own phase, from any checkpoint
        found = provenance.locate(whole.run.output, step)
        assert [(sample.source, sample.window) for sample in found.samples] == given[(step - 1) * BATCH : step * BATCH]


def test_a_branch_keeps_the_phases_that_had_begun(
    run: Callable, sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(14, SWITCHES, "whole")
    before = fed(whole, monkeypatch)
    start = {"from_": f"{whole.run.output}/checkpoints/step-5", "branch": True}
    weights = [{"a": 2, "c": 1}, {"b": 1, "c": 2}]
    phases = [phase(3, each) for each in weights]
    branch = run(6, phases, "branch", init=start, optim={"lr": None}, schedule={"warmup": 0})
    after = fed(branch, monkeypatch)
    state = train.setup(branch)
    assert [each.first for each in state.mixture.phases] == [0, 6, 10, 16]
    cut = [SWITCHES[0], replace(SWITCHES[1], tokens=Count(2 * STEP))]
    assert before[:10] + after == simulated(cut + phases, {name: order_of(sets, name, 0) for name in sets})
    for step in (6, 8, 9, 11):
        found = [(sample.source, sample.window) for sample in provenance.locate(branch.run.output, step).samples]
        assert found == after[(step - 6) * BATCH : (step - 5) * BATCH]


def test_a_plan_shows_each_phase_and_counts_what_the_loop_does(run: Callable, sets: dict[str, ShardSet]) -> None:
    """The lines of the phases, the samples of each source, and the evaluations, of which a new warm-up has more."""
    warm = Schedule(kind="cosine", warmup=9)
    phases = [phase(30, {"a": 3, "b": 1}), phase(20, {"c": 1}), phase(50, {"c": 1, "b": 3}, schedule=warm, lr=1e-3)]
    val = [ValidationSet(name="v", path=str(sets["a"].path))]
    config = run(100, phases, data={"val": val}, schedule={"warmup": 7}, init={"force": True})
    config = replace(config, run=replace(config.run, eval_every=8, eval_tokens=Count(32)))
    prepared = plan.prepare(config, 1)
    given = prepared.mixture.locate(0, 100 * BATCH)
    assert [given[at][0] for at in (60, 99)] == ["c", "c"] and {name for name, _ in given[:60]} == {"a", "b"}
    assert {use.name: use.samples for use in plan.uses(prepared)} == Counter(name for name, _ in given)
    lines = [line.split() for line in plan.render(prepared).splitlines()]
    assert ["1", "1", "30", "960", "a", "75%,", "b", "25%"] in lines
    assert ["2", "31", "20", "640", "c", "100%"] in lines
    assert ["3", "51", "50", "1.6K", "b", "75%,", "c", "25%"] in lines
    rises = {step: 7 if step <= 50 else 59 for step in range(1, 101)}  # the end of the warm-up of each step's schedule
    due = 1 + sum(evaluation.is_due(step, 100, 8, rises[step]) for step in rises)
    assert plan.evaluations(prepared)[0] == due == 1 + 3 + 6 + 4 + 5 + 1 + 2, "two peaks"
