"""The head's product and its loss, forward and backward: in blocks of rows, against all logits at once.

N rows (tokens), D width, V columns. Operations: three products of N x D x V, 6 N D V; a loss apart for each token makes
the logits a second time, which is not counted. What blocks are for on a GPU is the column of peak memory.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcpt.benchmarks.timing import Case, Run, compiled, optional
from fastcpt.kernels import cross_entropy, linear_cross_entropy

SIZES = {"cpu": (2048, 512, 50304, torch.float32), "cuda": (16384, 1024, 50304, torch.bfloat16)}  # N, D, V, dtype


def plain(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_ND, weight_VD.to(x_ND.dtype)).float(), targets_N, reduction="sum")


def full(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(x_ND, weight_VD.to(x_ND.dtype))
    return cross_entropy.cross_entropy(logits_NV, targets_N, inplace=True).sum()


def ours(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return linear_cross_entropy.linear_cross_entropy_sum(x_ND, weight_VD, targets_N)[0]


def separate(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return linear_cross_entropy.linear_cross_entropy(x_ND, weight_VD, targets_N).sum()


def cases(device: torch.device) -> Iterator[Case]:
    N, D, V, dtype = SIZES[device.type]
    torch.manual_seed(0)
    x_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, device=device).mul_(D**-0.5).requires_grad_()
    targets_N = torch.randint(V, (N,), device=device)

    def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        x_ND, weight_VD = inputs
        total = loss(x_ND, weight_VD, targets_N)
        return total, *torch.autograd.grad(total, inputs)

    def run(loss: Callable[..., Tensor]) -> Run:
        return Run(lambda: gradients(loss, x_ND, weight_VD))

    def check() -> None:
        def reference(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
            return linear_cross_entropy.linear_cross_entropy_reference(x_ND, weight_VD, targets_N).sum()

        # Exact of the weight that the products see. Logits and their gradients are rounded on the way, by everyone.
        seen_VD = weight_VD.detach().to(dtype)
        exact = [x.detach().float().requires_grad_() for x in (x_ND, seen_VD)]
        expected = gradients(reference, *exact)
        for function in (ours, separate):
            found = gradients(function, x_ND, weight_VD)
            for what, one, other in zip(("loss", "dx", "dW"), found, expected, strict=True):
                error = (one.float() - other).norm() / other.norm()
                limit = 2 * torch.finfo(dtype).eps + 2.0**-13
                if not error <= limit:
                    raise AssertionError(
                        f"linear_cross_entropy: {what} is wrong and is not timed: error {error:.2e}, limit {limit:.2e}"
                    )

    runs = {
        "fastcpt": run(ours),
        "fastcpt, losses apart": run(separate),
        "F.linear + fastcpt in place": run(full),
        "F.linear + F.cross_entropy": run(plain),
        "F.linear + F.cross_entropy compiled": run(compiled(plain)),
    }
    if device.type == "cuda" and (liger := optional("liger_kernel.transformers")):
        head = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        runs["Liger"] = run(lambda x, weight, targets: head(weight.to(x.dtype), x, targets))
    yield Case(
        "linear_cross_entropy", "forward and backward", f"{N} x {D} x {V}", dtype, check, runs, flops=6 * N * D * V
    )
