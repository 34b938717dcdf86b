"""Files by path or URL: `/a/b` on this machine, `s3://bucket/b` and the like through fsspec.

Here is all that preparation knows about where files are. On a remote store there is no renaming, appending or locking;
an object appears whole when its upload is complete, so what is written is made in a local file first.
"""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastcpt import PASSWORD, UserError
from fastcpt.integrity import sync_directory, sync_file

READ_AHEAD_BYTES = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, *names: str) -> str:
    return "/".join((folder.rstrip("/") if folder.strip("/") else folder, *names))


def split(path: str) -> tuple[str, str]:
    """The folder of a path or URL, and the name in it."""
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), name


def _filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises UserError."""
    import fsspec

    if PASSWORD.search(path):
        raise UserError(
            "url-with-password",
            f"{path}: the ledger would keep the password; leave it out, and give it where the store's library looks (its "
            "environment variables or its own file)",
        )
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            "store-unknown", f"{path}: {error}; local paths need nothing, s3:// needs s3fs, gs:// gcsfs"
        ) from None


@contextmanager
def _named(path: str) -> Iterator[None]:
    """What a store refuses (no such bucket, no permission, no credentials) is the user's to mend, under its path."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:  # the local disk
            raise
        raise UserError(
            "store-refuses", f"{path}: {type(error).__name__}: {error}; check the address and the credentials"
        ) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "gcsfs", "google", "azure"):
            raise
        raise UserError(
            "store-refuses", f"{path}: {type(error).__name__}: {error}; check the address and the credentials"
        ) from None


@contextmanager
def disk_errors(work: str) -> Iterator[None]:
    """What the system refuses is the user's to mend. work: the folder of an unfinished run."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                "disk-full", f"{work}: the disk is full; free some space and run the same command again to go on"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.EROFS):
            raise UserError(
                "file-not-accessible",
                f"{error.filename or work}: {error.strerror}; make it accessible, or restore it, and run the same "
                "command again",
            ) from None
        raise


class Stat(NamedTuple):
    """size in bytes. version: what changes when the file does (modification time in ns, or a store's tag)."""

    size: int
    version: str


def _stat(info: dict[str, Any]) -> Stat:
    tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime"))
    return Stat(info["size"], str(next((tag for tag in tags if tag is not None), "")))


def is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def find(path: str) -> dict[str, Stat] | None:
    """What a path or a pattern with * names: {URL: Stat} of each file, of all below a folder; None when that is nothing.

    For remote paths; `inputs.py` walks local folders itself.
    """
    files, inner = _filesystem(path)
    with _named(path):
        if is_pattern(inner):
            found = files.glob(inner, detail=True)
        elif files.isfile(inner):
            found = {inner: files.info(inner)}
        else:
            found = files.find(inner, detail=True)
    infos = {files.unstrip_protocol(name): _stat(info) for name, info in found.items() if info["type"] == "file"}
    return infos or None


def stat(path: str) -> Stat:
    """Raises UserError when there is no such regular file."""
    if is_remote(path):
        files, inner = _filesystem(path)
        files.invalidate_cache()
        with _named(path):
            return _stat(files.info(inner))
    if not os.path.isfile(path):
        raise UserError("input-not-a-file", f"{path}: not a regular file; write its content to a file first")
    status = os.stat(path)
    return Stat(status.st_size, str(status.st_mtime_ns))


def open_read(path: str) -> BinaryIO:
    """Opens a file for reading. Raises UserError when a remote store refuses."""
    if not is_remote(path):
        return open(path, "rb")
    files, inner = _filesystem(path)
    with _named(path):
        return files.open(inner, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead")


def _ask(path: str, what: str) -> Any:
    """The answer of a remote store's method `what` on a file; None when there is no such file."""
    files, inner = _filesystem(path)
    files.invalidate_cache()
    with _named(path):
        return getattr(files, what)(inner) if files.isfile(inner) else None


def read_bytes(path: str) -> bytes | None:
    """A whole file; None when there is none."""
    if is_remote(path):
        return _ask(path, "cat_file")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def size(path: str) -> int | None:
    """Bytes of a file; None when there is none."""
    if is_remote(path):
        return _ask(path, "size")
    return os.stat(path).st_size if os.path.isfile(path) else None


def has_files(folder: str) -> bool:
    """Whether anything is at a path: a file, or a folder that is not empty."""
    if is_remote(folder):
        files, inner = _filesystem(folder)
        files.invalidate_cache()
        with _named(folder):
            return bool(files.find(inner, maxdepth=None))
    return os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))


def any_file(folder: str, suffix: str) -> bool:
    """Whether a folder holds a file whose name ends so."""
    if is_remote(folder):
        return any(path.endswith(suffix) for path in find(folder) or ())
    return os.path.isdir(folder) and any(name.endswith(suffix) for name in os.listdir(folder))


def remove_folder(folder: str) -> None:
    if is_remote(folder):
        files, inner = _filesystem(folder)
        files.invalidate_cache()
        with _named(folder):
            if files.find(inner):
                files.rm(inner, recursive=True)
    elif os.path.exists(folder):
        shutil.rmtree(folder)


@contextmanager
def staged(path: str) -> Iterator[Path]:
    """A local file to write, which appears at `path`, whole, when the block ends without an error.

    It has a name of its own, so that a task that runs twice at once, on whichever machines, does no harm. It is not
    synced to the disk: that is the business of those whose file must survive a loss of power.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="fastcpt-") as folder:
            local = Path(folder) / split(path)[1]
            yield local
            files, inner = _filesystem(path)
            with _named(path):
                files.put_file(str(local), inner)
        return
    local = Path(f"{path}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield local
        os.replace(local, path)
    finally:
        local.unlink(missing_ok=True)


@contextmanager
def staged_files(folder: str) -> Iterator[Path]:
    """A local folder to write files in, which appear in `folder`, each whole, when the block ends without an error; a
    `manifest.json` after the others."""
    if is_remote(folder):
        parent = None
    else:
        os.makedirs(folder, exist_ok=True)
        parent = split(folder)[0]  # on the same disk, so that a file appears by renaming it
    with tempfile.TemporaryDirectory(prefix=".fastcpt-", dir=parent) as name:
        yield Path(name)
        for local in sorted(Path(name).iterdir(), key=lambda file: (file.name == "manifest.json", file.name)):
            if is_remote(folder):
                files, inner = _filesystem(join(folder, local.name))
                with _named(folder):
                    files.put_file(str(local), inner)
            else:
                os.replace(local, join(folder, local.name))
    if not is_remote(folder):
        sync_directory(Path(folder))


def write_bytes(path: str, data: bytes, durable: bool = False) -> None:
    """A whole file. durable: it survives a loss of power once this returns (a remote store keeps what it has taken)."""
    with staged(path) as local:
        local.write_bytes(data)
        if durable:
            sync_file(local)
    if durable and not is_remote(path):
        sync_directory(Path(split(path)[0]))


@contextmanager
def fetched(path: str) -> Iterator[Path]:
    """A local file with the content of `path`: itself, or a copy that lives as long as the block."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="fastcpt-") as folder:
        local = Path(folder) / split(path)[1]
        files, inner = _filesystem(path)
        with _named(path):
            files.get_file(inner, str(local))
        yield local
