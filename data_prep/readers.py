"""Documents out of files: .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt (one document a file).

Every line, row or file becomes a `Document` or a `Reject`; only an empty line is neither, and those are counted. Lines
end at b"\\n" alone (one b"\\r" before it is dropped), a UTF-8 byte order mark at the start of a file is skipped, and
everything else in a text is kept as it is. Of the keys of a JSON object those that are asked for must not occur twice.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import simdjson

from fastcpt import UserError
from fastcpt.data_prep import store, streams
from fastcpt.data_prep.documents import Document, Reject, check_utf8, encoded, group_of, text_of
from fastcpt.data_prep.inputs import Piece
from fastcpt.data_prep.streams import (
    CHUNK_BYTES,
    Bad,
    file_chunks,
    gzip_chunks,
    line_start,
    split_lines,
    zstd_chunks,
)

KNOWN_GROUPS = 1000
# A longer line is read at leisure: the fast parser sets aside 13 bytes of memory for each byte of the longest.
AT_ONCE_BYTES = 16 << 20
OPENING = ord("{")
BOM = b"\xef\xbb\xbf"


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Twice(dict[str, Any]):
    """A JSON object in which the keys `twice` occur more than once."""

    twice: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    marked = _Twice(record)
    marked.twice = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}
    return marked


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_json)


def parse(line: bytes) -> dict[str, Any]:
    """One line of JSON, an object, at leisure: it finds what is wrong and where. Raises Bad."""
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
        if isinstance(value, _Twice) and part in value.twice:  # which of them is meant?
            raise Bad("broken JSON", f"the key {part!r} occurs twice in one object")
        value = value[part]
    return value


def _only(record: Any, key: str, parts: list[str]) -> Any:
    """As `_field`, of an object that the fast parser gives. Raises an error that says nothing if anything is unusual."""
    if len(parts) > 1 and key in record:
        raise LookupError
    for part in parts:
        if list(record.keys()).count(part) != 1:
            raise LookupError
        record = record[part]
    return record


class PieceReader:
    """Iterates over the documents of a piece. Afterwards `lines` is how many lines (rows, files) there were and `blank`
    how many of them were empty: `lines - blank` is the number of documents, good and rejected."""

    def __init__(self, piece: Piece, text_key: str, group_key: str | None) -> None:
        self.piece, self.text_key, self.group_key = piece, text_key, group_key
        self.lines = self.blank = 0
        self._parse = simdjson.Parser().parse
        self._plain = "\0" not in f"{text_key}{group_key}"  # where the fast parser would end a key
        self._text_path, self._group_path = text_key.split("."), (group_key or "").split(".")
        self._groups: dict[str, str] = {}  # values that were found good

    def __iter__(self) -> Iterator[Document | Reject]:
        source = self.piece.source
        with store.open_read(source.path) as file:
            if source.suffix == ".parquet":
                from fastcpt.data_prep import parquet

                yield from parquet.documents(self, file)
            elif source.suffix == ".txt":
                yield self._text_file(file)
            elif source.suffix == ".jsonl":
                yield from self._jsonl(file)
            else:
                chunks = gzip_chunks(file) if source.suffix == ".jsonl.gz" else zstd_chunks(file)
                yield from self._lines(split_lines(chunks, 0))
        if store.stat(source.path) != (source.size, source.version):
            raise UserError(
                "input-changed", f"{source.path}: changed while it was read; leave the inputs alone and start again"
            )

    def _jsonl(self, file: BinaryIO) -> Iterator[Document | Reject]:
        start = line_start(file, self.piece.start, self.piece.stop)
        if start >= self.piece.stop:  # not even a look: the line that goes on there may be long
            return iter(())
        file.seek(start)
        return self._lines(split_lines(file_chunks(file), start))

    def _lines(self, found: Iterator[tuple[int, list[bytes] | Bad]]) -> Iterator[Document | Reject]:
        compressed = self.piece.source.suffix != ".jsonl"
        for offset, lines in found:
            waiting = [lines] if isinstance(lines, Bad) else lines
            waiting.reverse()
            while waiting:
                if offset >= self.piece.stop and not compressed:
                    return
                line = waiting.pop()
                self.lines += 1
                if not line:  # at once: there can be very many
                    self.blank += 1
                    offset += 1
                    continue
                if isinstance(line, Bad):
                    yield Reject(line.reason, line.detail, self.lines - 1, offset)
                    continue
                item = self._at_once(line, offset) or self._closely(line, offset)
                offset += len(line) + 1
                del line  # it may be long, and nobody needs it while its text is tokenized
                if item is not None:
                    yield item

    def _at_once(self, line: bytes, offset: int) -> Document | None:
        """The document of a line, if nothing is unusual about it; None if it has to be looked at closely."""
        if len(line) > AT_ONCE_BYTES or line[0] != OPENING or not self._plain:
            return None
        try:
            record = self._parse(line)
            data = _only(record, self.text_key, self._text_path).encode()
            group = None
            if self.group_key is not None:
                group = self._groups[_only(record, self.group_key, self._group_path)]
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            return None
        return Document(data, group, self.lines - 1, offset) if data else None

    def _closely(self, line: bytes, offset: int) -> Document | Reject | None:
        """The document of a line, or what is wrong with it; None for an empty one."""
        number = self.lines - 1
        line = line.removesuffix(b"\r")
        if offset == 0 and line.startswith(BOM):
            offset, line = len(BOM), line[len(BOM) :]
        if not line:
            self.blank += 1
            return None
        try:
            record = parse(line)
            data = text_of(encoded(_field(record, self.text_key), self.text_key))
            group = None
            if self.group_key is not None:
                group = group_of(encoded(_field(record, self.group_key), self.group_key), self.group_key)
                if len(self._groups) < KNOWN_GROUPS:
                    self._groups[group] = group
            return Document(data, group, number, offset)
        except Bad as bad:
            return Reject(bad.reason, bad.detail, number, offset + bad.at)

    def _text_file(self, file: BinaryIO) -> Document | Reject:
        self.lines = 1
        data = file.read(min(self.piece.source.size, streams.MAX_DOCUMENT_BYTES + len(BOM) + 1))
        start = len(BOM) if data.startswith(BOM) else 0
        data = data[start:]
        try:
            if self.group_key is not None:
                raise Bad("missing key", f"a text file has no {self.group_key!r}")
            check_utf8(text_of(data))
        except Bad as bad:
            return Reject(bad.reason, bad.detail, data.count(b"\n", 0, bad.at), start + bad.at)
        return Document(data, None, 0, start)


def lines_before(piece: Piece) -> int:
    """How many lines or rows of the file come before the piece. Reads the file up to there: for error messages."""
    source = piece.source
    if piece.start == 0:
        return 0
    if source.suffix == ".parquet":
        from fastcpt.data_prep import parquet

        return parquet.rows_before(source.path, piece.start)
    with store.open_read(source.path) as file:
        left, count = piece.start - 1, 1
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            left -= len(chunk)
            count += chunk.count(b"\n")
    return count
