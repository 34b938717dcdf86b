"""Bytes that the kernels move, counted in Triton's interpreter, next to the least that has to move.

    TRITON_INTERPRET=1 python -m fastcpt.benchmarks.traffic [--output FOLDER]

Loads and stores are summed over the lanes that their masks leave on. `dram` counts an address once a launch: what has to
come from memory when the caches serve all that a launch reads again, and nothing from one launch to the next. `torch`
are the inputs and outputs of torch's own operations between the kernels. Floors are in bytes a unit, for bf16
activations and fp32 parameters. Nothing here is a measurement of a GPU.
"""

import argparse
import csv
import datetime
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from fastcpt import UserError
from fastcpt.benchmarks.launches import implementation
from fastcpt.kernels import launch
from fastcpt.model import Architecture, rotary_table

CSV = "kernels_traffic.csv"


@dataclass(frozen=True)
class Floor:
    """The least that has to move, in bytes a unit (PERFORMANCE.md, section 2), and why loads and stores are more."""

    unit: str
    floor: float
    reason: str = ""


TABLE = {
    "adamw, norm of the gradients": Floor("parameter", 4, "the table of addresses and a partial sum for each block"),
    "adamw, update": Floor("parameter", 28, "the table of addresses"),
    "adamw, update with bf16 moments": Floor("parameter", 20, "the table of addresses"),
    "cross_entropy in place, forward and backward": Floor(
        "logit", 4, "the row is read twice; the second read is served by L2, so that 4 reach DRAM"
    ),
    "cross_entropy, forward and backward": Floor("logit", 6),
    "linear_cross_entropy, sum of the losses": Floor(
        "logit", 4, "the second read, as above; beside it three matrix products, here of 64 rows"
    ),
    "bias + gelu, forward": Floor("value", 4, "the bias, served by the cache"),
    "bias + gelu, backward": Floor(
        "value", 6, "the bias, and one row of partial sums for 128 rows, which torch adds up"
    ),
    "sum of three and two norms, forward": Floor("value", 12, "weights and biases, served by the cache"),
    "sum of three and two norms, backward": Floor(
        "value",
        10,
        "weights; partial sums of their gradients, once for 32 rows (as 16,384 rows on an H100), and their sum",
    ),
    "rotation of q and k, forward": Floor("value of the width", 4 * 2 / 4, "the tables, served by the cache"),
    "rotation of q and k, backward": Floor(
        "value of the width",
        4 * 2 / 4,
        "q, k and v are read and written in full: attention does not write the packed gradient; and the tables",
    ),
}


@dataclass
class Traffic:
    """Bytes, summed over launches; touched: addresses of the launch that is running."""

    loads: int = 0
    stores: int = 0
    dram: int = 0
    torch: int = 0
    touched: dict[tuple[str, int], list[np.ndarray]] | None = None

    def access(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        assert self.touched is not None
        found = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask]
        setattr(self, kind, getattr(self, kind) + found.size * size)
        self.touched[kind, size].append(found)


class _CountTorch(TorchDispatchMode):
    """Counts what torch's own operations read and write, those inside of our operators included."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "fastcpt":
            with self:
                return implementation(func)(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self.traffic.touched is None and not func.is_view and "empty" not in func.name():
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.traffic.torch += sum(x.numel() * x.element_size() for x in tensors)
        return result


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts all that happens within."""
    if not launch.INTERPRETED:
        raise UserError("triton-not-interpreted", "bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    traffic = Traffic()
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    rmw = InterpreterBuilder.create_atomic_rmw

    def counted_run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        traffic.touched = defaultdict(list)
        run(kernel, *args, **kwargs)
        for (_, size), found in traffic.touched.items():
            traffic.dram += np.unique(np.concatenate(found)).size * size
        traffic.touched = None

    def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        traffic.access("loads", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(builder, pointers, mask, *rest, **options)

    def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        traffic.access("stores", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(builder, pointers, value, mask, *rest, **options)

    def counted_rmw(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for kind in ("loads", "stores"):
            traffic.access(kind, pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return rmw(builder, operation, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", counted_run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", counted_rmw),
        _CountTorch(traffic),
    ):
        yield traffic


Case = tuple[str, int, Callable[[], Any]]  # its name in TABLE, how many units, and what to count


def _adamw() -> Iterator[Case]:
    from fastcpt.kernels.adamw import adamw_step, gradient_square

    shapes = [(256, 256), (1024,), (256,)]
    gradients = [torch.randn(shape) for shape in shapes]
    parameters = sum(gradient.numel() for gradient in gradients)
    yield "adamw, norm of the gradients", parameters, partial(gradient_square, gradients)
    square = gradient_square(gradients)
    for name, dtype in (("adamw, update", torch.float32), ("adamw, update with bf16 moments", torch.bfloat16)):
        weights = [torch.randn(shape) for shape in shapes]
        first, second = ([torch.zeros(shape, dtype=dtype) for shape in shapes] for _ in range(2))
        run = partial(
            adamw_step, weights, gradients, first, second, [0.1] * len(shapes), torch.zeros(()),
            lr=3e-4, betas=(0.9, 0.95), eps=1e-8, clip=1.0, square=square,
        )  # fmt: skip
        yield name, parameters, run


def _cross_entropy() -> Iterator[Case]:
    from fastcpt.kernels.cross_entropy import cross_entropy

    logits, targets = torch.randn(4, 50304).bfloat16().requires_grad_(), torch.arange(4)

    def run(inplace: bool) -> None:
        torch.autograd.grad(cross_entropy(logits, targets, inplace=inplace).sum(), logits)

    yield "cross_entropy, forward and backward", logits.numel(), partial(run, False)
    yield "cross_entropy in place, forward and backward", logits.numel(), partial(run, True)


def _linear_cross_entropy() -> Iterator[Case]:
    from fastcpt.kernels.linear_cross_entropy import linear_cross_entropy_sum

    x, weight = torch.randn(64, 64).bfloat16().requires_grad_(), torch.randn(4096, 64).requires_grad_()

    def run() -> None:
        torch.autograd.grad(linear_cross_entropy_sum(x, weight, torch.arange(64))[0], (x, weight))

    yield "linear_cross_entropy, sum of the losses", 64 * 4096, run


def _gelu() -> Iterator[Case]:
    from fastcpt.kernels.gelu import bias_gelu

    x, bias = torch.randn(256, 1024).bfloat16().requires_grad_(), torch.zeros(1024, requires_grad=True)
    y = bias_gelu(x, bias)
    yield "bias + gelu, forward", x.numel(), partial(bias_gelu, x, bias)
    yield "bias + gelu, backward", x.numel(), partial(torch.autograd.grad, y, (x, bias), torch.randn_like(y))


def _layer_norm() -> Iterator[Case]:
    from fastcpt.kernels.layer_norm import layer_norm

    x, a, b = torch.randn(3, 512, 256).bfloat16().requires_grad_().unbind()
    parameters = [torch.randn(256).requires_grad_() for _ in range(4)]
    forward = partial(layer_norm, x, [a, b], [(parameters[0], parameters[1]), (parameters[2], parameters[3])])
    outputs = forward()
    gradients = [torch.randn_like(y) for y in outputs]
    yield "sum of three and two norms, forward", x.numel(), forward
    yield (
        "sum of three and two norms, backward",
        x.numel(),
        partial(torch.autograd.grad, outputs, (x, *parameters), gradients),
    )


def _qkv_rotary() -> Iterator[Case]:
    """Units: values of the model's width, B * T * H * C; of each a quarter turns, in q and in k."""
    from fastcpt.kernels.qkv_rotary import qkv_rotary

    arch = Architecture(1, 512, 8)
    tables = rotary_table(128, arch, torch.device("cpu"))
    qkv = torch.randn(2, 128, 8, 192).bfloat16()
    yield "rotation of q and k, forward", 2 * 128 * 512, partial(qkv_rotary, qkv, *tables)
    leaf = torch.randn(2, 128, 8, 192).bfloat16().requires_grad_()
    parts = qkv_rotary(leaf.clone(), *tables)
    gradients = list(torch.randn(3, 2, 128, 8, 64).bfloat16())
    yield "rotation of q and k, backward", 2 * 128 * 512, partial(torch.autograd.grad, parts, leaf, gradients)


CASES = (_adamw, _cross_entropy, _linear_cross_entropy, _gelu, _layer_norm, _qkv_rotary)


@dataclass(frozen=True)
class Row:
    """Bytes a unit."""

    what: str
    unit: str
    floor: float
    loads: float
    stores: float
    dram: float
    torch: float
    reason: str


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    for cases in CASES:
        for name, units, run in cases():
            with counted() as moved:
                run()
            loads, stores, dram, between = (
                round(count / units, 3) for count in (moved.loads, moved.stores, moved.dram, moved.torch)
            )
            entry = TABLE[name]
            yield Row(name, entry.unit, entry.floor, loads, stores, dram, between, entry.reason)


def main(output: Path | None = None) -> None:
    """Prints the table, and writes it to a folder if asked."""
    found = list(rows())
    lines = [[f.name for f in fields(Row)], *([str(value) for value in astuple(row)] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("bytes a unit, counted in Triton's interpreter; dram: each address once a launch; torch: between the kernels")
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines))
    if output is not None:
        versions = {"torch_version": torch.__version__, "triton_version": triton.__version__}
        made = {**versions, "date": datetime.date.today().isoformat()}
        output.mkdir(parents=True, exist_ok=True)
        with open(output / CSV, "w", newline="") as file:
            writer = csv.DictWriter(file, [*lines[0], *made], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**asdict(row), **made} for row in found)
        print(f"written: {output / CSV}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write FOLDER/{CSV}")
    main(parser.parse_args().output)
