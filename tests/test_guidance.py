"""Advice: when it is given, that it names its source, and that it is silent once it is followed."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcpt import checkpoint, guidance, plan, train
from fastcpt.config import Config, Count, Phase, Source, ValidationSet, to_dict, to_yaml
from fastcpt.lineage import Origin, make_plan
from fastcpt.model import PRESETS, Architecture
from fastcpt.schedules import Plan
from fastcpt.shards import ShardSet
from fastcpt.shift import Shift

ARCH = Architecture(2, 24, 3, vocab_size=64)
SCRATCH = Origin("scratch", ARCH)
BATCH = 32


@pytest.fixture
def run(tiny_config: Callable, tmp_path: Path) -> Callable[..., Config]:
    """run(steps, **sections): a configuration of so many steps."""

    def make(steps: int = 100, **sections: Any) -> Config:
        sections["train"] = {"tokens": Count(BATCH * steps), "batch_tokens": Count(BATCH)}
        sections.setdefault("data", {"seq_len": 16})
        return tiny_config(tmp_path / "run", **sections)

    return make


def advice(config: Config, origin: Origin = SCRATCH) -> list[str]:
    return guidance.schedule(config, origin, make_plan(config, origin))


def follow(config: Config, text: str) -> Config:
    """The configuration with what a piece of advice says in it."""
    ((section, values),) = yaml.safe_load(text.split("\n")[1]).items()
    values = {{"from": "from_"}.get(name, name): value for name, value in values.items()}
    return replace(config, **{section: replace(getattr(config, section), **values)})


def only(config: Config, origin: Origin = SCRATCH) -> str:
    """The one piece of advice, of one sentence that names a paper and one line of YAML; followed, it is gone."""
    (text,) = advice(config, origin)
    assert re.search(r"\(arXiv \d{4}\.\d{5}", text.split("\n")[0]) and text.count("\n") == 1
    again = advice(follow(config, text), origin)
    assert text not in again and not any(piece.split("\n")[0][:20] == text[:20] for piece in again)
    return text


def continued(config: Config, step: int = 100, folder: Path = Path("old/checkpoints"), **of_before: Any) -> Origin:
    """A continuation of a checkpoint at `step` of another run."""
    before = replace(config, **of_before)
    old = make_plan(before, SCRATCH)
    state = {"step": step, "lr": old.rate(step), "plan": old.to_dict(), "config": to_dict(before), "history": {}}
    return Origin("continue", ARCH, folder / f"step-{step}", state)


def test_a_usual_run_has_nothing_to_be_told(run: Callable) -> None:
    for kind in ("cosine", "linear", "inverse_sqrt", "cosine_clipped"):
        assert advice(run(schedule={"kind": kind})) == []
        assert advice(run(schedule={"kind": kind}), continued(run())) == []


def test_a_cold_start_spikes(run: Callable) -> None:
    config = run(schedule={"warmup": 0.0})
    assert only(config) == (
        "schedule.warmup is 0 and Adam starts afresh: expect a spike of the loss (arXiv 2308.04014)\n"
        "schedule: {warmup: 0.01}"
    )
    assert len(advice(config, continued(run()))) == 1
    kept = run(schedule={"warmup": 0.0}, init={"from_": "old", "optimizer": "keep"})
    assert advice(kept, continued(run())) == []
    assert advice(config, replace(continued(run()), kind="branch")) == []


@pytest.mark.parametrize(
    ("schedule", "mend"),
    [
        ({"kind": "constant"}, "{kind: wsd}"),
        ({"min_lr_ratio": 0.21}, "{min_lr_ratio: 0.1}"),
        ({"kind": "cosine_clipped", "warmup": 0.4}, "{kind: cosine}"),
        ({"kind": "infinite", "decay": 0}, "{decay: 0.14}"),
        ({"kind": "wsd_linear", "decay": 0}, "{decay: 0.1}"),
    ],
)
def test_a_rate_that_stays_high_wants_a_decay(run: Callable, schedule: dict[str, Any], mend: str) -> None:
    text = only(run(schedule=schedule, run={"save_every": 10, "keep_every": 10}))
    assert "above a fifth of its peak" in text and text.endswith(f"\nschedule: {mend}")


def remaining(saved: dict[str, int], after: int, last: int) -> list[int]:
    """Steps of the checkpoints that a run keeps, by its rule: the newest `keep`, and multiples of `keep_every`."""
    every, keep, keep_every = saved["save_every"], saved["keep"], saved["keep_every"]
    steps = [step for step in range(after + 1, last + 1) if step % every == 0 or step == last]
    return [s for s in steps if s in steps[-keep:] or (keep_every and s % keep_every == 0)]


def test_a_checkpoint_of_the_constant_rate_is_kept(run: Callable) -> None:
    """Against a tally of what is kept. infinite on 100 steps: constant from 61 to 86; wsd: from 1 to 90."""
    given = 0
    for kind, begin, end in (("infinite", 61, 86), ("wsd", 1, 90)):
        for every in (1, 7, 10, 30, 40, 89, 1000):
            for keep in (1, 2, 5, 20):
                for keep_every in (0, 10, 40, 77):
                    saved = {"save_every": every, "keep": keep, "keep_every": keep_every}
                    config = run(schedule={"kind": kind}, run=saved)
                    there = any(begin <= step <= end for step in remaining(saved, 0, 100))
                    if there:
                        assert advice(config) == [], saved
                        continue
                    given += 1
                    text = only(config)
                    assert text.startswith("no checkpoint of the constant rate will be left at the end: ")
                    after = asdict(follow(config, text).run)
                    assert any(begin <= step <= end for step in remaining(after, 0, 100)), text
    assert given > 50


def test_the_steps_of_a_branch_are_counted_on(run: Callable) -> None:
    config = run(schedule={"kind": "wsd", "warmup": 0.0}, run={"save_every": 20, "keep": 1}, init={"from_": "x", "branch": True}, optim={"lr": None})  # fmt: skip
    origin = replace(continued(run()), kind="branch")
    assert only(config, origin).endswith("\nrun: {keep_every: 180}")


def test_text_is_changed_at_a_constant_rate(run: Callable, tmp_path: Path) -> None:
    wsd = run(schedule={"kind": "wsd"}).schedule
    folder = tmp_path / "old" / "checkpoints"
    assert advice(run(), continued(run(), 100, folder, schedule=wsd)) == [], "there is none to take in its place"
    for step in (60, 80, 95, 100):
        (folder / f"step-{step}").mkdir(parents=True)
    assert checkpoint.steps(tmp_path / "old") == [60, 80, 95, 100]
    for step in (95, 100):
        (text,) = advice(run(), continued(run(), step, folder, schedule=wsd))
        assert text.startswith(f"step {step} of {folder} has decayed: ") and "arXiv 2505.07796" in text
        assert yaml.safe_load(text.split("\n")[1]) == {"init": {"from": str(folder / "step-80")}}
    assert advice(run(), continued(run(), 80, folder, schedule=wsd)) == []
    assert advice(run(), continued(run(), 100, folder)) == [], "a cosine has no constant rate"


def test_a_third_cosine_in_a_row_could_be_one_schedule(run: Callable) -> None:
    second = run(init={"from_": "first"})
    found = only(run(run={"save_every": 10, "keep_every": 10}), continued(second))
    assert "arXiv 2503.02844" in found and found.endswith("\nschedule: {kind: infinite}")
    assert advice(run(), continued(run())) == [], "a second one"
    assert advice(run(optim={"lr": 1e-4}), continued(second)) == [], "it does not re-warm"
    assert len(advice(run(schedule={"kind": "constant"}), continued(second))) == 1, "only that it does not decay"


NOTHING = guidance.Asked()


# Rules about more than the schedule, on starts that `plan` prepares. SEQ: tokens a sequence, as in tiny_config.

SEQ = 16


@pytest.fixture
def prepare(
    tmp_path: Path, tiny_config: Callable, write_shards: Callable, random_documents: Callable
) -> Callable[..., plan.Prepared]:
    """prepare(kind, weights={name: (weight, replay)}, roles=..., **sections): a start with sets old and new."""
    for seed, name in enumerate(("old", "new", "old-val", "new-val")):
        write_shards(tmp_path / name, random_documents(seed, 60))

    def make(
        kind: Any = "continue", weights: Any = None, roles: tuple[str, ...] = ("upstream", "downstream"), history: Any = None,
        phases: Any = (),
        **sections: Any,
    ) -> plan.Prepared:  # fmt: skip
        sources = [
            Source(name=name, path=str(tmp_path / name), weight=weight, replay=replay)
            for name, (weight, replay) in (weights or {"new": (2.0, False)}).items()
        ]
        val = [
            ValidationSet(name=name, path=str(tmp_path / f"{name}-val"), role=role)
            for name, role in (("old", "upstream"), ("new", "downstream")) if role in roles
        ]  # fmt: skip
        train_ = {"tokens": Count(1600), "batch_tokens": Count(32)}
        start = plan.prepare(
            tiny_config(
                tmp_path / "runs" / "run",
                data={"train": sources, "val": val, "phases": list(phases)},
                train=train_,
                **sections,
            ),
            1,
        )
        state = {
            "history": {"complete": True, "seen": [ShardSet(tmp_path / "old").fingerprint], **(history or {})},
            "step": 100, "lr": 1e-4, "plan": make_plan(start.config, SCRATCH).to_dict(), "config": to_dict(start.config),
            "data": {"samples": 0, "phases": [], "seq_len": SEQ, "seed": 0, "fingerprints": {"val": {}}},
        }  # fmt: skip
        origin = replace(
            start.origin, kind=kind, path=tmp_path / "x", state=state if kind in ("continue", "branch") else None
        )
        return replace(start, origin=origin)

    return make


def piece(start: plan.Prepared, beginning: str, asked: guidance.Asked = NOTHING) -> tuple[str, Any] | None:
    """(the sentence, the YAML as read) of the piece of advice that has these words, or None."""
    found = [text for text in guidance.advice(start, asked) if beginning in text]
    if not found:
        return None
    (text,) = found
    sentence, *entry = text.split("\n")
    return sentence, yaml.safe_load("\n".join(entry))


def test_losses_of_both_texts_are_wanted(prepare: Callable) -> None:
    assert piece(prepare(), "not measured") is None
    sentence, entry = piece(
        prepare(roles=("downstream",), weights={"new": (1, False), "old": (1, True)}), "forgetting is not measured"
    )  # type: ignore[misc]
    assert "arXiv 2403.08763" in sentence and entry[0]["role"] == "upstream" and entry[0]["path"].endswith("/old-val")
    sentence, entry = piece(prepare(roles=("upstream",)), "adaptation is not measured")  # type: ignore[misc]
    assert entry[0]["role"] == "downstream" and entry[0]["path"].endswith("/new-val")
    assert piece(prepare("scratch", roles=()), "nothing is evaluated") and not piece(prepare("scratch"), "not measured")


WEAK, STRONG = Shift(0.5, "measured"), Shift(1.5, "measured")


@pytest.mark.parametrize(
    ("told", "weights", "part"),
    [
        (None, {"new": (2.0, False)}, 0.05), (WEAK, {"new": (2.0, False)}, 0.05), (STRONG, {"new": (2.0, False)}, 0.25),
        (STRONG, {"new": (0.95, False), "old": (0.05, True)}, 0.25), (WEAK, {"new": (0.99, False), "old": (0.01, True)}, None),
        (None, {"new": (0.95, False), "old": (0.05, True)}, None), (STRONG, {"new": (0.75, False), "old": (0.25, True)}, None),
        (STRONG, {"old": (1.0, True)}, None), (STRONG, {"old": (1.0, False)}, None),
    ],
)  # fmt: skip
def test_replay_as_the_shift_asks_for_it(prepare: Callable, told: Any, weights: Any, part: float | None) -> None:
    """The advised entry makes replay just that part of the samples, and of the tokens that there are anyway."""
    start = prepare(weights=weights)
    found = piece(start, "in data.train:", guidance.Asked(measured=told))
    if part is None:
        assert found is None
        return
    sentence, (entry,) = found  # type: ignore[misc]
    assert (
        "arXiv 2403.08763" in sentence
        and f"of 1.6K tokens {round(1600 * part)} are then old text, in the same compute" in sentence
    )
    assert entry["path"].endswith("/old") and entry["replay"] is True
    fresh = sum(weight for weight, replay in weights.values() if not replay)
    assert entry["weight"] / (fresh + entry["weight"]) == pytest.approx(part, rel=5e-3)
    assert (told is None) == ("fastcpt plan --shift" in sentence) and (told is None or told.text in sentence)
    followed = prepare(weights=weights | {"old": (entry["weight"], True)})
    if part == 0.25 or told is None:
        assert piece(followed, "in data.train:", guidance.Asked(measured=told)) is None


def test_replay_of_a_run_of_phases_is_counted_over_all_of_it(prepare: Callable) -> None:
    """10% of the first half and none of the second are 5% of the run."""
    sources = {"new": (None, False), "old": (None, True)}
    phases = [Phase(tokens=Count(800), weights={"new": 0.9, "old": 0.1}), Phase(weights={"new": 1.0})]
    start = prepare(weights=sources, phases=phases)
    sentence, (entry,) = piece(start, "in data.train", guidance.Asked(measured=STRONG))  # type: ignore[misc]
    assert (
        sentence.startswith("5.0% of the samples replay upstream text")
        and "beside those of each of data.phases" in sentence
    )
    assert entry["weight"] == pytest.approx(0.95 / 3, rel=5e-3)
    assert piece(start, "in data.train", guidance.Asked(measured=WEAK)) is None


def test_the_first_evaluation_tells_the_shift(prepare: Callable) -> None:
    results = {
        "old": {"role": "upstream", "loss": 2.0, "bits_per_byte": 1.0}, "new": {"role": "downstream", "loss": 3.0, "bits_per_byte": 1.75}
    }  # fmt: skip
    (text,) = guidance.after_start(prepare(), results)
    assert "shift is strong by a proxy, +1.50 nats a token before the first step (the first evaluation;" in text
    assert guidance.after_start(prepare("scratch"), results) == []
    assert guidance.after_start(prepare(), {"old": results["old"]}) == []


def test_a_random_start_where_there_is_a_model(prepare: Callable, tmp_path: Path, tiny_config: Callable) -> None:
    assert piece(prepare("scratch"), "weights are random") is None
    data = {"train": [Source(name="old", path=str(tmp_path / "old"), weight=1)]}
    for name, tokens in (("short", 96), ("long", 192)):
        train.train(tiny_config(tmp_path / "runs" / name, data=data, train={"tokens": Count(tokens)}))
    (tmp_path / "runs" / "odd" / "checkpoints" / "step-3").mkdir(parents=True)
    sentence, entry = piece(prepare("scratch"), "weights are random")  # type: ignore[misc]
    assert "arXiv 2308.04014" in sentence and "as far as they were alike" in sentence
    assert entry == {"init": {"from": str(tmp_path / "runs" / "long")}}
    assert piece(prepare("scratch", weights={"old": (1, False)}), "weights are random") is None, "it has seen all of it"
    assert piece(prepare("continue"), "weights are random") is None
    wider = prepare("scratch")
    wider = replace(wider, origin=replace(wider.origin, arch=Architecture(2, 48, 3, vocab_size=64)))
    assert piece(wider, "weights are random") is None


def test_a_random_start_of_a_pythia(prepare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    start = prepare("scratch")
    start = replace(start, origin=replace(start.origin, arch=PRESETS["pythia-70m"]))
    assert piece(start, "weights are random") is None, "other ids"
    for shards in start.mixture.sets.values():
        monkeypatch.setattr(shards, "vocab_size", 50277)
    sentence, entry = piece(start, "weights are random")  # type: ignore[misc]
    assert (
        entry == {"init": {"from": "EleutherAI/pythia-70m"}}
        and "if the text was prepared with its tokenizer" in sentence
    )


def test_a_large_model_wants_a_smaller_rate(prepare: Callable) -> None:
    for name, peak, told in (
        ("pythia-2.8b", 3e-4, True),
        ("pythia-12b", 1e-3, True),
        ("pythia-2.8b", 1e-4, False),
        ("pythia-1b", 1e-3, False),
    ):
        start = prepare(optim={"lr": peak})
        found = piece(replace(start, origin=replace(start.origin, arch=PRESETS[name])), "3B was harmed")
        assert (found is not None) == told
        assert found is None or ("arXiv 2406.14833" in found[0] and found[1] == {"optim": {"lr": 3e-5}})


@pytest.mark.parametrize(("priority", "rates", "lr"), [("new", "0.0003", 3e-4), ("balanced", "0.00015", 1.5e-4), ("old", "7.5e-05 to 3e-05", 7.5e-5)])  # fmt: skip
def test_a_priority_is_a_part_of_the_peak_of_pretraining(
    prepare: Callable, priority: Any, rates: str, lr: float
) -> None:
    asked = guidance.Asked(priority=priority)
    pretrained = prepare("pretrained")
    pythia = replace(pretrained, origin=replace(pretrained.origin, arch=PRESETS["pythia-410m"]))
    kept = {"pretraining": {"peak": 3e-4, "optimizer": "AdamW", "told_by": "from scratch by fastcpt"}}
    for start in (pythia, prepare(history=kept)):
        sentence, entry = piece(start, "--priority", asked)  # type: ignore[misc]
        assert (
            f"the peak of pre-training: {rates}, as it was pre-trained by" in sentence
            and "arXiv 2308.04014" in sentence
        )
        assert entry["optim"]["lr"] == pytest.approx(lr)
    sentence, entry = piece(pretrained, "--priority", asked)  # type: ignore[misc]
    assert "which is not known of scratch: look it up" in sentence and entry is None
    assert "does not" in piece(prepare("branch"), "--priority", asked)[0]  # type: ignore[index]
    assert piece(pythia, "--priority") is None


def test_a_small_budget_is_a_shorter_schedule(prepare: Callable) -> None:
    start = prepare()
    for budget, part, early in ((160, "10%", True), (800, "50%", False)):
        sentence, entry = piece(start, "--budget", guidance.Asked(budget=budget))  # type: ignore[misc]
        assert f"ends at {part} of the schedule, at a rate of {start.plan.rate(budget // 32):.2e}" in sentence
        assert "do not rank rates before the end" in sentence and "arXiv 2308.04014, figure 2" in sentence
        assert ("a smaller rate and a longer warm-up" in sentence) == early and entry == {"train": {"tokens": budget}}
    assert "is enough" in piece(start, "--budget", guidance.Asked(budget=1600))[0]  # type: ignore[index]


def test_a_run_that_goes_on_has_been_told(prepare: Callable) -> None:
    assert guidance.advice(prepare(roles=())) and guidance.advice(prepare("resume", roles=())) == []


def test_the_rate_is_shown_before_the_start_and_beside_that_of_the_save(run: Callable) -> None:
    config = run()
    plan_ = make_plan(config, SCRATCH)
    words, bar = guidance.preview(SCRATCH, plan_, 0)
    assert words == f"learning rate, cosine: {plan_.describe()}; 0.001 at step 1" and bar.startswith(
        "learning rate of steps 1 to 100: |█"
    )
    saved = {"step": 40, "lr": plan_.rate(40), "plan": plan_.to_dict()}
    (words, _) = guidance.preview(Origin("resume", ARCH, Path("x"), saved), plan_, 40)
    assert words.endswith(f"; {plan_.rate(41):.3g} at step 41 (at the save of step 40 it was {plan_.rate(40):.3g})")
    (words, _) = guidance.preview(Origin("resume", ARCH, Path("x"), saved | {"lr": 2e-4}), plan_, 40)
    assert "it was 0.0002): ANOTHER RATE" in words


@pytest.mark.parametrize(
    ("value", "text"), [(3e-5, "3.0e-05"), (7.5e-5, "7.5e-05"), (3e-4, "0.0003"), (1.25e-4, "0.000125"), (2.0, "2")]
)
def test_numbers_are_numbers_in_yaml(value: float, text: str) -> None:
    assert guidance.number(value) == text and yaml.safe_load(f"lr: {text}") == {"lr": value}


def test_plan_and_train_print_it_and_change_nothing(
    tmp_path: Path, tiny_config: Callable, write_shards: Callable, random_documents: Callable, capsys: Any
) -> None:
    path = str(write_shards(tmp_path / "text", random_documents(0, 30)).path)
    data = {"train": [Source(name="text", path=path, weight=1)], "seq_len": 16}
    config = tiny_config(tmp_path / "run", data=data, schedule={"kind": "constant", "warmup": 0.0})
    written = to_yaml(config)
    told = guidance.schedule(config, SCRATCH, make_plan(config, SCRATCH))
    assert [text.split("\n")[1] for text in told] == ["schedule: {warmup: 0.01}", "schedule: {kind: wsd}"]
    shown = plan.render(plan.prepare(config, 1))
    state = train.train(config)
    printed = capsys.readouterr().out
    for text in told:
        sentence, line = text.split("\n")
        assert f"advice: {sentence}\n{line}\n" in printed
        assert f"               {line}\n" in shown + "\n" and sentence.split(":")[0] in " ".join(shown.split())
    assert (tmp_path / "run" / "config.yaml").read_text() == written == to_yaml(state.config)
    assert isinstance(state.plan, Plan) and state.plan.kind == "constant"
    train.train(config)
    assert "advice" not in capsys.readouterr().out, "a run that goes on was told"
