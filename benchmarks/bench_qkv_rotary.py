"""Partial rotary embedding within the packed projection: forward, in place, and backward.

B batch, T time, H heads, C head width, R values of it that turn. Bytes in bf16: forward reads and writes the R values of q
and of k, 4 x 2 each; backward reads the gradients of q, k and v and writes their packed one, 6 x 2 for each of C values.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastcpt.benchmarks.timing import Case, Run, close, compiled, passes
from fastcpt.kernels import qkv_rotary
from fastcpt.model import PRESETS, rotary_table

SIZES = {"cuda": (32, 2048, "pythia-410m", torch.bfloat16)}  # B, T, preset, dtype

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def check(qkv_BTHE: Tensor, table: tuple[Tensor, Tensor], gradients: Sequence[Tensor]) -> None:
    found = qkv_rotary.qkv_rotary(qkv_BTHE.clone(), *table)
    exact_BTHE = qkv_BTHE.detach().float().requires_grad_()
    expected = qkv_rotary.qkv_rotary_reference(exact_BTHE, *table)
    for what, ours, exact in zip("qkv", found, expected, strict=True):
        close(f"qkv_rotary: {what}", ours, exact, absolute=1e-5)  # a difference of two products of about 1
    (d_ours,) = torch.autograd.grad(found, qkv_BTHE, gradients)
    (d_exact,) = torch.autograd.grad(expected, exact_BTHE, [gradient.float() for gradient in gradients])
    close("qkv_rotary: gradient", d_ours, d_exact, absolute=1e-5)


def runs(
    function: Function, qkv_BTHE: Tensor, table: tuple[Tensor, Tensor], gradients: Sequence[Tensor]
) -> tuple[Run, Run]:
    """Forward, on a copy that it may overwrite and that is not timed, and backward."""
    copies: list[Tensor] = []

    def copy() -> None:
        copies[:] = [qkv_BTHE.clone()]

    _, backward = passes(lambda: function(qkv_BTHE.clone(), *table), [qkv_BTHE], gradients)
    return Run(lambda: function(copies[0], *table), copy), backward


def cases(device: torch.device) -> Iterator[Case]:
    B, T, preset, dtype = SIZES[device.type]
    arch = PRESETS[preset]
    H, C, R = arch.heads, arch.head_width, arch.rotary_width
    torch.manual_seed(0)
    qkv_BTHE = torch.randn(B, T, H, 3 * C, device=device).to(dtype).requires_grad_()
    gradients = [torch.randn(B, T, H, C, device=device).to(dtype) for _ in range(3)]
    table = rotary_table(T, arch, device)
    reference = qkv_rotary.qkv_rotary_reference
    functions = {"fastcpt": qkv_rotary.qkv_rotary, "torch": reference, "torch compiled": compiled(reference)}
    both = {name: runs(function, qkv_BTHE, table, gradients) for name, function in functions.items()}
    for place, (direction, count) in enumerate((("forward", 4 * R), ("backward", 6 * C))):
        yield Case(
            "qkv_rotary", direction, f"{B} x {T} x {H} x {C}, {R} turn", dtype,
            lambda: check(qkv_BTHE, table, gradients), {name: pair[place] for name, pair in both.items()},
            bytes=count * B * T * H * dtype.itemsize,
        )  # fmt: skip
