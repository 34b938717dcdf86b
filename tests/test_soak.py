"""The harnesses of `soak.py`, each for a few seconds; and that each fails when what it looks at is broken."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastcpt import checkpoint
from fastcpt.data_prep import inspect_shards, readers

HARNESS = Path(__file__).with_name("soak.py")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HARNESS.parent)
    import soak

    return soak


def start(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HARNESS), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("what", "count", "counted"),
    [
        ("lines", 20_000, "lines"),
        ("files", 100, "files"),
        ("corruptions", 100, "corruptions"),
        ("kills", 2, "kills"),
        ("checkpoints", 100, "corruptions"),
        ("signals", 3, "signals"),
        ("hangs", 6, "hangs"),
        ("training", 15, "kills"),
        ("restarts", 1, "exceptions"),
        ("injections", 24, "injections"),
    ],
)
def test_no_trial_fails(tmp_path: Path, what: str, count: int, counted: str) -> None:
    done = start(what, "--count", count, "--seed", 1, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / f"{what}.json").read_bytes())
    assert state["tally"][counted] >= 0.7 * count and not state["failures"]
    assert {path.name for path in tmp_path.iterdir()} <= {f"{what}.json", f"{what}-assets"}


def test_a_soak_goes_on_where_it_stopped(tmp_path: Path, soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done = start("files", "--count", 6, tmp_path / "part")
    assert " 6 trials" in done.stdout
    start("files", "--count", 9, tmp_path / "part")
    start("files", "--count", 9, tmp_path / "whole")
    part, whole = (json.loads((tmp_path / name / "files.json").read_bytes()) for name in ("part", "whole"))
    assert part["done"] == 9 and part["tally"] == whole["tally"]
    assert "of seed 0" in start("files", "--count", 9, "--seed", 1, tmp_path / "part").stderr


def failing(soak: ModuleType, what: str, folder: Path, trials: int) -> list[str]:
    """What the trials say that fail, in this process."""
    prepared = soak.KINDS[what].prepare(folder / "assets", 0)
    failures = [soak.run_trial(what, 0, number, folder, prepared)[1] for number in range(trials)]
    return [failure for failure in failures if failure]


def test_a_failure_keeps_its_files_and_can_be_run_alone(tmp_path: Path, soak: ModuleType, capfd: Any) -> None:
    module = ModuleType("broken")

    def trial(rng: random.Random, folder: Path, prepared: None) -> Any:
        (folder / "content").write_text(str(rng.random()))
        if folder.name == "broken-2":
            raise ValueError("two")
        if folder.name == "broken-4":
            os.kill(os.getpid(), signal.SIGKILL)
        return soak.Counter(done=1)

    module.UNIT, module.SECONDS, module.prepare, module.trial = 1, 30, lambda folder, seed: None, trial  # type: ignore[attr-defined]
    soak.KINDS["broken"] = module
    try:
        assert not soak.soak("broken", 6, 5, tmp_path)
        state = json.loads((tmp_path / "broken.json").read_bytes())
        assert state["done"] == 6 and state["tally"] == {"done": 4} and set(state["failures"]) == {"2", "4"}
        assert (
            "ValueError: two" in state["failures"]["2"] and "the process ended with status -9" in state["failures"]["4"]
        )
        content = (tmp_path / "broken-2" / "content").read_text()
        assert content == str(random.Random("5 broken 2").random())
        assert soak.run_trial("broken", 5, 2, tmp_path, None)[1] == "ValueError: two"
        assert (tmp_path / "broken-2" / "content").read_text() == content
    finally:
        del soak.KINDS["broken"]


def changed_text(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        yield item._replace(data=item.data.swapcase()) if isinstance(item, readers.Document) else item


def lost_document(items: Iterator[Any]) -> Iterator[Any]:
    for number, item in enumerate(items):
        if number != 3:
            yield item


def nothing_rejected(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, readers.Reject) and item.documents == 1:
            item = readers.Document(b"x", None, item.line, item.offset)
        yield item


def crash(items: Iterator[Any]) -> Iterator[Any]:
    yield from items
    raise MemoryError


@pytest.mark.parametrize("harm", [changed_text, lost_document, nothing_rejected, crash])
@pytest.mark.parametrize("what", ["lines", "files"])
def test_a_broken_reader_is_found(
    tmp_path: Path, soak: ModuleType, monkeypatch: pytest.MonkeyPatch, what: str, harm: Any
) -> None:
    whole = readers.PieceReader.__iter__
    monkeypatch.setattr(readers.PieceReader, "__iter__", lambda self: harm(whole(self)))
    trials = 2 if what == "lines" else 40
    assert len(failing(soak, what, tmp_path, trials)) >= trials // 10 + 1


def test_a_verify_that_sees_nothing_is_found(tmp_path: Path, soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_shards, "verify", lambda directory, quiet: None)
    failures = failing(soak, "corruptions", tmp_path, 12)
    assert len(failures) >= 10 and all("not seen: " in failure for failure in failures)


def test_a_verify_that_names_no_file_is_found(
    tmp_path: Path, soak: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vague(directory: Path, quiet: bool) -> None:
        raise inspect_shards.DamagedError("hash-differs", f"{directory}: bytes 0 to 1 differ")

    monkeypatch.setattr(inspect_shards, "verify", vague)
    assert len(failing(soak, "corruptions", tmp_path, 24)) >= 8


def test_a_checkpoint_that_is_taken_as_it_is_is_found(
    tmp_path: Path, soak: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "verify", lambda *arguments, **options: None)
    failures = failing(soak, "checkpoints", tmp_path, 12)
    assert len(failures) >= 8 and all("not seen: " in failure for failure in failures)


HARMS = {
    "training": """
real = train.load_
def load_(state):
    real(state)
    state.optimizer.state[state.optimizer.parameters[0]]["exp_avg"].flatten()[0].zero_()
train.load_ = load_
""",
    "injections": """
real = optim.AdamW.clipped_step
def clipped_step(self, *arguments):
    norm, skipped = real(self, *arguments)
    self.parameters[0].data.flatten()[0] += 1e-6 * skipped
    return norm, skipped
optim.AdamW.clipped_step = clipped_step
""",
}


@pytest.mark.parametrize(
    ("what", "said"), [("training", "['tensors', 'metrics'] differ"), ("injections", "AssertionError")]
)
def test_a_run_that_is_not_the_same_is_found(tmp_path: Path, what: str, said: str) -> None:
    """In a process of its own, which forks ranks: of what goes on one moment is lost; a skipped step changes a weight."""
    script = f"import sys, soak\nfrom fastcpt import optim, train\n{HARMS[what]}\nsys.exit(soak.main())"
    done = subprocess.run(
        [sys.executable, "-c", script, what, "--count", "1", "--seed", "1", str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(HARNESS.parent)},
    )  # fmt: skip
    assert done.returncode == 1 and f"{what} 0 FAILED: " in done.stdout and said in done.stdout, (
        done.stdout + done.stderr
    )


def test_sets_that_differ_after_a_kill_are_found(tmp_path: Path, soak: ModuleType) -> None:
    kills = soak.KINDS["kills"]
    prepared = kills.prepare(tmp_path / "assets", 0)
    kills.reference(prepared, random.Random("0 kills 0").choice(list(kills.VARIANTS)))
    (tmp_path / "assets" / "in" / "z.txt").write_bytes(b"one more document")
    failure = soak.run_trial("kills", 0, 0, tmp_path, prepared)[1]
    assert "differ from the undisturbed run: ['out" in failure
