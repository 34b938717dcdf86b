"""The weights of a checkpoint, a run (its newest) or a Hugging Face model: all at once, or a tensor at a time."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcpt import UserError, checkpoint, hf, lineage, tensor_files
from fastcpt.checkpoint import ALONE
from fastcpt.integrity import read_json
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import World
from fastcpt.shards import tokenizer_fingerprint


@dataclass(frozen=True)
class Weights:
    """source: as it was named. state: a checkpoint's `state.json`. part: of a checkpoint, `model` or `ema`."""

    source: str
    folder: Path
    arch: Architecture
    state: dict[str, Any] | None = None
    part: str = "model"

    @classmethod
    def open(cls, source: str, ema: bool = False) -> "Weights":
        """A checkpoint is verified first. ema: the moving average of its weights; raises UserError where there is none."""
        found = checkpoint.find(source)
        folder = found or hf.resolve(source)
        state = lineage.read_state(found, lineage.FOR_WEIGHTS[:2]) if found else None
        if ema and not (state and state["config"]["train"].get("ema")):
            raise UserError(
                "ema-missing",
                f"{source}: has no moving average of its weights; leave out --ema, or train with train.ema set",
            )
        arch = Architecture(**state["architecture"]) if state else hf.read_architecture(folder)
        return cls(source, folder, arch, state, "ema" if ema else "model")

    @property
    def tokenizer(self) -> Path | None:
        path = self.folder / "tokenizer.json"
        return path if path.exists() else None

    @property
    def eod(self) -> str:
        """The end-of-document token; of a Hugging Face model, the one that its tokenizer_config.json names."""
        if self.state:
            return str(self.state["eod_token"])
        settings = tensor_files.member(self.folder, "tokenizer_config.json")
        named = read_json(settings, "settings of a tokenizer").get("eos_token") if settings.exists() else None
        return str(named.get("content") if isinstance(named, dict) else named or "<|endoftext|>")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return hf.shapes(self.arch)

    @cached_property
    def _stored(self) -> dict[str, tensor_files.Stored]:
        return hf.checked(self.folder, self._shapes)

    def tensor(self, name: str) -> Tensor:
        """fp32, on the CPU. name: as in a Hugging Face checkpoint."""
        if self.state is None:
            return tensor_files.read(self._stored[name].file, name).float()
        value = torch.empty(self._shapes[name])
        checkpoint.load_tensors_(self.folder, {f"{self.part}.{name.removeprefix('gpt_neox.')}": value}, ALONE)
        return value

    def model(self, device: torch.device | str = "cpu") -> GPTNeoX:
        """The model, fp32 on the device."""
        with torch.device("meta"):
            model = GPTNeoX(self.arch)
        model.to_empty(device=device)
        if self.state is None:
            hf.load_weights_(model, self.folder)
        else:
            parameters = {f"{self.part}.{name}": each.detach() for name, each in model.named_parameters()}
            checkpoint.load_tensors_(self.folder, parameters, World(0, 1, torch.device(device)))
        return model


def check_alike(models: list[Weights]) -> None:
    """Raises UserError unless all have the first's architecture and tokenizer: their weights can be averaged."""
    first, *others = models
    for other in others:
        for name, value in vars(first.arch).items():
            if name != "max_positions" and value != (theirs := getattr(other.arch, name)):
                raise UserError(
                    "models-differ",
                    f"{other.source}: its {name} is {theirs}, that of {first.source} {value}; only weights of one architecture "
                    "can be averaged",
                )
        files = first.tokenizer, other.tokenizer
        if len({tokenizer_fingerprint(file.read_bytes()) for file in files if file}) > 1:
            raise UserError(
                "tokenizer-differs",
                f"{files[1]}: another tokenizer than {files[0]}; only weights of one vocabulary can be averaged",
            )
