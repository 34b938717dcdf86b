"""The presets: each loads and is priced without its data, and says what its paper did."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastcpt import UserError, plan, train
from fastcpt.config import parse
from fastcpt.lineage import make_plan
from fastcpt.unread import inputs

FOLDER = Path(__file__).parent.parent / "fastcpt" / "presets"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GPUS = ["--gpu", "h100", "--gpus", "64"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without data, and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))


def test_all_that_was_promised_is_there() -> None:
    assert NAMES == [
        "infinite-2403", "low-budget", "reuse-2407", "rewarm-2308", "rewarm-same-data", "simple-2403", "simple-2403-strong",
        "wsd",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_priced_by_its_name_alone(name: str, capsys: Any) -> None:
    assert plan.main(["--config", name, *GPUS]) == 0
    shown = capsys.readouterr().out
    text = " ".join(shown.split())
    config = parse(["--config", name])
    steps = -(-config.train.tokens // config.train.batch_tokens)
    for part in (f"steps {steps:,} of {config.train.batch_tokens:,} tokens", "405,334,016;", "64 x h100:", "GPU-hours",
                 "total", "learning rate, ", "without data not known: the sizes of the sets"):  # fmt: skip
        assert part in text, part
    assert config.run.output == f"runs/{name}" and "upstream" in {entry.role for entry in config.data.val}
    assert max(map(len, shown.splitlines())) <= 110 and not list(Path().iterdir()), "nothing is written"
    plan.main([f"--config={FOLDER / name}.yaml", *GPUS, "--without-data"])
    assert capsys.readouterr().out == shown


def test_a_run_or_a_path_of_ones_own_is_refused_as_before(tmp_path: Path) -> None:
    assert (
        train.main(["--config", "rewarm-2308"]) == 2
        and not (tmp_path / "runs" / "rewarm-2308" / "config.yaml").exists()
    )
    own = tmp_path / "run.yaml"
    own.write_text((FOLDER / "wsd.yaml").read_text())
    changed = ["--config", "wsd", "--data.val", "[{name: pile, path: typed-wrong}]"]
    for arguments in (["--config", "run.yaml"], ["--config=run.yaml"], changed):
        with pytest.raises(UserError, match="shards/slimpajama"):
            plan.main([*arguments, *GPUS])
    (tmp_path / "shards" / "pile-val").mkdir(parents=True)
    with pytest.raises(UserError, match="shards/slimpajama"):
        plan.main(["--config", "wsd", *GPUS])
    with pytest.raises(
        UserError, match=r"rewarm: there is no such .*, and no preset of that name: they are infinite-2403, "
    ):
        plan.main(["--config", "rewarm", *GPUS])
    (tmp_path / "wsd").write_text("model: 5\n")
    with pytest.raises(UserError, match="the section model is 5"):
        parse(["--config", "wsd"])  # a file of that name is what is meant


def test_an_arm_from_scratch_needs_no_data_either(capsys: Any) -> None:
    plan.main(["--config", "rewarm-2308", "--init.from", "scratch", *GPUS])
    assert "scratch: new weights" in capsys.readouterr().out


def rates(name: str, *steps: int) -> list[float]:
    config = parse(["--config", name])
    found = make_plan(config, inputs(config).origin)
    return [found.rate(step) for step in steps]


def test_the_papers_facts() -> None:
    first = parse(["--config", "rewarm-2308"])
    assert first.train.tokens == 131_296 * 1104 * 2048 and first.train.batch_tokens == 1104 * 2048
    assert rates("rewarm-2308", 1313, 131_296) == [3e-4, 0.1 * 3e-4]
    assert parse(["--config", "rewarm-same-data"]).train.tokens == 181_793 * 1104 * 2048
    for name, share, replayed in (("simple-2403", 0.95, 0.05), ("simple-2403-strong", 0.75, 0.25)):
        found = [(source.weight, source.replay) for source in parse(["--config", name]).data.train]
        assert found == [(share, False), (replayed, True)]
    assert parse(["--config", "simple-2403"]).train.tokens == 132_366 * 1104 * 2048
    constant = rates("infinite-2403", 1327, 1327 + 79_611, 132_686 - 18_576, 132_686)
    assert constant == pytest.approx([3e-4, 1.65e-4, 1.65e-4, 3e-5])
    reuse = inputs(parse(["--config", "reuse-2407"]))
    second = reuse.mixture.phases[1].first // 1024
    assert rates("reuse-2407", 1, 143_052) == pytest.approx([3e-5, 3e-7])
    assert rates("reuse-2407", second)[0] > 0.2 * 3e-5 >= rates("reuse-2407", second + 1)[0]


def test_phases_without_data_are_those_of_the_schedule(capsys: Any) -> None:
    plan.main(["--config", "infinite-2403", *GPUS])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "88,458", "44,229", "100B", "third", "100%"] in lines
    assert ["first", "?", "?", "33.333%", f"{44_228 * 1104:,}", "100B", "?"] in lines
