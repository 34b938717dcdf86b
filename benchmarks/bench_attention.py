"""Causal attention, forward and backward: what `fastcpt.attention` chooses, against every other backend that can run.

B batch, T time, H heads, C head width. Operations: 4 T^2 C a head forward, halved for the causal mask, and 2.5 times that
backward, as flash-attention counts; with documents, T is a document's length.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fastcpt import UserError, attention
from fastcpt.benchmarks.timing import Case, Run

SIZES = {"cuda": [(16, 2048, 16, 64), (16, 2048, 16, 128)]}  # B, T, H, C of pythia-410m and -1.4b
DOCUMENT = 512  # tokens of each document where they are masked

EOD = 0


def gradients(
    attend: attention.Backend, inputs: Sequence[Tensor], dy: Tensor, documents: Tensor | None
) -> list[Tensor]:
    """y, dq, dk, dv."""
    q, k, v = inputs
    y = attend(q, k, v, documents)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def check(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Ours is at most twice as far from fp32 as torch's default in bf16, at the worst and on average."""
    for what, one, other, true in zip(("y", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        error, allowed = ((x.float() - true).abs() for x in (one, other))
        slack = 2.0**-13 * true.abs().mean()
        if not (error.max() <= 2 * allowed.max() + slack and error.mean() <= 2 * allowed.mean() + slack):
            raise AssertionError(
                f"attention: {what} is wrong and is not timed: its error is {error.max():.2e} and on average "
                f"{error.mean():.2e}, that of torch's default in the same dtype {allowed.max():.2e} and {allowed.mean():.2e}"
            )


def backends(device: torch.device, T: int, C: int, masked: bool) -> dict[str, attention.Backend]:
    """Ours, then each that can run here; ours is among them, and shows what a ratio is worth."""
    found = {"fastcpt": attention.choose("auto", device, C, torch.bfloat16, T, masked)}
    print(f"attention: {found['fastcpt'].reason}")
    for name in get_args(attention.Name):
        try:
            found.setdefault(name, attention.choose(name, device, C, torch.bfloat16, T, masked))
        except UserError as error:
            print(f"no rival: {error}")
    del found["auto"]
    return found


def case(device: torch.device, B: int, T: int, H: int, C: int, masked: bool) -> Case:
    torch.manual_seed(0)
    *inputs, dy = (torch.randn(B, T, H, C, device=device).bfloat16() for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    found = backends(device, T, C, masked)
    tokens_BT = np.ones((B, T), np.int64)
    tokens_BT[:, DOCUMENT - 1 :: DOCUMENT] = EOD
    documents = {name: backend.documents(tokens_BT, EOD, device) if masked else None for name, backend in found.items()}
    runs = {
        name: Run(partial(gradients, backend, inputs, dy, documents[name])) for name, backend in found.items()
    }  # fmt: skip

    def checked() -> None:
        wide = [x.detach().float().requires_grad_() for x in inputs]
        plain, ids = found["sdpa"], documents["sdpa"]
        exact = gradients(plain, wide, dy.float(), ids)
        check(runs["fastcpt"].call(), gradients(plain, inputs, dy, ids), exact)

    length = min(T, DOCUMENT) if masked else T
    return Case(
        "attention", f"causal{f', documents of {length}' if masked else ''}, forward and backward",
        f"{B} x {T} x {H} x {C}", torch.bfloat16, checked, runs,
        # Forward 4 T C for each query, backward 2.5 times that; half of it is masked.
        flops=round(3.5 * 4 * B * T * length * H * C / 2),
        ratios={name: 1.3 if name == "sdpa" else 0.98 for name in runs if name != "fastcpt"},
    )  # fmt: skip


def cases(device: torch.device) -> Iterator[Case]:
    for sizes in SIZES[device.type]:
        for masked in (False, True):
            yield case(device, *sizes, masked)
