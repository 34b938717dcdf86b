"""Checkpoints: atomic, hashed, and everything that exact resume needs.

A checkpoint is a folder `step-N` of safetensors files, written by torch.distributed.checkpoint (no pickle), with

    state.json      step, data position, schedule, counters, RNG (`train.py` says what)
    config.yaml     the resolved configuration      tokenizer.json    of the training data
    manifest.json   the size and the hash of each 1 MiB block of every other file; written last

It is written in a hidden folder, made durable, and renamed: a folder named `step-N` is whole or was damaged later. It
is verified against its manifest before anything in it is parsed.
"""

import fcntl
import os
import shutil
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fastcpt import UserError
from fastcpt.integrity import (
    DamagedError,
    check_file,
    check_names,
    file_hashes,
    read_json,
    read_sealed,
    sync_directory,
    sync_file,
    write_durably,
    write_json,
    write_sealed,
)
from fastcpt.parallel import World

FORMAT = "fastcpt-checkpoint"
BLOCK_BYTES = 1 << 20
MANIFEST, STATE = "manifest.json", "state.json"


def save(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], files: dict[str, bytes], world: World
) -> Path:
    """Writes `run/checkpoints/step-{step}`; every process calls it. files: {name: content} that go beside."""
    root = run / "checkpoints"
    final, building = root / f"step-{step}", root / f".saving-step-{step}"
    if world.first:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    world.barrier()
    writer = HuggingFaceStorageWriter(str(building), save_distributed=True)
    _quietly(dcp.save, tensors, storage_writer=writer, no_dist=world.size == 1)
    if world.first:
        write_json(building / STATE, state)
        for name, content in files.items():
            write_durably(building / name, content)
        entries = {}
        for path in sorted(building.iterdir()):
            sync_file(path)
            hashes = file_hashes(path, BLOCK_BYTES)
            entries[path.name] = {
                "bytes": path.stat().st_size,
                "hashes": [f"{value:016x}" for value in hashes.tolist()],
            }
        write_sealed(building / MANIFEST, FORMAT, {"step": step, "id": uuid.uuid4().hex, "files": entries})
        if final.exists():  # only a damaged one can be in the way: a good one would have been gone on from
            final.rename(root / f"damaged-step-{step}-{uuid.uuid4().hex[:8]}")
        building.rename(final)
        sync_directory(root)
    world.barrier()
    return final


def _quietly(function: Any, *arguments: Any, **options: Any) -> None:
    """Without torch's warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        function(*arguments, **options)


def load_tensors_(checkpoint: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Reads into the given tensors, in place; each must be in the checkpoint with the same shape."""
    _quietly(dcp.load, tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=world.size == 1)


def verify(checkpoint: Path, progress: Callable[[int], None] = lambda size: None) -> None:
    """Every byte against the manifest; `progress` gets the bytes checked. Raises DamagedError: the file and the offset."""
    entries = read_sealed(checkpoint / MANIFEST, FORMAT, "the checkpoint")["files"]
    check_names(checkpoint / MANIFEST, entries)
    for path in checkpoint.iterdir():
        if path.name not in entries and path.name != MANIFEST:
            raise DamagedError(f"{path}: the manifest does not know this file; remove it")
    for name, entry in entries.items():
        hashes = np.array([int(value, 16) for value in entry["hashes"]], "<u8")
        check_file(checkpoint / name, entry["bytes"], hashes, BLOCK_BYTES)
        progress(entry["bytes"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / STATE, "the state of a checkpoint")


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first."""
    found = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(step) for step in found if step.isdigit())


def newest(run: Path) -> Path | None:
    """A run's newest checkpoint that is whole, or None when there is none at all. Damaged ones are named and passed over.

    Raises UserError when there are checkpoints but all are damaged.
    """
    errors = []
    for step in reversed(steps(run)):
        path = run / "checkpoints" / f"step-{step}"
        try:
            verify(path)
        except DamagedError as error:
            print(f"warning: {error}; falling back to an older checkpoint", file=sys.stderr)
            errors.append(str(error))
            continue
        return path
    if errors:
        raise UserError(f"{run}: every checkpoint is damaged ({errors[0]}); restore one, or start in a new folder")
    return None


def find(source: str) -> Path | None:
    """The verified checkpoint that `source` names: a checkpoint's folder, or a run's (its newest). None if it is neither."""
    path = Path(source)
    if (path / "checkpoints").is_dir():
        found = newest(path)
        if found is None:
            raise UserError(f"{path}: a run without a checkpoint; train it first")
        return found
    if (path / STATE).exists() or (path / MANIFEST).exists():
        verify(path)
        return path
    return None


def rotate(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints. Renamed first, so that a half-removed one is never taken for one."""
    for step in steps(run)[:-keep]:
        path = run / "checkpoints" / f"step-{step}"
        doomed = path.with_name(f".removing-step-{step}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def lock(run: Path) -> TextIO:
    """One process group a folder: locks it and removes what a killed save or removal left. The lock goes with the process."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(
            f"{run}: another run is writing to this folder ({file.read().strip() or 'it has not said which'}); stop it, or "
            "use another run.output"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
    file.flush()
    for pattern in (".saving-*", ".removing-*"):
        for path in (run / "checkpoints").glob(pattern):
            shutil.rmtree(path)
    return file
