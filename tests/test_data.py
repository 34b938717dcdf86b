"""The data order against brute force: permutations, quotas, mixtures, phases, batches and evaluation windows."""

import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fastcpt import UserError, data
from fastcpt.data import (
    MILLION,
    Mixture,
    Permutation,
    Phase,
    PhaseSource,
    Quotas,
    batches,
    evaluation_windows,
    parts_per_million,
)
from fastcpt.shards import ShardSet

SIZES = [1, 2, 3, 4, 5, 7, 10, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 4095, 4097, 65_537]


@pytest.mark.parametrize("size", SIZES)
def test_permutation_is_a_bijection(size: int) -> None:
    images = Permutation(size, ("key",))(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permutation_of_a_part_is_that_part_of_the_whole() -> None:
    permutation = Permutation(1025, (3, "x"))
    whole = permutation(np.arange(1025))
    assert np.array_equal(permutation(np.array([7, 1024, 0, 7])), whole[[7, 1024, 0, 7]])


def test_permutation_differs_by_every_part_of_its_key() -> None:
    keys = [(0, 16, "a", 0), (1, 16, "a", 0), (0, 17, "a", 0), (0, 16, "b", 0), (0, 16, "a", 1)]
    images = [Permutation(4097, key)(np.arange(4097)) for key in keys]
    for one, other in itertools.combinations(images, 2):
        # Fixed points of one permutation against an independent one are Poisson(1); 12 has a probability of 1e-9.
        assert (one == other).sum() < 12


# The order is a promise: a run that goes on with another one repeats and skips text. A change here is deliberate, and
# belongs in the change log with a new version of the checkpoint's format. The values come from a second implementation,
# on Python's integers, of what the module's first page says.
FROZEN = {
    (1, (0, 2048, "f", 0)): [0],
    (10, (0, 2048, "f", 0)): [8, 1, 4, 6, 7, 0],
    (1000, (0, 2048, "f", 0)): [23, 451, 881, 592, 120, 203],
    (1000, (0, 2048, "f", 1)): [103, 222, 832, 722, 470, 344],
    (122_070_312, (0, 2048, "f", 0)): [6373473, 121591026, 94644297, 33357996, 116546606, 76892373],
    (2**40, (17, 16, "evaluation", 5)): [
        640728581571, 239818972953, 1000215299236, 222411434787, 745186521755, 80628254099,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("size", "key"), FROZEN)
def test_permutation_is_what_it_was(size: int, key: tuple) -> None:
    assert Permutation(size, key)(np.arange(min(size, 6))).tolist() == FROZEN[size, key]


def test_mixture_is_what_it_was(tmp_path: Path, write_shards: Callable) -> None:
    sets = {"many": write_shards(tmp_path / "many", [[1] * 700]), "few": write_shards(tmp_path / "few", [[1] * 70])}
    phases = [Phase(0, (PhaseSource("many", "first", 800_000, 0), PhaseSource("few", "second", 200_000, 0)))]
    assert Mixture(sets, phases, seq_len=7, seed=3).locate(0, 16) == [
        ("many", 31), ("many", 53), ("few", 3), ("many", 50), ("many", 81), ("many", 70), ("many", 48), ("few", 6),
        ("many", 85), ("many", 41), ("many", 74), ("many", 75), ("few", 7), ("many", 39), ("many", 46), ("many", 22),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1000, 16_384, 100_003])
def test_permutation_spreads_evenly(size: int, seed: int) -> None:
    """Where the first tenth goes, and how neighbours land, as with a uniform random permutation.

    Buckets: chi-square with B - 1 degrees of freedom, times (1 - 1/10) for drawing without replacement; its mean is
    B - 1 and its standard deviation sqrt(2 (B - 1)). Neighbours: a correlation of n pairs has one of 1/sqrt(n).
    """
    images = Permutation(size, (seed, "uniform"))(np.arange(size)).astype(np.int64)
    buckets = 20
    drawn = size // 10
    edges = np.arange(buckets + 1) * size // buckets
    found = np.histogram(images[:drawn], edges)[0]
    expected = drawn * np.diff(edges) / size
    chi_square = ((found - expected) ** 2 / expected).sum() / 0.9
    assert abs(chi_square - (buckets - 1)) < 5 * np.sqrt(2 * (buckets - 1))
    for lag in (1, 2, 64):
        correlation = np.corrcoef(images[:-lag], images[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 5 / np.sqrt(size)


@pytest.mark.parametrize("size", [2**40, 2**40 + 1, 2**62 - 1])
def test_large_permutations_stay_in_range_without_memory(size: int) -> None:
    indexes = np.concatenate((np.arange(2000), size - 1 - np.arange(2000), np.arange(2000) * (size // 2000)))
    indexes = np.unique(indexes)
    images = Permutation(size, ("large",))(indexes)
    assert images.max() < size
    assert len(np.unique(images)) == len(indexes)
    # The top bits of as many uniform draws: counts of 16 buckets, chi-square as above.
    found = np.bincount((images // (size // 16 + 1)).astype(np.int64), minlength=16)
    chi_square = ((found - len(indexes) / 16) ** 2 / (len(indexes) / 16)).sum()
    assert chi_square < 15 + 5 * np.sqrt(30)


def random_weights(generator: np.random.Generator, count: int) -> list[int]:
    """Parts per million of very different sizes, one of a single part now and then."""
    weights = parts_per_million((10.0 ** generator.uniform(-3, 0, count)).tolist())
    if count > 1 and generator.random() < 0.5:
        largest, smallest = int(np.argmax(weights)), int(np.argmin(weights))
        weights[largest] += weights[smallest] - 1
        weights[smallest] = 1
    return weights


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30])
def test_quotas_count_what_they_locate(count: int) -> None:
    generator = np.random.default_rng(count)
    for _ in range(4):
        quotas = Quotas(random_weights(generator, count))
        tally = [0] * count
        for index in range(1500):
            assert quotas.counts(index) == tally
            (branch,), (number,) = quotas.locate(np.array([index]))
            assert number == tally[branch], "each branch's samples are 0, 1, 2, ... without gap or repetition"
            tally[branch] += 1


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 2), (30, 2)])
def test_quotas_stay_near_the_exact_share(count: int, limit: int) -> None:
    generator = np.random.default_rng(100 + count)
    for round_number in range(30):
        weights = random_weights(generator, count) if round_number else [MILLION // count] * count
        total = sum(weights)
        quotas = Quotas(weights)
        numbers = [*range(200), *generator.integers(0, 10**12, 300).tolist()]
        for number in numbers:
            counts = quotas.counts(number)
            assert sum(counts) == number
            for found, weight in zip(counts, weights):
                # |found - number weight / total| < limit, in integers
                assert abs(found * total - number * weight) < limit * total


def test_a_whole_million_of_samples_is_shared_exactly() -> None:
    weights = [1, 999_000, 999]
    quotas = Quotas(weights)
    assert quotas.counts(MILLION) == weights
    assert quotas.counts(3 * MILLION) == [3 * weight for weight in weights]
    far = 7 * 10**11 + 123
    (branch,), (number,) = quotas.locate(np.array([far]))
    before, after = quotas.counts(far), quotas.counts(far + 1)
    assert number == before[branch]
    assert [b - a for a, b in zip(before, after)] == [int(i == branch) for i in range(3)]


def test_parts_per_million_sum_to_a_million_and_are_nearest() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 6, 7, 30, 1000):
        for _ in range(50):
            weights = generator.uniform(0.01, 1, count).tolist()
            parts = parts_per_million(weights)
            assert sum(parts) == MILLION
            for part, weight in zip(parts, weights):
                assert abs(part - weight / sum(weights) * MILLION) < 1
    assert parts_per_million([0.95, 0.05]) == [950_000, 50_000]
    assert parts_per_million([19, 1]) == [950_000, 50_000]
    assert parts_per_million([1, 1, 1]) == [333_334, 333_333, 333_333]


def test_a_weight_below_a_millionth_is_refused() -> None:
    with pytest.raises(UserError, match=r"weight 1e-07 is below a millionth"):
        parts_per_million([0.5, 1e-7, 0.5])


# Three sets of ragged documents; 211, 96 and 40 windows or so of 7 tokens.
SEQ_LEN = 7


@pytest.fixture(scope="module")
def sets(tmp_path_factory, write_shards: Callable, random_documents: Callable) -> dict[str, ShardSet]:
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: write_shards(folder / name, random_documents(seed, count), pairs=pairs)
        for seed, (name, count, pairs) in enumerate([("a", 70, 3), ("b", 33, 1), ("c", 14, 2)])
    }


def naive_windows(shard_set: ShardSet, seq_len: int) -> list[list[int]]:
    """Every window, from the `.bin` files as plain lists."""
    tokens: list[int] = []
    for path in sorted(shard_set.path.glob("*.bin")):
        tokens += np.frombuffer(path.read_bytes(), shard_set.dtype).tolist()
    return [tokens[start : start + seq_len + 1] for start in range(0, len(tokens) - seq_len, seq_len)]


def phase(first: int, sets: dict[str, ShardSet], weights: dict[str, int], start: dict[str, int] | None = None) -> Phase:
    started = start or {}
    return Phase(
        first,
        tuple(
            PhaseSource(name, sets[name].fingerprint, weight, started.get(sets[name].fingerprint, 0))
            for name, weight in weights.items()
        ),
    )


WEIGHTS = {"a": 700_000, "b": 250_001, "c": 49_999}


def test_windows_are_those_of_the_concatenated_tokens(sets: dict[str, ShardSet]) -> None:
    expected = {name: naive_windows(shard_set, SEQ_LEN) for name, shard_set in sets.items()}
    assert {name: len(windows) for name, windows in expected.items()} == {
        name: shard_set.num_windows(SEQ_LEN) for name, shard_set in sets.items()
    }
    mixture = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)
    places = mixture.locate(0, 900)
    assert {name for name, _ in places} == set(sets)
    assert mixture.windows(0, 900).tolist() == [expected[name][window] for name, window in places]


def test_pread_and_mmap_read_the_same(sets: dict[str, ShardSet]) -> None:
    mapped = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5).windows(3, 200)
    others = {name: ShardSet(shard_set.path, "pread") for name, shard_set in sets.items()}
    assert np.array_equal(Mixture(others, [phase(0, others, WEIGHTS)], SEQ_LEN, seed=5).windows(3, 200), mapped)


def test_nothing_repeats_in_an_epoch_and_epochs_differ_in_order(sets: dict[str, ShardSet]) -> None:
    mixture = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)
    orders: dict[str, list[int]] = {name: [] for name in sets}
    for name, window in mixture.locate(0, 2000):
        orders[name].append(window)
    for name, order in orders.items():
        size = sets[name].num_windows(SEQ_LEN)
        epochs = [order[start : start + size] for start in range(0, len(order), size)]
        assert len(epochs) >= 3
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(size))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1] and epochs[0] != list(range(size))
    assert [len(orders[name]) for name in WEIGHTS] == Quotas(list(WEIGHTS.values())).counts(2000)


def test_order_does_not_depend_on_how_the_counter_is_cut(sets: dict[str, ShardSet]) -> None:
    whole = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5).windows(0, 400)
    fresh = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)
    cuts = [0, 1, 4, 37, 38, 38, 250, 399, 400]
    pieces = [fresh.windows(low, high - low) for low, high in reversed(list(itertools.pairwise(cuts)))]
    assert np.array_equal(np.concatenate(pieces[::-1]), whole)


def test_order_depends_on_the_seed_and_not_on_names(sets: dict[str, ShardSet]) -> None:
    def places(seed: int, seq_len: int = SEQ_LEN) -> list[tuple[str, int]]:
        return Mixture(sets, [phase(0, sets, WEIGHTS)], seq_len, seed).locate(0, 300)

    assert places(5) == places(5)
    assert [name for name, _ in places(5)] == [name for name, _ in places(6)], "the shares are not random"
    # Independent permutations of n windows agree at about one place in n; 300 samples, 40 windows and more.
    assert sum(one == other for one, other in zip(places(5), places(6))) < 30

    renamed = {f"new-{name}": shard_set for name, shard_set in sets.items()}
    weights = {f"new-{name}": weight for name, weight in WEIGHTS.items()}
    expected = [(f"new-{name}", window) for name, window in places(5)]
    assert Mixture(renamed, [phase(0, renamed, weights)], SEQ_LEN, 5).locate(0, 300) == expected


def build_phases(sets: dict[str, ShardSet], plan: list[tuple[int, dict[str, int]]]) -> list[Phase]:
    """As a chain of branches makes them: each phase starts where the mixture before it stands."""
    phases: list[Phase] = []
    for first, weights in plan:
        start = Mixture(sets, phases, SEQ_LEN, 5).seen(first) if phases else {}
        phases.append(phase(first, sets, weights, start))
    return phases


PLANS = {
    "another ratio": [(0, {"a": 900_000, "b": 100_000}), (133, {"a": 500_000, "b": 500_000})],
    "a new source": [(0, {"a": MILLION}), (57, {"a": 600_000, "c": 400_000})],
    "dropped and added again": [
        (0, {"a": 500_000, "b": 500_000}),
        (101, {"a": MILLION}),
        (260, {"b": 300_000, "a": 600_000, "c": 100_000}),
    ],
    "twice at one place": [(0, {"a": MILLION}), (40, {"b": MILLION}), (40, {"a": 500_000, "b": 500_000})],
}


@pytest.mark.parametrize("name", PLANS)
def test_a_changed_mixture_repeats_and_skips_nothing(sets: dict[str, ShardSet], name: str) -> None:
    phases = build_phases(sets, PLANS[name])
    mixture = Mixture(sets, phases, SEQ_LEN, seed=5)
    sequences: dict[str, list[int]] = {key: [] for key in sets}
    for source, window in mixture.locate(0, 700):
        sequences[source].append(window)
    for source, sequence in sequences.items():
        alone = Mixture(sets, [phase(0, sets, {source: MILLION})], SEQ_LEN, seed=5).locate(0, len(sequence))
        assert sequence == [window for _, window in alone], f"{source} must go on where it stood"
    assert mixture.locate(0, 700) == [place for first in range(0, 700, 35) for place in mixture.locate(first, 35)]


@pytest.mark.parametrize("name", PLANS)
def test_seen_is_the_tally_of_all_samples_before(sets: dict[str, ShardSet], name: str) -> None:
    mixture = Mixture(sets, build_phases(sets, PLANS[name]), SEQ_LEN, seed=5)
    places = mixture.locate(0, 400)
    for samples in (0, 1, 39, 40, 41, 57, 58, 100, 101, 102, 133, 134, 259, 260, 261, 333, 400):
        tally = Counter(sets[source].fingerprint for source, _ in places[:samples])
        assert {key: count for key, count in mixture.seen(samples).items() if count} == dict(tally)


def test_phases_survive_a_checkpoint(sets: dict[str, ShardSet]) -> None:
    for plan in PLANS.values():
        phases = build_phases(sets, plan)
        assert [Phase.from_dict(value) for value in json.loads(json.dumps([asdict(p) for p in phases]))] == phases


def test_wide_ids_are_read_as_they_are(tmp_path: Path, write_shards: Callable) -> None:
    wide = write_shards(tmp_path / "wide", [[70_000, 5, 69_999], [3] * 9], vocab_size=70_001, dtype=np.int32)
    windows = Mixture({"wide": wide}, [phase(0, {"wide": wide}, {"wide": MILLION})], 3, 0).windows(0, 4)
    assert windows.dtype == np.int32
    assert sorted(windows.tolist()) == sorted(naive_windows(wide, 3))


def test_impossible_mixtures_are_refused(sets: dict[str, ShardSet], tmp_path: Path, write_shards: Callable) -> None:
    short = write_shards(tmp_path / "short", [[1, 2, 3], [4, 5]])
    assert len(short) == SEQ_LEN
    with pytest.raises(UserError, match=rf"{short.path}: 7 tokens, fewer than one sequence of 7 \+ 1"):
        Mixture({"short": short}, [phase(0, {"short": short}, {"short": MILLION})], SEQ_LEN, 0)
    with pytest.raises(UserError, match="fewer than one sequence"):
        evaluation_windows(short, SEQ_LEN, 100)
    assert Mixture({"s": short}, [phase(0, {"s": short}, {"s": MILLION})], 6, 0).windows(0, 1).shape == (1, 7)

    wide = write_shards(tmp_path / "wide", [[1] * 30], dtype=np.int32)
    mixed = {"a": sets["a"], "wide": wide}
    with pytest.raises(UserError, match=r"\['a', 'wide'\] hold ids of different types \['int32', 'uint16'\]"):
        Mixture(mixed, [phase(0, mixed, {"a": 500_000, "wide": 500_000})], SEQ_LEN, 0)

    twice = {"a": sets["a"], "again": ShardSet(sets["a"].path)}
    with pytest.raises(UserError, match=r"\['a', 'again'\] hold the same set twice; add up their weights"):
        Mixture(twice, [phase(0, twice, {"a": 500_000, "again": 500_000})], SEQ_LEN, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("first", "steps", "batch"), [(0, 4, 10), (17, 3, 7), (123, 1, 5), (40, 0, 6)])
def test_ranks_together_take_the_batch_in_order(
    sets: dict[str, ShardSet], world: int, first: int, steps: int, batch: int
) -> None:
    def mixture() -> Mixture:
        return Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)

    per_rank = [list(batches(mixture(), first, steps, batch, rank, world)) for rank in range(world)]
    assert [len(parts) for parts in per_rank] == [steps] * world
    for step in range(steps):
        together = np.concatenate([parts[step] for parts in per_rank])
        assert np.array_equal(together, mixture().windows(first + step * batch, batch))
        sizes = [len(parts[step]) for parts in per_rank]
        assert max(sizes) - min(sizes) <= 1


def test_batches_from_a_later_step_are_the_tail(sets: dict[str, ShardSet]) -> None:
    mixture = Mixture(sets, build_phases(sets, PLANS["dropped and added again"]), SEQ_LEN, seed=5)
    whole = list(batches(mixture, 0, 40, 9, rank=1, world=2))
    for done in (1, 13, 39):
        tail = list(batches(mixture, done * 9, 40 - done, 9, rank=1, world=2))
        assert np.array_equal(np.concatenate(tail), np.concatenate(whole[done:]))


def test_a_loop_that_stops_early_leaves_no_thread_behind(sets: dict[str, ShardSet]) -> None:
    mixture = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)
    running = batches(mixture, 0, 10, 4, rank=0, world=1)
    next(running)
    running.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_a_damaged_shard_is_raised_in_the_loop(tmp_path: Path, write_shards: Callable) -> None:
    shard_set = write_shards(tmp_path / "set", [[5] * 40], pairs=1)
    mixture = Mixture({"s": shard_set}, [phase(0, {"s": shard_set}, {"s": MILLION})], SEQ_LEN, 0)
    running = batches(mixture, 0, 10, 2, rank=0, world=1)
    next(running)
    binary = shard_set.path / "shard-00000.bin"
    os.truncate(binary, 80)
    with pytest.raises(UserError, match=rf"{binary}: 80 bytes while reading at [0-9,]+, it had 82"):
        list(running)


def test_evaluation_windows_are_fixed_spread_and_distinct(sets: dict[str, ShardSet]) -> None:
    shard_set = sets["a"]
    size = shard_set.num_windows(SEQ_LEN)
    chosen = evaluation_windows(shard_set, SEQ_LEN, 20 * SEQ_LEN)
    assert np.array_equal(chosen, evaluation_windows(ShardSet(shard_set.path, "pread"), SEQ_LEN, 20 * SEQ_LEN))
    assert len(chosen) == 20 and (np.diff(chosen.astype(np.int64)) > 0).all() and chosen.max() < size
    # Of 20 uniform draws without replacement none in the first or the last quarter has a probability of 2 * 0.75^20.
    assert chosen.min() < size / 4 and chosen.max() > 3 * size / 4
    assert len(evaluation_windows(shard_set, SEQ_LEN, 20 * SEQ_LEN + 1)) == 21, "rounded up to whole windows"
    assert len(evaluation_windows(shard_set, SEQ_LEN, 1)) == 1
    assert set(chosen) <= set(evaluation_windows(shard_set, SEQ_LEN, 40 * SEQ_LEN)), "more tokens add windows"
    for tokens in (size * SEQ_LEN, 10**15):
        assert evaluation_windows(shard_set, SEQ_LEN, tokens).tolist() == list(range(size))


def scalar_locate(quotas: Quotas, index: int) -> tuple[int, int]:
    """`Quotas.locate` of one sample, on Python's integers."""
    node = quotas._tree
    while not isinstance(node, int):
        weight, left, whole, right = node
        before = (2 * index * weight + whole) // (2 * whole)
        after = (2 * (index + 1) * weight + whole) // (2 * whole)
        node, index = (left, before) if after > before else (right, index - before)
    return node, index


@pytest.mark.parametrize("count", [1, 2, 3, 5, 30])
def test_arrays_are_located_as_single_samples_are(count: int) -> None:
    generator = np.random.default_rng(count)
    for _ in range(5):
        quotas = Quotas(random_weights(generator, count))
        far = generator.integers(0, 2**42 - 1, 300)
        indexes = np.concatenate((np.arange(257), far, far + 1, [2**42 - 1, 2**42 - 1]))
        generator.shuffle(indexes)
        branches, numbers = quotas.locate(indexes)
        expected = [scalar_locate(quotas, i) for i in indexes.tolist()]
        assert list(zip(branches.tolist(), numbers.tolist())) == [quotas.one(i) for i in indexes.tolist()] == expected
    assert [each.shape for each in quotas.locate(np.empty(0, np.int64))] == [(0,), (0,)]


@pytest.mark.parametrize("size", [*SIZES, 2**40 + 1, 2**62 - 1])
def test_one_image_is_that_of_the_array(size: int) -> None:
    permutation = Permutation(size, ("one", size))
    indexes = np.unique(np.random.default_rng(size).integers(0, size, 200))
    assert [permutation.one(index) for index in indexes.tolist()] == permutation(indexes).tolist()


@pytest.mark.parametrize("name", PLANS)
def test_a_seek_finds_what_reading_on_finds(
    sets: dict[str, ShardSet], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few samples are placed with integers, more with numpy; both over ends of phases and epochs, near and far."""

    def mixture() -> Mixture:
        return Mixture(sets, build_phases(sets, PLANS[name]), SEQ_LEN, seed=5)

    for start in (0, 10**9):
        monkeypatch.setattr(data, "FEW", 0)
        whole = mixture()
        whole.locate(start, 1)
        expected = whole.locate(start, 700)
        monkeypatch.undo()
        for count in (1, 2, data.FEW, data.FEW + 1, 50):
            for first in range(0, 650, 31):
                assert mixture().locate(start + first, count) == expected[first : first + count]


def test_a_seek_places_no_more_than_it_asks_for(sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    real = Mixture._place
    monkeypatch.setattr(Mixture, "_place", lambda self, *of: placed.append(of) or real(self, *of))
    mixture = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)
    for first in (10**6, 10**6 + 20, 10**6 + 3, 0):
        mixture.windows(first, 3)
    start = 10**6 // data.PLACED * data.PLACED
    assert placed == [(0, 10**6, 3), (0, start, data.PLACED), (0, 0, 3)]


@pytest.mark.parametrize("name", PLANS)
def test_blocks_of_places_have_no_seams(sets: dict[str, ShardSet], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of samples is placed at once; phases end within blocks."""
    monkeypatch.setattr(data, "PLACED", 1)
    one = Mixture(sets, build_phases(sets, PLANS[name]), SEQ_LEN, seed=5)
    expected, numbers = one.locate(0, 700), one.source_numbers(0, 700)
    assert numbers.tolist() == [list(sets).index(source) for source, _ in expected]
    for size in (2, 7, 64, 1024):
        monkeypatch.setattr(data, "PLACED", size)
        mixture = Mixture(sets, build_phases(sets, PLANS[name]), SEQ_LEN, seed=5)
        for first, count in ((0, 700), (56, 3), (133, 1), (263, 300), (699, 1), (300, 0)):
            assert mixture.locate(first, count) == expected[first : first + count]
            assert np.array_equal(mixture.source_numbers(first, count), numbers[first : first + count])


def test_the_thread_that_reads_makes_batches_ready(sets: dict[str, ShardSet]) -> None:
    """As it pins memory on a GPU: each batch once, before the step that takes it asks for it."""
    mixture = Mixture(sets, [phase(0, sets, WEIGHTS)], SEQ_LEN, seed=5)
    threads = []

    def ready(windows: np.ndarray) -> list:
        threads.append(threading.current_thread().name)
        return windows.tolist()

    plain = [windows.tolist() for windows in batches(mixture, 3, 4, 6, 0, 1)]
    assert list(batches(mixture, 3, 4, 6, 0, 1, ready)) == plain
    assert len(threads) == 4 and all(name.startswith("data") for name in threads)
