"""Averages of checkpoints, also as a decay, and the way between two models."""

import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastcpt import UserError, cli, evaluation, hf, merge, train
from fastcpt.config import Config, Source, ValidationSet
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.weights import Weights

STEPS = [2, 4, 6, 8]


class Made(NamedTuple):
    """checkpoints: of one run at a constant rate. base: what it started from, a Hugging Face model."""

    folder: Path
    checkpoints: list[str]
    base: str


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    write_shards: Any,
    random_documents: Any,
    tiny_config: Callable[..., Config],
) -> Made:
    folder = tmp_path_factory.mktemp("merge")
    shards = write_shards(folder / "new", random_documents(0, 200))
    base = GPTNeoX(Architecture(2, 24, 3, 64, max_positions=16))
    base.initialise_(torch.Generator().manual_seed(5))
    hf.save_pretrained(base, folder / "base", shards.path / "tokenizer.json", "<0>")
    train.train(
        tiny_config(
            folder / "run",
            init={"from_": str(folder / "base")},
            data={
                "train": [Source(name="new", path=str(shards.path), weight=1.0)], "seq_len": 16,
                "val": [ValidationSet(name="new", path=str(shards.path), role="downstream")],
            },
            train={"tokens": 8 * 96, "batch_tokens": 96, "micro_batch": 4, "compile": False, "precision": "fp32"},
            optim={"lr": 1e-2},
            schedule={"kind": "constant", "warmup": 0},
            run={"output": str(folder / "run"), "save_every": 2, "keep": 9, "tensorboard": False},
        )
    )  # fmt: skip
    return Made(folder, [str(folder / "run" / "checkpoints" / f"step-{step}") for step in STEPS], str(folder / "base"))


def loaded(folder: str | Path) -> dict[str, Tensor]:
    """By transformers."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ("linear", lambda u: 1 - u),
        ("cosine", lambda u: (1 + torch.cos(math.pi * u)) / 2),
        ("1-sqrt", lambda u: 1 - u.sqrt()),
    ],
)
@pytest.mark.parametrize("steps", [[0, 1], [100, 200, 300, 400, 500], [7, 8, 20, 21, 400]])
def test_the_average_is_the_decay_of_the_updates(
    shape: merge.Decay, decay: Callable[[Tensor], Tensor], steps: list[int]
) -> None:
    """WSM's identity, and the factors against numerical integration."""
    thetas = torch.randn(len(steps), 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = merge.decays(steps, shape)
    for start, end, factor in zip(steps, steps[1:], factors, strict=False):
        u = torch.linspace(start - steps[0], end - steps[0], 200_001, dtype=torch.float64) / (steps[-1] - steps[0])
        assert factor == pytest.approx(float(decay(u).mean()), abs=1e-5)
    assert all(1 >= before >= after >= 0 for before, after in itertools.pairwise(factors))
    decayed = thetas[0] + sum(factor * (thetas[i + 1] - thetas[i]) for i, factor in enumerate(factors))
    weights = merge.decay_weights(steps, shape)
    average = sum(weight * theta for weight, theta in zip(weights, thetas, strict=True))
    torch.testing.assert_close(average, decayed, rtol=0, atol=1e-13)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-15) and min(weights) >= 0


def test_a_linear_decay_over_even_steps_is_the_trapezoidal_mean() -> None:
    assert merge.decay_weights([0, 10, 20, 30, 40], "linear") == pytest.approx([1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_checkpoints_as_a_decay(run: Made, shape: Any, tmp_path: Path) -> None:
    """Of a real run: the start plus the decayed updates, in whatever order the checkpoints are named."""
    merge.merge([run.checkpoints[i] for i in (2, 0, 3, 1)], str(tmp_path / "out"), decay=shape)
    thetas = [Weights.open(path) for path in run.checkpoints]
    factors = merge.decays(STEPS, shape)
    ours = Weights.open(str(tmp_path / "out"))
    for name in hf.shapes(ours.arch):
        values = [theta.tensor(name).double() for theta in thetas]
        decayed = values[0] + sum(factor * (values[i + 1] - values[i]) for i, factor in enumerate(factors))
        assert (values[0] - values[3]).abs().max() > 1e-3
        torch.testing.assert_close(ours.tensor(name), decayed.float(), rtol=1.2e-7, atol=1e-9)


def test_the_average_is_that_of_the_models_in_transformers(run: Made, tmp_path: Path) -> None:
    """A checkpoint and a Hugging Face model; weights are shares of their sum."""
    cli.main(["export", run.checkpoints[3], "--output", str(tmp_path / "last")])
    code = cli.main(["merge", run.checkpoints[3], run.base, "--weights", "3", "1", "--output", str(tmp_path / "out")])
    assert code == 0
    last, base, merged = (loaded(folder) for folder in (tmp_path / "last", run.base, tmp_path / "out"))
    assert last.keys() == merged.keys()
    for name in last:
        expected = (0.75 * last[name].double() + 0.25 * base[name].double()).float()
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)
    assert "| run, step-8 | 0.75 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (Path(run.base) / "tokenizer.json").read_bytes()


def test_slerp_keeps_the_length_and_shares_the_angle() -> None:
    for angle in (0.1, 1.0, 3.0):
        ends = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
        for t in (0.0, 0.25, 0.5, 1.0):
            found = merge.slerp(ends, (1 - t, t))
            expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    same = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merge.slerp((same, 2 * same), (0.5, 0.5)), 1.5 * same)
    assert torch.equal(merge.slerp((same * 0, same), (0.5, 0.5)), same / 2)


def test_slerp_of_two_models(run: Made, tmp_path: Path) -> None:
    assert (
        cli.main(["merge", run.base, run.checkpoints[3], "--method", "slerp", "--output", str(tmp_path / "out")]) == 0
    )
    ends = [Weights.open(path) for path in (run.base, run.checkpoints[3])]
    ours = Weights.open(str(tmp_path / "out"))
    for name in ("embed_out.weight", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"):
        a, b = (end.tensor(name).double() for end in ends)
        omega = torch.acos((a * b).sum() / a.norm() / b.norm())
        torch.testing.assert_close(
            ours.tensor(name).double(), (a + b) / (2 * torch.cos(omega / 2)), rtol=1e-6, atol=1e-8
        )


def test_a_tensor_at_a_time_is_in_memory(tmp_path: Path, alive_bytes: Any) -> None:
    arch = Architecture(24, 32, 2, 64)
    model = GPTNeoX(arch)
    for number in range(3):
        model.initialise_(torch.Generator().manual_seed(number))
        hf.save_pretrained(model, tmp_path / str(number))
    sizes = [each.nbytes for each in model.parameters()]
    with alive_bytes(list(model.parameters())) as alive:
        merge.merge([str(tmp_path / str(number)) for number in range(3)], str(tmp_path / "out"))
    # Three in fp32; the sum and one of them in fp64; the result.
    assert max(sizes) < alive.peak <= (3 + 2 * 2 + 1) * max(sizes) < sum(sizes) / 4


def test_other_models_are_refused_by_name(run: Made, tmp_path: Path, byte_tokenizer: Path) -> None:
    wide, other = GPTNeoX(Architecture(2, 24, 1, 64)), GPTNeoX(Architecture(2, 24, 3, 300))
    for name, model, tokenizer in (("heads", wide, None), ("rows", other, byte_tokenizer)):
        model.initialise_()
        hf.save_pretrained(model, tmp_path / name, tokenizer)
    with pytest.raises(UserError, match=r"heads: its heads is 1, that of .*base 3; only weights of one architecture"):
        merge.merge([run.base, str(tmp_path / "heads")], str(tmp_path / "out"))
    same = GPTNeoX(Architecture(2, 24, 3, 300))
    same.initialise_()
    (tmp_path / "spaced.json").write_text(
        json.dumps(json.loads(byte_tokenizer.read_text()) | {"normalizer": {"type": "NFC"}})
    )
    hf.save_pretrained(same, tmp_path / "normalised", tmp_path / "spaced.json")
    with pytest.raises(UserError, match=r"another tokenizer than .*rows"):
        merge.merge([str(tmp_path / "rows"), str(tmp_path / "normalised")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_rate_that_fell_is_said(run: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge.merge(run.checkpoints[:2], str(tmp_path / "out"), decay="linear")
    assert "warning" not in capsys.readouterr().err
    models = [Weights.open(path) for path in run.checkpoints[:2]]
    assert models[1].state is not None
    models[1].state["lr"] /= 2
    merge._in_order(models)
    assert "warning: the learning rates of these checkpoints are 0.01, 0.005" in capsys.readouterr().err


def test_the_way_from_base_to_continued(
    run: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends and a point between are what `eval` says of them and of their merge."""
    monkeypatch.setattr("fastcpt.parallel.has_bf16", lambda device: False)
    shards, file = str(run.folder / "new"), tmp_path / "way.csv"
    words = ["interpolate", run.base, run.checkpoints[3], "--points", "0,0.25,1", "--upstream", f"up={shards}",
             "--downstream", f"down={shards}", "--seq-len", "16", "--tokens", "512", "--csv", str(file)]  # fmt: skip
    assert cli.main(words) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()][-4:]
    rows = list(csv.DictReader(file.open()))
    assert list(rows[0]) == ["w", "up loss", "up bits/byte", "down loss", "down bits/byte", "forgetting", "adaptation"]
    assert [[f"{float(value):.4f}" for value in row.values()] for row in rows] == printed[1:]
    merge.merge([run.base, run.checkpoints[3]], str(tmp_path / "quarter"), weights=[0.75, 0.25])
    for row, source in zip(rows, (run.base, str(tmp_path / "quarter"), run.checkpoints[3]), strict=True):
        expected = evaluation.evaluate_checkpoint(source, {"up": shards}, 16, 512, 8)["up"]
        assert float(row["up loss"]) == expected["loss"] and float(row["up bits/byte"]) == expected["bits_per_byte"]
        change = float(row["up loss"]) - float(rows[0]["up loss"])
        assert (float(row["forgetting"]), float(row["adaptation"])) == (change, -change)
    assert float(rows[2]["adaptation"]) > 0.01, "it learned nothing"
