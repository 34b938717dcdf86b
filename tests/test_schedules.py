"""Learning rates against torch's and transformers' schedules, and the papers' equations in float64."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from fastcpt import UserError, train
from fastcpt.config import Config, Kind, Schedule, Source, parse
from fastcpt.schedules import IN_A_BRANCH, Plan, make
from fastcpt.state import named_tensors
from fastcpt.units import Count, steps_of

# Both sides take some ten float64 operations; the cosine's argument, at most pi, carries their error on.
RELATIVE = 1e-14
CASES = [(1, 0), (1, 1), (2, 1), (7, 0), (7, 3), (7, 6), (100, 1), (101, 17), (1000, 10)]
KINDS = get_args(Kind)
PEAK = 3e-4


def planned(kind: Any, steps: int, peak: float = PEAK, first: int = 0, **settings: Any) -> Plan:
    """The plan of a run of `steps`, 10 tokens each; without a warm-up unless one is said."""
    schedule = Schedule(kind=kind, **{"warmup": 0.0, **settings})
    return make(schedule, 10 * steps, 10, first, peak, branch=kind in IN_A_BRANCH)


def rates(plan: Plan) -> list[float]:
    return [plan.rate(plan.first + step) for step in range(1, plan.steps + 1)]


def theirs(schedule: Callable[[Any], Any], count: int, peak: float = PEAK) -> list[float]:
    """A scheduler's rates at 0, 1, ..., count. The rate of 0 is that of its first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = schedule(optimizer)
    found = []
    for _ in range(count + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def near(expected: Any, operations: int = 1) -> Any:
    return pytest.approx(expected, rel=RELATIVE * operations, abs=RELATIVE * PEAK * operations)


@pytest.mark.parametrize("kind", ["cosine", "constant", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), CASES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_rates_are_those_of_transformers_one_step_ahead(kind, steps: int, warmup: int, ratio: float) -> None:
    """Ours counts steps from 1 (as GPT-NeoX does since its PR 1379): the first step is not lost on a rate of 0, and
    the last has the rate where the schedule ends."""

    def schedule(optimizer: Any) -> Any:
        if kind == "cosine":
            return transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=ratio)
        if kind == "linear":  # theirs ends at 0
            return transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
        return transformers.get_constant_schedule_with_warmup(optimizer, warmup)

    ratio = 0.0 if kind == "linear" else ratio
    expected = theirs(schedule, steps)
    if kind == "linear" and steps == warmup:  # all warm-up: theirs is at its end, ours at its peak
        expected[-1] = PEAK
    plan = Plan(kind, 0, steps, warmup, PEAK, ratio)
    for step in range(1, steps + 1):
        assert plan.rate(step) == near(expected[step])


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(10, 0, 10), (50, 3, 7), (50, 1, 49), (50, 5, 0), (1000, 10, 100), (3, 1, 1)])  # fmt: skip
@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "shape"), [("wsd", "1-sqrt"), ("wsd_linear", "linear"), ("wsd_cosine", "cosine")])
def test_wsd_is_that_of_transformers(kind, shape: str, steps: int, warmup: int, decay: int, ratio: float) -> None:
    expected = theirs(
        lambda optimizer: transformers.get_wsd_schedule(
            optimizer, warmup, decay, num_training_steps=steps, decay_type=shape, min_lr_ratio=ratio
        ),
        steps,
    )
    plan = planned(kind, steps, warmup=warmup, decay=decay, min_lr_ratio=ratio)
    # Theirs warms up from min_lr_ratio, and ends there even without a decay.
    ours, last = rates(plan), steps if decay else steps - 1
    assert ours[warmup:last] == near(expected[warmup + 1 : last + 1])
    assert ours[:warmup] == near([PEAK * step / warmup for step in range(1, warmup + 1)])


@pytest.mark.parametrize(("steps", "warmup", "ratio"), [(1000, 10, 0.1), (100, 25, 0.5), (100, 1, 0.5), (9900, 0, 0.1)])
def test_inverse_square_root_is_that_of_transformers(steps: int, warmup: int, ratio: float) -> None:
    """With the timescale that ends at min_lr_ratio: the warm-up itself, as usual, where that is its square of the run."""
    timescale, rest = divmod(steps - warmup, round(1 / ratio**2 - 1))
    assert rest == 0 and (timescale == warmup) == (warmup == round(ratio**2 * steps))
    expected = theirs(
        lambda optimizer: transformers.get_inverse_sqrt_schedule(optimizer, warmup, timescale=timescale), steps
    )
    assert rates(planned("inverse_sqrt", steps, warmup=warmup, min_lr_ratio=ratio)) == near(expected[1:], 10)


def warmed(steps: int, after: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """torch's SequentialLR of a warm-up and a schedule. At its k-th step from 0 it has the rate of our step k + 1."""

    def schedule(optimizer: Any) -> Any:
        rise = lr_scheduler.LinearLR(optimizer, 1 / steps, 1.0, steps - 1)
        return lr_scheduler.SequentialLR(optimizer, [rise, after(optimizer)], [steps - 1])

    return schedule


@pytest.mark.parametrize(("steps", "warmup"), [(7, 0), (7, 3), (100, 2), (101, 17), (500, 0)])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["cosine", "linear", "anneal", "decay_only", "constant"])
def test_whole_shapes_are_those_of_torch(kind, steps: int, warmup: int, ratio: float) -> None:
    left = steps - warmup
    schedule: Callable[[Any], Any] = {
        "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, left, ratio * PEAK),
        "decay_only": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, left, ratio * PEAK),
        "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, ratio, left),
        "anneal": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, ratio ** (1 / left)),
        "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0),
    }[kind]
    expected = theirs(warmed(warmup, schedule) if warmup else schedule, steps)[0 if warmup else 1 :][:steps]
    settings = {} if kind == "constant" else {"min_lr_ratio": ratio}
    # Theirs multiply the rate of the step before: as many roundings as steps.
    assert rates(planned(kind, steps, warmup=warmup, **settings)) == near(expected, steps)


@pytest.mark.parametrize(("steps", "parts"), [(1000, (10, 600, 140)), (50, (0, 3, 20)), (40, (2, 1, 0)), (40, (0, 20, 20))])  # fmt: skip
def test_infinite_is_a_chain_of_torchs_schedules(steps: int, parts: tuple[int, int, int]) -> None:
    warmup, cooldown, decay = parts
    constant = 1.65e-4
    expected = [PEAK * step / warmup for step in range(1, warmup + 1)]
    cosine = theirs(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, cooldown, constant), cooldown)
    expected += cosine[1:] + [constant] * (steps - sum(parts))
    if decay:
        gamma = 0.1 / 0.55
        expected += theirs(lambda each: lr_scheduler.ExponentialLR(each, gamma ** (1 / decay)), decay, constant)[1:]
    assert rates(planned("infinite", steps, warmup=warmup, cooldown=cooldown, decay=decay)) == near(expected, steps)


def test_the_clipped_cosine_is_that_of_the_papers_code() -> None:
    """max(min, peak / 2 (1 + cos(pi t / steps))), t counted from the end of the warm-up but steps not: the minimum is
    there after 79.5% of the run, at 239B of its 297B tokens (SlimPajama, 131,296 iterations of 2,260,992 tokens)."""
    steps = 131_296
    plan = planned("cosine_clipped", steps, warmup=0.01)
    assert plan.warmup == 1313
    done = np.arange(1, steps + 1, dtype=np.float64)
    decayed = np.maximum(3e-5, 3e-4 / 2 * (1 + np.cos(np.pi * (done - 1313) / steps)))
    expected = np.where(done <= 1313, 3e-4 * done / 1313, decayed)
    ours = np.array(rates(plan))
    assert np.abs(ours / expected - 1).max() < RELATIVE
    reached = int(np.argmax(ours[1313:] <= ours[-1])) + 1313 + 1
    assert reached == 1313 + math.ceil(math.acos(-0.8) / math.pi * steps)
    assert round(reached * 2_260_992 / 1e9) == 239 and ours[-1] == 0.1 * 3e-4
    assert planned("cosine", steps, warmup=0.01).rate(reached) > 1.2 * ours[-1], "the usual cosine is not there yet"


@pytest.mark.parametrize("kind", ["infinite", "infinite_inverse_sqrt"])
def test_infinite_follows_the_equations_of_its_paper(kind) -> None:
    """arXiv 2403.08763: 3e-4, 1.65e-4 and 3e-5; 1% of warm-up, 60% of cool-down, 14% of annealing; alpha 10."""
    steps, (top, constant, low) = 132_366, (3e-4, 1.65e-4, 3e-5)
    plan = planned(kind, steps, warmup=0.01)
    warmup, cooldown, annealing = 1324, 79_419, 18_531
    assert (plan.warmup, plan.cooldown, plan.decay) == (warmup, cooldown, annealing)
    t = np.arange(1, steps + 1, dtype=np.float64) - warmup
    u = np.clip(t / cooldown, 0, 1)
    if kind == "infinite":
        cooled = constant + (top - constant) / 2 * (1 + np.cos(np.pi * u))
    else:

        def bend(part: Any) -> Any:
            return 1 / np.sqrt(1 + 10 * part) - 1

        cooled = top + (constant - top) / bend(1.0) * bend(u)
    annealed = constant * np.exp(np.log(low / constant) * (t - (steps - warmup - annealing)) / annealing)
    phases = [t <= 0, t <= cooldown, t <= steps - warmup - annealing]
    expected = np.select(phases, [top * (t + warmup) / warmup, cooled, np.full(steps, constant)], annealed)
    assert np.abs(np.array(rates(plan)) / expected - 1).max() < RELATIVE


def one_step(plan: Plan) -> float:
    """The most that the rate changes in a step, relative to the peak: the steepest of each part, by its derivative."""
    end, constant = plan.min_lr_ratio, plan.constant_ratio
    left, decay, drop = plan.steps - plan.warmup, plan.decay, 1 - plan.min_lr_ratio
    steepest = {
        "constant": 0.0,
        "cosine": math.pi / 2 * drop / left,
        "decay_only": math.pi / 2 * drop / left,
        "cosine_clipped": math.pi / 2 / plan.steps,
        "linear": drop / left,
        "inverse_sqrt": (1 / end**2 - 1) / 2 / left,
        "anneal": -math.log(end) / left,
        "wsd": drop / math.sqrt(decay or 1),  # whose derivative has no bound, but whose steepest step is the first
        "wsd_linear": drop / (decay or 1),
        "wsd_cosine": math.pi / 2 * drop / (decay or 1),
        "wsd_exponential": -math.log(end) / (decay or 1),
    }
    annealing = constant * math.log(constant / end) / (decay or 1)
    bend = 10 / 2 / (1 - 1 / math.sqrt(11))  # |f'(0) / f(1)|
    for kind, slope in (("infinite", math.pi / 2), ("infinite_inverse_sqrt", bend)):
        steepest[kind] = max(slope * (1 - constant) / (plan.cooldown or 1), annealing)
    return max(steepest[plan.kind], 1 / plan.warmup if plan.warmup else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "warmup", "first"), [(100, 0.0, 0), (100, 0.05, 0), (101, 7.0, 0), (1000, 0.0, 300), (60, "0.1K", 5)])  # fmt: skip
def test_no_kind_jumps_and_all_end_at_their_end(kind, steps: int, warmup: Any, first: int) -> None:
    settings = {} if kind == "constant" else {"min_lr_ratio": 0.1}
    plan = planned(kind, steps, first=first, warmup=warmup, **settings)
    ours = rates(plan)
    whole = ours if plan.warmup else [PEAK, *ours]  # a branch's checkpoint had the peak
    assert ours[0] > 0 and max(ours) <= PEAK
    bound = one_step(plan) * PEAK * (1 + 1e-9)
    assert all(abs(after - before) <= bound for before, after in itertools.pairwise(whole))
    assert all(after <= before for before, after in itertools.pairwise(ours[max(0, plan.warmup - 1) :]))
    at = plan.first + plan.warmup
    assert plan.rate(at) == PEAK
    for length, shape, end in plan.segments():  # each is exactly at its end in its last step
        at += length
        assert shape == "clipped cosine" or plan.rate(at) == PEAK * end
    assert ours[-1] == plan.rate(first + 3 * steps) == (PEAK if kind == "constant" else PEAK * 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step(kind) -> None:
    lengths: dict[str, Any] = {"decay": 1} if kind.startswith("wsd") else {}
    if kind.startswith("infinite"):
        lengths = {"cooldown": 1, "decay": 0}
    (rate,) = rates(planned(kind, 1, **lengths))
    ends = {"constant": 1.0, "infinite": 0.55, "infinite_inverse_sqrt": 0.55}
    assert rate == PEAK * ends.get(kind, 0.1)


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


@pytest.mark.parametrize(("steps", "warmup"), CASES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_cosine_is_to_the_bit_what_it_was(steps: int, warmup: int, ratio: float) -> None:
    """Runs of the first version go on: their checkpoints hold these six values, and their weights these bits."""
    saved: dict[str, Any] = {"first": 3, "steps": steps, "warmup": warmup, "peak": PEAK, "min_lr_ratio": ratio}
    plan = Plan(kind="cosine", **saved)
    for done in range(warmup + 1, steps + 3):
        progress = min(1.0, (done - warmup) / max(1, steps - warmup))
        assert plan.rate(3 + done) == PEAK * (ratio + (1 - ratio) / 2 * (1 + math.cos(math.pi * progress)))
    assert [plan.rate(3 + done) for done in range(1, warmup + 1)] == [
        PEAK * done / warmup for done in range(1, warmup + 1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_starts_at_the_rate_it_was_given(kind) -> None:
    whole = Plan("cosine", 0, 500, 20, 3e-4, 0.1)
    reached = whole.rate(300)
    branch, alone = planned(kind, 80, reached, first=300), planned(kind, 80, reached)
    assert branch.rate(300) == reached
    assert [branch.rate(300 + step) for step in range(1, 81)] == rates(alone)
    assert 0 <= reached - branch.rate(301) <= one_step(branch) * reached
    assert branch.rate(380) == (reached if kind == "constant" else 0.1 * reached)


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
        ("2B", 1000, 885),  # of 2,260,992 tokens: 884.57
        ("2260.992K", 1000, 1),
        ("0B", 1000, 0),
    ],
)
def test_warmup_is_a_fraction_rounded_up_a_number_or_tokens(warmup: Any, steps: int, expected: int) -> None:
    assert steps_of(warmup, steps, 2_260_992) == expected
    schedule = Schedule(warmup=warmup)
    assert make(schedule, steps * 2_260_992 - 1, 2_260_992, 0, 1e-3, branch=False).warmup == expected


def test_lengths_are_fractions_steps_or_tokens_alike() -> None:
    """Tokens that are all of the run's are all of its steps, and fractions that sum to 1 fit every run."""
    for lengths in ((0.5, 0.25), (50, 25), ("0.5K", "0.25K"), ("495", 25)):
        plan = planned("infinite", 100, cooldown=lengths[0], decay=lengths[1])
        assert (plan.cooldown, plan.decay) == (50, 25)
    assert make(Schedule(kind="wsd", warmup=0.0, decay="1.001K"), 1001, 10, 0, 1.0, branch=False).decay == 101
    assert planned("wsd", 7).decay == 1, "a tenth of few steps is one"
    for steps in range(100, 400):
        for parts in ((0.01, 0.6, 0.39), (0.33, 0.33, 0.34), (0.1, 0.2, 0.7), (0.07, 0.64, 0.29)):
            plan = planned("infinite", steps, warmup=parts[0], cooldown=parts[1], decay=parts[2])
            assert steps - 2 <= plan.warmup + plan.cooldown + plan.decay <= steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 1e-3), ("0.5", 0.5), ("20", 20.0), ("2_000", 2000.0), ("2B", "2B"), ("1.5m", "1.5m"), ("0", 0.0)],
)
def test_a_length_is_read_from_a_file_as_from_the_command_line(
    tmp_path: Path, text: str, expected: float | str
) -> None:
    settings = "data: {train: [{name: a, path: p, weight: 1}], seq_len: 8}\noptim: {lr: 1}\nrun: {output: x}\n"
    settings += "train: {tokens: 1M, batch_tokens: 64}\n"
    (tmp_path / "a.yaml").write_text(f"{settings}schedule: {{kind: infinite, warmup: {text}, decay: {text}}}\n")
    (tmp_path / "b.yaml").write_text(f"{settings}schedule: {{kind: infinite}}\n")
    read = parse(["--config", str(tmp_path / "a.yaml")]).schedule
    given = parse(
        ["--config", str(tmp_path / "b.yaml"), "--schedule.warmup", text, f"--schedule.decay={text}"]
    ).schedule
    assert read == given == Schedule(kind="infinite", warmup=expected, decay=expected)
    assert isinstance(read.warmup, type(expected))


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup is 11 steps, but the run has 10; shorten the warm-up"):
        Plan("cosine", 0, 10, 11, 1e-3, 0.1)
    assert Plan("cosine", 0, 10, 10, 1e-3, 0.1).rate(10) == 1e-3
    with pytest.raises(UserError, match=r"are 1 \+ 6 \+ 4 steps, but the run has 10; shorten them"):
        planned("infinite", 10, warmup=1, cooldown=0.6, decay="40")


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_that_the_kind_does_not_use_is_refused(kind) -> None:
    used = {"warmup": True, "min_lr_ratio": kind != "constant"}
    used |= {"decay": kind.startswith(("wsd", "infinite")), "cooldown": kind.startswith("infinite")}
    for name, value in {"warmup": 0.02, "min_lr_ratio": 0.2, "decay": 0.2, "cooldown": 0.2}.items():
        if used[name]:
            assert rates(planned(kind, 100, **{name: value})) != rates(planned(kind, 100))
        else:
            with pytest.raises(UserError, match=f"schedule.{name} is 0.2, which kind {kind} does not use; remove it"):
                planned(kind, 100, **{name: value})


def test_kinds_of_a_branch_are_refused_elsewhere() -> None:
    for kind in ("decay_only", "anneal"):
        with pytest.raises(UserError, match=f"schedule.kind {kind} starts at a checkpoint's rate; set init.from and"):
            make(Schedule(kind=kind), 100, 10, 0, 1e-3, branch=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_of_0_is_reached_or_refused(kind) -> None:
    if kind == "constant":
        return
    if kind.startswith("infinite") or kind in ("inverse_sqrt", "anneal", "wsd_exponential"):
        with pytest.raises(UserError, match=f"schedule.min_lr_ratio is 0, which kind {kind} never reaches"):
            planned(kind, 100, min_lr_ratio=0.0)
    else:
        assert planned(kind, 100, min_lr_ratio=0.0).rate(100) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_survives_a_checkpoint(kind) -> None:
    """All of it: resumed in the middle of any segment, the rest of the curve is the same."""
    plan = planned(kind, 100, first=7, warmup=3)
    resumed = Plan(**json.loads(json.dumps(plan.to_dict())))
    assert resumed == plan and rates(resumed) == rates(plan)


def test_a_plan_in_words() -> None:
    assert planned("infinite", 100, warmup=1).describe() == (
        "1 steps of warm-up to 0.0003, then cosine to 0.000165 over 60, then constant over 25, "
        "then exponential to 3e-05 over 14"
    )
    assert planned("wsd", 2000).describe() == "0.0003 at once, then constant over 1,800, then 1-sqrt to 3e-05 over 200"
    assert planned("cosine", 100, warmup=1).describe() == "1 steps of warm-up to 0.0003, then cosine to 3e-05 over 99"


@pytest.fixture
def run(tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any) -> Callable[..., Config]:
    """run(folder, steps, **sections): a configuration of few steps of 2 sequences."""
    path = write_shards(tmp_path / "text", random_documents(0, 30)).path

    def make_config(folder: str, steps: int, **sections: Any) -> Config:
        sections["data"] = {"train": [Source(name="text", path=str(path), weight=1)], "seq_len": 16}
        sections["train"] = {"tokens": Count(32 * steps), "batch_tokens": Count(32)}
        sections["run"] = {"log_every": 1, "save_every": 1, "keep": 99}
        return tiny_config(tmp_path / folder, **sections)

    return make_config


def logged(config: Config) -> list[float]:
    found = (json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines())
    return [line["lr"] for line in found if "lr" in line]


def test_a_run_stopped_in_any_segment_goes_on_as_if_it_never_was(run: Callable[..., Config], monkeypatch: Any) -> None:
    """Warm-up, cool-down, constant, annealing, of two steps each, stopped in the middle of each."""
    schedule = {"kind": "infinite", "warmup": 2, "cooldown": 2, "decay": "0.064K"}
    whole = run("whole", 8, schedule=schedule)
    expected = {name: tensor.clone() for name, tensor in named_tensors(train.train(whole)).items()}
    assert logged(whole) == [Plan("infinite", 0, 8, 2, 1e-3, 0.1, 2, 2, 0.55).rate(step) for step in range(1, 9)]
    assert len(set(logged(whole))) == 6

    class Stopped(Exception):
        pass

    parts, save = run("parts", 8, schedule=schedule), train.save

    def stopping(state: train.State) -> Any:
        save(state)
        if state.step % 2 == 1:
            state.saver.wait()
            raise Stopped

    monkeypatch.setattr(train, "save", stopping)
    for _ in range(4):
        with pytest.raises(Stopped):
            train.train(parts)
    monkeypatch.setattr(train, "save", save)
    state = train.train(parts)
    assert logged(parts) == logged(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in named_tensors(state).items())


@pytest.mark.parametrize("kind", ["anneal", "wsd"])
def test_a_branch_of_the_constant_segment_decays_from_its_rate(run: Callable[..., Config], kind) -> None:
    """As the papers do: the run's checkpoint of the constant segment is annealed by a branch of its own."""
    whole = run("whole", 6, schedule={"kind": "infinite", "warmup": 1, "cooldown": 2, "decay": 1})
    train.train(whole)
    assert logged(whole)[3] == 0.55e-3
    start = f"{whole.run.output}/checkpoints/step-4"
    settings = {"kind": kind, "warmup": 0, "min_lr_ratio": 0.1 / 0.55} | ({"decay": 4} if kind == "wsd" else {})
    branch = run("branch", 4, schedule=settings, init={"from_": start, "branch": True}, optim={"lr": None})
    state = train.train(branch)
    assert (state.plan.first, state.plan.peak, state.step) == (4, logged(whole)[3], 8)
    ours = [logged(whole)[3], *logged(branch)]
    assert all(after < before for before, after in itertools.pairwise(ours)) and ours[-1] == near(1e-4)
    assert ours[0] - ours[1] <= one_step(state.plan) * ours[0] * (1 + 1e-9)
