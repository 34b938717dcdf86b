"""The shift of new text: against hand-computed numbers, the papers' anchors, and where its losses may come from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcpt import UserError, lineage, shift, train
from fastcpt.config import Config, Count, Source, ValidationSet
from fastcpt.evaluation import NamedSet
from fastcpt.lineage import Origin
from fastcpt.model import Architecture


def results(**sets: tuple[str, float, float]) -> shift.Results:
    """name=(role, nats a token, bytes a token)"""
    return {
        name: {"role": role, "loss": loss, "bits_per_byte": loss / math.log(2) / size}
        for name, (role, loss, size) in sets.items()
    }


def test_the_shift_is_the_gap_in_nats_per_token_of_the_old_text() -> None:
    """With tokens of the same length in both it is the plain gap; where the new text's are half as long, the loss of two
    of them counts for one."""
    same = shift.of(results(a=("upstream", 2.17, 4.0), b=("downstream", 2.70, 4.0), c=("other", 9.0, 1.0)), "x")
    assert same is not None and same.nats == pytest.approx(0.53) and same.kind == "weak"
    half = shift.of(results(a=("upstream", 2.0, 4.0), b=("downstream", 2.0, 2.0)), "x")
    assert half is not None and half.nats == pytest.approx(2 * 2.0 - 2.0) and half.kind == "strong"
    both = shift.of(
        results(
            a=("upstream", 2.0, 4.0), b=("upstream", 3.0, 4.0), c=("downstream", 3.0, 4.0), d=("downstream", 4.0, 4.0)
        ),
        "x",
    )
    assert both is not None and both.nats == pytest.approx(1.0), "each set of a role counts the same"
    assert shift.of(results(a=("upstream", 2.0, 4.0)), "x") is None
    assert shift.of(results(a=("downstream", 2.0, 4.0)), "x") is None


@pytest.mark.parametrize(
    ("gap", "kind"),
    [(-0.1, "weak"), (0.27, "weak"), (0.53, "weak"), (0.216, "weak"), (0.61, "weak"), (0.62, "strong"), (1.39, "strong"), (1.53, "strong")],
)  # fmt: skip
def test_the_anchors_and_the_measured_gaps_fall_where_they_belong(gap: float, kind: str) -> None:
    """0.53: the Pile's model before SlimPajama; 0.216 and 1.53: a byte-level model before two texts, a near and a far one."""
    found = shift.Shift(gap, "x")
    assert found.kind == kind and "proxy" in found.text and "0.27 and 1.39" in found.text


@pytest.fixture
def run(
    tmp_path: Path, tiny_config: Callable, write_shards: Callable, random_documents: Callable
) -> Callable[..., Config]:
    for seed, name in enumerate(("old", "new", "old-val", "new-val")):
        write_shards(tmp_path / name, random_documents(seed, 30, vocab_size=20 if "old" in name else 64))

    def make(name: str, source: str, names: tuple[str, str] = ("old", "new"), **sections: Any) -> Config:
        data = {
            "train": [Source(name=source, path=str(tmp_path / source), weight=1)],
            "val": [
                ValidationSet(name=names[0], path=str(tmp_path / "old-val"), role="upstream"),
                ValidationSet(name=names[1], path=str(tmp_path / "new-val"), role="downstream"),
            ],
        }
        own = {"eval_every": 2, "save_every": 3, "eval_tokens": Count(160)}
        return tiny_config(tmp_path / name, data=data, run=own, **sections)

    return make


def test_it_is_known_from_the_start_s_own_run_or_measured_or_not_known(run: Callable, tmp_path: Path) -> None:
    train.train(run("base", "old"))
    config = run("next", "new", ("pile", "code"), init={"from_": str(tmp_path / "base")})
    origin = lineage.find_origin(config, lineage.World(0, 1, "cpu"))  # type: ignore[arg-type]
    validation = [NamedSet.open(each.name, each.role, lineage.ShardSet(each.path), 16, 160) for each in config.data.val]
    lines = [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    last = [line["eval"] for line in lines if "eval" in line][-1]
    expected = last["old"]["loss"] * (last["new"]["bits_per_byte"] / last["old"]["bits_per_byte"] - 1)
    known, measured = shift.known(origin, validation), shift.measured(config, origin)
    assert known is not None and known.nats == expected, "sets go by their content, not by their names"
    # In bf16 where the machine has it: an error of a loss of 4 nats' 2^-9 would be 0.008.
    assert measured.nats == pytest.approx(expected, abs=0.01) and "measured on 160 tokens" in measured.text
    earlier = Origin(origin.kind, origin.arch, origin.path, {**(origin.state or {}), "step": 2})
    at_two = next(line["eval"] for line in lines if "eval" in line and line["step"] == 2)
    found = shift.known(earlier, validation)
    assert found is not None and found.nats == pytest.approx(
        at_two["old"]["loss"] * (at_two["new"]["bits_per_byte"] / at_two["old"]["bits_per_byte"] - 1)
    ), "of the checkpoint, not of what came after"
    assert shift.known(origin, validation[:1]) is None
    (tmp_path / "base" / "metrics.jsonl").write_text("{")
    assert shift.known(origin, validation) is None
    (tmp_path / "base" / "metrics.jsonl").unlink()
    assert shift.known(origin, validation) is None


def test_what_cannot_be_measured_is_refused(run: Callable) -> None:
    scratch = Origin("scratch", Architecture(2, 24, 3, vocab_size=64))
    with pytest.raises(UserError, match="a run from scratch has no old text"):
        shift.measured(run("x", "old"), scratch)
    config = run("x", "old")
    object.__setattr__(config.data, "val", config.data.val[:1])
    with pytest.raises(UserError, match="lacks one of the roles"):
        shift.measured(config, Origin("pretrained", scratch.arch, Path("hf")))
