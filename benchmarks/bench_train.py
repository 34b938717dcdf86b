"""Times fastcpt's training step beside those of other trainers, in turn.

    fastcpt bench train [--model NAME ...] [--rivals-python PYTHON] [--output FOLDER]

Every implementation is a process of its own (`train_rivals.py`), with the same weights, the same batches, AdamW and
clipping. Their first losses must agree before anything is timed. Then fastcpt and one rival take turns (A, B, A, B, ...),
with a large bf16 matrix product in between, which says what the machine can do just then. Ratios are medians over the
turns. A model's FLOPs at a rate above that of the product fail, as does a rival that is slower here than it was seen to
be on a machine with the same rate: then it is not in its best configuration, and a ratio to it means nothing.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcpt import hf
from fastcpt.benchmarks import train_rivals
from fastcpt.benchmarks.bench_data import real_set
from fastcpt.benchmarks.timing import Run, alternate, facts, quantiles
from fastcpt.demo import FULL, VOCABULARY
from fastcpt.metrics import flops_per_token
from fastcpt.model import PRESETS, Architecture, GPTNeoX

OURS = "fastcpt"


@dataclass(frozen=True)
class Case:
    """A model and its batch. ratio: of our tokens/s to the best of the rivals whose names begin with `beside`, percent:
    of the matrix product's rate, to reach."""

    name: str
    arch: Architecture
    batch: int  # sequences a step
    seq_len: int
    micro_batch: int
    ratio: float
    percent: float | None = None
    beside: str = ""


CPU_CASES = (
    Case("pythia-70m", PRESETS["pythia-70m"], 4, 512, 4, 1.15, 62),
    Case("pythia-14m", PRESETS["pythia-14m"], 4, 512, 4, 1.25),
    Case(
        "demo", Architecture(FULL.layers, FULL.width, 4, VOCABULARY), FULL.batch // FULL.seq_len, FULL.seq_len, 32, 2.0,
        beside="transformers",
    ),
)  # fmt: skip
GPU_CASES = tuple(
    Case(name, PRESETS[name], 4 * micro, 2048, micro, 1.08)
    for name, micro in (("pythia-70m", 64), ("pythia-160m", 32), ("pythia-410m", 16), ("pythia-1.4b", 8))
)
CPU_RIVALS = (
    "transformers fp32", "transformers sdpa fp32", "transformers sdpa bf16", "transformers compiled", "litgpt",
    "litgpt compiled", f"transformers compiled{train_rivals.KEPT}", f"litgpt compiled{train_rivals.KEPT}",
)  # fmt: skip
GPU_RIVALS = ("transformers sdpa bf16", "transformers compiled", "transformers Liger", "litgpt compiled")
PAIRS = 5  # turns of each
SECONDS = 2.0  # of a turn, about
CHECKED = 3  # first steps whose losses must agree
# bf16 rounds a number by 2^-9 of itself at most; a loss is a mean over many, and no further off than one of them.
LOSS_TOLERANCE = 2.0**-8
# tokens/s on two quiet Zen 4 cores, whose bf16 product ran at 424 GFLOP/s: what a rival must come within a tenth of, on a
# machine within a tenth of that rate.
LIKE = 424e9
EXPECTED = {
    ("pythia-70m", "transformers sdpa fp32"): 531, ("pythia-70m", "transformers sdpa bf16"): 734,
    ("pythia-70m", "transformers compiled"): 859, ("pythia-70m", "litgpt"): 849, ("pythia-70m", "litgpt compiled"): 911,
    ("pythia-14m", "transformers sdpa fp32"): 1456, ("pythia-14m", "transformers sdpa bf16"): 1609,
    ("pythia-14m", "litgpt"): 2948,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One implementation of one case. ratio_to_ours: our tokens/s to its own, the median over turns; above 1 we are faster.

    mfu_full and mfu_causal: model FLOPs (`metrics.flops_per_token`, attention counted in full or halved) a second, as
    percent of the matrix product's rate in the same turns. cold_s, warm_s: from the start of the process to the end of
    its first step, without and with what it compiled before.
    """

    case: str
    implementation: str
    turns: int
    tokens_per_s: float
    p20: float
    p80: float
    ratio_to_ours: float
    ratio_low: float
    ratio_high: float
    mfu_full: float
    mfu_causal: float
    matmul_tflops: float
    matmul_and_attention: float
    peak_mb: float
    cold_s: float
    warm_s: float
    loss_off: float
    target: str
    met: str
    versions: str


class Worker:
    """An implementation in its process."""

    def __init__(self, name: str, python: str, folder: Path, cache: Path, device: torch.device) -> None:
        self.name, started = name, time.perf_counter()
        # TMPDIR is where torch keeps the header of all kernels.
        cache.mkdir(exist_ok=True)
        settings = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        settings |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(cache)}
        # Run as a script: no package's folder is put on its path, and the rival's interpreter needs no fastcpt.
        script = Path(train_rivals.__file__)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [python, str(script), name, str(folder), str(device)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env={**os.environ, **settings},
        )  # fmt: skip
        hello = self._answer()
        self.missing: str | None = hello.get("missing")
        self.versions: str = hello.get("versions", "")
        self.losses: list[float] = []
        self.first_s = float("nan")
        if self.missing is None:
            self.losses += self.ask(steps=1)["losses"]
            self.first_s = time.perf_counter() - started

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # whatever else a package prints
                return json.loads(line)
        self.process.wait()
        self.log.seek(0)
        raise AssertionError(f"{self.name} failed with code {self.process.returncode}:\n{self.log.read()[-4000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def prepare(case: Case, folder: Path) -> None:
    """What every implementation reads: weights, batches and the sizes. Tokens are skewed, so that losses move."""
    model = GPTNeoX(case.arch)
    model.initialise_(torch.Generator().manual_seed(0))
    hf.save_pretrained(model, folder / "model")
    generator = np.random.default_rng(0)
    count = 8
    tokens = generator.zipf(1.2, (count, case.batch, case.seq_len + 1)) % (case.arch.vocab_size - 1) + 1
    np.save(folder / "batches.npy", tokens)
    real_set(folder / "shards", [50 * case.seq_len], seed=0, vocab_size=case.arch.vocab_size)
    job = {"batches": count, "micro_batch": case.micro_batch, "seq_len": case.seq_len, "compile": True}
    (folder / "job.json").write_text(json.dumps(job))


def matmul_rate(device: torch.device) -> float:
    """Of a large square product in bf16, FLOP/s: the median of seven."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    median, _, _ = quantiles(alternate({"matmul": Run(lambda: a @ b)}, device, 0.1)["matmul"])
    return 2 * side**3 / median * 1000


def agree(name: str, losses: Sequence[float], exact: Sequence[float]) -> float:
    """The largest relative difference of first losses. Raises AssertionError above the tolerance."""
    off = max(abs(ours - theirs) / theirs for ours, theirs in zip(losses, exact, strict=True))
    assert off <= LOSS_TOLERANCE, f"{name}: losses {losses} and not {exact}: it does other work, and is not timed"
    return off


def turns(ours: Worker, rival: Worker, tokens: int, device: torch.device) -> list[tuple[float, float, float]]:
    """Of each turn: our tokens/s, the rival's, and the rate of a matrix product."""
    counts = {}
    for worker in (ours, rival):
        once = min(worker.ask(steps=2)["ms"])
        counts[worker] = max(2, round(SECONDS * 1000 / once))
    found = []
    for _ in range(PAIRS):
        rates = [tokens / statistics.median(w.ask(steps=counts[w])["ms"]) * 1000 for w in (ours, rival)]
        found.append((*rates, matmul_rate(device)))
    return found


def row(
    case: Case, worker: Worker, rates: Sequence[float], ratios: Sequence[float], products: Sequence[float],
    off: float, warm: float, target: str = "", met: str = "",
) -> Row:  # fmt: skip
    """Raises AssertionError where the model's FLOPs would be computed faster than a matrix product's."""
    speed, low, high = quantiles(rates)
    ratio = quantiles(ratios)
    product = statistics.median(products)
    full, causal = (100 * speed * flops_per_token(case.arch, case.seq_len, c) / product for c in (False, True))
    assert causal <= 100, f"{case.name}, {worker.name}: {causal:.0f}% of the rate of a matrix product cannot be true"
    expected = EXPECTED.get((case.name, worker.name))
    if expected is not None and 0.9 < product / LIKE < 1.1:
        assert speed > 0.9 * expected, (
            f"{case.name}, {worker.name}: {speed:.0f} tokens/s, and {expected} on a machine like this: not at its best"
        )
    share = worker.ask(profile=2)["share"]
    return Row(
        case.name, worker.name, len(rates), speed, low, high, *ratio, full, causal, product / 1e12, share,
        worker.ask(peak=True)["mb"], worker.first_s, warm, off, target, met, worker.versions,
    )  # fmt: skip


def measure(case: Case, rivals: Sequence[str], python: str, device: torch.device, work: Path) -> list[Row]:
    """Rows of one model, ours first."""
    folder = work / case.name
    folder.mkdir(parents=True)
    prepare(case, folder)
    tokens = case.batch * case.seq_len
    rows: list[Row] = []
    own: list[tuple[float, float, float]] = []
    with ExitStack() as stack:

        def start(name: str) -> tuple[Worker, float]:
            """Warm, with its first losses; and how long another takes to the first step with what this one compiled."""
            cache = folder / f"cache-{name}".replace(" ", "-")
            interpreter = sys.executable if name == OURS else python
            worker = Worker(name, interpreter, folder, cache, device)
            stack.callback(worker.close)
            if worker.missing is not None:
                return worker, 0.0
            worker.losses += worker.ask(steps=CHECKED - 1)["losses"]
            again = Worker(name, interpreter, folder, cache, device)
            again.close()
            return worker, again.first_s

        reference, _ = start("transformers fp32" if "transformers fp32" in rivals else rivals[0])
        ours, warm = start(OURS)
        assert reference.missing is None, f"{reference.name}: {reference.missing}; it is what losses are compared with"
        off = agree(OURS, ours.losses, reference.losses)
        print(f"{case.name}: losses {ours.losses}, {reference.name} {reference.losses}", flush=True)
        for name in rivals:
            rival, rival_warm = (reference, float("nan")) if name == reference.name else start(name)
            if rival.missing is not None:
                print(f"{name} is left out: {rival.missing}", flush=True)
                continue
            rival_off = agree(name, rival.losses, reference.losses)
            found = turns(ours, rival, tokens, device)
            own += found
            mine, theirs, products = zip(*found)
            rows.append(
                row(case, rival, theirs, [a / b for a, b in zip(mine, theirs)], products, rival_off, rival_warm)
            )
            print(
                f"{case.name}, {name}: {rows[-1].tokens_per_s:.0f} tokens/s, ratio {rows[-1].ratio_to_ours:.2f}",
                flush=True,
            )
            rival.close()
        mine, _, products = zip(*own)
        best = min(
            (each for each in rows if each.implementation.startswith(case.beside)), key=lambda each: each.ratio_to_ours
        )
        first = row(case, ours, mine, [1.0], products, off, warm)
        target, met = f">= {case.ratio:g}x {best.implementation}", best.ratio_to_ours >= case.ratio
        if case.percent is not None:
            target, met = f"{target}, {case.percent:g}% of matmul", met and first.mfu_full >= case.percent
        rows.insert(0, Row(**{**asdict(first), "target": target, "met": "yes" if met else "no"}))
        (work / f"{case.name}.profile.json").write_text(json.dumps(ours.ask(profile=3), indent=1))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines: list[tuple[str, ...]] = [(
        "", "tokens/s", "ours to it", "20% to 80%", "MFU full", "causal", "matmul+attention", "peak MB", "cold s", "warm s",
        "loss off", "target", "met",
    )]  # fmt: skip
    for each in rows:
        lines.append((
            f"{each.case}: {each.implementation}", f"{each.tokens_per_s:.0f}", f"{each.ratio_to_ours:.2f}x",
            f"{each.ratio_low:.2f}-{each.ratio_high:.2f}", f"{each.mfu_full:.1f}%", f"{each.mfu_causal:.1f}%",
            f"{100 * each.matmul_and_attention:.0f}%", f"{each.peak_mb:.0f}", f"{each.cold_s:.1f}", f"{each.warm_s:.1f}",
            f"{each.loss_off:.1e}", each.target, each.met,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def write(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    """Models that were not measured keep their rows of an earlier run."""
    kept = []
    measured = {each.case for each in rows}
    if path.exists():
        with open(path, newline="") as file:
            kept = [line for line in csv.DictReader(file) if line["case"] not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        for each in rows:
            values = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(each).items()}
            writer.writerow({**values, **about})


def main(
    output: Path | None = None, models: Sequence[str] | None = None, rivals_python: str = sys.executable
) -> list[Row]:
    """Prints the table and writes output/train.csv and a profile of each model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, rivals = (GPU_CASES, GPU_RIVALS) if device.type == "cuda" else (CPU_CASES, CPU_RIVALS)
    about = facts(device)
    print("\n".join(f"{name}: {value}" for name, value in about.items() if value), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        for case in cases:
            if models is None or case.name in models:
                rows += measure(case, rivals, rivals_python, device, Path(work))
                if output is not None:
                    write(output / "train.csv", rows, about)
                    shutil.copy(Path(work) / f"{case.name}.profile.json", output / f"train_{case.name}.json")
    print("\n" + table(rows))
    return rows
