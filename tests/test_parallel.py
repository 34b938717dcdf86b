"""Processes and devices: what is summed, what only the first does, which launches are refused."""

import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastcpt import UserError, parallel
from fastcpt.parallel import World

ALONE = World(0, 1, torch.device("cpu"))

TOGETHER = """
import json, os, torch
from fastcpt import UserError
from fastcpt.integrity import DamagedError
from fastcpt.parallel import start

world = start("auto")
calls = []

def value():
    calls.append(1)
    return {"from": world.rank, "path": "a/b"}

def mistake():
    calls.append(1)
    raise UserError("run-in-use", "runs/a: in use; name another")

def damage():
    raise DamagedError("shard-truncated", "shard: cut at 7")

def error_of(function):
    try:
        return world.on_first(function)
    except UserError as error:
        return error.line

result = {"rank": world.rank, "size": world.size, "first": world.first, "device": str(world.device)}
result["value"] = world.on_first(value)
result["mistake"], result["damage"] = error_of(mistake), error_of(damage)
result["after"] = world.on_first(lambda: None)
numbers = torch.tensor([1.5, 2.0**60], dtype=torch.float64) * (world.rank + 1)
result["same"] = world.sum_(numbers) is numbers
result["sum"] = numbers.tolist()
result["calls"] = len(calls)
world.barrier()
print(json.dumps(result))
"""


def test_several_processes_agree(run_ranks: Callable) -> None:
    size = 2
    printed = [json.loads(output.splitlines()[-1]) for output in run_ranks(TOGETHER, size)]
    total = size * (size + 1) / 2
    for rank, result in enumerate(printed):
        assert result == {
            "rank": rank, "size": size, "first": rank == 0, "device": "cpu",
            "value": {"from": 0, "path": "a/b"},
            "mistake": "runs/a: in use; name another [run-in-use]", "damage": "shard: cut at 7 [shard-truncated]", "after": None,
            "same": True, "sum": [1.5 * total, 2.0**60 * total],
            "calls": 2 if rank == 0 else 0,
        }  # fmt: skip


def test_what_earlier_processes_left_in_the_store_is_not_taken_for_theirs() -> None:
    """One of those that are gone had asked, and one had been answered."""
    store = torch.distributed.HashStore()
    store.set("question-1", "gone")
    store.set("answer-gone", "theirs")
    with ThreadPoolExecutor(3) as threads:
        for start in range(2):
            stores = list(threads.map(lambda rank: parallel.own_store(store, rank, 3, 20.0), range(3)))
            for rank, own in enumerate(stores):
                assert not own.check(["address-0", "address-1", "address-2"])
                own.set(f"address-{rank}", f"{start} {rank}")
            assert [stores[0].get(f"address-{rank}") for rank in range(3)] == [
                f"{start} {r}".encode() for r in range(3)
            ]


def test_a_process_that_does_not_start_is_named() -> None:
    store = torch.distributed.HashStore()
    store.set("question-2", "gone")
    with pytest.raises(RuntimeError, match=r"processes \[1, 2\] of 3 did not start within 0 s"):
        parallel.own_store(store, 0, 3, 0.2)


def test_one_process_needs_no_group() -> None:
    assert not torch.distributed.is_initialized()
    numbers = torch.tensor([3.0])
    assert ALONE.sum_(numbers) is numbers and numbers.item() == 3.0
    ALONE.barrier()
    assert ALONE.on_first(lambda: 7) == 7

    def mistake() -> None:
        raise UserError("mistake", "a mistake")

    with pytest.raises(UserError, match="a mistake"):
        ALONE.on_first(mistake)
    parallel.stop()


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """launch(parallel, gpus, size, rank, local_rank): what `start` makes of it; no device or group is touched."""

    def launch(setting: str, gpus: int = 0, size: int = 1, rank: int = 0, local_rank: int = 0) -> World:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        if size > 1:
            for name, value in (("WORLD_SIZE", size), ("RANK", rank), ("LOCAL_RANK", local_rank)):
                monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda *arguments, **options: iter([(None, rank, size)]))
        monkeypatch.setattr(parallel, "own_store", lambda store, *arguments: store)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *arguments, **options: None)
        return parallel.start(setting)

    return launch


def test_a_launch_decides_rank_and_device(launch: Callable) -> None:
    cpu = torch.device("cpu")
    for setting in ("auto", "single"):
        assert launch(setting) == World(0, 1, cpu)
        assert launch(setting, gpus=1) == World(0, 1, torch.device("cuda", 0))
    assert launch("single", gpus=8) == World(0, 1, torch.device("cuda", 0))
    assert launch("auto", size=3, rank=2, local_rank=2) == World(2, 3, cpu)
    assert launch("ddp", gpus=4, size=16, rank=13, local_rank=1) == World(13, 16, torch.device("cuda", 1))


@pytest.mark.parametrize("said", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_grow_unless_the_user_says_otherwise(
    launch: Callable, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Asked of torch itself, in a process that has the environment this one then has."""
    for name in ("", "CUDA_", "HIP_"):
        monkeypatch.delenv(f"PYTORCH_{name}ALLOC_CONF", raising=False)
    if said:
        monkeypatch.setenv(said, "max_split_size_mb:64")
    launch("auto")
    assert ("PYTORCH_ALLOC_CONF" in os.environ) == (said == "PYTORCH_ALLOC_CONF")
    before = dict(os.environ)
    launch("auto", gpus=1)
    if said:
        assert dict(os.environ) == before
        return
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", os.environ["PYTORCH_ALLOC_CONF"])  # so that it goes with the test
    ask = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    done = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "expandable_segments:True\n"


@pytest.mark.parametrize("setting", ["auto", "ddp"])
@pytest.mark.parametrize("program", [["train.py"], ["fastcpt", "train"]])
def test_gpus_that_would_stand_idle_are_refused_with_the_command(
    launch: Callable, monkeypatch: pytest.MonkeyPatch, setting: str, program: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", [*program, "--config", "my run.yaml", "--optim.lr", "1e-3"])
    command = "torchrun --nproc_per_node=4 -m fastcpt.train --config 'my run.yaml' --optim.lr 1e-3"
    with pytest.raises(UserError) as raised:
        launch(setting, gpus=4)
    assert "4 GPUs are visible but there is one process" in str(raised.value)
    assert f"`{command}`" in str(raised.value) and "train.parallel: single" in str(raised.value)


def test_ddp_with_one_process_is_refused(launch: Callable) -> None:
    with pytest.raises(UserError, match=r"train\.parallel is ddp, but there is one process; start it with torchrun"):
        launch("ddp")


def test_single_under_torchrun_is_refused(launch: Callable) -> None:
    with pytest.raises(UserError, match=r"train\.parallel is single, but torchrun started 2 processes; use auto"):
        launch("single", size=2, rank=1, local_rank=1)


def test_a_process_without_a_gpu_is_refused(launch: Callable) -> None:
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: 2 are visible; lower --nproc_per_node"):
        launch("auto", gpus=2, size=4, rank=2, local_rank=2)


def test_bf16_needs_hardware_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert parallel.has_bf16(torch.device("cuda")) is expected
    flags = Path("/proc/cpuinfo").read_text().split()
    if "flags" in flags:  # x86
        assert parallel.has_bf16(torch.device("cpu")) == ("avx512_bf16" in flags or "amx_tile" in flags)


def test_freed_memory_is_used_again(tmp_path: Path) -> None:
    """In a process of its own: a tensor that glibc would map anew is written without a page fault, in most cases: aligned
    memory takes a little more than it says, which the gap that the last one left may not have."""
    code = """
import resource, torch
from fastcpt.parallel import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(12_000_000).fill_(1)  # 48 MB, 11,719 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(3)])
keep_memory()
torch.empty(40_000_000).fill_(1)
print([faults() for _ in range(9)])
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, after = (json.loads(line) for line in result.stdout.splitlines())
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("no glibc")
    assert min(before) > 10_000 and statistics.median(after) < 1000, (before, after)
