"""Partial rotary embedding of q and k, within the packed projection [q k v] of each head.

    rotate(x)_c       = x_c cos_c - x_{c+h} sin_c              for c < h = R/2
    rotate(x)_{c+h}   = x_{c+h} cos_{c+h} + x_c sin_{c+h}
    rotate(x)_c       = x_c                                    for c >= R

(arXiv 2104.09864 in the rotate-half form of GPT-NeoX, arXiv 2204.06745.) The gradient is the transpose, with d for dy:

    dx_c = d_c cos_c + d_{c+h} sin_{c+h}        dx_{c+h} = d_{c+h} cos_{c+h} - d_c sin_c

A linear layer does not need its output again, so the forward pass overwrites it: it reads and writes the R values of q
and k that turn, and q, k and v are views of the projection, their rows 3C values apart. The backward pass reads the
gradients of q, k and v as attention left them and writes that of the projection, already turned back.

Bytes, with u = a row of D = H*C values: forward 4 R/C u, 1u for Pythia's R = C/4; backward 3u read and 3u written.
What was not taken: marking the projection as modified and leaving the views to autograd, which packs the gradients in
one pass (3u and 3u) and turns them in another (1u); outside of torch.compile it also clones the gradient of a view
that was overwritten, three times over. The floor is 1u for the backward pass too, if attention wrote its gradients
into the packed tensor; torch's operators do not. DRAM moves 32 bytes at least: in bf16 the R values of a head are half
of that for C = 32, one for C = 64, two for C = 80 (40 bytes), whole ones above. Where h values are no multiple of 16
bytes (C = 32, 80), what turns and its factors are moved in words of 8 or 4 bytes; all else is moved in words of 16.

Shapes: B batch, T time, H heads, C head width, R values of a head that turn.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcpt.kernels import launch


def _rotate(x_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    half = cos_TR.shape[-1] // 2
    # Split, whose gradient is one concatenation; that of slices is a sum of padded ones.
    first, second, kept = x_BTHC.split((half, half, x_BTHC.shape[-1] - 2 * half), dim=-1)
    first, second = first.to(cos_TR.dtype), second.to(cos_TR.dtype)
    (cos_1, cos_2), (sin_1, sin_2) = (table_TR[:, None].chunk(2, dim=-1) for table_TR in (cos_TR, sin_TR))
    turned = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    return torch.cat((*(part.to(x_BTHC.dtype) for part in turned), kept), dim=-1)


def _rotate_back(d_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    width = cos_TR.shape[-1]
    turned, kept = d_BTHC[..., :width].to(cos_TR.dtype), d_BTHC[..., width:]
    first, second = (turned * sin_TR[:, None]).chunk(2, dim=-1)
    turned = turned * cos_TR[:, None] + torch.cat((second, -first), dim=-1)
    return torch.cat((turned.to(d_BTHC.dtype), kept), dim=-1)


def qkv_rotary_reference(qkv_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_rotary` in plain torch, in the dtype of the tables; overwrites nothing."""
    q_BTHC, k_BTHC, v_BTHC = qkv_BTHE.chunk(3, dim=-1)
    if cos_TR.shape[-1] == 0:
        return q_BTHC, k_BTHC, v_BTHC
    return _rotate(q_BTHC, cos_TR, sin_TR), _rotate(k_BTHC, cos_TR, sin_TR), v_BTHC


@triton.jit
def qkv_rotary_forward_kernel(
    # pointers
    qkv_ptr, cos_ptr, sin_ptr,
    # sizes
    num_rows,
    # constants
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A row is q or k of a head: 2H rows a token, num_rows a sequence, whose positions begin at 0.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    heads = tl.program_id(1).to(tl.int64) * (num_rows // 2) + rows // 2
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < R // 2)
    pointers = qkv_ptr + heads * (3 * C) + rows % 2 * C + columns
    table = rows // (2 * H) * R + columns

    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + R // 2, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin_first = tl.load(sin_ptr + table, mask=mask, other=0.0)
    cos_second = tl.load(cos_ptr + table + R // 2, mask=mask, other=0.0)
    sin_second = tl.load(sin_ptr + table + R // 2, mask=mask, other=0.0)
    kind = qkv_ptr.dtype.element_ty
    tl.store(pointers, (first * cos_first - second * sin_first).to(kind), mask=mask)
    tl.store(pointers + R // 2, (second * cos_second + first * sin_second).to(kind), mask=mask)


@triton.jit
def qkv_rotary_backward_kernel(
    # pointers
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, d_qkv_ptr,
    # sizes
    num_rows,
    # strides
    q_stride_B, q_stride_T, q_stride_H, k_stride_B, k_stride_T, k_stride_H, v_stride_B, v_stride_T, v_stride_H,
    # constants
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A row is a head of a token: num_rows a sequence.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    b, t, h = tl.program_id(1).to(tl.int64), (rows // H).to(tl.int64), (rows % H).to(tl.int64)
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < C)
    pointers = d_qkv_ptr + (b * num_rows + rows) * (3 * C) + columns

    # 1. Each column's partner, R/2 away, and the factors of both; 1 and 0 where nothing turns.
    turns = mask & (columns < R)
    partner = tl.where(columns < R // 2, R // 2, -(R // 2))
    table = t * R + columns
    cos = tl.load(cos_ptr + table, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + table + partner, mask=turns, other=0.0)
    sin = tl.where(columns < R // 2, sin, -sin)

    # 2. q and k turned back.
    kind = d_qkv_ptr.dtype.element_ty
    source = dq_ptr + b * q_stride_B + t * q_stride_T + h * q_stride_H + columns
    own = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
    tl.store(pointers, (own * cos + other * sin).to(kind), mask=mask)
    source = dk_ptr + b * k_stride_B + t * k_stride_T + h * k_stride_H + columns
    own = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
    tl.store(pointers + C, (own * cos + other * sin).to(kind), mask=mask)

    # 3. v as it is.
    source = dv_ptr + b * v_stride_B + t * v_stride_T + h * v_stride_H + columns
    tl.store(pointers + 2 * C, tl.load(source, mask=mask, other=0.0), mask=mask)


def _forward(qkv_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    batch, time, heads, packed = qkv_BTHE.shape
    rotated = cos_TR.shape[-1]
    columns = launch.next_power_of_2(rotated // 2)
    rows = max(1, 1024 // columns)
    qkv_rotary_forward_kernel[(triton.cdiv(time * heads * 2, rows), batch)](
        qkv_BTHE, cos_TR.contiguous(), sin_TR.contiguous(), time * heads * 2,
        H=heads, C=packed // 3, R=rotated, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def _backward(dq_BTHC: Tensor, dk_BTHC: Tensor, dv_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    batch, time, heads, width = dq_BTHC.shape
    d_qkv_BTHE = torch.empty(batch, time, heads, 3 * width, dtype=dq_BTHC.dtype, device=dq_BTHC.device)
    gradients = [d if d.stride(-1) == 1 else d.contiguous() for d in (dq_BTHC, dk_BTHC, dv_BTHC)]
    columns = launch.next_power_of_2(width)
    rows = max(1, 2048 // columns)
    qkv_rotary_backward_kernel[(triton.cdiv(time * heads, rows), batch)](
        *gradients, cos_TR.contiguous(), sin_TR.contiguous(), d_qkv_BTHE, time * heads,
        *(stride for d in gradients for stride in d.stride()[:3]),
        H=heads, C=width, R=cos_TR.shape[-1], ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return d_qkv_BTHE


@torch.library.custom_op("fastcpt::qkv_rotary_", mutates_args=("qkv_BTHE",))
def _qkv_rotary_(qkv_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    if launch.on_triton(qkv_BTHE):
        _forward(qkv_BTHE, cos_TR, sin_TR)
        return
    for part_BTHC in qkv_BTHE.chunk(3, dim=-1)[:2]:
        part_BTHC.copy_(_rotate(part_BTHC, cos_TR, sin_TR))


@torch.library.custom_op("fastcpt::qkv_rotary_backward", mutates_args=())
def _qkv_rotary_backward(dq_BTHC: Tensor, dk_BTHC: Tensor, dv_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    if launch.on_triton(dq_BTHC):
        return _backward(dq_BTHC, dk_BTHC, dv_BTHC, cos_TR, sin_TR)
    return torch.cat((*(_rotate_back(d, cos_TR, sin_TR) for d in (dq_BTHC, dk_BTHC)), dv_BTHC), dim=-1)


@torch.library.custom_op("fastcpt::qkv_rotary_overwrote", mutates_args=())
def _overwrote(d_qkv_BTHE: Tensor) -> Tensor:
    raise RuntimeError("qkv was used after qkv_rotary had overwritten it: its gradient does not exist; clone it before")


@_qkv_rotary_.register_fake
def _(qkv_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    return None


@_qkv_rotary_backward.register_fake
def _(dq_BTHC: Tensor, dk_BTHC: Tensor, dv_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    return dq_BTHC.new_empty(*dq_BTHC.shape[:-1], 3 * dq_BTHC.shape[-1])


@_overwrote.register_fake
def _(d_qkv_BTHE: Tensor) -> Tensor:
    return torch.empty_like(d_qkv_BTHE)


class _Rotate(torch.autograd.Function):
    """Overwrites qkv and returns its parts. Detached, so that autograd takes them for tensors of their own."""

    @staticmethod
    def forward(ctx: Any, qkv_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_TR, sin_TR)
        torch.ops.fastcpt.qkv_rotary_(qkv_BTHE, cos_TR, sin_TR)
        return tuple(part_BTHC.detach() for part_BTHC in qkv_BTHE.chunk(3, dim=-1))

    @staticmethod
    def backward(ctx: Any, dq_BTHC: Tensor, dk_BTHC: Tensor, dv_BTHC: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.fastcpt.qkv_rotary_backward(dq_BTHC, dk_BTHC, dv_BTHC, *ctx.saved_tensors), None, None


class _Overwritten(torch.autograd.Function):
    """What autograd knows of qkv from then on: a gradient that comes this way is refused. It launches nothing."""

    @staticmethod
    def forward(ctx: Any, qkv_BTHE: Tensor) -> Tensor:
        ctx.mark_dirty(qkv_BTHE)
        return qkv_BTHE

    @staticmethod
    def backward(ctx: Any, d_qkv_BTHE: Tensor) -> Tensor:
        return torch.ops.fastcpt.qkv_rotary_overwrote(d_qkv_BTHE)


def qkv_rotary(qkv_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the packed projection, each (B, T, H, C), the first R values of q and k turned by their position.

    qkv_BTHE (B, T, H, 3C), bf16 or fp32: [q k v] of each head. cos_TR and sin_TR fp32, as `fastcpt.model.rotary_table`
    makes them. Computed in fp32; in the dtype of qkv.

    qkv_BTHE is consumed: where kernels run it is overwritten, and q, k and v are views of it, contiguous in their last
    dimension only. Autograd raises RuntimeError in the backward pass if an operation before this one needs its values
    again, or if one after this one used it. One that is not contiguous is copied first: no projection's output is, and
    memory that overlaps must not be turned twice.

    Raises ValueError on shapes or tables that do not fit.
    """
    time, width, rotated = qkv_BTHE.shape[1], qkv_BTHE.shape[-1], cos_TR.shape[-1]
    if width % 3 or rotated % 2 or rotated > width // 3:
        raise ValueError(f"{rotated} values cannot turn in heads of [q k v] of {width}: R is even and at most C")
    for table_TR in (cos_TR, sin_TR):
        if table_TR.shape != (time, rotated) or table_TR.dtype != torch.float32:
            found = f"{table_TR.dtype} {tuple(table_TR.shape)}"
            raise ValueError(f"a table is {found}; it must be fp32 ({time}, {rotated}), a row for each position")
    if rotated == 0 or not launch.on_triton(qkv_BTHE):
        return qkv_rotary_reference(qkv_BTHE, cos_TR, sin_TR)
    qkv_BTHE = qkv_BTHE.contiguous()
    q_BTHC, k_BTHC, v_BTHC = _Rotate.apply(qkv_BTHE, cos_TR, sin_TR)
    _Overwritten.apply(qkv_BTHE)
    return q_BTHC, k_BTHC, v_BTHC
