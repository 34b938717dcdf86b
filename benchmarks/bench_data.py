"""Times reading: opening and seeking in a set of 250B tokens, memory, and batches beside nanoGPT's. `fastcpt bench data`.

    python -m fastcpt.benchmarks.bench_data [--output FOLDER]

The large set is sparse: 250 pairs of 1e9 tokens, nearly all zeros that take no disk, with real hashes. What is compared
with a rival is read from a file of real tokens that the system has in memory; one thread reads. Everything is checked
against plain numpy before anything is timed.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcpt.benchmarks.timing import facts
from fastcpt.data import MILLION, Mixture, Phase, PhaseSource, batches
from fastcpt.integrity import block_hash, file_hashes, sha256_file
from fastcpt.shards import BLOCK_BYTES, PairWriter, ShardSet, index_bytes, write_manifest

PAIRS, PAIR_TOKENS = 250, 10**9  # of the sparse set
REAL_TOKENS = 50_000_000  # of each of the two real sets, 100 MB
SEQ_LEN = 2048
SHAPES = ((8, 1024), (64, 1024), (8, 2048), (64, 2048))  # windows a batch, tokens a window
OPENINGS, SEEKS = 30, 500
MEMORY_BATCHES, MEMORY_BATCH = 100_000, 4
SECONDS = 3.0  # of timed runs a shape
CALLS, FEWEST = 10, 5  # batches a timed run, runs
STEPS, STEP_SECONDS = 200, 0.02
DTYPE = np.dtype(np.uint16)
TOKENIZER: dict[str, Any] = {"fingerprint": "bench", "vocab_size": 50_304, "eod": 0, "eod_token": "<|endoftext|>"}


@dataclass(frozen=True)
class Row:
    """One measured number; target: what it should be."""

    what: str
    case: str
    value: float
    unit: str
    target: str = ""


def sparse_set(folder: Path, pairs: int, tokens: int, tail: np.ndarray) -> ShardSet:
    """A set of `pairs` pairs of `tokens` tokens, all zeros but for its last tokens, `tail` (n,) uint16, on little disk."""
    folder.mkdir(parents=True)
    entries = []
    zero = block_hash(bytes(BLOCK_BYTES))
    for number in range(pairs):
        name, size = f"shard-{number:05}", tokens * DTYPE.itemsize
        written = tail.nbytes if number == pairs - 1 else 0
        with open(folder / f"{name}.bin", "w+b") as file:
            file.truncate(size)
            file.seek(size - written)
            file.write(tail.tobytes()[:written])
            hashes = np.full(-(-size // BLOCK_BYTES), zero, "<u8")
            for index in range((size - max(written, 1)) // BLOCK_BYTES, len(hashes)):
                file.seek(index * BLOCK_BYTES)
                hashes[index] = block_hash(file.read(BLOCK_BYTES))
        index_path, sums_path = folder / f"{name}.idx", folder / f"{name}.sums"
        index_path.write_bytes(index_bytes(DTYPE, np.array([tokens], np.int32)))
        sums_path.write_bytes(hashes.tobytes() + file_hashes(index_path, BLOCK_BYTES).tobytes())
        entries.append({
            "name": name, "tokens": tokens, "documents": 1, "bin_bytes": size,
            "idx_bytes": index_path.stat().st_size, "sums_sha256": sha256_file(sums_path),
        })  # fmt: skip
    write_manifest(folder, tokenizer=TOKENIZER, dtype=DTYPE, text_bytes=0, pairs=entries, files=[])
    return ShardSet(folder)


def real_set(folder: Path, sizes: Sequence[int], seed: int, vocab_size: int = TOKENIZER["vocab_size"]) -> ShardSet:
    """A set of random tokens; sizes: tokens of each pair."""
    folder.mkdir(parents=True)
    generator, entries = np.random.default_rng(seed), []
    for number, size in enumerate(sizes):
        writer = PairWriter(folder, f"shard-{number:05}", DTYPE)
        writer.write(generator.integers(1, vocab_size, size).astype(DTYPE), np.array([size], np.int32))
        entries.append(writer.close())
    tokenizer = {**TOKENIZER, "vocab_size": vocab_size}
    write_manifest(folder, tokenizer=tokenizer, dtype=DTYPE, text_bytes=0, pairs=entries, files=[])
    return ShardSet(folder)


def mixed(*sets: ShardSet, seq_len: int) -> Mixture:
    """One set, or two in shares of 95% and 5%."""
    weights = (MILLION,) if len(sets) == 1 else (950_000, 50_000)
    named = {str(number): shard_set for number, shard_set in enumerate(sets)}
    sources = (PhaseSource(name, each.fingerprint, weight, 0) for (name, each), weight in zip(named.items(), weights))
    return Mixture(named, [Phase(0, tuple(sources))], seq_len, seed=0)


def check(folder: Path, sparse: ShardSet, tail: np.ndarray) -> None:
    """Raises AssertionError unless windows are slices of the concatenated files, and the sparse set ends in its tail."""
    made = [real_set(folder / f"check-{seed}", sizes, seed) for seed, sizes in enumerate(([50_001, 7, 30_000], [9001]))]
    tokens = [np.concatenate([np.fromfile(path, DTYPE) for path in sorted(each.path.glob("*.bin"))]) for each in made]
    for reader in ("mmap", "pread"):
        mixture = mixed(*(ShardSet(each.path, reader) for each in made), seq_len=63)
        found = mixture.windows(0, 1000)
        for row, (name, window) in zip(found, mixture.locate(0, 1000), strict=True):
            expected = tokens[int(name)][window * 63 : window * 63 + 64]
            assert np.array_equal(row, expected), f"data: a window of {reader} is wrong and is not timed"
    last = sparse.num_windows(SEQ_LEN) - 1
    before = len(sparse) - last * SEQ_LEN - len(tail)  # zeros of the last window, or tokens of the tail before it
    expected = np.concatenate((np.zeros(max(0, before), DTYPE), tail[max(0, -before) :]))[: SEQ_LEN + 1]
    found = sparse.windows(np.array([last]), SEQ_LEN)[0]
    assert np.array_equal(found, expected), "data: the last window of the sparse set is wrong and is not timed"


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def spread(what: str, case: str, times: list[float], target: str) -> list[Row]:
    """Median and 99th percentile of milliseconds."""
    return [
        Row(what, f"{case}, {name}", float(np.quantile(times, share)), "ms", target)
        for name, share in (("median", 0.5), ("99%", 0.99))
    ]


def opening(path: Path) -> list[Row]:
    ShardSet(path)
    times = [milliseconds(lambda: ShardSet(path)) for _ in range(OPENINGS)]
    return [Row("open", "250B tokens, median", statistics.median(times), "ms", "< 50")]


def seeking(path: Path) -> list[Row]:
    """One sample at a random place: in blocks that were never touched, then the same ones again."""
    mixture = mixed(ShardSet(path), seq_len=SEQ_LEN)
    samples = np.random.default_rng(0).integers(0, next(iter(mixture.sets.values())).num_windows(SEQ_LEN), SEEKS)
    mixture.windows(0, 1)
    rows = []
    for case in ("new block", "touched block"):
        times = [milliseconds(lambda: mixture.windows(sample, 1)) for sample in samples.tolist()]  # noqa: B023
        rows += spread("seek and read a sample", case, times, "< 1")
    return rows


def status_mb(name: str) -> float:
    """VmRSS or VmPTE of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(name)


def memory(path: Path) -> list[Row]:
    """Resident memory and page tables while batches are read all over the set."""
    mixture = mixed(ShardSet(path), seq_len=SEQ_LEN)
    seen = {}
    for number in range(1, MEMORY_BATCHES + 1):
        mixture.windows(number * MEMORY_BATCH, MEMORY_BATCH)
        if number * 100 % MEMORY_BATCHES == 0:
            seen[number * 100 // MEMORY_BATCHES] = status_mb("VmRSS"), status_mb("VmPTE")
    case = f"{MEMORY_BATCHES:,} batches of {MEMORY_BATCH} x {SEQ_LEN}"
    rows = [Row("resident memory", f"{case}, at {percent}%", seen[percent][0], "MB") for percent in (1, 10, 50, 100)]
    rows.append(Row("resident memory", f"{case}, growth after 10%", seen[100][0] - seen[10][0], "MB", "< 1"))
    rows.append(Row("page tables", f"{case}, growth after 10%", seen[100][1] - seen[10][1], "MB", "< 1"))
    return rows


def nanogpt(path: Path, batch: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as nanoGPT's train.py makes it: the file mapped anew, random starts, inputs and targets as int64."""
    data = np.memmap(path, dtype=DTYPE, mode="r")
    starts = torch.randint(len(data) - seq_len, (batch,)).tolist()
    inputs = torch.stack([torch.from_numpy(data[start : start + seq_len].astype(np.int64)) for start in starts])
    targets = torch.stack(
        [torch.from_numpy(data[start + 1 : start + 1 + seq_len].astype(np.int64)) for start in starts]
    )
    return inputs, targets


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of a core, in user and kernel mode, that each of CALLS calls took: not of what else the machine did."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[next(iter(calls))]) < FEWEST:
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            times[name].append((time.thread_time() - start) * 1000 / CALLS)
    return times


def throughput(sets: Sequence[ShardSet], batch: int, seq_len: int) -> list[Row]:
    """Tokens a second of one thread, in turns, from blocks that were touched before."""
    counter = 0

    def ours(mixture: Mixture) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            nonlocal counter
            counter += batch
            return mixture.windows(counter, batch)

        return read

    def widened(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(windows.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    mixtures = {}
    for reader in ("mmap", "pread"):
        mixtures[reader] = mixed(*(ShardSet(each.path, reader) for each in sets), seq_len=seq_len)
        for each in mixtures[reader].sets.values():
            touch(each)
    file = next(sets[0].path.glob("*.bin"))
    mapped, read = ours(mixtures["mmap"]), ours(mixtures["pread"])
    calls: dict[str, Callable[[], object]] = {
        "fastcpt, mmap": mapped,
        "fastcpt, pread": read,
        "fastcpt, mmap, int64 inputs and targets": lambda: widened(mapped()),
        "nanoGPT get_batch": lambda: nanogpt(file, batch, seq_len),
    }
    # Not the medians: what is done once for many batches would be in none of them.
    means = {name: statistics.fmean(times) for name, times in in_turns(calls).items()}
    case = f"{batch} x {seq_len}"
    rows = [
        Row("tokens a second a core", f"{case}, {name}", batch * seq_len / mean * 1000, "tokens/s")
        for name, mean in means.items()
    ]
    for name in list(means)[:3]:
        target = "" if "int64" in name else ">= 5"
        rows.append(
            Row("nanoGPT's time to ours", f"{case}, {name}", means["nanoGPT get_batch"] / means[name], "x", target)
        )
    return rows


def touch(shard_set: ShardSet) -> float:
    """Reads one window in each block; the milliseconds that took."""
    step = BLOCK_BYTES // DTYPE.itemsize // 32  # a window of 1/32 of a block
    indexes = np.arange(0, shard_set.num_windows(step), 32)
    return milliseconds(
        lambda: [shard_set.windows(part, step) for part in np.array_split(indexes, -(-len(indexes) // 64))]
    )


def first_touch(path: Path) -> list[Row]:
    """What comparing blocks with their hashes costs, once: first readings less second ones."""
    costs = []
    for _ in range(5):
        shard_set = ShardSet(path)
        costs.append((touch(shard_set) - touch(shard_set)) / len(shard_set))
    cost = statistics.median(costs)  # ms a token
    return [
        Row("first touch of a block", "rate", DTYPE.itemsize / cost / 1000, "MB/s"),
        Row("first touch of a block", "once a token", cost * 1e6, "ns"),
    ]


def waiting(path: Path, case: str) -> list[Row]:
    """Share of the time that a loop waits for `batches`, when each step computes for 20 ms without holding the GIL."""
    mixture = mixed(ShardSet(path), seq_len=SEQ_LEN)
    matrix = torch.rand(512, 512)
    ahead = batches(mixture, 0, STEPS + 1, 16, 0, 1)
    next(ahead)
    waits, start = 0.0, time.perf_counter()
    for _ in range(STEPS):
        end = time.perf_counter() + STEP_SECONDS
        while time.perf_counter() < end:
            matrix @ matrix
        waits += milliseconds(lambda: next(ahead))
    whole = (time.perf_counter() - start) * 1000
    return [
        Row(
            "share of a step spent waiting",
            f"{STEP_SECONDS * 1000:g} ms steps of 16 x {SEQ_LEN}, {case}",
            100 * waits / whole,
            "%",
            "< 0.1",
        )
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [("", "", "", "target")]
    for row in rows:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
        lines.append((row.what, row.case, f"{value} {row.unit}", row.target))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(output: Path | None = None) -> None:
    """Prints a table; writes output/data.csv. Raises AssertionError, before anything is timed, if what is read is wrong."""
    about = facts(torch.device("cpu"))
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fastcpt-bench-") as name:
            rows = measured(Path(name))
    finally:
        torch.set_num_threads(threads)
    print(table(rows), flush=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "data.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *about], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**asdict(row), "value": f"{row.value:.5g}", **about} for row in rows)
        print(f"written: {output / 'data.csv'}", flush=True)


def measured(folder: Path) -> list[Row]:
    """All rows; the sets are made in `folder`."""
    tail = np.random.default_rng(1).integers(1, 50_304, 3 * SEQ_LEN + 5).astype(DTYPE)
    sparse = sparse_set(folder / "sparse", PAIRS, PAIR_TOKENS, tail)
    check(folder, sparse, tail)
    real = [real_set(folder / f"real-{seed}", [REAL_TOKENS], seed) for seed in range(2)]
    rows = opening(sparse.path)
    rows += seeking(sparse.path)
    for batch, seq_len in SHAPES:
        rows += throughput(real, batch, seq_len)
    rows += first_touch(real[0].path)
    rows += waiting(real[0].path, "files in memory") + waiting(sparse.path, "new blocks")
    return rows + memory(sparse.path)


def command(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write FOLDER/data.csv")
    main(parser.parse_args(arguments).output)


if __name__ == "__main__":
    command()
