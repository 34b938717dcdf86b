"""Token files of other projects: which files an input names, what each holds, and where its documents end.

    nanogpt    tokens alone, an end-of-document token (EOD) after each document (karpathy/nanoGPT, data/*/prepare.py)
    llmc       256 int32: magic, version, tokens; then tokens, an EOD before each document. Documents go on from one file
               into the next (karpathy/llm.c, dev/data/data_common.py; KellerJordan/modded-nanogpt)
    megatron   NAME.bin and NAME.idx (NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py; EleutherAI/gpt-neox)
    pythia     sequences of 2049 tokens in training order, cut anywhere into NAME-00000-of-00020.bin and so on
               (EleutherAI/pile-deduped-pythia-preshuffled); its sequences are kept whole, as documents without an EOD
    datatrove  NAME.ds, tokens alone, and NAME.ds.index, uint64: tokens up to the end of each document
               (huggingface/datatrove, pipeline/tokens/tokenizer.py)
    olmo       tokens alone as in nanogpt, uint16 or uint32; named .npy, but not NumPy's format (allenai/OLMo)

Opening looks at sizes, headers and indexes; the tokens themselves are read later, a block at a time.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastcpt import UserError
from fastcpt.data_prep.encoding import Vocabulary
from fastcpt.shards import HEADER_BYTES, MAGIC, read_index

Source = Literal["nanogpt", "llmc", "megatron", "pythia", "datatrove", "olmo"]
BLOCK_TOKENS = 4 << 20
SEQUENCE_TOKENS = 2049
LLMC_HEADER_BYTES = 1024
LLMC_MAGICS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: (version, dtype); the second is Llama 3's
NUMPY_MAGIC = b"\x93NUMPY"
PART = re.compile(r"(.*)-(\d+)-of-\d+\.bin")


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens. start: the bytes before them. ends (D,) int64: tokens up to the end of each document, where
    an index tells."""

    path: Path
    dtype: np.dtype
    start: int
    tokens: int
    ends: np.ndarray | None = None

    def offset(self, token: int) -> int:
        return self.start + token * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """Raises UserError when the file has become shorter."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.tokens:
                block = np.fromfile(file, self.dtype, min(self.tokens - done, BLOCK_TOKENS))
                if not len(block):
                    raise UserError(
                        "input-changed",
                        f"{self.path}: ends at byte {self.offset(done):,}, it had {self.offset(self.tokens):,}; "
                        "it was changed while it was read, so run again when it is whole",
                    )
                done += len(block)
                yield block


def _whole_tokens(path: Path, dtype: np.dtype, start: int = 0) -> int:
    """The number of tokens of a file. Raises UserError when there are none, or not a whole number."""
    size = path.stat().st_size - start
    if size <= 0:
        raise UserError(
            "token-file-empty", f"{path}: {size + start:,} bytes, so it holds no token; leave it out, or get it whole"
        )
    if size % dtype.itemsize:
        kind = " or check --dtype" if dtype.itemsize == 4 else ""
        raise UserError(
            "token-file-odd-size",
            f"{path}: {size + start:,} bytes, and {size % dtype.itemsize} of them, from byte "
            f"{start + size - size % dtype.itemsize:,} on, are no whole {dtype.name} token; it was cut, so get it whole{kind}",
        )
    return size // dtype.itemsize


def _head(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _refuse_headers(path: Path, source: Source) -> None:
    """What a file without a header must not start with."""
    head = _head(path, 8)
    if head.startswith(NUMPY_MAGIC):
        raise UserError(
            "token-file-is-npy",
            f"{path}: byte 0 is {NUMPY_MAGIC!r}, a real .npy file, where --source {source} has tokens alone; "
            "write its array with .tofile()",
        )
    magic = int.from_bytes(head[:4], "little")
    if magic in LLMC_MAGICS and int.from_bytes(head[4:8], "little") == LLMC_MAGICS[magic][0]:
        raise UserError(
            "token-file-is-llmc", f"{path}: byte 0 is {magic}, the magic of an llm.c file; use --source llmc"
        )


def _raw_dtype(path: Path, given: str | None, guess: str) -> np.dtype:
    """`given`, else `guess`; uint32 that would be read as uint16 is refused, since it would double as many ids 0."""
    dtype = np.dtype(given or guess).newbyteorder("<")
    if given is None and dtype.itemsize == 2:
        first = np.frombuffer(_head(path, 8192)[: path.stat().st_size // 4 * 4], "<u2")
        if len(first) >= 16 and first[0::2].any() and not first[1::2].any():
            raise UserError(
                "dtype-wrong",
                f"{path}: every second uint16 from byte 2 on is 0, so these are uint32; use --dtype uint32 "
                "(or --dtype uint16 if they are not)",
            )
    return dtype


def _open_nanogpt(paths: list[Path], vocabulary: Vocabulary, dtype: str | None) -> Iterator[TokenFile]:
    for path in paths:
        _refuse_headers(path, "nanogpt")
        found = _raw_dtype(path, dtype, "uint16")
        yield TokenFile(path, found, 0, _whole_tokens(path, found))


def _open_olmo(paths: list[Path], vocabulary: Vocabulary, dtype: str | None) -> Iterator[TokenFile]:
    for path in paths:
        _refuse_headers(path, "olmo")
        found = _raw_dtype(path, dtype, "uint16" if vocabulary.size <= 1 << 16 else "uint32")
        yield TokenFile(path, found, 0, _whole_tokens(path, found))


def _open_llmc(paths: list[Path], vocabulary: Vocabulary, dtype: str | None) -> Iterator[TokenFile]:
    for path in paths:
        head = np.frombuffer(_head(path, 12).ljust(12, b"\0"), "<i4")
        magic, version, tokens = (int(value) for value in head)
        size = path.stat().st_size
        if magic not in LLMC_MAGICS:
            raise UserError(
                "llmc-magic",
                f"{path}: byte 0 is {magic}, not {' or '.join(map(str, LLMC_MAGICS))}, the magic of llm.c's token "
                "files; check --source",
            )
        wanted, name = LLMC_MAGICS[magic]
        if version != wanted:
            raise UserError(
                "llmc-version", f"{path}: byte 4 is version {version}, known is {wanted}; write it with a current llm.c"
            )
        found = np.dtype(name)
        expected = LLMC_HEADER_BYTES + tokens * found.itemsize
        if tokens < 1 or size != expected:
            raise UserError(
                "token-file-size",
                f"{path}: {size:,} bytes, but byte 8 promises {tokens:,} tokens, {expected:,} bytes; "
                "it was cut or overwritten, so get it whole",
            )
        yield TokenFile(path, found, LLMC_HEADER_BYTES, tokens)


def _open_megatron(paths: list[Path], vocabulary: Vocabulary, dtype: str | None) -> Iterator[TokenFile]:
    for path in paths:
        binary, path = path.with_suffix(".bin"), path.with_suffix(".idx")
        for each in (path, binary):
            if not each.is_file():
                raise UserError(
                    "token-index-missing", f"{each}: no such file; a Megatron pair is a .bin and a .idx side by side"
                )
        index = read_index(path)
        sizes = index.lengths.astype(np.int64)
        starts = np.cumsum(sizes) - sizes
        if len(wrong := np.flatnonzero((index.pointers != starts * index.dtype.itemsize) | (sizes < 1))):
            at = int(wrong[0])
            raise UserError(
                "megatron-sequences",
                f"{path}: sequence {at:,} (byte {HEADER_BYTES + 4 * at:,}) has {sizes[at]:,} tokens from byte "
                f"{index.pointers[at]:,}; they must follow one another and none be empty; write the pair again",
            )
        documents = index.documents
        if len(documents) < 2 or documents[0] != 0 or documents[-1] != len(sizes) or (np.diff(documents) < 1).any():
            raise UserError(
                "megatron-documents",
                f"{path}: its documents, from byte {HEADER_BYTES + 12 * len(sizes):,} on, do not go from 0 up to its "
                f"{len(sizes):,} sequences; write the pair again, each document ended by end_document()",
            )
        tokens, size = int(sizes.sum()), binary.stat().st_size
        if size != tokens * index.dtype.itemsize:
            raise UserError(
                "token-file-size",
                f"{binary}: {size:,} bytes, its index promises {tokens:,} tokens, {tokens * index.dtype.itemsize:,} "
                "bytes; it was cut or belongs to another index, so get both whole",
            )
        ends = (starts + sizes)[documents[1:] - 1]
        yield TokenFile(binary, index.dtype.newbyteorder("<"), 0, tokens, ends)


def _open_datatrove(paths: list[Path], vocabulary: Vocabulary, dtype: str | None) -> Iterator[TokenFile]:
    for path in paths:
        index, metadata = Path(f"{path}.index"), Path(f"{path}.metadata")
        if not index.is_file():
            raise UserError(
                "token-index-missing", f"{index}: no such file; datatrove writes it with save_index, on by default"
            )
        guess = "uint16" if vocabulary.size <= 1 << 16 else "uint32"
        told = dtype
        if told is None and metadata.is_file():
            line = metadata.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            token_bytes = line.rpartition("|")[2]
            if token_bytes not in ("2", "4"):
                raise UserError(
                    "datatrove-metadata",
                    f"{metadata}: line 1 is {line[:80]!r}, not TOKENIZER|2 or TOKENIZER|4; mend or remove it",
                )
            told = "uint16" if token_bytes == "2" else "uint32"
        found = _raw_dtype(path, told, guess)
        tokens = _whole_tokens(path, found)
        _whole_tokens(index, np.dtype("<u8"))
        ends = np.fromfile(index, "<u8").astype(np.int64)
        if len(wrong := np.flatnonzero(np.diff(ends, prepend=0) < 1)):
            at = int(wrong[0])
            raise UserError(
                "datatrove-index",
                f"{index}: byte {8 * at:,} ends document {at:,} at token {ends[at]:,}, not after its start; "
                "the index was damaged, or the document is empty: tokenize it again",
            )
        if ends[-1] != tokens:
            raise UserError(
                "token-file-size",
                f"{path}: {path.stat().st_size:,} bytes are {tokens:,} {found.name} tokens, its index ends at "
                f"{ends[-1]:,} (byte {8 * len(ends) - 8:,} of it); one of them was cut, so get both whole",
            )
        yield TokenFile(path, found, 0, tokens, ends)


def _check_sequences(path: Path, tokens: int) -> None:
    """The index beside the parts, where there is one, must say sequences of 2049 uint16, as many as there are."""
    head = _head(path, HEADER_BYTES).ljust(HEADER_BYTES, b"\0")
    version, code, sequences = int.from_bytes(head[9:17], "little"), head[17], int.from_bytes(head[18:26], "little")
    if head[:9] != MAGIC or (version, code) != (1, 8):
        raise UserError(
            "megatron-header",
            f"{path}: starts with {head[:9]!r}, version {version}, dtype code {code} (byte 17), not {MAGIC!r}, 1, "
            "8 (uint16); get it again",
        )
    if path.stat().st_size < HEADER_BYTES + 12 * sequences or sequences * SEQUENCE_TOKENS < tokens:
        raise UserError(
            "pythia-part-size",
            f"{path}: {path.stat().st_size:,} bytes, {sequences:,} sequences (byte 18) for parts that hold "
            f"{tokens // SEQUENCE_TOKENS:,}; it was cut or belongs to other parts, so get it again",
        )
    lengths = np.memmap(path, "<i4", "r", HEADER_BYTES, (sequences,))
    for start in range(0, sequences, BLOCK_TOKENS):
        if len(wrong := np.flatnonzero(lengths[start : start + BLOCK_TOKENS] != SEQUENCE_TOKENS)):
            at = start + int(wrong[0])
            raise UserError(
                "pythia-sequence-length",
                f"{path}: byte {HEADER_BYTES + 4 * at:,} gives sequence {at:,} {lengths[at]:,} tokens, not "
                f"{SEQUENCE_TOKENS:,}; if it is no pre-shuffled set, use --source megatron",
            )


def _open_pythia(paths: list[Path], vocabulary: Vocabulary, dtype: str | None) -> Iterator[TokenFile]:
    matches = [PART.fullmatch(path.name) for path in paths]
    numbered = sorted((int(match[2]), path, match[1]) for match, path in zip(matches, paths) if match)
    if (len(paths) > 1 and len(numbered) < len(paths)) or len({(path.parent, name) for _, path, name in numbered}) > 1:
        raise UserError(
            "pythia-parts", f"{paths[0].parent}: not the parts of one set, NAME-00000-of-00020.bin and so on; name them"
        )
    for expected, (number, path, _) in enumerate(numbered):
        if number != expected:
            raise UserError(
                "pythia-parts",
                f"{path}: part {number} where part {expected} should be; sequences go on from part to part, so give "
                "all parts from 0 on",
            )
    ordered = [path for _, path, _ in numbered] or paths
    found = np.dtype("<u2")
    files = [TokenFile(path, found, 0, _whole_tokens(path, found)) for path in ordered]
    tokens = sum(file.tokens for file in files)
    if over := tokens % SEQUENCE_TOKENS:
        last = files[-1]
        kept = last.offset(last.tokens - over)
        raise UserError(
            "pythia-sequence-cut",
            f"{last.path}: its end cuts a sequence after {over:,} of {SEQUENCE_TOKENS:,} tokens (from byte {kept:,} on); "
            "it was cut, or the next part is missing: give that too",
        )
    index = ordered[0].with_name((numbered[0][2] if numbered else ordered[0].stem) + ".idx")
    if index.exists():
        _check_sequences(index, tokens)
    yield from files


@dataclass(frozen=True)
class Format:
    """suffix: of its files in a folder. cut: where a document ends."""

    suffix: str
    cut: Literal["after EOD", "before EOD", "index", "sequence"]
    open: Callable[[list[Path], Vocabulary, str | None], Iterable[TokenFile]]
    takes_dtype: bool = False


FORMATS: dict[str, Format] = {
    "nanogpt": Format(".bin", "after EOD", _open_nanogpt, True),
    "llmc": Format(".bin", "before EOD", _open_llmc),
    "megatron": Format(".idx", "index", _open_megatron),
    "pythia": Format(".bin", "sequence", _open_pythia),
    "datatrove": Format(".ds", "index", _open_datatrove, True),
    "olmo": Format(".npy", "after EOD", _open_olmo, True),
}


def find_files(arguments: Iterable[str], source: Source) -> list[Path]:
    """The files that the INPUTs name, in their order; those of a folder or a pattern in name order."""
    suffix = FORMATS[source].suffix
    found: dict[str, Path] = {}
    for argument in arguments:
        path = Path(argument)
        if source == "megatron" and not path.exists() and Path(f"{argument}.idx").exists():
            path = Path(f"{argument}.idx")  # a pair named as Megatron's own options name it
        if path.is_dir():
            some: list[Any] = sorted(each for each in path.iterdir() if each.name.endswith(suffix) and each.is_file())
        else:
            some = [path] if path.is_file() else sorted(filter(os.path.isfile, glob.glob(argument, recursive=True)))
        if not some:
            raise UserError(
                "inputs-missing",
                f"{argument}: no such file, or no {suffix} file in this folder; check the path and --source",
            )
        for each in map(Path, some):
            each = each.with_suffix(".idx") if source == "megatron" else each
            if (real := os.path.abspath(each)) in found:
                raise UserError(
                    "input-twice", f"{each}: named twice, so its documents would count double; give each input once"
                )
            found[real] = each
    return list(found.values())
