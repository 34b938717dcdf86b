"""What `inspect` says of a set is what is in it; `verify` finds an index that disagrees with its manifest."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastcpt import UserError, integrity
from fastcpt.data_prep.inspect_shards import QUANTILES, count_lengths, histogram, inspect, verify
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import BLOCK_BYTES, MANIFEST, index_bytes

TEXTS = ["first document", "the second, é 日本\nof two lines", "third"]


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    arguments: dict[str, Any] = {"tokenizer": str(tmp_path), "on_error": "skip", "workers": 1, "quiet": True}
    prep([str(tmp_path / "a.jsonl")], output=tmp_path / "set", shard_tokens=1, **arguments)
    return tmp_path / "set"


def test_inspect_says_what_is_there(shard_set: Path) -> None:
    manifest = json.loads((shard_set / MANIFEST).read_bytes())
    lengths = [pair["tokens"] for pair in manifest["pairs"]]
    text = inspect(shard_set)
    for wanted in (
        f"tokens       {sum(lengths):,} in uint16",
        "documents    3",
        f"text         {sum(len(text.encode()) for text in TEXTS)} bytes",
        "'<|endoftext|>' = 0",
        manifest["fingerprint"],
        f"{'50%':<10} {sorted(lengths)[1]}",
        f"{'100%':<10} {max(lengths)}",
        "pairs        3",
        f"shard-00002  {lengths[2]} tokens, 1 documents",
        "rejected     1 documents",
        f"a.jsonl  1 broken JSON, first at 2 (byte {len(json.dumps({'text': TEXTS[0]})) + 2})",
    ):
        assert wanted in text, wanted
    assert TEXTS[2] not in text
    decoded = inspect(shard_set, decode=2)
    assert all(f"{text}<|endoftext|>" in decoded for text in TEXTS[:2]) and TEXTS[2] not in decoded
    assert TEXTS[2] in inspect(shard_set, decode=100)


def test_inspect_of_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json"):
        inspect(tmp_path)


class FakeSet:
    """Only the lengths of a set, in pairs."""

    def __init__(self, pairs: list[np.ndarray]) -> None:
        self.pairs = pairs

    def document_lengths(self) -> Any:
        yield from self.pairs


def draw_lengths(seed: int) -> list[np.ndarray]:
    """Of four pairs, log-normal as real ones are, one pair without documents."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 500, 4) * [1, 1, 0, 1]
    return [np.exp(generator.normal(4, 2, count)).astype(np.int32) + 1 for count in counts]


@pytest.mark.parametrize("seed", range(20))
def test_lengths_are_counted_exactly(seed: int) -> None:
    pairs = draw_lengths(seed)
    whole = np.concatenate(pairs)
    lengths, counts = count_lengths(FakeSet(pairs))  # type: ignore[arg-type]
    assert np.array_equal(np.repeat(lengths, counts), np.sort(whole))
    assert len(set(lengths.tolist())) == len(lengths) and (counts > 0).all()


def test_quantiles_are_those_of_numpy(tmp_path: Path, write_shards: Any, random_documents: Any) -> None:
    for seed, count in enumerate((1, 2, 21, 100)):
        shards = write_shards(tmp_path / f"{count}", random_documents(seed, count))
        whole = np.concatenate(list(shards.document_lengths()))
        text = inspect(tmp_path / f"{count}")
        for share, length in zip(QUANTILES, np.quantile(whole, QUANTILES, method="lower")):
            assert f"  {f'{share:.0%}':<10} {length}\n" in text


def cells(line: str) -> tuple[int, int, int, float, float, str]:
    """(lowest length, highest, documents, share of them, share of tokens, bar) of a line of a histogram."""
    label, documents, share, tokens, *bar = line.replace(" to ", "-").replace(",", "").split()
    low, _, high = label.partition("-")
    return int(low), int(high or low), int(documents), float(share[:-1]), float(tokens[:-1]), "".join(bar)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("blocks", [False, True])
def test_a_histogram_counts_every_document_and_token_once(seed: int, blocks: bool) -> None:
    whole = np.concatenate(draw_lengths(seed)).astype(np.int64)
    lengths, counts = np.unique(whole, return_counts=True)
    heading, *lines = histogram(lengths, counts, blocks)
    rows = [cells(line) for line in lines]
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(rows)), "no gap"
    assert sum(row[2] for row in rows) == len(whole)
    largest = max(row[2] for row in rows)
    for low, high, documents, share, tokens, bar in rows:
        inside = whole[(whole >= low) & (whole <= high)]
        assert low & (low - 1) == 0 and high in (low, 2 * low - 1) and documents == len(inside)
        assert share == pytest.approx(100 * len(inside) / len(whole), abs=0.051)
        assert tokens == pytest.approx(100 * inside.sum() / whole.sum(), abs=0.051)
        assert bool(bar) == bool(documents) and len(bar) <= 40
        assert set(bar) <= (set("▏▎▍▌▋▊▉█") if blocks else {"#"})
        drawn = sum("▏▎▍▌▋▊▉█".index(char) + 1 for char in bar) / 8 if blocks else len(bar)
        assert drawn == pytest.approx(40 * documents / largest, abs=1 / 16 + 1e-9 if blocks else 1)
    assert all(len(line) <= 100 for line in (heading, *lines))


def test_a_histogram_of_everything_there_can_be_fits_its_width() -> None:
    lengths = np.array([0, 1, 5, 2**31 - 1])
    lines = histogram(lengths, np.array([1, 7, 10**12, 3]), blocks=True)
    assert max(map(len, lines)) <= 100
    assert [cells(line)[:3] for line in lines[1:5]] == [(0, 0, 1), (1, 1, 7), (2, 3, 0), (4, 7, 10**12)]
    assert cells(lines[-1])[:3] == (2**30, 2**31 - 1, 3)


@pytest.mark.parametrize(("encoding", "drawn"), [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#")])
def test_a_histogram_is_drawn_with_what_stdout_can_print(shard_set: Path, encoding: str, drawn: str) -> None:
    script = f"from fastcpt.data_prep.inspect_shards import inspect\nprint(inspect({str(shard_set)!r}))\n"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment).stdout
    assert drawn * 20 in out.decode(encoding)


def test_verify_is_silent_about_a_sound_set(shard_set: Path, capfd: Any) -> None:
    verify(shard_set)
    assert capfd.readouterr() == ("", "")


def test_verify_finds_damage(shard_set: Path) -> None:
    path = shard_set / "shard-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.bin: bytes 0 to \d+ differ"):
        verify(shard_set)


@pytest.mark.parametrize(
    "change", [lambda data, n: index_bytes(np.dtype(np.uint16), np.array([n - 1, 1], np.int32)), "dtype", "pointer"]
)
def test_verify_finds_an_index_that_disagrees(shard_set: Path, change: Any) -> None:
    """An index whose hashes were made anew, so that only its content can tell."""
    path = shard_set / "shard-00000.idx"
    data = bytearray(path.read_bytes())
    manifest = json.loads((shard_set / MANIFEST).read_bytes())
    pair = manifest["pairs"][0]
    if change == "dtype":
        data[17] = 3
    elif change == "pointer":
        data[34 + 4] = 2
    else:
        data = bytearray(change(data, pair["tokens"]))
    path.write_bytes(data)
    sums = np.concatenate([integrity.file_hashes(path.with_suffix(end), BLOCK_BYTES) for end in (".bin", ".idx")])
    path.with_suffix(".sums").write_bytes(sums.tobytes())
    pair["idx_bytes"] = len(data)
    pair["sums_sha256"] = integrity.sha256_file(path.with_suffix(".sums"))
    del manifest["sha256"]
    integrity.write_json(shard_set / MANIFEST, manifest | {"sha256": integrity.sha256_json(manifest)})
    with pytest.raises(UserError, match=r"shard-00000\.idx: (holds|its sequences)"):
        verify(shard_set)
