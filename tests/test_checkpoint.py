"""Checkpoints: what is written is what is read, nothing damaged is read, and a killed save leaves nothing half-made."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastcpt import UserError, checkpoint, saving
from fastcpt.integrity import DamagedError, write_sealed
from fastcpt.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Ragged shapes; the largest of more than one hash block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.a": (601, 503), "model.b": (7,), "exp_avg.a": (601, 503), "exp_avg.b": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(run: Path, step: int, seed: int = 0) -> Path:
    return saving.save(run, step, tensors(seed), {"step": step}, {"config.yaml": b"a: 1\n"}, ALONE)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    checkpoint.verify(path)
    empty = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors().items()}
    checkpoint.load_tensors_(path, empty, ALONE)
    assert all(torch.equal(tensor, empty[name]) for name, tensor in tensors().items())
    assert checkpoint.read_state(path) == {"step": 3}
    # An independent reader, without torch.distributed: plain safetensors, no pickle anywhere.
    read = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(tensor, read[name]) for name, tensor in tensors().items())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".yaml"}


def test_a_part_of_the_tensors_can_be_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    part = {"model.b": torch.zeros(7)}
    checkpoint.load_tensors_(path, part, ALONE)
    assert torch.equal(part["model.b"], tensors()["model.b"])


def test_two_processes_save_and_one_loads(tmp_path: Path, run_ranks: Any) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom fastcpt import saving\nfrom fastcpt.parallel import World\n"
        "import torch.distributed as dist\n"
        "world = World(dist.get_rank(), 2, torch.device('cpu'))\n"
        "values = {f'model.{i}': torch.arange(1000.0) + i for i in range(5)}\n"
        "saving.save(Path(sys.argv[1]), 4, values, {'step': 4}, {}, world)\n"
    )
    run_ranks(script, 2, tmp_path / "run")
    path = checkpoint.newest(tmp_path / "run")
    assert path is not None and len(list(path.glob("*.safetensors"))) == 2
    read = {f"model.{i}": torch.zeros(1000) for i in range(5)}
    checkpoint.load_tensors_(path, read, ALONE)
    assert all(torch.equal(read[f"model.{i}"], torch.arange(1000.0) + i) for i in range(5))


def test_every_damage_is_found_with_its_place(tmp_path: Path) -> None:
    """A flipped bit in each file at several places, a cut, a missing and an added file."""
    good = save(tmp_path / "good", 2)
    found = 0
    for file in sorted(good.iterdir()):
        size = file.stat().st_size
        for offset in sorted({0, size // 3, size // 2, size - 1}):
            bad = tmp_path / "bad"
            shutil.copytree(good, bad)
            data = bytearray((bad / file.name).read_bytes())
            data[offset] ^= 1 << (offset % 8)
            (bad / file.name).write_bytes(data)
            with pytest.raises(DamagedError) as error:
                checkpoint.verify(bad)
            assert file.name in str(error.value)
            if file.name != checkpoint.MANIFEST:
                first = offset // checkpoint.BLOCK_BYTES * checkpoint.BLOCK_BYTES
                assert f"bytes {first:,} to" in str(error.value)
            shutil.rmtree(bad)
            found += 1
    assert found >= 12
    for damage in ("cut", "missing", "added"):
        bad = tmp_path / damage
        shutil.copytree(good, bad)
        victim = next(bad.glob("*.safetensors"))
        if damage == "cut":
            os.truncate(victim, victim.stat().st_size - 1)
        elif damage == "missing":
            victim.unlink()
        else:
            (bad / "other.safetensors").write_bytes(b"x")
        with pytest.raises(DamagedError, match=r"other\.safetensors" if damage == "added" else victim.name):
            checkpoint.verify(bad)


def test_files_of_two_steps_do_not_mix(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", 2, seed=1), save(tmp_path / "two", 2, seed=2)
    file = next(one.glob("*.safetensors"))
    shutil.copy(file, two / file.name)
    with pytest.raises(DamagedError, match="differ from their hash"):
        checkpoint.verify(two)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"]["../other"] = {"bytes": 1, "hashes": ["0" * 16]}
    write_sealed(path / checkpoint.MANIFEST, checkpoint.FORMAT, {k: v for k, v in manifest.items() if k != "sha256"})
    with pytest.raises(DamagedError, match="outside its folder"):
        checkpoint.verify(path)


def test_the_newest_whole_one_is_taken_and_damage_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 4, 10):
        save(tmp_path, step)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-10"
    os.truncate(next(newest.glob("*.safetensors")), 100)
    fallen = checkpoint.newest(tmp_path)
    assert fallen is not None and fallen.name == "step-4"
    assert "step-10" in capsys.readouterr().err
    # The step is reached and saved again; the damaged one is set aside, not overwritten.
    checkpoint.verify(save(tmp_path, 10))
    assert len(list((tmp_path / "checkpoints").glob("damaged-step-10-*"))) == 1
    for path in (tmp_path / "checkpoints").glob("step-*"):
        os.truncate(path / checkpoint.STATE, 1)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 100):
        save(tmp_path, step)
        checkpoint.rotate(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 100]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-100", "step-4"]


def test_what_a_kill_left_is_swept_and_never_read(tmp_path: Path) -> None:
    whole = save(tmp_path, 2)
    for name in (".saving-step-4", ".removing-step-1"):
        shutil.copytree(whole, tmp_path / "checkpoints" / name)
    assert checkpoint.newest(tmp_path) == whole
    checkpoint.lock(tmp_path).close()
    assert os.listdir(tmp_path / "checkpoints") == ["step-2"]


def test_find_names_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 5)
    assert checkpoint.find(str(path)) == path and checkpoint.find(str(tmp_path / "run")) == path
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="without a checkpoint"):
        checkpoint.find(str(tmp_path / "empty"))
    (tmp_path / "other").mkdir()
    assert checkpoint.find(str(tmp_path / "other")) is None
    assert checkpoint.find("some/hub-id") is None


def test_a_hostile_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    """What stock torch.distributed.checkpoint would run on loading: a pickle named .metadata."""
    path = save(tmp_path, 2)
    marker = tmp_path / "executed"
    (path / ".metadata").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(DamagedError, match="does not know this file"):
        checkpoint.verify(path)
    checkpoint.load_tensors_(path, {"model.b": torch.zeros(7)}, ALONE)
    assert not marker.exists()
