"""Where a run comes from: what a resume refuses, how plans and phases go on, when re-warming is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt import UserError, checkpoint, hf, lineage, train
from fastcpt.config import Config, Count, Source, ValidationSet, to_dict, to_yaml
from fastcpt.data import MILLION, Mixture, Phase, PhaseSource
from fastcpt.lineage import (
    Origin,
    check_resume,
    check_rewarm,
    check_tokenizer,
    find_origin,
    fingerprints,
    history_of,
    make_phases,
    make_plan,
    read_before,
)
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import World
from fastcpt.schedules import Plan
from fastcpt.shards import ShardSet

ARCH = Architecture(2, 24, 3, vocab_size=64)
ALONE = World(0, 1, torch.device("cpu"))
SEQ_LEN = 16


def test_a_checkpoint_of_another_version_is_refused_with_what_it_lacks(
    tmp_path: Path, sets: dict[str, ShardSet], tiny_config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What is asked for is all that a save writes, so that what a version adds is asked for as well."""
    data = {"train": [Source(name="new", path=str(next(iter(sets.values())).path), weight=1.0)], "seq_len": 16}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny_config(tmp_path / "run", data=data)))
    arguments = ["--config", str(file)]
    assert train.main(arguments) == 0
    (found,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = checkpoint.read_state(found)
    assert set(state) == set(lineage.FOR_POSITION)
    for name in ("interval", "eod_token"):
        for more in ([], ["--run.output", str(tmp_path / "other"), "--init.from", str(tmp_path / "run")]):
            lacking = {key: value for key, value in state.items() if key != name}
            monkeypatch.setattr(checkpoint, "read_state", lambda found, lacking=lacking: dict(lacking))
            if more and name not in lineage.FOR_WEIGHTS:
                assert lineage.read_state(found, lineage.FOR_WEIGHTS) == lacking
                continue
            assert train.main([*arguments, *more]) == 2
            assert (
                f"{found}/state.json: has no '{name}': another version of fastcpt wrote it" in capsys.readouterr().err
            )


@pytest.fixture(scope="module")
def sets(tmp_path_factory, write_shards: Callable, random_documents: Callable) -> dict[str, ShardSet]:
    folder = tmp_path_factory.mktemp("sets")
    return {name: write_shards(folder / name, random_documents(seed, 30)) for seed, name in enumerate("abc")}


def entry(name: str, weight: float = 1.0, replay: bool = False, path: str | None = None) -> Source:
    return Source(name=name, path=path or name, weight=weight, replay=replay)


def state_of(config: Config, sets: dict[str, ShardSet], step: int = 3, lr: float = 5e-4, **changes: Any) -> dict:
    """`state.json` as `train.save` writes it, by hand and through JSON, of a run that began at its data's start."""
    total = sum(source.weight for source in config.data.train)
    sources = tuple(
        PhaseSource(source.name, sets[source.name].fingerprint, round(source.weight / total * MILLION), 0)
        for source in config.data.train
    )
    samples = step * config.train.batch_tokens // config.data.seq_len
    used = {source.name: sets[source.name] for source in config.data.train}
    state = {
        "step": step,
        "lr": lr,
        "architecture": asdict(ARCH),
        "plan": asdict(Plan("cosine", 0, 5, 1, 1e-3, 0.1)),
        "data": {
            "samples": samples,
            "seq_len": config.data.seq_len,
            "seed": config.train.seed,
            "phases": [asdict(Phase(0, sources))],
            "seen": Mixture(used, [Phase(0, sources)], SEQ_LEN, config.train.seed).seen(samples),
            "fingerprints": {"train": fingerprints(config.data.train, sets), "val": {}},
        },
        "history": {"complete": True, "seen": sorted(sets[source.name].fingerprint for source in config.data.train)},
        "config": to_dict(config),
    }
    return json.loads(json.dumps(state | changes))


def origin_of(kind: Any, state: dict | None = None, path: Path | None = None) -> Origin:
    return Origin(kind, ARCH, path, state)


@pytest.fixture
def run(tiny_config: Callable) -> Callable[..., Config]:
    """run(*sources, **sections): a configuration of these sources."""

    def make(*sources: Source, **sections: dict[str, Any]) -> Config:
        data = {"train": list(sources or (entry("a"),)), "seq_len": SEQ_LEN}
        return tiny_config(**{**sections, "data": data | sections.get("data", {})})

    return make


FREE_CHANGES = {
    "output": {"run": {"output": "elsewhere"}},
    "reports": {"run": {"log_every": 1, "eval_every": 7, "save_every": 3, "keep": 9, "tensorboard": True}},
    "wandb": {"run": {"wandb": "project"}},
    "micro-batch": {"train": {"micro_batch": 1}},
    "parallel": {"train": {"parallel": "ddp"}},
    "compile": {"train": {"compile": True}},
    "recompute": {"train": {"recompute": "blocks"}},
    "execution": {"train": {"kernels": "torch", "loss": "full", "attention": "sdpa"}},
    "reader": {"data": {"reader": "pread"}},
    "path": {"data": {"train": [entry("a", path="moved/a")]}},
}


def resume(config: Config, state: dict, sets: dict[str, ShardSet]) -> None:
    content = {"train": fingerprints(config.data.train, sets), "val": fingerprints(config.data.val, sets)}
    check_resume(config, state, content)


@pytest.mark.parametrize("name", FREE_CHANGES)
def test_where_and_how_a_run_goes_on_is_free(run: Callable, sets: dict[str, ShardSet], name: str) -> None:
    resume(run(**FREE_CHANGES[name]), state_of(run(), sets), sets)


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({}, []),
        ({"optim": {"lr": 2e-3}}, ["optim.lr was 0.001, is 0.002"]),
        ({"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}, ["optim.betas.1 was 0.95, is 0.99"]),
        ({"train": {"seed": 1}}, ["train.seed was 0, is 1"]),
        ({"run": {"eval_tokens": Count(99)}}, ["run.eval_tokens was 4194304, is 99"]),
        ({"train": {"tokens": Count(960)}}, ["train.tokens was 480, is 960"]),
        ({"train": {"batch_tokens": Count(48)}}, ["train.batch_tokens was 96, is 48"]),
        ({"train": {"precision": "bf16"}}, ["train.precision was 'fp32', is 'bf16'"]),
        ({"data": {"document_mask": True}}, ["data.document_mask was False, is True"]),
        ({"data": {"seq_len": 8}}, ["data.seq_len was 16, is 8"]),
        ({"model": {"layers": 3, "width": 24, "heads": 3, "vocab_size": 64}}, ["model.layers was 2, is 3"]),
        ({"init": {"from_": "elsewhere"}}, ["init.from was 'scratch', is 'elsewhere'"]),
        ({"schedule": {"kind": "constant", "warmup": 2}}, ["schedule.kind was 'cosine', is 'constant'", "schedule.warmup was 0.01, is 2"]),
        ({"data": {"train": [entry("a", weight=2.0)]}}, ["data.train.0.weight was 1.0, is 2.0"]),
        ({"data": {"train": [entry("a", replay=True)]}}, ["data.train.0.replay was False, is True"]),
    ],
)  # fmt: skip
def test_a_resume_under_another_configuration_is_refused_with_the_difference(
    run: Callable, sets: dict[str, ShardSet], sections: dict, changed: list[str]
) -> None:
    state = state_of(run(), sets)
    if not changed:
        resume(run(**sections), state, sets)
        return
    with pytest.raises(UserError) as raised:
        resume(run(**sections | {"run": {"log_every": 3} | sections.get("run", {})}), state, sets)
    assert f"run: this run is at step 3 with another configuration ({'; '.join(changed)}); put it back" in str(
        raised.value
    )


def test_a_resume_with_another_source_or_validation_set_is_refused(run: Callable, sets: dict[str, ShardSet]) -> None:
    state = state_of(run(), sets)
    with pytest.raises(UserError, match=r"data\.train\.1\.name was None, is 'b'"):
        resume(run(entry("a"), entry("b")), state, sets)
    with pytest.raises(UserError, match=r"data\.val\.0\.name was None, is 'b'"):
        resume(run(data={"val": [ValidationSet(name="b", path="b")]}), state, sets)


@pytest.mark.parametrize("name", ["a", "path", "x.path", "run.a"])
def test_a_resume_on_other_content_is_refused_whatever_the_name(
    run: Callable, sets: dict[str, ShardSet], name: str
) -> None:
    state = state_of(run(entry(name)), {name: sets["a"]})
    resume(run(entry(name, path="moved")), state, {name: sets["a"]})
    old, new = sets["a"].fingerprint, sets["b"].fingerprint
    with pytest.raises(UserError, match=f"content of data.train.{name} was '{old}', is '{new}'"):
        resume(run(entry(name)), state, {name: sets["b"]})


def test_plan_of_a_new_run_counts_whole_steps_rounded_up(run: Callable) -> None:
    config = run(train={"tokens": Count(96 * 100 + 1)}, schedule={"warmup": 0.05, "min_lr_ratio": 0.2})
    for kind in ("scratch", "pretrained"):
        assert make_plan(config, origin_of(kind)) == Plan("cosine", 0, 101, 6, 1e-3, 0.2)


def test_plan_of_a_continued_run_starts_anew(run: Callable, sets: dict[str, ShardSet]) -> None:
    config = run(schedule={"kind": "constant", "warmup": 2})
    assert make_plan(config, origin_of("continue", state_of(run(), sets))) == Plan("constant", 0, 5, 2, 1e-3, 0.1)


def test_plan_of_a_branch_starts_at_its_checkpoint(run: Callable, sets: dict[str, ShardSet]) -> None:
    config = run(init={"from_": "x", "branch": True}, optim={"lr": None}, schedule={"warmup": 0, "min_lr_ratio": 0.0})
    plan = make_plan(config, origin_of("branch", state_of(run(), sets, step=3, lr=7e-4)))
    assert plan == Plan("cosine", 3, 5, 0, 7e-4, 0.0)
    assert plan.rate(4) < 7e-4 and plan.rate(8) == pytest.approx(0.0, abs=1e-18)


def test_plan_of_a_resumed_run_is_the_checkpoints_own(run: Callable, sets: dict[str, ShardSet]) -> None:
    state = state_of(run(), sets)
    config = run(train={"tokens": Count(9600)}, optim={"lr": 9.0})
    assert make_plan(config, origin_of("resume", state)) == Plan("cosine", 0, 5, 1, 1e-3, 0.1)


def test_a_run_from_before_there_were_other_schedules_goes_on(run: Callable, sets: dict[str, ShardSet]) -> None:
    """Its checkpoint names neither a cool-down nor a decay; what its kind does not use was not refused then."""
    config = run(schedule={"kind": "constant", "warmup": 2, "min_lr_ratio": 0.0})
    state = state_of(config, sets)
    state["plan"] = {"kind": "constant", "first": 0, "steps": 5, "warmup": 2, "peak": 1e-3, "min_lr_ratio": 0.0}
    del state["config"]["schedule"]["cooldown"], state["config"]["schedule"]["decay"]
    resume(config, state, sets)
    plan = make_plan(config, origin_of("resume", state))
    assert [plan.rate(step) for step in range(1, 6)] == [5e-4, *[1e-3] * 4]
    with pytest.raises(UserError, match=r"schedule.min_lr_ratio is 0.0, which kind constant does not use"):
        make_plan(config, origin_of("scratch"))


def test_phases_of_a_run_without_a_past_start_at_zero(run: Callable, sets: dict[str, ShardSet]) -> None:
    config = run(entry("a", 3), entry("b", 1))
    expected = Phase(
        0, (PhaseSource("a", sets["a"].fingerprint, 750_000, 0), PhaseSource("b", sets["b"].fingerprint, 250_000, 0))
    )
    assert make_phases(config, origin_of("scratch"), sets) == [expected]
    assert make_phases(config, origin_of("pretrained"), sets) == [expected]
    past = state_of(run(entry("a")), sets)
    assert make_phases(config, origin_of("continue", past), sets) == [expected], "a continued run reads anew"


def test_phases_of_a_resumed_run_are_the_checkpoints_own(run: Callable, sets: dict[str, ShardSet]) -> None:
    config = run(entry("a", 3), entry("b", 1))
    phases = [
        Phase(0, (PhaseSource("a", sets["a"].fingerprint, MILLION, 0),)),
        Phase(7, (PhaseSource("a", sets["a"].fingerprint, 750_000, 7), PhaseSource("b", sets["b"].fingerprint, 250_000, 0))),
    ]  # fmt: skip
    state = state_of(config, sets)
    state["data"]["phases"] = json.loads(json.dumps([asdict(phase) for phase in phases]))
    assert make_phases(config, origin_of("resume", state), sets) == phases


def branch(config: Config, state: dict, sets: dict[str, ShardSet]) -> Mixture:
    phases = make_phases(config, origin_of("branch", state), sets)
    return Mixture({source.name: sets[source.name] for source in config.data.train}, phases, SEQ_LEN, seed=0)


def windows_by_content(mixture: Mixture, first: int, count: int) -> dict[str, list[int]]:
    order: dict[str, list[int]] = {}
    for name, window in mixture.locate(first, count):
        order.setdefault(mixture.sets[name].fingerprint, []).append(window)
    return order


def test_a_branch_with_the_same_mixture_reads_what_the_run_would_have_read(
    run: Callable, sets: dict[str, ShardSet]
) -> None:
    config = run(entry("a", 3), entry("b", 1))
    state = state_of(config, sets)
    whole = Mixture(sets, make_phases(config, origin_of("scratch"), sets), SEQ_LEN, seed=0)
    assert branch(run(entry("a", 6), entry("b", 2)), state, sets).locate(18, 50) == whole.locate(18, 50)


def test_a_branch_finds_its_sources_under_other_names(run: Callable, sets: dict[str, ShardSet]) -> None:
    """By content: a renamed source goes on where it was, and two that swap their names swap no text."""
    state = state_of(run(entry("a", 3), entry("b", 1)), sets)
    expected = branch(run(entry("a", 3), entry("b", 1)), state, sets).locate(18, 50)
    renamed = {"new": sets["a"], "b": sets["b"]}
    found = branch(run(entry("new", 3), entry("b", 1)), state, renamed).locate(18, 50)
    assert found == [({"a": "new", "b": "b"}[name], window) for name, window in expected]
    swapped = {"b": sets["a"], "a": sets["b"]}
    found = branch(run(entry("b", 3), entry("a", 1)), state, swapped).locate(18, 50)
    assert found == [({"a": "b", "b": "a"}[name], window) for name, window in expected]


def test_a_branch_with_another_mixture_repeats_and_skips_nothing(run: Callable, sets: dict[str, ShardSet]) -> None:
    config = run(entry("a", 3), entry("b", 1))
    state = state_of(config, sets)
    before = windows_by_content(branch(config, state, sets), 0, 18)
    mixture = branch(run(entry("b", 1), entry("c", 2)), state, sets)
    assert [phase.first for phase in mixture.phases] == [0, 18]
    after = windows_by_content(mixture, 18, 60)
    assert after.keys() == {sets["b"].fingerprint, sets["c"].fingerprint}
    for name in ("b", "c"):
        fingerprint = sets[name].fingerprint
        alone = Mixture({name: sets[name]}, [Phase(0, (PhaseSource(name, fingerprint, MILLION, 0),))], SEQ_LEN, 0)
        sequence = before.get(fingerprint, []) + after[fingerprint]
        assert sequence == [window for _, window in alone.locate(0, len(sequence))]


def test_history_of_what_is_not_ours_is_incomplete(run: Callable, sets: dict[str, ShardSet]) -> None:
    assert history_of(origin_of("scratch")) == {"complete": True, "seen": []}
    assert history_of(origin_of("pretrained")) == {"complete": False, "seen": []}
    state, content = state_of(run(), sets), sets["a"].fingerprint
    assert history_of(origin_of("continue", state)) == {"complete": True, "seen": [content]}
    assert read_before(origin_of("scratch")) == read_before(origin_of("pretrained")) == {}
    assert read_before(origin_of("continue", state)) == {content: {"samples": 18, "seed": 0, "seq_len": SEQ_LEN}}
    for kind in ("resume", "branch"):  # whose own position says the rest
        assert read_before(origin_of(kind, state)) == {}


def rewarm(config: Config, sets: dict[str, ShardSet], kind: str, state: dict | None = None) -> None:
    origin = origin_of(kind, state)
    check_rewarm(config, origin, make_plan(config, origin), sets)


REFUSED = r"runs/old: the rate would rise from 0\.0005 to 0\.001, but the model has seen all of "


def test_rewarming_on_seen_data_is_refused(run: Callable, sets: dict[str, ShardSet]) -> None:
    state = state_of(run(entry("a"), entry("b")), sets, lr=5e-4)
    init = {"from_": "runs/old"}
    for sources in ([entry("a")], [entry("b"), entry("a")], [entry("a"), entry("b", replay=True)]):
        with pytest.raises(UserError, match=REFUSED + r".*arXiv 2308\.04014, finding 3.*init\.branch: true"):
            rewarm(run(*sources, init=init), sets, "continue", state)
    for schedule in ({"kind": "constant", "warmup": 0}, {"kind": "constant", "warmup": 2}):
        with pytest.raises(UserError, match=REFUSED):
            rewarm(run(entry("a"), init=init, schedule=schedule), sets, "continue", state)


def test_a_replayed_set_is_not_new_even_if_the_model_never_saw_it(run: Callable, sets: dict[str, ShardSet]) -> None:
    """What says replay is taken at its word: adding only such sources to seen ones is no reason to re-warm."""
    state = state_of(run(entry("a")), sets, lr=5e-4)
    config = run(entry("a"), entry("c", replay=True), init={"from_": "runs/old"})
    with pytest.raises(UserError, match=REFUSED + r"\['a'\]"):
        rewarm(config, sets, "continue", state)
    only_replay = run(entry("c", replay=True), init={"from_": "runs/old"})
    with pytest.raises(UserError, match="every source says replay: true"):
        rewarm(only_replay, sets, "continue", state)
    with pytest.raises(UserError, match="every source says replay: true"):
        rewarm(only_replay, sets, "pretrained")


def test_a_rate_that_does_not_rise_is_no_rewarming(
    run: Callable, sets: dict[str, ShardSet], capsys: pytest.CaptureFixture
) -> None:
    for lr in (1e-3, 2e-3):
        state = state_of(run(entry("a")), sets, lr=lr)
        rewarm(run(entry("a"), schedule={"kind": "constant", "warmup": 0}), sets, "continue", state)
        rewarm(run(entry("a")), sets, "continue", state)
    assert capsys.readouterr().err == ""


def test_rewarming_on_new_data_is_what_it_is_for(
    run: Callable, sets: dict[str, ShardSet], capsys: pytest.CaptureFixture
) -> None:
    state = state_of(run(entry("a")), sets, lr=5e-4)
    rewarm(run(entry("b")), sets, "continue", state)
    rewarm(run(entry("b", 0.95), entry("a", 0.05, replay=True)), sets, "continue", state)
    rewarm(run(entry("b"), entry("a")), sets, "continue", state)
    moved = {"a": sets["b"]}
    rewarm(run(entry("a")), moved, "continue", state)  # the old name, but new content
    assert capsys.readouterr().err == ""


def test_rewarming_on_seen_data_can_be_forced_with_a_warning(
    run: Callable, sets: dict[str, ShardSet], capsys: pytest.CaptureFixture
) -> None:
    state = state_of(run(entry("a")), sets, lr=5e-4)
    rewarm(run(entry("a"), init={"from_": "runs/old", "force": True}), sets, "continue", state)
    assert re.match("warning: " + REFUSED, capsys.readouterr().err)


def test_an_unknown_history_is_a_warning(
    run: Callable, sets: dict[str, ShardSet], capsys: pytest.CaptureFixture
) -> None:
    rewarm(run(entry("a"), entry("b", replay=True), init={"from_": "hub/model"}), sets, "pretrained")
    message = "warning: what hub/model was trained on is not known in full; if a was part of it"
    assert capsys.readouterr().err.startswith(message)
    later = state_of(run(entry("a")), sets, lr=5e-4, history={"complete": False, "seen": [sets["a"].fingerprint]})
    rewarm(run(entry("c"), init={"from_": "runs/old"}), sets, "continue", later)
    assert "what runs/old was trained on is not known in full; if c was part" in capsys.readouterr().err
    with pytest.raises(UserError, match=REFUSED):
        rewarm(run(entry("a"), init={"from_": "runs/old"}), sets, "continue", later)


def test_runs_that_keep_their_rate_or_have_no_past_are_not_asked(
    run: Callable, sets: dict[str, ShardSet], capsys: pytest.CaptureFixture
) -> None:
    rewarm(run(entry("a")), sets, "scratch")
    state = state_of(run(entry("a")), sets, lr=5e-4)
    rewarm(run(entry("a")), sets, "resume", state)
    rewarm(run(init={"from_": "x", "branch": True}, optim={"lr": None}, schedule={"warmup": 0}), sets, "branch", state)
    assert capsys.readouterr().err == ""


def test_sets_of_different_tokenizers_are_refused(
    run: Callable, sets: dict[str, ShardSet], tmp_path: Path, write_shards: Callable
) -> None:
    check_tokenizer(run(), origin_of("scratch"), list(sets.values()))
    other = write_shards(tmp_path / "other", [[1, 2]], vocab_size=63)
    for forced in (False, True):  # force speaks of the model, not of a mixture that has no one meaning
        config = run(init={"from_": "x", "force": forced})
        for kind in ("scratch", "pretrained"):
            with pytest.raises(UserError, match=rf"{other.path}: made with another tokenizer than {sets['a'].path}"):
                check_tokenizer(config, origin_of(kind, path=tmp_path), [sets["a"], sets["b"], other])


def test_text_of_another_tokenizer_than_the_models_is_refused_unless_forced(
    run: Callable, sets: dict[str, ShardSet], tmp_path: Path, write_shards: Callable
) -> None:
    config = run(init={"from_": "x"})
    model = tmp_path / "model"
    model.mkdir()
    for kind in ("pretrained", "continue", "branch", "resume"):
        check_tokenizer(config, origin_of(kind, path=model), [sets["a"]])  # none beside it: nothing is known
    content = json.loads((sets["a"].path / "tokenizer.json").read_bytes())
    (model / "tokenizer.json").write_text(json.dumps({**content, "padding": None, "version": "1.0"}, indent=3))
    check_tokenizer(config, origin_of("pretrained", path=model), [sets["a"]])  # another spelling of the same
    content["model"]["vocab"]["more"] = 64
    (model / "tokenizer.json").write_text(json.dumps(content))
    for kind in ("pretrained", "continue", "branch", "resume"):
        with pytest.raises(UserError, match=rf"{model / 'tokenizer.json'}: the model's tokenizer is not the one"):
            check_tokenizer(config, origin_of(kind, path=model), [sets["a"]])
        check_tokenizer(run(init={"from_": "x", "force": True}), origin_of(kind, path=model), [sets["a"]])


def test_a_run_from_scratch_has_no_moments_to_keep(run: Callable, tmp_path: Path) -> None:
    output = {"output": str(tmp_path / "run")}
    origin = find_origin(run(run=output), ALONE)
    assert origin == Origin("scratch", replace(ARCH, max_positions=SEQ_LEN))
    with pytest.raises(UserError, match=r"init\.optimizer is keep, but a run from scratch has no moments"):
        find_origin(run(run=output, init={"optimizer": "keep"}), ALONE)


def test_a_hugging_face_model_has_weights_alone(run: Callable, tmp_path: Path) -> None:
    model = GPTNeoX(ARCH)
    model.initialise_()
    hf.save_pretrained(model, tmp_path / "model")
    output, source = {"output": str(tmp_path / "run")}, {"from_": str(tmp_path / "model")}
    origin = find_origin(run(run=output, init=source, model={}), ALONE)
    assert (origin.kind, origin.path, origin.state) == ("pretrained", tmp_path / "model", None)
    assert origin.arch == ARCH and not origin.keeps_position
    with pytest.raises(UserError, match=r"init\.optimizer: keep needs Adam's moments"):
        find_origin(run(run=output, init=source | {"optimizer": "keep"}), ALONE)
    with pytest.raises(UserError, match=r"init\.branch needs Adam's moments"):
        branching = {"init": source | {"branch": True}, "optim": {"lr": None}, "schedule": {"warmup": 0}}
        find_origin(run(run=output, **branching), ALONE)
    with pytest.raises(UserError, match=r"model\.layers is 5, but .*model has 2"):
        find_origin(run(run=output, init=source, model={"layers": 5}), ALONE)
