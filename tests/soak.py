"""Many random trials against preparation, shards, checkpoints and training, until a count is reached; a tally.

    python tests/soak.py WHAT --count N --seed S FOLDER      WHAT: see KINDS, or all of them

Each trial's randomness comes from (seed, WHAT, number) alone: `--only NUMBER` runs one again. FOLDER/WHAT.json keeps the
tally; started again with the same seed it goes on. A trial that fails leaves its files in FOLDER/WHAT-NUMBER and the
exit code is 1. The trials run in a process of their own: one that dies or hangs is a failure as any other.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import soak_checkpoints
import soak_corruptions
import soak_files
import soak_hangs
import soak_injections
import soak_kills
import soak_lines
import soak_restarts
import soak_signals
import soak_stock
import soak_training

KINDS: dict[str, ModuleType] = {
    "lines": soak_lines,
    "files": soak_files,
    "corruptions": soak_corruptions,
    "kills": soak_kills,
    "checkpoints": soak_checkpoints,
    "stock": soak_stock,
    "signals": soak_signals,
    "hangs": soak_hangs,
    "training": soak_training,
    "restarts": soak_restarts,
    "injections": soak_injections,
}
COUNTS = {
    "lines": 10_000_000,
    "files": 10_000,
    "corruptions": 10_000,
    "kills": 200,
    "checkpoints": 10_000,
    "stock": 1_000,
    "signals": 100,
    "hangs": 100,
    "training": 450,
    "restarts": 30,
    "injections": 300,
}
MOST_FAILURES = 10
ADDRESS_SPACE = 16 << 30  # a file that asks for more memory gets an error, not the machine
PREPARING_SECONDS = 300
TELL_SECONDS = 30


def run_trial(what: str, seed: int, number: int, folder: Path, prepared: Any) -> tuple[Counter[str], str | None]:
    """One trial: its tally, and what went wrong."""
    place = folder / f"{what}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        tally = KINDS[what].trial(random.Random(f"{seed} {what} {number}"), place, prepared)
    except Exception as error:  # noqa: BLE001 (of any kind: a bug in what is tested)
        (place / "failure.txt").write_text(traceback.format_exc())
        return Counter(), f"{type(error).__name__}: {error}"[:1000]
    shutil.rmtree(place)
    return tally, None


def work(what: str, seed: int, numbers: range, folder: Path, out: int) -> None:
    """In a process of its own: the trials, each reported in a line of JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    prepared = KINDS[what].prepare(folder / f"{what}-assets", seed)
    for number in numbers:
        tally, failure = run_trial(what, seed, number, folder, prepared)
        os.write(out, json.dumps([number, tally, failure]).encode() + b"\n")


class Child:
    """A forked process at work on trials; `next` gives what it reports."""

    def __init__(self, what: str, seed: int, numbers: range, folder: Path) -> None:
        self._in, out = os.pipe()
        self._buffer = b""
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._in)
            try:
                work(what, seed, numbers, folder, out)
            finally:
                if sys.exc_info()[0]:
                    traceback.print_exc()
                os._exit(1 if sys.exc_info()[0] else 0)
        os.close(out)

    def next(self, seconds: float) -> list[Any] | str:
        """[number, tally, failure] of the next trial, or how the process ended."""
        while b"\n" not in self._buffer:
            if not select.select([self._in], [], [], seconds)[0]:
                return f"no result within {seconds:.0f} s"
            data = os.read(self._in, 1 << 16)
            if not data:
                return f"the process ended with status {self.end()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        result: list[Any] = json.loads(line)
        return result

    def end(self) -> int | None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pid = 0
            os.close(self._in)
            return status
        return None


class State:
    """FOLDER/WHAT.json: how far a soak is and what it found."""

    def __init__(self, what: str, seed: int, folder: Path) -> None:
        self.what, self.path = what, folder / f"{what}.json"
        self.value: dict[str, Any] = {"seed": seed, "done": 0, "seconds": 0.0, "tally": {}, "failures": {}}
        if self.path.exists():
            self.value = json.loads(self.path.read_text())
            if self.value["seed"] != seed:
                raise SystemExit(f"{self.path}: of seed {self.value['seed']}; use that seed, or another folder")
        self.started = self._told = self._saved = time.monotonic()

    def add(self, number: int, tally: dict[str, int], failure: str | None) -> None:
        self.value["done"] = number + 1
        self.value["tally"] = dict(sorted((Counter(self.value["tally"]) + Counter(tally)).items()))
        if failure:
            self.value["failures"][str(number)] = failure
            print(f"{self.what} {number} FAILED: {failure}", flush=True)
        now = time.monotonic()
        if now - self._saved > 1 or failure:
            self.save()
        if now - self._told > TELL_SECONDS:
            self._told = now
            self.tell()

    def save(self) -> None:
        now = time.monotonic()
        self.value["seconds"] += now - self._saved
        self._saved = now
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.value, indent=1))
        os.replace(temporary, self.path)

    def tell(self) -> None:
        value = self.value
        tally = ", ".join(f"{count:,} {name}" for name, count in value["tally"].items())
        print(
            f"{self.what}, seed {value['seed']}: {value['done']:,} trials in {value['seconds']:.0f} s, "
            f"{len(value['failures'])} failed; {tally}",
            flush=True,
        )


def soak(what: str, count: int, seed: int, folder: Path) -> bool:
    """Runs or goes on with the trials of one kind. Whether none failed."""
    folder.mkdir(parents=True, exist_ok=True)
    module, state = KINDS[what], State(what, seed, folder)
    trials = -(-count // module.UNIT)
    while state.value["done"] < trials and len(state.value["failures"]) < MOST_FAILURES:
        child = Child(what, seed, range(state.value["done"], trials), folder)
        wait = PREPARING_SECONDS + module.SECONDS
        while state.value["done"] < trials and len(state.value["failures"]) < MOST_FAILURES:
            result = child.next(wait)
            if isinstance(result, str):
                state.add(state.value["done"], {}, result)
                break
            state.add(*result)
            wait = module.SECONDS
        child.end()
    state.save()
    state.tell()
    return not state.value["failures"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[*KINDS, "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--count", type=int, help=f"default: {', '.join(f'{n:,} {what}' for what, n in COUNTS.items())}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, metavar="NUMBER", help="one trial again, in this process, with its traceback"
    )
    arguments = parser.parse_args()
    whats = list(KINDS) if arguments.what == "all" else [arguments.what]
    if arguments.only is not None:
        (what,) = whats
        prepared = KINDS[what].prepare(arguments.folder / f"{what}-assets", arguments.seed)
        tally, failure = run_trial(what, arguments.seed, arguments.only, arguments.folder, prepared)
        trace = arguments.folder / f"{what}-{arguments.only}" / "failure.txt"
        print(trace.read_text() if failure else dict(tally))
        return 1 if failure else 0
    fine = [
        soak(what, COUNTS[what] if arguments.count is None else arguments.count, arguments.seed, arguments.folder)
        for what in whats
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
