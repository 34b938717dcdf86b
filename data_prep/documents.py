"""What readers give: documents and rejects, and the rules that both kinds of text and of group names obey."""

from typing import Any, NamedTuple

from fastcpt.data_prep import streams
from fastcpt.data_prep.streams import Bad


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


def encoded(text: Any, key: str) -> bytes:
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


def text_of(data: bytes) -> bytes:
    if not data:
        raise Bad("empty document", "it has no text")
    if len(data) > streams.MAX_DOCUMENT_BYTES:
        raise Bad("too long", f"over {streams.MAX_DOCUMENT_BYTES:,} bytes; split it")
    return data


def group_of(data: bytes, key: str) -> str:
    """A group's value becomes the end of a folder's name; one that cannot is rejected, never rewritten."""
    value = data.decode()
    if not value or len(data) > 100 or not value.isprintable() or value != value.strip() or set("/\\") & set(value):
        raise Bad("not a name", f"{key!r} is {value[:100]!r}, which cannot end the name of a folder")
    return value


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
