"""Tiny runs, the windows that they feed their model, and what those must be by counting one by one."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcpt import plan, train
from fastcpt.config import Config, Count, Phase, Source
from fastcpt.permutation import Permutation
from fastcpt.shards import ShardSet

SEQ_LEN, BATCH = 16, 2
STEP = SEQ_LEN * BATCH  # tokens


def write_sets(folder: Path, write_shards: Callable, random_documents: Callable) -> dict[str, ShardSet]:
    """a, b and c, of about 35 windows each."""
    return {name: write_shards(folder / name, random_documents(seed, 30)) for seed, name in enumerate("abc")}


def runs(folder: Path, tiny_config: Callable, sets: dict[str, ShardSet]) -> Callable[..., Config]:
    """run(steps, phases, name, **sections): of the sources that the phases read, which have no weights of their own; every
    step is logged and kept."""

    def make(steps: int, phases: list[Phase], name: str = "run", **sections: Any) -> Config:
        read = {source for each in phases for source in each.weights or sets}
        sources = [Source(name=source, path=str(sets[source].path)) for source in sets if source in read]
        sections["data"] = {"train": sources, "seq_len": SEQ_LEN, "phases": phases} | sections.get("data", {})
        sections["train"] = {
            "tokens": Count(STEP * steps),
            "batch_tokens": Count(STEP),
            "micro_batch": 2,
        } | sections.get("train", {})
        sections["run"] = {"log_every": 1, "save_every": 1, "keep": 99}
        return tiny_config(folder / name, **sections)

    return make


def phase(steps: float | None = None, weights: dict[str, float] | None = None, **settings: Any) -> Phase:
    tokens = None if steps is None else Count(int(steps * STEP))
    return Phase(tokens=tokens, weights=weights or {"a": 1.0}, **settings)


def chosen(weights: dict[str, float], count: int) -> list[str]:
    """Who gives each of `count` samples: of n the lighter of two sources round(n w), half up."""
    heavy, light = sorted(weights, key=lambda name: -weights[name])
    given = [math.floor(n * weights[light] / sum(weights.values()) + 0.5) for n in range(count + 1)]
    return [light if after > before else heavy for before, after in itertools.pairwise(given)]


def simulated(phases: list[Phase], orders: dict[str, list[int]]) -> list[tuple[str, int]]:
    """Sample by sample, in lists: the source whose turn it is gives the next window of its own order."""
    left, found = {name: iter(order) for name, order in orders.items()}, []
    for each in phases:
        weights = {name: weight for name, weight in (each.weights or {}).items() if weight}
        count = (each.tokens or 0) // SEQ_LEN
        names = chosen(weights, count) if len(weights) > 1 else [*weights] * count
        found += [(name, next(left[name])) for name in names]
    return found


def order_of(sets: dict[str, ShardSet], name: str, seed: int, epochs: int = 1) -> list[int]:
    """The windows of a set alone, in the order in which a run of this seed reads them."""
    size, fingerprint = sets[name].num_windows(SEQ_LEN), sets[name].fingerprint
    keys = [(seed, SEQ_LEN, fingerprint, epoch) for epoch in range(epochs)]
    return [int(window) for key in keys for window in Permutation(size, key)(np.arange(size))]


def fed(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trains, and finds each window that the model was given, among all windows of the run's sets."""
    places: dict[bytes, tuple[str, int]] = {}
    for source in config.data.train:
        shards = ShardSet(source.path)
        for number, window in enumerate(shards.windows(np.arange(shards.num_windows(SEQ_LEN)), SEQ_LEN)):
            assert places.setdefault(window.tobytes(), (source.name, number)) == (source.name, number)
    found, step = [], train.train_step

    def recorded(state: train.State, batch_BT: Any) -> Any:
        found.extend(places[np.asarray(window).tobytes()] for window in batch_BT)
        return step(state, batch_BT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", recorded)
        train.train(config)
    return found


def logged(config: Config, key: str) -> list[Any]:
    lines = (json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def planned(config: Config) -> list[tuple[str, int]]:
    """What `fed` would find, by the mixture that the run would follow; nothing is trained."""
    prepared = plan.prepare(config, 1)
    return prepared.mixture.locate(prepared.samples, prepared.tokens // SEQ_LEN)
