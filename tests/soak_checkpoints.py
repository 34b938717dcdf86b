"""Damage to a run's newest checkpoint: `verify` must refuse it, name the file and the place, and the loader must fall
back to the one before, which is bit by bit what was saved."""

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import faults
import torch

from fastcpt import checkpoint, saving
from fastcpt.integrity import DamagedError
from fastcpt.parallel import World

UNIT = 1
SECONDS = 60
STEPS = (2, 4)
BLOCK = checkpoint.BLOCK_BYTES


def tensors(step: int, seed: int) -> dict[str, torch.Tensor]:
    """For two processes, files of some blocks each; shapes are the same at every step."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    shapes = {"model.a": (700, 600), "exp_avg.a": (700, 600), "model.b": (501, 301), "exp_avg.b": (7,), "model.c": (9,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prepare(folder: Path, seed: int) -> Path:
    """A run of two processes with two checkpoints, and `other`, a save of the same last step by another run."""
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

        def save(world: World) -> None:
            for name, steps in (("run", STEPS), ("other", STEPS[1:])):
                for step in steps:
                    saver = saving.Saver(folder / name, world, keep=2)
                    content = tensors(step, seed + (name == "other"))
                    saver.save(
                        step, content, {"step": step}, {"config.yaml": b"a: 1\n", "tokenizer.json": b"{}" * 9999}
                    )
                    saver.wait()

        assert faults.ranks(2, folder / "store", save) == [0, 0], [file.read_text() for file in folder.glob("trace-*")]
        (folder / "ready").write_text(str(seed))
    return folder


def content(rng: random.Random, target: Path) -> tuple[str, str]:
    """Bytes of one file changed. Returns what, and the file with the place of the first change where it has a block."""
    path = rng.choices(files := sorted(target.iterdir()), [4 if "tensors" in file.name else 1 for file in files])[0]
    data = path.read_bytes()
    at, length = rng.randrange(len(data)), int(10 ** rng.uniform(0, 6))
    kind = rng.choice(
        ["flip", "flip", "flip", "truncate", "zero-run", "random run", "extend", "swap of blocks", "empty"]
    )
    stretch = data[at : at + length]
    changed = {
        "flip": lambda: data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :],
        "truncate": lambda: data[:at],
        "zero-run": lambda: data[:at] + bytes(len(stretch)) + data[at + length :],
        "random run": lambda: data[:at] + rng.randbytes(len(stretch)) + data[at + length :],
        "extend": lambda: data + (stretch or b"\0"),
        "swap of blocks": lambda: data[BLOCK : 2 * BLOCK] + data[:BLOCK] + data[2 * BLOCK :],
        "empty": lambda: b"",
    }[kind]()
    if changed == data or (path.name == checkpoint.MANIFEST and _same_json(changed, data)):
        return "", ""
    path.unlink()  # a link to the prepared file
    path.write_bytes(changed)
    first = next(index for index in range(0, len(data), 4096) if data[index:][:4096] != changed[index:][:4096])
    first += next((i for i, (one, two) in enumerate(zip(data[first:], changed[first:])) if one != two), 0)
    sized = len(changed) != len(data) or path.name == checkpoint.MANIFEST
    return f"{kind}: {path.name} at {at}", path.name + ("" if sized else f" at {first}")


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def exchange(rng: random.Random, target: Path) -> tuple[str, str]:
    """Files swapped, missing, extra, under another's name, links."""
    one, other = rng.sample(sorted(target.iterdir()), 2)
    kind = rng.choice(["swapped files", "missing", "extra", "renamed", "copy of another", "link to another", "folder"])
    if kind == "swapped files":
        if one.read_bytes() == other.read_bytes():
            return "", ""
        one.rename(target / "swapping")
        other.rename(one)
        (target / "swapping").rename(other)
    elif kind == "extra":
        extra = target / rng.choice([f"{one.name}.tmp", ".metadata", "tensors-00003-of-00003.safetensors", "\u00e9"])
        extra.write_bytes(rng.choice([b"", one.read_bytes()]))
        return f"{kind}: {extra.name}", extra.name
    elif kind == "renamed":
        new = target / f"{one.stem}-{rng.randrange(9)}{one.suffix}"
        one.rename(new)
        return f"{kind}: {one.name}", f"{one.name}|{new.name}"
    else:
        data = other.read_bytes()
        one.unlink()
        if kind == "copy of another":
            one.write_bytes(data)
        elif kind == "link to another":
            one.symlink_to(other.name)
        elif kind == "folder":
            one.mkdir()
    return f"{kind}: {one.name}, {other.name}", f"{one.name}|{other.name}"


def stale(rng: random.Random, target: Path, prepared: Path) -> tuple[str, str]:
    """A file, or some, of another step of the run, or of the same step of another run; sizes agree."""
    source = rng.choice([prepared / "run" / "checkpoints" / f"step-{STEPS[0]}", prepared / "other/checkpoints/step-4"])
    names = rng.sample(sorted(path.name for path in target.iterdir()), rng.randint(1, 2))
    changed = [name for name in names if (source / name).read_bytes() != (target / name).read_bytes()]
    for name in changed:
        (target / name).unlink()
        shutil.copy(source / name, target / name)
    if not changed:
        return "", ""
    # A manifest of another save condemns whatever is not of that save.
    named = "|".join(path.name for path in target.iterdir()) if checkpoint.MANIFEST in changed else "|".join(changed)
    return f"stale file of {'another step' if 'run' in source.parts else 'another save'}: {changed}", named


def check(message: str, named: str, target: Path) -> None:
    name, _, at = named.partition(" at ")
    assert any(f"{target}/{part}:" in message for part in name.split("|")), f"does not name {name}: {message}"
    if at:
        found = re.search(r"bytes ([\d,]+) to ([\d,]+)", message)
        start, stop = (int(number.replace(",", "")) for number in found.groups()) if found else (0, 0)
        assert start <= int(at) < stop <= start + BLOCK, f"the change at {at} is not in these bytes: {message}"


def trial(rng: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    run = folder / "run"
    shutil.copytree(prepared / "run", run, copy_function=os.link)
    target = run / "checkpoints" / f"step-{STEPS[1]}"
    what, named = rng.choice([
        lambda: content(rng, target), lambda: content(rng, target), lambda: exchange(rng, target),
        lambda: stale(rng, target, prepared),
    ])()  # fmt: skip
    if not what:
        return Counter(["changes nothing"])
    (folder / "what.txt").write_text(what)
    try:
        checkpoint.verify(target)
    except DamagedError as error:
        check(str(error), named, target)
    else:
        raise AssertionError(f"not seen: {what}")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = checkpoint.newest(run)
    check(said.getvalue(), named, target)
    assert found is not None and found.name == f"step-{STEPS[0]}", found
    expected = tensors(STEPS[0], int((prepared / "ready").read_text()))
    read = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.load_tensors_(found, read, checkpoint.ALONE)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    return Counter(corruptions=1) + Counter([what.partition(":")[0]])
