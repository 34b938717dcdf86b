"""What is known of a model's pre-training goes on from run to run, and what is not known is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcpt import pretraining, train
from fastcpt.config import Source
from fastcpt.lineage import Origin
from fastcpt.model import PRESETS, Architecture
from fastcpt.schedules import Plan

PLAN = Plan("cosine", 0, 100, 1, 2e-3, 0.1)


def test_every_pythia_has_its_published_peak() -> None:
    assert pretraining.PEAKS.keys() == PRESETS.keys()
    for name, arch in PRESETS.items():
        known = pretraining.of(Origin("pretrained", arch, Path("hf")), PLAN)
        assert known.peak == pretraining.PEAKS[name] and name in known.text and "Adam" in known.text
    # Larger models had no larger rate: a slip of the hand would show.
    peaks = list(pretraining.PEAKS.values())
    assert peaks == sorted(peaks, reverse=True)
    other = pretraining.of(Origin("pretrained", Architecture(6, 128, 8), Path("hf")), PLAN)
    assert other == pretraining.Pretraining() and "not known" in other.text


@pytest.mark.parametrize(
    ("kind", "optimizer", "said"),
    [("pretrained", "reset", "start afresh"), ("continue", "keep", "are kept"), ("branch", "reset", "are kept"), ("resume", "reset", "are kept")],
)  # fmt: skip
def test_moments_and_pretraining_are_said(kind: Any, optimizer: Any, said: str, tiny_config: Callable) -> None:
    config = tiny_config(init={"from_": "x", "optimizer": optimizer})
    state = {"history": {"pretraining": {"peak": 5e-4, "optimizer": "AdamW", "told_by": "from scratch by fastcpt"}}}
    origin = Origin(kind, Architecture(6, 128, 8), Path("x"), None if kind == "pretrained" else state)
    text = pretraining.describe(config, origin, PLAN)
    assert text.startswith(f"Adam's moments {said}; ")
    assert ("is not known" in text) if kind == "pretrained" else ("by AdamW at a peak rate of 0.0005" in text)


def test_it_goes_on_from_run_to_run(
    tmp_path: Path, tiny_config: Callable, write_shards: Callable, random_documents: Callable, capsys: Any
) -> None:
    """A base at 4e-3, a continuation at 1e-3, a branch of that: the peak of pre-training stays that of the base."""
    for seed, name in enumerate("ab"):
        write_shards(tmp_path / name, random_documents(seed, 30))
    run = {"save_every": 1000}

    def start(name: str, source: str, **sections: Any) -> dict[str, Any]:
        data = {"train": [Source(name=source, path=str(tmp_path / source), weight=1)]}
        train.train(tiny_config(tmp_path / name, data=data, run=run, **sections))
        return json.loads((tmp_path / name / "checkpoints" / "step-5" / "state.json").read_text())

    first = start("base", "a", optim={"lr": 4e-3})["history"]
    assert first["pretraining"] == {"peak": 4e-3, "optimizer": "AdamW", "told_by": "from scratch by fastcpt"}
    assert "pre-trained by" not in capsys.readouterr().out
    second = start("next", "b", init={"from_": str(tmp_path / "base")})["history"]
    assert second["pretraining"] == first["pretraining"] and len(second["seen"]) == 2 and second["complete"]
    printed = capsys.readouterr().out
    assert (
        "Adam's moments start afresh; pre-trained by AdamW at a peak rate of 0.004 (from scratch by fastcpt)" in printed
    )


def test_a_checkpoint_of_an_earlier_version_tells_by_its_own_run() -> None:
    arch = Architecture(6, 128, 8)
    state: dict[str, Any] = {"history": {}, "plan": {"peak": 7e-4}, "config": {"init": {"from": "scratch"}}}
    assert pretraining.of(Origin("continue", arch, Path("x"), state), PLAN).peak == 7e-4
    state["config"]["init"]["from"] = "another"
    assert pretraining.of(Origin("continue", arch, Path("x"), state), PLAN).peak is None
    assert pretraining.of(Origin("scratch", arch), PLAN).peak == 2e-3
