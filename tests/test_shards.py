"""Shards and block hashes: against Megatron's writer, hashlib and plain numpy; every damage is found and placed."""

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fastcpt import UserError, blocks, integrity
from fastcpt import shards as shards_module
from fastcpt.integrity import DamagedError, HashingWriter
from fastcpt.shards import (
    BLOCK_BYTES,
    MANIFEST,
    PairWriter,
    ShardSet,
    dtype_for,
    index_bytes,
    read_index,
    read_pair,
    tokenizer_fingerprint,
    write_manifest,
)

READERS: list[Literal["mmap", "pread"]] = ["mmap", "pread"]
TOKENIZER = {"fingerprint": "f" * 64, "vocab_size": 1000, "eod": 0, "eod_token": "<|endoftext|>"}


def make_set(directory: Path, pairs: list[list[int]], vocab_size: int = 1000, seed: int = 0) -> np.ndarray:
    """A set whose pairs have documents of the given lengths. Returns all its tokens."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    dtype = dtype_for(vocab_size)
    entries, everything = [], [np.empty(0, dtype)]
    for number, lengths in enumerate(pairs):
        tokens = rng.integers(1, vocab_size, sum(lengths)).astype(dtype)
        tokens[np.cumsum(lengths) - 1] = 0
        writer = PairWriter(directory, f"shard-{number:05d}", dtype)
        writer.write(tokens, np.array(lengths, np.int32))
        entries.append(writer.close())
        everything.append(tokens)
    np.save(directory / "token_bytes.npy", np.arange(vocab_size, dtype=np.uint16))
    (directory / "tokenizer.json").write_text('{"model": {}}')
    write_manifest(
        directory,
        tokenizer={**TOKENIZER, "vocab_size": vocab_size},
        dtype=dtype,
        text_bytes=3 * sum(map(sum, pairs)),
        pairs=entries,
        files=["tokenizer.json", "token_bytes.npy"],
    )
    return np.concatenate(everything)


RAGGED = [[3, 1, 7], [1], [40, 2, 2, 1], [5], [1, 1]]


@pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 70_000])
def test_round_trip(tmp_path: Path, vocab_size: int) -> None:
    tokens = make_set(tmp_path / "set", RAGGED, vocab_size)
    shards = ShardSet(tmp_path / "set")
    assert shards.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    assert (len(shards), shards.documents, shards.vocab_size, shards.eod) == (len(tokens), 11, vocab_size, 0)
    assert [lengths.tolist() for lengths in shards.document_lengths()] == RAGGED
    assert shards.token_bytes.dtype == np.uint16 and len(shards.token_bytes) == vocab_size
    ids = [shards.document(pair, index) for pair, lengths in enumerate(RAGGED) for index in range(len(lengths))]
    assert np.array_equal(np.concatenate(ids), tokens)
    checked: list[int] = []
    shards.verify(checked.append)
    assert sum(checked) == sum(pair["bin_bytes"] + pair["idx_bytes"] for pair in shards.pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8, np.int64])
def test_pairs_of_megatron(tmp_path: Path, dtype: type) -> None:
    """Their builder's pair through our reader, and our index byte for byte as theirs."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 100, length).astype(dtype) for length in (5, 1, 300, 2)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    tokens, index = read_pair(tmp_path / "theirs")
    assert np.array_equal(tokens, np.concatenate(documents)) and index.dtype == dtype
    assert index.lengths.tolist() == [5, 1, 300, 2] and index.documents.tolist() == [0, 1, 2, 3, 4]
    assert index.pointers.tolist() == [start * np.dtype(dtype).itemsize for start in (0, 5, 6, 306)]
    writer = PairWriter(tmp_path, "ours", np.dtype(dtype))
    for document in documents:
        writer.write(document, np.array([len(document)], np.int32))
    writer.close()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_documents_of_several_sequences_and_multimodal_modes(tmp_path: Path) -> None:
    data = index_bytes(np.dtype(np.uint16), np.array([2, 3], np.int32))
    (tmp_path / "a.idx").write_bytes(data + bytes(2))  # one mode a sequence
    assert read_index(tmp_path / "a.idx").lengths.tolist() == [2, 3]


def test_large_offsets() -> None:
    """Byte offsets beyond 32 bits, without such a file."""
    lengths = np.full(3, 2**31 - 1, np.int32)
    data = index_bytes(np.dtype(np.int32), lengths)
    assert np.frombuffer(data, "<i8", 3, 34 + 12).tolist() == [0, 4 * (2**31 - 1), 8 * (2**31 - 1)]


@pytest.mark.parametrize("size", range(34 + 2 * 12 + 3 * 8))
def test_cut_index_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(index_bytes(np.dtype(np.uint16), np.array([2, 3], np.int32))[:size])
    with pytest.raises(DamagedError, match=r"a\.idx"):
        read_index(path)


def test_binary_shorter_than_its_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(index_bytes(np.dtype(np.uint16), np.array([2, 3], np.int32)))
    (tmp_path / "a.bin").write_bytes(bytes(9))
    with pytest.raises(DamagedError, match=r"a\.bin: 9 bytes, its index reaches to 10"):
        read_pair(tmp_path / "a")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 63])
def test_windows_are_slices_of_the_concatenation(tmp_path: Path, reader: Any, seq_len: int) -> None:
    rng = random.Random(seq_len)
    pairs = [[rng.randrange(1, 30) for _ in range(rng.randrange(1, 5))] for _ in range(12)]
    tokens = make_set(tmp_path / "set", pairs)
    shards = ShardSet(tmp_path / "set", reader)
    count = shards.num_windows(seq_len)
    assert count == sum(1 for start in range(0, len(tokens), seq_len) if start + seq_len + 1 <= len(tokens))
    order = np.array(rng.sample(range(count), count))
    want = np.stack([tokens[index * seq_len : index * seq_len + seq_len + 1] for index in order])
    assert np.array_equal(shards.windows(order, seq_len), want)
    assert shards.windows(order, seq_len).dtype == shards.dtype
    assert shards.windows(order[:0], seq_len).shape == (0, seq_len + 1)


@pytest.mark.parametrize("reader", READERS)
def test_empty_set_and_empty_pairs(tmp_path: Path, reader: Any) -> None:
    make_set(tmp_path / "empty", [])
    assert len(ShardSet(tmp_path / "empty", reader)) == ShardSet(tmp_path / "empty", reader).num_windows(4) == 0
    ShardSet(tmp_path / "empty").verify()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [0, 1, 4096, 199_998, 200_002])
def test_file_that_changes_size_under_a_reader(tmp_path: Path, reader: Any, size: int) -> None:
    make_set(tmp_path / "set", [[10], [100_000]])
    shards = ShardSet(tmp_path / "set", reader)
    shards.windows(np.array([3000]), 16)
    os.truncate(tmp_path / "set" / "shard-00001.bin", size)
    with pytest.raises(DamagedError, match=rf"shard-00001\.bin: {size:,} bytes while reading at 1\d\d,\d\d\d"):
        shards.windows(np.array([5000]), 16)


def test_a_damaged_block_is_found_when_it_is_first_touched(tmp_path: Path) -> None:
    """By windows that need it, before any of their tokens is returned, and by no others; the first touch alone."""
    tokens = make_set(tmp_path / "set", [[40_000, 30_001], [99_999]])
    path = tmp_path / "set" / "shard-00001.bin"
    size, seq_len = path.stat().st_size, 500
    for byte in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, size - 1):
        flip(path, 8 * byte)
        block = byte // BLOCK_BYTES
        start, stop = block * BLOCK_BYTES, min(size, (block + 1) * BLOCK_BYTES)
        shards, unchecked = ShardSet(tmp_path / "set"), ShardSet(tmp_path / "set", "pread")
        message = f"{path}: bytes {start:,} to {stop:,} differ from their hash; restore the file from a copy"
        failed = []
        for index in range(shards.num_windows(seq_len)):
            low, high = (2 * (at - 70_001) for at in (index * seq_len, index * seq_len + seq_len + 1))
            want = tokens[index * seq_len : index * seq_len + seq_len + 1]
            try:
                assert np.array_equal(shards.windows(np.array([index]), seq_len)[0], want)
            except DamagedError as error:
                assert str(error) == message
                failed.append(index)
            assert (index in failed) == (low < stop and start < high)
            assert np.array_equal(unchecked.windows(np.array([index]), seq_len)[0], want) or low <= byte < high
        assert len(failed) >= 3
        flip(path, 8 * byte)
        assert np.array_equal(shards.windows(np.array([failed[-1]]), seq_len)[0], tokens[failed[-1] * seq_len :][:501])


def test_each_block_is_compared_once_and_each_list_of_hashes_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set(tmp_path / "set", [[70_000], [50_000], [40_000]])
    hashed: list[int] = []
    real_hash, real_sums = integrity.block_hash, blocks.read_sums
    monkeypatch.setattr(integrity, "block_hash", lambda block: hashed.append(len(block)) or real_hash(block))
    read: list[str] = []
    monkeypatch.setattr(
        shards_module, "read_sums", lambda prefix, pair: read.append(prefix.name) or real_sums(prefix, pair)
    )
    shards = ShardSet(tmp_path / "set")
    assert (hashed, read) == ([], [])
    ShardSet(tmp_path / "set").windows(np.array([0]), BLOCK_BYTES // 2 - 1)  # a whole block, and nothing of the next
    assert (hashed, read) == ([BLOCK_BYTES], ["shard-00000"])
    hashed.clear()
    read.clear()
    shards.windows(np.array([0, 1, 0]), 100)
    assert (hashed, read) == ([BLOCK_BYTES], ["shard-00000"])
    shards.windows(np.array([327, 0]), 100)  # tokens 32,700 to 32,800: the end of one block, the start of another
    assert (hashed, read) == ([BLOCK_BYTES] * 2, ["shard-00000"])
    for _ in range(2):
        shards.windows(np.arange(shards.num_windows(100)), 100)
        whole = [BLOCK_BYTES] * 2 + [8928, BLOCK_BYTES, 34_464, BLOCK_BYTES, 14_464]
        assert (hashed, read) == (whole, ["shard-00000", "shard-00001", "shard-00002"])


def test_hashes_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    """Found when their pair is first read; other pairs can be read."""
    make_set(tmp_path / "set", [[1000], [1000]])
    path = tmp_path / "set" / "shard-00001.sums"
    good = path.read_bytes()
    for content, message in (
        (good[:-1], "15 bytes, its manifest says 16"),
        (good[:-1] + bytes([good[-1] ^ 1]), "differs from its hash in the manifest"),
        (None, "the file is missing"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        shards = ShardSet(tmp_path / "set")
        shards.windows(np.array([0]), 100)
        for _ in range(2):
            with pytest.raises(DamagedError, match=rf"shard-00001\.sums: {message}"):
                shards.windows(np.array([11]), 100)
        ShardSet(tmp_path / "set", "pread").windows(np.array([11]), 100)
        path.write_bytes(good)
        shards.windows(np.array([11]), 100)


@pytest.mark.parametrize("reader", READERS)
def test_a_sector_that_cannot_be_read_is_named(tmp_path: Path, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "set", [[70_000]])

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(
        DamagedError, match=r"shard-00000\.bin: bytes [\d,]+ to [\d,]+ cannot be read \(Input/output error\)"
    ):
        ShardSet(tmp_path / "set", reader).windows(np.array([340]), 100)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_or_missing_file_is_refused_at_open(tmp_path: Path, suffix: str) -> None:
    make_set(tmp_path / "set", [[10], [100]])
    path = tmp_path / "set" / f"shard-00001{suffix}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DamagedError, match=rf"shard-00001{suffix}: {size - 1} bytes, its manifest says {size}"):
        ShardSet(tmp_path / "set")
    path.unlink()
    with pytest.raises(DamagedError, match=rf"shard-00001{suffix}: the file is missing"):
        ShardSet(tmp_path / "set")


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """All bits of all files of a small set, one at a time; the error names the file, or what points to it."""
    make_set(tmp_path / "set", [[3, 2], [4]], vocab_size=12)
    ShardSet(tmp_path / "set").verify()
    files = sorted((tmp_path / "set").iterdir())
    assert len(files) == 3 + 2 * 3
    for path in files:
        for bit in range(8 * path.stat().st_size):
            flip(path, bit)
            with pytest.raises(UserError) as caught:
                ShardSet(tmp_path / "set").verify()
            assert path.name in str(caught.value), (path, bit)
            flip(path, bit)
    ShardSet(tmp_path / "set").verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damage_is_placed_to_the_block(tmp_path: Path, suffix: str) -> None:
    make_set(tmp_path / "set", [[5], [1] * 200_000])
    path = tmp_path / "set" / f"shard-00001{suffix}"
    size = path.stat().st_size
    rng = random.Random(3)
    for byte in (0, BLOCK_BYTES - 1, BLOCK_BYTES, size - 1, *(rng.randrange(size) for _ in range(10))):
        bit = 8 * byte + rng.randrange(8)
        flip(path, bit)
        start = byte // BLOCK_BYTES * BLOCK_BYTES
        with pytest.raises(DamagedError) as caught:
            ShardSet(tmp_path / "set").verify()
        assert str(caught.value).startswith(f"{path}: bytes {start:,} to {min(start + BLOCK_BYTES, size):,} differ")
        flip(path, bit)
    ShardSet(tmp_path / "set").verify()


def test_swapped_pairs_are_found(tmp_path: Path) -> None:
    make_set(tmp_path / "set", [[50], [50]])
    first, second = tmp_path / "set" / "shard-00000.bin", tmp_path / "set" / "shard-00001.bin"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(DamagedError, match=r"shard-00000\.bin: bytes 0 to 100 differ"):
        ShardSet(tmp_path / "set").verify()


def edit_manifest(directory: Path, change: Any) -> None:
    """Changes a manifest and gives it the hash of its new content, as a hostile hand would."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = integrity.sha256_json(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "..", ".", ""])
def test_manifest_that_names_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    for change in (
        lambda manifest: manifest["pairs"][0].update(name=name),
        lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": ""}}),
    ):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        make_set(directory, [[5]])
        edit_manifest(directory, change)
        with pytest.raises(DamagedError, match=r"manifest\.json: names a file .* outside"):
            ShardSet(directory)


def test_other_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json.*fastcpt prep"):
        ShardSet(tmp_path)
    make_set(tmp_path / "set", [[5]])
    edit_manifest(tmp_path / "set", lambda manifest: manifest.update(version=2))
    with pytest.raises(DamagedError, match="version 2"):
        ShardSet(tmp_path / "set")
    edit_manifest(tmp_path / "set", lambda manifest: manifest.update(version=1))
    edit_manifest(tmp_path / "set", lambda manifest: manifest["pairs"][0].update(tokens=6))
    with pytest.raises(DamagedError, match="counts 6 tokens in 10 bytes"):
        ShardSet(tmp_path / "set")
    for content in (b"", b"[]", b"\xff"):
        (tmp_path / "set" / MANIFEST).write_bytes(content)
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            ShardSet(tmp_path / "set")


def test_fingerprint_is_of_tokens_tokenizer_and_pairs(tmp_path: Path) -> None:
    make_set(tmp_path / "a", RAGGED)
    make_set(tmp_path / "b", RAGGED)
    make_set(tmp_path / "c", RAGGED, seed=1)
    make_set(tmp_path / "d", [[3, 1, 7, 1], *RAGGED[2:]])
    fingerprints = [ShardSet(tmp_path / name).fingerprint for name in "abcd"]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12_288, 50_001])
def test_block_hashes_against_hashlib(tmp_path: Path, size: int) -> None:
    rng = random.Random(size)
    content = rng.randbytes(size)
    want = [
        int.from_bytes(hashlib.sha256(content[start : start + 4096]).digest()[:8], "little")
        for start in range(0, size, 4096)
    ]
    path = tmp_path / "file"
    with HashingWriter(path, 4096) as writer:
        start = 0
        while start < size:
            stop = min(size, start + rng.randrange(1, 9000))
            writer.write(content[start:stop])
            start = stop
    assert path.read_bytes() == content and writer.size == size and writer.hashes.tolist() == want
    assert integrity.file_hashes(path, 4096).tolist() == want
    assert integrity.sha256_file(path) == hashlib.sha256(content).hexdigest()
    integrity.check_file(path, size, writer.hashes, 4096)


def test_durable_write_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    integrity.write_json(path, {"a": 1})

    def fail(descriptor: int) -> None:
        raise OSError("fsync")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="fsync"):
            integrity.write_json(path, {"a": 2})
    assert integrity.read_json(path, "a test") == {"a": 1}
    integrity.write_json(path, {"a": "é"})
    assert integrity.read_json(path, "a test") == {"a": "é"}


def test_json_fingerprint_ignores_order_alone() -> None:
    assert integrity.sha256_json({"a": 1, "b": [1, 2]}) == integrity.sha256_json({"b": [1, 2], "a": 1})
    assert integrity.sha256_json({"a": [1, 2]}) != integrity.sha256_json({"a": [2, 1]})


def test_tokenizer_fingerprint_is_of_what_decides_the_ids() -> None:
    base: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
    }

    def fingerprint(**changes: Any) -> str:
        return tokenizer_fingerprint(json.dumps(base | changes).encode())

    model = base["model"]
    same = [
        {"model": model | {"merges": [["a", "b"]]}},
        {"model": model | {"dropout": None, "fuse_unk": False, "byte_fallback": False}},
        {"truncation": {"max_length": 5}, "padding": {}, "post_processor": {"type": "ByteLevel"}},
    ]
    other = [
        {"model": model | {"merges": []}},
        {"model": model | {"vocab": {"<|endoftext|>": 0, "a": 2, "b": 1, "ab": 3}}},
        {"model": model | {"ignore_merges": True}},
        {"normalizer": None},
        {"added_tokens": []},
    ]
    assert {fingerprint(**changes) for changes in same} == {fingerprint()}
    assert len({fingerprint(), *(fingerprint(**changes) for changes in other)}) == len(other) + 1


def test_a_set_on_a_remote_store_has_to_be_copied_first() -> None:
    with pytest.raises(UserError, match=r"s3:/.*a URL; copy the set to a disk"):
        ShardSet("s3://bucket/sets/out")
