"""GELU of a matrix product and its bias, and the gradient of both in one pass.

    y = z w(z)    z = x + bias    dz = dy (w(z) + z w'(z)) = dx    dbias = sum of dz over the rows

(arXiv 1606.08415.) The weight w is the normal distribution function, or for "tanh" its approximation by a sigmoid:

    w(z) = Phi(z)                     w'(z) = exp(-z^2/2) / sqrt(2 pi)
    w(z) = s(u) = 1 / (1 + exp(-u))   w'(z) = s(u) s(-u) u'(z)            u(z) = sqrt(8/pi) (z + 0.044715 z^3)

where 0.5 (1 + tanh(u/2)) = s(u). Both are formed from exp(-z^2/2) or exp(-|u|), which cannot overflow, and for z < 0
without a difference of numbers close to 1: the left tail keeps its leading digits, which 1 + erf loses.

    Phi(-a) = exp(-a^2/2) (c1 t + c2 t^2 + ... + c7 t^7)    t = 1 / (1 + p a)    a >= 0

is the form of Hastings (Abramowitz and Stegun, 7.1.26). The constants below are a minimax fit (Lawson's reweighted
least squares, 4,000 points up to a = 14): without rounding, Phi is off by at most 2^-26, and in the tail by 1e-5 of
itself. It is also what makes the kernel wait for memory and not for arithmetic: the forward pass is 28 instructions a
bf16 value on sm_90 and would be 38 with tl.erf, and an H100 issues about 40 while 4 bytes move at 3 TB/s.

x is the product without its bias, and the backward pass reads it again: nothing else is saved. Bytes in bf16, of a
value: forward 2 read and 2 written, backward 4 read and 2 written, which is the floor (8u and 12u of a layer, with u a
row of D values, as F = 4D). Beside them the bias (in cache) and the partial sums, one row of fp32 for STRIPE rows of
x, written and read once: 8 / 128 of a byte a value, 1%. A sum's order depends on the shape alone: it is reproducible.

Shapes: N rows, F columns (the MLP's width), P stripes of rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastcpt.kernels import launch

# Rows of x that one program of the backward pass adds up, and rows of a tile. A warp takes 256 columns, 16 bytes of bf16
# a thread: four loads are in flight, and a tile's columns are summed within a thread.
STRIPE, ROWS = 128, 4


def bias_gelu_reference(x: Tensor, bias_F: Tensor, approximate: str = "none") -> Tensor:
    """`bias_gelu` in plain torch: the sum is rounded to the dtype of x."""
    return F.gelu(x + bias_F.to(x.dtype), approximate=approximate)


@triton.jit
def _weights(z, TANH: tl.constexpr):
    """w(-|z|) and w'(z) = w'(-z) of the module's docstring."""
    if TANH:
        u = z * (1.5957691216057308 + 0.07135481282946 * z * z)
        e = tl.exp2(-1.4426950408889634 * tl.abs(u))  # exp(-|u|)
        s = 1.0 / (1.0 + e)  # s(|u|), and s(-|u|) = e s(|u|)
        return e * s, e * s * s * (1.5957691216057308 + 0.21406443848838 * z * z)
    else:
        e = tl.exp2(-0.7213475204444817 * z * z)  # exp(-z^2/2)
        t = 1.0 / (1.0 + 0.2554 * tl.abs(z))
        tail = -0.0803698599 * t + 0.273035377
        tail = tail * t - 0.164889753
        tail = tail * t + 0.205080703
        tail = tail * t + 0.0577381626
        tail = tail * t + 0.107908592
        tail = tail * t + 0.101496741
        return e * (tail * t), 0.3989422804014327 * e


@triton.jit
def bias_gelu_forward_kernel(
    # pointers
    x_ptr, bias_ptr, y_ptr,
    # sizes
    num_rows, width,
    # constants
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < width)
    offsets = rows * width + columns
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias_ptr + columns, mask=columns < width, other=0.0)
    tail, _ = _weights(z, TANH)
    y = tl.maximum(z, 0.0) - tl.abs(z) * tail  # as w(z) = 1 - w(-z)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_backward_kernel(
    # pointers
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partials_ptr,
    # sizes
    num_rows, width,
    # constants
    TANH: tl.constexpr, STRIPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    stripe = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0)
    total = tl.zeros((1, COLUMNS), tl.float32)
    for tile in range(tl.cdiv(tl.minimum(STRIPE, num_rows - stripe * STRIPE), ROWS)):
        # 1. The gradient of a tile; where masked, dy is 0 and so is dz.
        rows = tl.arange(0, ROWS)[:, None].to(tl.int64) + (stripe * STRIPE + tile * ROWS)
        mask = (rows < num_rows) & (columns < width)
        offsets = rows * width + columns
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias
        tail, slope = _weights(z, TANH)
        dz = dy * (tl.where(z >= 0, 1.0 - tail, tail) + z * slope)
        tl.store(dx_ptr + offsets, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        # 2. The stripe's part of the bias gradient, before dz is rounded.
        total += tl.sum(dz, axis=0, keep_dims=True)
    tl.store(partials_ptr + stripe.to(tl.int64) * width + columns, total, mask=columns < width)


def _forward(x: Tensor, bias_F: Tensor, approximate: str) -> Tensor:
    width, num_rows = x.shape[-1], x.shape[:-1].numel()
    columns = min(1024, launch.next_power_of_2(width))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    bias_gelu_forward_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, columns))](
        x.contiguous(), bias_F.contiguous(), y, num_rows, width,
        TANH=approximate == "tanh", ROWS=ROWS, COLUMNS=columns, num_warps=max(1, columns // 256),
    )  # fmt: skip
    return y


def _backward(dy: Tensor, x: Tensor, bias_F: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    width, num_rows = x.shape[-1], x.shape[:-1].numel()
    columns = min(1024, launch.next_power_of_2(width))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partials_PF = torch.empty(triton.cdiv(num_rows, STRIPE), width, dtype=torch.float32, device=x.device)
    bias_gelu_backward_kernel[(triton.cdiv(num_rows, STRIPE), triton.cdiv(width, columns))](
        dy.contiguous(), x.contiguous(), bias_F.contiguous(), dx, partials_PF, num_rows, width,
        TANH=approximate == "tanh", STRIPE=STRIPE, ROWS=ROWS, COLUMNS=columns, num_warps=max(1, columns // 256),
    )  # fmt: skip
    return dx, partials_PF.sum(0)


@torch.library.custom_op("fastcpt::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias_F: Tensor, approximate: str) -> Tensor:
    if launch.on_triton(x):
        return _forward(x, bias_F, approximate)
    return bias_gelu_reference(x, bias_F, approximate).contiguous()


@torch.library.custom_op("fastcpt::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(dy: Tensor, x: Tensor, bias_F: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    if launch.on_triton(x):
        return _backward(dy, x, bias_F, approximate)
    dx = torch.ops.aten.gelu_backward(dy, x + bias_F.to(x.dtype), approximate=approximate).contiguous()
    return dx, dx.flatten(0, -2).sum(0, dtype=torch.float32)


@_bias_gelu.register_fake
def _(x: Tensor, bias_F: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_bias_gelu_backward.register_fake
def _(dy: Tensor, x: Tensor, bias_F: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias_F)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, bias_F, ctx.approximate = inputs
    ctx.save_for_backward(x, bias_F)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.fastcpt.bias_gelu_backward(dy, *ctx.saved_tensors, ctx.approximate), None


_bias_gelu.register_autograd(_gradients, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias_F: Tensor, approximate: str = "none") -> Tensor:
    """gelu(x + bias), with the gradient of both in one pass.

    x (..., F) in bf16 or fp32 is a matrix product without its bias; bias_F fp32; approximate: "none" (erf) or "tanh",
    as torch.nn.functional.gelu. Returns (..., F) in the dtype of x; computed in fp32. Saves x, and neither y nor z. Where
    kernels run, infinity becomes NaN.

    Raises ValueError on another `approximate`, another shape of the bias or one that is not fp32.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; it must be 'none' or 'tanh'")
    if bias_F.shape != x.shape[-1:] or bias_F.dtype != torch.float32:
        raise ValueError(f"the bias is {bias_F.dtype} {tuple(bias_F.shape)}; it must be fp32 ({x.shape[-1]},)")
    if not launch.on_triton(x):
        return bias_gelu_reference(x, bias_F, approximate)
    return torch.ops.fastcpt.bias_gelu(x, bias_F, approximate)
