"""What a run takes from each of its sources, in all and in each phase: counted from the quotas that training follows."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastcpt.data import MILLION, Mixture, Phase
from fastcpt.metrics import short_count

WIDTH = 100  # columns


@dataclass(frozen=True)
class Use:
    """What a run takes from one source. tokens, windows: in the set; share: of the run's samples; epochs: passes over
    the set, or over what is replayed of it, until the run's end, those before its start included when it goes on there."""

    name: str
    tokens: int
    windows: int
    samples: int
    share: float
    epochs: float


class Running(NamedTuple):
    """A phase that is not over yet. number: its place among all, from 1."""

    number: int
    phase: Phase


def phases(mixture: Mixture, samples: int) -> list[Running]:
    """Those from the one on that sample number `samples` is in."""
    numbered = [Running(number, phase) for number, phase in enumerate(mixture.phases, 1)]
    return numbered[sum(phase.first <= samples for phase in mixture.phases) - 1 :]


def uses(mixture: Mixture, samples: int, given: int) -> list[Use]:
    """Of each source of the phases to come, over the `given` samples from number `samples` on."""
    before, after = mixture.seen(samples), mixture.seen(samples + given)
    rows = []
    for source in {source.name: source for _, phase in phases(mixture, samples) for source in phase.sources}.values():
        shards, end = mixture.sets[source.name], after[source.key]
        taken, windows = end - before.get(source.key, 0), shards.num_windows(mixture.seq_len)
        epochs = end / source.epoch(windows)
        rows.append(Use(source.name, len(shards), windows, taken, taken / max(1, given), epochs))
    return rows


def table(uses: Sequence[Use], seq_len: int, known: bool = True) -> list[str]:
    """known: whether the sets were opened; else what depends on their sizes is left out."""
    rows = sorted(uses, key=lambda use: -use.share)
    shown = [f"{'source':<20} {'set':>9} {'windows':>13} {'share':>8} {'samples':>13} {'tokens':>9} {'epochs':>9}"]
    for use in rows[:12]:
        tokens = short_count(use.samples * seq_len)
        size = (short_count(use.tokens), f"{use.windows:,}", f"{use.epochs:.2f}") if known else ("?", "?", "?")
        head = f"{use.name[:20]:<20} {size[0]:>9} {size[1]:>13} {use.share:>8.3%}"
        shown.append(f"{head} {use.samples:>13,} {tokens:>9} {size[2]:>9}")
    rest = f"and {len(rows) - 12} more with {sum(use.share for use in rows[12:]):.3%} of the samples"
    return [*shown, rest] if len(rows) > 12 else shown


def by_phase(running: Sequence[Running], step: int, samples: int, given: int, batch: int, seq_len: int) -> list[str]:
    """A line for each phase: its first step, its length and its mixture. samples: given before step `step` is over;
    given: still to be given; batch: samples a step."""
    shown = [f"{'phase':<8} {'from step':>11} {'steps':>11} {'tokens':>9}   mixture"]
    ends = [*(phase.first for _, phase in running[1:]), samples + given]
    for (number, phase), end in zip(running, ends):
        first, count = step + (phase.first - samples) // batch, (end - phase.first) // batch
        parts = sorted(phase.sources, key=lambda source: -source.weight)
        mixture = ", ".join(f"{source.name} {source.weight / MILLION:.4%}".replace(".0000%", "%") for source in parts)
        head = f"{number:<8} {first + 1:>11,} {count:>11,} {short_count(count * batch * seq_len):>9}   "
        shown.append(textwrap.fill(mixture, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)))
    return shown
