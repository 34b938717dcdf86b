"""Each number of a plan against what a run does, or against counting one by one; nothing is started or written."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fastcpt import (
    UserError,
    checkpoint,
    config,
    cost,
    evaluation,
    hf,
    memory,
    metrics,
    plan,
    published,
    spending,
    train,
)
from fastcpt.config import Config, Count, Kind, Source, ValidationSet
from fastcpt.model import PRESETS, Architecture, GPTNeoX
from fastcpt.schedules import ASCII, BLOCKS, Plan, curve
from fastcpt.shards import ShardSet, write_manifest
from fastcpt.weights import Weights

SEQ_LEN, BATCH = 16, 6
NO_MODEL = {"layers": None, "width": None, "heads": None, "vocab_size": None}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: Any, write_shards: Any, random_documents: Any) -> Path:
    """A folder with the sets old, new, third (about 40 windows each) and a validation set of old and new."""
    folder = tmp_path_factory.mktemp("shards")
    for seed, name in enumerate(("old", "new", "third")):
        write_shards(folder / name, random_documents(seed, 35))
    for seed, name in enumerate(("old-val", "new-val")):
        write_shards(folder / name, random_documents(10 + seed, 12))
    return folder


@pytest.fixture
def make_config(shards: Path, tmp_path: Path, tiny_config: Any) -> Callable[..., Config]:
    return lambda name="run", **sections: settings(shards, tiny_config, tmp_path / name, **sections)


def settings(shards: Path, tiny_config: Any, output: Path, **sections: dict[str, Any]) -> Config:
    data = {
        "train": [source(shards, "new", 0.7), source(shards, "old", 0.3)],
        "val": [
            ValidationSet(name="old", path=str(shards / "old-val"), role="upstream"),
            ValidationSet(name="new", path=str(shards / "new-val"), role="downstream"),
        ],
        "seq_len": SEQ_LEN,
    }
    run = {"log_every": 1, "eval_every": 2, "save_every": 2, "eval_tokens": Count(100), "keep": 9}
    sections["data"] = data | sections.get("data", {})
    sections["run"] = run | sections.get("run", {})
    sections["train"] = {"batch_tokens": Count(BATCH * SEQ_LEN)} | sections.get("train", {})
    return tiny_config(output, **sections)


def source(folder: Path, name: str, weight: float, replay: bool = False) -> Source:
    return Source(name=name, path=str(folder / name), weight=weight, replay=replay)


def steps(count: int) -> dict[str, Any]:
    return {"tokens": Count(count * BATCH * SEQ_LEN)}


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def finished(shards: Path, tiny_config: Any, tmp_path_factory: Any, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    """A run of 7 steps with every checkpoint: 2, 4, 6 and 7."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    monkeypatch_module.setattr(metrics, "measured_matmul_rate", lambda *arguments, **options: 1e12)  # takes a while
    train.train(settings(shards, tiny_config, folder, train=steps(7)))
    return folder


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """That run as it was after its checkpoint of step 4."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in (6, 7):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    return folder


# Data


def tally(prepared: plan.Prepared) -> Counter[str]:
    """Samples a source, counted one by one as training takes them."""
    count = (prepared.last_step - prepared.step) * BATCH
    return Counter(name for name, _ in prepared.mixture.locate(prepared.samples, count))


def check_uses(prepared: plan.Prepared, epochs: dict[str, float]) -> None:
    found, counted = {use.name: use for use in plan.uses(prepared)}, tally(prepared)
    assert {name: use.samples for name, use in found.items()} == {name: counted[name] for name in found}
    for name, use in found.items():
        shard_set = prepared.mixture.sets[name]
        assert (use.tokens, use.windows) == (len(shard_set), (len(shard_set) - 1) // SEQ_LEN)
        assert use.share == pytest.approx(counted[name] / counted.total())
        assert use.epochs == pytest.approx(epochs[name])


def windows(shards: Path, name: str) -> int:
    return ShardSet(shards / name).num_windows(SEQ_LEN)


def test_sources_from_scratch(make_config: Any, shards: Path) -> None:
    three = [source(shards, "new", 2), source(shards, "old", 1), source(shards, "third", 4)]
    prepared = plan.prepare(make_config(train=steps(23), data={"train": three}), 1)
    counted = tally(prepared)
    check_uses(prepared, {name: counted[name] / windows(shards, name) for name in counted})
    assert counted.total() == 23 * BATCH and max(use.epochs for use in plan.uses(prepared)) > 1


def test_sources_of_a_resumed_run(make_config: Any, interrupted: Path, shards: Path) -> None:
    prepared = plan.prepare(make_config(train=steps(7)), 1)
    assert (prepared.origin.kind, prepared.step, prepared.last_step, prepared.samples) == ("resume", 4, 7, 4 * BATCH)
    whole = Counter(name for name, _ in prepared.mixture.locate(0, 7 * BATCH))
    check_uses(prepared, {name: whole[name] / windows(shards, name) for name in whole})


def test_sources_of_a_branch_with_another_mixture(make_config: Any, finished: Path, shards: Path) -> None:
    other = [source(shards, "third", 0.5), source(shards, "new", 0.5)]
    branch = {"init": {"from_": str(finished), "branch": True}, "optim": {"lr": None}, "schedule": {"warmup": 0.0}}
    prepared = plan.prepare(make_config("branch", train=steps(20), data={"train": other}, **branch), 1)
    assert (prepared.origin.kind, prepared.step, prepared.last_step) == ("branch", 7, 27)
    before = Counter(name for name, _ in plan.prepare(make_config("x", train=steps(7)), 1).mixture.locate(0, 7 * BATCH))
    now = tally(prepared)
    check_uses(prepared, {name: (before[name] + now[name]) / windows(shards, name) for name in ("third", "new")})
    assert prepared.plan.peak == pytest.approx(1e-4)


def test_sources_of_a_continued_run(make_config: Any, finished: Path, shards: Path) -> None:
    new = [source(shards, "third", 1.0)]
    prepared = plan.prepare(make_config("next", init={"from_": str(finished)}, data={"train": new}), 1)
    assert (prepared.origin.kind, prepared.step, prepared.samples, prepared.last_step) == ("continue", 0, 0, 5)
    check_uses(prepared, {"third": 5 * BATCH / windows(shards, "third")})


# Evaluation and disk


def changed(prepared: plan.Prepared, step: int, first: int, count: int, warmup: int, **run: Any) -> plan.Prepared:
    return replace(
        prepared,
        config=replace(prepared.config, run=replace(prepared.config.run, **run)),
        plan=Plan("constant", first, count, warmup, 1e-3, 0.1),
        step=step,
    )


def test_evaluations_are_counted_as_the_loop_finds_them(make_config: Any) -> None:
    prepared, generator = plan.prepare(make_config(), 1), np.random.default_rng(0)
    for _ in range(400):
        first, count = int(generator.integers(0, 40)), int(generator.integers(1, 60))
        warmup, every = int(generator.integers(0, count + 1)), int(generator.integers(1, 70))
        step = int(generator.integers(first, first + count + 1))
        case = changed(prepared, step, first, count, warmup, eval_every=every)
        last = first + count
        due = sum(evaluation.is_due(at, last, every, first + warmup) for at in range(step + 1, last + 1))
        assert plan.evaluations(case)[0] == due + (step == first), case.plan


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_evaluates_saves_and_takes_space_as_planned(
    make_config: Any, interrupted: Path, tmp_path: Path, goes_on: bool
) -> None:
    config = make_config("run" if goes_on else "other", train=steps(7))
    prepared = plan.prepare(config, 1)
    times, tokens, _ = plan.evaluations(prepared)
    space = plan.disk(prepared)
    folder = Path(config.run.output)
    before = set(checkpoint.steps(folder))
    train.train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if "eval" in line and line["step"] >= prepared.step + goes_on]
    assert len(done) == times
    assert {sum(entry["tokens"] for entry in line["eval"].values()) for line in done} == {tokens}
    assert len(set(checkpoint.steps(folder)) - before) == space.written == (2 if goes_on else 4)
    assert space.kept == 4 and space.needed == space.written * space.checkpoint
    for path in (folder / "checkpoints").iterdir():
        real = sum(file.stat().st_size for file in path.iterdir())
        assert space.checkpoint == pytest.approx(real, rel=0.01, abs=6_000)
    source = Weights.open(str(folder))  # as `fastcpt export` does it
    hf.save_tensors(source.tensor, source.arch, tmp_path / "export", source.tokenizer, source.eod)
    real = sum(file.stat().st_size for file in (tmp_path / "export").iterdir())
    assert space.export == pytest.approx(real, rel=0.01, abs=3_000)


def test_checkpoints_kept_at_once(make_config: Any) -> None:
    prepared = plan.prepare(make_config(), 1)
    for count in range(1, 12):
        for every in range(1, 14):
            for keep in range(1, 5):
                case = changed(prepared, 0, 0, count, 0, save_every=every, keep=keep)
                there, most, written = 0, 0, 0
                for step in range(1, count + 1):
                    if step % every == 0 or step == count:
                        written, most = written + 1, max(most, there + 1)
                        there = min(there + 1, keep)
                space = plan.disk(case)
                assert (space.written, space.kept) == (written, most)
                assert space.needed == most * space.checkpoint


def test_the_share_of_evaluation(make_config: Any) -> None:
    """Of FLOPs, micro-batches padded as `evaluation.evaluate` pads them."""
    config = make_config(train=steps(5) | {"micro_batch": 4})
    prepared = plan.prepare(config, 1)
    padded = sum(len(range(0, len(named.windows), 4)) * 4 * SEQ_LEN for named in prepared.validation)
    flops = metrics.flops_per_token(prepared.origin.arch, SEQ_LEN)
    times, tokens, share = plan.evaluations(prepared)
    assert (times, tokens) == (5, 14 * SEQ_LEN)  # steps 0, 1 (the warm-up), 2, 4 and 5; 100 tokens are 7 windows
    assert share == pytest.approx(times * padded * flops / 3 / (5 * BATCH * SEQ_LEN * flops))
    none = plan.evaluations(plan.prepare(make_config(data={"val": []}), 1))
    assert none == (0, 0, 0.0)


# The curve


def heights(lines: list[str], glyphs: str) -> list[float]:
    """The length of each bar in lines."""
    return [sum(glyphs.index(line[column]) for line in lines) / (len(glyphs) - 1) for column in range(len(lines[0]))]


@pytest.mark.parametrize("glyphs", [BLOCKS, ASCII])
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(("first", "count", "warmup"), [(0, 1000, 300), (70, 59, 0), (0, 1, 1), (5, 3, 2), (0, 10**6, 10**4)])  # fmt: skip
def test_the_curve_is_the_schedule(glyphs: str, kind: Any, first: int, count: int, warmup: int) -> None:
    left = count - warmup
    parts = (left // 2, left // 4, 0.55) if kind.startswith("infinite") else (0, left // 4, 1.0)
    schedule = Plan(kind, first, count, warmup, 3e-4, 0.1, *parts)
    lines = curve(schedule, 60, 10, glyphs)
    assert len(lines) == 10 and {len(line) for line in lines} == {60}
    bars = heights(lines, glyphs)
    rates = [schedule.rate(first + 1 + round(column * (count - 1) / 59)) for column in range(60)]
    for bar, rate in zip(bars, rates):
        assert 0 <= bar - rate / 3e-4 * 10 + 1e-6 <= 1 / (len(glyphs) - 1) + 2e-6  # a part of a cell, upwards
    assert bars == [max(bars) if rate == 3e-4 else bar for bar, rate in zip(bars, rates)]
    falling = [bar for column, bar in enumerate(bars) if column * (count - 1) / 59 + 1 > warmup + 1]
    assert falling == sorted(falling, reverse=True)


def test_the_curve_of_a_branch_from_rate_0() -> None:
    assert set("".join(curve(Plan("cosine", 10, 5, 0, 0.0, 0.1)))) == {" "}


def test_the_labels_of_the_curve(make_config: Any) -> None:
    lines = plan.render(plan.prepare(make_config(train=steps(50)), 1)).split("\n")
    top = lines.index("learning rate, cosine") + 1
    assert lines[top].startswith("     1.00e-03 |") and lines[top + 9].startswith("            0 |")
    assert lines[top + 10].strip() == "+" + 60 * "-"
    assert lines[top + 11].split() == ["step", "1", "50:", "1.00e-04"]


# Refusals


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_what_train_refuses_is_refused_alike(
    make_config: Any, shards: Path, finished: Path, tmp_path: Path, write_shards: Any, random_documents: Any
) -> None:
    write_shards(tmp_path / "other-ids", random_documents(3, 35), vocab_size=70)
    write_shards(tmp_path / "short", [[1, 2, 3]], pairs=1)
    folder = str(finished)
    export = tmp_path / "export"
    hf.save_pretrained(GPTNeoX(Architecture(3, 24, 3, vocab_size=64)), export)
    (export / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    branch = {"from_": folder, "branch": True}
    no_warmup: dict[str, Any] = {"optim": {"lr": None}, "schedule": {"warmup": 0.0}}
    both = [source(shards, "new", 0.5), replace(source(shards, "new", 0.5), name="again")]
    cases: dict[str, dict[str, Any]] = {
        "no manifest.json": {"data": {"train": [source(tmp_path, "nowhere", 1)]}},
        "another tokenizer": {"data": {"train": [source(shards, "new", 1), source(tmp_path, "other-ids", 1)]}},
        "the model 60 rows": {"model": {"vocab_size": 60, "layers": 1, "width": 8, "heads": 1}},
        "fewer than one sequence": {"data": {"train": [source(tmp_path, "short", 1)]}},
        "the same set twice": {"data": {"train": both}},
        "needs Adam's moments": {"model": NO_MODEL, "init": {"from_": str(export), "optimizer": "keep"}},
        "not a whole safetensors": {"model": NO_MODEL, "init": {"from_": str(export)}},
        "no moments to keep": {"init": {"optimizer": "keep"}},
        "is unknown; known are": {"model": {"preset": "pythia-9b"}},
        "shorten the warm-up": {"schedule": {"warmup": 6.0}},
        "the rate would rise": {"init": {"from_": folder}, "train": steps(5)},
        "must stay 16 and 0": {"init": branch, "train": {"seed": 1}, **no_warmup},
        "has 2; remove it": {"init": {"from_": folder}, "model": {"layers": 3}},
        f"{tmp_path}/short: 4 tokens": {"data": {"val": [ValidationSet(name="v", path=str(tmp_path / "short"))]}},
    }
    for words, sections in cases.items():
        case = make_config("fresh", **sections)
        message = refusal(plan.prepare, case, 1)
        assert words in message and message == refusal(train.setup, case)
    resumed = replace(make_config(train=steps(8)), run=replace(make_config().run, output=folder))
    message = refusal(plan.prepare, resumed, 1)
    assert "train.tokens was 672, is 768" in message and message == refusal(train.setup, resumed)


def test_the_launch(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "6 sequences, fewer than 7 processes" in refusal(plan.prepare, make_config(), 7)
    assert "single" in refusal(plan.prepare, make_config(train={"parallel": "single"}), 2)
    assert "--gpus N" in refusal(plan.prepare, make_config(train={"parallel": "ddp"}), 1)
    assert plan.prepare(make_config(train={"parallel": "ddp"}), 4).share == 2  # sequences 0, 1 and 1, 3 ...
    monkeypatch.setenv("WORLD_SIZE", "2")
    for bad in ("0", "-1", "two", "", "1.5", "²"):
        assert "--gpus" in refusal(plan.main, ["--gpus", bad])


def test_a_forced_rise_warns_as_train_does(make_config: Any, finished: Path, capsys: Any) -> None:
    plan.prepare(make_config("next", init={"from_": str(finished), "force": True}), 1)
    assert "warning: " in capsys.readouterr().err


# Advice


def advised(config: Config, processes: int = 1) -> str:
    return "\n".join(plan.advice(plan.prepare(config, processes)))


def test_advice_on_what_is_measured_and_replayed(make_config: Any, finished: Path, shards: Path) -> None:
    base: dict[str, Any] = {"init": {"from_": str(finished)}}
    val = make_config().data.val
    new, replayed = [source(shards, "third", 2.0)], [source(shards, "third", 2.0), source(shards, "old", 0.1, True)]
    nothing = advised(make_config("next", data={"train": new, "val": []}, **base))
    assert "forgetting is not measured" in nothing and "adaptation is not measured" in nothing
    assert "replay" not in nothing and "nothing is evaluated" not in nothing
    text = advised(make_config("next", data={"train": new, "val": val}, **base))
    # The start's own run evaluated the same sets, of random text: no shift. 0.105 / 2.105 = 5%.
    assert "not measured" not in text and "the last evaluation of the start's own run" in text and "replay 5%" in text
    assert f"- {{name: old, path: {shards / 'old'}, weight: 0.105, replay: true}}" in text
    assert "replay" not in advised(make_config("next", data={"train": replayed, "val": val}, **base))
    # Going on with what the model knows shifts nothing; from scratch there is nothing to forget.
    branch = {"init": {"from_": str(finished), "branch": True}, "optim": {"lr": None}, "schedule": {"warmup": 0.0}}
    assert "replay" not in advised(make_config("next", **branch))
    scratch = advised(make_config("next", data={"val": []}))
    assert "nothing is evaluated" in scratch and "not measured" not in scratch and "replay" not in scratch
    assert "nothing is evaluated" not in advised(make_config("next"))


def test_advice_on_the_schedule(make_config: Any, finished: Path, shards: Path) -> None:
    new = {"data": {"train": [source(shards, "third", 1.0)]}}
    for optimizer, warmup, spike in (("reset", 0.0, True), ("reset", 0.2, False), ("keep", 0.0, False)):
        init = {"from_": str(finished), "optimizer": optimizer}
        text = advised(make_config("next", init=init, schedule={"warmup": warmup}, **new))
        assert ("expect a spike" in text) == spike
    for kind, ratio, high in (("constant", 0.1, True), ("cosine", 0.1, False), ("cosine", 0.5, True)):
        text = advised(make_config(schedule={"kind": kind, "min_lr_ratio": ratio}))
        assert ("above a fifth of its peak" in text) == high


def test_what_is_asked_is_answered(make_config: Any, finished: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    """By the options, on a continuation of the run of 1e-3: its peak, its loss on both texts, and half of its tokens."""
    third = make_config("next", init={"from_": str(finished)}, data={"train": [source(shards, "third", 2.0)]})
    (tmp_path / "run.yaml").write_text(config.to_yaml(third))
    asked = ["--priority", "balanced", "--budget", "240", "--shift"]
    assert plan.main(["--config", str(tmp_path / "run.yaml"), *asked]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "pre-trained by AdamW at a peak rate of 0.001" in text and "optim: {lr: 0.0005}" in text
    assert "--budget 240 ends at 50% of the schedule" in text and "train: {tokens: 240}" in text
    assert "measured on 100 tokens of each set" in text and "weight: 0.105, replay: true" in text
    assert plan.main(["--config", str(tmp_path / "run.yaml")]) == 0
    text = capsys.readouterr().out
    assert "--priority" not in text and "--budget" not in text and "measured on" not in text
    for bad in (["--priority", "mine"], ["--budget", "much"], ["--budget"]):
        assert "fastcpt plan --help" in refusal(plan.main, ["--config", str(tmp_path / "run.yaml"), *bad])


def test_advice_on_repeated_text(make_config: Any, shards: Path) -> None:
    one = {"data": {"train": [source(shards, "new", 1.0)]}}
    size = windows(shards, "new")
    for epochs, once, often in ((1, False, False), (1.5, True, False), (4, True, False), (4.5, False, True)):
        count = int(epochs * size)
        config = make_config(train={"tokens": Count(count * SEQ_LEN), "batch_tokens": Count(SEQ_LEN)}, **one)
        text = advised(config)
        assert ("cost little" in text, "worth little" in text) == (once, often)
        assert ("2305.16264" in text) == (once or often)


def test_advice_on_sizes(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rounded up to 480" in advised(make_config(train={"tokens": Count(400)}))
    assert "rounded" not in advised(make_config())
    # A step of 6 sequences: 5 + 1 is better cut as 3 + 3; 4 + 2 is not that uneven; on 2 processes it is 3 each.
    assert "last micro-batch is 1 sequences of up to 5; as many would do with 3" in advised(make_config(train={"micro_batch": 5}))  # fmt: skip
    for micro_batch in (1, 2, 3, 4, 6, 8):
        assert "micro-batch" not in advised(make_config(train={"micro_batch": micro_batch}))
    assert "micro-batch" not in advised(make_config(train={"micro_batch": 5}), 2)
    assert "evaluation adds" in advised(make_config())
    assert "evaluation adds" not in advised(make_config(train=steps(500), run={"eval_every": 1000}, schedule={"warmup": 0.0}))  # fmt: skip
    assert "checkpoints take" not in advised(make_config())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert "9.77 KiB are free" in advised(make_config())


# Speed


def test_speed_is_predicted_for_a_named_gpu_alone(make_config: Any) -> None:
    config = make_config(train=steps(500) | {"precision": "bf16"}, run={"eval_every": 100})
    prepared = plan.prepare(config, 2)
    assert not any(line.startswith(("speed", "time", "basis")) for line in plan.render(prepared).split("\n"))
    named = replace(prepared, gpu="h100", price=2.5)
    text = " ".join(plan.render(named).split())
    arch, tokens = prepared.origin.arch, BATCH * SEQ_LEN / 2
    kind, recompute, _ = named.spread
    assert (kind, recompute) == ("ddp", False)
    job = cost.Job(arch, cost.DEVICES["h100"], SEQ_LEN, 3, tokens, 2, 2, "ddp")
    hours = prepared.tokens * (1 + plan.evaluations(prepared)[2]) / cost.tokens_per_second(job) / 3600
    assert f"{cost.tokens_per_second(job):,.0f} each; MFU {cost.mfu(job):.1%} with attention counted as full" in text
    assert f"{hours:,.1f} GPU-hours; {2.5 * hours:,.2f} at 2.5 a GPU-hour" in text
    assert "measured none of it on a GPU" in text and published.summary() in text
    assert "GPU-hour" not in plan.render(replace(prepared, gpu=None))
    fp32 = plan.prepare(make_config(train={"precision": "fp32"}), 2)
    assert "not predicted" in plan.render(replace(fp32, gpu="h100"))


def test_the_options_of_a_gpu(capsys: Any) -> None:
    assert "known are a100-40, a100, h100, h200, b200" in refusal(plan.main, ["--gpu", "h300"])
    for price in ("0", "-1", "two", "nan", "inf"):
        assert "--price" in refusal(plan.main, ["--gpu", "h100", "--price", price])
    assert "--gpu NAME" in refusal(plan.main, ["--price", "2"])
    assert plan.main(["--table"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == cost.table()


def test_recomputation_is_planned(make_config: Any) -> None:
    """Of as much memory as two sequences at a time need, or three: the smaller micro-batch is advised."""
    base = make_config(train={"micro_batch": 6, "recompute": "auto"}, model={"width": 48, "layers": 6})
    prepared = plan.prepare(base, 1)

    def needed(sequences: int, recompute: bool) -> int:
        train = replace(base.train, micro_batch=sequences)
        return sum(memory.of(replace(base, train=train), prepared.origin.arch, prepared.world, 1, recompute).values())

    assert needed(6, True) < needed(4, False)
    room = replace(prepared, device_bytes=int((needed(4, False) + 1) / 0.9))
    assert room.spread[:2] == ("single", True)
    text = " ".join(plan.render(room).split())
    assert "layout single: one process; blocks are recomputed: keeping all would need" in text
    assert "with train.micro_batch 4 they need not be" in text and "inputs of blocks" in text
    assert "recomputed" not in plan.render(prepared)


# The whole


def fake_set(folder: Path, tokens: int, like: Path) -> None:
    """A set as large as asked, of files that take no space."""
    folder.mkdir()
    for name in ("tokenizer.json", "token_bytes.npy"):
        shutil.copy(like / name, folder / name)
    pairs = []
    for number in range(-(-tokens // 10**9)):
        count = min(10**9, tokens - number * 10**9)
        entry: dict[str, Any] = {
            "name": f"shard-{number:05}",
            "tokens": count,
            "documents": 1,
            "bin_bytes": 2 * count,
            "idx_bytes": 54,
        }
        for ending in ("bin", "idx"):
            with open(folder / f"{entry['name']}.{ending}", "wb") as file:
                os.truncate(file.fileno(), entry[f"{ending}_bytes"])
        pairs.append(entry | {"sums_sha256": "0" * 64})
    write_manifest(
        folder, tokenizer=ShardSet(like).manifest["tokenizer"], dtype=np.dtype(np.uint16), text_bytes=4 * tokens,
        pairs=pairs, files=["tokenizer.json", "token_bytes.npy"],
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["pythia-410m", "pythia-12b"])
def test_a_real_run_is_planned_at_once(
    preset: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, tokens in (("slimpajama", 299 * 10**9), ("pile", 10**10), ("pile-val", 10**9), ("slim-val", 10**9)):
        fake_set(tmp_path / name, tokens, shards / "new")
    (tmp_path / "run.yaml").write_text(f"""
model: {{preset: {preset}}}
data:
  train:
    - {{name: slimpajama, path: {tmp_path}/slimpajama, weight: 0.95}}
    - {{name: pile, path: {tmp_path}/pile, weight: 0.05, replay: true}}
  val:
    - {{name: pile, path: {tmp_path}/pile-val, role: upstream}}
    - {{name: slimpajama, path: {tmp_path}/slim-val, role: downstream}}
train: {{tokens: 250B, batch_tokens: 2_260_992, micro_batch: 23}}
optim: {{lr: 3.0e-4}}
run: {{output: {tmp_path}/run}}
""")
    monkeypatch.chdir(tmp_path)
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    loaded = config.parse(["--config", "run.yaml"])
    started = time.perf_counter()
    prepared = plan.prepare(loaded, 8)
    lines = plan.render(prepared).split("\n")
    assert time.perf_counter() - started < 5  # 0.05 s
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    assert plan.main(["--config", "run.yaml", "--gpus=8"]) == 0
    assert capsys.readouterr().out.split("\n")[:20] == lines[:20]
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert (prepared.last_step, prepared.share, prepared.plan.warmup) == (110_571, 138, 1_106)
    with torch.device("meta"):
        model = GPTNeoX(PRESETS[preset])
    parts = memory.parts(prepared.origin.arch, 23, 2048, True, False)
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    embeddings = model.embed_in.weight.numel() + model.embed_out.weight.numel()
    count = parts["weights"] // 4
    assert f"parameters     {count:,}; {count - embeddings:,} without embeddings" in lines
    steps = "110,571 of 2,260,992 tokens: 250B tokens (250,000,146,432); 1,106 steps of warm-up"
    assert f"steps          {steps}" in lines
    # Exact over 250B tokens, where no tally can go: 5% of the samples, and the two add up.
    slim, pile = plan.uses(prepared)
    total = 110_571 * 1104
    assert slim.samples + pile.samples == total and abs(pile.samples - 0.05 * total) <= 1


def test_every_kind_of_start_is_shown(
    make_config: Any, interrupted: Path, finished: Path, tmp_path: Path, shards: Path
) -> None:
    hf.save_pretrained(GPTNeoX(Architecture(3, 24, 3, vocab_size=64)), tmp_path / "model")
    branch = {"init": {"from_": str(finished), "branch": True}, "optim": {"lr": None}, "schedule": {"warmup": 0.0}}
    third = {"data": {"train": [source(shards, "third", 1.0)]}}
    for expected, case in {
        "scratch: new weights": make_config("s"),
        "pretrained: ": make_config("p", model=NO_MODEL, init={"from_": str(tmp_path / "model")}),
        "continue: ": make_config("c", init={"from_": str(finished)}, **third),
        "branch: ": make_config("b", **branch),
        "resume: ": make_config(train=steps(7)),
    }.items():
        text = plan.render(plan.prepare(case, 1))
        assert " ".join(text.split()).startswith(f"start {expected}")
    assert "step 4 of 7" in text.replace("\n" + 15 * " ", " ")
    complete = replace(make_config(train=steps(7)), run=replace(make_config().run, output=str(finished)))
    prepared = plan.prepare(complete, 1)
    assert "complete" in plan.render(prepared) and plan.evaluations(prepared) == (0, 14 * SEQ_LEN, 0.0)
    assert (plan.disk(prepared).written, plan.disk(prepared).needed) == (0, 0)


def test_output_where_blocks_cannot_be_written(make_config: Any) -> None:
    plan.render(plan.prepare(make_config(), 1), ASCII).encode("ascii")


def test_many_sources_stay_within_the_page(make_config: Any) -> None:
    prepared = plan.prepare(make_config(), 1)
    rows = [spending.Use(f"a-source-with-a-long-name-{n}", 10**11, 10**8, 10**8, 0.025, 3.25) for n in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "uses", lambda prepared: rows)
        shown = plan._data(prepared)
    assert len(shown) == 14 and shown[-1] == "and 28 more with 70.000% of the samples"
    assert max(map(len, shown)) <= 100


@pytest.mark.parametrize(("count", "text"), [(0, "0.00 B"), (1023, "1023.00 B"), (1024, "1.00 KiB"), (1.5 * 2**30, "1.50 GiB"), (2**50, "1.00 PiB")])  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert plan.size(count) == text
