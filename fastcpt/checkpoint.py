"""Checkpoints on disk: verified before anything in them is parsed, found, kept and removed. `saving.py` writes them.

A checkpoint is a folder `step-N` of safetensors files, which torch.distributed.checkpoint reads (no pickle), with

    state.json      step, data position, schedule, counters, RNG (`state.py` says what)
    config.yaml     the resolved configuration      tokenizer.json    of the training data
    manifest.json   the step, the id of the save, fingerprints of configuration, tokenizer and data, and the size and
                    the hash of each 1 MiB block of every other file; written last

It is written in a hidden folder, made durable, and renamed: a folder named `step-N` is whole or was damaged later.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from fastcpt import UserError
from fastcpt.integrity import DamagedError, check_file, check_form, check_names, read_json, read_sealed
from fastcpt.parallel import World

FORMAT = "fastcpt-checkpoint"
BLOCK_BYTES = 1 << 20
MANIFEST, STATE = "manifest.json", "state.json"
ALONE = World(0, 1, torch.device("cpu"))


def together(function: Callable[[], Any], world: World, group: Any = None) -> list[Any]:
    """Runs `function` on every process; returns all values, in the order of ranks, on every one.

    What one process raises is raised on all of them, so that none waits for one that has left: a UserError as such,
    anything else as a RuntimeError that names the process. group: of torch.distributed; None for all processes.
    """
    value: Any = None
    error: Exception | None = None
    try:
        value = function()
    except Exception as caught:  # noqa: BLE001 (of any kind: raised again below, on every process)
        error = caught
    if world.size == 1:
        if error is not None:
            raise error
        return [value]
    told = None
    if error is not None:
        kind = next((cls for cls in (DamagedError, UserError) if isinstance(error, cls)), RuntimeError)
        told = kind.__name__, error.args if isinstance(error, UserError) else (f"process {world.rank}: {error}",)
    answers: list[Any] = [None] * world.size
    dist.all_gather_object(answers, (value, told), group=group)
    for _, failure in answers:
        if failure is not None:
            name, arguments = failure
            raise {"DamagedError": DamagedError, "UserError": UserError}.get(name, RuntimeError)(*arguments) from error
    return [value for value, _ in answers]


def load_tensors_(checkpoint: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Reads into the given tensors, in place, DTensors among them; each must be in the checkpoint with the same shape.

    The numbers of processes that wrote it and that read it may differ.
    """
    with warnings.catch_warnings():  # a single process is a single process
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=world.size == 1)
        except dcp.api.CheckpointException as error:
            causes = "; ".join(f"process {rank}: {cause}" for rank, (cause, _) in error.failures.items())
            text = f"{checkpoint}: its tensors cannot be loaded ({causes}); take another checkpoint"
            raise DamagedError("checkpoint-not-loaded", text) from error


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedError when it was changed or makes no sense."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise DamagedError("file-missing", f"{path}: the file is missing; restore it from a copy")
    manifest = read_sealed(path, FORMAT, "the manifest of a checkpoint")
    check_form(
        path, manifest, {"step": int, "id": str, "files": {...: {"bytes": int, "hashes": [str]}}}, "the manifest"
    )
    check_names(path, manifest["files"])
    for name, entry in manifest["files"].items():
        if not all(re.fullmatch("[0-9a-f]{16}", value) for value in entry["hashes"]):
            raise DamagedError(
                "manifest-malformed", f"{path}: a hash of {name} is not 16 hexadecimal digits; restore the manifest"
            )
    if checkpoint.name.startswith("step-") and checkpoint.name != f"step-{manifest['step']}":
        raise DamagedError(
            "checkpoint-of-another-step",
            f"{path}: of step {manifest['step']}, its folder is {checkpoint.name}; rename the folder",
        )
    return manifest


def verify(
    checkpoint: Path,
    progress: Callable[[int], None] = lambda size: None,
    world: World = ALONE,
    group: Any = None,
) -> None:
    """Every byte against the manifest; `progress` gets the bytes checked. Raises DamagedError: the file and the offset.

    Several processes share the blocks; each raises what any of them finds.
    """

    def check_share() -> None:
        manifest = read_manifest(checkpoint)
        entries = manifest["files"]
        for path in checkpoint.iterdir():
            if path.name not in entries and path.name != MANIFEST:
                raise DamagedError("file-unknown", f"{path}: the manifest does not know this file; remove it")
            if path.is_symlink() or not path.is_file():
                raise DamagedError("file-not-plain", f"{path}: not a plain file; restore it from a copy")
        blocks = sum(len(entry["hashes"]) for entry in entries.values())
        mine = range(world.rank * blocks // world.size, (world.rank + 1) * blocks // world.size)
        passed = 0
        for name, entry in entries.items():
            count = len(entry["hashes"])
            first, last = (min(count, max(0, edge - passed)) for edge in (mine.start, mine.stop))
            hashes = np.array([int(value, 16) for value in entry["hashes"]], "<u8")
            try:
                check_file(checkpoint / name, entry["bytes"], hashes, BLOCK_BYTES, first, last)
            except DamagedError as error:
                raise DamagedError(error.id, f"{error}{_stranger(checkpoint / name, manifest['id'])}") from None
            except OSError as error:
                raise DamagedError(
                    "file-unreadable", f"{checkpoint / name}: cannot be read ({error.strerror}); restore it"
                ) from None
            passed += count
            progress(entry["bytes"] * (last - first) // max(1, count))

    together(check_share, world, group)


def _stranger(path: Path, save_id: str) -> str:
    """A remark for people when a safetensors file, already known to be wrong, was written by another save."""
    try:
        with open(path, "rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), 100 << 20))
        found = json.loads(header)["__metadata__"]["save_id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f"; it is of save {str(found)[:32]!r}, this checkpoint of {save_id!r}" if found != save_id else ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / STATE, "the state of a checkpoint")


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first."""
    found = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(step) for step in found if step.isdecimal())


def newest(run: Path, world: World = ALONE) -> Path | None:
    """A run's newest checkpoint that is whole, or None when there is none at all. Damaged ones are named and passed over.

    Every process of `world` calls it. Raises UserError when there are checkpoints but all are damaged.
    """
    errors = []
    for step in reversed(world.on_first(lambda: steps(run))):
        path = run / "checkpoints" / f"step-{step}"
        try:
            verify(path, world=world)
        except DamagedError as error:
            if world.first:
                print(f"warning: {error}; falling back to an older checkpoint", file=sys.stderr)
            errors.append(str(error))
            continue
        return path
    if errors:
        raise UserError(
            "every-checkpoint-damaged",
            f"{run}: every checkpoint is damaged ({errors[0]}); restore one, or start in a new folder",
        )
    return None


def find(source: str, world: World = ALONE) -> Path | None:
    """The verified checkpoint that `source` names: a checkpoint's folder, or a run's (its newest). None if it is neither.

    Every process of `world` calls it.
    """
    path = Path(source)
    kind = world.on_first(
        lambda: "run" if (path / "checkpoints").is_dir() else any((path / name).exists() for name in (STATE, MANIFEST))
    )
    if kind == "run":
        found = newest(path, world)
        if found is None:
            raise UserError("run-without-checkpoint", f"{path}: a run without a checkpoint; train it first")
        return found
    if kind:
        verify(path, world=world)
        return path
    return None


def rotate(run: Path, keep: int, keep_every: int = 0) -> None:
    """Removes all checkpoints but the newest `keep` and, unless it is 0, those of steps that `keep_every` divides.

    Renamed first, so that a half-removed one is never taken for one.
    """
    for step in steps(run)[:-keep]:
        if keep_every and step % keep_every == 0:
            continue
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
            "run-in-use",
            f"{run}: another run is writing to this folder ({file.read().strip() or 'it has not said which'}); stop it, or "
            "use another run.output",
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
    file.flush()
    for pattern in (".saving-*", ".removing-*"):
        for path in (run / "checkpoints").glob(pattern):
            if pattern == ".saving-*":
                print(f"{path}: removed; this save had been stopped before it was committed", file=sys.stderr)
            shutil.rmtree(path)
    return file
