"""The phases of a run, in steps: which sources each reads with which weights, and the learning rates of all.

A schedule holds, and its fractions count, from its phase until the next that brings one: the run's own from the start.
So cosines over three tasks, or an infinite schedule and its annealing, are one run. All of it is a function of the
configuration and of where the run starts: nothing is decided while it runs.
"""

import bisect
import math
from dataclasses import replace
from typing import NamedTuple, NoReturn

from fastcpt import UserError
from fastcpt.config import Config, Phase
from fastcpt.schedules import Plan, make


class Span(NamedTuple):
    """A phase. first: the step that it begins after. weights: {source: weight above 0}, in the order of data.train."""

    first: int
    weights: dict[str, float]


def refuse(id: str, number: int, message: str) -> NoReturn:
    """number: of the phase, from 0."""
    raise UserError(id, f"data.phases, phase {number + 1}: {message}")


def lay_out(config: Config, first: int, peak: float) -> tuple[Plan, list[Span]]:
    """The learning rates and the phases of a run that begins after step `first` with a schedule of this peak.

    Raises UserError for phases that do not fit the run, its sources or each other.
    """
    train, batch, branch = config.train, config.train.batch_tokens, config.init.branch
    phases = config.data.phases or [Phase()]
    mixtures = [_weights(config, number) for number in range(len(phases))]
    for source in config.data.train:
        if all(source.name not in weights for weights in mixtures):
            raise UserError("phases-weights", f"data.phases: no phase reads {source.name}; remove it from data.train")
    starts = [0] + [number for number, phase in enumerate(phases) if number and phase.schedule is not None]
    for number, phase in enumerate(phases):
        _check(phase, number, last=number == len(phases) - 1, last_schedule=number >= starts[-1])
    _check_sum(config, phases)
    steps = -(-train.tokens // batch)
    parts: list[Plan] = []
    spans, begin, tokens = [], 0, 0
    for number, (phase, weights) in enumerate(zip(phases, mixtures)):
        spans.append(Span(first + begin, weights))
        if number in starts:
            later = [after for after in starts if after > number]
            end = _step(tokens + sum(it.tokens or 0 for it in phases[number : later[0]]), batch) if later else steps
            parts.append(_part(config, phase, number, first + begin, end - begin, parts, peak, branch))
        if number == len(phases) - 1:
            end = steps
        elif phase.until_lr is not None:
            end = _falls(parts[-1], phase.until_lr, number, first + begin) - first
            tokens = end * batch
        else:
            tokens += phase.tokens or 0
            end = _step(tokens, batch)
        if begin >= steps:
            refuse(
                "phases-tokens", number, f"the phases before it take all of train.tokens {train.tokens:,}; shorten them"
            )
        if end <= begin:
            refuse("phases-tokens", number, f"shorter than a step of {batch:,} tokens, as it is rounded; lengthen it")
        begin = end
    return replace(parts[0], steps=steps, later=tuple(parts[1:])), spans


def _step(tokens: int, batch: int) -> int:
    """The nearest step, so that the roundings of many phases do not add up."""
    return (2 * tokens + batch) // (2 * batch)


def _weights(config: Config, number: int) -> dict[str, float]:
    sources = config.data.train
    given = config.data.phases[number].weights if config.data.phases else None
    if given is None:
        missing = [source.name for source in sources if source.weight is None]
        if missing:
            refuse("phases-weights", number, f"no weights, and in data.train {missing[0]} has none either; give them")
        return {source.name: source.weight for source in sources if source.weight is not None}
    names = [source.name for source in sources]
    for name, weight in given.items():
        if name not in names:
            refuse("phases-weights", number, f"weights: there is no source {name!r}; data.train has {names}")
        if not 0 <= weight < math.inf:
            refuse("phases-weights", number, f"weights: {name}: {weight} is not a number from 0 on")
    if not any(given.values()):
        refuse("phases-weights", number, "weights: no source has any; give one of them a weight above 0")
    return {name: given[name] for name in names if given.get(name)}


def _check(phase: Phase, number: int, last: bool, last_schedule: bool) -> None:
    """What a phase says of its length and of its schedule."""
    if phase.tokens is not None and phase.until_lr is not None:
        refuse("phases-tokens", number, "tokens and until_lr: both say where it ends; remove one")
    if phase.tokens is None and phase.until_lr is None and not last:
        refuse("phases-tokens", number, "tokens are missing; only the last phase takes the rest of the run")
    if phase.until_lr is not None and (last or not last_schedule or not 0 < phase.until_lr < 1):
        refuse(
            "phases-until", number,
            f"until_lr {phase.until_lr} must be from 0 to 1, and neither the last phase nor one that a later one with a "
            "schedule follows can have it: the rate depends on where its schedule ends; give tokens",
        )  # fmt: skip
    if number == 0 and (phase.schedule is not None or phase.lr is not None):
        refuse("phases-schedule", number, "the first has the run's schedule: write it in schedule and optim.lr")
    if phase.lr is not None and (phase.schedule is None or not 0 < phase.lr < math.inf):
        refuse("phases-schedule", number, f"lr {phase.lr}: the peak, above 0, of a schedule; give that too")
    if phase.schedule is not None and phase.lr is None and phase.schedule.warmup != 0:
        refuse(
            "phases-schedule", number,
            f"schedule.warmup {phase.schedule.warmup}: without lr it starts at the rate before; set the warm-up to 0, or give lr",
        )  # fmt: skip


def _check_sum(config: Config, phases: list[Phase]) -> None:
    if phases[-1].tokens is None:
        return
    if any(phase.until_lr is not None for phase in phases):
        refuse("phases-tokens", len(phases) - 1, "how much is left is not known before until_lr; remove its tokens")
    total = sum(phase.tokens or 0 for phase in phases)
    if total != config.train.tokens:
        raise UserError(
            "phases-tokens",
            f"data.phases are {total:,} tokens, train.tokens {config.train.tokens:,}; make them the same, or leave the last "
            "phase's tokens out",
        )


def _part(
    config: Config, phase: Phase, number: int, first: int, steps: int, before: list[Plan], peak: float, branch: bool
) -> Plan:
    """The plan of the schedule that begins with a phase."""
    batch = config.train.batch_tokens
    if phase.schedule is None:
        return make(config.schedule, steps * batch, batch, first, peak, branch)
    reached = before[-1].rate(before[-1].last)
    if phase.lr is None and reached == 0:
        refuse("phases-schedule", number, "the rate before ended at 0, and it would stay there; give lr")
    try:
        return make(phase.schedule, steps * batch, batch, first, phase.lr or reached, branch=True)
    except UserError as error:
        raise UserError(error.id, f"data.phases, phase {number + 1}: {error}") from None


def _falls(part: Plan, fraction: float, number: int, begin: int) -> int:
    """The last step after `begin` with a rate above a fraction of the peak. It never rises again after the warm-up."""
    steps = range(max(begin, part.first + part.warmup) + 1, part.last + 1)
    found = bisect.bisect_left(steps, True, key=lambda step: part.rate(step) <= fraction * part.peak)
    if found == len(steps):
        lowest = part.rate(part.last)
        refuse("phases-until", number, f"until_lr {fraction}: the rate falls from {part.peak:.3g} to {lowest:.3g} only")
    return steps[found] - 1
