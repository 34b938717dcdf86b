"""One `.bin` of a shard set, read in pieces: opened at first use, its size and its blocks compared with the manifest."""

import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastcpt.integrity import DamagedError, check_block, check_size

BLOCK_BYTES = 64 * 1024


def read_sums(prefix: Path, pair: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the blocks of a pair's `.bin` and `.idx`, uint64, out of `PREFIX.sums`.

    pair: its entry of the manifest. Raises DamagedError unless the file is the one that the manifest names.
    """
    path = prefix.with_name(prefix.name + ".sums")
    split, rest = (-(-pair[key] // BLOCK_BYTES) for key in ("bin_bytes", "idx_bytes"))
    check_size(path, 8 * (split + rest))
    sums = path.read_bytes()
    if hashlib.sha256(sums).hexdigest() != pair["sums_sha256"]:
        raise DamagedError("hash-differs", f"{path}: differs from its hash in the manifest; restore it from a copy")
    hashes = np.frombuffer(sums, "<u8")
    return hashes[:split], hashes[split:]


class BlockFile:
    """A file of `size` bytes. Call `check` once a batch, `read` for each piece, `release` when many pages were mapped.

    reader: "mmap" gives views of a mapping, and compares each block with its hash when it is first touched; "pread"
    reads with system calls and compares nothing. hashes: returns those of all blocks, (blocks,) uint64; called once,
    at the first touch. After it 9 bytes are kept for each block of 64 KiB.
    """

    def __init__(
        self, path: Path, size: int, reader: Literal["mmap", "pread"], hashes: Callable[[], np.ndarray]
    ) -> None:
        self.path, self.size, self._reader, self._load = path, size, reader, hashes
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._hashes = np.empty(0, np.uint64)
        self._checked = bytearray()

    def check(self, offset: int) -> None:
        """Raises DamagedError if the file's size has changed: reading past the end of a mapping kills the process."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        actual = os.fstat(self._descriptor).st_size
        if actual != self.size:
            raise DamagedError(
                "file-changed-under-run",
                f"{self.path}: {actual:,} bytes while reading at {offset:,}, it had {self.size:,}; it was changed under the run",
            )
        if self._map is None and self._reader == "mmap":
            self._hashes = self._load()
            self._checked = bytearray(len(self._hashes))
            self._map = mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ)
            self._view = memoryview(self._map)

    def read(self, offset: int, count: int) -> bytes | memoryview:
        """`count` bytes from `offset` on, fewer at the end of the file. Raises DamagedError unless their blocks are as
        recorded."""
        stop = min(offset + count, self.size)
        if self._map is None:
            return self._pread(offset, stop)
        while (index := self._checked.find(0, offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1)) >= 0:
            self._check_block(index)
        return self._view[offset:stop]

    def _check_block(self, index: int) -> None:
        start = index * BLOCK_BYTES
        # Not through the mapping: a sector that cannot be read is then an error with a name, and not the signal SIGBUS.
        block = self._pread(start, min(start + BLOCK_BYTES, self.size))
        check_block(self.path, start, block, int(self._hashes[index]))
        self._checked[index] = 1

    def _pread(self, start: int, stop: int) -> bytes:
        assert self._descriptor is not None
        data = b""
        while (at := start + len(data)) < stop:
            try:
                more = os.pread(self._descriptor, stop - at, at)
            except OSError as error:
                raise DamagedError(
                    "file-unreadable",
                    f"{self.path}: bytes {at:,} to {stop:,} cannot be read ({error.strerror}); "
                    "restore the file from a copy",
                ) from None
            if not more:
                raise DamagedError(
                    "file-changed-under-run",
                    f"{self.path}: ends at {at:,} bytes, it had {self.size:,}; it was changed under the run",
                )
            data += more
        return data

    def release(self) -> None:
        """Used pages leave this process (they stay in the system's cache), so resident memory stays flat."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
