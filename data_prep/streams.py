"""Lines out of files: gzip and zstd undone, then cut at b"\\n". Memory is bounded: a line may have MAX_DOCUMENT_BYTES;
so is time: an archive may expand MAX_EXPANSION-fold."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import zstandard

# The longest line, text file or parquet value. Far above any text worth training on, and small enough to hold.
MAX_DOCUMENT_BYTES = 1 << 28
# Text shrinks to a tenth or a hundredth; what grows a thousandfold, beyond its first 64 MiB, was made to.
MAX_EXPANSION, FREE_EXPANSION_BYTES = 1000, 1 << 26
CHUNK_BYTES = 1 << 20
LONG_LINE = 1024  # in shorter ones, on average, `bytes.split` is the faster way
# A block of a zstd frame takes at least 4 bytes and holds at most 128 KiB, so this much input gives at most 33 MB.
ZSTD_FEED_BYTES = 1 << 10


class Bad(Exception):
    """Why a document is rejected; `at` is the offset within its line."""

    def __init__(self, reason: str, detail: str, at: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.at = reason, detail, at


class ArchiveError(Exception):
    """A compressed file that ends early or cannot be decompressed; what came before it is good."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _check_expansion(taken: int, made: int) -> None:
    if made > FREE_EXPANSION_BYTES and made > MAX_EXPANSION * taken:
        raise ArchiveError("compression bomb", f"{made:,} bytes out of {taken:,}; reading of this file ends here")


def gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The decompressed content, at most CHUNK_BYTES at a time, of all members. Raises ArchiveError at the end."""
    stream: Any = None
    members = taken = made = 0
    while data := file.read(CHUNK_BYTES):
        taken += len(data)
        while data:
            if stream is None:
                data = data.lstrip(b"\0") if members else data  # tapes and tar pad with zeros
                if not data:
                    break
                stream = zlib.decompressobj(31)
                members += 1
            try:
                chunk = stream.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                raise ArchiveError("damaged archive", str(error)) from None
            yield chunk
            made += len(chunk)
            _check_expansion(taken, made)
            data = stream.unconsumed_tail or stream.unused_data
            if stream.eof:
                stream = None
    if stream is not None or not members:
        raise ArchiveError("truncated archive", "the gzip stream ends early")


def zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The decompressed content of all frames, in bounded pieces. Raises ArchiveError at the end.

    `stream_reader` would take a file that was cut for its end, and `decompressobj` alone returns all that its input
    holds, gigabytes out of kilobytes: so it is fed little at a time.
    """
    decompressor = zstandard.ZstdDecompressor()
    stream: Any = None
    frames = taken = made = size = 0
    out: list[bytes] = []
    try:
        while data := file.read(ZSTD_FEED_BYTES):
            taken += len(data)
            while data:
                if stream is None:
                    stream = decompressor.decompressobj()
                    frames += 1
                out.append(stream.decompress(data))
                size += len(out[-1])
                data = stream.unused_data if stream.eof else b""
                if stream.eof:
                    stream = None
            if size >= CHUNK_BYTES:
                yield b"".join(out)
                made += size
                out, size = [], 0
                _check_expansion(taken, made)
    except zstandard.ZstdError as error:
        yield b"".join(out)
        raise ArchiveError("damaged archive", str(error)) from None
    yield b"".join(out)
    if stream is not None or not frames:
        raise ArchiveError("truncated archive", "the zstd frame ends early")


def _small(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """A chunk may be 33 MB of newlines, and a line is an object."""
    for chunk in chunks:
        if len(chunk) <= 2 * CHUNK_BYTES:
            yield chunk
        else:
            yield from (chunk[start : start + CHUNK_BYTES] for start in range(0, len(chunk), CHUNK_BYTES))


def line_start(file: BinaryIO, start: int, stop: int) -> int:
    """Where the first line that starts in bytes [start, stop) does, or any place from `stop` on if there is none. The line
    that is under way at `start` belongs to the piece before, and it may go on for long."""
    if start == 0:
        return 0
    position = start - 1
    file.seek(position)
    while position < stop and (chunk := file.read(CHUNK_BYTES)):
        if (at := chunk.find(b"\n")) >= 0:
            return position + at + 1
        position += len(chunk)
    return stop


def _cut(chunk: bytes) -> list[bytes]:
    """`chunk.split(b"\\n")`, which looks at each byte; `find` does not, so it is faster unless lines are short."""
    pieces: list[bytes] = []
    start, most = 0, len(chunk) // LONG_LINE
    while (end := chunk.find(b"\n", start)) >= 0:
        if len(pieces) == most:
            return chunk.split(b"\n")
        pieces.append(chunk[start:end])
        start = end + 1
    pieces.append(chunk[start:])
    return pieces


def split_lines(chunks: Iterable[bytes], offset: int) -> Iterator[tuple[int, list[bytes] | Bad]]:
    """(offset of the first, lines without their newlines), about a chunk of them at a time, for the caller to keep or to
    empty; Bad for one line that is too long or that an archive's end cut off."""
    head: list[bytes] = []
    size = 0  # of the line so far; beyond the limit its bytes are not kept
    try:
        for chunk in _small(chunks):
            first, *lines = _cut(chunk)
            size += len(first)
            head.append(first)
            if size > MAX_DOCUMENT_BYTES:
                head = []
            if not lines:
                continue
            tail = lines.pop()
            if size > MAX_DOCUMENT_BYTES:
                yield offset, Bad("too long", f"a line of {size:,} bytes; split it")
                offset += size + 1
            else:
                lines.insert(0, b"".join(head))
            head = []  # a long line is there once, while others look at it
            if lines:
                size = sum(map(len, lines)) + len(lines)
                yield offset, lines
                offset += size
            head, size = [tail], len(tail)
    except ArchiveError as error:
        yield offset, Bad(error.reason, error.detail)
        return
    if size > MAX_DOCUMENT_BYTES:
        yield offset, Bad("too long", f"a line of {size:,} bytes; split it")
    elif size:
        yield offset, [b"".join(head)]


def file_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
