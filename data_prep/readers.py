"""Documents out of files: .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt (one document a file).

Every line, row or file becomes a `Document` or a `Reject`; only an empty line is neither, and those are counted. Lines
end at b"\\n" alone (one b"\\r" before it is dropped), a UTF-8 byte order mark at the start of a file is skipped, and
everything else in a text is kept as it is. Memory is bounded: a document may have MAX_DOCUMENT_BYTES.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from fastcpt import UserError
from fastcpt.data_prep.inputs import Piece

# The longest line, text file or parquet value. Far above any text worth training on, and small enough to hold.
MAX_DOCUMENT_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20
# A block of a zstd frame takes at least 4 bytes and holds at most 128 KiB, so this much input gives at most 33 MB.
ZSTD_FEED_BYTES = 1 << 10
PARQUET_ROWS = 256
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """data: the text, valid UTF-8, not empty. line: counted from 0 within the piece. offset: of the line, in bytes of
    the (decompressed) file; -1 in a parquet file, whose rows have none."""

    data: bytes
    group: str | None
    line: int
    offset: int


class Reject(NamedTuple):
    """A document that cannot be used (or `documents` of them), and why. `reason` is one of a few, `detail` says the rest."""

    reason: str
    detail: str
    line: int
    offset: int
    documents: int = 1


class Bad(Exception):
    """Why a document is rejected; `at` is the offset within its line."""

    def __init__(self, reason: str, detail: str, at: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.at = reason, detail, at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return record


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_json)


def parse(line: bytes) -> dict[str, Any]:
    """One line of JSON, an object. The one place that knows the JSON parser. Raises Bad."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise Bad("invalid UTF-8", f"byte 0x{line[error.start]:02x}", error.start) from None
    try:
        record = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Bad("broken JSON", error.msg, len(text[: error.pos].encode())) from None
    except RecursionError:
        raise Bad("broken JSON", "nested too deeply") from None
    except ValueError as error:
        raise Bad("broken JSON", str(error)) from None
    if not isinstance(record, dict):
        raise Bad("not an object", f"the line holds a {type(record).__name__}")
    return record


def _field(record: dict[str, Any], key: str) -> Any:
    """The value of a key; "meta.source" is also the key "source" of the object "meta"."""
    value: Any = record
    for part in (key,) if key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise Bad("missing key", f"no {key!r} among {', '.join(map(repr, list(record)[:8])) or 'no keys at all'}")
        value = value[part]
    return value


def _encoded(text: Any, key: str) -> bytes:
    """UTF-8 of a value that JSON (str) or parquet (bytes of a string column) gave. Raises Bad."""
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise Bad("lone surrogate", f"U+{ord(text[error.start]):04X} in {key!r}") from None
    if not isinstance(text, bytes):
        raise Bad("not a string", f"{key!r} is {'null' if text is None else 'a ' + type(text).__name__}")
    check_utf8(text)
    return text


def check_utf8(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise Bad("invalid UTF-8", f"byte 0x{data[error.start]:02x}", error.start) from None


def _text(data: bytes) -> bytes:
    if not data:
        raise Bad("empty document", "it has no text")
    if len(data) > MAX_DOCUMENT_BYTES:
        raise Bad("too long", f"over {MAX_DOCUMENT_BYTES:,} bytes; split it")
    return data


def _group(data: bytes, key: str) -> str:
    """A group's value becomes the end of a folder's name; one that cannot is rejected, never rewritten."""
    value = data.decode()
    if not value or len(data) > 100 or not value.isprintable() or value != value.strip() or set("/\\") & set(value):
        raise Bad("not a name", f"{key!r} is {value[:100]!r}, which cannot end the name of a folder")
    return value


class ArchiveError(Exception):
    """A compressed file that ends early or cannot be decompressed; what came before it is good."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The decompressed content, at most CHUNK_BYTES at a time, of all members. Raises ArchiveError at the end."""
    stream: Any = None
    members = 0
    while data := file.read(CHUNK_BYTES):
        while data:
            if stream is None:
                data = data.lstrip(b"\0") if members else data  # tapes and tar pad with zeros
                if not data:
                    break
                stream = zlib.decompressobj(31)
                members += 1
            try:
                yield stream.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                raise ArchiveError("damaged archive", str(error)) from None
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
    frames = 0
    out: list[bytes] = []
    size = 0
    try:
        while data := file.read(ZSTD_FEED_BYTES):
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
                out, size = [], 0
    except zstandard.ZstdError as error:
        yield b"".join(out)
        raise ArchiveError("damaged archive", str(error)) from None
    yield b"".join(out)
    if stream is not None or not frames:
        raise ArchiveError("truncated archive", "the zstd frame ends early")


def split_lines(chunks: Iterable[bytes], offset: int) -> Iterator[tuple[int, bytes | Bad]]:
    """(offset, line without its newline); Bad for a line that is too long or that an archive's end cut off."""
    head: list[bytes] = []
    size = 0  # of the line so far; beyond the limit its bytes are not kept
    try:
        for chunk in chunks:
            *whole, tail = chunk.split(b"\n")
            for line in whole:
                if size:
                    head.append(line)
                    line, extra = b"".join(head), size + len(line)
                    head, size = [], 0
                else:
                    extra = len(line)
                too_long = extra > MAX_DOCUMENT_BYTES
                yield offset, Bad("too long", f"a line of {extra:,} bytes; split it") if too_long else line
                offset += extra + 1
            size += len(tail)
            head.append(tail)
            if size > MAX_DOCUMENT_BYTES:
                head = []
    except ArchiveError as error:
        yield offset, Bad(error.reason, error.detail)
        return
    if size > MAX_DOCUMENT_BYTES:
        yield offset, Bad("too long", f"a line of {size:,} bytes; split it")
    elif size:
        yield offset, b"".join(head)


def _file_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


class PieceReader:
    """Iterates over the documents of a piece. Afterwards `lines` is how many lines (rows, files) there were and `blank`
    how many of them were empty: `lines - blank` is the number of documents, good and rejected."""

    def __init__(self, piece: Piece, text_key: str, group_key: str | None) -> None:
        self.piece, self.text_key, self.group_key = piece, text_key, group_key
        self.lines = self.blank = 0

    def __iter__(self) -> Iterator[Document | Reject]:
        source = self.piece.source
        with open(source.path, "rb") as file:
            if source.suffix == ".parquet":
                yield from self._parquet()
            elif source.suffix == ".txt":
                yield self._text_file(file)
            elif source.suffix == ".jsonl":
                yield from self._jsonl(file)
            else:
                chunks = gzip_chunks(file) if source.suffix == ".jsonl.gz" else zstd_chunks(file)
                for offset, line in split_lines(chunks, 0):
                    yield from self._line(line, offset)
            status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
            raise UserError(f"{source.path}: changed while it was read; leave the inputs alone and start again")

    def _jsonl(self, file: BinaryIO) -> Iterator[Document | Reject]:
        start = self.piece.start
        # The line that is under way at `start` belongs to the piece before, so begin at its last byte and drop one.
        file.seek(max(0, start - 1))
        lines = split_lines(_file_chunks(file), max(0, start - 1))
        if start:
            next(lines, None)
        for offset, line in lines:
            if offset >= self.piece.stop:
                return
            yield from self._line(line, offset)

    def _line(self, line: bytes | Bad, offset: int) -> Iterator[Document | Reject]:
        number = self.lines
        self.lines += 1
        if isinstance(line, Bad):
            yield Reject(line.reason, line.detail, number, offset)
            return
        line = line.removesuffix(b"\r")
        if offset == 0 and line.startswith(BOM):
            offset, line = len(BOM), line[len(BOM) :]
        if not line:
            self.blank += 1
            return
        try:
            record = parse(line)
            data = _text(_encoded(_field(record, self.text_key), self.text_key))
            group = None
            if self.group_key is not None:
                group = _group(_encoded(_field(record, self.group_key), self.group_key), self.group_key)
            yield Document(data, group, number, offset)
        except Bad as bad:
            yield Reject(bad.reason, bad.detail, number, offset + bad.at)

    def _text_file(self, file: BinaryIO) -> Document | Reject:
        self.lines = 1
        data = file.read(min(self.piece.source.size, MAX_DOCUMENT_BYTES + len(BOM) + 1))
        start = len(BOM) if data.startswith(BOM) else 0
        data = data[start:]
        try:
            if self.group_key is not None:
                raise Bad("missing key", f"a text file has no {self.group_key!r}")
            check_utf8(_text(data))
        except Bad as bad:
            return Reject(bad.reason, bad.detail, data.count(b"\n", 0, bad.at), start + bad.at)
        return Document(data, None, 0, start)

    def _parquet(self) -> Iterator[Document | Reject]:
        try:
            table = pq.ParquetFile(self.piece.source.path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            self.lines = 1
            yield Reject("damaged file", first_line(error), 0, 0)
            return
        for group in range(self.piece.start, self.piece.stop):
            before, rows = self.lines, table.metadata.row_group(group).num_rows
            try:
                yield from self._row_group(table, group)
            except (pa.ArrowException, OSError) as error:
                lost = before + rows - self.lines
                yield Reject("damaged file", f"row group {group}: {first_line(error)}", self.lines, -1, lost)
            self.lines = before + rows

    def _row_group(self, table: pq.ParquetFile, group: int) -> Iterator[Document | Reject]:
        paths = [_column_path(table, key) for key in (self.text_key, self.group_key) if key is not None]
        columns = list(dict.fromkeys(".".join(path) for path in paths if path))
        for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False):
            values = [_column(batch, path) for path in paths]
            for row in zip(*values, strict=True):
                self.lines += 1
                yield self._row(row, [path is not None for path in paths], self.lines - 1)

    def _row(self, row: tuple[Any, ...], present: list[bool], number: int) -> Document | Reject:
        try:
            for key, there in zip((self.text_key, self.group_key), present):
                if not there:
                    raise Bad("missing key", f"no column {key!r}")
            data = _text(_encoded(row[0], self.text_key))
            group = None
            if self.group_key is not None:
                group = _group(_encoded(row[1], self.group_key), self.group_key)
            return Document(data, group, number, -1)
        except Bad as bad:
            return Reject(bad.reason, bad.detail, number, -1)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _column_path(table: pq.ParquetFile, key: str) -> list[str] | None:
    """["text"], or ["meta", "source"] for a field of a struct column; None when there is no such column."""
    schema = table.schema_arrow
    if key in schema.names:
        return [key]
    first, *rest = key.split(".")
    kind = schema.field(first).type if first in schema.names else None
    for part in rest:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return None if kind is None else [first, *rest]


def _column(batch: pa.RecordBatch, path: list[str] | None) -> list[Any]:
    """The values of a column: bytes for strings, because Arrow does not check that they are UTF-8."""
    if path is None:
        return [None] * batch.num_rows
    column = batch.column(path[0])
    if len(path) > 1:
        column = pc.struct_field(column, path[1:])
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def lines_before(piece: Piece) -> int:
    """How many lines or rows of the file come before the piece. Reads the file up to there: for error messages."""
    source = piece.source
    if piece.start == 0:
        return 0
    if source.suffix == ".parquet":
        with pq.ParquetFile(source.path) as table:
            return sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
    with open(source.path, "rb") as file:
        left, count = piece.start - 1, 1
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            left -= len(chunk)
            count += chunk.count(b"\n")
    return count
