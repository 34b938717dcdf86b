"""A moving average of the weights during training, which is often better than the weights before their last decay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Average:
    """A moving average of the weights, fp32, of this process's part of each: a step of it is e += (1 - d)(p - e).

    half_life: of a weight's share in it, in tokens: d = 2^-(tokens a step / half_life). It starts as the weights it is
    given by `start`.
    """

    def __init__(self, parts: dict[str, nn.Parameter], half_life: int, batch_tokens: int) -> None:
        self.parts = parts
        self.keep = 2.0 ** -(batch_tokens / half_life)
        self.tensors = {name: torch.empty_like(part, requires_grad=False) for name, part in parts.items()}

    @torch.no_grad()
    def start(self) -> None:
        for name, part in self.parts.items():
            self.tensors[name].copy_(part)

    @torch.no_grad()
    def update(self) -> None:
        """After a step, without waiting for the device."""
        torch._foreach_lerp_(
            list(self.tensors.values()), [part.detach() for part in self.parts.values()], 1 - self.keep
        )

    @torch.no_grad()
    def swapped(self, function: Callable[[], Any]) -> Any:
        """What a function returns while the average is in the weights' place."""
        self._swap()
        try:
            return function()
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, part in self.parts.items():
            kept = part.detach().clone()
            part.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
