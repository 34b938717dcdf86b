"""Advice on schedules: when it is given, that it names its source, and that it is silent once it is followed."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcpt import checkpoint, guidance, plan, train
from fastcpt.config import Config, Count, Source, to_dict, to_yaml
from fastcpt.lineage import Origin, make_plan
from fastcpt.model import Architecture
from fastcpt.schedules import Plan

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
