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
        raise DamagedError(f"{path}: differs from its hash in the manifest; restore it from a copy")
    hashes = np.frombuffer(sums, "<u8")
    return hashes[:split], hashes[split:]


class BlockFile:
    """A file of `size` bytes. Call `check` once a batch, `read_into` for each piece, `release` when many pages were mapped.

    reader: "mmap" copies out of a mapping, and compares each block with its hash when it is first touched; "pread"
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
                f"{self.path}: {actual:,} bytes while reading at {offset:,}, it had {self.size:,}; it was changed under the run"
            )
        if self._map is None and self._reader == "mmap":
            self._hashes = self._load()
            self._checked = bytearray(len(self._hashes))
            self._map = mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ)
            self._view = memoryview(self._map)

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills `out` with the bytes from `offset` on. Raises DamagedError if one of their blocks is not as recorded."""
        stop = offset + len(out)
        if self._map is None:
            self._pread(out, offset)
            return
        for index in range(offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1):
            if not self._checked[index]:
                self._check_block(index)
        out[:] = self._view[offset:stop]

    def _check_block(self, index: int) -> None:
        start = index * BLOCK_BYTES
        # Not through the mapping: a sector that cannot be read is then an error with a name, and not the signal SIGBUS.
        block = memoryview(bytearray(min(BLOCK_BYTES, self.size - start)))
        self._pread(block, start)
        check_block(self.path, start, block, int(self._hashes[index]))
        self._checked[index] = 1

    def _pread(self, out: memoryview, offset: int) -> None:
        assert self._descriptor is not None
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._descriptor, [out[done:]], offset + done)
            except OSError as error:
                raise DamagedError(
                    f"{self.path}: bytes {offset + done:,} to {offset + len(out):,} cannot be read ({error.strerror}); "
                    "restore the file from a copy"
                ) from None
            if count == 0:
                raise DamagedError(
                    f"{self.path}: ends at {offset + done:,} bytes, it had {self.size:,}; it was changed under the run"
                )
            done += count

    def release(self) -> None:
        """Used pages leave this process (they stay in the system's cache), so resident memory stays flat."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def __del__(self) -> None:
        self._view.release()
        if self._map is not None:
            self._map.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
