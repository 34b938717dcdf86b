"""Hung and dead processes, replicas that differ, steps that are skipped. Trials of two ranks that hang or die are those of
`soak_hangs.py`."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcpt import UserError, checkpoint, guard, replicas, train, watch
from fastcpt.config import Config, Count, Source
from fastcpt.data import batches
from fastcpt.parallel import World
from fastcpt.watch import Process, _culprits

ALONE = World(0, 1, torch.device("cpu"))
HERE = Path(__file__).parent


# --- Who is to blame -----------------------------------------------------------------------------------------------


def record(beats: int, ticks: int, where: str = "") -> dict[str, Any]:
    return {"step": beats, "phase": "training", "beats": beats, "ticks": ticks, "where": where, "left": False}


COLLECTIVE = "all_reduce (/lib/torch/distributed/distributed_c10d.py:1)"
BACKWARD = "_engine_run_backward (/lib/torch/autograd/graph.py:1)"
BUCKETS = "_pre_forward (/lib/torch/nn/parallel/distributed.py:1)"
SLEEP = "hook (/home/x/hook.py:3)"


@pytest.mark.parametrize(
    ("before", "after", "ranks", "reason"),
    [
        # Stopped: what it says stays the same. The others are alive, wherever they are.
        ([record(5, 1, COLLECTIVE), record(5, 7)], [record(5, 2, COLLECTIVE), record(5, 7)], [1], "does not answer"),
        ([record(5, 1, COLLECTIVE), None], [record(5, 2, COLLECTIVE), None], [1], "does not answer"),
        # Behind.
        ([record(4, 1, SLEEP), record(5, 1)], [record(4, 1, SLEEP), record(5, 2, BACKWARD)], [0], "it is in hook"),
        # All in the same step: the one that waits for no other.
        ([record(5, 1, BACKWARD), record(5, 1, SLEEP)], [record(5, 1, BACKWARD), record(5, 1, SLEEP)], [1], "in hook"),
        ([record(5, 1, BUCKETS), record(5, 1, SLEEP)], [record(5, 1, BUCKETS), record(5, 1, SLEEP)], [1], "in hook"),
        ([record(5, 1, BACKWARD)] * 2, [record(5, 1, BACKWARD)] * 2, [0, 1], "_engine_run_backward"),
    ],
)  # fmt: skip
def test_the_process_to_blame(before: list, after: list, ranks: list[int], reason: str) -> None:
    found, reasons = _culprits(before, after)
    assert found == ranks and all(reason in each for each in reasons)


def test_a_process_is_dead_when_it_is_gone_a_zombie_or_another() -> None:
    me = Process.this()
    assert not me.is_dead(me) and me._replace(born="1").is_dead(me)
    child = subprocess.Popen(["sleep", "0"])
    other = me._replace(pid=child.pid, born=watch._stat(child.pid)[1])
    deadline = 100
    while not other.is_dead(me) and deadline:
        deadline -= bool(subprocess.run(["sleep", "0.05"], check=True))
        deadline -= 1
    assert other.is_dead(me)  # a zombie: nobody has asked for its exit code
    child.wait()
    assert other.is_dead(me)
    assert not other._replace(host="elsewhere").is_dead(me)  # cannot be known from here


ALONE_AND_ASLEEP = """
import sys, time, torch
from pathlib import Path
from fastcpt.parallel import World
from fastcpt.watch import Watch
with Watch(World(0, 1, torch.device("cpu")), Path(sys.argv[1]), 0.5) as watch:
    for step in range(3):
        watch.beat(step, "training")
    time.sleep(100)
"""


def test_one_process_that_hangs_says_where(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE_AND_ASLEEP, str(tmp_path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == watch.LOST
    assert done.stderr.startswith("fastcpt: rank 0 (") and "has not finished step 3 for " in done.stderr
    assert 'File "<string>", line 9 in <module>' in (tmp_path / "stacks-rank0.txt").read_text()
    assert (tmp_path / "exit-code").read_text() == f"{watch.LOST}\n"


SHRINKING = """
import json, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import stops
folder = Path(sys.argv[2])
stops.prepare(folder / "data")
place = stops.place_of(folder / "data", folder)
fault = {"what": "shrink", "where": "step", "when": 3, "path": str(folder / "data/new/shard-00000.bin")}
ranks = stops.Ranks(folder, fault)
print(json.dumps([ranks.wait(), ranks.log.read_text(), ranks.left_over()]))
"""


def test_a_shard_that_shrinks_under_two_processes_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHRINKING, str(HERE), str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, log, left = json.loads(done.stdout.splitlines()[-1])
    said = [line for line in log.splitlines() if line.startswith("fastcpt: ")]
    assert codes == [2, 2] and not left, log
    assert "shard-00000.bin: 100 bytes while reading" in said[0] and "Bus error" not in log


# --- One folder, one run -------------------------------------------------------------------------------------------


def test_a_second_run_is_told_who_has_the_folder(tmp_path: Path) -> None:
    held = checkpoint.lock(tmp_path)
    with pytest.raises(UserError, match=rf"\(process {os.getpid()} on {os.uname().nodename}, since \d{{4}}-.*\)"):
        checkpoint.lock(tmp_path)
    held.close()
    checkpoint.lock(tmp_path).close()


# --- Replicas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_changes_the_hash(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replicas.CHUNK, "cpu", 64)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(11, 19, generator=generator).to(dtype), torch.randn(3, generator=generator).to(dtype)]
    before = replicas.hashes(tensors)
    assert len(set(before.tolist())) == 2
    bits = tensors[0].view(replicas.BITS[tensors[0].element_size()]).flatten()
    width = 8 * tensors[0].element_size()
    for place in range(len(bits)):
        for bit in (0, 7, width - 2, width - 1):
            mask = torch.tensor(1 << bit if bit < width - 1 else -(1 << bit), dtype=bits.dtype)
            bits[place] ^= mask
            after = replicas.hashes(tensors)
            assert after[0] != before[0] and after[1] == before[1]
            bits[place] ^= mask
    bits[[0, 1]] = bits[[1, 0]]
    assert replicas.hashes(tensors)[0] != before[0]


def test_the_sum_is_that_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Python's integers, which have no end."""
    monkeypatch.setitem(replicas.CHUNK, "cpu", 8)
    tensor = torch.randn(21, generator=torch.Generator().manual_seed(0))
    bits = np.frombuffer(tensor.numpy().tobytes(), "<i4").tolist()
    exact = sum((2 * place + 1) * replicas.FACTOR * value for place, value in enumerate(bits)) % 2**64
    assert replicas.hashes([tensor]).item() % 2**64 == exact


def test_most_are_right() -> None:
    a, b, c = (1, 2), (1, 3), (0, 2)
    assert replicas.odd_ones_out([a, a, a]) == []
    assert replicas.odd_ones_out([a, b, a, c, a]) == [1, 3]
    assert replicas.odd_ones_out([a, b]) == [0, 1]
    assert replicas.odd_ones_out([a, a, b, b]) == [0, 1, 2, 3]


# Runs a pickled configuration as one rank. Meanwhile: rank 1 flips one bit of a weight after step 3.
FLIPPING = """
import os, pickle, sys, torch
from fastcpt import train
config = pickle.load(open(sys.argv[1], "rb"))
real = train.train_step
def flipping(state, batch):
    result = real(state, batch)
    if os.environ["RANK"] == "1" and state.step == 3:
        state.model.layers[1].mlp.dense_h_to_4h.weight.data.view(torch.int32)[5, 7] ^= 1
    return result
train.train_step = flipping
train.parse = lambda arguments: config
print(train.main([]))
"""


@pytest.fixture
def make_config(tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any) -> Callable[..., Config]:
    write_shards(tmp_path / "new", random_documents(0, 400))

    def make(name: str = "run", steps: int = 6, **sections: dict[str, Any]) -> Config:
        data = {"train": [Source(name="new", path=str(tmp_path / "new"), weight=1.0)], "seq_len": 16}
        sections["train"] = {"tokens": Count(steps * 96), "micro_batch": 2} | sections.get("train", {})
        sections["run"] = {"log_every": 3, "save_every": 2} | sections.get("run", {})
        return tiny_config(tmp_path / name, data=data, **sections)

    return make


@pytest.mark.parametrize(("every", "step"), [(0, 4), (3, 3)])
def test_replicas_that_differ_stop_the_run(
    tmp_path: Path, make_config: Callable, run_ranks: Callable, capfd: Any, every: int, step: int
) -> None:
    config = make_config(run={"check_every": every})
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    said = [output.splitlines()[-1] for output in run_ranks(FLIPPING, 2, tmp_path / "config")]
    assert said == ["4", "4"]
    output = Path(config.run.output)
    assert checkpoint.steps(output) == [2] and (output / "exit-code").read_text() == "4\n"


# --- Steps that are skipped ----------------------------------------------------------------------------------------


def events(config: Config) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" in line]


def poisoned(samples: set[int]) -> Callable[..., Any]:
    """`setup`, with a model that loses its head at these samples."""
    real = train.setup

    def setup(config: Config) -> train.State:
        state = real(config)
        windows = {state.mixture.windows(number, 1)[0, :-1].tobytes() for number in samples}

        def after(module: Any, arguments: Any, results: tuple[torch.Tensor, torch.Tensor]) -> Any:
            rows = [row.to(torch.uint16).numpy().tobytes() in windows for row in arguments[0]]
            losses_BT = torch.where(torch.tensor(rows)[:, None], torch.nan, results[1])
            return results[0] * (torch.nan if any(rows) else 1.0), losses_BT

        state.model.register_forward_hook(after)
        return state

    return setup


def test_samples_whose_loss_is_not_finite_are_named(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    config = make_config(run={"tensorboard": True})
    monkeypatch.setattr(train, "setup", poisoned({7, 11, 26}))
    state = train.train(config)
    assert [(line["step"], line["tokens"], line["event"]) for line in events(config)] == [
        (2, 192, {"kind": "not finite", "samples": [6, 12], "not_finite": [7, 11], "ranks": [0]}),
        (5, 480, {"kind": "not finite", "samples": [24, 30], "not_finite": [26], "ranks": [0]}),
    ]
    assert state.skipped.tolist() == [2, 0]
    assert "skipped (not finite): samples 6 to 11; the loss of [7, 11] is not finite, rank 0" in capfd.readouterr().out


POISONED_RANK = """
import pickle, sys
sys.path.insert(0, sys.argv[2])
from test_watch import poisoned
from fastcpt import train
config = pickle.load(open(sys.argv[1], "rb"))
train.setup = poisoned({7, 11, 26})
state = train.train(config)
print([state.skipped.tolist(), [float(p.double().sum()) for p in state.model.parameters()]])
"""


def test_two_processes_skip_and_name_alike(tmp_path: Path, make_config: Callable, run_ranks: Callable) -> None:
    config = make_config(train={"skip_spikes": 6.0})
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = POISONED_RANK.replace(
        "sys.path.insert(0, sys.argv[2])", "sys.path.insert(0, sys.argv[2]); os.environ['TRITON_INTERPRET'] = '1'"
    )
    said = [output.splitlines()[-1] for output in run_ranks(code, 2, tmp_path / "config", HERE)]
    assert said[0] == said[1] and said[0].startswith("[[2, 0]")
    found = [(line["event"]["not_finite"], line["event"]["ranks"]) for line in events(config)]
    assert found == [([7, 11], [0, 1]), ([26], [0])]


def test_a_good_step_does_not_wait_for_the_device(make_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step, or of the guard, reads a value out of a tensor."""
    state = train.setup(make_config(train={"skip_spikes": 6.0}))
    reads: list[Any] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(function)
            return function(*arguments, **(options or {}))

    for windows in batches(state.mixture, 0, 3, 6, 0, 1):
        with Reads():
            train.train_step(state, windows)
    assert not reads


def test_a_spike_is_what_stands_out_from_the_last_steps() -> None:
    """Against NumPy on the plain numbers."""
    generator = np.random.default_rng(0)
    spikes, kept = guard.Spikes(4.0, torch.device("cpu")), []
    for step in range(400):
        values = generator.normal((5.0, 1.0), (0.1, 0.2))
        if step % 50 == 49:
            values[step // 50 % 2] += 3.0
        window = np.array(kept[-guard.WINDOW :])
        expected = len(kept) >= guard.LEAST and bool((values > window.mean(0) + 4 * window.std(0, ddof=1)).any())
        spiked = spikes.judge(torch.tensor(values[0]), torch.tensor(values[1]))
        assert bool(spiked) == expected and (step % 50 != 49 or step < guard.LEAST or expected)
        spikes.record(spiked.float())
        if not expected:
            kept.append(values)
    assert spikes.count == guard.WINDOW and len(kept) < 395
    again = guard.Spikes(4.0, torch.device("cpu"))
    again.load_(json.loads(json.dumps(spikes.to_dict())))
    assert torch.equal(again.window, spikes.window) and again.count == spikes.count


@pytest.mark.parametrize("stop", [3, 8])
def test_spikes_are_skipped_and_a_resumed_run_skips_the_same(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(guard, "LEAST", 4)
    real_setup, real_step = train.setup, train.train_step

    def setup(config: Config) -> train.State:
        state = real_setup(config)
        weight = state.model.layers[0].attention.dense.weight
        weight.register_hook(lambda gradient: gradient * (1e4 if state.step + 1 in (7, 10) else 1.0))
        return state

    def stopping(state: train.State, batch: Any) -> Any:
        if state.step == stop and "cut" in state.config.run.output and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return real_step(state, batch)

    stopped: list[int] = []
    monkeypatch.setattr(train, "setup", setup)
    monkeypatch.setattr(train, "train_step", stopping)
    options = {"train": {"skip_spikes": 20.0}, "run": {"save_every": 2, "log_every": 1}}
    whole = train.train(make_config("whole", 12, **options))
    config = make_config("cut", 12, **options)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    cut = train.train(config)
    assert [(line["step"], line["event"]["kind"]) for line in events(config)] == [(7, "spike"), (10, "spike")]
    assert events(config) == events(whole.config)
    assert cut.skipped.tolist() == whole.skipped.tolist() == [2, 0]
    ours, theirs = train.named_tensors(cut), train.named_tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    norms = [json.loads(line).get("grad_norm") for line in (Path(config.run.output) / "metrics.jsonl").open()]
    assert max(norm for norm in norms if norm) > 100  # the log has the norm that was too large
