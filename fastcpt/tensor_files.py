"""The safetensors files of a Hugging Face checkpoint: what they hold, and tensors in and out, one at a time.

`model.safetensors`, or several files with `model.safetensors.index.json`. Pickles are never opened, and no file outside of
the folder is read.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcpt import UserError
from fastcpt.integrity import check_inside, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # as transformers and huggingface_hub cut their files

# Buffers that old files carry: masks and frequencies, which follow from the configuration.
BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")


class Stored(NamedTuple):
    """A tensor of a checkpoint, as its file's header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def member(directory: Path, name: str) -> Path:
    """A file of the folder. Raises UserError for a link that leaves it: it could name any file of the machine."""
    root = directory.resolve()
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parents[2]  # the hub's cache: files are links to blobs beside the snapshots
    path = directory / name
    check_inside(path, root)
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its errors turned into UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            "safetensors-damaged",
            f"{path}: not a whole safetensors file ({error}); copy or download it again (a Git LFS pointer is not it)",
        ) from None


def headers(directory: Path) -> dict[str, Stored]:
    """{name: tensor} of a checkpoint's files, from their headers alone; checks the index against them."""
    weight_map = None
    names = [SINGLE]
    if not (directory / SINGLE).exists():
        if not (directory / INDEX).exists():
            found = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
            way_out = (
                f"it has {found[0]}, a pickle, which can run code and is never opened; convert it where you trust it: "
                "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
                if found
                else "give the folder of a Hugging Face checkpoint"
            )
            raise UserError("weights-missing", f"{directory}: neither {SINGLE} nor {INDEX}; {way_out}")
        index = member(directory, INDEX)
        weight_map = read_json(index, "the index of a checkpoint").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(
                "weight-index-malformed", f"{index}: weight_map is {json.dumps(weight_map)}; download the index again"
            )
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise UserError(
                    "path-outside-folder",
                    f"{index}: {name} is in {json.dumps(file)}; it must be a plain file name of the folder",
                )
        names = sorted(set(weight_map.values()))
    tensors: dict[str, Stored] = {}
    for path in (member(directory, name) for name in names):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                if weight_map is not None and weight_map.get(name) != path.name:
                    raise UserError(
                        "weight-index-disagrees",
                        f"{path}: has {name}, which the index puts in {weight_map.get(name)}; download both again",
                    )
                tensors[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise UserError("tensor-missing", f"{directory / file}: {name} is missing; download the file again")
    return {name: stored for name, stored in tensors.items() if not BUFFERS.fullmatch(name)}


def read(path: Path, name: str, file: Any = None) -> Tensor:
    """A tensor in the dtype of its file. file: the file, if it is open. Raises UserError when a value is not finite."""
    if file is None:
        with opened(path) as it:
            return read(path, name, it)
    tensor = file.get_tensor(name)
    if bad := int((~tensor.isfinite()).sum()):
        wrong = f"{path}: {name} has {bad:,} values that are NaN or infinite; download it again"
        raise UserError("tensor-not-finite", wrong)
    return tensor


def write(
    folder: Path, shapes: dict[str, tuple[int, ...]], tensor: Callable[[str], Tensor], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes fp32 tensors, in memory one at a time: in one file, or with an index in several of up to `max_bytes`, or of
    one tensor that is larger. tensor: a name -> its values."""
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[each] for each in files[-1]) + size > max_bytes:
            files.append([])
        files[-1].append(name)
    weight_map = {}
    for number, names in enumerate(files, 1):
        path = folder / (SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors")
        weight_map.update(dict.fromkeys(names, path.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                value = tensor(name).detach().contiguous()
                assert value.dtype == torch.float32 and tuple(value.shape) == tuple(shapes[name]), name
                file.write(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
