"""Causal attention of bf16 on a CPU: matrix products of blocks of rows, the probabilities kept for the backward pass.

    S = q k^T / sqrt(C)    P = softmax(S)    y = P v
    dP = dy v^T    dS = P (dP - sum(P dP))    dq = dS k / sqrt(C)    dk = dS^T q / sqrt(C)    dv = P^T dy

A block of rows meets the positions up to its own last one alone, so that of T x T little more than half is computed. A
product of all heads at once runs near the rate of large ones; torch's flash kernel for CPUs multiplies small tiles and
is three to four times as slow at 512 positions. The price is memory: T^2 / 2 probabilities of two bytes a head.

S is fp32, as in flash kernels: rounded to bf16 it would double the error of the result. The other products are bf16,
summed in fp32 by the hardware.

Shapes: B batch, H heads, M = B*H, T time, C head width, R rows of a block, S positions that it meets.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128  # of a block, or half of the sequence


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First row and end of each block."""
    rows = min(ROWS, -(-length // 2))
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def probabilities(length: int) -> int:
    """How many a head has."""
    return sum((stop - start) * stop for start, stop in _blocks(length))


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    """fp32 products by oneDNN and not by MKL, which has half the rate on AMD's chips. It may then multiply in bf16, which
    loses nothing of factors that are bf16 already."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@torch.library.custom_op("fastcpt::cpu_attention", mutates_args=())
def _forward(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, documents_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """y like v, and the probabilities of the blocks, one after the other, (M * ...,) bf16."""
    batch, _, length, width = q_BHTC.shape
    q_MTC, k_MTC, v_MTC = (x.flatten(0, 1) for x in (q_BHTC, k_BHTC, v_BHTC))
    y_MTC, heads = torch.empty_like(v_MTC), len(q_MTC)
    kept = q_MTC.new_empty(heads * probabilities(length))
    q32_MTC, k32_MCT = q_MTC.float(), k_MTC.float().transpose(1, 2)
    future_RR = torch.full((ROWS, ROWS), -math.inf).triu_(1)
    scores, used = torch.empty(heads * ROWS * length), 0
    for start, stop in _blocks(length):
        shape = heads, stop - start, stop
        size = math.prod(shape)
        scores_MRS = scores[:size].view(shape)
        with _onednn():
            torch.baddbmm(
                scores_MRS, q32_MTC[:, start:stop], k32_MCT[..., :stop], beta=0, alpha=width**-0.5, out=scores_MRS
            )
        scores_MRS[..., start:] += future_RR[: stop - start, : stop - start]
        if documents_BT is not None:
            other_BRS = documents_BT[:, start:stop, None] != documents_BT[:, None, :stop]
            scores_MRS.unflatten(0, (batch, -1)).masked_fill_(other_BRS[:, None], -math.inf)
        probabilities_MRS = kept[used : used + size].view(shape)
        probabilities_MRS.copy_(torch.softmax(scores_MRS, -1, out=scores_MRS))
        used += size
        torch.bmm(probabilities_MRS, v_MTC[:, :stop], out=y_MTC[:, start:stop])
    return y_MTC.view_as(v_BHTC), kept


@torch.library.custom_op("fastcpt::cpu_attention_backward", mutates_args=())
def _backward(
    dy_BHTC: Tensor, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    length, width = q_BHTC.shape[2:]
    dy_MTC, q_MTC, k_MTC, v_MTC = (x.flatten(0, 1) for x in (dy_BHTC, q_BHTC, k_BHTC, v_BHTC))
    dq_MTC, (dk_MTC, dv_MTC) = torch.empty_like(q_MTC), torch.empty(2, *q_MTC.shape)
    end, scale = len(kept), width**-0.5
    for start, stop in reversed(list(_blocks(length))):  # the last meets all positions, so that nothing need be cleared
        shape = len(q_MTC), stop - start, stop
        p_MRS, dy_MRC = kept[end - math.prod(shape) : end].view(shape), dy_MTC[:, start:stop]
        end -= math.prod(shape)
        ds_MRS = torch._softmax_backward_data(dy_MRC @ v_MTC[:, :stop].transpose(1, 2), p_MRS, -1, p_MRS.dtype)
        torch.bmm(ds_MRS, k_MTC[:, :stop], out=dq_MTC[:, start:stop])
        for sum_MTC, rows_MRS, values_MRC in ((dk_MTC, ds_MRS, q_MTC[:, start:stop]), (dv_MTC, p_MRS, dy_MRC)):
            term_MSC = rows_MRS.transpose(1, 2) @ values_MRC
            sum_MTC[:, :stop].add_(term_MSC) if stop < length else sum_MTC.copy_(term_MSC)
    dq_MTC, dk_MTC = dq_MTC.mul_(scale), dk_MTC.mul_(scale)
    return tuple(x.to(q_BHTC.dtype).view_as(q_BHTC) for x in (dq_MTC, dk_MTC, dv_MTC))  # type: ignore[return-value]


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[0] * q.shape[1] * probabilities(q.shape[2]))


@_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradients(ctx, dy, _):
    return *_backward(dy.contiguous(), *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)


def cpu_attention(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over earlier positions of the same document -> (B, T, H, C), all bf16.

    documents_BT: the number of each token's document, None where all are one.
    """
    # Contiguous here and not in the operator: a compiled graph then writes them so in the first place.
    q_BHTC, k_BHTC, v_BHTC = (x.transpose(1, 2).contiguous() for x in (q_BTHC, k_BTHC, v_BTHC))
    return _forward(q_BHTC, k_BHTC, v_BHTC, documents_BT)[0].transpose(1, 2)
