"""Every launch of a kernel that training a preset makes, caught on a machine without a GPU.

The public functions of `fastcpt.kernels` run forward and backward on tensors of the presets' shapes that hold no data
(device "meta"). Each launch is caught in place of `JITFunction.run` and specialised by triton's own binder. A tensor
without data has address 0 plus its offset, which is aligned as torch's allocator aligns.
"""

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastcpt.kernels
from fastcpt import UserError
from fastcpt.kernels import launch
from fastcpt.model import PRESETS, Architecture, GPTNeoX, rotary_table


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, as `triton.compile` takes it."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return _name(self.kernel)

    @property
    def arguments(self) -> str:
        """`NAME=VALUE` of a constant, `NAME:TYPE` of all else; ~ where the compiler cannot count on a multiple of 16."""
        words = []
        for position, (name, kind) in enumerate(self.signature.items()):
            if kind == "constexpr":
                value = self.constants[(position,)]
                words.append(f"{name}={getattr(value, '__name__', value)}")
            else:
                exact = self.attributes.get((position,)) or kind.startswith(("fp", "bf", "u1", "i1"))
                words.append(f"{name}:{kind}{'' if exact else '~'}")
        if self.options.num_stages != 3:
            words.append(f"num_stages={self.options.num_stages}")
        return " ".join(words)


def implementation(operator: Any) -> Callable[..., Any]:
    """The function that one of our operators was made of."""
    definition = torch._library.custom_ops._maybe_get_opdef(operator)
    assert definition is not None, operator
    return definition._init_fn


class _RunOperators(TorchDispatchMode):
    """Runs our operators' own code on tensors without data, where torch would only work out the shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "fastcpt":
            func = implementation(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def caught() -> Iterator[dict[str, Launch]]:
    """Launches within, of kernels on tensors without data, by a key that is equal for the same machine code."""
    if launch.INTERPRETED:
        raise UserError(
            "triton-interpreted",
            "TRITON_INTERPRET is set: kernels are then interpreted and cannot be compiled; unset it",
        )
    launches: dict[str, Launch] = {}
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, options = bind(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialisation, options)
        blocks = grid(bound) if callable(grid) else grid
        assert all(0 < size < limit for size, limit in zip(blocks, (2**31, 2**16, 2**16))), (kernel, blocks)
        found = Launch(kernel, signature, constants, attributes, options)
        launches.setdefault(f"{found.name} {found.arguments} {options}", found)

    before, JITFunction.run = JITFunction.run, catch
    try:
        with _RunOperators():
            yield launches
    finally:
        JITFunction.run = before


def kernel_modules() -> list[ModuleType]:
    names = [entry.name for entry in pkgutil.iter_modules(fastcpt.kernels.__path__)]
    return [importlib.import_module(f"fastcpt.kernels.{name}") for name in sorted(names)]


def kernels(modules: Sequence[ModuleType]) -> set[str]:
    """Names of the kernels that are launched: functions under @triton.jit that no other one calls."""
    found, called = set(), set()
    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITFunction) and function.fn.__module__ == module.__name__:
                found.add(_name(function))
                names = {node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
                named = [function.fn.__globals__.get(name) for name in names]
                called |= {_name(each) for each in named if isinstance(each, JITFunction)}
    return found - called


def _adamw(arch: Architecture, tokens: int, device: str) -> Iterator[Callable[[], Any]]:
    from fastcpt.kernels.adamw import adamw_step

    with torch.device(device):
        parameters: list[Tensor] = list(GPTNeoX(replace(arch, layers=1)).parameters())  # the others are like this one
        step = torch.empty(())

    def call(moments: torch.dtype) -> None:
        gradients, first, second = (
            [torch.empty_like(p, dtype=dtype) for p in parameters] for dtype in (torch.float32, moments, moments)
        )
        adamw_step(
            parameters, gradients, first, second, [0.1] * len(parameters), step, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, clip=1.0
        )  # fmt: skip

    for moments in (torch.float32, torch.bfloat16):
        yield partial(call, moments)


def _cross_entropy(arch: Architecture, tokens: int, device: str) -> Iterator[Callable[[], Any]]:
    """In place and not, for a sum (whose gradient has stride 0) and with a gradient of its own for each token."""
    from fastcpt.kernels.cross_entropy import cross_entropy

    targets = torch.zeros(tokens, dtype=torch.int64, device=device)

    def call(inplace: bool, weighted: bool) -> None:
        leaf = torch.empty(tokens, arch.vocab_size, dtype=torch.bfloat16, device=device, requires_grad=True)
        losses = cross_entropy(leaf * 1, targets, inplace=inplace)
        gradient = torch.ones_like(losses) if weighted else torch.ones((), device=device).expand_as(losses)
        losses.backward(gradient)

    for inplace in (True, False):
        for weighted in (False, True):
            yield partial(call, inplace, weighted)


def _gelu(arch: Architecture, tokens: int, device: str) -> Iterator[Callable[[], Any]]:
    from fastcpt.kernels.gelu import bias_gelu

    def call(approximate: str) -> None:
        x = torch.empty(tokens, arch.mlp_width, dtype=torch.bfloat16, device=device, requires_grad=True)
        bias = torch.empty(arch.mlp_width, device=device, requires_grad=True)
        y = bias_gelu(x, bias, approximate)
        y.backward(torch.empty_like(y))

    for approximate in ("none", "tanh"):
        yield partial(call, approximate)


def _layer_norm(arch: Architecture, tokens: int, device: str) -> Iterator[Callable[[], Any]]:
    """The first norms of a model, those between its blocks, and the last one."""
    from fastcpt.kernels.layer_norm import layer_norm

    def call(addends: int, norms: int, sum_used: bool) -> None:
        parameters = [torch.empty(arch.width, device=device, requires_grad=True) for _ in range(2 * norms)]
        x, *rest = (
            torch.empty(tokens, arch.width, dtype=torch.bfloat16, device=device, requires_grad=True)
            for _ in range(1 + addends)
        )
        outputs = layer_norm(x, rest, list(zip(parameters[::2], parameters[1::2])))
        used = outputs if sum_used else outputs[1:]
        torch.autograd.backward(used, [torch.empty_like(y) for y in used])

    for addends, norms, sum_used in ((0, 2, False), (2, 2, True), (2, 1, False)):
        yield partial(call, addends, norms, sum_used)


def _linear_cross_entropy(arch: Architecture, tokens: int, device: str) -> Iterator[Callable[[], Any]]:
    from fastcpt.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum

    def call(summed: bool) -> None:
        x = torch.empty(tokens, arch.width, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight = torch.empty(arch.vocab_size, arch.width, device=device, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64, device=device)
        loss = linear_cross_entropy_sum(x, weight, targets)[0] if summed else linear_cross_entropy(x, weight, targets)
        loss.backward(torch.empty_like(loss))

    for summed in (True, False):
        yield partial(call, summed)


def _qkv_rotary(arch: Architecture, tokens: int, device: str) -> Iterator[Callable[[], Any]]:
    """With gradients as attention leaves them: of rows (B, T, H, C) from flash-attn, (B, H, T, C) from torch."""
    from fastcpt.kernels.qkv_rotary import qkv_rotary

    def call(flash: bool) -> None:
        x = torch.empty(tokens // 2048, 2048, 3 * arch.width, dtype=torch.bfloat16, device=device, requires_grad=True)
        parts = qkv_rotary((x * 1).unflatten(-1, (arch.heads, -1)), *rotary_table(2048, arch, torch.device(device)))
        like = parts[0] if flash else parts[0].transpose(1, 2)
        gradient = torch.empty_like(like, memory_format=torch.contiguous_format)
        torch.autograd.backward(parts, [gradient if flash else gradient.transpose(1, 2)] * 3)

    for flash in (True, False):
        yield partial(call, flash)


# What to run of each module, forward and backward: calls of its public functions.
CASES: dict[str, Callable[[Architecture, int, str], Iterator[Callable[[], Any]]]] = {
    "adamw": _adamw,
    "cross_entropy": _cross_entropy,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "qkv_rotary": _qkv_rotary,
}


def launches_of_presets(tokens: Sequence[int] = (8 * 2048, 32 * 2048)) -> list[tuple[Launch, list[str]]]:
    """All launches, and the presets that need each; the larger micro-batch has more than 2^31 logits."""
    found: dict[str, tuple[Launch, list[str]]] = {}
    for name, arch in PRESETS.items():
        with caught() as launches:
            for module in kernel_modules():
                for count in tokens:
                    for call in CASES.get(module.__name__.rpartition(".")[2], lambda *_: [])(arch, count, "meta"):
                        call()
        for key, each in launches.items():
            found.setdefault(key, (each, []))[1].append(name)
    return list(found.values())
