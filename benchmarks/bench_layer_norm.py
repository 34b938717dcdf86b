"""The sum of three and two norms of it, GPT-NeoX's parallel residual: forward and backward.

N rows, D width. Bytes an element in bf16: forward reads x and two addends, and writes the sum and both norms, 6 x 2;
backward reads the sum and three gradients and writes one, 5 x 2. Weights and statistics are less than a hundredth.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastcpt.benchmarks.timing import Case, close, compiled, optional, passes
from fastcpt.kernels import layer_norm

SIZES = {"cuda": (65536, 1024, torch.bfloat16)}  # N, D, dtype

Function = Callable[[Tensor, Sequence[Tensor], Sequence[tuple[Tensor, Tensor]]], tuple[Tensor, ...]]


def norms(vectors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(vectors[0], vectors[1]), (vectors[2], vectors[3])]


def check(x: Tensor, addends: Sequence[Tensor], vectors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    total, *ys = layer_norm.layer_norm(x, addends, norms(vectors))
    found = torch.autograd.grad([total, *ys], [x, *vectors], gradients)
    close("layer_norm: sum", total, x.float() + addends[0].float() + addends[1].float())
    # The rest is of the rounded sum, by definition.
    inputs = [total.detach().float().requires_grad_(), *vectors]
    expected = layer_norm.layer_norm_reference(inputs[0], [], norms(vectors))
    for y, exact_y in zip(ys, expected[1:], strict=True):
        close("layer_norm: norm", y, exact_y, absolute=1e-5)
    exact = torch.autograd.grad(expected, inputs, [gradient.float() for gradient in gradients])
    close("layer_norm: gradient of the sum", found[0], exact[0], absolute=1e-4)
    for one, other in zip(found[1:], exact[1:], strict=True):  # fp32 sums of terms of about 1, one a row
        close("layer_norm: gradient of a weight", one, other, absolute=len(x) * 2.0**-24)


def cases(device: torch.device) -> Iterator[Case]:
    N, D, dtype = SIZES[device.type]
    torch.manual_seed(0)
    x, a, b, *gradients = (torch.randn(N, D, device=device).to(dtype) for _ in range(6))
    x.requires_grad_()
    vectors = [torch.randn(D, device=device).requires_grad_() for _ in range(4)]
    narrow = [vector.detach().to(dtype).requires_grad_() for vector in vectors]
    reference = layer_norm.layer_norm_reference
    # torch's own kernel is at its best with bf16 weights; a compiler fuses the casts of fp32 ones.
    functions: dict[str, tuple[Function, list[Tensor]]] = {
        "fastcpt": (layer_norm.layer_norm, vectors),
        "torch": (reference, narrow),
        "torch compiled": (compiled(reference), vectors),
    }
    if device.type == "cuda" and (liger := optional("liger_kernel.transformers")):
        layers = [liger.LigerLayerNorm(D, bias=True).to(device, dtype) for _ in range(2)]

        def sum_and_liger(x: Tensor, addends: Sequence[Tensor], _: object) -> tuple[Tensor, ...]:
            total = x + addends[0] + addends[1]
            return total, *(layer(total) for layer in layers)

        functions["torch sum, Liger norms"] = sum_and_liger, [p for layer in layers for p in layer.parameters()]
    forward, backward = {}, {}
    for name, (function, own) in functions.items():

        def run(function: Function = function, own: Sequence[Tensor] = own) -> tuple[Tensor, ...]:
            return function(x, [a, b], norms(own))

        forward[name], backward[name] = passes(run, [x, *own], gradients)
    for direction, runs, count, percent in (("forward", forward, 6, 70), ("backward", backward, 5, 60)):
        yield Case(
            "layer_norm", f"sum of three, two norms, {direction}", f"{N} x {D}", dtype,
            lambda: check(x, [a, b], vectors, gradients), runs, bytes=count * N * D * dtype.itemsize, percent=percent,
        )  # fmt: skip
