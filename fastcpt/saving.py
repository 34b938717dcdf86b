"""Saving: a snapshot in memory, and a thread that writes it while training goes on.

`write` is a whole save, step by step, each step agreed on by all processes:

1. room for it is looked for, and a hidden folder made
2. every process writes its own tensors in a file, hashed as they are written, and syncs it
3. the first writes the other files and, last, the manifest; syncs the folder; renames it to `step-N`: the commit
4. all is read back from the disk and compared with the manifest
5. only then the first removes what need not be kept

What fails before the commit ends the run. What fails after it, the sync of the new name or a removal, is a warning: the
checkpoint is there and was read back, and nothing older is removed while its name may be lost.

`Saver` takes the snapshot and runs `write` in a thread, whose messages go through a group of processes of their own: on
the training's they would mix with its. torch's own writer of these files (HuggingFaceStorageWriter) builds each file in
memory a second time, and neither hashes it nor says which file a full disk cut.
"""

import contextlib
import copy
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fastcpt import UserError
from fastcpt.checkpoint import BLOCK_BYTES, FORMAT, MANIFEST, STATE, rotate, together, verify
from fastcpt.integrity import HashingWriter, forget_cache, sync_directory, write_sealed
from fastcpt.parallel import World

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
LONGEST_WAIT = timedelta(hours=6)  # of a process for the slowest one's disk
THREAD = "fastcpt-save"


@dataclass(frozen=True)
class Part:
    """What one process writes of a tensor: `local`, which starts at `offsets` of the whole."""

    name: str
    offsets: tuple[int, ...]
    local: Tensor


def own_parts(tensors: dict[str, Tensor], world: World) -> list[Part]:
    """What this process writes: its shard of each DTensor, of replicas the first; and its share of the tensors that
    every process has in full, by size."""
    parts, load = [], [0] * world.size
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            mesh, placements, local = tensor.device_mesh, tensor.placements, tensor.to_local()
            _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
            place = mesh.get_coordinate() or [1] * len(placements)
            replica = any(at and placement.is_replicate() for at, placement in zip(place, placements))
            if not replica and local.numel():
                parts.append(Part(name, tuple(offsets), local.detach()))
            continue
        least = load.index(min(load))
        load[least] += tensor.nbytes
        if least == world.rank:
            parts.append(Part(name, (0,) * tensor.ndim, tensor.detach()))
    return parts


def _write_parts(path: Path, parts: list[Part], save_id: str) -> HashingWriter:
    """A safetensors file, as torch.distributed.checkpoint reads it: each tensor's place in the whole is in the header."""
    parts = sorted(parts, key=lambda part: (-part.local.itemsize, part.name))  # every tensor stays aligned
    places = {part.name: {"saved_offsets": part.offsets} for part in parts}
    about = {"format": "pt", "save_id": save_id, "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
    header: dict[str, Any] = {"__metadata__": about}
    start = 0
    for part in parts:
        end = start + part.local.nbytes
        header[part.name] = {
            "dtype": DTYPES[part.local.dtype], "shape": list(part.local.shape), "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HashingWriter(path, BLOCK_BYTES) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            data = part.local.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for first in range(0, len(data), BLOCK_BYTES):  # no second copy of a whole tensor
                file.write(data[first : first + BLOCK_BYTES])
    return file


def free_bytes(folder: Path) -> int:
    """What may be written where `folder` is, or will be."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def check_room(folder: Path, step: int, needed: int) -> None:
    """Raises UserError unless the disk of `folder` has as many bytes as a checkpoint takes."""
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            "disk-too-small",
            f"{folder}: the checkpoint of step {step} needs {needed:,} bytes and {free:,} are free; "
            "make room, lower run.keep, or move run.output",
        )


@contextlib.contextmanager
def _explained(folder: Path, step: int, needed: int) -> Iterator[None]:
    """Errors of the system (no space, quota, file too large, input/output) as a UserError that says what to do.

    Nothing is tried again on the same file: after a failed fsync the system may take what was lost for written.
    """
    try:
        yield
    except OSError as error:
        try:
            free = f"{free_bytes(folder):,}"
        except OSError:
            free = "an unknown number"
        raise UserError(
            "checkpoint-not-saved",
            f"{error.filename or folder}: {error.strerror}, while the checkpoint of step {step} was saved; it needs "
            f"{needed:,} bytes and {free} are free in {folder} (a quota may allow less); make room, lower run.keep, or "
            "move run.output; started again the run goes on from its last good checkpoint, which is untouched",
        ) from error


def _afterwards(function: Callable[[], None], committed: Path, but: str) -> bool:
    """Whether it was done, for a checkpoint that is committed whatever comes; if not, that is said."""
    try:
        function()
    except OSError as error:
        where = f"{error.filename or committed}: {error.strerror}"
        print(f"warning: {where}; the checkpoint {committed} is committed, but {but}", file=sys.stderr)
        return False
    return True


def _entry(file: HashingWriter) -> dict[str, Any]:
    return {"bytes": file.size, "hashes": [f"{value:016x}" for value in file.hashes.tolist()]}


def write(
    run: Path,
    step: int,
    parts: list[Part],
    state: dict[str, Any],
    files: dict[str, bytes],
    world: World,
    *,
    fingerprints: dict[str, str] | None = None,
    keep: tuple[int, int] | None = None,
    group: Any = None,
) -> Path:
    """Writes, commits and reads back `run/checkpoints/step-{step}`; every process calls it with its own parts.

    files: {name: content} that go beside. fingerprints: of what the run is made of, for the manifest. keep: (newest,
    every), what `rotate` then leaves; None leaves all. Raises, on every process, UserError when the disk is full or
    fails; then the new folder is gone and those that were there are untouched.
    """
    root = run / "checkpoints"
    final, building = root / f"step-{step}", root / f".saving-step-{step}"
    files = {STATE: (json.dumps(state, indent=1, ensure_ascii=False) + "\n").encode(), **files}
    own = sum(part.local.nbytes + 600 for part in parts) + (
        sum(len(content) for content in files.values()) if world.first else 0
    )
    offers = together(lambda: (uuid.uuid4().hex, own), world, group)
    save_id, needed = offers[0][0], sum(size for _, size in offers) * 4097 // 4096 + 65536  # hashes; blocks of the disk

    def agreed(function: Any, on_first: bool = False) -> list[Any]:
        def explained() -> Any:
            with _explained(root, step, needed):
                return function() if world.first or not on_first else None

        return together(explained, world, group)

    def begin() -> None:
        shutil.rmtree(building, ignore_errors=True)
        check_room(root, step, needed)
        building.mkdir(parents=True)

    def write_own() -> dict[str, Any]:
        name = f"tensors-{world.rank + 1:05}-of-{world.size:05}.safetensors"
        return {name: _entry(_write_parts(building / name, parts, save_id))} if parts else {}

    def commit() -> None:
        entries = {name: entry for each in written for name, entry in each.items()}
        for name, content in files.items():
            with HashingWriter(building / name, BLOCK_BYTES) as file:
                file.write(content)
            entries[name] = _entry(file)
        manifest = {"step": step, "id": save_id, "fingerprints": fingerprints or {}, "files": entries}
        write_sealed(building / MANIFEST, FORMAT, manifest)  # which syncs the folder too
        if final.exists():  # only a damaged one can be in the way: a good one would have been gone on from
            final.rename(root / f"damaged-step-{step}-{uuid.uuid4().hex[:8]}")
        building.rename(final)

    def sync_names() -> None:
        for folder in (root, run, run.parent):  # the first save of a run makes names in all of them
            sync_directory(folder)

    def forget() -> None:
        for path in final.iterdir():
            forget_cache(path)

    try:
        agreed(begin, on_first=True)
        written = agreed(write_own)
        agreed(commit, on_first=True)
        but = "a loss of power may take it: older ones are kept"
        lasting = agreed(lambda: _afterwards(sync_names, final, but), on_first=True)[0]
    except BaseException:
        if world.first:
            shutil.rmtree(building, ignore_errors=True)
        raise
    agreed(forget)
    verify(final, world=world, group=group)
    if keep is not None and lasting:
        but = "older ones could not be removed"
        agreed(lambda: _afterwards(lambda: rotate(run, *keep), final, but), on_first=True)
    return final


def save(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], files: dict[str, bytes], world: World
) -> Path:
    """Writes a checkpoint and returns when it is on disk; every process calls it, with all the tensors it has."""
    parts = [replace(part, local=part.local.cpu()) for part in own_parts(tensors, world)]
    return write(run, step, parts, state, files, world)


class Saver:
    """Saves in the background, one save at a time. Every process makes one, and makes the same calls at the same steps.

    `save` returns when this process's part is copied to host memory, which is kept for the next save: 12 bytes a
    parameter over all processes. What goes wrong later is raised, on all processes, by the next `poll`, `wait` or `save`.
    """

    def __init__(self, run: Path, world: World, keep: int, keep_every: int = 0) -> None:
        self._run, self._world, self._keep = run, world, (keep, keep_every)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._error: BaseException | None = None
        # The thread's messages, and those of `poll`: neither may meet the other's or the training's.
        self._group, self._polls = (
            dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if world.size > 1 else None for _ in range(2)
        )

    def check_room(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Raises UserError, on every process, when the disk has no room for a checkpoint of these tensors."""
        needed = sum(tensor.nbytes for tensor in tensors.values())
        self._world.on_first(lambda: check_room(self._run / "checkpoints", step, needed))

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        files: dict[str, bytes],
        fingerprints: dict[str, str] | None = None,
    ) -> Path:
        """Waits for the save under way, copies, and starts the next. Returns the folder that there will be.

        tensors: all that this process has, DTensors or whole ones; they may change as soon as this returns.
        """
        self.wait()
        parts = self._snapshot(own_parts(tensors, self._world))
        state = copy.deepcopy(state)

        def work() -> None:
            try:
                write(
                    self._run, step, parts, state, files, self._world,
                    fingerprints=fingerprints, keep=self._keep, group=self._group,
                )  # fmt: skip
            except BaseException as error:  # noqa: BLE001 (raised where training sees it)
                self._error = error
            finally:
                self._done.set()

        self._done.clear()
        self._thread = threading.Thread(target=work, name=THREAD, daemon=True)
        self._thread.start()
        return self._run / "checkpoints" / f"step-{step}"

    def poll(self) -> None:
        """After each step: raises what the save under way met. With several processes a message of theirs while there
        is one under way, so that all of them raise at the same step; else it costs nothing."""
        if self._thread is None:
            return
        done = self._done.is_set()
        flags = torch.tensor([done and self._error is not None, not done], dtype=torch.int32, device="cpu")
        if self._world.size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._polls)
        failed, running = flags.tolist()
        if failed or not running:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is under way. Raises what the save under way met."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _snapshot(self, parts: list[Part]) -> list[Part]:
        """Copies in host memory, pinned if they come from a GPU; allocated once."""
        copies = []
        for part in parts:
            there = self._copies.get(part.name)
            if there is None or there.shape != part.local.shape or there.dtype != part.local.dtype:
                pin = part.local.device.type == "cuda"
                there = torch.empty(part.local.shape, dtype=part.local.dtype, device="cpu", pin_memory=pin)
                self._copies[part.name] = there
            there.copy_(part.local, non_blocking=True)
            copies.append(replace(part, local=there))
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return copies


@contextlib.contextmanager
def finishing(seconds: float = 600.0) -> Iterator[None]:
    """Whatever ends what is in it, a save that is under way ends first, unless it takes longer than this."""
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == THREAD:
                thread.join(seconds)
