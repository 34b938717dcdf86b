"""Where the time goes: three steps of a run under torch's profiler (`run.profile`), on the first process.

    RUN/profile/step-N.json.gz   the trace; ui.perfetto.dev and chrome://tracing open it
    RUN/profile/step-N.txt       operators, on a GPU kernels: time, share, percent of the roofline; what was allocated
    RUN/profile/step-N.pickle    GPU alone: memory with the stacks that took it, for pytorch.org/memory_viz

The numbers of the table come from the trace. Own time of an operator is without those that it calls. Percent of the
roofline is the least time that its work takes, the larger of FLOPs at the rate of a large matrix product and bytes at the
rate of a copy, both measured when the three steps are over, as percent of the time that it took. Work is known from the
shapes in the trace: of matrix products, attention (causal), copies, AdamW, and Inductor's Triton kernels (each tensor
moved once).
"""

import gzip
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fastcpt import UserError
from fastcpt.metrics import measured_matmul_rate
from fastcpt.state import State

STEPS = 3
ROWS, ALLOCATING = 30, 10  # of the two tables
MB = 1e6
ITEM_BYTES = {
    "double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short int": 2,
    "short unsigned int": 2, "unsigned char": 1, "signed char": 1, "bool": 1,
}  # fmt: skip
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::_scaled_mm": 0}  # first factor
ADAMW = {"aten::_fused_adamw_": 28, "fastcpt::adamw_step": 28}  # bytes a parameter, all in fp32
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]


@dataclass
class Row:
    """An operator or kernel in the steps of a trace; seconds. least: of the calls whose work is known, on the roofline;
    known: what those took. by: what limits them, matmul or memory."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    least: float = 0.0
    known: float = 0.0
    by: str = ""
    allocated: int = 0


def work(event: Event) -> tuple[float, float] | None:
    """FLOPs and bytes of an operator with these shapes; None where they do not say."""
    arguments = event.get("args", {})
    dims, types, name = arguments.get("Input Dims", []), arguments.get("Input type", []), event["name"]
    if name in PRODUCTS and len(dims) > (first := PRODUCTS[name]) + 1:
        *batch, m, k = dims[first]
        n, count, item = dims[first + 1][-1], math.prod(batch), ITEM_BYTES.get(types[first], 4)
        return 2.0 * count * m * n * k, float(count * item * (m * k + k * n + m * n))
    if name in ADAMW and dims and dims[0] and isinstance(dims[0][0], list):
        return 0.0, float(ADAMW[name] * sum(map(math.prod, dims[0])))
    if name.startswith("aten::_scaled_dot_product") and dims and len(dims[0]) == 4:
        elements, length = math.prod(dims[0]), dims[0][2]  # (B, H, T, head width), in the backward pass of dO as well
        return (5.0 if "backward" in name else 2.0) * elements * length, 0.0
    if name == "aten::copy_" or name.startswith("triton_"):
        sizes = [math.prod(dim) * ITEM_BYTES[kind] for dim, kind in zip(dims, types) if dim and kind in ITEM_BYTES]
        return (0.0, float(sum(sizes))) if sizes else None
    return None


def own_times(events: list[Event]) -> Iterator[tuple[Event, float]]:
    """The operators of each thread with their own time, microseconds. What an operator allocates itself, bytes, is put
    into its "allocated"."""
    threads: dict[Any, list[Event]] = {}
    for event in events:
        threads.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    for own in threads.values():
        stack: list[tuple[Event, float]] = []
        for event in sorted(own, key=lambda each: (each["ts"], -each.get("dur", 0.0))):
            while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
                yield stack.pop()
            if event["ph"] == "i":
                if stack and event["args"]["Bytes"] > 0:
                    stack[-1][0]["allocated"] = stack[-1][0].get("allocated", 0) + event["args"]["Bytes"]
                continue
            if stack:
                parent, left = stack.pop()
                stack.append((parent, left - event["dur"]))
            stack.append((event, event["dur"]))
        yield from reversed(stack)


def summarise(trace: dict[str, Any], matmul_rate: float, memory_rate: float) -> tuple[list[Row], list[Row]]:
    """Operators of a trace, and kernels where there are any. Rates in FLOP/s and bytes/s."""
    events = trace["traceEvents"]
    on_host = [
        event for event in events
        if (event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation"))
        or (event.get("ph") == "i" and event.get("name") == "[memory]")
    ]  # fmt: skip
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    operators: dict[str, Row] = {}
    launched: dict[Any, Row] = {}
    on_device: dict[str, Row] = {}

    def add(rows: dict[str, Row], name: str, microseconds: float, done: tuple[float, float] | None) -> Row:
        row = rows.setdefault(name, Row(name))
        row.calls += 1
        row.seconds += microseconds / 1e6
        if done is not None:
            least = (done[0] / matmul_rate, done[1] / memory_rate)
            row.least += max(least)
            row.known += microseconds / 1e6
            row.by = "matmul" if least[0] >= least[1] else "memory"
        return row

    works: dict[Any, tuple[float, float]] = {}
    for event, microseconds in own_times(on_host):
        done = work(event)
        row = add(operators, event["name"], microseconds, None if kernels else done)
        row.allocated += event.get("allocated", 0)
        if done is not None:
            works[event["args"].get("External id")] = done
    # An operator's work is that of its longest kernel: others are small (a split sum, a scaling).
    for kernel in sorted(kernels, key=lambda each: -each["dur"]):
        number = kernel.get("args", {}).get("External id")
        done = None if number in launched else works.get(number)
        launched[number] = add(on_device, kernel["name"], kernel["dur"], done)
    return list(operators.values()), list(on_device.values())


def memory_rate(device: torch.device) -> float:
    """Of a copy in memory, bytes/s, those read and those written; the best of five."""
    source = torch.ones(32_000_000, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)[0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def table(trace: dict[str, Any], steps: int, seconds: float, matmul: float, memory: float) -> str:
    """The tables of a trace of `steps` steps that took `seconds`, for people. Rates as in `summarise`."""
    operators, kernels = summarise(trace, matmul, memory)
    rows = kernels or operators
    total = sum(row.seconds for row in rows)
    busy = f"{'kernels' if kernels else 'operators'} take {100 * total / seconds:.1f}% of that"
    lines = [
        f"{steps} steps, {1000 * seconds / steps:.1f} ms each under the profiler; {busy}",
        f"roofline: {matmul / 1e12:.3g} TFLOP/s of a matrix product, {memory / 1e9:.4g} GB/s of a copy, measured here",
        "",
        f"{'share':>6} {'ms a step':>10} {'calls':>6} {'% of roofline':>14}  {'kernel' if kernels else 'operator, own time'}",
    ]
    for row in sorted(rows, key=lambda row: -row.seconds)[:ROWS]:
        percent = f"{100 * row.least / row.known:.0f} {row.by}" if row.known else ""
        lines.append(
            f"{100 * row.seconds / total:>5.1f}% {1000 * row.seconds / steps:>10.2f} {row.calls / steps:>6.0f} "
            f"{percent:>14}  {row.name}"
        )
    lines += ["", f"{'MB a step':>10}  allocated by (what it frees is not taken off)"]
    for row in sorted(operators, key=lambda row: -row.allocated)[:ALLOCATING]:
        if row.allocated:
            lines.append(f"{row.allocated / MB / steps:>10.1f}  {row.name}")
    return "\n".join(lines) + "\n"


class Profile:
    """`with Profile(state) as profile`, then `profile.at(step)` after each step. Does nothing where `run.profile` is 0.

    The three steps begin after step `run.profile`. A run that goes on from a later one, or was stopped among them, is
    profiled after its first step instead, in which it compiles; one that has its table is not profiled again. Must be
    made before anything is compiled. Raises UserError where the run ends before.
    """

    def __init__(self, state: State) -> None:
        run, self._state = state.config.run, state
        self._profiler: Any = None
        self._folder = Path(run.output) / "profile"
        self._begin: int | None = None
        if run.profile >= state.last_step > state.step:
            raise UserError(
                "profile-after-end",
                f"run.profile is {run.profile}, and the run ends at step {state.last_step}: nothing would be profiled; "
                "name an earlier step, or 0 for none",
            )
        if run.profile and state.world.first and not self._path("txt").exists():
            self._begin = max(run.profile, state.step + 1)
            torch._inductor.config.cpp.enable_kernel_profile = True  # else a fused loop has no name in the trace

    def _path(self, suffix: str) -> Path:
        return self._folder / f"step-{self._state.config.run.profile}.{suffix}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profiler is not None:  # the run was stopped among the three steps
            self._profiler.stop()
            self._record_memory(None)

    def at(self, step: int) -> None:
        if self._begin is None:
            return
        last = min(self._begin + STEPS, self._state.last_step)
        if step == self._begin < last:
            self._start()
        elif step == last and self._profiler is not None:
            self._finish(step - self._begin)

    def _record_memory(self, what: str | None) -> None:
        if self._state.world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(what, stacks="python")  # type: ignore[arg-type]

    def _wait(self) -> None:
        if self._state.world.device.type == "cuda":
            torch.cuda.synchronize()

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self._state.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._wait()
        self._record_memory("all")
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()
        self._started = time.perf_counter()

    def _finish(self, steps: int) -> None:
        assert self._profiler is not None
        self._wait()
        seconds = time.perf_counter() - self._started
        self._profiler.stop()
        profiler, self._profiler, self._begin = self._profiler, None, None
        device, path = self._state.world.device, self._path("json.gz")
        profiler.export_chrome_trace(str(path))
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._path("pickle")))
        self._record_memory(None)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            trace = json.load(file)
        dtype = self._state.model.execution.dtype
        matmul = measured_matmul_rate(device, dtype, size=8192 if device.type == "cuda" else 2048)
        text = table(trace, steps, seconds, matmul, memory_rate(device))
        part = self._path("txt.part")
        part.write_text(text, encoding="utf-8")
        part.rename(self._path("txt"))  # last: a run that has it is not profiled again
        print(f"profile of {steps} steps: {self._path('txt')}", flush=True)
