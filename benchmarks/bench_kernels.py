"""Times every kernel against its rivals; prints the tables and writes them as CSV. `fastcpt bench kernels` runs it.

    python -m fastcpt.benchmarks.bench_kernels [KERNEL ...] [--output FOLDER]

On a machine without a GPU, the kernels that have a path of their own for CPUs. Each result is checked before it is timed.
The file has one date and device a row; kernels that were not asked for keep their rows of an earlier run.
"""

import argparse
import csv
import importlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from fastcpt.benchmarks.timing import Case, Row, facts, measured

KERNELS = ("cross_entropy", "linear_cross_entropy", "adamw", "layer_norm", "qkv_rotary", "gelu", "attention")
ON_CPU = KERNELS[:3]


def table(case: Case, rows: Sequence[Row]) -> str:
    """Times and rates of a case, a line an implementation."""
    work = f"{case.bytes / 1e9:.3g} GB" if case.bytes else f"{case.flops / 1e12:.3g} TFLOP"
    rate = "GB/s" if case.bytes else "TFLOP/s"
    lines: list[tuple[str, ...]] = [
        ("", "median ms", "p20", "p80", rate, "% of limit", "time to ours", "target", "peak MB")
    ]
    for row in rows:
        speed = row.gb_per_s if case.bytes else row.tflop_per_s
        lines.append((
            row.implementation, *(f"{value:.4g}" for value in (row.median_ms, row.p20_ms, row.p80_ms, speed)),
            f"{row.percent_of_limit:.1f}", f"{row.ratio_to_ours:.2f}x" if row.ratio_to_ours else "", row.target,
            f"{row.peak_mb:.0f}" if row.peak_mb is not None else "",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = [
        "  ".join(
            (line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])))
        ).rstrip()
        for line in lines
    ]
    return "\n".join((f"\n{case.kernel}: {case.name}, {case.shape}, {rows[0].dtype}, {work}", *body))


def write(path: Path, rows: Sequence[Row], about: dict[str, str], replaced: Sequence[str]) -> None:
    """Writes rows, before them those of the file that are of other kernels than `replaced`."""
    names = [field.name for field in fields(Row)]
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [line for line in csv.DictReader(file) if line["kernel"] not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        for row in rows:
            values = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            writer.writerow({**values, **about})


def main(output: Path | None = None, kernels: Sequence[str] = KERNELS) -> None:
    """Times kernels and prints a table a case. output: the folder of kernels_gpu.csv or kernels_cpu.csv.

    Raises AssertionError at the first kernel that is wrong and the first number that cannot be true; what was measured
    before is then in the file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(device)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    timed = [name for name in kernels if device.type == "cuda" or name in ON_CPU]
    if waiting := [name for name in kernels if name not in timed]:
        print(f"no GPU: {', '.join(waiting)} cannot be timed")
    rows: list[Row] = []
    for name in timed:
        for case in importlib.import_module(f"fastcpt.benchmarks.bench_{name}").cases(device):
            found = measured(case, device)
            print(table(case, found), flush=True)
            rows += found
            if output is not None:
                path = output / f"kernels_{'gpu' if device.type == 'cuda' else 'cpu'}.csv"
                write(path, rows, about, kernels)
                print(f"written: {path}", flush=True)


def command(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write FOLDER/kernels_gpu.csv or kernels_cpu.csv")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.kernels) - set(KERNELS):
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    main(parsed.output, parsed.kernels or KERNELS)


if __name__ == "__main__":
    command()
