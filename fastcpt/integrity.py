"""Bytes that can be checked: block hashes, durable writes, and errors that say where. Standard library and numpy only.

A block's hash is the first 8 bytes of its SHA-256, read as a little-endian uint64. Shards (`shards.py`) keep one for
each 64 KiB, checkpoints (`checkpoint.py`) one for each 1 MiB.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from fastcpt import UserError


class DamagedError(UserError):
    """A file whose bytes are not those that its manifest recorded."""


def block_hash(block: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.sha256(block).digest()[:8], "little")


def blocks(file: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    while block := file.read(block_bytes):
        yield block


def file_hashes(path: Path, block_bytes: int) -> np.ndarray:
    """The block hashes of a whole file, uint64."""
    with open(path, "rb", buffering=0) as file:
        return np.fromiter((block_hash(block) for block in blocks(file, block_bytes)), dtype="<u8")


def check_size(path: Path, size: int) -> None:
    """Raises DamagedError when the file is missing or its size is not `size` bytes."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(
            "file-missing", f"{path}: the file is missing; restore it from a copy, or make it again"
        ) from None
    if actual != size:
        raise DamagedError(
            "file-size", f"{path}: {actual:,} bytes, its manifest says {size:,}; restore it, or make it again"
        )


def check_block(path: Path, start: int, block: bytes | memoryview, expected: int) -> None:
    """Raises DamagedError with the byte range unless `block`, which starts at byte `start` of a file, has its hash."""
    if block_hash(block) != expected:
        raise DamagedError(
            "hash-differs",
            f"{path}: bytes {start:,} to {start + len(block):,} differ from their hash; restore the file from a copy",
        )


def check_file(
    path: Path, size: int, hashes: np.ndarray, block_bytes: int, first: int = 0, last: int | None = None
) -> None:
    """Compares bytes with the recorded hashes; raises DamagedError with the file and the offset of the block.

    first, last: the blocks [first, last) alone; by default all.
    """
    check_size(path, size)
    if len(hashes) != -(-size // block_bytes):
        raise DamagedError(
            "hash-count", f"{path}: its manifest has {len(hashes):,} hashes for {size:,} bytes; restore the manifest"
        )
    with open(path, "rb", buffering=0) as file:
        file.seek(first * block_bytes)
        for index in range(first, len(hashes) if last is None else last):
            check_block(path, index * block_bytes, file.read(block_bytes), int(hashes[index]))


def forget_cache(path: Path) -> None:
    """Asks the system to drop what it caches of a synced file, so that it is next read from the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for block in blocks(file, 1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """One spelling for one value, so that its hash can serve as a fingerprint."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """System errors of descriptors do not say the file: they do when they come out of this."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # one without would say its file and nothing else
            error.filename = error.filename or str(path)
        raise


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of it: the system may take a part, as when the disk is nearly full."""
    written, view = 0, memoryview(data)
    while written < len(view):
        written += os.write(descriptor, view[written:])


def sync_directory(directory: Path) -> None:
    """Makes renames and new names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a whole file so that a crash leaves the old content or the new, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", buffering=0) as file, naming(temporary):
        write_all(file.fileno(), data)
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_durably(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object that `what` names in errors ("the manifest of a shard set")."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("file-missing", f"{path}: not found; it should be {what}") from None
    except OSError as error:
        raise DamagedError(
            "file-unreadable", f"{path}: cannot be read ({error.strerror}); it should be {what}"
        ) from None
    except ValueError as error:
        raise DamagedError("json-broken", f"{path}: not JSON ({error}); it should be {what}") from None
    if not isinstance(value, dict):
        raise DamagedError(
            "json-not-an-object", f"{path}: holds a {type(value).__name__}, not an object; it should be {what}"
        )
    return value


def write_sealed(path: Path, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    """Writes a manifest that carries its own hash. kind: its "format". Returns what was written."""
    sealed = {"format": kind, "version": 1, **value}
    sealed["sha256"] = sha256_json(sealed)
    write_json(path, sealed)
    return sealed


def read_sealed(path: Path, kind: str, what: str) -> dict[str, Any]:
    """Reads what `write_sealed` wrote. Raises DamagedError when it was changed or is something else."""
    value = read_json(path, what)
    recorded = value.pop("sha256", None)
    if recorded != sha256_json(value):
        raise DamagedError(
            "manifest-changed",
            f"{path}: its content does not match its own hash; restore it from a copy, or make {what} again",
        )
    if (value.get("format"), value.get("version")) != (kind, 1):
        raise DamagedError(
            "manifest-format",
            f"{path}: format {value.get('format')!r} version {value.get('version')!r}, not {kind!r} 1; name another folder",
        )
    return value


def check_form(path: Path, value: Any, form: Any, where: str = "it") -> None:
    """Compares what JSON holds with its form: str, int (from 0, below 2^62), a tuple of allowed values, [form of each
    entry], {key: form}, {...: form of each value}. Raises DamagedError."""
    wrong = f"{path}: {where} is {str(value)[:40]!r}; restore it from a copy, or make it again"
    if isinstance(form, tuple):
        good = value in form
    elif form is int:
        good = type(value) is int and 0 <= value < 1 << 62
    else:
        good = type(value) is (form if form is str else type(form))
    if not good:
        raise DamagedError("manifest-malformed", wrong)
    if isinstance(form, list):
        for index, entry in enumerate(value):
            check_form(path, entry, form[0], f"{where}[{index}]")
    elif isinstance(form, dict):
        for key in value if ... in form else form:
            if key not in value:
                raise DamagedError(
                    "manifest-malformed", f"{path}: {where} has no {key!r}; restore it from a copy, or make it again"
                )
            check_form(path, value[key], form.get(key, form.get(...)), f"{where}.{key}")


def check_names(path: Path, names: Iterable[str]) -> None:
    """The file names that a manifest at `path` gives must be plain: nothing outside its folder is read."""
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name or len(name.encode()) > 250:
            raise DamagedError(
                "path-outside-folder",
                f"{path}: names a file {name[:300]!r}, outside its folder, or one that no file can have",
            )


def check_inside(path: Path, root: Path) -> None:
    """Raises DamagedError for a link that leaves the folder `root`: it could name any file of the machine."""
    if not path.resolve().is_relative_to(root):
        raise DamagedError(
            "link-outside-folder",
            f"{path}: a link to {path.resolve()}, outside of its folder; copy the file itself there",
        )


class HashingWriter:
    """A file that hashes its blocks while they are written. `close` makes it durable; then `size` and `hashes` hold."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        self.path = path
        self.size = 0
        self.hashes = np.empty(0, "<u8")
        self._block_bytes = block_bytes
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._pending = bytearray()
        self._hashes: list[int] = []

    def write(self, data: bytes | memoryview) -> None:
        self._pending += data
        whole = len(self._pending) // self._block_bytes * self._block_bytes
        if whole:
            self._flush(whole)

    def _flush(self, count: int) -> None:
        view = memoryview(self._pending)[:count]
        for start in range(0, count, self._block_bytes):
            self._hashes.append(block_hash(view[start : start + self._block_bytes]))
        with naming(self.path):
            write_all(self._file.fileno(), view)
        view.release()
        del self._pending[:count]
        self.size += count

    def close(self) -> None:
        if self._file.closed:
            return
        if self._pending:
            self._flush(len(self._pending))
        with naming(self.path):
            os.fsync(self._file.fileno())
        self._file.close()
        self.hashes = np.array(self._hashes, "<u8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self._file.close()
