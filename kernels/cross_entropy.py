"""Cross-entropy over a large vocabulary: loss and gradient with the fewest passes over the logits.

For a row x of V logits with target t:

    lse  = log sum_j exp(x_j)               loss = lse - x_t + z lse^2
    dloss/dx_j = exp(x_j - lse) (1 + 2 z lse) - [j = t]

z is the weight of the z-loss (PaLM, arXiv 2204.02311, section 5). The sum runs online (arXiv 1805.02867): one loop over
the row keeps a running maximum and the sum scaled by it. In place, a second loop reads the row again, which the first
has left in the L2 cache, and writes the gradient over it: 6 bytes of loads and stores a bf16 logit, of which 4 have to
reach DRAM. A whole row of 50,304 logits in registers spills. Out of place, the forward pass reads 2 bytes a logit and
the backward pass reads 2 and writes 2, for a copy of the logits in memory.

Shapes: N rows (tokens), V columns (vocabulary, padding included).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcpt.kernels import launch

# Logits of a block on CPU, of which several are read again and again: 6 MB stay in the last-level cache.
CPU_BLOCK = 1_600_000


def cross_entropy_reference(
    logits_NV: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    inplace: bool = False,
    *,
    z_loss: float = 0.0,
    columns: int | None = None,
) -> Tensor:
    """`cross_entropy` in plain torch; never in place."""
    logits_NV = logits_NV[:, :columns]
    logits_NV = logits_NV.float() if logits_NV.dtype != torch.float64 else logits_NV
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="none")
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    return losses_N + torch.where(targets_N == ignore_index, 0.0, z_loss * lse_N.square())


@triton.jit
def _store_gradient(
    logits_ptr, gradients_ptr, target, lse, gradient, z_loss, columns, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the gradient of one row, whose pointers are given, times `gradient`; zero past `columns`."""
    slope = gradient * (1 + 2 * z_loss * lse)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - lse) * slope - tl.where(column == target, gradient, 0.0)
        tl.store(gradients_ptr + column, tl.where(inside, y, 0.0), mask=column < width)


@triton.jit
def _store_zeros(gradients_ptr, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(gradients_ptr + column, tl.zeros((BLOCK,), tl.float32), mask=column < width)


@triton.jit
def _forward_kernel(
    # pointers
    logits_ptr, targets_ptr, losses_ptr, lse_ptr,
    # sizes
    columns, width,
    # strides
    row_stride,
    # scalars
    ignore_index, z_loss,
    # constants
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if IN_PLACE:
            _store_zeros(logits_ptr, width, BLOCK)
        return
    # Read before the loop, whose reductions hold every thread until all have read: below, a thread that is ahead
    # writes over it. A target outside of the vocabulary gives NaN, which the optimizer sees.
    valid = (target >= 0) & (target < columns)
    target_logit = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32)

    # 1. Running maximum and, for each lane, the sum of exponentials scaled by it. The maximum starts finite: -inf
    #    minus -inf would be NaN.
    maximum = -3.0e38
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, 0))
        sums = sums * tl.exp(maximum - larger) + tl.exp(x - larger)
        maximum = larger

    # 2. The loss, from differences with the maximum, which are small where the loss is.
    log_sum = tl.log(tl.sum(sums, 0))
    lse = maximum + log_sum
    tl.store(losses_ptr + row, log_sum - (target_logit - maximum) + z_loss * lse * lse)
    tl.store(lse_ptr + row, lse)

    # 3. The gradient for a gradient of 1, over the logits.
    if IN_PLACE:
        _store_gradient(logits_ptr, logits_ptr, target, lse, 1.0, z_loss, columns, width, BLOCK)


@triton.jit
def _backward_kernel(
    # pointers
    gradient_ptr, logits_ptr, targets_ptr, lse_ptr, gradients_ptr,
    # sizes
    columns, width,
    # strides
    gradient_stride, row_stride,
    # scalars
    ignore_index, z_loss,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gradients_ptr += row * width
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        _store_zeros(gradients_ptr, width, BLOCK)
    else:
        gradient = tl.load(gradient_ptr + row * gradient_stride)
        lse = tl.load(lse_ptr + row)
        _store_gradient(
            logits_ptr + row * row_stride, gradients_ptr, target, lse, gradient, z_loss, columns, width, BLOCK
        )


@triton.jit
def _scale_kernel(
    # pointers
    gradients_ptr, gradient_ptr,
    # sizes
    width,
    # strides
    row_stride, gradient_stride,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gradient = tl.load(gradient_ptr + row * gradient_stride)
    if gradient != 1.0:  # a sum's gradient is 1: then nothing is moved
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            pointers = gradients_ptr + row * row_stride + column
            y = tl.load(pointers, mask=column < width).to(tl.float32)
            tl.store(pointers, y * gradient, mask=column < width)


def _block(width: int) -> int:
    return min(4096, launch.next_power_of_2(width))


def _cpu_parts(rows: int, width: int) -> list[slice]:
    """Blocks of one size, or the last a little smaller."""
    block = -(-rows // -(-rows * width // CPU_BLOCK)) if rows else 1
    return [slice(start, start + block) for start in range(0, rows, block)]


def _rows_contiguous(x_NV: Tensor) -> Tensor:
    return x_NV if x_NV.stride(-1) == 1 else x_NV.contiguous()


def forward(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, z_loss: float, columns: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps; in place, the gradient over the logits."""
    rows, width = logits_NV.shape
    if not launch.on_triton(logits_NV):
        return _cpu_forward(logits_NV, targets_N, ignore_index, z_loss, columns, in_place)
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    lse_N = torch.empty_like(losses_N)
    if rows:
        _forward_kernel[(rows,)](
            logits_NV, targets_N.contiguous(), losses_N, lse_N, columns, width, logits_NV.stride(0),
            ignore_index, z_loss, IN_PLACE=in_place, BLOCK=_block(width), num_warps=8,
        )  # fmt: skip
    return losses_N, lse_N


def _cpu_forward(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, z_loss: float, columns: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    """What needs all columns in blocks of rows that a cache holds, what needs one number a row of all rows at once: a call
    costs as much as a few thousand logits."""
    parts = _cpu_parts(*logits_NV.shape)
    ignored_N = targets_N == ignore_index
    targets_N1 = torch.where(ignored_N, 0, targets_N)[:, None]
    target_logit_N1 = logits_NV[:, :columns].gather(1, targets_N1).float()
    maximum_N1, largest_N1 = torch.empty_like(target_logit_N1), torch.empty_like(target_logit_N1)
    minus_N1 = torch.full_like(target_logit_N1, -1.0)
    in_fp32 = in_place and logits_NV.dtype == torch.float32
    some_ignored = bool(ignored_N.any())
    room_NV = torch.empty(0 if in_fp32 or not parts else min(parts[0].stop, len(logits_NV)), logits_NV.shape[1])
    for part in parts:
        block_NV = given_NV = logits_NV[part]
        if not in_fp32:
            block_NV = room_NV[: len(given_NV)].copy_(given_NV)
        x_NV = block_NV[:, :columns]
        torch.amax(x_NV, 1, keepdim=True, out=maximum_N1[part])
        # One pass, where exp, sum and a product are three. The largest share is exp(0) / sum.
        if x_NV.is_contiguous():
            torch.softmax(x_NV, 1, out=x_NV)
        else:
            x_NV.copy_(torch.softmax(x_NV, 1))
        torch.amax(x_NV, 1, keepdim=True, out=largest_N1[part])
        if in_place:
            if z_loss:
                x_NV.mul_(1 + 2 * z_loss * (maximum_N1[part] - largest_N1[part].log()))
            x_NV.scatter_add_(1, targets_N1[part], minus_N1[part])
            block_NV[:, columns:] = 0
            if some_ignored:
                block_NV[ignored_N[part]] = 0
            if not in_fp32:
                given_NV.copy_(block_NV)
    log_sum_N1 = -largest_N1.log()
    lse_N1 = maximum_N1 + log_sum_N1
    losses_N1 = log_sum_N1 - (target_logit_N1 - maximum_N1) + z_loss * lse_N1.square()
    return losses_N1[:, 0].masked_fill_(ignored_N, 0), lse_N1[:, 0].masked_fill_(ignored_N, 0)


def _backward(
    gradient_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    ignore_index: int,
    z_loss: float,
    columns: int,
) -> Tensor:
    rows, width = logits_NV.shape
    gradients_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    if not launch.on_triton(logits_NV):
        for part in _cpu_parts(rows, width):
            block_NV = gradients_NV[part].to(torch.float32)  # itself, or room to compute in
            x_NV, ignored_N, slope_N = block_NV[:, :columns], targets_N[part] == ignore_index, gradient_N[part]
            torch.sub(logits_NV[part, :columns], lse_N[part, None], out=x_NV).exp_()
            x_NV.mul_((slope_N * (1 + 2 * z_loss * lse_N[part]))[:, None])
            x_NV.scatter_add_(1, torch.where(ignored_N, 0, targets_N[part])[:, None], -slope_N[:, None])
            block_NV[:, columns:] = 0
            block_NV[ignored_N] = 0
            if block_NV.dtype != gradients_NV.dtype:
                gradients_NV[part] = block_NV
    elif rows:
        _backward_kernel[(rows,)](
            gradient_N, logits_NV, targets_N.contiguous(), lse_N, gradients_NV, columns, width,
            gradient_N.stride(0), logits_NV.stride(0), ignore_index, z_loss, BLOCK=_block(width), num_warps=8,
        )  # fmt: skip
    return gradients_NV


def scale_rows(gradients_NV: Tensor, gradient_N: Tensor) -> None:
    rows, width = gradients_NV.shape
    if not launch.on_triton(gradients_NV):
        if not (gradient_N == 1).all():
            gradients_NV.mul_(gradient_N[:, None])
    elif rows:
        _scale_kernel[(rows,)](
            gradients_NV, gradient_N, width, gradients_NV.stride(0), gradient_N.stride(0),
            BLOCK=_block(width), num_warps=8,
        )  # fmt: skip


@torch.library.custom_op("fastcpt::cross_entropy", mutates_args=())
def _forward_op(
    logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float, columns: int
) -> tuple[Tensor, Tensor]:
    return forward(_rows_contiguous(logits), targets, ignore_index, z_loss, columns, False)


@torch.library.custom_op("fastcpt::cross_entropy_backward", mutates_args=())
def _backward_op(
    gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, z_loss: float, columns: int
) -> Tensor:
    return _backward(gradient, _rows_contiguous(logits), targets, lse, ignore_index, z_loss, columns)


@torch.library.custom_op("fastcpt::cross_entropy_", mutates_args=("logits",))
def _forward_in_place_op(
    logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float, columns: int
) -> tuple[Tensor, Tensor]:
    return forward(logits, targets, ignore_index, z_loss, columns, True)


@torch.library.custom_op("fastcpt::scale_rows_", mutates_args=("gradients",))
def _scale_rows_op(gradients: Tensor, gradient: Tensor) -> None:
    scale_rows(gradients, gradient)


@_forward_op.register_fake
@_forward_in_place_op.register_fake
def _(logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float, columns: int) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@_backward_op.register_fake
def _(gradient: Tensor, logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_scale_rows_op.register_fake
def _(gradients: Tensor, gradient: Tensor) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _backward_formula(ctx, gradient, _):
    logits, targets, lse = ctx.saved_tensors
    gradients = torch.ops.fastcpt.cross_entropy_backward(gradient, logits, targets, lse, *ctx.options)
    return gradients, None, None, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """Mutating operators have no autograd formula of their own (DESIGN.md, D10)."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, z_loss, columns):
        losses, _ = torch.ops.fastcpt.cross_entropy_(logits, targets, ignore_index, z_loss, columns)
        ctx.save_for_backward(logits)
        return losses

    @staticmethod
    def backward(ctx, gradient):
        (gradients,) = ctx.saved_tensors
        # Over the saved tensor: a second backward pass finds it changed, and autograd raises.
        torch.ops.fastcpt.scale_rows_(gradients, gradient)
        return gradients, None, None, None, None


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    inplace: bool = False,
    *,
    z_loss: float = 0.0,
    columns: int | None = None,
) -> Tensor:
    """-log softmax(logits)[target] + z_loss * lse^2 for each row -> (N,) fp32; exactly 0 where the target is ignored.

    logits_NV bf16 or fp32; targets_N int64. inplace=True destroys the logits: their gradient takes their place, which
    saves their copy and a third of the traffic, and costs nothing more when the losses are summed (a gradient of 1).
    columns: the softmax is over the first `columns` of V (None: all of it, as transformers and GPT-NeoX compute it);
    the gradient of the others is zero. A target outside of them gives NaN on a GPU and raises on CPU.
    `cross_entropy_with_lse` gives the log-sum-exp as well.
    """
    columns = logits_NV.shape[1] if columns is None else columns
    if inplace and torch.is_grad_enabled() and logits_NV.requires_grad:
        if logits_NV.stride(-1) != 1:
            raise ValueError(
                f"cross_entropy in place takes logits with contiguous rows, not of strides {logits_NV.stride()}"
            )
        return _InPlace.apply(logits_NV, targets_N, ignore_index, z_loss, columns)
    return cross_entropy_with_lse(logits_NV, targets_N, ignore_index, z_loss=z_loss, columns=columns)[0]


def cross_entropy_with_lse(
    logits_NV: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` out of place and the log-sum-exp of each row, (N,) fp32, 0 where ignored, without a gradient."""
    columns = logits_NV.shape[1] if columns is None else columns
    losses_N, lse_N = torch.ops.fastcpt.cross_entropy(logits_NV, targets_N, ignore_index, z_loss, columns)
    return losses_N, lse_N.detach()
