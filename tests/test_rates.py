"""Embeddings first, new rows at a rate of their own, and a moving average of the weights: alone, in any layout, resumed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcpt import cli, hf, train
from fastcpt.config import Optim
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.optim import AdamW
from fastcpt.rates import Piece
from fastcpt.weights import Weights

OLD, ROWS, STEPS, FIRST = 49, 67, 6, 3


@pytest.mark.parametrize("factor", [0.0, 1.0, 7.5])
def test_rows_at_their_own_rate_are_parameters_of_their_own(factor: float) -> None:
    """Against torch's AdamW, which is given each piece as a parameter with its rate."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(9, 8, generator=generator), torch.randn(5, generator=generator)]
    ours = [nn.Parameter(value.clone()) for value in values]
    pieces = [Piece(1.0, True, 0, 6, True), Piece(factor, True, 6, None, True)]
    optimizer = AdamW(ours, Optim(lr=0.1, clip=1e9, weight_decay=0.3), pieces={ours[0]: pieces})
    theirs = [nn.Parameter(part.clone()) for part in (values[0][:6], values[0][6:], values[1])]
    rates, decays = (0.1, 0.1 * factor, 0.1), (0.3, 0.3, 0.0)
    reference = torch.optim.AdamW(
        [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in zip(theirs, rates, decays, strict=True)],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for _ in range(4):
        gradients = [torch.randn(value.shape, generator=generator) for value in values]
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.clone()
        for parameter, gradient in zip(theirs, (gradients[0][:6], gradients[0][6:], gradients[1]), strict=True):
            parameter.grad = gradient.clone()
        optimizer.clipped_step(0.1)
        reference.step()
    assert optimizer.updates == 4
    torch.testing.assert_close(ours[0].detach(), torch.cat([theirs[0], theirs[1]]).detach())
    torch.testing.assert_close(ours[1], theirs[2])
    assert torch.equal(ours[0][6:], values[0][6:]) == (factor == 0)


@pytest.fixture
def start(tmp_path: Path, write_shards: Callable, random_documents: Callable) -> Path:
    """A model whose rows from OLD on are new, and shards."""
    write_shards(tmp_path / "a", random_documents(1, 200))
    model = GPTNeoX(Architecture(2, 24, 3, ROWS, old_rows=OLD))
    model.initialise_(torch.Generator().manual_seed(0))
    hf.save_pretrained(model, tmp_path / "base")
    return tmp_path


def configuration(folder: Path, output: str, **train_fields: Any) -> list[str]:
    made = {
        "init": {"from": str(folder / "base")},
        "data": {
            "train": [{"name": "a", "path": str(folder / "a"), "weight": 1}], "seq_len": 16,
            "val": [{"name": "a", "path": str(folder / "a"), "role": "downstream"}],
        },
        "train": {
            "tokens": STEPS * 64, "batch_tokens": 64, "micro_batch": 1, "compile": False, "precision": "fp32", "ema": 128,
            **train_fields,
        },
        "optim": {"lr": 1e-2, "embeddings_first": FIRST, "new_rows_lr": 4},
        "schedule": {"kind": "constant", "warmup": 0},
        "run": {"output": str(folder / output), "tensorboard": False, "save_every": 1, "keep": 9, "eval_tokens": 512},
    }  # fmt: skip
    (folder / f"{output}.yaml").write_text(json.dumps(made))
    return ["--config", str(folder / f"{output}.yaml")]


def tensors(run: Path, step: int, ema: bool = False) -> dict[str, Tensor]:
    weights = Weights.open(str(run / "checkpoints" / f"step-{step}"), ema)
    return {name: weights.tensor(name) for name in hf.shapes(weights.arch)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if torch.equal(a[name], b[name])}


def test_embeddings_alone_until_a_step(start: Path) -> None:
    assert train.main(configuration(start, "run")) == 0
    base, run = Weights.open(str(start / "base")), start / "run"
    before = {name: base.tensor(name) for name in hf.shapes(base.arch)}
    embeddings = {"gpt_neox.embed_in.weight", "embed_out.weight"}
    for step in range(1, FIRST + 1):
        assert before.keys() - same(before, tensors(run, step)) == embeddings
    assert not same(before, tensors(run, FIRST + 1)) & {name for name in before if name.endswith("weight")}
    # Adam's first step is as long as its rate, where there was a gradient: new rows' four times as long.
    moved = (tensors(run, 1)["embed_out.weight"] - before["embed_out.weight"]).abs()
    decayed = 1e-2 * 0.1 * before["embed_out.weight"].abs().max()
    assert float(moved[:OLD].median()) == pytest.approx(1e-2, abs=float(decayed))
    assert float(moved[OLD:64].median()) == pytest.approx(4e-2, abs=4 * float(decayed))


def test_the_average_is_that_of_the_checkpoints(start: Path, tmp_path: Path) -> None:
    """By its definition, over the weights after every step, in float64; and the commands take it."""
    assert train.main(configuration(start, "run")) == 0
    base, run = Weights.open(str(start / "base")), start / "run"
    keep = 2 ** -(64 / 128)
    expected = {name: base.tensor(name).double() for name in hf.shapes(base.arch)}
    for step in range(1, STEPS + 1):
        for name, value in tensors(run, step).items():
            expected[name] = keep * expected[name] + (1 - keep) * value.double()
    found = tensors(run, STEPS, ema=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert len(same(found, tensors(run, STEPS))) < len(found) / 2
    assert cli.main(["export", str(run), "--ema", "--output", str(tmp_path / "out")]) == 0
    exported = Weights.open(str(tmp_path / "out"))
    assert all(torch.equal(exported.tensor(name), value) for name, value in found.items())
    assert (
        "a moving average of the run's weights, with a half-life of 128 tokens"
        in (tmp_path / "out" / "README.md").read_text()
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "ema" in line] == [STEPS]
    last = next(line for line in lines if "ema" in line)
    state = train.setup(
        train.parse([*configuration(start, "again"), "--init.from", str(tmp_path / "out"), "--init.force", "true"])
    )
    assert train.evaluate(state)["eval"]["a"]["loss"] == pytest.approx(last["ema"]["a"]["loss"], abs=1e-6)
    assert last["ema"]["a"]["loss"] != last["eval"]["a"]["loss"]


@pytest.mark.parametrize("stop", [1, FIRST, FIRST + 1])
def test_it_goes_on_bit_for_bit(start: Path, stop: int) -> None:
    assert train.main(configuration(start, "whole")) == 0
    arguments = configuration(start, "stopped")
    assert train.main(configuration(start, "stopped")) == 0
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(start / "stopped" / "checkpoints" / f"step-{step}")
    assert train.main(arguments) == 0
    for ema in (False, True):
        whole, again = (tensors(start / name, STEPS, ema) for name in ("whole", "stopped"))
        assert same(whole, again) == whole.keys()


RUN = "import sys\nfrom fastcpt import train\nassert train.main(sys.argv[1:]) == 0\n"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_layout_computes_the_same_bits(start: Path, kind: str, run_ranks: Callable) -> None:
    """In a fixed order: two processes as one, through both stages, new rows across the border of a shard."""
    assert train.main(configuration(start, "alone", deterministic=True)) == 0
    run_ranks(RUN, 2, *configuration(start, kind, deterministic=True, parallel=kind))
    for ema in (False, True):
        alone, several = (tensors(start / name, STEPS, ema) for name in ("alone", kind))
        assert same(alone, several) == alone.keys()
    ends = [
        next(json.loads(line) for line in (start / name / "metrics.jsonl").read_text().splitlines() if '"ema"' in line)
        for name in ("alone", kind)
    ]
    assert ends[0]["ema"]["a"]["loss"] == pytest.approx(ends[1]["ema"]["a"]["loss"], abs=1e-6)


def test_what_cannot_be_is_refused(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = configuration(start, "run")
    assert train.main([*arguments, "--optim.embeddings_first", str(STEPS)]) == 2
    assert (
        "embeddings_first is 6 steps, but the run has 6; shorten it [embeddings-first-too-long]"
        in capsys.readouterr().err
    )
    config = json.loads((start / "base" / "config.json").read_text())
    del config["fastcpt_old_rows"]
    (start / "base" / "config.json").write_text(json.dumps(config))
    assert train.main(arguments) == 2
    assert "optim.new_rows_lr is 4.0, but the model has no new rows" in capsys.readouterr().err
