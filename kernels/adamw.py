"""AdamW on all tensors at once: one launch for the norm of the gradients, one for the update, none waits for the host.

With G the gradients as they came, s a factor that they all still lack (1 / tokens), c the largest norm, t the number of
updates, b1, b2 the decays of the moments, d the weight decay of a tensor and r the learning rate (arXiv 1711.05101):

    n = s sqrt(sum G^2)    g = G s / max(n / c, 1)    m += (1 - b1) (g - m)    v += (1 - b2) (g^2 - v)
    p = p (1 - r d) - r / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

1 - b^t is taken in float64: in fp32, 1 - 0.999^1 has lost three digits. If n is not finite nothing is written, t included.

The kernels find their tensors in a table of addresses, a row a tensor. The host writes it anew at every step and copies
it from pinned memory without waiting, 64 bytes a tensor, so that there is no table that could be stale when gradients
were freed and made again. `blocks`, the tensor of each program, follows from the lengths alone and is kept. Programs of
a tensor are in a row, so that with the first of them, which the table holds, the offset follows.

Bytes a parameter: 28 for the update (p, m and v read and written, G read), the floor, and 4 for the norm, which must be
known before the first write and therefore reads G once more: 32. With bf16 moments 20 and 4. Beside them every program
reads 4 bytes of `blocks`, and from cache its row of the table and the scalars: a program is 2048 elements, of the norm
8192, with a partial sum of 4 bytes.

bf16 moments are rounded stochastically: up or down, with the probabilities that make the result right on average
(round-to-nearest would lose every change below 2^-9 of a value, and (1 - b2) is smaller). 16 random bits for each
come from Philox4x32-7 (Salmon et al., 2011), counter (element, t, tensor), key `seed`: a place in a list of tensors gets
the same bits in every process, on every device and after a restart.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcpt.kernels import launch

SQUARE_BLOCK, BLOCK = 8192, 2048  # elements a program; both have 8 wide loads a thread under way at once
# What the scalars kernel leaves on the device, by place in `scalars`.
NORM, SKIPPED, FACTOR, RATE, ROOT, STEP = (tl.constexpr(place) for place in range(6))
# A row of the table: of what, by place. KEPT: 1 - r d, the bits of a float64.
LENGTH, FIRST, G, P, M, V, KEPT, ROW = (tl.constexpr(place) for place in range(8))
PIECE = 1 << 20  # elements of a product on CPU


def gradient_square_reference(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()


@torch.no_grad()
def adamw_reference(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    decays: list[float], step: Tensor, *, lr: float | Tensor, betas: tuple[float, float], eps: float, clip: float,
    scale: float = 1.0, square: Tensor | None = None, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`adamw_step` in plain torch, in the dtype of the parameters (float64 too); gradients are left as they are."""
    norm = (gradient_square_reference(gradients) if square is None else square).sqrt() * scale
    finite = torch.isfinite(norm)
    factor = scale / (norm / clip).clamp(min=1.0)
    step += finite
    bias_1, bias_2 = (1 - beta ** step.double() for beta in betas)
    for index, (p, g, m, v, decay) in enumerate(zip(parameters, gradients, exp_avgs, exp_avg_sqs, decays, strict=True)):
        scaled = g * factor
        first = torch.lerp(m.to(p.dtype), scaled, 1 - betas[0])
        second = torch.lerp(v.to(p.dtype), scaled * scaled, 1 - betas[1])
        updated = p * (1 - lr * decay) - lr / bias_1 * first / (second.sqrt() / bias_2.sqrt() + eps)
        if m.dtype == torch.bfloat16:
            bits = _random_bits(p.numel(), step, index, seed).view(p.shape)
            first, second = _rounded(first, bits & 0xFFFF), _rounded(second, bits >> 16)
        for old, new in ((p, updated), (m, first), (v, second)):
            old.copy_(torch.where(finite, new, old))
    return norm, 1.0 - finite.to(norm.dtype)


def _random_bits(count: int, step: Tensor, index: int, seed: int) -> Tensor:
    """The kernel's random bits of a tensor, (count,) int64 below 2^32."""
    low = 0xFFFFFFFF
    elements = torch.arange(count, device=step.device)
    c0, c1 = elements & low, elements >> 32
    c2, c3 = step.long() & low, torch.full_like(step, index, dtype=torch.int64)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        # Products of 64 bits wrap around to negative numbers; shifted and masked, their halves are right all the same.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16: what is cut off, plus 16 random bits, carries or not."""
    return (x.view(torch.int32) + bits >> 16).to(torch.int16).view(torch.bfloat16)


@triton.jit
def find_block(table_ptr, blocks_ptr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: the number of its tensor, the row of it, its elements, and which of these are inside.

    Only with the length known to be a multiple of VECTOR as well is a mask the same for a whole vector.
    """
    program = tl.program_id(0)
    tensor = tl.load(blocks_ptr + program)
    row_ptr = table_ptr + tensor.to(tl.int64) * ROW
    length = tl.multiple_of(tl.load(row_ptr + LENGTH), VECTOR)
    offsets = (program - tl.load(row_ptr + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    return tensor, row_ptr, offsets, offsets < length


@triton.jit
def find_tensor(place_ptr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(place_ptr).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16 if VECTOR > 1 else 1)


@triton.jit
def adamw_square_kernel(
    # pointers
    table_ptr, blocks_ptr, partials_ptr,
    # constants
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, row_ptr, offsets, mask = find_block(table_ptr, blocks_ptr, VECTOR, BLOCK)
    g = tl.load(find_tensor(row_ptr + G, tl.float32, VECTOR) + offsets, mask=mask, other=0.0)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(g * g))


@triton.jit
def adamw_scalars_kernel(
    # pointers
    square_ptr, step_ptr, scalars_ptr,
    # numbers
    lr, log_beta_1, log_beta_2, clip, scale,
):  # fmt: skip
    norm = tl.sqrt_rn(tl.load(square_ptr)) * scale
    finite = norm < float("inf")  # false for NaN too
    step = tl.load(step_ptr) + tl.where(finite, 1.0, 0.0)
    bias_1 = 1.0 - tl.exp(step.to(tl.float64) * log_beta_1)
    bias_2 = 1.0 - tl.exp(step.to(tl.float64) * log_beta_2)
    tl.store(step_ptr, step)
    tl.store(scalars_ptr + NORM, norm)
    tl.store(scalars_ptr + SKIPPED, tl.where(finite, 0.0, 1.0))
    tl.store(scalars_ptr + FACTOR, scale / tl.maximum(norm / clip, 1.0))
    tl.store(scalars_ptr + RATE, (lr / bias_1).to(tl.float32))
    tl.store(scalars_ptr + ROOT, (1.0 / tl.sqrt(bias_2)).to(tl.float32))
    tl.store(scalars_ptr + STEP, step)


@triton.jit
def rounded(x, bits):
    """fp32 -> bf16: what is cut off, plus 16 random bits, carries or not."""
    return ((x.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def adamw_kernel(
    # pointers
    table_ptr, blocks_ptr, scalars_ptr,
    # numbers
    weight_1, weight_2, eps, seed,
    # constants
    MOMENTS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 1. A block of one tensor. All that is loaded first is under way before the first value is needed.
    tensor, row_ptr, offsets, mask = find_block(table_ptr, blocks_ptr, VECTOR, BLOCK)
    p_ptr = find_tensor(row_ptr + P, tl.float32, VECTOR) + offsets
    g_ptr = find_tensor(row_ptr + G, tl.float32, VECTOR) + offsets
    m_ptr = find_tensor(row_ptr + M, MOMENTS, VECTOR) + offsets
    v_ptr = find_tensor(row_ptr + V, MOMENTS, VECTOR) + offsets
    kept = tl.load(row_ptr + KEPT).to(tl.float64, bitcast=True).to(tl.float32)
    factor, rate, root = tl.load(scalars_ptr + FACTOR), tl.load(scalars_ptr + RATE), tl.load(scalars_ptr + ROOT)

    # 2. After gradients that were not finite there is nothing to do.
    if tl.load(scalars_ptr + SKIPPED) != 0.0:
        return
    g = tl.load(g_ptr, mask=mask, other=0.0)
    p = tl.load(p_ptr, mask=mask, other=0.0)
    m = tl.load(m_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)

    # 3. The moments. Written as a step towards the new value: b2 rounded to fp32 would decay v at another rate.
    g *= factor
    m += weight_1 * (g - m)
    v += weight_2 * (g * g - v)

    # 4. The update, of moments that are not rounded yet.
    p = p * kept - rate * m / (tl.sqrt(v) * root + eps)
    tl.store(p_ptr, p, mask=mask)
    if MOMENTS == tl.bfloat16:
        step = tl.load(scalars_ptr + STEP).to(tl.uint32)
        low, high = offsets.to(tl.uint32), (offsets >> 32).to(tl.uint32)
        bits, _, _, _ = tl.philox(seed, low, high, low * 0 + step, low * 0 + tensor.to(tl.uint32), 7)
        tl.store(m_ptr, rounded(m, bits & 0xFFFF), mask=mask)
        tl.store(v_ptr, rounded(v, bits >> 16), mask=mask)
    else:
        tl.store(m_ptr, m, mask=mask)
        tl.store(v_ptr, v, mask=mask)


def _to(x: Tensor, device: torch.device) -> Tensor:
    """From the host without waiting for the device; the allocator keeps pinned memory until the copy is done."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@lru_cache(maxsize=16)
def _blocks(lengths: tuple[int, ...], block: int, device: torch.device) -> tuple[list[int], Tensor]:
    """(the first program of each tensor, the tensor of each program (programs,) int32 on the device)."""
    counts = torch.tensor([-(-length // block) for length in lengths])
    tensors = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), counts)
    return (counts.cumsum(0) - counts).tolist(), _to(tensors, device)


def _table(columns: Sequence[list[Tensor]], kept: list[float], block: int) -> tuple[Tensor, Tensor, int]:
    """columns: G, or G, P, M, V -> (the table (tensors, 8) int64 on the device, blocks, VECTOR).

    VECTOR: elements of 16 bytes of the narrowest dtype, where all addresses and lengths are multiples of that; else 1.
    """
    gradients, device = columns[0], columns[0][0].device
    lengths = tuple(gradient.numel() for gradient in gradients)
    first, blocks = _blocks(lengths, block, device)
    table = torch.zeros(len(lengths), ROW.value, dtype=torch.int64)
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
    table[:, : G.value + len(columns)] = torch.tensor([lengths, first, *addresses]).T
    table[:, KEPT.value] = torch.tensor(kept, dtype=torch.float64).view(torch.int64)
    vector = 16 // min(column[0].element_size() for column in columns)
    narrow = (table[:, LENGTH.value] % vector).any() or (table[:, G.value : KEPT.value] % 16).any()
    return _to(table, device), blocks, 1 if narrow else vector


def _square(gradients: list[Tensor]) -> Tensor:
    table, blocks, vector = _table([gradients], [0.0] * len(gradients), SQUARE_BLOCK)
    partials = gradients[0].new_empty(blocks.shape)
    adamw_square_kernel[(len(blocks),)](table, blocks, partials, VECTOR=vector, BLOCK=SQUARE_BLOCK, num_warps=8)
    return partials.sum()


class Numbers(NamedTuple):
    """The plain numbers of an update."""

    lr: float
    beta_1: float
    beta_2: float
    eps: float
    clip: float
    scale: float
    seed: int


# Gradients, parameters, first and second moments: the order of a row of the table.
Columns = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _step(columns: Columns, decays: list[float], step: Tensor, square: Tensor, numbers: Numbers) -> Tensor:
    """-> the scalars, (6,) fp32; NORM and SKIPPED come first."""
    lr, beta_1, beta_2, eps, clip, scale, seed = numbers
    logs = [math.log(beta) if beta else -math.inf for beta in (beta_1, beta_2)]
    scalars = square.new_empty(6)
    adamw_scalars_kernel[(1,)](square, step, scalars, lr, *logs, clip, scale, num_warps=1)
    table, blocks, vector = _table(columns, [1 - lr * decay for decay in decays], BLOCK)
    moments = tl.bfloat16 if columns[2][0].dtype == torch.bfloat16 else tl.float32
    adamw_kernel[(len(blocks),)](
        table, blocks, scalars, 1 - beta_1, 1 - beta_2, eps, seed,
        MOMENTS=moments, VECTOR=vector, BLOCK=BLOCK, num_warps=launch.warps(BLOCK),
    )  # fmt: skip
    return scalars


def _step_torch(columns: Columns, decays: list[float], step: Tensor, square: Tensor, numbers: Numbers) -> Tensor:
    """By torch's fused kernel, which divides gradients by `grad_scale`, in place, and does nothing if `found_inf` is 1."""
    lr, beta_1, beta_2, eps, clip, scale, seed = numbers
    gradients, parameters, exp_avgs, exp_avg_sqs = columns
    if exp_avgs[0].dtype == torch.bfloat16:  # which torch's kernel does not have: the kernel's bits, but slowly
        return torch.stack(
            adamw_reference(
                parameters, gradients, exp_avgs, exp_avg_sqs, decays, step,
                lr=lr, betas=(beta_1, beta_2), eps=eps, clip=clip, scale=scale, square=square, seed=seed,
            )
        )  # fmt: skip
    norm = square.sqrt() * scale
    skipped = (~torch.isfinite(norm)).float()
    step += 1.0 - skipped
    divisor = (norm / clip).clamp(min=1.0) / scale
    grad_scale = None if divisor == 1.0 else divisor  # a look is free on CPU, and saves writing the gradients
    for decay in dict.fromkeys(decays):
        rows = [row for row, own in zip(zip(*columns, strict=True), decays, strict=True) if own == decay]
        g, p, m, v = (list(column) for column in zip(*rows))
        torch._fused_adamw_(
            p, g, m, v, [], [step] * len(p), lr=lr, beta1=beta_1, beta2=beta_2, weight_decay=decay, eps=eps,
            amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=skipped,
        )  # fmt: skip
    return torch.stack((norm, skipped))


def square_by_products(gradients: list[Tensor]) -> Tensor:
    # Products of pieces: on CPU, torch's norm adds up a whole tensor in a few fp32 numbers, 0.8% off at 50M elements,
    # and takes half as long again.
    pieces = [piece for gradient in gradients for piece in gradient.flatten().split(PIECE)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


@torch.library.custom_op("fastcpt::gradient_square", mutates_args=())
def _square_operator(gradients: list[Tensor]) -> Tensor:
    return _square(gradients) if launch.on_triton(gradients[0]) else square_by_products(gradients)


@_square_operator.register_fake
def _(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty(())


@torch.library.custom_op(
    "fastcpt::adamw_step", mutates_args=("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "step")
)
def _step_operator(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    decays: list[float], step: Tensor, square: Tensor,
    lr: Tensor, beta_1: float, beta_2: float, eps: float, clip: float, scale: float, seed: int,
) -> Tensor:  # fmt: skip
    columns = (gradients, parameters, exp_avgs, exp_avg_sqs)
    function = _step if launch.on_triton(square) else _step_torch
    return function(columns, decays, step, square, Numbers(lr.item(), beta_1, beta_2, eps, clip, scale, seed))


@_step_operator.register_fake
def _(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    decays: list[float], step: Tensor, square: Tensor,
    lr: Tensor, beta_1: float, beta_2: float, eps: float, clip: float, scale: float, seed: int,
) -> Tensor:  # fmt: skip
    return square.new_empty(6 if launch.on_triton(square) else 2)


def gradient_square(gradients: list[Tensor]) -> Tensor:
    """The sum of squares of all elements of fp32 tensors of one device: an fp32 scalar on it, the same bits every time.

    Added up in two stages, blocks of 8192 elements and then their sums. A caller whose gradients are shards sums it
    over processes before `adamw_step`. Raises ValueError for an empty list and for other dtypes.
    """
    if not gradients or any(gradient.dtype != torch.float32 for gradient in gradients):
        raise ValueError(f"gradients must be fp32, and at least one: {[gradient.dtype for gradient in gradients]}")
    return _square_operator([gradient.contiguous() for gradient in gradients])


@torch.no_grad()
def adamw_step(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    decays: list[float], step: Tensor, *, lr: float | Tensor, betas: tuple[float, float], eps: float, clip: float,
    scale: float = 1.0, square: Tensor | None = None, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One AdamW update of all tensors in place, of gradients times `scale`, their norm limited to `clip`.

    parameters, gradients, exp_avgs, exp_avg_sqs, decays: the i-th of each belong together; any shapes, all on one
        device, contiguous, fp32; moments all fp32 or all bf16. Gradients are used up: what they hold afterwards is
        undefined. decays: weight decay of each, times lr.
    step: updates so far, an fp32 scalar on the device, exact up to 2^24; one more after an update that was not skipped.
    lr: a number, or a scalar tensor on the CPU: to torch.compile a number is a constant.
    square: the sum of squares of all gradients, `gradient_square(gradients)` by default.
    seed: of the rounding of bf16 moments, 0 to 2^63 - 1.

    Returns (norm of the scaled gradient before clipping, 1.0 if it was not finite and nothing was updated else 0.0),
    fp32 scalars on the device. Raises ValueError for tensors that do not fit.
    """
    square = gradient_square(gradients) if square is None else square
    gradients = [gradient.contiguous() for gradient in gradients]
    _check((gradients, parameters, exp_avgs, exp_avg_sqs), decays, step, square)
    rate = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    numbers = (*betas, eps, clip, scale, seed)
    if launch.on_triton(square) or torch.compiler.is_compiling():
        scalars = _step_operator(parameters, gradients, exp_avgs, exp_avg_sqs, decays, step, square, rate, *numbers)
    else:  # without the 2 ms that torch takes to call an operator on lists
        columns = (gradients, parameters, exp_avgs, exp_avg_sqs)
        scalars = _step_torch(columns, decays, step, square, Numbers(float(rate), *numbers))
    norm, skipped, *_ = scalars.unbind()
    return norm, skipped


def _check(columns: Columns, decays: list[float], step: Tensor, square: Tensor) -> None:
    """What kernels that are given bare addresses could not see."""
    moments = torch.bfloat16 if columns[2][0].dtype == torch.bfloat16 else torch.float32
    dtypes = (torch.float32, torch.float32, moments, moments, torch.float32, torch.float32)
    for column, dtype in zip((*columns, [step], [square]), dtypes, strict=True):
        for index, tensor in enumerate(column):
            if tensor.dtype != dtype or tensor.device != square.device or not tensor.is_contiguous():
                what = f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
                raise ValueError(f"tensors {index}: {what}; it takes contiguous {dtype} on {square.device}")
    for index, (gradient, *others, _) in enumerate(zip(*columns, decays, strict=True)):
        if any(tensor.shape != gradient.shape for tensor in others):
            shapes = [tuple(tensor.shape) for tensor in (gradient, *others)]
            raise ValueError(f"tensors {index}: gradient, parameter and moments have shapes {shapes}")
