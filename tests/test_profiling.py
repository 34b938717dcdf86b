"""`run.profile`: what it writes, that the run is as without it, and its numbers against torch's own."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastcpt import profiling, train
from fastcpt.config import Config, Count, Source
from fastcpt.metrics import TIMING_FIELDS
from fastcpt.profiling import own_times, summarise, table, work
from fastcpt.signals import Preempted
from fastcpt.state import named_tensors


@pytest.fixture
def make(tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any) -> Any:
    """make(name, **run): a run of 8 steps."""
    write_shards(tmp_path / "new", random_documents(0, 60))

    def config(name: str, **run: Any) -> Config:
        data = {"train": [Source(name="new", path=str(tmp_path / "new"), weight=1.0)], "seq_len": 16}
        return tiny_config(
            tmp_path / name, data=data, train={"tokens": Count(8 * 96), "batch_tokens": Count(96), "compile": False},
            run={"log_every": 1, "save_every": 2, "tensorboard": False} | run,
        )  # fmt: skip

    return config


def lines(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.run.output) / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_FIELDS} for line in text.splitlines()]


def traced(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def test_a_profiled_run_is_as_one_that_is_not(make: Any) -> None:
    plain, profiled = make("plain"), make("profiled", profile=3)
    left, right = named_tensors(train.train(plain)), named_tensors(train.train(profiled))
    assert lines(plain) == lines(profiled) and len(lines(plain)) == 8
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert not (Path(plain.run.output) / "profile").exists()
    folder = Path(profiled.run.output) / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3.json.gz", "step-3.txt"]
    events = [event for event in traced(folder / "step-3.json.gz")["traceEvents"] if event.get("cat") == "cpu_op"]
    assert sum(event["name"] == "aten::_fused_adamw_" for event in events) % 3 == 0
    assert {event["args"]["Input Dims"][0][-1] for event in events if event["name"] == "aten::mm"} >= {24}
    text = (folder / "step-3.txt").read_text()
    assert text.startswith("3 steps, ") and "aten::mm\n" in text and " matmul  aten::" in text


@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_that_is_stopped_is_profiled_when_it_goes_on_and_only_once(
    make: Any, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("run", profile=3)
    step = train.train_step

    def stopped(state: Any, windows: Any) -> Any:
        if state.step == stop:
            raise Preempted
        return step(state, windows)

    monkeypatch.setattr(train, "train_step", stopped)
    with pytest.raises(Preempted):
        train.train(config)
    path = Path(config.run.output) / "profile" / "step-3.txt"
    assert not path.exists()
    monkeypatch.setattr(train, "train_step", step)
    train.train(config)
    before = path.read_bytes()
    assert before.startswith(b"3 steps, ")
    train.train(make("run", profile=3, log_every=2))
    assert path.read_bytes() == before


def test_the_last_steps_are_profiled_as_far_as_they_go(make: Any) -> None:
    config = make("run", profile=7)
    train.train(config)
    assert (Path(config.run.output) / "profile" / "step-7.txt").read_text().startswith("1 steps, ")


def products() -> None:
    a, b, bias = torch.randn(48, 40), torch.randn(40, 56), torch.randn(56)
    a.mm(b)
    torch.addmm(bias, a, b)
    x, y = torch.randn(3, 16, 24).bfloat16(), torch.randn(3, 24, 8).bfloat16()
    x.bmm(y)
    torch.baddbmm(torch.zeros(3, 16, 8).bfloat16(), x, y)


def attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 64, 16, requires_grad=True).unbind()
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def profiled(function: Any, path: Path) -> tuple[Any, dict[str, Any]]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as run:
        function()
    run.export_chrome_trace(str(path))
    return run, traced(path)


def total_flops(function: Any, path: Path) -> float:
    _, trace = profiled(function, path)
    return sum(done[0] for event in trace["traceEvents"] if event.get("cat") == "cpu_op" and (done := work(event)))


def test_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() > 0
    assert total_flops(products, tmp_path / "t.json.gz") == counter.get_total_flops()
    # Of attention on CPU its counter knows nothing, but its formulas do; they count it in full, and this as causal.
    shape = (2, 4, 64, 16)
    full = sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)
    assert total_flops(attention, tmp_path / "t.json.gz") == full / 2


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    parameters = [torch.nn.Parameter(torch.randn(10, 10)), torch.nn.Parameter(torch.randn(7))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def function() -> None:
        a.mm(b)
        torch.empty(64, 32).copy_(a)
        optimizer.step()

    _, trace = profiled(function, tmp_path / "t.json.gz")
    operators = [event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    found = {event["name"]: done for event in operators if (done := work(event))}
    assert found["aten::mm"] == (2 * 64 * 32 * 16, a.nbytes + b.nbytes + 64 * 16 * 2)
    assert found["aten::copy_"] == (0.0, a.nbytes + 64 * 32 * 4)
    # Reads parameter, gradient and both moments, writes all but the gradient.
    assert found["aten::_fused_adamw_"] == (0.0, 7 * 4 * 107)


def test_own_times_and_allocations_are_those_of_torch(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []

    def function() -> None:
        products()
        F.layer_norm(torch.randn(64, 32), (32,)).softmax(-1)
        kept.append(torch.zeros(1000, 250))

    run, trace = profiled(function, tmp_path / "t.json.gz")
    theirs = {each.key: (each.count, each.self_cpu_time_total) for each in run.key_averages() if each.key != "[memory]"}
    operators, kernels = summarise(trace, 1e12, 1e10)
    ours = {row.name: (row.calls, row.seconds * 1e6) for row in operators if row.name in theirs}
    assert kernels == [] and len(ours) > 8 and theirs.keys() == ours.keys()
    for name, (calls, microseconds) in theirs.items():
        # Both are sums of times in the trace, which it has to a thousandth of a microsecond.
        assert ours[name][0] == calls and ours[name][1] == pytest.approx(microseconds, abs=0.01 * calls + 0.1)
    assert sum(row.allocated for row in operators if row.name == "aten::empty") >= kept[0].nbytes


def test_on_a_gpu_rows_are_kernels_with_the_work_of_what_launched_them() -> None:
    def op(name: str, number: int, dims: Any, start: float) -> dict[str, Any]:
        return {
            "ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": start, "dur": 5.0,
            "args": {"External id": number, "Input Dims": dims, "Input type": ["c10::BFloat16"] * len(dims)},
        }  # fmt: skip

    def kernel(name: str, number: int, duration: float) -> dict[str, Any]:
        return {
            "ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": 0.0, "dur": duration,
            "args": {"External id": number},
        }  # fmt: skip

    events = [
        op("aten::mm", 1, [[1000, 1000], [1000, 1000]], 0.0), op("triton_poi_fused_add_0", 2, [[1000], [1000], []], 6.0),
        kernel("gemm", 1, 40.0), kernel("splitk", 1, 10.0), kernel("triton_poi_fused_add_0", 2, 50.0),
    ]  # fmt: skip
    operators, kernels = summarise({"traceEvents": events}, matmul_rate=100e12, memory_rate=1e8)
    rows = {row.name: row for row in kernels}
    assert [row.known for row in operators] == [0, 0]
    assert (rows["gemm"].least, rows["gemm"].known, rows["splitk"].known) == (pytest.approx(6e6 / 1e8), 40e-6, 0.0)
    assert (rows["gemm"].by, rows["triton_poi_fused_add_0"].by) == ("memory", "memory")
    assert rows["triton_poi_fused_add_0"].least == pytest.approx(4000 / 1e8)
    text = table({"traceEvents": events}, 1, 200e-6, matmul=100e12, memory=1e12).splitlines()
    assert text[0] == "1 steps, 0.2 ms each under the profiler; kernels take 50.0% of that"
    # 2e9 operations at 1e14 a second are 20 of 40 microseconds.
    assert any(line.split() == ["40.0%", "0.04", "1", "50", "matmul", "gemm"] for line in text)


def test_events_of_one_start_are_told_apart_by_their_length() -> None:
    events = [
        {"ph": "X", "name": name, "ts": 0.0, "dur": duration, "pid": 1, "tid": 1}
        for name, duration in (("inner", 4.0), ("outer", 10.0))
    ]
    assert {event["name"]: own for event, own in own_times(events)} == {"outer": 6.0, "inner": 4.0}


def test_the_rates_of_the_roofline_are_measured() -> None:
    assert 1e8 < profiling.memory_rate(torch.device("cpu")) < 1e13
