"""Damage to a shard set: `verify` must refuse each, name the file, and for a flip in a pair the bytes around it."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soak_corpus

from fastcpt import UserError
from fastcpt.data_prep import inspect_shards
from fastcpt.data_prep.pretokenize import prep
from fastcpt.integrity import sha256_json
from fastcpt.shards import MANIFEST

UNIT = 1
SECONDS = 60
NAMES = ["../{}", "/{}", "./{}", "../set/{}", "{}/", "sub/{}", "{}\0", "", ".", "..", "x" * 300, "\\..\\{}"]


def prepare(folder: Path, seed: int) -> Path:
    """A set of 4 pairs of some 64 KiB blocks each."""
    if not (folder / "set" / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
        inputs = soak_corpus.write(folder / "in", random.Random(f"{seed} corpus"), 1200)
        prep(
            [str(inputs)], tokenizer=str(soak_corpus.tokenizer(folder)), output=folder / "set", workers=1, quiet=True,
            val_fraction=0.2, shard_tokens=120_000, on_error="skip",
        )  # fmt: skip
    return folder / "set"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(keys, value) of all numbers and texts in a manifest."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))
    else:
        yield path, value


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = new if len(path) == 1 else replaced(copy[path[0]], path[1:], new)
    return copy


def seal(path: Path, manifest: dict[str, Any]) -> None:
    """With the right hash of a wrong content, as somebody who means it would."""
    manifest = {key: value for key, value in manifest.items() if key != "sha256"}
    path.write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))


def lie(rng: random.Random, target: Path) -> tuple[str, str]:
    """One value of the manifest is changed and the manifest sealed anew. Returns what, and what must be named."""
    path = target / MANIFEST
    manifest = json.loads(path.read_bytes())
    where, value = rng.choice([place for place in places(manifest) if place[0] != ("sha256",)])
    if isinstance(value, int):
        change = rng.choice(
            [value + 1, value - 1, 2 * value + 1, -1 - value, 10**30, None, str(value), [value], value + 0.5]
        )
    else:
        change = rng.choice([value[:-1], value + "x", value.swapcase(), None, 5, [], *(n.format(value) for n in NAMES)])
        if change == value:
            change = value + "y"
    seal(path, replaced(manifest, where, change))
    return f"lie in {where[0]}: {'.'.join(map(str, where))} {value!r} -> {str(change)[:60]!r}", ""


def traversal(rng: random.Random, target: Path) -> tuple[str, str]:
    """The manifest names a file elsewhere, which is there and has the right bytes."""
    path = target / MANIFEST
    manifest = json.loads(path.read_bytes())
    entries = [("pairs", index, "name") for index in range(len(manifest["pairs"]))] + [
        ("files", n) for n in manifest["files"]
    ]
    entry = rng.choice(entries)
    name = entry[1] if entry[0] == "files" else manifest["pairs"][entry[1]]["name"]
    elsewhere = target.parent / "elsewhere"
    shutil.copytree(target, elsewhere)
    new = rng.choice([f"../elsewhere/{name}", str(elsewhere.resolve() / name), f"./{name}", f"../{target.name}/{name}"])
    if entry[0] == "files":
        manifest["files"][new] = manifest["files"].pop(name)
    else:
        manifest = replaced(manifest, entry, new)
    seal(path, manifest)
    return f"traversal: {new}", MANIFEST


def exchange(rng: random.Random, target: Path) -> tuple[str, str]:
    """Files swapped, missing, under another's name, or a link to another."""
    one, other = rng.sample(sorted(target.iterdir()), 2)
    kind = rng.choice(
        ["swap", "delete", "rename", "copy over", "link to another", "folder", "dangling link", "rename away"]
    )
    if kind == "swap":
        one.rename(target / "swapping")
        other.rename(one)
        (target / "swapping").rename(other)
    elif kind == "copy over":
        shutil.copy(other, one)
    else:
        one.rename(other) if kind == "rename" else one.unlink()
        if kind == "link to another":
            one.symlink_to(other.name)
        elif kind == "dangling link":
            one.symlink_to("nowhere")
        elif kind == "folder":
            one.mkdir()
        elif kind == "rename away":
            one.with_name(one.name + ".old").write_bytes(b"")
    return f"{kind}: {one.name}, {other.name}", f"{one.name}|{other.name}"


def content(rng: random.Random, target: Path) -> tuple[str, str]:
    """Bytes of one file changed. Names the file, and the offset if a block hash covers it."""
    path = rng.choice(sorted(target.iterdir()))
    data = path.read_bytes()
    at, length = rng.randrange(len(data)), int(10 ** rng.uniform(0, 4))
    kind = rng.choice(["flip", "flip", "flip", "cut", "extend", "zeros", "insert", "remove", "empty"])
    changed = {
        "flip": data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :],
        "cut": data[:at],
        "extend": data + rng.choice([rng.randbytes(length), bytes(length), data[:length] or b"\0"]),
        "zeros": (data[:at] + bytes(length) + data[at + length :])[: len(data)],
        "insert": data[:at] + rng.randbytes(1 + length // 100) + data[at:],
        "remove": data[:at] + data[at + length :],
        "empty": b"",
    }[kind]
    if changed == data:
        return "", ""
    if path.name == MANIFEST and json_equal(changed, data):
        return "", ""
    path.write_bytes(changed)
    blocks = kind == "flip" and path.suffix in (".bin", ".idx")
    return f"{kind}: {path.name} at {at}", path.name + (f" at {at}" if blocks else "")


def json_equal(one: bytes, other: bytes) -> bool:
    """A manifest with other spaces says the same."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def check(message: str, named: str, target: Path) -> None:
    assert str(target) in message, f"does not name the set: {message}"
    name, _, at = named.partition(" at ")
    names = name.split("|")
    assert any(part in message for part in names), f"does not name {names}: {message}"
    if at:
        found = re.search(r"bytes ([\d,]+) to ([\d,]+)", message)
        start, stop = (int(number.replace(",", "")) for number in found.groups()) if found else (0, 0)
        assert start <= int(at) < stop <= start + 65536, f"the flip at {at} is not in these bytes: {message}"


def trial(rng: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    target = folder / prepared.name
    shutil.copytree(prepared, target)
    what, named = rng.choice([content, content, content, exchange, lie, traversal])(rng, target)
    if not what:
        return Counter(["changes nothing"])
    (folder / "what.txt").write_text(what)
    try:
        inspect_shards.verify(target, quiet=True)
    except UserError as error:
        check(str(error), named, target)
        return Counter(corruptions=1) + Counter([what.partition(":")[0]])
    raise AssertionError(f"not seen: {what}")
