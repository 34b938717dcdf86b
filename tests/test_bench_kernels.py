"""The benches of the kernels, without a clock that matters: counts, arithmetic, files, and that nothing wrong is timed."""

import csv
import importlib
import json
import os
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastcpt import attention
from fastcpt.attention import Backend
from fastcpt.benchmarks import bench_kernels, timing, visit
from fastcpt.benchmarks.timing import Case, Limit, Row, Run
from fastcpt.kernels import adamw, cross_entropy, gelu, layer_norm, linear_cross_entropy, qkv_rotary
from fastcpt.model import Architecture

VISIT = Path(__file__).parent.parent / "benchmarks" / "gpu_visit.sh"
CPU = torch.device("cpu")
TINY = Architecture(1, 64, 2, vocab_size=3)
BF16 = torch.bfloat16

# Of each bench: its sizes here, what its cases have to move or to compute, counted by hand, and the kernels launched.
BENCHES: dict[str, tuple[dict[str, Any], list[tuple[str, int, int]], set[str]]] = {
    "cross_entropy": (
        {"SIZES": {"cpu": (6, 10, BF16)}},
        [("forward and backward", 60 * (2 + 2), 0)],  # 60 logits, read and written
        {"_forward_kernel", "_backward_kernel", "_scale_kernel"},
    ),
    "linear_cross_entropy": (
        {"SIZES": {"cpu": (6, 8, 10, BF16)}},
        [("forward and backward", 0, 3 * 2 * 6 * 8 * 10)],  # three products
        {"_forward_kernel", "_scale_kernel"},
    ),
    "adamw": (
        {"MODELS": {"cpu": TINY}},
        # 12 x 64^2 of matrices, 9 x 64 of biases, 2 x 2 x 64 of norms, 2 x 64 of the last, 2 x 3 x 64 of embeddings.
        [
            ("update", 28 * (12 * 4096 + 21 * 64), 0),
            ("norm, limit, update", 32 * (12 * 4096 + 21 * 64), 0),
        ],
        {"adamw_square_kernel", "adamw_scalars_kernel", "adamw_kernel"},
    ),
    "layer_norm": (
        {"SIZES": {"cpu": (6, 32, BF16)}},
        [("sum of three, two norms, forward", 6 * 192 * 2, 0), ("sum of three, two norms, backward", 5 * 192 * 2, 0)],
        {"layer_norm_forward_kernel", "layer_norm_backward_kernel", "column_sums_kernel"},
    ),
    "qkv_rotary": (
        {"SIZES": {"cpu": (2, 3, "pythia-14m", BF16)}},  # 4 heads of 32, of which 8 turn
        [("forward", 4 * (2 * 3 * 4 * 8) * 2, 0), ("backward", 6 * (2 * 3 * 4 * 32) * 2, 0)],
        {"qkv_rotary_forward_kernel", "qkv_rotary_backward_kernel"},
    ),
    "gelu": (
        {"SIZES": {"cpu": (6, 32, BF16)}},
        [
            (f"{form}, {way}", size * 192 * 2, 0)
            for form in ("erf", "tanh")
            for way, size in (("forward", 2), ("backward", 3))
        ],
        {"bias_gelu_forward_kernel", "bias_gelu_backward_kernel"},
    ),
    "attention": (
        {"SIZES": {"cpu": [(2, 16, 2, 8)]}, "DOCUMENT": 4},
        # Two products of T x T x C forward and five backward, halved by the mask: 7 T^2 C a head.
        [
            ("causal, forward and backward", 0, 7 * 4 * 16 * 16 * 8),
            ("causal, documents of 4, forward and backward", 0, 7 * 4 * 4 * 4 * 4 * 8),
        ],
        set(),
    ),
}


def bench(name: str) -> Any:
    return importlib.import_module(f"fastcpt.benchmarks.bench_{name}")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All benches at sizes that take no time, and nothing compiled."""
    for name, (sizes, _, _) in BENCHES.items():
        for attribute, value in sizes.items():
            monkeypatch.setattr(bench(name), attribute, value)
    monkeypatch.setattr(timing, "LIMIT_SIZES", {"cpu": (1 << 22, 512)})
    monkeypatch.setattr(timing, "SECONDS", {"cpu": 0.01})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("name", BENCHES)
def test_cases(name: str, small: None, triton_device: torch.device, launches: Counter[str]) -> None:
    """Counts, the check of ours, and that every implementation runs, and runs again on the same inputs."""
    if triton_device.type != "cpu":
        pytest.skip("for the interpreter; on a GPU the benches run themselves")
    _, counts, kernels = BENCHES[name]
    found = []
    for case in bench(name).cases(CPU):
        found.append((case.name, case.bytes, case.flops))
        assert case.kernel == name and next(iter(case.runs)).startswith("fastcpt") and len(case.runs) > 1
        assert case.ratios.keys() <= case.runs.keys()
        case.check()
        rounds: list[list[Tensor]] = [[], []]
        for results in rounds:
            for run in case.runs.values():
                run.prepare()
                results += [x.clone() for x in pytree.tree_leaves(run.call()) if isinstance(x, Tensor)]
        assert all(torch.equal(one, other) for one, other in zip(*rounds, strict=True)), "it works on its own result"
    assert found == counts
    assert kernels <= launches.keys()


Function = Callable[..., Any]


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Function], Function]:
    """An error in the first result of a function."""

    def breaks(function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            return change(result) if isinstance(result, Tensor) else (change(result[0]), *result[1:])

        return call

    return breaks


def forgets_the_decay(step: Function) -> Function:
    return lambda p, g, m, v, decays, *rest, **options: step(p, g, m, v, [0.0] * len(decays), *rest, **options)


def one_token_too_few(choose: Function) -> Function:
    """What auto chooses gives the last token what the one before it sees."""

    def call(name: str, *rest: Any) -> Backend:
        backend = choose(name, *rest)

        def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
            y = backend.function(q, k, v, documents)
            return torch.cat((y[:, :-1], y[:, -2:-1]), dim=1)

        return replace(backend, function=attend) if name == "auto" else backend

    return call


WRONG: dict[str, tuple[Any, str, Callable[[Function], Function]]] = {
    "cross_entropy": (cross_entropy, "cross_entropy", changed(lambda x: x * 1.01)),
    "linear_cross_entropy": (linear_cross_entropy, "linear_cross_entropy_sum", changed(lambda x: x * 1.05)),
    "adamw": (adamw, "adamw_step", forgets_the_decay),
    "layer_norm": (layer_norm, "layer_norm", changed(lambda x: x + torch.eye(*x.shape))),
    "qkv_rotary": (qkv_rotary, "qkv_rotary", changed(lambda x: x.roll(1, dims=1))),
    "gelu": (gelu, "bias_gelu", changed(lambda x: x * 1.02)),
    "attention": (attention, "choose", one_token_too_few),
}


@pytest.mark.parametrize("name", BENCHES)
def test_what_is_wrong_is_not_timed(name: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, breaks = WRONG[name]
    monkeypatch.setattr(module, function, breaks(getattr(module, function)))
    monkeypatch.setattr(timing, "alternate", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=f"^{name}.* is wrong and is not timed"):
        for case in bench(name).cases(CPU):
            timing.measured(case, CPU)


def test_a_check_sees_one_wrong_element() -> None:
    exact = torch.rand(100, 100) + 0.5
    for dtype, wrong in ((torch.float32, 1.0003), (BF16, 1.03)):
        ours = exact.clone().to(dtype)
        timing.close("ours", ours, exact)
        ours[50, 50] *= wrong
        with pytest.raises(AssertionError, match="ours is wrong and is not timed"):
            timing.close("ours", ours, exact)
    with pytest.raises(AssertionError):
        timing.close("ours", exact.where(exact < exact.max(), torch.nan), exact)


def made_case(**options: Any) -> Case:
    runs = {name: Run(lambda: None) for name in ("fastcpt", "rival")}
    return Case("kernel", "case", "2 x 3", torch.float32, lambda: None, runs, **options)


def test_quantiles() -> None:
    assert timing.quantiles([5, 1, 4, 2, 3]) == pytest.approx((3.0, 1.8, 4.2))
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_arithmetic_of_memory() -> None:
    """6 MB in 2 ms are 3 GB/s; the machine copies 4 GB/s."""
    case = made_case(bytes=6_000_000, percent=70, ratios={"rival": 1.5})
    machine = {"copy": Limit(Run(lambda: None), bytes=8_000_000), "sum": Limit(Run(lambda: None), bytes=10_000_000)}
    times = {"fastcpt": [3, 2, 1], "rival": [5, 5, 5], "copy": [2, 2, 9], "sum": [2, 2, 2]}
    ours, rival, copy, total = timing.judged(case, times, machine, {"fastcpt": 1.5, "rival": None})
    assert ours == Row(
        "kernel", "case", "2 x 3", "float32", "fastcpt", 3, 2.0, pytest.approx(1.4), pytest.approx(2.6),
        3.0, None, 75.0, 1.0, ">= 70%", 1.5,
    )  # fmt: skip
    assert (rival.median_ms, rival.gb_per_s, rival.percent_of_limit) == (5.0, 1.2, pytest.approx(30.0))
    assert (rival.ratio_to_ours, rival.target, rival.peak_mb) == (2.5, ">= 1.5x", None)
    assert (copy.implementation, copy.gb_per_s, copy.percent_of_limit) == ("limit: copy", 4.0, 100.0)
    assert (total.gb_per_s, total.percent_of_limit, total.ratio_to_ours) == (5.0, 125.0, None)


def test_arithmetic_of_products() -> None:
    """6 GFLOP in 2 ms are 3 TFLOP/s."""
    machine = {"matmul": Limit(Run(lambda: None), flops=8_000_000_000)}
    times = {"fastcpt": [2.0], "rival": [1.5], "matmul": [2.0]}
    ours, rival, matmul = timing.judged(made_case(flops=6_000_000_000), times, machine, {})
    assert (ours.gb_per_s, ours.tflop_per_s, ours.percent_of_limit, ours.target) == (None, 3.0, 75.0, "")
    assert (rival.tflop_per_s, rival.ratio_to_ours, matmul.tflop_per_s) == (4.0, 0.75, 4.0)


@pytest.mark.parametrize("impostor", ["fastcpt", "rival"])
def test_what_the_machine_cannot_do_is_refused(impostor: str) -> None:
    machine = {"copy": Limit(Run(lambda: None), bytes=8_000_000), "sum": Limit(Run(lambda: None), bytes=5_000_000)}
    times = {"fastcpt": [3.0], "rival": [3.0], "copy": [2.0, 1.0, 2.0], "sum": [1.0, 1.0]}
    timing.judged(made_case(bytes=8_000_000), {**times, impostor: [1.0]}, machine, {})  # as fast as the fastest copy
    with pytest.raises(AssertionError, match=f"{impostor}: 8.081 GB/s is above 8,"):
        timing.judged(made_case(bytes=8_000_000), {**times, impostor: [0.99]}, machine, {})


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are of `call` alone, and of each implementation in turn."""
    order: list[str] = []
    now = 0.0

    def spend(name: str, seconds: float) -> Callable[[], None]:
        def act() -> None:
            nonlocal now
            order.append(name)
            now += seconds

        return act

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    runs = {"a": Run(spend("a", 0.25), spend("prepare", 5.0)), "b": Run(spend("b", 0.5))}
    times = timing.alternate(runs, CPU, seconds=6.0)
    assert times == {"a": [250.0] * 8, "b": [500.0] * 8}  # 0.75 s a round, and one round to know that
    assert order == ["prepare", "a", "b"] * 9
    assert len(timing.alternate(runs, CPU, seconds=0.0)["b"]) == timing.FEWEST
    assert len(timing.alternate(runs, CPU, seconds=1e9)["b"]) == timing.MOST


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that count what was put into the stream before them, for want of a GPU."""
    stream: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.place = len(stream)
            stream.append("event")

        def elapsed_time(self, end: "Event") -> float:
            assert stream[-1] == "synchronize"
            return float(end.place - self.place)

    class Cache:
        def zero_(self) -> None:
            stream.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stream.append("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: Cache())
    runs = {name: Run(lambda name=name: stream.append(name), lambda: stream.append("prepare")) for name in "ab"}
    assert timing.alternate(runs, torch.device("cuda"), seconds=0.0) == {"a": [2.0] * 7, "b": [2.0] * 7}
    once = ["prepare", "flush", "event", "a", "event", "prepare", "flush", "event", "b", "event"]
    assert stream == [*once, "synchronize", *once * 7, "synchronize"]


def test_a_rival_that_does_not_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("no such chip\nand more")

    runs = {"fastcpt": Run(lambda: None), "rival": Run(fails)}
    assert timing.warm(runs, needed={"fastcpt"}).keys() == {"fastcpt"}
    assert capsys.readouterr().out == "rival is left out: RuntimeError: no such chip\n"
    with pytest.raises(RuntimeError, match="no such chip"):
        timing.warm(runs, needed={"rival"})
    assert timing.optional("no_such_rival") is None
    assert capsys.readouterr().out.startswith("no rival from no_such_rival here: ModuleNotFoundError")


def test_benches_of_a_cpu(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From end to end: a table a case, a file with its columns, and no line of what needs a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    bench_kernels.main(tmp_path / "results")
    printed = capsys.readouterr().out
    assert "no GPU: layer_norm, qkv_rotary, gelu, attention cannot be timed\n" in printed
    with open(tmp_path / "results" / "kernels_cpu.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        "kernel", "case", "shape", "dtype", "implementation", "runs", "median_ms", "p20_ms", "p80_ms",
        "gb_per_s", "tflop_per_s", "percent_of_limit", "ratio_to_ours", "target", "peak_mb",
        "device", "power_limit", "driver", "torch", "triton", "date",
    ]  # fmt: skip
    timed = [(line["kernel"], line["implementation"]) for line in lines if not line["implementation"].startswith("lim")]
    assert timed == [
        *(("cross_entropy", name) for name in ("fastcpt in place", "fastcpt", "F.cross_entropy", "F.cross_entropy compiled")),
        *(
            ("linear_cross_entropy", name)
            for name in (
                "fastcpt", "fastcpt, losses apart", "F.linear + fastcpt in place", "F.linear + F.cross_entropy",
                "F.linear + F.cross_entropy compiled",
            )
        ),
        *[("adamw", name) for name in ("fastcpt", "torch.optim.AdamW fused", "torch.optim.AdamW foreach")] * 2,
    ]  # fmt: skip
    for line in lines:
        low, median, high = (float(line[name]) for name in ("p20_ms", "median_ms", "p80_ms"))
        assert 0 < low <= median <= high and int(line["runs"]) >= timing.FEWEST
        assert bool(line["gb_per_s"]) != bool(line["tflop_per_s"]) and float(line["percent_of_limit"]) > 0
        assert line["torch"] == torch.__version__ and "threads" in line["device"] and not line["peak_mb"]
        assert line["implementation"] in printed


def test_other_kernels_keep_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels_gpu.csv"

    def row(kernel: str, median: float) -> Row:
        return Row(kernel, "case", "1", "float32", "fastcpt", 7, median, 1.0, 3.0, None, 2.0, 50.0, 1.0, "", None)

    def read() -> list[tuple[str, str, str]]:
        with open(path, newline="") as file:
            return [(line["kernel"], line["median_ms"], line["device"]) for line in csv.DictReader(file)]

    bench_kernels.write(path, [row("gelu", 1.0), row("adamw", 2.0)], {"device": "old"}, ("gelu", "adamw"))
    bench_kernels.write(path, [row("gelu", 1 / 3)], {"device": "new"}, ("gelu",))
    assert read() == [("adamw", "2", "old"), ("gelu", "0.33333", "new")]
    bench_kernels.write(path, [row("gelu", 4.0)], {"device": "new"}, bench_kernels.KERNELS)
    assert read() == [("gelu", "4", "new")]


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Path | None, Any]] = []
    monkeypatch.setattr(bench_kernels, "main", lambda output, kernels: calls.append((output, kernels)))
    bench_kernels.command([])
    bench_kernels.command(["gelu", "--output", "here"])
    assert calls == [(None, bench_kernels.KERNELS), (Path("here"), ["gelu"])]
    with pytest.raises(SystemExit, match="2"):
        bench_kernels.command(["geglu"])
    assert "no kernel is called geglu; there are cross_entropy" in capsys.readouterr().err


def test_every_kernel_has_a_bench() -> None:
    folder = VISIT.parent.parent / "kernels"
    kernels = {path.stem for path in folder.glob("[a-z]*.py")} - {"launch"}
    assert kernels | {"attention"} == set(bench_kernels.KERNELS) == set(BENCHES)


def stub(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_visit_goes_on_after_a_failure(gpu: bool, tmp_path: Path) -> None:
    """With a stand-in for python that has (no) GPU, no installed fastcpt, and a bench that fails."""
    stub(
        tmp_path / "python",
        f"""
        case "$*" in
          *cuda.is_available*) exit {0 if gpu else 1} ;;
          "-c import fastcpt.kernels") [ -e "${{PYTHONPATH:-nowhere}}/fastcpt/kernels/gelu.py" ] ;;
          *pip*) exit 1 ;;
          *"bench_kernels gelu"*) echo "gelu is wrong"; exit 7 ;;
          *) [ -e "${{PYTHONPATH:-nowhere}}/fastcpt/kernels/gelu.py" ] && echo "ran $*" ;;
        esac""",
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    stub(tmp_path / "nvidia-smi", "echo a card")
    done = subprocess.run(
        ["bash", str(VISIT), "visit"],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr == "", done
    with open(tmp_path / "visit" / "steps.csv", newline="") as file:
        codes = {line["step"]: int(line["exit_code"]) for line in csv.DictReader(file)}
    tests = [*BENCHES, "gpu", "optim"]
    native = {f"test_{name}" for name in tests if (VISIT.parent.parent / "tests" / f"test_{name}.py").exists()}
    trained = {f"{what}_{name}" for what in ("run", "bench_train") for name in visit.TOKENS}
    steps = {"nvidia_smi", "install", "versions", "bench_data", *({*native, "static", *trained} if gpu else ())}
    assert codes.keys() == steps | {f"bench_{name}" for name in BENCHES}
    assert {step for step, code in codes.items() if code} == {"install", "bench_gelu"} and codes["bench_gelu"] == 7
    log = (tmp_path / "visit" / "visit.log").read_text()
    assert "gelu is wrong" in log and "a card" in log
    assert f"bench_kernels adamw --output {tmp_path}/visit" in log
    assert ("no GPU: native tests are skipped" in log) != gpu
    assert (f"bench train --model pythia-1.4b --output {tmp_path}/visit" in log) == gpu
    assert done.stdout.splitlines()[-1].endswith("of the steps, 2 failed")


def test_a_visit_takes_a_folder() -> None:
    done = subprocess.run(["bash", str(VISIT)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == f"usage: {VISIT} FOLDER [PART...]\n"
    for parts in (["nothing"], ["data", "trains"]):
        done = subprocess.run(
            ["bash", str(VISIT), "visit", *parts], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and done.stderr == f"{VISIT}: {parts[-1]}: no such part\n"


def test_a_part_of_a_visit(tmp_path: Path) -> None:
    stub(tmp_path / "python", 'case "$*" in *cuda.is_available*) exit 0 ;; *) echo "ran $*" ;; esac')
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    command = ["bash", str(VISIT), str(tmp_path / "visit"), "runs", "data"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    with open(tmp_path / "visit" / "steps.csv", newline="") as file:
        found = {line["step"] for line in csv.DictReader(file)} - {"nvidia_smi"}
    assert found == {"versions", "bench_data", *(f"run_{name}" for name in visit.TOKENS)}


def test_a_run_of_a_visit_is_one_of_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nine steps of two sequences, on CPU: a line of every second one and the last, a checkpoint, and the memory used."""
    options = ["--train.compile=false", "--train.precision=fp32", "--model.layers=1"]
    assert visit.main("pythia-14m", tmp_path, 9 * 64, 64, 32, options) == 0
    lines = [json.loads(line) for line in (tmp_path / "run_pythia-14m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9] and all(line["tokens_per_second"] > 0 for line in lines)
    assert "micro-batches of 2 of its 2 sequences: all of them fit" in capfd.readouterr().out
    assert visit.main("pythia-14m", tmp_path, 64, 64, 32, ["--optim.lr=-1"]) == 2
