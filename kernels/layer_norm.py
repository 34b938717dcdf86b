"""GPT-NeoX's layer norms: the residual sum, and one or two norms of it, in one pass.

    s = x + a + b    m = mean(s)    r = 1 / sqrt(mean((s - m)^2) + eps)    z = (s - m) r    y_i = w_i z + c_i

(layer normalisation: arXiv 1607.06450; the two norms of a parallel-residual block see one input: arXiv 2204.06745).
With g = sum_i w_i dy_i, and ds the gradient that reaches s from its later users, x and every addend receive

    ds + r (g - mean(g) - z mean(g z)),    and    dw_i = sum over rows of z dy_i,    dc_i = sum over rows of dy_i.

The sum is taken in fp32 and rounded once, to the dtype of x; the norms are of the rounded sum, which the next layer and
the backward pass see. The variance is a second pass over the row, in registers: a large mean does not cancel it. dw and
dc are summed in two stages, without atomics: each program over its rows, then over the programs.

Bytes, with u = a row of D elements (2D bytes in bf16): with two addends and two norms the forward pass reads 3u and
writes 3u, the backward pass reads 4u and writes 1u. Both are the floor. What comes on top: 8 bytes of statistics a row;
the fp32 weights and biases, which stay in cache; in the backward pass the partial sums, at most 64 KiB a multiprocessor
up to a width of 4096 and 16D bytes above, written and read once.

Shapes: N rows, D width, P programs, K gradients of weights and biases (two a norm).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastcpt.kernels import launch


def layer_norm_reference(
    x: Tensor, addends: Sequence[Tensor], norms: Sequence[tuple[Tensor, Tensor]], eps: float = 1e-5
) -> tuple[Tensor, ...]:
    """The same in plain torch: the sum in the dtype of x, one addend after the other; norms in the dtype of weights."""
    for addend in addends:
        x = x + addend
    return x, *(F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype) for weight, bias in norms)


@triton.jit
def layer_norm_forward_kernel(
    # pointers
    x_ptr, a_ptr, b_ptr, weight_1_ptr, bias_1_ptr, weight_2_ptr, bias_2_ptr, sum_ptr, y_1_ptr, y_2_ptr, stats_ptr,
    # sizes
    N, D, eps,
    # strides
    x_stride,
    # constants
    ADDENDS: tl.constexpr, NORMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    mask = (rows < N) & (columns < D)
    offsets = rows * D + columns

    # 1. The sum, rounded to the dtype of x.
    total = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADDENDS > 0:
        total += tl.load(a_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADDENDS > 1:
            total += tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)

    # 2. Its statistics.
    mean = tl.sum(total, axis=1, keep_dims=True) / D
    centred = tl.where(mask, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + eps)
    tl.store(stats_ptr + rows, mean, mask=rows < N)
    tl.store(stats_ptr + N + rows, rstd, mask=rows < N)

    # 3. Its norms. All programs read the weights: they are the last to leave the cache.
    weight_ptrs, bias_ptrs, y_ptrs = (weight_1_ptr, weight_2_ptr), (bias_1_ptr, bias_2_ptr), (y_1_ptr, y_2_ptr)
    for norm in tl.static_range(NORMS):
        weight = tl.load(weight_ptrs[norm] + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
        bias = tl.load(bias_ptrs[norm] + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
        y = centred * rstd * weight + bias
        tl.store(y_ptrs[norm] + offsets, y.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    # pointers
    d_sum_ptr, d_y_1_ptr, d_y_2_ptr, sum_ptr, stats_ptr, weight_1_ptr, weight_2_ptr, d_x_ptr, partials_ptr,
    # sizes
    N, D,
    # strides
    sum_stride,
    # constants
    HAS_D_SUM: tl.constexpr, NORMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    d_y_ptrs, weight_ptrs = (d_y_1_ptr, d_y_2_ptr), (weight_1_ptr, weight_2_ptr)
    # Of each piece of a row: dw_1, dc_1[, dw_2, dc_2], summed over the rows of this program.
    zeros = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = (zeros,) * (PIECES * 2 * NORMS)
    empty = sums[:0]

    for first in range(program * ROWS, N, programs * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mean = tl.load(stats_ptr + rows, mask=rows < N, other=0.0)
        rstd = tl.load(stats_ptr + N + rows, mask=rows < N, other=0.0)

        # 1. z and g of the whole row, with the gradients of weights and biases. Where masked, z is not 0, but dy is.
        zs, gs, d_sums, new_sums = empty, empty, empty, empty
        sum_g, sum_gz = zeros, zeros
        for piece in tl.static_range(PIECES):
            columns = piece * BLOCK + tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
            mask = (rows < N) & (columns < D)
            offsets = rows * D + columns
            total = tl.load(sum_ptr + rows * sum_stride + columns, mask=mask, other=0.0)
            if HAS_D_SUM:  # loaded here and not where it is used: no load then waits for the sums over the row
                d_sums += (tl.load(d_sum_ptr + offsets, mask=mask, other=0.0),)
            z = (total.to(tl.float32) - mean) * rstd
            g = zeros
            for norm in tl.static_range(NORMS):
                # Not kept in registers: it comes from the L1 cache, and the sums need the room.
                weight = tl.load(weight_ptrs[norm] + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
                d_y = tl.load(d_y_ptrs[norm] + offsets, mask=mask, other=0.0).to(tl.float32)
                g += weight * d_y
                new_sums += (sums[len(new_sums)] + z * d_y,)
                new_sums += (sums[len(new_sums)] + d_y,)
            sum_g += g
            sum_gz += g * z
            zs += (z,)
            gs += (g,)
        sums = new_sums

        # 2. The gradient of the sum.
        mean_g = tl.sum(sum_g, axis=1, keep_dims=True) / D
        mean_gz = tl.sum(sum_gz, axis=1, keep_dims=True) / D
        for piece in tl.static_range(PIECES):
            columns = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
            d_x = rstd * (gs[piece] - mean_g - zs[piece] * mean_gz)
            if HAS_D_SUM:
                d_x += d_sums[piece].to(tl.float32)
            d_x = d_x.to(d_x_ptr.dtype.element_ty)
            tl.store(d_x_ptr + rows * D + columns, d_x, mask=(rows < N) & (columns < D))

    # 3. This program's sums.
    for k in tl.static_range(PIECES * 2 * NORMS):
        columns = k // (2 * NORMS) * BLOCK + tl.arange(0, BLOCK)
        row = program.to(tl.int64) * (2 * NORMS) + k % (2 * NORMS)
        tl.store(partials_ptr + row * D + columns, tl.sum(sums[k], axis=0), mask=columns < D)


@triton.jit
def column_sums_kernel(
    # pointers
    x_ptr, sums_ptr,
    # sizes
    N, D,
    # constants
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, N, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        sums += tl.load(x_ptr + rows * D + columns[None, :], mask=(rows < N) & (columns < D)[None, :], other=0.0)
    tl.store(sums_ptr + columns, tl.sum(sums, axis=0), mask=columns < D)


def _rows(x: Tensor) -> Tensor:
    """x as (N, D), each row contiguous; a copy only where it must be."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def _two(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The first and the last of one or two tensors, contiguous: a kernel takes two pointers, and one alone twice."""
    return tensors[0].contiguous(), tensors[-1].contiguous()


def _empty_outputs(x: Tensor, addends: int, norms: int) -> tuple[list[Tensor], Tensor]:
    """For ([sum if there are addends,] y_1[, y_2]) like x and for the mean and 1 / deviation of rows, (2, N) fp32."""
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range((addends > 0) + norms)]
    return outputs, torch.empty((2, x.numel() // x.shape[-1]), dtype=torch.float32, device=x.device)


def _forward(
    x: Tensor, addends: list[Tensor], weights: list[Tensor], biases: list[Tensor], eps: float
) -> tuple[list[Tensor], Tensor]:
    outputs, stats_2N = _empty_outputs(x, len(addends), len(weights))
    x_ND = _rows(x)
    N, D = x_ND.shape
    block = launch.next_power_of_2(D)
    rows = max(1, 1024 // block)
    a, b = _two(addends) if addends else (x_ND, x_ND)
    (weight_1, weight_2), (bias_1, bias_2), (y_1, y_2) = _two(weights), _two(biases), _two(outputs[-len(weights) :])
    layer_norm_forward_kernel[(triton.cdiv(N, rows),)](
        x_ND, a, b, weight_1, bias_1, weight_2, bias_2, outputs[0], y_1, y_2, stats_2N,
        N, D, eps,
        x_ND.stride(0),
        ADDENDS=len(addends), NORMS=len(weights), ROWS=rows, BLOCK=block, num_warps=launch.warps(rows * block),
    )  # fmt: skip
    return outputs, stats_2N


def _backward(
    d_sum: Tensor | None, d_ys: list[Tensor], total: Tensor, stats_2N: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    total_ND = _rows(total)
    N, D = total_ND.shape
    # Four sums a column stay in registers. 4096 columns a multiprocessor, in 16 warps of 128 registers a thread, fit;
    # wider rows go through 8 warps of 255 registers, in pieces of 16 bytes a thread.
    block = launch.next_power_of_2(D) if D <= 4096 else 4096 // total.element_size()
    pieces = triton.cdiv(D, block)
    rows = max(1, 1024 // block)
    programs = min(triton.cdiv(N, rows), launch.processors(total.device) * max(1, 4096 // (rows * block * pieces)))
    d_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    partials_PKD = torch.empty((programs, 2 * len(weights), D), dtype=torch.float32, device=total.device)
    d_parameters_KD = torch.empty(partials_PKD.shape[1:], dtype=torch.float32, device=total.device)
    (d_y_1, d_y_2), (weight_1, weight_2) = _two(d_ys), _two(weights)
    layer_norm_backward_kernel[(programs,)](
        d_x if d_sum is None else d_sum.contiguous(), d_y_1, d_y_2, total_ND, stats_2N, weight_1, weight_2,
        d_x, partials_PKD,
        N, D,
        total_ND.stride(0),
        HAS_D_SUM=d_sum is not None, NORMS=len(weights), ROWS=rows, BLOCK=block, PIECES=pieces,
        num_warps=launch.warps(rows * block) if pieces == 1 else 8, maxnreg=128 if pieces == 1 else 255,
    )  # fmt: skip
    K_D = d_parameters_KD.numel()
    column_sums_kernel[(triton.cdiv(K_D, 32),)](
        partials_PKD, d_parameters_KD, programs, K_D, ROWS=128, BLOCK=32, num_warps=8
    )
    return d_x, d_parameters_KD


@torch.library.custom_op("fastcpt::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, addends: list[Tensor], weights: list[Tensor], biases: list[Tensor], eps: float
) -> tuple[list[Tensor], Tensor]:
    if launch.on_triton(x):
        return _forward(x, addends, weights, biases, eps)
    total, *ys = layer_norm_reference(x.contiguous(), addends, list(zip(weights, biases)), eps)
    variance, mean = torch.var_mean(_rows(total).float(), dim=1, correction=0)
    return [total, *ys] if addends else ys, torch.stack((mean, (variance + eps).rsqrt()))


@_layer_norm.register_fake
def _(
    x: Tensor, addends: list[Tensor], weights: list[Tensor], biases: list[Tensor], eps: float
) -> tuple[list[Tensor], Tensor]:
    return _empty_outputs(x, len(addends), len(weights))


@torch.library.custom_op("fastcpt::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    d_sum: Tensor | None, d_ys: list[Tensor], total: Tensor, stats_2N: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradient of the sum, and those of weights and biases (2 * len(weights), D): dw_1, dc_1[, dw_2, dc_2]."""
    if launch.on_triton(total):
        return _backward(d_sum, d_ys, total, stats_2N, weights)
    mean, rstd = stats_2N[:, :, None]
    total_ND = _rows(total).float()
    d_total, d_parameters = torch.zeros_like(total_ND), []
    for d_y, weight in zip(d_ys, weights):
        gradients = torch.ops.aten.native_layer_norm_backward(
            _rows(d_y).float(), total_ND, weight.shape, mean, rstd, weight, weight, [True, True, True]
        )
        d_total += gradients[0]
        d_parameters += gradients[1:]
    if d_sum is not None:
        d_total += _rows(d_sum)
    return d_total.to(total.dtype).view(total.shape), torch.stack(d_parameters)


@_layer_norm_backward.register_fake
def _(
    d_sum: Tensor | None, d_ys: list[Tensor], total: Tensor, stats_2N: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    d_parameters_KD = torch.empty((2 * len(weights), total.shape[-1]), dtype=torch.float32, device=total.device)
    return torch.empty(total.shape, dtype=total.dtype, device=total.device), d_parameters_KD


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, addends, weights, _, _ = inputs
    outputs, stats_2N = output
    ctx.set_materialize_grads(False)  # an output that nobody used costs no traffic
    ctx.addends = len(addends)
    ctx.save_for_backward(outputs[0] if addends else x, stats_2N, *weights)


def _gradients(ctx: Any, d_outputs: list[Tensor | None], d_stats: None) -> tuple[Any, ...]:
    total, stats_2N, *weights = ctx.saved_tensors
    d_x = d_outputs[0] if ctx.addends else None
    d_ys = d_outputs[-len(weights) :]
    used = [norm for norm, d_y in enumerate(d_ys) if d_y is not None]
    d_parameters: list[Tensor | None] = [None] * (2 * len(weights))
    if used:
        d_x, d_used_KD = _layer_norm_backward(
            d_x, [d_ys[norm] for norm in used], total, stats_2N, [weights[norm] for norm in used]
        )
        for k, norm in enumerate(used):
            d_parameters[2 * norm : 2 * norm + 2] = d_used_KD[2 * k], d_used_KD[2 * k + 1]
    return d_x, [d_x] * ctx.addends, d_parameters[::2], d_parameters[1::2], None


_layer_norm.register_autograd(_gradients, setup_context=_setup_context)


def layer_norm(
    x: Tensor, addends: Sequence[Tensor], norms: Sequence[tuple[Tensor, Tensor]], eps: float = 1e-5
) -> tuple[Tensor, ...]:
    """The sum of x and its addends, and norms of that sum -> (sum, y_1[, y_2]), all like x.

    x: (..., D) bf16 or fp32. addends: up to two tensors like x; without one the sum is x itself. norms: one or two
    pairs (weight_D, bias_D) in fp32. All are differentiable, once. The sum is rounded once; on CPU, where this is
    `layer_norm_reference`, after each addend. Raises ValueError for other shapes, dtypes and counts.
    """
    for addend in addends:
        if addend.shape != x.shape or addend.dtype != x.dtype:
            raise ValueError(f"an addend is {addend.dtype} {tuple(addend.shape)}, x is {x.dtype} {tuple(x.shape)}")
    width = x.shape[-1:]
    for norm in norms:
        for each in norm:
            if each.shape != width or each.dtype != torch.float32:
                given = f"{each.dtype} {tuple(each.shape)}"
                raise ValueError(f"a weight or bias is {given}; it must be fp32 {tuple(width)}")
    if len(addends) > 2 or len(norms) not in (1, 2):
        raise ValueError(f"{len(addends)} addends and {len(norms)} norms; it takes 0 to 2 and 1 or 2")
    if not launch.on_triton(x):
        return layer_norm_reference(x, addends, norms, eps)
    weights, biases = zip(*norms)
    outputs, _ = _layer_norm(x, list(addends), list(weights), list(biases), eps)
    return tuple(outputs) if addends else (x, *outputs)
