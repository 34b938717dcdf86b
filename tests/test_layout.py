"""Layouts over processes: every one computes what a single process does; sums in a fixed order to the bit."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcpt import UserError, layout, memory, metrics, parallel, trees
from fastcpt.config import Config, Count, Train
from fastcpt.model import PRESETS
from fastcpt.parallel import World

STEPS = 3

TRAIN = """
import dataclasses, json, os, sys
import torch
machine = json.loads(sys.argv[1])["machine"]
os.environ["LOCAL_WORLD_SIZE"] = str(machine)
from fastcpt import config, train
from fastcpt.data import batches
from fastcpt.layout import Layout

settings = config.parse(json.loads(sys.argv[1])["arguments"])
state = train.setup(settings)
result = {"kind": state.layout.kind, "why": state.layout.why, "losses": [], "norms": []}
batch = settings.train.batch_tokens // settings.data.seq_len
world = state.world
for windows in batches(state.mixture, 0, 3, batch, state.layout.share, world.size):
    before = state.interval.clone()
    step = train.train_step(state, windows)
    nats, tokens = world.sum_(state.interval - before).sum(0).tolist()
    result["losses"].append(nats / tokens)
    result["norms"].append(step["grad_norm"].item())
moments = [state.optimizer.state[part]["exp_avg"] for part in state.parts.values()]
weights = [part.detach() for part in state.parts.values()]
torch.save([state.layout.whole(state.model, weights), state.layout.whole(state.model, moments)],
           sys.argv[2] + "-" + str(world.rank))
print(json.dumps(result))
"""


# Trains until a step, and stops there without a word, after that step's checkpoint.
CHAIN = """
import json, os, sys
told = json.loads(sys.argv[1])
os.environ["LOCAL_WORLD_SIZE"] = str(told["machine"])
import torch
from fastcpt import config, train
from fastcpt.parallel import World

class Stop(Exception):
    pass

original, seen = train.train_step, []

def step(state, windows):
    if state.step == told["stop"]:
        raise Stop
    seen.append([state.step, state.layout.share, windows.tolist()])
    return original(state, windows)

train.train_step = step
try:
    state = train.train(config.parse(told["arguments"]))
    weights = state.layout.whole(state.model, [part.detach() for part in state.parts.values()])
    if state.world.first:
        torch.save(weights, told["out"])
except Stop:
    pass
print(json.dumps(seen))
"""


def write_config(folder: Path, output: str, **train: Any) -> Path:
    """A configuration of a tiny model; eps is large: see the test of the layouts."""
    made = {
        "model": {"layers": 2, "width": 24, "heads": 3, "vocab_size": 67},
        "data": {
            "train": [{"name": name, "path": str(folder / name), "weight": 1} for name in "ab"],
            "val": [{"name": "a", "path": str(folder / "a"), "role": "upstream"}],
            "seq_len": 16,
        },
        "train": {"micro_batch": 2, "compile": False, "precision": "fp32", **train},
        "optim": {"lr": 1e-2, "clip": 0.5, "eps": 1e-3},
        "run": {
            "output": str(folder / output), "tensorboard": False, "save_every": 1, "log_every": 1, "eval_every": 4,
            "eval_tokens": 5 * 16,
        },
    }  # fmt: skip
    file = folder / f"{output}.yaml"
    file.write_text(json.dumps(made))
    return file


@pytest.fixture
def trained(
    tmp_path: Path, run_ranks: Callable, write_shards: Callable, random_documents: Callable
) -> Callable[..., tuple[list[dict[str, Any]], list[list[torch.Tensor]]]]:
    """trained(size, machine, **fields of train) -> (what each process says, [weights, moments] of the first)."""
    write_shards(tmp_path / "a", random_documents(1, 200))
    write_shards(tmp_path / "b", random_documents(2, 200))
    calls = [0]

    def run(size: int, machine: int, **fields: Any) -> Any:
        calls[0] += 1
        file = write_config(tmp_path, f"run{calls[0]}", tokens=STEPS * 16 * 16, batch_tokens=16 * 16, **fields)
        told = json.dumps({"machine": machine, "arguments": ["--config", str(file)]})
        printed = run_ranks(TRAIN, size, told, str(tmp_path / f"out{calls[0]}"))
        whole = [torch.load(tmp_path / f"out{calls[0]}-{rank}") for rank in range(size)]
        for other in whole[1:]:
            assert all(
                torch.equal(a, b) for x, y in zip(whole[0], other, strict=True) for a, b in zip(x, y, strict=True)
            )
        return [json.loads(line.splitlines()[-1]) for line in printed], whole[0]

    return run


CASES = [("ddp", 2, 2), ("fsdp", 2, 2), ("ddp", 4, 4), ("fsdp", 4, 4), ("hsdp", 4, 2)]


@pytest.mark.parametrize("compiled", [False, True])
def test_every_layout_computes_what_one_process_does(trained: Callable, compiled: bool) -> None:
    """In fp32: sums differ in order alone. eps is large, so that Adam does not make much of gradients that are next to
    nothing but rounding: an error of u |g| in a gradient is one of about lr u |g| / eps in a weight."""
    ((alone,), (weights, moments)) = trained(1, 1, compile=compiled)
    assert alone["kind"] == "single"
    for kind, size, machine in CASES if not compiled else CASES[1:2]:
        said, (other_weights, other_moments) = trained(size, machine, parallel=kind, compile=compiled)
        for each in said:
            assert each["kind"] == kind
            assert np.allclose(each["losses"], alone["losses"], rtol=1e-5, atol=0)
            assert np.allclose(each["norms"], alone["norms"], rtol=1e-5, atol=0)
        for a, b in zip(moments, other_moments, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))
        for a, b in zip(weights, other_weights, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not parallel.has_bf16(torch.device("cpu")), reason="no bf16 instructions here")
def test_shards_are_gathered_in_bf16(trained: Callable) -> None:
    """Matrices are rounded to bf16 in any case, the weights of norms only when they are gathered. At first these are 0 and
    1, which are exact, so that the first loss is; later each of the 5 norms may be off by a relative 2^-9, and so may
    gradients, which come in the dtype of what was gathered."""
    ((alone,), _), ((said, *_), _) = trained(1, 1, precision="bf16"), trained(2, 2, parallel="fsdp", precision="bf16")
    assert np.isclose(said["losses"][0], alone["losses"][0], rtol=1e-6, atol=0)
    for key in ("losses", "norms"):
        assert said[key][1:] != alone[key][1:]
        assert np.allclose(said[key], alone[key], rtol=5 * 2**-9, atol=0)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_sums_in_a_fixed_order_are_the_same_bits(trained: Callable, micro_batch: int) -> None:
    same = {"deterministic": True, "micro_batch": micro_batch}
    ((alone,), tensors) = trained(1, 1, **same)
    for kind, size, machine in CASES:
        said, others = trained(size, machine, parallel=kind, **same)
        assert all(each["norms"] == alone["norms"] and each["losses"] == alone["losses"] for each in said), kind
        assert all(
            torch.equal(a, b) for x, y in zip(tensors, others, strict=True) for a, b in zip(x, y, strict=True)
        ), (kind, size)


def test_a_run_goes_on_with_any_number_of_processes_in_any_layout(
    tmp_path: Path, run_ranks: Callable, write_shards: Callable, random_documents: Callable
) -> None:
    """One process, two, four, two, one; ddp to fsdp to hsdp and back: every sample once, in order, and the same bits as
    one process that was never stopped."""
    for seed, name in enumerate("ab"):
        write_shards(tmp_path / name, random_documents(seed, 200))

    def run(output: str, size: int, machine: int, kind: str, stop: int | None) -> list[list[Any]]:
        file = write_config(
            tmp_path, output, tokens=10 * 8 * 16, batch_tokens=8 * 16, parallel=kind, deterministic=True
        )
        told = {
            "machine": machine, "stop": stop, "out": str(tmp_path / f"{output}.pt"), "arguments": ["--config", str(file)],
        }  # fmt: skip
        return [
            entry for line in run_ranks(CHAIN, size, json.dumps(told)) for entry in json.loads(line.splitlines()[-1])
        ]

    def by_step(seen: list[list[Any]]) -> dict[int, list[list[int]]]:
        steps: dict[int, list[list[int]]] = {}
        for step, _, windows in sorted(seen, key=lambda entry: entry[:2]):
            steps.setdefault(step, []).extend(windows)
        return steps

    whole = by_step(run("whole", 1, 1, "auto", None))
    stages = [
        (1, 1, "single", 2),
        (2, 2, "ddp", 4),
        (4, 4, "fsdp", 5),
        (4, 2, "hsdp", 7),
        (2, 2, "fsdp", 9),
        (1, 1, "auto", None),
    ]
    seen = [entry for stage in stages for entry in run("chain", *stage)]
    assert by_step(seen) == whole and len(whole) == 10
    weights, others = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "chain.pt")
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "chain")
    ]
    told = [[(line["step"], line["loss"], line["grad_norm"]) for line in each if "loss" in line] for each in lines]
    assert told[0] == told[1]
    # Five windows: of four processes with two at once the last has none, and must compute all the same.
    evaluated = [[(line["step"], line["eval"]["a"]["loss"]) for line in each if "eval" in line] for each in lines]
    assert [step for step, _ in evaluated[0]] == [step for step, _ in evaluated[1]] and len(evaluated[0]) > 2
    assert np.allclose([loss for _, loss in evaluated[0]], [loss for _, loss in evaluated[1]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", range(1, 25))
def test_a_tree_is_the_recursive_halving(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.standard_normal(count).astype(np.float32)

    def expected(part: list[np.float32]) -> np.float32:
        if len(part) % 2:
            total = part[0]
            for each in part[1:]:
                total = np.float32(total + each)
            return total
        half = len(part) // 2
        return expected([np.float32(a + b) for a, b in zip(part[:half], part[half:])])

    want = float(expected(list(values)))
    tensors = [torch.tensor(value) for value in values]
    assert float(trees.tree_sum(tensors)) == want
    tree = trees.Tree(count)
    numbers = trees.order(count)
    assert sorted(numbers) == list(range(count))
    for number in numbers:
        tree.add([torch.tensor(values[number])])
        assert len(tree._waiting) <= count.bit_length() + 1
    assert float(tree.sums[0]) == want


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_tree_over_processes_then_own_addends_is_the_whole_tree(size: int) -> None:
    rng = random.Random(size)
    for count in (size, 2 * size, 3 * size, 8 * size):
        values = [torch.tensor(rng.gauss(0, 1)) for _ in range(count)]
        own = count // size
        tree = trees.Tree(own)
        for number in trees.order(own):
            tree.add([trees.tree_sum([values[rank * own + number] for rank in range(size)])])
        assert float(tree.sums[0]) == float(trees.tree_sum(values))


def test_recomputed_blocks_give_the_same_bits(trained: Callable) -> None:
    """In eager mode, in fp32: what is computed again is what was computed before."""
    for size, kind in ((1, "single"), (2, "fsdp")):
        ((kept, *_), tensors), ((again, *_), others) = (
            trained(size, size, parallel=kind, recompute=recompute, precision="fp32")
            for recompute in ("none", "blocks")
        )
        assert "recomputed" in again["why"] and "recomputed" not in kept["why"]
        assert (again["kind"], again["losses"], again["norms"]) == (kind, kept["losses"], kept["norms"])
        assert all(torch.equal(a, b) for x, y in zip(tensors, others, strict=True) for a, b in zip(x, y, strict=True))


def test_recomputed_blocks_compile_in_shards(trained: Callable) -> None:
    """Block by block; a compiler may sum in another order."""
    (kept, *_), (again, *_) = (
        trained(2, 2, parallel="fsdp", compile=recompute == "blocks", recompute=recompute)[0]
        for recompute in ("none", "blocks")
    )
    assert "recomputed" in again["why"]
    assert np.allclose(again["losses"], kept["losses"], rtol=1e-5, atol=0)
    assert np.allclose(again["norms"], kept["norms"], rtol=1e-5, atol=0)


GIB = 2**30
TRAIN_SETTINGS = Train(tokens=Count(1), batch_tokens=Count(1))


def needs(gib: dict[int, int], recomputed: int = 0) -> Callable[[int, bool], int]:
    """needed() of `layout.choose` out of {shards: GiB}; recomputation saves `recomputed` GiB."""
    return lambda shards, recompute: (gib[shards] - recomputed * recompute) * GIB


@pytest.mark.parametrize(
    ("setting", "size", "machine", "needed", "expected"),
    [
        ("auto", 1, 1, {1: 500}, "single"),
        ("auto", 8, 8, {1: 70, 8: 20}, "ddp"),
        ("auto", 8, 8, {1: 75, 8: 20}, "fsdp"),
        ("auto", 16, 8, {1: 75, 8: 20, 16: 15}, "hsdp"),
        ("auto", 16, 8, {1: 200, 8: 75, 16: 50}, "fsdp"),
        ("auto", 12, 8, {1: 200, 8: 20, 12: 15}, "fsdp"),
        ("fsdp", 8, 8, {1: 1, 8: 1}, "fsdp"),
        ("hsdp", 16, 8, {1: 1, 8: 1, 16: 1}, "hsdp"),
    ],
)
def test_the_choice(setting: str, size: int, machine: int, needed: dict[int, int], expected: str) -> None:
    train = replace(TRAIN_SETTINGS, parallel=setting)
    kind, recompute, why = layout.choose(train, size, machine, needs(needed), 80 * GIB)
    assert kind == expected and ("does not fit" in why) == (needed[1 if kind in ("single", "ddp") else size] > 72)
    assert recompute == ("does not fit" in why)  # it was the last thing to try
    if setting == "auto" and size > 1:
        assert "does not fit" in why or f"{needed[1]}.0 of 80.0 GiB" in why


@pytest.mark.parametrize(
    ("size", "machine", "text"), [(8, 8, "all processes are on one machine"), (12, 8, "12 processes are not 8")]
)
def test_hsdp_that_cannot_be_is_refused(size: int, machine: int, text: str) -> None:
    with pytest.raises(UserError, match=text):
        train = replace(TRAIN_SETTINGS, parallel="hsdp")
        layout.choose(train, size, machine, needs(dict.fromkeys((1, machine, size), 1)), 80 * GIB)


@pytest.mark.parametrize(
    ("recompute", "parallel", "size", "machine", "needed", "expected"),
    [
        ("auto", "auto", 1, 1, {1: 70}, ("single", False)),
        ("auto", "auto", 1, 1, {1: 75}, ("single", True)),
        ("none", "auto", 1, 1, {1: 75}, ("single", False)),
        ("blocks", "auto", 1, 1, {1: 1}, ("single", True)),
        ("auto", "auto", 8, 8, {1: 75, 8: 60}, ("fsdp", False)),  # shards first
        ("auto", "auto", 8, 8, {1: 80, 8: 75}, ("ddp", True)),
        ("auto", "auto", 8, 8, {1: 90, 8: 80}, ("fsdp", True)),
        ("auto", "ddp", 8, 8, {1: 80, 8: 10}, ("ddp", True)),
        ("blocks", "auto", 8, 8, {1: 90, 8: 80}, ("fsdp", True)),
        ("auto", "auto", 16, 8, {1: 90, 8: 75, 16: 73}, ("hsdp", True)),
    ],
)
def test_the_choice_of_recomputation(
    recompute: str, parallel: str, size: int, machine: int, needed: dict[int, int], expected: tuple[str, bool]
) -> None:
    """Recomputation saves 10 GiB here, and 72 of 80 may be used."""
    train = replace(TRAIN_SETTINGS, recompute=recompute, parallel=parallel)
    kind, again, why = layout.choose(train, size, machine, needs(needed, 10), 80 * GIB)
    assert (kind, again) == expected and ("recomputed" in why) == again
    shards = {"single": 1, "ddp": 1, "hsdp": machine, "fsdp": size}[kind]
    if again and recompute == "auto":
        assert f"{needed[shards]}.0 of 80.0 GiB, this {needed[shards] - 10}.0 of" in why
    assert ("does not fit" in why) == (needed[shards] - 10 * again > 72)


def fitting(config: Config, room: int, size: int = 1, device: str = "cuda") -> tuple[int, str]:
    world = World(0, size, torch.device(device))
    chosen, why = layout.with_micro_batch(config, PRESETS["pythia-410m"], world, min(size, 8), room)
    assert replace(chosen, train=replace(chosen.train, micro_batch=0)) == config
    return chosen.train.micro_batch, why


@pytest.mark.parametrize(
    ("sequences", "size", "fits", "expected"),
    [
        (64, 1, 12, 8),  # 8 divides 64
        (60, 1, 12, 12),
        (34, 1, 12, 12),  # the largest divisor is 2: three parts of 12, 12 and 10
        (37, 1, 12, 10),  # four: 10, 10, 10 and 7, not 12, 12, 12 and 1
        (5, 1, 12, 5),
        (64, 4, 12, 8),
        (30, 4, 12, 8),  # 7 or 8 sequences a process
        (18, 4, 4, 3),  # 4 or 5: with 4 some processes would take one micro-batch and others two
        (128, 1, 40, 32),  # 65,536 tokens
    ],
)
def test_a_micro_batch_fits(tiny_config: Callable, sequences: int, size: int, fits: int, expected: int) -> None:
    """Of exactly as much memory as `fits` sequences need; and never more than that, whatever the batch."""
    settings = {"batch_tokens": Count(sequences * 2048), "micro_batch": 0, "precision": "bf16", "recompute": "none"}
    config = tiny_config(data={"seq_len": 2048}, train=settings | {"parallel": "ddp" if size > 1 else "single"})

    def needed(number: int) -> int:
        given = replace(config, train=replace(config.train, micro_batch=number))
        whole = replace(given.train, batch_tokens=Count(size * 64 * 2048))  # so that none is cut to a process's share
        return memory.needed(replace(given, train=whole), PRESETS["pythia-410m"], World(0, size, torch.device("cuda")))(
            1, False
        )

    room = int(needed(fits) / layout.ROOM) + 1
    chosen, why = fitting(config, room, size)
    assert chosen == expected and needed(chosen) <= layout.ROOM * room < needed(fits + 1)
    share = -(-sequences // size)
    bound = "all of them fit" if share <= fits else "more than 32 are no faster" if fits > 32 else f"at most {fits} fit"
    assert why == f"micro-batches of {chosen} of its {share} sequences: {bound}"


def test_a_micro_batch_is_chosen_for_the_layout_that_is_taken(tiny_config: Callable) -> None:
    """Where one sequence fits without recomputation there is none; where none does, blocks are recomputed, and more fit."""
    train = {"batch_tokens": Count(64 * 2048), "micro_batch": 0, "precision": "bf16"}
    config = tiny_config(data={"seq_len": 2048}, train=train)
    kept = memory.needed(memory.with_micro_batch(config, 1), PRESETS["pythia-410m"], World(0, 1, torch.device("cuda")))
    rooms = [int(kept(1, recompute) / layout.ROOM) + 1 for recompute in (False, True)]
    assert fitting(config, rooms[0])[0] == 1 and fitting(config, rooms[0] - 2)[0] > 1
    assert fitting(config, rooms[1] - 2) == (1, "micro-batches of 1 of its 64 sequences: at most 1 fit")
    assert fitting(config, 80 * GIB, device="cpu") == (
        8, "micro-batches of 8 of its 64 sequences: more than 8 are no faster"
    )  # fmt: skip
    said = replace(config, train=replace(config.train, micro_batch=3))
    assert layout.with_micro_batch(said, PRESETS["pythia-410m"], World(0, 1, torch.device("cpu")), 1, 1) == (said, "")


def test_a_fixed_order_takes_whole_micro_batches(trained: Callable) -> None:
    with pytest.raises(
        AssertionError, match=r"16 sequences a step are not a multiple of 1 processes x .*micro_batch 3"
    ):
        trained(1, 1, deterministic=True, micro_batch=3)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sequences", [1, 32])
def test_every_pythia_fits_eight_gpus_of_80_gb(name: str, sequences: int) -> None:
    """By the formulas: sequences of 2,048 tokens, Triton kernels, bf16. One at a time needs no recomputation."""
    arch = PRESETS[name]

    def needed(shards: int, recompute: bool) -> int:
        parts = memory.parts(
            arch, sequences, 2048, True, False, True, False, 4, shards, recompute=recompute, ddp=shards == 1
        )
        return sum(parts.values())

    kind, recompute, why = layout.choose(TRAIN_SETTINGS, 8, 8, needed, int(80e9))
    assert needed(8 if kind == "fsdp" else 1, recompute) <= layout.ROOM * 80e9 and "not fit" not in why
    if sequences == 1:
        assert not recompute and (kind == "ddp") == (20 * metrics.parameter_count(arch) < 60e9)
    else:
        assert recompute == (metrics.parameter_count(arch) > 1e9)


def test_shards_take_equally_many_micro_batches(tiny_config: Any) -> None:
    """10 sequences on 4 processes are shares of 2 and 3; by counting them."""
    for micro in (1, 2, 3, 4):
        config = tiny_config(train={"batch_tokens": Count(10 * 16), "tokens": Count(10 * 16), "micro_batch": micro})
        counts = {-(-(10 * (rank + 1) // 4 - 10 * rank // 4) // micro) for rank in range(4)}
        for kind in ("fsdp", "hsdp"):
            if len(counts) == 1:
                layout.check(config, kind, 4)
            else:
                with pytest.raises(
                    UserError, match=rf"{min(counts)} micro-batches .*{max(counts)} on others; raise it"
                ):
                    layout.check(config, kind, 4)
        layout.check(config, "ddp", 4)
