"""Saves in the background: what is saved is what was there, what goes wrong is said on every process, and no operation
of a save, stopped at any point, loses a checkpoint."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt import UserError, checkpoint, saving, train
from fastcpt.config import Config, Count, Source, to_yaml
from fastcpt.integrity import DamagedError

ALONE = checkpoint.ALONE
HARNESS = Path(__file__).with_name("faults.py")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.{name}": torch.randn(shape, generator=generator) for name, shape in (("a", (601, 503)), ("b", (7,)))
    }


def save(saver: saving.Saver, step: int, **files: bytes) -> Path:
    return saver.save(step, tensors(step), {"step": step}, {"config.yaml": b"a: 1\n", **files}, {"data": "1234"})


def saved(path: Path, seed: int) -> bool:
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors(seed).items()}
    checkpoint.verify(path)
    checkpoint.load_tensors_(path, read, ALONE)
    return all(torch.equal(read[name], tensor) for name, tensor in tensors(seed).items())


@pytest.mark.parametrize("what", ["kills", "power", "errors"])
@pytest.mark.parametrize(("world", "first"), [(1, False), (2, False), (1, True)], ids=["one", "two", "one, first save"])
def test_every_operation_of_a_save(tmp_path: Path, what: str, world: int, first: bool) -> None:
    command = [sys.executable, str(HARNESS), what, "--world", str(world), *["--first"][:first], str(tmp_path)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout + done.stderr
    for outcome in ("new", "none" if first else "previous", *["warnings"][: what == "errors"]):
        assert f" {outcome}" in done.stdout


CLOSE = """
def close(self):
    self._flush(len(self._pending))
    self._file.close()
    self.hashes = integrity.np.array(self._hashes, "<u8")
integrity.HashingWriter.close = close
"""
EARLY = """
real = saving.write
def write(run, *arguments, **options):
    for path in run.glob("checkpoints/step-*"):
        shutil.rmtree(path)
    return real(run, *arguments, **options)
saving.write = write
"""
BROKEN = {
    "folders are not synced": ("power", "saving.sync_directory = lambda folder: None"),
    "files are not synced": ("power", CLOSE),
    "the old one goes first": ("kills", EARLY),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_save_that_is_not_safe_is_found(tmp_path: Path, fault: str) -> None:
    what, harm = BROKEN[fault]
    script = f"import faults, shutil, sys\nfrom fastcpt import integrity, saving\n{harm}\nsys.exit(faults.main())"
    done = subprocess.run(
        [sys.executable, "-c", script, what, str(tmp_path)], check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(HARNESS.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and int(done.stdout.split()[-2]) >= 3, done.stdout + done.stderr


def test_what_is_saved_is_what_was_there(tmp_path: Path) -> None:
    """Training changes tensors, and its books, while they are written."""
    saver = saving.Saver(tmp_path, ALONE, keep=3)
    for step in (2, 4):
        values, state = tensors(step), {"step": step, "history": {"seen": ["a"]}}
        path = saver.save(step, values, state, {})
        for tensor in values.values():
            tensor.zero_()
        state["history"]["seen"].append("b")
        saver.wait()
        assert saved(path, step) and checkpoint.read_state(path)["history"] == {"seen": ["a"]}
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_the_manifest_says_what_the_save_is_of(tmp_path: Path) -> None:
    saver = saving.Saver(tmp_path, ALONE, keep=3)
    one, two = save(saver, 2), save(saver, 4)
    saver.wait()
    manifests = [checkpoint.read_manifest(path) for path in (one, two)]
    assert [manifest["step"] for manifest in manifests] == [2, 4] and manifests[0]["id"] != manifests[1]["id"]
    assert manifests[0]["fingerprints"] == {"data": "1234"} and manifests[0]["version"] == 1
    name = "tensors-00001-of-00001.safetensors"
    (two / name).write_bytes((one / name).read_bytes())  # of the same size
    with pytest.raises(
        DamagedError, match=rf"{name}: bytes 0 to .* of save '{manifests[0]['id']}', this checkpoint of"
    ):
        checkpoint.verify(two)
    one.rename(tmp_path / "checkpoints" / "step-6")
    with pytest.raises(DamagedError, match="of step 2, its folder is step-6"):
        checkpoint.verify(tmp_path / "checkpoints" / "step-6")


def test_the_newest_and_the_permanent_are_kept(tmp_path: Path) -> None:
    saver = saving.Saver(tmp_path, ALONE, keep=2, keep_every=4)
    for step in (1, 2, 4, 6, 8, 9, 10):
        save(saver, step)
    saver.wait()
    assert checkpoint.steps(tmp_path) == [4, 8, 9, 10]


def test_an_old_one_goes_only_when_the_new_one_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk loses a bit between writing and reading."""
    saver = saving.Saver(tmp_path, ALONE, keep=1)
    save(saver, 2)
    saver.wait()

    def forget(path: Path) -> None:
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(saving, "forget_cache", forget)
    save(saver, 4)
    with pytest.raises(DamagedError, match=r"step-4/tensors-00001-of-00001\.safetensors: bytes 1,048,576 to"):
        saver.wait()
    assert checkpoint.steps(tmp_path) == [2, 4] and checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-2"


@pytest.mark.parametrize("notice", ["poll", "wait", "save"])
def test_what_goes_wrong_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notice: str) -> None:
    saver = saving.Saver(tmp_path, ALONE, keep=1)
    save(saver, 2)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        save(saver, 4)
        saver._done.wait()
    with pytest.raises(
        UserError, match=r"\.saving-step-4/tensors-.*: Input/output error, while the checkpoint of step 4"
    ):
        {"poll": saver.poll, "wait": saver.wait, "save": lambda: save(saver, 6)}[notice]()
    saver.poll()
    saver.wait()
    assert os.listdir(tmp_path / "checkpoints") == ["step-2"] and saved(tmp_path / "checkpoints" / "step-2", 2)
    save(saver, 6)
    saver.wait()
    assert checkpoint.steps(tmp_path) == [6]


def test_no_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saving.Saver(tmp_path, ALONE, keep=1)
    save(saver, 2)
    saver.wait()
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 1_000_000)
    save(saver, 4)
    with pytest.raises(
        UserError, match=r"checkpoints: the checkpoint of step 4 needs 1,\d\d\d,\d\d\d bytes and 1,000,000"
    ):
        saver.wait()
    assert os.listdir(tmp_path / "checkpoints") == ["step-2"]
    with pytest.raises(UserError, match="needs 1,209,240 bytes and 1,000,000 are free"):
        saver.check_room(4, tensors())


TOGETHER = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from fastcpt import UserError, checkpoint, integrity, saving
from fastcpt.parallel import World

world, run, what = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), Path(sys.argv[1]), sys.argv[2]
saver = saving.Saver(run, world, keep=2)
values = {f"model.{rows}": torch.arange(rows * 3.0).reshape(rows, 3) for rows in (1, 2, 7, 100_000)}
values["model.vector"] = torch.arange(5.0).bfloat16()

def train(step):  # messages of other sizes, while a save is under way
    total = torch.full((step + 1,), float(world.rank))
    dist.all_reduce(total)
    assert total.tolist() == [float(sum(range(world.size)))] * (step + 1)

if what == "whole":
    for step in range(1, 41):
        train(step)
        saver.poll()
        if step % 10 == 0:
            saver.save(step, values, {"step": step}, {"config.yaml": b"a"})
    saver.wait()
elif what == "sharded":
    for size, (name, placements) in enumerate({"flat": [Shard(0)], "hsdp": [Replicate(), Shard(0)]}.items()):
        shape = (world.size,) if name == "flat" else (2, world.size // 2)
        mesh = init_device_mesh("cpu", shape)
        parts = {key: distribute_tensor(value, mesh, placements) for key, value in values.items()}
        saver = saving.Saver(run / name, world, keep=2)
        saver.save(2, parts, {"step": 2}, {})
        saver.wait()
        found = checkpoint.newest(run / name, world)
        read = {key: distribute_tensor(torch.zeros_like(value), mesh, placements) for key, value in values.items()}
        checkpoint.load_tensors_(found, read, world)
        assert all(torch.equal(read[key].to_local(), parts[key].to_local()) for key in parts)
elif what == "failure":
    saver.save(2, values, {"step": 2}, {})
    saver.wait()
    if world.rank == 1:
        def failing(path, parts, save_id):
            raise OSError(28, "No space left on device", str(path))
        saving._write_parts = failing
    saver.save(4, values, {"step": 4}, {})
    try:
        for step in range(5, 100_000):
            train(step % 100)
            saver.poll()
    except UserError as error:
        print(step, error)
elif what == "damage":
    try:
        checkpoint.verify(run / "checkpoints" / "step-2", world=world)
    except integrity.DamagedError as error:
        print(error)
del saver  # and its groups, which must not outlive the interpreter
"""


def test_two_processes_save_while_they_train(tmp_path: Path, run_ranks: Any) -> None:
    run_ranks(TOGETHER, 2, tmp_path, "whole")
    assert checkpoint.steps(tmp_path) == [30, 40]
    found = checkpoint.newest(tmp_path)
    assert found is not None and len(list(found.glob("*.safetensors"))) == 2
    expected = {f"model.{rows}": torch.arange(rows * 3.0).reshape(rows, 3) for rows in (1, 2, 7, 100_000)}
    read = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.load_tensors_(found, read, ALONE)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_tensors_are_written_by_their_owners(tmp_path: Path, run_ranks: Any, size: int) -> None:
    """Shards of 1 to 100,000 rows, some of none, on a line and as replicated shards; read by as many and by one."""
    run_ranks(TOGETHER, size, tmp_path, "sharded")
    expected = {f"model.{rows}": torch.arange(rows * 3.0).reshape(rows, 3) for rows in (1, 2, 7, 100_000)}
    for name, writers in (("flat", size), ("hsdp", size // 2)):
        found = checkpoint.newest(tmp_path / name)
        assert found is not None and len(list(found.glob("*.safetensors"))) == writers
        assert sum(file.stat().st_size for file in found.glob("*.safetensors")) < 1.01 * 12 * 100_010 + writers * 2000
        read = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
        checkpoint.load_tensors_(found, read, ALONE)
        assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())


def test_what_goes_wrong_on_one_process_is_raised_on_all_at_the_same_step(tmp_path: Path, run_ranks: Any) -> None:
    one, two = run_ranks(TOGETHER, 2, tmp_path, "failure")
    assert one == two and "No space left on device, while the checkpoint of step 4 was saved; it needs" in one
    assert "tensors-00002-of-00002.safetensors" in one
    assert os.listdir(tmp_path / "checkpoints") == ["step-2"]
    # Processes share the check, and all say what one of them found.
    victim = next((tmp_path / "checkpoints" / "step-2").glob("*-00002.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    one, two = run_ranks(TOGETHER, 2, tmp_path, "damage")
    assert one == two and f"{victim}: bytes " in one


@pytest.fixture
def make_config(tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any) -> Callable[..., Config]:
    write_shards(tmp_path / "new", random_documents(0, 60))

    def make(tokens: int) -> Config:
        data = {"train": [Source(name="new", path=str(tmp_path / "new"), weight=1.0)], "seq_len": 16}
        run = {"save_every": 2, "log_every": 1, "keep": 1}
        return tiny_config(tmp_path / "run", data=data, run=run, train={"tokens": Count(tokens)})

    return make


def test_a_disk_that_fills_up_stops_training_with_what_was_saved(
    tmp_path: Path, make_config: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(make_config(4 * 96))
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(make_config(4 * 96)))
    before = {path: path.read_bytes() for path in (tmp_path / "run/checkpoints/step-4").iterdir()}
    # Longer than it was planned is another configuration: a branch into another folder, where no file may be as large.
    script = (
        "import resource, sys\nfrom fastcpt import train\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\nsys.exit(train.main())"
    )
    command = [sys.executable, "-c", script, "--config", str(config), "--run.output", str(tmp_path / "branch")]
    command += [
        "--init.from",
        str(tmp_path / "run"),
        "--init.branch",
        "true",
        "--optim.lr",
        "null",
        "--schedule.warmup",
        "0",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("fastcpt: "))
    assert "tensors-00001-of-00001.safetensors: File too large, while the checkpoint of step 6 was saved" in message
    assert "it needs " in message and "last good checkpoint" in message
    assert os.listdir(tmp_path / "branch" / "checkpoints") == []
    lines = [json.loads(line) for line in (tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] in (6, 7)  # noticed at the step after the save
    # And before the first step, when there is no room at all.
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 4096)
    assert train.main(["--config", str(config), "--run.output", str(tmp_path / "third")]) == 2
    assert "the checkpoint of step 2 needs" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
