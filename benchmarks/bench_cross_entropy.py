"""Cross-entropy over a large vocabulary, forward and backward, in place and out of place.

N rows (tokens), V columns. Bytes: each logit read once and its gradient written once, 4 a bf16 logit and 8 an fp32 one.
That is the floor of the in-place kernel, whose second read L2 serves; out of place reads the logits again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcpt.benchmarks.timing import Case, Run, close, compiled, optional, wider
from fastcpt.kernels import cross_entropy

SIZES = {"cpu": (2048, 50304, torch.float32), "cuda": (16384, 50304, torch.bfloat16)}  # N, V, dtype


def plain(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def ours(logits_NV: Tensor, targets_N: Tensor, inplace: bool) -> Tensor:
    return cross_entropy.cross_entropy(logits_NV, targets_N, inplace=inplace).sum()


def cases(device: torch.device) -> Iterator[Case]:
    N, V, dtype = SIZES[device.type]
    torch.manual_seed(0)
    source_NV, targets_N = torch.randn(N, V, device=device).to(dtype), torch.randint(V, (N,), device=device)
    logits_NV = source_NV.clone().requires_grad_()

    @torch.no_grad()
    def restore() -> None:
        logits_NV.copy_(source_NV)

    def gradient(loss: Callable[..., Tensor], **options: Any) -> Run:
        return Run(lambda: torch.autograd.grad(loss(logits_NV, targets_N, **options), logits_NV), restore)

    def check() -> None:
        exact_NV = source_NV.to(wider(dtype)).requires_grad_()
        expected_N = cross_entropy.cross_entropy_reference(exact_NV, targets_N)
        (gradient_NV,) = torch.autograd.grad(expected_N.sum(), exact_NV)
        for inplace in (True, False):
            restore()
            losses_N = cross_entropy.cross_entropy(logits_NV, targets_N, inplace=inplace)
            close("cross_entropy: loss", losses_N, expected_N)
            close("cross_entropy: gradient", torch.autograd.grad(losses_N.sum(), logits_NV)[0], gradient_NV)

    runs = {
        "fastcpt in place": gradient(ours, inplace=True),
        "fastcpt": gradient(ours, inplace=False),
        "F.cross_entropy": gradient(plain),
        "F.cross_entropy compiled": gradient(compiled(plain)),
    }
    if device.type == "cuda" and (liger := optional("liger_kernel.transformers")):
        # Its forward pass writes the gradient over the logits, as ours does in place.
        runs["Liger"] = gradient(liger.LigerCrossEntropyLoss(reduction="sum"))
    ratios = {"F.cross_entropy": 3.0}
    if device.type == "cuda":
        ratios = {"F.cross_entropy": 5.0, "F.cross_entropy compiled": 1.5, "Liger": 1.15}
    yield Case(
        "cross_entropy", "forward and backward", f"{N} x {V}", dtype, check, runs,
        bytes=2 * N * V * dtype.itemsize, percent=80 if device.type == "cuda" else None, ratios=ratios,
    )  # fmt: skip
