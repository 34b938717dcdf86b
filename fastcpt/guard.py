"""Steps that are skipped: which samples they were, and spikes among them (the idea of OLMo-core's SkipStepOptimizer).

Nothing here waits for the device in a good step: what the device decides stays there until somebody logs.

Shapes: B this process's samples of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastcpt.parallel import World

WINDOW = 128  # steps that a spike is compared with
LEAST = 64  # steps before which nothing is a spike
KINDS = ("", "not finite", "spike")


class Spikes:
    """Whether a step's loss or gradient norm stands out from those of the last WINDOW steps that were not skipped.

    deviations: how many standard deviations above their mean is too much. Numbers of all processes go in, and the same
    bits, so that all decide alike.
    """

    def __init__(self, deviations: float, device: torch.device) -> None:
        self.deviations = deviations
        self.window = torch.zeros(WINDOW, 2, dtype=torch.float64, device=device)  # loss and norm, the newest last
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.value = torch.zeros(2, dtype=torch.float64, device=device)
        self.spiked = torch.zeros((), dtype=torch.bool, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """loss, norm: of this step, scalars. Whether it is a spike, a bool scalar; `record` is told what became of it."""
        self.value = torch.stack((loss.double(), norm.double()))
        inside = torch.arange(WINDOW, device=loss.device) >= WINDOW - self.count
        known = torch.where(inside[:, None], self.window, 0.0)
        mean = known.sum(0) / self.count
        variance = torch.where(inside[:, None], self.window - mean, 0.0).square().sum(0) / (self.count - 1)
        high = self.value > mean + self.deviations * variance.sqrt()
        self.spiked = (self.count >= LEAST) & high.any()
        return self.spiked

    def record(self, skipped: Tensor) -> None:
        """A step that was not skipped is one that later ones are compared with."""
        longer = torch.cat((self.window[1:], self.value[None]))
        self.window = torch.where(skipped > 0, self.window, longer)
        self.count = torch.where(skipped > 0, self.count, (self.count + 1).clamp(max=WINDOW))

    def to_dict(self) -> dict[str, Any]:
        return {"window": self.window.tolist(), "count": self.count.item()}

    def load_(self, values: dict[str, Any]) -> None:
        self.window.copy_(torch.tensor(values["window"], dtype=torch.float64))
        self.count.fill_(values["count"])


@dataclass
class Guard:
    """The steps since somebody looked. spikes: None where only gradients that are not finite are skipped."""

    world: World
    spikes: Spikes | None = None
    _steps: list[tuple[int, int, int, int, Tensor, Tensor]] = field(default_factory=list)

    def veto(self, nats_tokens: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What the optimizer asks before its step: of the norm, whether to skip. nats_tokens: (2,) of this process."""
        if self.spikes is None:
            return None
        nats, tokens = self.world.sum_(nats_tokens.clone())
        spikes, loss = self.spikes, nats / tokens
        return lambda norm: spikes.judge(loss, norm)

    def record(self, step: int, samples: int, batch: int, first: int, skipped: Tensor, losses: list[Tensor]) -> None:
        """Of a step: its first sample and how many, the first of this process; whether it was skipped; losses_BT in parts."""
        kind = skipped.long()
        if self.spikes is not None:
            kind = torch.where(self.spikes.spiked & torch.isfinite(self.spikes.value).all(), 2 * kind, kind)
            self.spikes.record(skipped)
        bad_B = torch.cat([~torch.isfinite(losses_BT.sum(1)) for losses_BT in losses])
        self._steps.append((step, samples, batch, first, kind, bad_B))

    def events(self, seq_len: int) -> list[dict[str, Any]]:
        """A line for each step that was skipped since this was called last. Waits for the device; all processes call it."""
        steps, self._steps = self._steps, []
        kinds = torch.stack([kind for *_, kind, _ in steps]).tolist() if steps else []
        skipped = [(*step, KINDS[kind]) for step, kind in zip(steps, kinds) if kind]
        if not skipped:
            return []
        own = [
            [first + place for place in bad_B.nonzero().flatten().tolist()] for _, _, _, first, _, bad_B, _ in skipped
        ]
        lines = []
        for (step, samples, batch, *_, kind), parts in zip(skipped, zip(*self.world.gather(own))):
            event = {
                "kind": kind,
                "samples": [samples, samples + batch],
                "not_finite": sorted(number for part in parts for number in part),
                "ranks": [rank for rank, part in enumerate(parts) if part],
            }
            lines.append({"step": step, "tokens": (samples + batch) * seq_len, "event": event})
        return lines
