"""The one clock of the benches: implementations in turn, and what the machine itself can do, in the same run.

    times = alternate({"ours": Run(f), "theirs": Run(g)}, device, seconds=2)
    rows = judged(case, times, limits, peaks={})

On a GPU each run lies between two events, after L2 was overwritten; nothing waits in between, so that the host runs
ahead as it does in training. On a CPU the clock is perf_counter. Implementations take turns (A, B, A, B, ...), and with
them copies, sums and the like, or a matrix product: clocks, power and other load are then the same for all.

Percentages are of the memory rate, the fastest of a copy, a scaling and an addition in place (on a CPU a copy also reads
what it overwrites), or of the matmul rate. A median above the fastest single run of any of these, or of a sum, which
only reads, fails: it cannot be true.
"""

import datetime
import importlib
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

WARM_UP, FEWEST, MOST = 2, 7, 100  # runs of each implementation
SECONDS = {"cpu": 10.0, "cuda": 2.0}  # of timed runs a case
FLUSH = 1 << 30  # bytes: more than any L2, and long enough for the host to be ahead when the timed run begins
# Elements of the copy, far more than a cache has (no power of two on a CPU, where two such arrays share cache sets), and
# the side of the matrix product.
LIMIT_SIZES = {"cpu": (50_000_000, 2048), "cuda": (1 << 28, 8192)}


@dataclass(frozen=True)
class Run:
    """Something to time: `call`, after `prepare`, which is not timed."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def passes(
    function: Callable[[], Any], inputs: Sequence[Tensor], gradients: Tensor | Sequence[Tensor]
) -> tuple[Run, Run]:
    """A forward pass, and a backward pass through one that is not timed."""
    made: list[Any] = []

    def forward() -> None:
        made[:] = [function()]

    return Run(function), Run(lambda: torch.autograd.grad(made.pop(), inputs, gradients), forward)


@dataclass(frozen=True)
class Case:
    """One piece of work and its implementations, ours first.

    check: raises AssertionError if ours is wrong; called before anything is timed.
    bytes, flops: what any implementation has to move or to compute; one of them is 0. Rates follow from it.
    percent: of the machine's limit, that ours should reach; ratios: time to ours that a rival should have at least.
    """

    kernel: str
    name: str
    shape: str
    dtype: torch.dtype
    check: Callable[[], None]
    runs: Mapping[str, Run]
    bytes: int = 0
    flops: int = 0
    percent: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limit:
    """A run that shows what the machine can do."""

    run: Run
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Row:
    """One implementation of one case; gb_per_s or tflop_per_s is None. ratio_to_ours above 1: ours is faster."""

    kernel: str
    case: str
    shape: str
    dtype: str
    implementation: str
    runs: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float | None
    tflop_per_s: float | None
    percent_of_limit: float
    ratio_to_ours: float | None
    target: str
    peak_mb: float | None


def quantiles(milliseconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, linear between neighbours."""
    points = torch.tensor((0.5, 0.2, 0.8), dtype=torch.float64)
    median, low, high = torch.tensor(milliseconds, dtype=torch.float64).quantile(points).tolist()
    return median, low, high


def _cuda_times(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    cache = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run.prepare()
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run.call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _cpu_times(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run.prepare()
            start = time.perf_counter()
            kept = run.call()  # until the clock has stopped
            times[name].append((time.perf_counter() - start) * 1000)
            del kept
    return times


def alternate(runs: Mapping[str, Run], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run of each implementation, all warm: about `seconds` in all, 7 to 100 runs of each."""
    clock = _cuda_times if device.type == "cuda" else _cpu_times
    once = sum(times[0] for times in clock(runs, 1).values())
    return clock(runs, min(MOST, max(FEWEST, int(seconds * 1000 / once))))


def warm(runs: Mapping[str, Run], needed: set[str]) -> dict[str, Run]:
    """The runs that work here, warm; a rival that does not is named, with what it said, and left out."""
    found = {}
    for name, run in runs.items():
        try:
            for _ in range(WARM_UP):
                run.prepare()
                run.call()
        except Exception as error:
            if name in needed:
                raise
            print(f"{name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            found[name] = run
    return found


def peak_mb(run: Run) -> float | None:
    """MB (10^6 bytes) that a run takes beside what was there before it; None on CPU, where nobody counts."""
    if not torch.cuda.is_available():
        return None
    run.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def limits(device: torch.device, memory: bool) -> dict[str, Limit]:
    """Of memory: a copy, a scaling and an addition in place, a sum; else of arithmetic: a square matrix product, bf16 on a GPU."""
    elements, side = LIMIT_SIZES[device.type]
    if memory:
        x, y = torch.rand(2, elements, device=device).unbind()
        size = elements * x.element_size()
        return {
            "copy": Limit(Run(lambda: y.copy_(x)), bytes=2 * size),
            "scale in place": Limit(Run(lambda: y.mul_(1.0)), bytes=2 * size),
            "add in place": Limit(Run(lambda: y.add_(x)), bytes=3 * size),
            "sum": Limit(Run(lambda: x.sum()), bytes=size),
        }
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {"matmul": Limit(Run(lambda: a @ b), flops=2 * side**3)}


def judged(
    case: Case,
    times: Mapping[str, Sequence[float]],
    machine: Mapping[str, Limit],
    peaks: Mapping[str, float | None],
) -> list[Row]:
    """A row an implementation, and one for each of the machine's limits.

    times: milliseconds of both. Raises AssertionError if a median is above what the machine was seen to do at best.
    """
    unit = 1e6 if case.bytes else 1e9  # bytes a ms in GB/s; operations a ms in TFLOP/s

    def rate(work: Case | Limit, milliseconds: float) -> float:
        return (work.bytes or work.flops) / milliseconds / unit

    ceiling = max(rate(limit, min(times[name])) for name, limit in machine.items())
    # A sum may be faster than a copy, and no kernel only reads: it raises the ceiling, but percentages are not of it.
    hundred = max(rate(limit, quantiles(times[name])[0]) for name, limit in machine.items() if name != "sum")
    ours = next(iter(case.runs))
    ours_ms = quantiles(times[ours])[0]
    rows = []
    for name in times:
        median, low, high = quantiles(times[name])
        limit = machine.get(name)
        speed = rate(limit or case, median)
        if limit is None and speed > ceiling:
            raise AssertionError(
                f"{case.kernel}, {case.name}, {name}: {speed:.4g} {'GB/s' if case.bytes else 'TFLOP/s'} is above "
                f"{ceiling:.4g}, the best that this machine was seen to do: the clock or the count is wrong"
            )
        target = f">= {case.percent:g}%" if name == ours and case.percent else ""
        if name in case.ratios:
            target = f">= {case.ratios[name]:g}x"
        rows.append(Row(
            case.kernel, case.name, case.shape, str(case.dtype).removeprefix("torch."),
            f"limit: {name}" if limit else name, len(times[name]), median, low, high,
            speed if case.bytes else None, None if case.bytes else speed, 100 * speed / hundred,
            None if limit else median / ours_ms, target, peaks.get(name),
        ))  # fmt: skip
    return rows


def measured(case: Case, device: torch.device) -> list[Row]:
    """Checks ours, then times all. Raises AssertionError if ours is wrong or a number cannot be true."""
    case.check()
    machine = limits(device, memory=bool(case.bytes))
    runs = warm(
        {**case.runs, **{name: limit.run for name, limit in machine.items()}}, needed={next(iter(case.runs)), *machine}
    )
    peaks = {name: peak_mb(run) for name, run in runs.items()}
    return judged(case, alternate(runs, device, SECONDS[device.type]), machine, peaks)


def close(what: str, ours: Tensor, exact: Tensor, absolute: float = 0.0, relative: float = 2.0**-13) -> None:
    """Raises AssertionError unless |ours - exact| <= (eps of the dtype + relative) |exact| + absolute everywhere.

    2^-13: sums of 50,000 numbers in fp32, in any order, and what follows from them. The tests of a kernel are stricter;
    this is for what they are too small to see.
    """
    torch.testing.assert_close(
        ours, exact, rtol=torch.finfo(ours.dtype).eps + relative, atol=absolute, check_dtype=False,
        msg=lambda text: f"{what} is wrong and is not timed: {text}",
    )  # fmt: skip


def wider(dtype: torch.dtype) -> torch.dtype:
    """In which a result in dtype counts as exact."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def optional(module: str) -> Any | None:
    """A rival's module, or None and a line that says so."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        print(f"no rival from {module} here: {type(error).__name__}: {error}")
        return None


def facts(device: torch.device) -> dict[str, str]:
    """What a number depends on: device, power limit and driver, versions, date."""
    name = _processor()
    power = driver = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader", "--id=0"]
            answer = subprocess.run(query, check=False, capture_output=True, text=True, timeout=60).stdout
            power, _, driver = answer.strip().partition(", ")
    return {
        "device": name, "power_limit": power, "driver": driver, "torch": torch.__version__,
        "triton": triton.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"
