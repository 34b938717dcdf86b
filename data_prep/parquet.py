"""Documents out of .parquet files. Apart from the other readers, because Arrow takes a quarter of a second to import."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.data_prep import store
from fastcpt.data_prep.documents import Document, Reject, encoded, first_line, group_of, text_of
from fastcpt.data_prep.streams import Bad

PARQUET_ROWS = 256


def group_sizes(path: str) -> list[int]:
    """The bytes of each row group; of a damaged file none, which is left to its reader."""
    try:
        with store.open_read(path) as opened, pq.ParquetFile(opened) as file:
            return [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        return []


def rows_before(path: str, group: int) -> int:
    with store.open_read(path) as opened, pq.ParquetFile(opened) as table:
        return sum(table.metadata.row_group(index).num_rows for index in range(group))


def documents(reader: Any, file: BinaryIO) -> Iterator[Document | Reject]:
    """Those of the row groups of the piece of a `PieceReader`; it counts the rows in `reader.lines`."""
    try:
        metadata = pq.read_metadata(file)
        columns = (metadata.schema.column(index) for index in range(metadata.num_columns))
        # As a dictionary: a page may say "this value of 30 MB, 256 times" in a few bytes.
        texts = [c.path for c in columns if c.path == reader.text_key and c.physical_type == "BYTE_ARRAY"]
        table = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, read_dictionary=texts)
    except (pa.ArrowException, OSError) as error:
        reader.lines = 1
        yield Reject("damaged file", first_line(error), 0, 0)
        return
    for group in range(reader.piece.start, reader.piece.stop):
        before, rows = reader.lines, table.metadata.row_group(group).num_rows
        why = "it holds fewer rows than it says"
        try:
            yield from _row_group(reader, table, group, rows)
        except (pa.ArrowException, OSError) as error:
            why = first_line(error)
        if lost := before + rows - reader.lines:
            yield Reject("damaged file", f"row group {group}: {why}", reader.lines, -1, lost)
            reader.lines = before + rows


def _row_group(reader: Any, table: pq.ParquetFile, group: int, rows: int) -> Iterator[Document | Reject]:
    paths = [_column_path(table, key) for key in (reader.text_key, reader.group_key) if key is not None]
    columns = list(dict.fromkeys(".".join(path) for path in paths if path))
    for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False):
        values = [_column(batch, path) for path in paths]
        if (rows := rows - batch.num_rows) < 0:
            raise pa.ArrowInvalid("it holds more rows than it says")
        for row in zip(*values, strict=True):
            reader.lines += 1
            yield _row(reader, row, [path is not None for path in paths], reader.lines - 1)


def _row(reader: Any, row: tuple[Any, ...], present: list[bool], number: int) -> Document | Reject:
    try:
        for key, there in zip((reader.text_key, reader.group_key), present):
            if not there:
                raise Bad("missing key", f"no column {key!r}")
        data = text_of(encoded(row[0], reader.text_key))
        group = None
        if reader.group_key is not None:
            group = group_of(encoded(row[1], reader.group_key), reader.group_key)
        return Document(data, group, number, -1)
    except Bad as bad:
        return Reject(bad.reason, bad.detail, number, -1)


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
        distinct, values = _binary(column.dictionary), dict[int | None, Any]()
        for index in column.indices.to_pylist():
            if index is not None and not 0 <= index < len(distinct):
                raise pa.ArrowInvalid(f"value {index} of a dictionary of {len(distinct)}")
            if index not in values:
                values[index] = None if index is None else distinct[index].as_py()
        return [values[index] for index in column.indices.to_pylist()]
    return _binary(column).to_pylist()


def _binary(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        return column.cast(pa.large_binary())
    return column
