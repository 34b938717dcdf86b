"""Processes and devices: one process without a group, or several under torchrun."""

import ctypes
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fastcpt import UserError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the first process and returns its value on every one; a UserError is raised on every one."""
        value: Any = None
        error: UserError | None = None
        if self.first:
            try:
                value = function()
            except UserError as caught:
                error = caught
        if self.size > 1:
            answers = [(value, None if error is None else error.args)]
            dist.broadcast_object_list(answers, device=self.device)
            value, told = answers[0]
            error = error or (None if told is None else UserError(*told))
        if error is not None:
            raise error
        return value


def own_store(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """The part of torchrun's store that is of these processes alone; each of them calls it.

    torchrun keeps the store when it starts processes anew, and what those before them left there (addresses, NCCL's id)
    would be taken for theirs; its count of restarts is not the same on all machines (pytorch issue 135712). So the first
    process names the part, in answer to a name of its own that each of the others asks with.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"question-{rank}", mine)
        name = store.get(f"answer-{mine}").decode()
        store.set(f"{name}-{rank}", "")
        return dist.PrefixStore(name, store)
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{mine}-{other}"]):
                missing.remove(other)
            elif store.check([f"question-{other}"]):  # perhaps of a process that is no more
                store.set(f"answer-{store.get(f'question-{other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(missing)} of {size} did not start within {timeout:.0f} s")
        time.sleep(0.005)
    return dist.PrefixStore(mine, store)


def start(parallel: str, timeout: float = 1800.0) -> World:
    """Joins torchrun's group if there is one. timeout: seconds until a process that is missing from it is an error.

    Raises UserError where the launch and `train.parallel` disagree.
    """
    size, rank, local_rank = (int(os.environ.get(name, value)) for name, value in
                              (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    gpus = torch.cuda.device_count()
    if size == 1 and gpus > 1 and parallel != "single":
        arguments = sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:]  # `fastcpt train ...`
        command = f"torchrun --nproc_per_node={gpus} -m fastcpt.train {shlex.join(arguments)}"
        raise UserError(
            "gpus-idle",
            f"{gpus} GPUs are visible but there is one process; run `{command}`, or set train.parallel: single",
        )
    if size == 1 and parallel not in ("auto", "single"):
        raise UserError(
            "parallel-alone",
            f"train.parallel is {parallel}, but there is one process; start it with torchrun, or use auto",
        )
    if size > 1 and parallel == "single":
        raise UserError("parallel-single", f"train.parallel is single, but torchrun started {size} processes; use auto")
    if gpus and local_rank >= gpus:
        raise UserError(
            "gpus-too-few",
            f"process {local_rank} of this machine has no GPU: {gpus} are visible; lower --nproc_per_node",
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        grow_segments()
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if size > 1 and not dist.is_initialized():
        patience = timedelta(seconds=timeout)
        store = own_store(next(dist.rendezvous("env://", timeout=patience))[0], rank, size, timeout)
        dist.init_process_group(
            "nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=patience,
            device_id=device if gpus else None,
        )  # fmt: skip
    return World(rank, size, device)


def grow_segments() -> None:
    """torch's allocator grows its segments instead of taking new ones, so that two shapes of micro-batch leave no gaps.
    It reads these names at its first use, before which this is called; whoever set one of them has decided."""
    if not any(f"PYTORCH_{name}ALLOC_CONF" in os.environ for name in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_memory() -> None:
    """Memory that is freed stays with the process, where the C library is glibc: it would map every tensor of 32 MB or
    more anew, and the system clear it page by page, a sixth of the time of a step of pythia-70m on CPU."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            library.mallopt(parameter, value)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this process. One of several that has done all does not tear its interpreter down: where something still holds
    a group, a thread of gloo's could make an abort of that. Others have loggers to end."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and code in (0, 75):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products run on the hardware's own instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_fp8(device: torch.device) -> bool:
    """Whether 8-bit products run on the hardware's own instructions."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@torch.no_grad()
def fill_(parameter: Tensor, value: Tensor) -> None:
    """Overwrites a parameter, or this process's part of it, with a whole value of its shape."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)


def to_device(ids: Tensor, device: torch.device) -> Tensor:
    """(B, T+1) uint16 or int32 in host memory -> int64 on the device; ids travel in the width that they have on disk."""
    if ids.dtype == torch.uint16:
        return ids.view(torch.int16).to(device, non_blocking=True).long() & 0xFFFF
    return ids.to(device, non_blocking=True).long()
