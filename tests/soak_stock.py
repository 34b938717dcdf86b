"""What others make of the same damage, as numbers to stand beside `checkpoints`: torch.distributed.checkpoint in its own
format, torch.save, and safetensors. A trial flips a bit, or takes a file of another step, and loads. None of it fails."""

import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from soak_checkpoints import STEPS, tensors

from fastcpt.parallel import World

UNIT = 1
SECONDS = 60


def prepare(folder: Path, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """Both steps in the three forms; the first by two processes, which share the tensors as with DDP."""
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

        def save(world: World) -> None:
            for step in STEPS:
                dcp.save(tensors(step, seed), checkpoint_id=folder / f"dcp-{step}")
                if world.first:
                    (folder / f"torch-{step}").mkdir()
                    torch.save(tensors(step, seed), folder / f"torch-{step}" / "all.pt")
                    (folder / f"safetensors-{step}").mkdir()
                    save_file(tensors(step, seed), folder / f"safetensors-{step}" / "all.safetensors")
                dist.barrier()

        assert faults.ranks(2, folder / "store", save) == [0, 0], [file.read_text() for file in folder.glob("trace-*")]
        (folder / "ready").touch()
    return folder, tensors(STEPS[1], seed)


def _dcp(folder: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    read = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(read, checkpoint_id=folder, no_dist=True)
    return read


LOADERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Any]] = {
    "dcp": _dcp,
    "torch": lambda folder, expected: torch.load(folder / "all.pt", weights_only=True),
    "safetensors": lambda folder, expected: load_file(folder / "all.safetensors"),
}


def trial(rng: random.Random, folder: Path, prepared: tuple[Path, dict[str, torch.Tensor]]) -> Counter[str]:
    assets, expected = prepared
    form = rng.choice(list(LOADERS))
    target = folder / "target"
    shutil.copytree(assets / f"{form}-{STEPS[1]}", target)
    victims = sorted(path for path in target.iterdir() if path.name != ".metadata")  # which is a pickle
    victim = rng.choice(victims)
    if form == "dcp" and rng.random() < 0.1:
        kind = "stale file"
        shutil.copy(assets / f"{form}-{STEPS[0]}" / victim.name, victim)
    else:
        kind = "flip"
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    try:
        read = LOADERS[form](target, expected)
        same = read.keys() == expected.keys() and all(
            read[name].view(torch.int32).equal(tensor.view(torch.int32)) for name, tensor in expected.items()
        )
        outcome = "loaded right" if same else "loaded wrong in silence"
    except Exception:  # noqa: BLE001 (whatever each of them raises)
        outcome = "refused"
    return Counter([f"{form}, {kind}: {outcome}"])
