"""From a training step back to its documents: `fastcpt inspect RUN --step N`. Needs numpy alone, and no GPU.

Which windows a step reads is a pure function of the run's phases and of a sample counter (`data.py`); which documents
lie in a window is in the `.idx` files, whose pointers are found by bisection in the mapped file: tracing a step of a
250B-token set reads a few pages of it. Which input file a document came from follows from `ledger.parquet`, since sets
hold the documents of their inputs in the ledger's order.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fastcpt import UserError
from fastcpt.data import Mixture, Phase
from fastcpt.integrity import DamagedError, check_file, check_size, read_json, read_sealed, sha256_file
from fastcpt.shards import HEADER_BYTES, ShardSet

# As in checkpoint.py, which imports torch.
CHECKPOINT_FORMAT, CHECKPOINT_BLOCK_BYTES = "fastcpt-checkpoint", 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a document came from. input: the file, as the ledger names it. number: its place, from 0, among the
    documents that this file gave to this set. line: its line or row in the file, from 1, where the ledger shows that
    every line became a document of this set; else None, because the ledger counts what was left out but not where."""

    input: str
    number: int
    line: int | None


@dataclass(frozen=True)
class Part:
    """Tokens [start, stop) of a document of `length` tokens, its end-of-document token included.

    pair: name of the shard. document: place in the pair, number: place in the set, both from 0.
    """

    pair: str
    document: int
    number: int
    start: int
    stop: int
    length: int
    origin: Place | None


@dataclass(frozen=True)
class Sample:
    """Sample `number` of the run: window `window` of the set of `source`, and the documents in it, in order.

    A window is seq_len + 1 tokens: the last is only predicted, and is the first of the set's next window.
    """

    number: int
    source: str
    window: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Step:
    """What optimizer step `step` reads. first, last: the run's steps. saved: that of the checkpoint that was read."""

    step: int
    first: int
    last: int
    saved: int
    samples: tuple[Sample, ...]
    mixture: Mixture


def _state(run: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, state.json) of a run's newest checkpoint, or of the checkpoint that `run` is. Checked before it is parsed.

    Any checkpoint of a run serves: its phases hold for all its steps. Raises UserError when there is none.
    """
    steps = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    newest_first = sorted((int(step) for step in steps if step.isdigit()), reverse=True)
    folders = [run / "checkpoints" / f"step-{step}" for step in newest_first]
    if not folders and (run / "state.json").exists():
        folders = [run]
    if not folders:
        raise UserError(
            "run-without-checkpoint",
            f"{run}: neither a run with a checkpoint nor a checkpoint; --step needs what one records",
        )
    for folder in folders:
        try:
            files = read_sealed(folder / "manifest.json", CHECKPOINT_FORMAT, "the checkpoint")["files"]
            entry = files["state.json"]
            hashes = np.array([int(value, 16) for value in entry["hashes"]], "<u8")
            check_file(folder / "state.json", entry["bytes"], hashes, CHECKPOINT_BLOCK_BYTES)
            return folder, read_json(folder / "state.json", "the state of a checkpoint")
        except DamagedError:
            if folder == folders[-1]:
                raise
    raise AssertionError("the last one is returned or raises")


def _paths(run: Path, folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """{source: shard set} as the run was last started: a resumed run may find its sets elsewhere."""
    import yaml

    sources = state["config"]["data"]["train"]
    if folder != run and (run / "config.yaml").exists():
        try:
            sources = yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(
                "run-config-damaged",
                f"{run / 'config.yaml'}: not a run's configuration ({' '.join(str(error).split())}); restore it",
            ) from None
    return {source["name"]: source["path"] for source in sources}


def _open(name: str, path: str | None, fingerprint: str, run: Path) -> ShardSet:
    if path is None:
        raise UserError(
            "source-renamed",
            f"{run / 'config.yaml'}: data.train no longer names {name!r}, which the run reads; restore it",
        )
    if not Path(path).is_dir():
        raise UserError(
            "source-moved",
            f"{path}: the run {run} read its source {name!r} there, and there is no such folder; put the set back or link "
            "it there (a relative path counts from the folder where the run was started)",
        )
    shards = ShardSet(path)
    if shards.fingerprint != fingerprint:
        raise UserError(
            "source-changed",
            f"{path}: not what the run {run} read as {name!r}: fingerprint {shards.fingerprint[:16]}, then "
            f"{fingerprint[:16]}; put that set back",
        )
    return shards


def locate(run: str | Path, step: int) -> Step:
    """What a step of a run reads, with the documents. run: a run's folder, or a checkpoint's.

    Raises UserError for a step that is not the run's, and for a set that is not there or not what it was.
    """
    run = Path(run)
    folder, state = _state(run)
    plan, data, train = state["plan"], state["data"], state["config"]["train"]
    first, last = plan["first"] + 1, plan["first"] + plan["steps"]
    if not first <= step <= last:
        before = ""
        if 0 < step < first:
            before = (
                f"; it branched off at step {first - 1}, ask the run it came from: {state['config']['init']['from']}"
            )
        raise UserError("step-not-of-run", f"--step {step}: the steps of {run} are {first} to {last}{before}")
    count = train["batch_tokens"] // data["seq_len"]
    # The counter is the checkpoint's, not step times batch: a branch counts on from a run with perhaps another batch.
    sample = data["samples"] + (step - 1 - state["step"]) * count
    phases = [Phase.from_dict(phase) for phase in data["phases"]]
    # A step lies in one phase, as phases begin with a step; those before a branch are not the run's.
    phase = [phase for phase in phases if phase.first <= sample][-1]
    paths = _paths(run, folder, state)
    sets = {
        source.name: _open(source.name, paths.get(source.name), source.fingerprint, run) for source in phase.sources
    }
    mixture = Mixture(sets, phases, data["seq_len"], data["seed"])
    documents = {name: _Documents(shards) for name, shards in sets.items()}
    samples = []
    for number, (name, window) in enumerate(mixture.locate(sample, count), sample):
        start = window * mixture.seq_len
        samples.append(Sample(number, name, window, tuple(documents[name].parts(start, start + mixture.seq_len + 1))))
    return Step(step, first, last, state["step"], tuple(samples), mixture)


class _Documents:
    """The documents of a set by token."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._firsts = np.cumsum([0, *(pair["documents"] for pair in shards.pairs)]).tolist()
        self._ledger = _Ledger(shards)
        self._pointers = cache(self._map)

    def _map(self, pair: int) -> np.ndarray:
        """Byte offsets of a pair's documents, (D,) int64, mapped and not read: tracing looks at a few of them."""
        entry = self._shards.pairs[pair]
        path, count = self._shards.path / f"{entry['name']}.idx", entry["documents"]
        if entry["idx_bytes"] < HEADER_BYTES + 20 * count + 8:
            raise DamagedError(
                "shard-index-disagrees",
                f"{path}: {entry['idx_bytes']:,} bytes are too few for {count:,} documents; restore it",
            )
        return np.memmap(path, "<i8", "r", HEADER_BYTES + 4 * count, (count,))

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The documents that tokens [start, stop) of the set lie in."""
        starts = self._shards.starts.tolist()
        pair = bisect.bisect_right(starts, start) - 1
        while start < stop:
            end = min(stop, starts[pair + 1])
            yield from self._parts_of_pair(pair, start - starts[pair], end - starts[pair])
            start = end
            pair += 1

    def _parts_of_pair(self, pair: int, start: int, stop: int) -> Iterator[Part]:
        """The same of one pair, counted from its own first token."""
        name, tokens, size = (
            self._shards.pairs[pair]["name"],
            self._shards.pairs[pair]["tokens"],
            self._shards.dtype.itemsize,
        )
        pointers = self._pointers(pair)
        document = bisect.bisect_right(range(len(pointers)), start * size, key=lambda index: int(pointers[index])) - 1
        while start < stop:
            if not 0 <= document < len(pointers):
                raise DamagedError(
                    "shard-index-disagrees",
                    f"{self._shards.path / name}.idx: no document holds token {start:,}; restore the file",
                )
            begin = int(pointers[document]) // size
            end = int(pointers[document + 1]) // size if document + 1 < len(pointers) else tokens
            if end > start:  # else an empty document, as a set that was converted from elsewhere may hold
                number, cut = self._firsts[pair] + document, min(end, stop)
                found = self._ledger.find(number)
                yield Part(name, document, number, start - begin, cut - begin, end - begin, found)
                start = cut
            document += 1


class _Ledger:
    """The input files of a set's documents, as far as its ledger tells.

    The ledger has a row for each input, in the order in which the set holds them, and each set that the input gave
    documents to. It is shared by the sets of one preparation and does not say which of them it lies in: that is the one
    with this set's counts, and where two have the same, the one that the folder is named after.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._rows: list[tuple[str, bool]] = []
        self._firsts = [0]
        table = _read_ledger(shards)
        totals: dict[str, list[int]] = {}
        lost: set[str] = set()  # inputs with lines that are no documents of one set alone
        sets_of: dict[str, set[str]] = {}
        for row in table:
            if row["set"] is None:
                lost.add(row["input"])
                continue
            sets_of.setdefault(row["input"], set()).add(row["set"])
            counts = totals.setdefault(row["set"], [0, 0, 0])
            for index, key in enumerate(("documents", "tokens", "text_bytes")):
                counts[index] += row[key]
        own = [shards.documents, len(shards), shards.manifest["text_bytes"]]
        names = [name for name, counts in totals.items() if counts == own]
        if len(names) > 1:
            names = [name for name in names if name and shards.path.resolve().name.endswith(f"-{name}")]
        if len(names) != 1:
            return
        for row in table:
            if row["set"] == names[0]:
                whole = row["input"] not in lost and len(sets_of[row["input"]]) == 1
                self._rows.append((row["input"], whole))
                self._firsts.append(self._firsts[-1] + row["documents"])

    def find(self, number: int) -> Place | None:
        """Of document `number` of the set; None where the ledger does not tell."""
        if not self._rows:
            return None
        row = bisect.bisect_right(self._firsts, number) - 1
        name, whole = self._rows[row]
        place = number - self._firsts[row]
        return Place(name, place, place + 1 if whole else None)


def _read_ledger(shards: ShardSet) -> list[dict[str, Any]]:
    entry = shards.manifest["files"].get("ledger.parquet")
    if entry is None:
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = shards.path / "ledger.parquet"
    check_size(path, entry["bytes"])
    if sha256_file(path) != entry["sha256"]:
        raise DamagedError("ledger-damaged", f"{path}: differs from its hash in the manifest; restore it from a copy")
    try:
        return pq.read_table(path, columns=["input", "set", "documents", "tokens", "text_bytes"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError("ledger-damaged", f"{path}: cannot be read ({error}); restore it from a copy") from None


def trace(run: str | Path, step: int, text: int = 0) -> str:
    """`locate` for people: the samples of a step, the documents of each, and the text of the first `text` samples."""
    found = locate(run, step)
    samples, seq_len = found.samples, found.mixture.seq_len
    later = f", after the newest checkpoint ({found.saved})" if step > found.saved else ""
    lines = [
        f"run          {run}",
        f"step         {step:,} of {found.first:,} to {found.last:,}{later}",
        f"samples      {samples[0].number:,} to {samples[-1].number:,}, each {seq_len:,} + 1 tokens",
    ]
    for name, shards in found.mixture.sets.items():
        count = sum(sample.source == name for sample in samples)
        lines.append(f"source       {name}: {count:,} samples of {shards.path}")
    for row, sample in enumerate(samples):
        start = sample.window * seq_len
        lines.append(
            f"sample {sample.number:,}  {sample.source}, window {sample.window:,}: "
            f"tokens {start:,} to {start + seq_len:,} of the set"
        )
        lines += [f"  {_describe(part)}" for part in sample.parts]
        if row < text:
            lines += ["  ---", _decode(found.mixture.sets[sample.source], sample.window, seq_len), "  ---"]
    return "\n".join(lines)


def _describe(part: Part) -> str:
    whole = "all" if (part.start, part.stop) == (0, part.length) else f"tokens {part.start:,} to {part.stop - 1:,}"
    place = f"document {part.number:,} ({part.pair}: {part.document:,}), {whole} of {part.length:,}"
    if part.origin is None:
        return place
    name, line = part.origin.input, part.origin.line
    if name.lower().endswith(".txt"):
        return f"{place}; {name}"
    unit = "row" if name.lower().endswith(".parquet") else "line"
    return f"{place}; {name}, " + (
        f"{unit} {line:,}" if line else f"number {part.origin.number:,} of its documents here"
    )


def _decode(shards: ShardSet, window: int, seq_len: int) -> str:
    from fastcpt.data_prep.encoding import open_tokenizer

    tokenizer = open_tokenizer(shards.path / "tokenizer.json")
    ids = shards.windows(np.array([window]), seq_len)[0].tolist()
    return tokenizer.decode(ids, skip_special_tokens=False)
