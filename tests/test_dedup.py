"""`prep --dedup` against a plain loop over the documents in input order."""

import functools
import itertools
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers

from fastcpt.data_prep import dedup, inputs, parts, tasks
from fastcpt.data_prep.inspect_shards import verify
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import ShardSet


@pytest.fixture
def run(byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    monkeypatch.setattr(inputs, "TASK_BYTES", 2000)
    return functools.partial(prep, tokenizer=str(byte_tokenizer), workers=1, quiet=True, dedup=True)


def plainly(text: str) -> str:
    """The same for texts that count as one: NFC, every run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def texts(seed: int, count: int) -> list[str]:
    """Some of them the same but for spacing and Unicode form."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = [rng.choice(["café", "cafe\u0301", "x", "日本", "Cafe"]) for _ in range(rng.randrange(1, 4))]
        made.append(rng.choice(["", " ", "\n"]) + rng.choice([" ", "  ", "\t\n", "\u3000"]).join(words))
    return made


def write(folder: Path, per_file: int, all_texts: list[str]) -> Path:
    folder.mkdir()
    for number, start in enumerate(range(0, len(all_texts), per_file)):
        lines = [
            json.dumps({"text": text, "group": "gh"[len(text) % 2]}) for text in all_texts[start : start + per_file]
        ]
        (folder / f"{number:02}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def decoded(folder: Path, tokenizer: Path) -> list[str]:
    codec, shards = tokenizers.Tokenizer.from_file(str(tokenizer)), ShardSet(folder)
    codec.decoder = tokenizers.decoders.ByteLevel()
    documents = [
        shards.document(pair, index) for pair, entry in enumerate(shards.pairs) for index in range(entry["documents"])
    ]
    return [codec.decode(ids[:-1].tolist()) for ids in documents]


@pytest.mark.parametrize(("rows", "stretch"), [(10**6, 10**6), (37, 20)])
def test_the_first_of_each_text_is_kept(
    tmp_path: Path, run: Any, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, rows: int, stretch: int
) -> None:
    """Within and across files, tasks and key ranges; rejected lines, lengths and counts are exact."""
    monkeypatch.setattr(dedup, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(parts, "WRITE_TOKENS", stretch)
    given = texts(0, 400)
    folder = write(tmp_path / "in", 90, given)
    with open(folder / "01.jsonl", "a") as file:
        file.write("{broken\n\n")
    (manifest,) = run([str(folder)], output=tmp_path / "out", on_error="skip", shard_tokens=100)
    seen: set[str] = set()
    wanted = [text for text in given if not (plainly(text) in seen or seen.add(plainly(text)))]  # type: ignore[func-returns-value]
    assert decoded(tmp_path / "out", byte_tokenizer) == wanted and 50 < len(wanted) < 350
    verify(tmp_path / "out", quiet=True)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in wanted)
    table = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    counted = {row["input"]: row for row in table if row["set"] is None}
    reasons = {reject["reason"]: reject["count"] for reject in counted["01.jsonl"]["rejects"]}
    in_second = given[90:180]
    first_seen = {plainly(text) for text in given[:90]}
    fresh = [t for t in in_second if not (plainly(t) in first_seen or first_seen.add(plainly(t)))]  # type: ignore[func-returns-value]
    assert reasons == {"broken JSON": 1, "duplicate": 90 - len(fresh)} and counted["01.jsonl"]["blank_lines"] == 1


def test_across_sets(tmp_path: Path, run: Any, byte_tokenizer: Path) -> None:
    """A text is in one of the sets: groups and validation included, where its first document goes."""
    given = texts(1, 300)
    sets = run([str(write(tmp_path / "in", 80, given))], output=tmp_path / "out", group_key="group", val_fraction=0.3)
    kept = [text for manifest in sets for text in decoded(Path(manifest["path"]), byte_tokenizer)]
    assert sorted(map(plainly, kept)) == sorted(set(map(plainly, given))) and len(sets) == 4
    first = {plainly(text): text for text in reversed(given)}
    for manifest in sets:
        group = Path(manifest["path"]).name.split("-")[1]
        assert all("gh"[len(text) % 2] == group for text in decoded(Path(manifest["path"]), byte_tokenizer))
    assert sorted(kept) == sorted(first.values())


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(tasks, "write_record", 2), (dedup, "_rows", 2), (dedup, "_filter", 3), (dedup, "write_record", 2)],
    ids=["keys", "find", "drop", "dropped"],
)
def test_restart_in_each_stage(tmp_path: Path, run: Any, interrupt: Any, module: Any, name: str, call: int) -> None:
    folder = write(tmp_path / "in", 50, texts(2, 300))
    run([str(folder)], output=tmp_path / "whole")
    with pytest.raises(interrupt(module, name, call)):
        run([str(folder)], output=tmp_path / "out")
    run([str(folder)], output=tmp_path / "out", workers=2)
    whole, again = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == again


def test_ranges_cover_every_key() -> None:
    """The least and the greatest key, and those at the borders, are each in one range."""
    for count in (1, 2, 3, 7, 1000):
        step = (1 << 64) // count + 1
        keys = sorted(
            {0, 1, (1 << 64) - 1, *(n * step + d for n in range(1, count) for d in (-1, 0, 1) if n * step < 1 << 64)}
        )
        rows = np.zeros(len(keys), dedup.ROW)
        rows["high"] = keys
        found = [dedup.in_range(rows, dedup.Range(index, count, (0,)))["high"].tolist() for index in range(count)]
        assert list(itertools.chain(*found)) == keys
