"""Cross-entropy of a linear head, without the logits ever existing in full.

    logits = x W^T,   d = dloss/dlogits,   dx = d W,   dW = d^T x

in blocks of rows: a block's logits are made, `cross_entropy` overwrites them with their gradient, and two matrix
products turn that into a piece of dx and a term of dW, which is summed in fp32. Memory beyond the results is one block
of logits, ROWS x V, where the plain way holds N x V; at micro-batch 32 x 2048 and 50,304 columns 0.2 GB and not 6.6.

The sum of the losses takes the gradients in the forward pass: three matrix products, as the plain way. Separate losses
do not know yet what their gradients will be multiplied with, and make the logits again in the backward pass: four.

On a GPU this is a tool for memory, not for speed: the plain way's products are larger and its weight gradient is summed
inside of one product. On CPU it is one for speed: what the plain way keeps in fp32, and clears before it is written, is
one buffer here that stays.

Shapes: N rows (tokens), D width, V columns (vocabulary, padding included).
"""

import torch
from torch import Tensor

from fastcpt.kernels import cross_entropy, launch

ROWS = 2048  # of a block: enough for a matrix product at full rate
# On a CPU fewer where their logits, no more than so many, then stay in the cache: those of a small vocabulary.
FEWER_ROWS, CACHED = 512, 1 << 22


def block_rows(columns: int, cpu: bool) -> int:
    return min(FEWER_ROWS, ROWS) if cpu and FEWER_ROWS * columns <= CACHED else ROWS


def linear_cross_entropy_reference(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    columns: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` in plain torch."""
    logits_NV = torch.nn.functional.linear(x_ND, weight_VD.to(x_ND.dtype))
    return cross_entropy.cross_entropy_reference(logits_NV, targets_N, ignore_index, z_loss=z_loss, columns=columns)


def _blocks(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    gradient_N: Tensor | None,
    options: tuple[int, float, int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) fp32 and, with `gradients`, dx (N, D) and dW (V, D) of the sum of the losses times `gradient_N`."""
    weight_VD = weight_VD.to(x_ND.dtype)
    losses_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
    dx_ND = torch.empty_like(x_ND if gradients else x_ND[:0], memory_format=torch.contiguous_format)
    empty = torch.empty_like if x_ND.shape[0] else torch.zeros_like
    dw_VD = empty(weight_VD if gradients else weight_VD[:0], dtype=torch.float32)
    rows = block_rows(weight_VD.shape[0], cpu=not launch.on_triton(x_ND))
    buffer_NV = x_ND.new_empty(min(rows, x_ND.shape[0]), weight_VD.shape[0])  # one for all: fresh memory is slow on CPU
    for start in range(0, x_ND.shape[0], rows):
        part = slice(start, start + rows)
        logits_NV = torch.mm(x_ND[part], weight_VD.T, out=buffer_NV[: x_ND.shape[0] - start])
        losses_N[part] = cross_entropy.forward(logits_NV, targets_N[part], *options, gradients)[0]
        if gradients:
            if gradient_N is not None:
                cross_entropy.scale_rows(logits_NV, gradient_N[part])
            torch.mm(logits_NV, weight_VD, out=dx_ND[part])
            _add_product(dw_VD, logits_NV.T, x_ND[part], beta=min(start, 1))
    return losses_N, dx_ND, dw_VD


def _add_product(sum_VD: Tensor, a_VN: Tensor, b_ND: Tensor, beta: int) -> None:
    """sum = beta sum + a b in fp32, whatever the dtype of a and b; with a beta of 0 the sum is not read."""
    if a_VN.dtype == torch.float32:
        sum_VD.addmm_(a_VN, b_ND, beta=beta)
    elif sum_VD.is_cuda:
        torch.addmm(sum_VD, a_VN, b_ND, beta=beta, out_dtype=torch.float32, out=sum_VD)
    else:
        (sum_VD.add_ if beta else sum_VD.copy_)(a_VN @ b_ND)


@torch.library.custom_op("fastcpt::linear_cross_entropy", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, columns: int) -> Tensor:
    return _blocks(x, weight, targets, None, (ignore_index, z_loss, columns), gradients=False)[0]


@torch.library.custom_op("fastcpt::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    gradient: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, columns: int
) -> tuple[Tensor, Tensor]:
    return _blocks(x, weight, targets, gradient, (ignore_index, z_loss, columns), gradients=True)[1:]


@torch.library.custom_op("fastcpt::linear_cross_entropy_sum", mutates_args=())
def _sum_op(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _blocks(x, weight, targets, None, (ignore_index, z_loss, columns), gradients=True)


@_forward_op.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


@_backward_op.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


@_sum_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    return losses, x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets)


def _backward_formula(ctx, gradient):
    x, weight, targets = ctx.saved_tensors
    dx, dw = torch.ops.fastcpt.linear_cross_entropy_backward(gradient, x, weight, targets, *ctx.options)
    return dx, dw.to(weight.dtype), None, None, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, z_loss, columns):
        losses, dx, dw = torch.ops.fastcpt.linear_cross_entropy_sum(x, weight, targets, ignore_index, z_loss, columns)
        ctx.save_for_backward(dx, dw.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, gradient, _):
        dx, dw = ctx.saved_tensors
        if launch.on_triton(dx):
            return gradient * dx, gradient * dw, None, None, None, None
        for each in (dx, dw):  # over the saved tensors, as `cross_entropy` does: nothing is moved for a gradient of 1
            torch.ops.fastcpt.scale_rows_(each, gradient.expand(len(each)))
        return dx, dw, None, None, None, None


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    columns: int | None = None,
) -> Tensor:
    """`cross_entropy` of the logits x weight^T -> (N,) fp32, which take (2048, V) in memory at a time.

    x_ND bf16 or fp32, whose dtype the products have; weight_VD fp32 or bf16; targets_N int64; the other arguments are
    those of `cross_entropy`. The gradient may differ from loss to loss; where their sum is wanted,
    `linear_cross_entropy_sum` saves a matrix product.
    """
    columns = weight_VD.shape[0] if columns is None else columns
    return torch.ops.fastcpt.linear_cross_entropy(x_ND, weight_VD, targets_N, ignore_index, z_loss, columns)


def linear_cross_entropy_sum(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, a fp32 scalar, and the losses (N,) themselves, without a gradient.

    Beside a block of logits the forward pass holds the gradients: (N, D) in the dtype of x and (V, D) fp32.
    """
    columns = weight_VD.shape[0] if columns is None else columns
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return _Sum.apply(x_ND, weight_VD, targets_N, ignore_index, z_loss, columns)
    losses_N = linear_cross_entropy(x_ND, weight_VD, targets_N, ignore_index, z_loss=z_loss, columns=columns)
    return losses_N.sum(), losses_N
