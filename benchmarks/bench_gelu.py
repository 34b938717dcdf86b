"""Bias and GELU (erf and tanh), and the gradient of both.

N rows, F columns. Bytes a value in bf16: forward reads x and writes y, 2 x 2; backward reads dy and x and writes dx, 3 x 2.
The bias and the sums of its gradient are less than a hundredth.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastcpt.benchmarks.timing import Case, close, compiled, passes
from fastcpt.kernels import gelu

SIZES = {"cuda": (65536, 4096, torch.bfloat16)}  # N, F, dtype


def check(x: Tensor, bias: Tensor, dy: Tensor, approximate: str) -> None:
    y = gelu.bias_gelu(x, bias, approximate)
    found = torch.autograd.grad(y, (x, bias), dy)
    wide = x.detach().float().requires_grad_()
    expected = gelu.bias_gelu_reference(wide, bias, approximate)
    close("gelu: y", y, expected, absolute=1e-5)  # the reference has lost the digits of its left tail
    exact = torch.autograd.grad(expected, (wide, bias), dy.float())
    close("gelu: dx", found[0], exact[0], absolute=1e-5)
    close("gelu: dbias", found[1], exact[1], absolute=len(x) * 2.0**-24)  # fp32 sums of terms of about 1, one a row


def cases(device: torch.device) -> Iterator[Case]:
    N, F, dtype = SIZES[device.type]
    torch.manual_seed(0)
    x, dy = (torch.randn(N, F, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(F, device=device).requires_grad_()
    x.requires_grad_()
    for approximate in ("none", "tanh"):
        functions = {
            "fastcpt": gelu.bias_gelu,
            "torch": gelu.bias_gelu_reference,
            "torch compiled": compiled(gelu.bias_gelu_reference),
        }
        both = {
            name: passes(partial(function, x, bias, approximate), (x, bias), dy) for name, function in functions.items()
        }
        for place, (direction, count) in enumerate((("forward", 2), ("backward", 3))):
            yield Case(
                "gelu", f"{'erf' if approximate == 'none' else 'tanh'}, {direction}", f"{N} x {F}", dtype,
                partial(check, x, bias, dy, approximate), {name: pair[place] for name, pair in both.items()},
                bytes=count * N * F * dtype.itemsize, percent=85,
            )  # fmt: skip
