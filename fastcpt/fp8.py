"""Products in fp8: operands in 8 bits with one scale a tensor, taken from its largest value each time (arXiv 2209.05433).

What goes forward is e4m3, of 4 significant bits, and the gradient that comes in e5m2, of 3 and a wider range. Products are
summed in fp32 and come in the dtype of their input, those of a weight in the weight's. For the backward pass the operands
are kept in 8 bits. torch's `_scaled_mm` computes, on GPUs from sm_89 on, and on CPU for tests; sizes are multiples of 16.

Shapes: N tokens, D inputs, E outputs.
"""

from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 1e-30  # a largest value below it counts as that: a tensor of zeros has a scale too


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x over its scale, in 8 bits; the scale, an fp32 scalar on the device)."""
    scale = x.abs().amax().float().clamp(min=TINY) / torch.finfo(dtype).max
    return (x.float() / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), scale


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool) -> Tensor:
    """a of rows times b of columns, as the hardware wants them to lie. fast: sum with fewer bits (forward alone)."""
    columns = b[0] if b[0].stride(0) == 1 else b[0].t().contiguous().t()
    return torch._scaled_mm(
        a[0].contiguous(), columns, scale_a=a[1], scale_b=b[1], out_dtype=dtype, use_fast_accum=fast
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        x, weight = quantize(x_ND, FORWARD), quantize(weight_ED, FORWARD)
        ctx.save_for_backward(*x, *weight)
        ctx.dtypes = x_ND.dtype, weight_ED.dtype
        return _product(x, (weight[0].t(), weight[1]), x_ND.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy_NE: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        dy, dy_scale = quantize(dy_NE, BACKWARD)
        dx_ND = _product((dy, dy_scale), (weight, weight_scale), ctx.dtypes[0], fast=False)
        return dx_ND, _product((dy.t(), dy_scale), (x, x_scale), ctx.dtypes[1], fast=False)


def linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x (..., D) times the transposed weight -> (..., E), in the dtype of x. Gradients of both are in theirs."""
    y: Tensor = _Linear.apply(x.flatten(0, -2), weight_ED)
    return y.unflatten(0, x.shape[:-1])
