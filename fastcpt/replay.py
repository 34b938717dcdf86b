"""Replay: text that the model has read before, mixed in against forgetting, and only what it really read.

A run reads a set as a prefix of a keyed permutation of its windows (`data.py`), so the key and a count say which windows
they were. Checkpoints hold both for every set that a chain of runs has read. A set with `replay` gives of exactly those
windows, in a new order or in that of then, and a later run goes on with them where the one before stopped. Replay is
compute-equivalent by construction: its samples take the places of new ones.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastcpt.config import Source
from fastcpt.data import Mixture, Phase, Replay, taken

# {fingerprint of a set: what the model has read of it}: samples, seed, seq_len of the longest part that it read as new text,
# and replay: the fields of `Replay`, seq_len, and the samples given, of the last replay.
Read = dict[str, dict[str, Any]]


def remembered(read: Read, phases: Sequence[Phase], samples: int, seq_len: int, seed: int) -> Read:
    """What was read before, and by a run of these phases, length and seed until its sample number `samples`."""
    found, counts = {name: dict(entry) for name, entry in read.items()}, taken(phases, samples)
    for source in [source for phase in phases for source in phase.sources]:
        count = counts.get(source.key, 0)
        if count == 0:
            continue
        entry = found.setdefault(source.fingerprint, {})
        if source.replay is not None:
            entry["replay"] = asdict(source.replay) | {"seq_len": seq_len, "given": count}
        elif count * seq_len >= entry.get("samples", 0) * entry.get("seq_len", 0):
            entry |= {"samples": count, "seed": seed, "seq_len": seq_len}
    return found


def of(source: Source, fingerprint: str, windows: int, read: Read, seq_len: int, seed: int) -> tuple[Replay, int]:
    """Which windows of a set a source replays, of the `windows` that it has, and how many samples it has given of them."""
    entry = read.get(fingerprint, {})
    pool, order = windows, None
    if entry.get("seq_len") == seq_len:  # at another length its windows are others
        pool, order = min(windows, entry["samples"]), entry["seed"]
    last, in_order = entry.get("replay"), source.replay == "in_order"
    now = {"pool": pool, "seed": order, "seq_len": seq_len}
    if last and now.items() <= last.items() and (last["shuffle"] is None) == in_order:
        return Replay(pool, order, last["shuffle"]), last["given"]
    return Replay(pool, order, None if in_order else seed), 0


def notes(mixture: Mixture, samples: int) -> list[str]:
    """A sentence for each source that replays from sample number `samples` on: of what, and in which order."""
    running = [
        phase for phase, end in zip(mixture.phases, [*mixture.phases[1:], None]) if end is None or end.first > samples
    ]
    found: dict[str, str] = {}
    for source in [source for phase in running for source in phase.sources if source.replay is not None]:
        assert source.replay is not None
        pool, windows = source.replay.pool, mixture.sets[source.name].num_windows(mixture.seq_len)
        if source.replay.seed is None:
            what = f"from all {windows:,} windows, as it is not known which of them the model has read"
            order = "as they are stored" if source.replay.shuffle is None else "shuffled"
        else:
            what = f"from the {pool:,} of {windows:,} windows that the model has read"
            order = "in that order" if source.replay.shuffle is None else "in a new order"
        on = f", going on after {source.start:,}" if source.start else ""
        found.setdefault(source.key, f"{source.name}: {what}, {order}{on}")
    return list(found.values())
