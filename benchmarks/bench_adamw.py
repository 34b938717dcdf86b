"""AdamW on the tensors of a model: the update alone, and with the limit on the norm of the gradient.

Bytes a parameter, all fp32: p, m and v read and written, g read, 28. The norm reads g once more, before the first write:
32. With bf16 moments 8 fewer. On a CPU both sides are torch's fused kernel, ours with the scaling folded in.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcpt import optim
from fastcpt.benchmarks.timing import Case, Run, close
from fastcpt.config import Optim
from fastcpt.kernels import adamw, launch
from fastcpt.model import PRESETS, Architecture, GPTNeoX

# Layers of 12.6M parameters each, without embeddings, make 50M.
MODELS = {"cpu": Architecture(4, 1024, 16, vocab_size=1), "cuda": PRESETS["pythia-410m"]}
CLIP, DECAY = 1.0, 0.1
OPTIONS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters(device: torch.device) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Matrices first, then biases and norms; and their gradients, whose norm is far above CLIP."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in GPTNeoX(MODELS[device.type]).parameters()]
    torch.manual_seed(0)
    tensors = [
        nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in sorted(shapes, key=len, reverse=True)
    ]
    gradients = [torch.randn_like(tensor) for tensor in tensors]
    for tensor, gradient in zip(tensors, gradients):
        tensor.grad = gradient
    return tensors, gradients


class Ours:
    """Our optimizer and its tensors, and the two ways to call it. step: of the kernel when it is called alone."""

    def __init__(self, device: torch.device, moments: torch.dtype = torch.float32) -> None:
        self.tensors, self.g = parameters(device)
        config = Optim(lr=OPTIONS["lr"], betas=list(OPTIONS["betas"]), weight_decay=DECAY, clip=CLIP)
        self.optimizer = optim.AdamW(self.tensors, config, launch.on_triton(self.tensors[0]), moments)
        self.p = [tensor.detach() for tensor in self.tensors]
        self.m, self.v = (
            [self.optimizer.state[tensor][name] for tensor in self.tensors] for name in ("exp_avg", "exp_avg_sq")
        )
        self.decays = [DECAY if tensor.ndim >= 2 else 0.0 for tensor in self.tensors]
        self.step = torch.zeros((), device=device)
        # A norm below the limit: gradients that are not scaled stay what they are from run to run.
        self.square = torch.full((), 0.25 * CLIP**2, device=device)

    def update(self) -> None:
        adamw.adamw_step(
            self.p, self.g, self.m, self.v, self.decays, self.step, **OPTIONS, clip=CLIP, square=self.square
        )

    def clipped_step(self) -> None:
        self.optimizer.clipped_step(OPTIONS["lr"])

    def set_gradients(self) -> None:
        for tensor, gradient in zip(self.tensors, self.g):
            tensor.grad = gradient

    def check(self, run: Callable[[], None], square: Tensor | None) -> None:
        """The first update against the reference in float64."""
        for tensor in (*self.m, *self.v, self.step):
            tensor.zero_()
        self.optimizer.set_updates(0)
        for gradient in self.g:
            gradient.normal_()
        self.set_gradients()
        p, g, m, v = ([tensor.double() for tensor in column] for column in (self.p, self.g, self.m, self.v))
        run()
        step = torch.zeros_like(self.step, dtype=torch.float64)
        adamw.adamw_reference(p, g, m, v, self.decays, step, **OPTIONS, clip=CLIP, square=square)
        for ours, exact in zip(self.p, p):
            # Weight decay changes a parameter by 2^-15, its roundings by less than 2^-20; it may end close to 0.
            close("adamw: parameter", ours, exact, absolute=1e-8, relative=2.0**-20)
        for what, moments, exacts in (("first moment", self.m, m), ("second moment", self.v, v)):
            for ours, exact in zip(moments, exacts):
                close(f"adamw: {what}", ours, exact)


def rivals(device: torch.device) -> dict[str, tuple[Run, Run]]:
    """torch's optimizers: the update alone, and with the limit."""

    def clipped(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_norm_(tensors, CLIP)
        optimizer.step()

    found = {}
    for name in ("fused", "foreach"):
        tensors, _ = parameters(device)
        groups = [
            {"params": [tensor for tensor in tensors if tensor.ndim >= 2], "weight_decay": DECAY},
            {"params": [tensor for tensor in tensors if tensor.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, **OPTIONS, fused=name == "fused", foreach=name == "foreach")
        found[f"torch.optim.AdamW {name}"] = Run(optimizer.step), Run(partial(clipped, optimizer, tensors))
    return found


def cases(device: torch.device) -> Iterator[Case]:
    gpu = device.type == "cuda"
    ratios = {"torch.optim.AdamW fused": 1.05 if gpu else 1.0, "torch.optim.AdamW foreach": 2.5 if gpu else 4.0}
    percent = 85 if gpu else None
    ours, others = Ours(device), rivals(device)
    count = sum(tensor.numel() for tensor in ours.tensors)
    shape = f"{count / 1e6:.1f}M in {len(ours.tensors)} tensors"
    yield Case(
        "adamw", "update", shape, torch.float32, partial(ours.check, ours.update, ours.square),
        {"fastcpt": Run(ours.update), **{name: update for name, (update, _) in others.items()}},
        bytes=28 * count, percent=percent, ratios=ratios,
    )  # fmt: skip
    yield Case(
        "adamw", "norm, limit, update", shape, torch.float32, partial(ours.check, ours.clipped_step, None),
        {"fastcpt": Run(ours.clipped_step, ours.set_gradients), **{name: run for name, (_, run) in others.items()}},
        bytes=32 * count, percent=percent, ratios=ratios,
    )  # fmt: skip
    if gpu:  # on a CPU, bf16 moments are there for memory alone
        narrow = Ours(device, torch.bfloat16)
        yield Case(
            "adamw", "update, bf16 moments", shape, torch.float32, partial(narrow.check, narrow.update, narrow.square),
            {"fastcpt": Run(narrow.update)}, bytes=20 * count, percent=percent,
        )  # fmt: skip
