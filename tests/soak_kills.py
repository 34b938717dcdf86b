"""`fastcpt prep` killed at random moments and started again with other numbers of workers, until it is complete: the
sets must be, byte for byte, those of a run that was never disturbed, and nothing may be left over."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import soak_corpus

UNIT = 1  # a trial: one to three kills, then an end
SECONDS = 180
SURFACES = 5.0  # seconds within which a killed worker ends the command, and a killed command its workers
TASK_BYTES = 60_000
CODE = f"from fastcpt.data_prep import inputs; inputs.TASK_BYTES = {TASK_BYTES}; from fastcpt.cli import main; raise SystemExit(main())"
VARIANTS: dict[str, list[str]] = {
    "one set": [],
    "validation": ["--val-fraction", "0.1"],
    "groups": ["--group-key", "group", "--val-fraction", "0.2"],
    "no duplicates": ["--dedup", "--val-fraction", "0.1"],
    "tokenizers": ["--tokenizer-backend", "tokenizers", "--val-fraction", "0.1"],
}


class Prepared(NamedTuple):
    """What all trials share. references: of a variant the hashes of an undisturbed run, its seconds, and how many files
    its work folder held at most; made when they are needed first."""

    folder: Path
    inputs: Path
    tokenizer: Path
    references: dict[str, tuple[dict[str, str], float, int]]


def start(prepared: Prepared, output: Path, variant: str, workers: int) -> subprocess.Popen[bytes]:
    """In a session of its own, whose number all its processes carry."""
    arguments = ["prep", str(prepared.inputs), "--tokenizer", str(prepared.tokenizer), "--output", str(output)]
    arguments += ["--on-error", "skip", "--shard-tokens", "100000", "--workers", str(workers), *VARIANTS[variant]]
    with open(output.with_name("log"), "ab") as log:
        return subprocess.Popen([sys.executable, "-c", CODE, *arguments], stderr=log, start_new_session=True)


def processes(session: int) -> list[int]:
    """The living processes of a session that a trial started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def workers_of(session: int) -> list[int]:
    """And the process that they are forked from."""
    found = []
    for pid in processes(session):
        try:
            if b"multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            pass
    return found


def ended(session: int) -> bool:
    deadline = time.monotonic() + SURFACES
    while processes(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def count_files(work: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(work))


def digests(output: Path) -> dict[str, str]:
    """The hash of every file of the set and its siblings, by place."""
    return {
        str(path.relative_to(output.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in sorted(output.parent.glob(output.name + "*"))
        for path in [folder, *sorted(folder.rglob("*"))]
        if path.is_file()
    }


def prepare(folder: Path, seed: int) -> Prepared:
    shutil.rmtree(folder, ignore_errors=True)
    inputs = soak_corpus.write(folder / "in", random.Random(f"{seed} corpus"), 3000)
    return Prepared(folder, inputs, soak_corpus.tokenizer(folder), {})


def reference(prepared: Prepared, variant: str) -> tuple[dict[str, str], float, int]:
    if variant not in prepared.references:
        output = prepared.folder / "reference" / "out"
        output.parent.mkdir()
        started, most = time.monotonic(), 0
        process = start(prepared, output, variant, 2)
        while process.poll() is None:
            most = max(most, count_files(output.with_name("out.partial")))
            time.sleep(0.002)
        assert process.returncode == 0, output.with_name("log").read_text()
        prepared.references[variant] = digests(output), time.monotonic() - started, most
        shutil.rmtree(output.parent)
    return prepared.references[variant]


def wait_for_moment(
    rng: random.Random, process: subprocess.Popen[bytes], work: Path, seconds: float, most: int
) -> None:
    """Until a random time, or a random number of files in the work folder, or the merge; a little more at times."""
    kind, deadline = rng.choice(["time", "files", "files", "merge"]), time.monotonic() + rng.uniform(0, seconds)
    files, pause = rng.randint(1, most), rng.choice([0.0, rng.uniform(0, 0.1)])
    limit = time.monotonic() + SECONDS / 3
    while process.poll() is None:
        assert time.monotonic() < limit, "the command hangs"
        if kind == "time" and time.monotonic() > deadline:
            break
        if kind == "files" and count_files(work) >= files:
            break
        if kind == "merge" and (work / "sets").exists():
            break
        time.sleep(0.001)
    time.sleep(pause)


def kill(rng: random.Random, process: subprocess.Popen[bytes], log: Path) -> str:
    """Kills the command, its group or one worker. Returns which; "too late" if it had ended."""
    victim = rng.choice(["command", "group", "worker"])
    workers = workers_of(process.pid) if victim == "worker" else []
    if process.poll() is not None:
        return "too late"
    if victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "command" or not workers:
        victim = "command"
        process.kill()
    else:
        size = log.stat().st_size
        try:
            os.kill(rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            process.wait(SECONDS)
            return "too late"
        try:
            code = process.wait(SURFACES)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a killed worker did not end the command within {SURFACES} s") from None
        message = log.read_bytes()[size:].decode()
        # A worker that is killed when all work is done, on its way out, is nobody's loss.
        assert code in (0, 2), f"exit code {code} after a worker was killed: {message}"
        assert code == 0 or "worker" in message, f"a killed worker is not what the message says: {message}"
        assert "Traceback" not in message, message
    process.wait(SURFACES)
    return victim


def trial(rng: random.Random, folder: Path, prepared: Prepared) -> Counter[str]:
    variant = rng.choice(list(VARIANTS))
    wanted, seconds, most = reference(prepared, variant)
    output, log, tally = folder / "out", folder / "log", Counter([variant])
    for _ in range(rng.randint(1, 3)):
        process = start(prepared, output, variant, rng.randint(1, 3))
        try:
            wait_for_moment(rng, process, output.with_name("out.partial"), seconds, most)
            stage = "before" if not (output.with_name("out.partial") / "plan.json").exists() else "in tasks"
            stage = "in merge" if (output.with_name("out.partial") / "sets").exists() else stage
            outcome = kill(rng, process, log)
        finally:
            alone = ended(process.pid)
            for pid in processes(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
        assert alone, f"processes live on after a kill of the {outcome}"
        tally += Counter([f"kill of {outcome}", f"kill {stage}"] if outcome != "too late" else [outcome])
        tally["kills"] += outcome != "too late"
        # Killed on its way out, a command has done all: it would refuse to write over that.
        finished = process.returncode == 0 or (output.exists() and not output.with_name("out.partial").exists())
        if finished:
            break
    if not finished:
        process = start(prepared, output, variant, rng.randint(1, 3))
        try:
            code = process.wait(SECONDS / 3)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert code == 0, f"exit code {code} of the last start: {log.read_text()}"
    assert ended(process.pid), "processes live on after the end"
    found = digests(output)
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    assert not different, f"{variant}: differ from the undisturbed run: {different}"
    return tally
