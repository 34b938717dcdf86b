"""Token shards on disk: what preparation writes and training reads. Needs numpy alone.

A *pair* is a Megatron / GPT-NeoX indexed dataset, `NAME.bin` + `NAME.idx`, readable by those trainers as it is: one
sequence a document, its end-of-document token included. Beside each pair, `NAME.sums` holds the hashes
(`integrity.py`) of every 64 KiB block of the `.bin`, then of the `.idx`. A *set* is a folder of pairs with

    manifest.json     all that opening the set reads: tokenizer, dtype, counts, pairs, sizes, hashes, fingerprint
    tokenizer.json    the tokenizer that made the ids
    token_bytes.npy   uint16: the length in bytes of the text of each id, for exact bits per byte
    ledger.parquet    what came from which input file

The set's tokens are the concatenation of its pairs in manifest order. Training cuts them into *windows* of T+1 tokens
at stride T: window i is tokens [iT, iT + T], its first T tokens the input and its last T the targets.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastcpt import UserError
from fastcpt.blocks import BLOCK_BYTES, BlockFile, read_sums
from fastcpt.integrity import (
    DamagedError,
    HashingWriter,
    check_file,
    check_form,
    check_inside,
    check_names,
    check_size,
    read_sealed,
    sha256_file,
    sha256_json,
    write_sealed,
)

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8 + 8
# Codes 6 and 7 are float types on which GPT-NeoX and Megatron-core disagree; token ids never use them.
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_CODES.items()}
MANIFEST = "manifest.json"
FORMAT = "fastcpt-shards"
# Mapped pages stay in this process until about so many bytes were touched: one fault maps the 64 KiB around it.
RELEASE_BYTES = 64 << 20
MANIFEST_FORM = {
    "tokenizer": {"fingerprint": str, "vocab_size": int, "eod": int, "eod_token": str},
    "dtype": ("uint16", "int32"),
    "tokens": int,
    "documents": int,
    "text_bytes": int,
    "pairs": [
        {"name": str, "tokens": int, "documents": int, "bin_bytes": int, "idx_bytes": int, "sums_sha256": str},
    ],
    "files": {...: {"bytes": int, "sha256": str}},
    "fingerprint": str,
}


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32: the rule of Megatron's and GPT-NeoX's writers."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def tokenizer_fingerprint(tokenizer_json: bytes) -> str:
    """Identity of a `tokenizer.json` by what decides the ids, so that another spelling of the same file is the same.

    Old files write a merge as "a b", new ones as ["a", "b"]; padding, truncation and post-processing are not used.
    """
    content = json.loads(tokenizer_json)
    model = dict(content["model"])
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    # These were added to the format over time; absent means the default.
    model = {key: value for key, value in model.items() if value not in (None, False)}
    kept = {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")}
    return sha256_json({"model": model, **kept})


@dataclass(frozen=True)
class Index:
    """The content of an `.idx` file.

    lengths (S,) int32: tokens of each sequence. pointers (S,) int64: byte offset of each in the `.bin`.
    documents (D+1,) int64: the sequences at which documents start, then S.
    """

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray


def read_index(path: Path) -> Index:
    """Reads an `.idx` file of Megatron, GPT-NeoX or ours. Raises DamagedError with what is wrong and where."""
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise DamagedError(
            "shard-index-damaged", f"{path}: starts with {data[:9]!r}, not {MAGIC!r}; it is not a Megatron index"
        )
    if len(data) < HEADER_BYTES:
        raise DamagedError(
            "shard-index-damaged", f"{path}: {len(data)} bytes, shorter than the {HEADER_BYTES} of its header"
        )
    version, code, sequences, entries = (
        int.from_bytes(data[9:17], "little"),
        data[17],
        int.from_bytes(data[18:26], "little"),
        int.from_bytes(data[26:34], "little"),
    )
    if version != 1 or code not in DTYPE_CODES:
        raise DamagedError(
            "shard-index-damaged",
            f"{path}: version {version}, dtype code {code}; known are version 1, codes {list(DTYPE_CODES)}",
        )
    expected = HEADER_BYTES + sequences * 12 + entries * 8
    if len(data) not in (expected, expected + sequences):  # Megatron's multimodal writer appends one byte a sequence
        raise DamagedError(
            "shard-index-damaged",
            f"{path}: {len(data):,} bytes, its header promises {expected:,}; it was cut or overwritten",
        )
    pointers_at = HEADER_BYTES + sequences * 4
    documents_at = pointers_at + sequences * 8
    return Index(
        dtype=np.dtype(DTYPE_CODES[code]),
        lengths=np.frombuffer(data, "<i4", sequences, HEADER_BYTES),
        pointers=np.frombuffer(data, "<i8", sequences, pointers_at),
        documents=np.frombuffer(data, "<i8", entries, documents_at),
    )


def index_bytes(dtype: np.dtype, lengths: np.ndarray) -> bytes:
    """The `.idx` file of a pair with one sequence a document. lengths (D,) int32, in tokens."""
    count = len(lengths)
    pointers = np.zeros(count, "<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    header = MAGIC + (1).to_bytes(8, "little") + bytes([CODE_OF_DTYPE[dtype]])
    header += count.to_bytes(8, "little") + (count + 1).to_bytes(8, "little")
    return b"".join(
        (header, lengths.astype("<i4").tobytes(), pointers.tobytes(), np.arange(count + 1, dtype="<i8").tobytes())
    )


def read_pair(prefix: Path) -> tuple[np.ndarray, Index]:
    """Maps any Megatron / GPT-NeoX pair, one that another program wrote included: (all tokens of the `.bin`, index)."""
    index = read_index(prefix.with_name(prefix.name + ".idx"))
    binary = prefix.with_name(prefix.name + ".bin")
    needed = int((index.pointers + index.lengths.astype(np.int64) * index.dtype.itemsize).max(initial=0))
    if binary.stat().st_size < needed:
        raise DamagedError(
            "shard-truncated", f"{binary}: {binary.stat().st_size:,} bytes, its index reaches to {needed:,}; it was cut"
        )
    if needed == 0:
        return np.empty(0, index.dtype), index
    return np.memmap(binary, index.dtype, "r"), index


class PairWriter:
    """Writes one pair, documents appended in order. `close` returns the pair's entry for the manifest."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype) -> None:
        self.directory, self.name, self.dtype = directory, name, dtype
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        self._binary = HashingWriter(directory / f"{name}.bin", BLOCK_BYTES)

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """tokens (sum of lengths,) of the pair's dtype: whole documents one after another; lengths (D,) int32."""
        assert tokens.dtype == self.dtype and len(tokens) == int(lengths.sum())
        self._binary.write(np.ascontiguousarray(tokens).data.cast("B"))
        self._lengths.append(lengths.astype("<i4"))
        self.tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        self._binary.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, "<i4")
        return finish_pair(self.directory, self.name, self.dtype, lengths, self._binary.hashes)


def finish_pair(directory: Path, name: str, dtype: np.dtype, lengths: np.ndarray, hashes: np.ndarray) -> dict[str, Any]:
    """Writes `.idx` and `.sums` beside a `.bin`; returns the pair's entry for the manifest. lengths (D,) int32: tokens of
    its documents; hashes: of the blocks of the `.bin`, uint64."""
    with HashingWriter(directory / f"{name}.idx", BLOCK_BYTES) as index:
        index.write(index_bytes(dtype, lengths))
    sums = np.concatenate((hashes, index.hashes)).tobytes()
    with HashingWriter(directory / f"{name}.sums", BLOCK_BYTES) as file:
        file.write(sums)
    tokens = int(lengths.sum(dtype=np.int64))
    return {
        "name": name,
        "tokens": tokens,
        "documents": len(lengths),
        "bin_bytes": tokens * dtype.itemsize,
        "idx_bytes": index.size,
        "sums_sha256": hashlib.sha256(sums).hexdigest(),
    }


def set_fingerprint(tokenizer: str, dtype: np.dtype, pairs: list[dict[str, Any]]) -> str:
    """The same tokens in the same pairs are the same data, whatever the ledger says of where they came from."""
    return sha256_json([tokenizer, dtype.name, pairs])


def write_manifest(
    directory: Path,
    *,
    tokenizer: dict[str, Any],
    dtype: np.dtype,
    text_bytes: int,
    pairs: list[dict[str, Any]],
    files: list[str],
) -> dict[str, Any]:
    """Commits a set: written last, so that a folder without it is not a set.

    tokenizer: {"fingerprint", "vocab_size" (highest id + 1), "eod" (id), "eod_token"}. text_bytes: UTF-8 bytes of the
    documents. pairs: what `PairWriter.close` returned, in order. files: names of the other files of the folder.
    """
    manifest: dict[str, Any] = {
        "tokenizer": tokenizer,
        "dtype": dtype.name,
        "tokens": sum(pair["tokens"] for pair in pairs),
        "documents": sum(pair["documents"] for pair in pairs),
        "text_bytes": text_bytes,
        "pairs": pairs,
        "files": {
            name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
            for name in sorted(files)
        },
        "fingerprint": set_fingerprint(tokenizer["fingerprint"], dtype, pairs),
    }
    return write_sealed(directory / MANIFEST, FORMAT, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads and checks a manifest. Raises UserError when `directory` is no set or the manifest was changed."""
    path = directory / MANIFEST
    if re.match(r"\w+:/", str(directory)):
        raise UserError("shards-remote", f"{directory}: a URL; copy the set to a disk and name that folder")
    if not path.exists():
        raise UserError(
            "shards-missing",
            f"{directory}: no {MANIFEST}; make a shard set with `fastcpt prep ... --output {directory}`",
        )
    check_inside(path, directory.resolve())
    manifest = read_sealed(path, FORMAT, "the shard set")
    check_form(path, manifest, MANIFEST_FORM)
    check_names(path, [*manifest["files"], *(pair["name"] for pair in manifest["pairs"])])
    files = (f"{pair['name']}.{end}" for pair in manifest["pairs"] for end in ("bin", "idx", "sums"))
    for name in (*manifest["files"], *files):
        if os.path.islink(directory / name):
            check_inside(directory / name, directory.resolve())
    return manifest


def _hashes(prefix: Path, pair: dict[str, Any]) -> np.ndarray:
    return read_sums(prefix, pair)[0]


def joined(pieces: Sequence[bytes | memoryview], seq_len: int, dtype: np.dtype) -> np.ndarray:
    """What `ShardSet.pieces` found of n windows -> tokens (n, seq_len + 1). One copy, without a loop of ours."""
    return np.frombuffer(bytearray().join(pieces), dtype).reshape(len(pieces), seq_len + 1)


class ShardSet:
    """A shard set, opened in milliseconds whatever its size. `len(set)` is its number of tokens.

    reader: "mmap" maps the files and gives used pages back now and then. The first time that it touches a block of
    64 KiB it compares the block with its hash, so that no token of a damaged one is returned. "pread" reads windows with
    system calls, for file systems where mapping is bad (network ones). There reading a whole block for a window of a few
    KiB is not cheap either, and nothing is compared: `verify` is the check.
    """

    def __init__(self, path: str | Path, reader: Literal["mmap", "pread"] = "mmap") -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.dtype = np.dtype(self.manifest["dtype"])
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.eod: int = self.manifest["tokenizer"]["eod"]
        self.pairs: list[dict[str, Any]] = self.manifest["pairs"]
        self.starts = np.cumsum([0, *(pair["tokens"] for pair in self.pairs)], dtype=np.int64)
        self._bytes: list[int] = (self.starts * self.dtype.itemsize).tolist()  # where each pair starts, and the end
        self._files = []
        self._used: set[int] = set()  # pairs of which pages are mapped, after about so many bytes
        self._touched = 0
        for pair in self.pairs:
            if pair["bin_bytes"] != pair["tokens"] * self.dtype.itemsize:
                raise DamagedError(
                    "manifest-disagrees",
                    f"{self.path / MANIFEST}: pair {pair['name']} counts {pair['tokens']:,} tokens in {pair['bin_bytes']:,} bytes; prepare the set again",
                )
            check_size(self._binary(pair), pair["bin_bytes"])
            check_size(self.path / f"{pair['name']}.idx", pair["idx_bytes"])
            hashes = partial(_hashes, self.path / pair["name"], pair)
            self._files.append(BlockFile(self._binary(pair), pair["bin_bytes"], reader, hashes))

    def _binary(self, pair: dict[str, Any]) -> Path:
        return self.path / f"{pair['name']}.bin"

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def documents(self) -> int:
        return self.manifest["documents"]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) uint16: bytes of text that each id stands for; 0 for the end-of-document token."""
        path = self.path / "token_bytes.npy"
        try:
            sizes = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(
                "token-bytes-damaged", f"{path}: not an array ({error}); prepare the set again"
            ) from None
        if sizes.shape != (self.vocab_size,) or sizes.dtype.kind != "u":
            wrong = f"{path}: holds {sizes.dtype.name} of shape {list(sizes.shape)}, the tokenizer has {self.vocab_size:,} ids"
            raise DamagedError("token-bytes-damaged", f"{wrong}; prepare the set again")
        return sizes

    def num_windows(self, seq_len: int) -> int:
        return max(0, (len(self) - 1) // seq_len)

    def windows(self, indexes: np.ndarray, seq_len: int) -> np.ndarray:
        """indexes (n,) integer -> tokens (n, seq_len + 1) of the set's dtype. Raises as `read`."""
        return joined(self.pieces(indexes, seq_len), seq_len, self.dtype)

    def pieces(self, indexes: np.ndarray, seq_len: int) -> list[bytes | memoryview]:
        """The bytes of each window, for `joined`, which is where those of mapped files are copied.

        Raises DamagedError when a file that is needed has changed size since the set was opened, and with the reader
        "mmap" when a block that is touched for the first time differs from its hash.
        """
        if self._touched > RELEASE_BYTES:
            for pair in self._used:
                self._files[pair].release()
            self._used, self._touched = set(), 0
        stride = seq_len * self.dtype.itemsize
        size = stride + self.dtype.itemsize
        used: set[int] = set()
        pieces = []
        for index in indexes.tolist():
            position, left, parts = index * stride, size, []
            assert 0 <= position <= self._bytes[-1] - size
            pair = bisect_right(self._bytes, position) - 1
            while left:  # a window may lie in several pairs
                count = min(left, self._bytes[pair + 1] - position)
                if count:
                    file, offset = self._files[pair], position - self._bytes[pair]
                    if pair not in used:
                        file.check(offset)
                        used.add(pair)
                    parts.append(file.read(offset, count))
                position, left, pair = position + count, left - count, pair + 1
            pieces.append(parts[0] if len(parts) == 1 else b"".join(parts))
        self._used |= used
        self._touched += len(indexes) * (size + 2 * BLOCK_BYTES)
        return pieces

    def document_lengths(self) -> Iterator[np.ndarray]:
        """(D,) int32 of each pair in order: the tokens of each document, end-of-document token included."""
        for pair in self.pairs:
            yield read_index(self.path / f"{pair['name']}.idx").lengths

    def document(self, pair: int, index: int) -> np.ndarray:
        """Tokens of document `index` of pair number `pair`."""
        tokens, entries = read_pair(self.path / self.pairs[pair]["name"])
        start = int(entries.pointers[index]) // self.dtype.itemsize
        return np.array(tokens[start : start + int(entries.lengths[index])])

    def verify(self, progress: Callable[[int], None] = lambda size: None) -> None:
        """Compares every byte with the manifest; `progress` gets the bytes of each file checked. Raises DamagedError."""
        for name, entry in self.manifest["files"].items():
            check_size(self.path / name, entry["bytes"])
            if sha256_file(self.path / name) != entry["sha256"]:
                raise DamagedError(
                    "hash-differs",
                    f"{self.path / name}: differs from its hash in the manifest; restore it from a copy",
                )
        for pair in self.pairs:
            hashes, index_hashes = read_sums(self.path / pair["name"], pair)
            check_file(self._binary(pair), pair["bin_bytes"], hashes, BLOCK_BYTES)
            check_file(self.path / f"{pair['name']}.idx", pair["idx_bytes"], index_hashes, BLOCK_BYTES)
            progress(pair["bin_bytes"] + pair["idx_bytes"])
