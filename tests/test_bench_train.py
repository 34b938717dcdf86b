"""The bench of training steps: what it compares does the same work, and what cannot be true is not written down."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt.benchmarks import bench_train, train_rivals
from fastcpt.benchmarks.bench_train import Case, Row, Worker, agree, prepare, row, table, turns, write
from fastcpt.metrics import flops_per_token
from fastcpt.model import Architecture

TINY = Case("tiny", Architecture(2, 32, 4, 256), 4, 24, 2, 1.0)
CPU = torch.device("cpu")


class Told:
    """A worker that answers what it is told, as one in a process of its own."""

    def __init__(self, name: str, milliseconds: float) -> None:
        self.name, self.versions, self.first_s, self.milliseconds, self.asked = name, "1.0", 2.5, milliseconds, 0

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked += request.get("steps", 0)
        return {"ms": [self.milliseconds] * request.get("steps", 0), "share": 0.5, "mb": 7.0}


def a_row(name: str, speed: float, product: float) -> Row:
    told: Any = Told(name, 1.0)
    return row(TINY, told, [speed], [2.0], [product], 0.0, 1.0)


def test_ours_and_transformers_take_the_same_steps(tmp_path: Path) -> None:
    """Two micro-batches a step, eager, in this process: the losses of five steps."""
    prepare(TINY, tmp_path)
    job = {**json.loads((tmp_path / "job.json").read_text()), "compile": False}
    losses = {}
    for name in (bench_train.OURS, "transformers fp32"):
        make, options, _ = train_rivals.IMPLEMENTATIONS[name]
        step = make(tmp_path, job, CPU, **options)
        losses[name] = [step(number) for number in range(5)]
    ours, theirs = losses.values()
    assert agree("ours", ours, theirs) < bench_train.LOSS_TOLERANCE
    assert ours[0] - ours[4] > 20 * bench_train.LOSS_TOLERANCE  # they move by more than the tolerance would let pass
    with pytest.raises(AssertionError, match="it does other work, and is not timed"):
        agree("ours", [ours[1], ours[0]], theirs[:2])


def test_a_worker_answers_and_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(TINY, tmp_path)
    worker = Worker("transformers sdpa bf16", sys.executable, tmp_path, tmp_path / "cache", CPU)
    assert worker.missing is None and worker.versions.startswith("transformers 5") and worker.first_s > 0
    answer = worker.ask(steps=2)
    assert len(answer["ms"]) == len(answer["losses"]) == 2 and len(worker.losses) == 1
    profile = worker.ask(profile=1)
    assert 0 < profile["share"] < 1 and any(key == "aten::addmm" for key, _, _ in profile["table"])
    assert worker.ask(peak=True)["mb"] > 50
    worker.close()
    assert worker.process.returncode == 0
    (tmp_path / "litgpt.py").write_text("raise ImportError('no litgpt here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    absent = Worker("litgpt", sys.executable, tmp_path, tmp_path / "cache", CPU)
    assert absent.missing == "no litgpt here"
    absent.close()
    (tmp_path / "batches.npy").write_bytes(b"no array")
    with pytest.raises(AssertionError, match=r"transformers fp32 failed with code 1:\n(.|\n)*ValueError"):
        Worker("transformers fp32", sys.executable, tmp_path, tmp_path / "cache", CPU)


def test_turns_alternate_and_ratios_are_of_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "matmul_rate", lambda device: 1e12)
    ours: Any = Told("ours", 10.0)
    rival: Any = Told("theirs", 25.0)
    found = turns(ours, rival, 1000, CPU)
    assert found == [(100_000.0, 40_000.0, 1e12)] * bench_train.PAIRS and len(found) >= 5
    assert ours.asked > rival.asked


def test_a_rate_above_the_machines_fails() -> None:
    flops = flops_per_token(TINY.arch, TINY.seq_len, causal=True)
    assert a_row("theirs", 1000, 1000 * flops / 0.99).mfu_causal == pytest.approx(99)
    with pytest.raises(AssertionError, match="101% of the rate of a matrix product cannot be true"):
        a_row("theirs", 1000, 1000 * flops / 1.01)


def test_a_rival_below_what_is_known_of_it_fails_on_a_like_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    like = 1000 * flops_per_token(TINY.arch, TINY.seq_len)
    monkeypatch.setattr(bench_train, "LIKE", like)
    monkeypatch.setattr(bench_train, "EXPECTED", {("tiny", "theirs"): 500})
    assert a_row("theirs", 460, like).tokens_per_s == 460
    with pytest.raises(AssertionError, match="440 tokens/s, and 500 on a machine like this"):
        a_row("theirs", 440, like)
    assert a_row("theirs", 440, 2 * like).tokens_per_s == 440  # another machine says nothing


def test_rows_of_other_models_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results" / "train.csv"
    first = a_row("fastcpt", 1000, 1e12)
    write(path, [first, dataclasses.replace(first, case="other", tokens_per_s=5.0)], {"device": "one"})
    write(path, [dataclasses.replace(first, tokens_per_s=7.0)], {"device": "two"})
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["tokens_per_s"], line["device"]) for line in lines] == [
        ("other", "5", "one"),
        ("tiny", "7", "two"),
    ]
    assert "tiny: fastcpt" in table([first])
