"""Reading at scale: a sparse set of 250B tokens by counts, and the bench of it at small sizes."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcpt import blocks, cli
from fastcpt.benchmarks import bench_data
from fastcpt.data import Permutation
from fastcpt.shards import MANIFEST, ShardSet

TAIL = np.random.default_rng(0).integers(1, 50_000, 3 * 2048 + 5).astype(np.uint16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 GB of apparent size, 250 pairs."""
    return bench_data.sparse_set(tmp_path_factory.mktemp("large") / "set", 250, 10**9, TAIL).path


def test_opening_reads_the_manifest_and_no_more(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(path.stat().st_size for path in large.glob("*.bin")) == 500 * 10**9
    assert sum(512 * path.stat().st_blocks for path in large.iterdir()) < 200e6
    opened: list[str] = []
    real_open, real_read = os.open, Path.read_bytes
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(Path(path).name) or real_open(path, *rest))
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or real_read(path))
    shards = ShardSet(large)
    assert opened == [MANIFEST] and (large / MANIFEST).stat().st_size < 100_000
    assert len(shards) == 250 * 10**9
    last = shards.num_windows(2048) - 1
    shards.windows(np.array([last, last]), 2048)
    assert opened == [MANIFEST, "shard-00249.bin", "shard-00249.sums"]


def place_of(window: int, order: Permutation) -> int:
    """The number whose image is `window`: the network backwards, on Python's integers."""
    half, mask, bits = int(order.half), int(order.mask), 2**64 - 1
    while True:
        left, right = window >> half, window & mask
        for key in reversed([int(key) for key in order.keys]):
            mixed = left ^ key
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & bits
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & bits
            left, right = right ^ ((mixed ^ mixed >> 31) & mask), left
        window = left << half | right
        if window < order.size:
            return window


@pytest.mark.parametrize("back", [0, 1, 2])
def test_samples_of_the_last_pair_are_found_by_number(large: Path, back: int) -> None:
    mixture = bench_data.mixed(ShardSet(large), seq_len=2048)
    (shards,) = mixture.sets.values()
    window = shards.num_windows(2048) - 1 - back
    sample = place_of(window, Permutation(shards.num_windows(2048), (0, 2048, shards.fingerprint, 0)))
    assert mixture.locate(sample, 1) == [("0", window)]
    before = len(shards) - window * 2048 - len(TAIL)
    expected = np.concatenate((np.zeros(max(0, before), np.uint16), TAIL[max(0, -before) :]))[:2049]
    assert np.array_equal(mixture.windows(sample, 1)[0], expected) and expected.any()


def test_memory_stays_flat(large: Path) -> None:
    """Over windows in all pairs: what is kept is hashes, and a byte for each block."""
    mixture = bench_data.mixed(ShardSet(large), seq_len=2048)
    (shards,) = mixture.sets.values()
    shards.windows(np.arange(250) * (10**9 // 2048) + 5, 2048)  # every pair's hashes
    mixture.windows(0, 1000)
    before = bench_data.status_mb("VmRSS")
    for first in range(1000, 13_000, 4):
        mixture.windows(first, 4)
    kept = sum(file._hashes.nbytes + len(file._checked) for file in shards._files)
    assert kept == 9 * 250 * -(-2 * 10**9 // blocks.BLOCK_BYTES)
    # The bytes of blocks lie in 8 pages a pair, most of them touched before. Without `release` it is 12,000 x 64 KiB.
    assert bench_data.status_mb("VmRSS") - before < 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {
        "PAIRS": 3, "PAIR_TOKENS": 50_001, "REAL_TOKENS": 70_001, "SEQ_LEN": 64, "SHAPES": ((3, 32),), "OPENINGS": 2,
        "SEEKS": 5, "MEMORY_BATCHES": 100, "SECONDS": 0.0, "CALLS": 2, "FEWEST": 2, "STEPS": 2, "STEP_SECONDS": 0.001,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(bench_data, name, value)


def test_the_bench_from_end_to_end(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "data", "--output", str(tmp_path / "results")]) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "results" / "data.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["what", "case", "value", "unit", "target"] and rows[0]["date"] and rows[0]["device"]
    cases = [(row["what"], row["case"]) for row in rows]
    assert len(cases) == len(set(cases)) == 22
    values = {case: float(row["value"]) for case, row in zip(cases, rows)}
    assert all(row["what"] in printed and row["case"] in printed for row in rows)
    speed = "tokens a second a core"
    rival = values[speed, "3 x 32, nanoGPT get_batch"]
    for name in ("fastcpt, mmap", "fastcpt, pread"):
        ratio = values["nanoGPT's time to ours", f"3 x 32, {name}"]
        assert ratio == pytest.approx(values[speed, f"3 x 32, {name}"] / rival, rel=1e-3)


def test_what_is_wrong_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_data, "milliseconds", lambda _: pytest.fail("timed"))
    pieces = ShardSet.pieces

    def wrong(self: ShardSet, indexes: np.ndarray, seq_len: int) -> list[bytes]:
        *others, last = map(bytes, pieces(self, indexes, seq_len))
        return [*others, last[:-1] + bytes([last[-1] ^ 1])]

    monkeypatch.setattr(ShardSet, "pieces", wrong)
    with pytest.raises(AssertionError, match="wrong and is not timed"):
        bench_data.main(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_rivals_batch_is_that_of_its_file(tmp_path: Path) -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    inputs, targets = bench_data.nanogpt(tmp_path / "train.bin", 7, 33)
    assert inputs.shape == targets.shape == (7, 33) and inputs.dtype.is_floating_point is False
    assert (inputs[:, 1:] == inputs[:, :-1] + 1).all() and (targets == inputs + 1).all()
