"""What the compiler makes of every kernel launch that the presets need: registers, spills, and widths of accesses.

    python -m fastcpt.benchmarks.static                    the table, from a machine without a GPU
    python -m fastcpt.benchmarks.static --output FOLDER    and FOLDER/kernels_static.csv, FOLDER/kernels_traffic.csv

`launches.py` says how launches are caught; here each is compiled as it would be launched. What is counted are instructions in the machine code, not how often they run.
"""

import argparse
import ast
import csv
import datetime
import inspect
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.compiler import ASTSource

from fastcpt.benchmarks.launches import Launch, kernel_modules, kernels, launches_of_presets
from fastcpt.model import PRESETS

# Compute capability -> bytes of shared memory that one block can have (CUDA programming guide, technical specifications).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CSV = "kernels_static.csv"
# Instructions that read and write global memory. A width is a suffix of theirs; without one it is 32 bits.
LOADS = ("LDG", "LD", "LDGSTS")
STORES = ("STG", "ST")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
# Accesses of fewer than 128 bits that are not of a single value a program (which cannot be wider), by kernel and by the
# address in its source, and why they cost nothing.
NARROW: dict[str, dict[str, str]] = {
    "layer_norm.layer_norm_forward_kernel": {
        "stats_ptr + rows": "one a row",
        "stats_ptr + N + rows": "one a row",
    },
    "layer_norm.layer_norm_backward_kernel": {
        "stats_ptr + rows": "one a row",
        "stats_ptr + N + rows": "one a row",
        "partials_ptr + row * D + columns": "one row a program; of 128 and 256 columns, a thread has one or two",
    },
    "layer_norm.column_sums_kernel": {"sums_ptr + columns": "one row in all"},
    # Heads of 32 or 80 values: half of what turns is 4 or 10 values, of which no more are contiguous or aligned.
    "qkv_rotary.qkv_rotary_forward_kernel": {
        "pointers": "4 or 10 values in a row",
        "pointers + R // 2": "4 or 10 values in a row",
        "cos_ptr + table": "rows of 20 values, served by the cache",
        "cos_ptr + table + R // 2": "rows of 20 values, served by the cache",
        "sin_ptr + table": "rows of 20 values, served by the cache",
        "sin_ptr + table + R // 2": "rows of 20 values, served by the cache",
    },
    "qkv_rotary.qkv_rotary_backward_kernel": {
        "source + partner": "4 or 10 values away, in lines that the wide loads have brought to the cache",
        "sin_ptr + table + partner": "10 values away, served by the cache",
    },
}


@dataclass(frozen=True)
class Row:
    """One specialisation compiled for one chip.

    Loads from and stores to global memory: `BITSxINSTRUCTIONS`, widest first. Narrow: those of fewer than 128 bits but
    for single values, the same, by the address in the kernel's source.
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


def faults(rows: Sequence[Row]) -> list[str]:
    """What no kernel may have, in words."""
    found, narrow = [], defaultdict(list)
    for row in rows:
        constants = " ".join(word for word in row.arguments.split() if "=" in word)
        where = f"{row.kernel} ({constants}, {row.warps} warps) on sm_{row.sm}"
        if row.spills or row.stack_bytes:
            found.append(f"{where} spills: {row.spills} local loads and stores, {row.stack_bytes} bytes of stack")
        if row.shared_bytes > SHARED[row.sm]:
            found.append(f"{where} cannot start: {row.shared_bytes} bytes of shared memory")
        for address in row.narrow.keys() - NARROW.get(row.kernel, {}).keys():
            narrow[row.kernel, address].append(row)
    for (kernel, address), group in narrow.items():
        widths = ", ".join(sorted({row.narrow[address] for row in group}))
        presets = " ".join(dict.fromkeys(" ".join(row.presets for row in group).split()))
        found.append(f"{kernel} has narrow accesses at `{address}`: {widths}, in {len(group)} rows, for {presets}")
    return found


def compiled(found: Launch, sm: int, presets: str) -> tuple[Row, bytes, set[int]]:
    """Compiles a launch for a chip -> its row, but for what the machine code says; the machine code; widths in the PTX."""
    source = ASTSource(found.kernel, found.signature, found.constants, found.attributes)
    options = {**found.options.__dict__, "arch": f"sm{sm}"}
    result = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", result.asm["cubin"], "-res-usage")))
    # The path in cached results may be that of another copy of this source.
    path = inspect.getfile(found.kernel.fn)
    accesses, single = _accesses(result.asm["ptx"], path), _single_values(result.asm["ttgir"], path)
    narrow = {
        address: _counted(Counter({bits: count for bits, count in widths.items() if bits < 128}))
        for address, widths in sorted(accesses.items())
        if address not in single and min(widths) < 128
    }
    row = Row(
        kernel=found.name, arguments=found.arguments, warps=found.options.num_warps, sm=sm, presets=presets,
        registers=int(usage["REG"]), stack_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=result.metadata.shared, narrow=narrow,
        spills=0, loads="", stores="", atomics=0,
    )  # fmt: skip
    return row, _text(result.asm["cubin"]), set().union(*accesses.values())


def _tool(tool: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _single_values(ttgir: str, path: str) -> set[str]:
    """Addresses in the source where one value is read or written, and not a block of them."""
    places = dict(re.findall(r"(#loc\d*) = loc\((.+)\)", ttgir))

    def address(place: str) -> str:
        """Of a place, or of the innermost call of those that it consists of."""
        while not (found := re.match(r'"(.+)":(\d+):(\d+)', place)):
            place = places[re.findall(r"#loc\d*", place)[0]]
        return _address(path, found[1], int(found[2]), int(found[3]))

    return {address(place) for place in re.findall(r"tt\.(?:load|store) .* : !tt\.ptr<\w+> loc\((.+)\)", ttgir)}


def _accesses(ptx: str, path: str) -> dict[str, Counter[int]]:
    """The widths of accesses to global memory by their address in the source; PTX says where each comes from."""
    files = dict(re.findall(r'\.file\s+(\d+) "(.+)"', ptx))
    found: dict[str, Counter[int]] = defaultdict(Counter)
    where = ("", 0, 0)
    for line in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", line):
            where = files[place[1]], int(place[2]), int(place[3])
        elif access := re.search(r"\b(?:ld|st)\.(?:[\w:]+\.)*global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[bfsu](\d+)\b", line):
            bits = int(access[1] or 1) * int(access[2])
        elif access := re.search(r"\bcp\.async\.c[ag]\.shared\.global .*\], 0x(\w+)", line):
            bits = int(access[1], 16) * 8
        else:
            continue
        if not place:
            found[_address(path, *where)][bits] += 1
    return found


@cache
def _memory_calls(path: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if re.fullmatch(r"tl\.(load|store)", ast.unparse(call.func))]


def _address(path: str, file_name: str, line: int, column: int) -> str:
    """The first argument of the innermost tl.load or tl.store around a place in the source, which is at `path`."""
    if Path(path).name != Path(file_name).name:
        return f"{file_name}:{line}"
    around = [
        call for call in _memory_calls(path)
        if (call.lineno, call.col_offset) <= (line, column - 1) < (call.end_lineno, call.end_col_offset)
    ]  # fmt: skip
    innermost = max(around, key=lambda call: (call.lineno, call.col_offset), default=None)
    return ast.unparse(innermost.args[0]) if innermost else f"line {line}"


def _text(cubin: bytes) -> bytes:
    """The section of an ELF file that holds the machine code."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<II4Q", cubin, table + number * size) for number in range(count)]
    strings = sections[names][4]
    (code,) = (each for each in sections if cubin.startswith(b".text.", strings + each[0]))
    return cubin[code[4] : code[4] + code[5]]


def disassembled(codes: Sequence[bytes], sm: int) -> list[list[str]]:
    """The instructions of each kernel, without operands. Together, for nvdisasm takes longer to start than to work."""
    name = sm_arch_from_capability(sm).replace("_", "").replace("sm", "SM")
    printed = _tool("nvdisasm", b"".join(codes), "--binary", name)
    starts = list(accumulate(map(len, codes), initial=0))
    found: list[list[str]] = [[] for _ in codes]
    for address, operation in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", printed):
        found[bisect_right(starts, int(address, 16)) - 1].append(operation)
    assert all(len(operations) * 16 == len(code) for operations, code in zip(found, codes)), "an instruction is lost"
    return found


def _counted(widths: Counter[int]) -> str:
    """`128x4 32x1`: how many instructions of each width, the widest first."""
    return " ".join(f"{bits}x{count}" for bits, count in sorted(widths.items(), reverse=True))


def _widths(operations: Sequence[str], names: Sequence[str]) -> Counter[int]:
    """Instructions by width, which is a suffix; without one it is 32 bits."""
    suffixes = [suffixes for name, *suffixes in (operation.split(".") for operation in operations) if name in names]
    sizes = [re.findall(r"\b[US]?(8|16|64|128|256)\b", " ".join(each)) for each in suffixes]
    return Counter(int(size[0]) if size else 32 for size in sizes)


def examine(jobs: Sequence[tuple[Launch, int, str]]) -> list[Row]:
    """Compiles on all processors: launches, the chip of each, and the presets that need it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(lambda job: compiled(*job), jobs))
    rows = []
    for sm in {sm for _, sm, _ in jobs}:
        of_chip, codes, known_widths = zip(*(each for each in built if each[0].sm == sm))
        for row, operations, known in zip(of_chip, disassembled(codes, sm), known_widths, strict=True):
            names = Counter(operation.partition(".")[0] for operation in operations)
            loads, stores = _widths(operations, LOADS), _widths(operations, STORES)
            assert set(loads | stores) <= known, f"{row.kernel}: accesses that its PTX does not have"
            rows.append(replace(
                row, loads=_counted(loads), stores=_counted(stores), spills=names["LDL"] + names["STL"],
                atomics=sum(names[name] for name in ATOMICS),
            ))  # fmt: skip
    return sorted(rows, key=lambda row: row.key)


def ptxas(sm: int) -> str:
    """The version that compiles for a chip: newer versions of triton have one of its own for sm_100."""
    tools = triton.knobs.nvidia
    return (getattr(tools, "ptxas_blackwell", tools.ptxas) if sm >= 100 else tools.ptxas).version


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
            writer.writerow({**asdict(row), "narrow": narrow, "ptxas": ptxas(row.sm), **versions})


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
    lines: list[tuple[str, ...]] = [
        ("kernel", "warps", "registers", "stack", "spills", "shared", "loads", "stores", "atomics", "presets", "")
    ]
    for (kernel, arguments, warps), group in groups.items():
        cells = ["/".join(dict.fromkeys(str(getattr(row, column)) for row in group)) for column in columns]
        constants = " ".join(word for word in arguments.split() if "=" in word)
        lines.append((kernel, str(warps), *cells, group[0].presets, constants))
    widths = [max(map(len, column)) for column in zip(*lines)]
    chips = "/".join(f"sm_{sm}" for sm in sorted({row.sm for row in rows}))
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([f"{chips}; loads and stores are BITSxINSTRUCTIONS in the machine code", *body])


def main(output: Path | None = None, elsewhere: Container[str] = PRESETS) -> None:
    """Prints both tables, writes them to a folder if asked, and says what is wrong.

    elsewhere: presets whose launches are compiled for sm_80 and sm_100 too; those of all are for sm_90.
    """
    jobs = [
        (found, sm, " ".join(name.removeprefix("pythia-") for name in names))
        for found, names in launches_of_presets()
        for sm in SHARED
        if sm == 90 or any(name in elsewhere for name in names)
    ]
    # Bytes moved come from the interpreter, which is chosen when a kernel is defined: meanwhile, in another process.
    command = [sys.executable, "-m", "fastcpt.benchmarks.traffic", *(["--output", str(output)] if output else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as traffic:
        rows = examine(jobs)
        print(table(rows))
        if output is not None:
            write_csv(rows, output / CSV)
            print(f"written: {output / CSV}")
        missing = kernels(kernel_modules()) - {row.kernel for row in rows}
        wrong = faults(rows) + [f"{name} was not launched" for name in sorted(missing)]
        print("\n".join(wrong or ["no spills, no stack, no narrow access that is not accounted for"]))
        print(traffic.communicate()[0], end="")
    if traffic.returncode:
        raise subprocess.CalledProcessError(traffic.returncode, command)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write FOLDER/{CSV}")
    main(parser.parse_args().output)
