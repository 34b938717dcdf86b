"""Replay against lists: the windows that a run feeds its model are those that earlier runs really fed it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fed_windows import BATCH, SEQ_LEN, STEP, chosen, fed, order_of, phase, planned, runs, write_sets

from fastcpt import checkpoint, metrics, plan, train
from fastcpt.config import Config, Count, Phase, Source
from fastcpt.permutation import Permutation
from fastcpt.shards import ShardSet


@pytest.fixture(scope="module")
def sets(tmp_path_factory: Any, write_shards: Callable, random_documents: Callable) -> dict[str, ShardSet]:
    return write_sets(tmp_path_factory.mktemp("sets"), write_shards, random_documents)


@pytest.fixture
def run(
    tmp_path: Path, tiny_config: Callable, sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    monkeypatch.setattr(metrics, "measured_matmul_rate", lambda *arguments, **options: 1e12)  # takes a while
    return runs(tmp_path, tiny_config, sets)


@pytest.fixture
def base(run: Callable, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, list[int]]:
    """A run that read 22 windows of a, and which ones, in its order."""
    config = run(11, [phase()], "base")
    return config, [window for _, window in fed(config, monkeypatch)]


def after(sets: dict[str, ShardSet], run: Callable, config: Config, weights: dict[str, float] | list[Phase], steps: int,
          seed: int = 1, name: str = "next", again: dict[str, Any] | None = None, **more: Any) -> Config:  # fmt: skip
    """A run that goes on with the model of `config`. again: what of the sources says replay."""
    phases = weights if isinstance(weights, list) else [phase(steps, weights)]
    read = [source for source in sets if any(source in (each.weights or {}) for each in phases)]
    sources = [
        Source(name=each, path=str(sets[each].path), replay=(again or {"a": True}).get(each, False)) for each in read
    ]
    init = {"from_": config.run.output, **more.pop("init", {})}
    return run(steps, phases, name, data={"train": sources}, train={"seed": seed}, init=init, **more)


def again(pool: list[int], shards: ShardSet, seed: int, count: int) -> list[int]:
    """`count` samples of windows that were read, in new orders, each once before one comes again."""
    order: list[int] = []
    for epoch in range(-(-count // len(pool))):
        key = (seed, SEQ_LEN, "replay", shards.fingerprint, epoch)
        order += [pool[Permutation(len(pool), key).one(place)] for place in range(len(pool))]
    return order[:count]


def split(found: list[tuple[str, int]]) -> dict[str, list[int]]:
    return {name: [window for each, window in found if each == name] for name in {name for name, _ in found}}


@pytest.mark.parametrize("share", [1, 5, 25, 90])
def test_only_what_was_read_is_replayed_each_once(
    run: Callable, sets: dict[str, ShardSet], base: Any, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """From batches without any of it (1%, 5%) to batches of nothing else (90%), and into a second pass over it."""
    config, pool = base
    weights = {"b": 100.0 - share, "a": float(share)}
    found = fed(after(sets, run, config, weights, 20), monkeypatch)
    assert [name for name, _ in found] == chosen(weights, 40)
    parts = split(found)
    assert parts["b"] == order_of(sets, "b", 1, epochs=2)[: len(parts["b"])]
    assert parts.get("a", []) == again(pool, sets["a"], 1, len(parts.get("a", [])))
    assert set(parts.get("a", [])) <= set(pool) and len(pool) == 22 < sets["a"].num_windows(SEQ_LEN)
    counts = {sum(name == "a" for name, _ in found[at : at + BATCH]) for at in range(0, 40, BATCH)}
    assert counts == {1: {0}, 5: {0, 1}, 25: {0, 1}, 90: {1, 2}}[share]
    if share == 90:
        assert sorted(parts["a"][:22]) == sorted(pool) and len(parts["a"]) == 36 and parts["a"][:14] != parts["a"][22:]


def test_in_the_order_of_the_first_reading(
    run: Callable, sets: dict[str, ShardSet], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pool = base
    found = planned(after(sets, run, config, {"b": 1, "a": 4}, 16, again={"a": "in_order"}))
    assert split(found)["a"] == (pool + pool)[:26]


def test_later_tasks_go_on_where_the_one_before_stopped(
    run: Callable, sets: dict[str, ShardSet], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks of three seeds: the third replays the rest of the first, then again all of it, and what it read of b."""
    config, pool = base
    second = after(sets, run, config, {"b": 3, "a": 1}, 14, seed=1, name="second")
    before = split(fed(second, monkeypatch))
    third = after(sets, run, second, [phase(4, {"c": 2, "a": 1, "b": 1}), phase(26, {"a": 2, "b": 2, "c": 1})], 30, seed=2,
                  name="third", again={"a": True, "b": True})  # fmt: skip
    found = split(planned(third))
    both = before["a"] + found["a"]
    assert both == again(pool, sets["a"], 1, len(both)) and len(before["a"]) == 7
    assert sorted(both[:22]) == sorted(pool), "nothing comes twice before all came once, whatever the ratio and the run"
    assert found["b"] == again(before["b"], sets["b"], 2, len(found["b"])) and len(found["b"]) > len(before["b"]) == 21
    assert found["c"] == order_of(sets, "c", 2)[: len(found["c"])]
    other = after(sets, run, second, {"c": 1, "a": 1}, 4, seed=2, name="other", again={"a": "in_order"})
    assert split(planned(other))["a"] == pool[:4], "another order is another reading"


def test_a_set_that_was_read_more_than_once_is_replayed_in_full(
    run: Callable, sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = sets["a"].num_windows(SEQ_LEN)
    base = run(windows // BATCH + 2, [phase()], "base")
    read = [window for _, window in fed(base, monkeypatch)]
    assert len(read) > windows
    found = split(planned(after(sets, run, base, {"b": 1, "a": 9}, 24)))["a"]
    assert sorted(found[:windows]) == list(range(windows)) and found == again(read[:windows], sets["a"], 1, len(found))
    assert found[:windows] != read[:windows]


def test_within_a_run_what_an_earlier_phase_read_is_replayed(
    run: Callable, sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set is named twice, as new text and as replay; a phase later more of it has been read, and is replayed."""
    named = {"a": sets["a"], "a again": sets["a"], "b": sets["b"]}
    phases = [phase(4, {"a": 1}), phase(5, {"b": 1, "a again": 4}), phase(3, {"a": 1}), phase(6, {"a again": 1})]
    sources = [Source(name=name, path=str(named[name].path), replay=name == "a again") for name in named]
    config = run(18, phases, data={"train": sources})
    order, found = order_of(sets, "a", 0), split(planned(config))
    assert found["a"] == order[:14]
    first, second = order[:8], order[:14]
    assert found["a again"] == again(first, sets["a"], 0, 8) + again(second, sets["a"], 0, 12)


def test_a_branch_goes_on_with_its_replay_and_replays_what_its_run_read(
    run: Callable, sets: dict[str, ShardSet], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pool = base
    second = after(sets, run, config, {"b": 1, "a": 1}, 8, name="second")
    before = split(fed(second, monkeypatch)[:10])
    go_on = {"init": {"from_": f"{second.run.output}/checkpoints/step-5", "branch": True}, "optim": {"lr": None}, "schedule": {"warmup": 0}}  # fmt: skip
    same = after(sets, run, second, {"b": 2, "a": 2}, 3, name="same", **go_on)
    whole = split(planned(after(sets, run, config, {"b": 1, "a": 1}, 8, name="whole")))
    found = split(planned(same))
    assert {name: before[name] + found[name] for name in found} == whole
    assert len(train.setup(same).mixture.phases) == 1
    other = after(sets, run, second, {"c": 1, "a": 1, "b": 2}, 6, name="other", again={"a": True, "b": True}, **go_on)
    found = split(planned(other))
    assert before["a"] + found["a"] == again(pool, sets["a"], 1, 5 + len(found["a"]))
    assert found["b"] == again(before["b"], sets["b"], 1, len(found["b"])) and len(found["b"]) == 6


def test_where_it_is_not_known_what_was_read_all_of_the_set_is_replayed(
    run: Callable, sets: dict[str, ShardSet], base: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Of a model of no history, and at another sequence length; a later task goes on in the same order."""
    config, _ = base
    first = after(sets, run, config, {"b": 1, "c": 4}, 15, again={"c": True})  # of c the model has read nothing
    before = split(fed(first, monkeypatch))["c"]
    later = after(sets, run, first, {"b": 1, "c": 4}, 15, seed=2, again={"c": True}, name="later", init={"force": True})
    found = before + split(planned(later))["c"]
    assert found == again(list(range(sets["c"].num_windows(SEQ_LEN))), sets["c"], 1, len(found))
    stored = after(sets, run, config, {"b": 1, "c": 9}, 30, name="stored", again={"c": "in_order"})
    assert split(planned(stored))["c"] == [*range(sets["c"].num_windows(SEQ_LEN)), *range(54)][:54]
    capsys.readouterr()
    longer = after(sets, run, config, {"b": 1, "a": 1}, 4, name="longer")
    longer = replace(longer, data=replace(longer.data, seq_len=8))
    longer = replace(longer, train=replace(longer.train, batch_tokens=Count(STEP)))
    count = sets["a"].num_windows(8)
    note = f"a: from all {count:,} windows, as it is not known which of them the model has read, shuffled"
    (source,) = [source for source in train.setup(longer).mixture.phases[0].sources if source.name == "a"]
    assert source.replay is not None and (source.replay.pool, source.replay.seed) == (count, None)
    assert note in " ".join(plan.render(plan.prepare(longer, 1)).split())
    train.train(longer)
    assert f"replay: {note}\n" in capsys.readouterr().out


def test_plan_says_what_is_replayed(run: Callable, sets: dict[str, ShardSet], base: Any) -> None:
    config, pool = base
    windows = sets["a"].num_windows(SEQ_LEN)
    prepared = plan.prepare(after(sets, run, config, {"b": 1, "a": 3}, 20), 1)
    shown = " ".join(plan.render(prepared).split())
    assert (
        f"replay a: from the 22 of {windows} windows that the model has read, in a new order its tokens are among"
        in shown
    )
    assert "new text is as many fewer (compute-equivalent)" in shown
    (use,) = [use for use in plan.uses(prepared) if use.name == "a"]
    assert (use.samples, use.epochs) == (30, 30 / len(pool))
    assert "compute-equivalent" not in plan.render(plan.prepare(run(5, [phase()], "fresh"), 1))


def test_a_checkpoint_of_before_is_replayed_too(
    run: Callable, sets: dict[str, ShardSet], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names neither `read` nor `replay`, but its position tells what its own run read."""
    config, pool = base
    read = checkpoint.read_state

    def older(found: Path) -> dict[str, Any]:
        state = json.loads(json.dumps(read(found)))
        if "base" in str(found):
            del state["history"]["read"]
            for each in state["data"]["phases"]:
                for source in each["sources"]:
                    del source["replay"]
        return state

    monkeypatch.setattr(checkpoint, "read_state", older)
    found = split(planned(after(sets, run, config, {"b": 1, "a": 1}, 10)))["a"]
    assert found == again(pool, sets["a"], 1, 10)
