"""What the compiler makes of every kernel launch that the presets need: registers, spills, and widths of accesses.

    python -m fastcpt.benchmarks.static                    the table, from a machine without a GPU
    python -m fastcpt.benchmarks.static --output FOLDER    and FOLDER/kernels_static.csv, FOLDER/kernels_traffic.csv

The public functions of `fastcpt.kernels` run forward and backward on tensors of the presets' shapes that hold no data
(device "meta"). Each launch is caught in place of `JITFunction.run`, specialised by triton's own binder, and compiled as
it would be launched. A tensor without data has address 0 plus its offset, which is aligned as torch's allocator aligns.
What is counted are instructions in the machine code, not how often they run.
"""

import argparse
import ast
import csv
import datetime
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastcpt.kernels
from fastcpt import UserError
from fastcpt.kernels import launch
from fastcpt.model import PRESETS, Architecture

# Compute capability -> bytes of shared memory that one block can have (CUDA programming guide, technical specifications).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CSV = "kernels_static.csv"
# Instructions that read and write global memory. A width is a suffix of theirs; without one it is 32 bits.
LOADS = ("LDG", "LD", "LDGSTS")
STORES = ("STG", "ST")
# Accesses of fewer than 128 bits, by kernel and by the address in its source, and why they cost nothing.
NARROW: dict[str, dict[str, str]] = {
    "cross_entropy._forward_kernel": {
        "targets_ptr + row": "one a row",
        "logits_ptr + target": "one a row",
        "losses_ptr + row": "one a row",
        "lse_ptr + row": "one a row",
    },
    "cross_entropy._backward_kernel": {
        "targets_ptr + row": "one a row",
        "gradient_ptr + row * gradient_stride": "one a row",
        "lse_ptr + row": "one a row",
    },
    "cross_entropy._scale_kernel": {"gradient_ptr + row * gradient_stride": "one a row"},
}


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


@dataclass(frozen=True)
class Row:
    """One specialisation compiled for one chip.

    Loads from and stores to global memory: `BITSxINSTRUCTIONS`, widest first. Narrow: those of fewer than 128 bits, by
    the address in the kernel's source, as a mapping from it to the same.
    """

    kernel: str
    arguments: str
    warps: int
    sm: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    loads: str
    stores: str
    atomics: int
    narrow: dict[str, str]
    presets: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.kernel, self.arguments, self.warps, self.sm

    def faults(self) -> list[str]:
        """What no kernel may have, in words."""
        where = f"{self.kernel} ({self.arguments}, {self.warps} warps) on sm_{self.sm}"
        found = []
        if self.spills or self.stack_bytes:
            found.append(f"{where} spills: {self.spills} local loads and stores, {self.stack_bytes} bytes of stack")
        if self.shared_bytes > SHARED[self.sm]:
            found.append(f"{where} cannot start: {self.shared_bytes} bytes of shared memory")
        for address, widths in self.narrow.items():
            if address not in NARROW.get(self.kernel, {}):
                found.append(f"{where} has narrow accesses at `{address}`: {widths}")
        return found


class _RunOperators(TorchDispatchMode):
    """Runs our operators' own code on tensors without data, where torch would only work out the shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "fastcpt":
            func = torch._library.custom_ops._maybe_get_opdef(func)._init_fn
        return func(*args, **(kwargs or {}))


@contextmanager
def caught() -> Iterator[dict[str, Launch]]:
    """Launches within, of kernels on tensors without data, by a key that is equal for the same machine code."""
    if launch.INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: kernels are then interpreted and cannot be compiled; unset it")
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


def _tool(tool: str, path: str, *options: str) -> str:
    command = [getattr(triton.knobs.nvidia, tool).path, *options, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compiled(found: Launch, sm: int, presets: str = "") -> Row:
    """Compiles a launch for a chip and reads what came of it."""
    source = ASTSource(found.kernel, found.signature, found.constants, found.attributes)
    options = {**found.options.__dict__, "arch": f"sm{sm}"}
    result = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", file.name, "-res-usage")
        machine_code = _tool("nvdisasm", file.name, "--print-line-info")
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    names: Counter[str] = Counter()
    widths: dict[str, Counter[int]] = defaultdict(Counter)
    narrow: dict[str, Counter[int]] = defaultdict(Counter)
    for operation, file_name, line in _operations(machine_code):
        name, *suffixes = operation.split(".")
        names[name] += 1
        if name in LOADS + STORES:
            sized = [int(match[1]) for suffix in suffixes if (match := re.fullmatch(r"[US]?(8|16|64|128|256)", suffix))]
            bits = sized[0] if sized else 32
            widths["loads" if name in LOADS else "stores"][bits] += 1
            if bits < 128:
                narrow[_addresses(file_name).get(line, f"{file_name}:{line}")][bits] += 1
    assert names and resources["REG"], usage
    return Row(
        kernel=found.name, arguments=found.arguments, warps=found.options.num_warps, sm=sm,
        registers=resources["REG"], stack_bytes=resources["STACK"] + resources["LOCAL"],
        spills=names["LDL"] + names["STL"], shared_bytes=result.metadata.shared,
        loads=_counted(widths["loads"]), stores=_counted(widths["stores"]),
        atomics=names["ATOM"] + names["ATOMG"] + names["RED"] + names["REDG"],
        narrow={address: _counted(counts) for address, counts in sorted(narrow.items())}, presets=presets,
    )  # fmt: skip


def _operations(machine_code: str) -> Iterator[tuple[str, str, int]]:
    """Each instruction without its operands, and the line of the source that it came from."""
    file_name, line = "", 0
    for text in machine_code.splitlines():
        if where := re.match(r"\s*//## File \"(.+)\", line (\d+)", text):
            file_name, line = where[1], int(where[2])
        elif operation := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", text):
            yield operation[1], file_name, line


@cache
def _addresses(file_name: str) -> dict[int, str]:
    """The first argument of each tl.load, tl.store and atomic of a file, by line."""
    calls = [node for node in ast.walk(ast.parse(Path(file_name).read_text())) if isinstance(node, ast.Call)]
    memory = [node for node in calls if re.match(r"tl\.(load|store|atomic)", ast.unparse(node.func))]
    return {
        line: ast.unparse(node.args[0]) for node in memory for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


def _counted(widths: Counter[int]) -> str:
    """`128x4 32x1`: how many instructions of each width, the widest first."""
    return " ".join(f"{bits}x{count}" for bits, count in sorted(widths.items(), reverse=True))


def launches_of_presets(tokens: Sequence[int] = (8 * 2048, 32 * 2048)) -> tuple[list[Launch], list[str]]:
    """All launches, and beside each the presets that need it; the larger micro-batch has more than 2^31 logits."""
    found: dict[str, Launch] = {}
    presets: dict[str, list[str]] = defaultdict(list)
    for name, arch in PRESETS.items():
        with caught() as launches:
            for module in kernel_modules():
                for count in tokens:
                    for call in CASES.get(module.__name__.rpartition(".")[2], lambda *_: [])(arch, count, "meta"):
                        call()
        for key, each in launches.items():
            found.setdefault(key, each)
            presets[key].append(name.removeprefix("pythia-"))
    return list(found.values()), [" ".join(names) for names in presets.values()]


def examine(launches: Sequence[Launch], presets: Sequence[str], chips: Sequence[int] = tuple(SHARED)) -> list[Row]:
    """Every launch compiled for every chip, on all processors: most of the time is spent outside of Python."""
    jobs = [(found, sm, names) for found, names in zip(launches, presets, strict=True) for sm in chips]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda job: compiled(*job), jobs))
    return sorted(rows, key=lambda row: row.key)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, with the versions that it depends on."""
    versions = {"torch": torch.__version__, "triton": triton.__version__, "date": datetime.date.today().isoformat()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        names = [field.name for field in fields(Row)]
        writer = csv.DictWriter(file, [*names, "ptxas", *versions], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            narrow = "; ".join(f"{address}: {widths}" for address, widths in row.narrow.items())
            writer.writerow({**asdict(row), "narrow": narrow, "ptxas": get_ptxas(row.sm).version, **versions})


def read_csv(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    values: dict[str, Any] = {field.name: line[field.name] for field in fields(Row)}
    values |= {field.name: int(line[field.name]) for field in fields(Row) if field.type is int}
    values["narrow"] = dict(entry.split(": ") for entry in line["narrow"].split("; ") if entry)
    return Row(**values)


def table(rows: Sequence[Row]) -> str:
    """A line for each specialisation, values of different chips side by side where they differ."""
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.kernel, row.arguments, row.warps].append(row)
    columns = ("registers", "stack_bytes", "spills", "shared_bytes", "loads", "stores", "atomics")
    lines = [("kernel", "warps", "registers", "stack", "spills", "shared", "loads", "stores", "atomics", "presets", "")]
    for (kernel, arguments, warps), group in groups.items():
        cells = ["/".join(dict.fromkeys(str(getattr(row, column)) for row in group)) for column in columns]
        constants = " ".join(word for word in arguments.split() if "=" in word)
        lines.append((kernel, str(warps), *cells, group[0].presets, constants))
    widths = [max(map(len, column)) for column in zip(*lines)]
    chips = "/".join(f"sm_{sm}" for sm in dict.fromkeys(row.sm for row in rows))
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([f"{chips}; loads and stores are BITSxINSTRUCTIONS in the machine code", *body])


def main(output: Path | None = None, chips: Sequence[int] = tuple(SHARED)) -> None:
    """Prints both tables, writes them to a folder if asked, and says what is wrong."""
    rows = examine(*launches_of_presets(), chips)
    print(table(rows))
    if output is not None:
        write_csv(rows, output / CSV)
        print(f"written: {output / CSV}")
    missing = kernels(kernel_modules()) - {row.kernel for row in rows}
    faults = [fault for row in rows for fault in row.faults()] + [
        f"{name} was not launched" for name in sorted(missing)
    ]
    print(
        "\n".join(faults) if faults else "no spills, no stack, no narrow access that is not accounted for", flush=True
    )
    # Bytes moved come from the interpreter, which is chosen when a kernel is defined: in another process.
    command = [sys.executable, "-m", "fastcpt.benchmarks.traffic", *(["--output", str(output)] if output else [])]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


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


# What to run of each module, forward and backward: calls of its public functions.
CASES: dict[str, Callable[[Architecture, int, str], Iterator[Callable[[], Any]]]] = {
    "cross_entropy": _cross_entropy,
    "gelu": _gelu,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write FOLDER/{CSV}")
    parser.add_argument("--sm", type=int, choices=SHARED, action="append", help="this chip alone (default: all)")
    arguments = parser.parse_args()
    main(arguments.output, arguments.sm or tuple(SHARED))
