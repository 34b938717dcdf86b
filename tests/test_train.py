"""The real step and the real loop: against transformers and torch.optim, and against themselves cut up in other ways."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcpt import UserError, checkpoint, hf, train
from fastcpt.config import Config, Count, Source, ValidationSet
from fastcpt.data import Mixture, batches
from fastcpt.metrics import TIMING_FIELDS
from fastcpt.model import Architecture
from fastcpt.parallel import to_device
from fastcpt.state import named_tensors

SEQ_LEN, BATCH = 16, 6


@pytest.fixture
def make_config(tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any) -> Callable[..., Config]:
    """make_config(name, **sections): a run in tmp_path/name on two sources of about 40 windows each, one validation
    set a source."""
    for seed, name in enumerate(("old", "new")):
        write_shards(tmp_path / name, random_documents(seed, 35))
        write_shards(tmp_path / f"{name}-val", random_documents(10 + seed, 12))

    def make(name: str = "run", **sections: dict[str, Any]) -> Config:
        data = {
            "train": [source(tmp_path, "new", 0.7), source(tmp_path, "old", 0.3)],
            "val": [
                ValidationSet(name="old", path=str(tmp_path / "old-val"), role="upstream"),
                ValidationSet(name="new", path=str(tmp_path / "new-val"), role="downstream"),
            ],
            "seq_len": SEQ_LEN,
        }
        run = {"log_every": 1, "eval_every": 2, "save_every": 2, "eval_tokens": Count(100)}
        sections["data"] = data | sections.get("data", {})
        sections["run"] = run | sections.get("run", {})
        sections["train"] = {"batch_tokens": Count(BATCH * SEQ_LEN)} | sections.get("train", {})
        return tiny_config(tmp_path / name, **sections)

    return make


def source(folder: Path, name: str, weight: float, replay: bool = False) -> Source:
    return Source(name=name, path=str(folder / name), weight=weight, replay=replay)


def steps(count: int) -> dict[str, Any]:
    return {"tokens": Count(count * BATCH * SEQ_LEN)}


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]


def weights(state: train.State) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_tensors(state).items()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest distance of two tensors, relative to the norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def test_the_loss_curve_is_that_of_transformers_and_torch_optim(tmp_path: Path, make_config: Any) -> None:
    import transformers

    torch.manual_seed(0)
    config_hf = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=SEQ_LEN, initializer_range=0.2,
    )  # fmt: skip
    reference = transformers.GPTNeoXForCausalLM(config_hf)
    reference.save_pretrained(tmp_path / "base")
    config = make_config(
        model={"layers": None, "width": None, "heads": None, "vocab_size": None},
        init={"from_": str(tmp_path / "base")},
        train=steps(20) | {"micro_batch": 4},
        optim={"lr": 3e-3, "clip": 0.5},
        schedule={"warmup": 0.2},
    )
    state = train.setup(config)
    decayed = [p for p in reference.parameters() if p.ndim == 2]
    others = [p for p in reference.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False)
    worst = 0.0
    for number, windows in enumerate(batches(state.mixture, 0, 20, BATCH, 0, 1), 1):
        ours = train.train_step(state, windows)
        tokens = torch.from_numpy(windows.astype(np.int64))
        logits = reference(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        warm = math.ceil(0.2 * 20)
        progress = max(0.0, (number - warm) / (20 - warm))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (number / warm if number < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        optimizer.step()
        assert float(norm) > 0.5, "the test is meant to clip"
        worst = max(worst, abs(ours["loss"].item() / loss.item() - 1), abs(ours["grad_norm"].item() / norm.item() - 1))
    # fp32 rounding (6e-8) accumulated over 20 steps through Adam, whose first updates are lr * sign(gradient).
    assert worst < 2e-5


# Adam divides by the gradient's size: with its usual eps it makes lr * sign(rounding) of gradients that are zero in exact
# arithmetic, as those of the keys' biases are.
STEADY = {"eps": 1e-4}


@pytest.mark.parametrize("micro_batch", [1, 4, 5])
def test_the_micro_batch_changes_nothing_but_rounding(make_config: Any, micro_batch: int) -> None:
    whole = weights(train.train(make_config("whole", train={"micro_batch": BATCH}, optim=STEADY)))
    parts = weights(train.train(make_config("parts", train={"micro_batch": micro_batch}, optim=STEADY)))
    assert distance(parts, whole) < 1e-4  # five steps of fp32 rounding; a wrong weight of a micro-batch is off by 0.1


def test_two_processes_train_like_one(tmp_path: Path, make_config: Any, run_ranks: Any) -> None:
    one = make_config("one", train={"micro_batch": 2}, optim=STEADY)
    expected = weights(train.train(one))
    two = make_config("two", train={"micro_batch": 2}, optim=STEADY)
    script = "import sys, pickle\nfrom fastcpt import train\nconfig = pickle.load(open(sys.argv[1], 'rb'))\ntrain.train(config)\n"
    (tmp_path / "config").write_bytes(pickle.dumps(two))
    run_ranks(script, 2, tmp_path / "config")
    state = train.setup(two)  # goes on from the last checkpoint, of two processes, in one
    assert state.step == 5
    assert distance(weights(state), expected) < 1e-4
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert ours["step"] == theirs["step"]
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        else:
            assert ours["eval"]["old"]["loss"] == pytest.approx(theirs["eval"]["old"]["loss"], rel=1e-6)


def test_samples_come_in_one_order_whatever_the_cuts(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three resumes in one epoch, other micro-batches each time: every sample once, in the order of the whole run."""
    seen: list[bytes] = []
    real = train.train_step

    def recording(state: train.State, batch: np.ndarray) -> dict[str, torch.Tensor]:
        if state.step in stops:
            stops.remove(state.step)
            raise KeyboardInterrupt
        seen.extend(row.tobytes() for row in batch)
        return real(state, batch)

    monkeypatch.setattr(train, "train_step", recording)
    stops: list[int] = []
    config = make_config("whole", train=steps(9))
    train.train(config)
    whole, seen[:] = list(seen), []
    assert len(whole) == 9 * BATCH
    stops = [2, 4, 6]  # right after a save, so that no step is done twice
    for micro_batch in (1, 2, 3, 6):
        try:
            train.train(make_config("cut", train=steps(9) | {"micro_batch": micro_batch}))
        except KeyboardInterrupt:
            continue
    assert seen == whole


# Runs a pickled configuration as one of two ranks, writes the rows that each step saw, and stops at a given step.
RECORDING_RANK = """
import os, pickle, sys
from fastcpt import train
config, stop, rank = pickle.load(open(sys.argv[1], "rb")), int(sys.argv[2]), os.environ["RANK"]
real = train.train_step
def recording(state, batch):
    if state.step == stop:
        raise KeyboardInterrupt
    with open(f"rows-{state.step}-{rank}", "wb") as file:
        file.write(batch.tobytes())
    return real(state, batch)
train.train_step = recording
try:
    train.train(config)
except KeyboardInterrupt:
    pass
"""


def test_two_processes_and_three_resumes_see_the_order_of_one(tmp_path: Path, make_config: Any, run_ranks: Any) -> None:
    state = train.setup(make_config("one", train=steps(8)))
    whole = [windows.tobytes() for windows in batches(state.mixture, 0, 8, BATCH, 0, 1)]
    seen: list[int] = []
    for stop, micro_batch in ((2, 1), (4, 2), (6, 3), (99, 6)):
        config = make_config("two", train=steps(8) | {"micro_batch": micro_batch})
        (tmp_path / "config").write_bytes(pickle.dumps(config))
        (tmp_path / "store").unlink(missing_ok=True)
        run_ranks(RECORDING_RANK, 2, tmp_path / "config", stop)
        new = sorted({int(path.name.split("-")[1]) for path in tmp_path.glob("rows-*")} - set(seen))
        seen += new
    assert seen == list(range(8))
    for step, expected in enumerate(whole):
        assert b"".join((tmp_path / f"rows-{step}-{rank}").read_bytes() for rank in (0, 1)) == expected


def test_a_resumed_run_is_the_run_that_never_stopped(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every step in turn, also between saves and inside a log interval."""
    run = {"log_every": 3, "save_every": 2, "tensorboard": False}
    whole = make_config("whole", train=steps(7), run=run)
    expected = weights(train.train(whole))
    real = train.train_step
    for stop in range(1, 7):
        cut = make_config(f"cut-{stop}", train=steps(7), run=run)

        def stopping(state: train.State, batch: np.ndarray, stop: int = stop) -> dict[str, torch.Tensor]:
            if state.step == stop:
                raise KeyboardInterrupt
            return real(state, batch)

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train.train(cut)
        torch.randn(100)  # another state of the generator, which the checkpoint must put back
        state = train.train(cut)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(state).items())
        timeless = [
            [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines(c)] for c in (cut, whole)
        ]
        assert timeless[0] == timeless[1]


def test_a_complete_run_started_again_does_nothing(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    expected, before = weights(train.train(config)), lines(config)
    again = weights(train.train(config))
    assert "complete at step 5" in capsys.readouterr().out
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert lines(config) == before


def test_evaluation_lines_from_step_0_with_forgetting_and_adaptation(make_config: Any) -> None:
    config = make_config(run={"eval_every": 3}, train=steps(7), schedule={"warmup": 0.0})
    train.train(config)
    evaluations = [line for line in lines(config) if "eval" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 7]
    assert lines(config)[0]["step"] == 0 and lines(config)[0]["tokens"] == 0
    start = evaluations[0]["eval"]
    for line in evaluations:
        assert line["forgetting"] == line["eval"]["old"]["loss"] - start["old"]["loss"]
        assert line["adaptation"] == start["new"]["loss"] - line["eval"]["new"]["loss"]
    trained = [line for line in lines(config) if "loss" in line]
    assert [line["tokens"] for line in trained] == [step * BATCH * SEQ_LEN for step in range(1, 8)]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"} <= trained[0].keys()


def test_losses_of_each_source_add_up(make_config: Any) -> None:
    """Against the model's own loss on each row, the rows told apart by which set they were read from."""
    state = train.setup(make_config(train=steps(4)))
    expected = {name: [0.0, 0] for name in state.mixture.sets}
    for step, windows in enumerate(batches(state.mixture, 0, 3, BATCH, 0, 1)):
        tokens = torch.from_numpy(windows.astype(np.int64))
        with torch.no_grad():
            losses = state.model(tokens[:, :-1], tokens[:, 1:].contiguous())
        for row, (name, _) in enumerate(state.mixture.locate(step * BATCH, BATCH)):
            expected[name][0] += losses[row].double().sum().item()
            expected[name][1] += SEQ_LEN
        train.train_step(state, windows)
    for (nats, tokens), (wanted, count) in zip(state.interval.tolist(), expected.values()):
        assert tokens == count > 0 and abs(nats - wanted) <= 1e-5 * wanted


def test_the_log_has_the_loss_of_each_source(make_config: Any) -> None:
    config = make_config(train=steps(4), run={"log_every": 2, "save_every": 3})
    train.train(config)
    for line in lines(config):
        if "loss" in line:
            old, new = line["loss_by_source"]["old"], line["loss_by_source"]["new"]
            assert min(old, new) < line["loss"] < max(old, new)


def test_moments_in_bf16_go_on_bit_for_bit(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_config("whole", train=steps(5), optim={"lr": 1e-3, "moments": "bf16"})
    state = train.train(whole)
    assert all(state.optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 for p in state.optimizer.parameters)
    expected, real = weights(state), train.train_step

    def stopping(state: train.State, batch: np.ndarray) -> dict[str, torch.Tensor]:
        if state.step == 3:
            raise KeyboardInterrupt
        return real(state, batch)

    cut = make_config("cut", train=steps(5), optim={"lr": 1e-3, "moments": "bf16"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping)
        train.train(cut)
    actual = weights(train.train(cut))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_branch_takes_moments_into_another_dtype(make_config: Any) -> None:
    """Rounded once, to the nearest; nothing else of the checkpoint changes."""
    first = train.train(make_config("first", train=steps(3)))
    newest = Path(first.config.run.output) / "checkpoints" / "step-3"
    branch = {"from_": str(newest), "branch": True}
    optim = {"lr": None, "moments": "bf16"}
    state = train.setup(make_config("second", train=steps(2), init=branch, optim=optim, schedule={"warmup": 0.0}))
    for name, tensor in named_tensors(first).items():
        taken = named_tensors(state)[name]
        assert taken.dtype == (torch.float32 if name.startswith("model.") else torch.bfloat16), name
        assert torch.equal(taken, tensor.to(taken.dtype)), name
    train.train_step(state, state.mixture.windows(state.samples, BATCH))
    assert state.optimizer.updates == 4


def poison(state: train.State, when: set[int]) -> None:
    """Makes one gradient of the given steps NaN."""
    parameter = state.model.layers[0].attention.dense.weight
    parameter.register_hook(lambda gradient: gradient * float("nan") if state.step + 1 in when else gradient)


def test_a_step_with_a_non_finite_gradient_is_skipped(make_config: Any) -> None:
    state = train.setup(make_config(train=steps(6)))
    poison(state, {3})
    for windows in batches(state.mixture, 0, 4, BATCH, 0, 1):
        before = weights(state)
        interval = state.interval.clone()
        result = train.train_step(state, windows)
        if state.step == 3:
            assert result["skipped"].item() == 1.0
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights(state).items())
            assert torch.equal(state.interval, interval)
        else:
            assert result["skipped"].item() == 0.0 and distance(weights(state), before) > 0
    assert state.step == 4 and state.optimizer.updates == 3
    assert state.skipped.tolist() == [1, 0]


def test_a_run_that_only_skips_stops(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.setup

    def poisoned(config: Config) -> train.State:
        state = real(config)
        poison(state, set(range(2, 100)))
        return state

    monkeypatch.setattr(train, "setup", poisoned)
    config = make_config(train=steps(9))
    with pytest.raises(train.Diverged, match="step 6: gradients were not finite 5 steps in a row"):
        train.train(config)
    losses = [line["loss"] for line in lines(config) if "loss" in line]
    assert losses[0] > 0 and losses[1:] == [None] * 5  # nothing was trained on in those intervals


def test_a_branch_of_a_constant_run_is_the_longer_run(make_config: Any) -> None:
    """Weights, moments, step, data position and rate are kept: extending by a branch differs in nothing."""
    constant = {"kind": "constant", "warmup": 0.0}
    expected = weights(train.train(make_config("long", train=steps(8), schedule=constant)))
    short = make_config("short", train=steps(5), schedule=constant)
    train.train(short)
    branch = make_config(
        "branch",
        train=steps(3),
        schedule=constant,
        optim={"lr": None},
        init={"from_": short.run.output, "branch": True},
    )
    state = train.train(branch)
    assert state.step == 8
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(state).items())
    assert lines(branch)[0]["step"] == 5


def test_a_branch_anneals_from_the_checkpoints_rate_on_a_new_mixture(tmp_path: Path, make_config: Any) -> None:
    first = make_config("first", schedule={"kind": "constant", "warmup": 0.0})
    before = train.train(first)
    branch = make_config(
        "branch", init={"from_": first.run.output, "branch": True}, optim={"lr": None}, train=steps(4),
        schedule={"kind": "cosine", "warmup": 0.0, "min_lr_ratio": 0.0},
        data={"train": [source(tmp_path, "new", 0.2), source(tmp_path, "old", 0.8)]},
    )  # fmt: skip
    state = train.setup(branch)
    assert state.plan.rate(6) < 1e-3 and state.plan.rate(9) == pytest.approx(0, abs=1e-18)
    assert [phase.first for phase in state.mixture.phases] == [0, 5 * BATCH]
    # Whatever the first run read of a source, the branch goes on after it.
    read = {name: [] for name in ("new", "old")}
    for name, window in Mixture(before.mixture.sets, before.mixture.phases, SEQ_LEN, 0).locate(0, 5 * BATCH):
        read[name].append(window)
    for name, window in state.mixture.locate(5 * BATCH, 4 * BATCH):
        if len(read[name]) < before.mixture.sets[name].num_windows(SEQ_LEN):
            assert window not in read[name]
        read[name].append(window)


def test_continue_keeps_or_resets_the_moments(make_config: Any) -> None:
    first = make_config("first")
    before = weights(train.train(first))
    low = {"lr": 1e-4}
    for optimizer in ("keep", "reset"):
        config = make_config(
            optimizer, init={"from_": first.run.output, "optimizer": optimizer}, optim=low, schedule={"warmup": 0.0}
        )
        state = train.setup(config)
        assert (state.step, state.samples) == (0, 0)
        kept = optimizer == "keep"
        assert state.optimizer.updates == (5 if kept else 0)
        for name, tensor in weights(state).items():
            assert torch.equal(tensor, before[name] if kept or name.startswith("model.") else torch.zeros_like(tensor))


def test_two_runs_in_one_folder_are_refused(make_config: Any) -> None:
    config = make_config()
    held = checkpoint.lock(Path(config.run.output))
    with pytest.raises(UserError, match="another run is writing"):
        train.train(config)
    held.close()
    train.train(config)


def test_bf16_activations_leave_fp32_parameters(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcpt.metrics.measured_matmul_rate", lambda *arguments, **options: 1e12)  # slow without them
    few = {"data": {"val": []}, "schedule": {"warmup": 0.0}}
    exact = [line["loss"] for line in lines_of(make_config("fp32", train=steps(2), **few))]
    monkeypatch.setattr("fastcpt.parallel.has_bf16", lambda device: True)
    config = make_config("bf16", train=steps(2) | {"precision": "bf16"}, **few)
    state = train.train(config)
    assert state.model.execution.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in named_tensors(state).values()} == {torch.float32}
    losses = [line["loss"] for line in lines(config) if "loss" in line]
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.01)  # bf16 keeps 8 bits: 0.4% a value, averaged over many


def lines_of(config: Config) -> list[dict[str, Any]]:
    train.train(config)
    return [line for line in lines(config) if "loss" in line]


def test_document_mask_reaches_the_model(make_config: Any) -> None:
    across = lines_of(make_config("across"))
    within = lines_of(make_config("within", data={"document_mask": True}))
    assert across[0]["loss"] != within[0]["loss"]


def test_compiled_steps_equal_eager_ones_and_compile_once(make_config: Any) -> None:
    eager = lines_of(make_config("eager", train={"micro_batch": 4}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = make_config("compiled", train={"micro_batch": 4, "compile": True})
    compiled = lines_of(config)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    # Two shapes in training (micro-batches of 4 and 2) and one in evaluation; a fourth would be a recompilation.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_two_processes_compile_block_by_block(tmp_path: Path, make_config: Any, run_ranks: Any) -> None:
    eager = lines_of(make_config("eager", train={"micro_batch": 3}))
    compiled = make_config("compiled", train={"micro_batch": 3, "compile": True})
    (tmp_path / "config").write_bytes(pickle.dumps(compiled))
    run_ranks(RECORDING_RANK, 2, tmp_path / "config", 99)
    losses = [line["loss"] for line in lines(compiled) if "loss" in line]
    assert losses == pytest.approx([line["loss"] for line in eager], rel=1e-5)


def test_an_export_evaluates_like_the_run(tmp_path: Path, make_config: Any) -> None:
    config = make_config()
    state = train.train(config)
    hf.save_pretrained(state.model, tmp_path / "export", tmp_path / "new" / "tokenizer.json", "<0>")
    again = hf.load_pretrained(tmp_path / "export")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), state.model.parameters(), strict=True))
    assert again.arch == Architecture(2, 24, 3, vocab_size=64, max_positions=SEQ_LEN)


def test_setup_refuses_ids_beyond_the_model(make_config: Any) -> None:
    with pytest.raises(UserError, match=r"64 ids, the model 40 rows"):
        train.setup(make_config(model={"vocab_size": 40}))


def test_initial_weights_follow_the_seed(make_config: Any) -> None:
    first, same, other = (train.setup(make_config(str(seed), train={"seed": seed})) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), same.model.parameters(), strict=True))
    assert not torch.equal(first.model.embed_in.weight, other.model.embed_in.weight)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_travel_narrow_and_out_of_the_tensor_that_was_pinned(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps pinned memory until its copies are done only if it sees them start from the tensor's own storage.

    There is no GPU here: memory is not really pinned, and the copies go to the "meta" device.
    """
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    windows = np.random.default_rng(0).integers(0, 60_000, (5, 9)).astype(dtype)
    host = train.pinned(windows)
    assert host.dtype == (torch.uint16 if dtype is np.uint16 else torch.int32) and np.array_equal(host.numpy(), windows)
    copies: list[tuple[int, int, bool]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            options = options or {}
            if function is torch.ops.aten._to_copy.default and arguments[0].device.type == "cpu":
                source = arguments[0]
                copies.append((source.untyped_storage()._cdata, source.element_size(), options.get("non_blocking")))
            return function(*arguments, **options)

    with Copies():
        moved = to_device(host[2:4], torch.device("meta"))
    assert (moved.dtype, moved.shape) == (torch.int64, (2, 9))
    assert copies == [(host.untyped_storage()._cdata, np.dtype(dtype).itemsize, True)]
    assert np.array_equal(to_device(host[2:4], torch.device("cpu")).numpy(), windows[2:4].astype(np.int64))


def test_a_step_takes_windows_as_an_array_or_a_tensor(make_config: Callable) -> None:
    losses = []
    for make in (np.asarray, torch.from_numpy):
        state = train.setup(make_config(f"run-{make.__name__}", data={"document_mask": True}))
        losses.append(
            [train.train_step(state, make(state.mixture.windows(state.samples, BATCH)))["loss"] for _ in "12"]
        )
    assert losses[0] == losses[1]
