"""Hung and dead processes are named in bounded time, and none is left behind.

A thread of each process looks at how its main thread comes on (`Watch.beat`), and tells the others in a file of
RUN/.ranks: the run's folder is what all processes share. Nothing here waits for another process, so that a stopped one
cannot stop the watch. Whoever finds out first, for itself or for a process that died, writes RUN/.ranks/failed; all
others read it, one of them says what happened, and all end.

A process that does not come on for `run.timeout` seconds has its stack in RUN/stacks-rank*.txt. What may take minutes is
given LONG times as many: starting, whatever is done for the first time (it may compile), and saving.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch.distributed as dist

from fastcpt import UserError
from fastcpt.parallel import World
from fastcpt.signals import Agreement, Preempted, Signals

LOST = 5  # exit code of those that ended because another process hung or died
LONG = 5
GRACE_SECONDS = 1.0  # for a main thread to leave by itself
RECORD_BYTES = 1024
SILENT = "it does not answer: stopped, or its machine is gone"
# What an error says when it is another process that failed.
BROKEN = ("gloo", "nccl", "connection", "peer", "socket", "process group", "tcpstore")
WAITING = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/", "fastcpt/signals.py")


class Process(NamedTuple):
    """Which one of which machine. namespace: in which its number is valid; born: ticks, so that no later one is taken for it."""

    host: str
    namespace: str
    pid: int
    born: str

    @classmethod
    def this(cls) -> "Process":
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        return cls(socket.gethostname(), namespace, os.getpid(), _stat(os.getpid())[1])

    def is_dead(self, here: "Process") -> bool:
        """False also for what cannot be known: of another machine."""
        if (self.host, self.namespace) != (here.host, here.namespace):
            return False
        state, born = _stat(self.pid)
        return state in ("", "Z", "X") or born != self.born

    def kill(self, here: "Process") -> None:
        """If it is of this machine."""
        if (self.host, self.namespace) == (here.host, here.namespace) and not self.is_dead(here):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.kill(self.pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[str, str]:
    """State and birth of a process of this machine, "" of one that is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class Place(NamedTuple):
    """Where a main thread is. beats: how often it has come on, the same on all processes at the same place."""

    step: int
    phase: str
    beats: int
    since: float
    limit: float


def doing(step: int, phase: str) -> str:
    """For people: what is being done in a phase after `step` steps."""
    return f"step {step + 1}" if phase in ("training", "compiling") else f"{phase} at step {step}"


class Watch:
    """Follows a run: `with Watch(...) as watch`, then `watch.beat` wherever the loop comes by.

    folder: the run's, locked by the first process. codes: {exception that all processes raise together: exit code}.
    """

    def __init__(
        self, world: World, folder: Path, timeout: float, codes: dict[type[BaseException], int] | None = None
    ) -> None:
        self._world, self._folder, self._timeout = world, folder, timeout
        self._codes = {Preempted: 75} | (codes or {})
        self._ranks = folder / ".ranks"
        self._done: set[str] = set()  # phases that have been gone through once
        self._place = Place(0, "starting", 0, time.monotonic(), LONG * timeout)
        self._ended = threading.Event()
        self._broken = False  # the main thread failed because of another process
        self._tick = min(0.5, timeout / 20)
        self._period = min(15.0, max(0.25, timeout / 40))  # between two records for the others
        self._parent = os.getppid()

    def __enter__(self) -> Self:
        if self._world.first:
            shutil.rmtree(self._ranks, ignore_errors=True)
            self._ranks.mkdir()
            for path in (*self._folder.glob("stacks-rank*.txt"), self._folder / "exit-code"):
                path.unlink(missing_ok=True)
        self._me = Process.this()
        self._processes = [Process(*each) for each in self._world.gather(tuple(self._me))]
        self.signals = Signals().__enter__()
        self._agreement = Agreement(self._world, self.signals, LONG * self._timeout + 60)
        self._main = threading.get_ident()
        self._record = os.open(self._ranks / f"rank-{self._world.rank}", os.O_RDWR | os.O_CREAT, 0o644)
        self._ticks = 0
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()
        return self

    def enter(self, step: int, phase: str) -> None:
        """The main thread has come on: `step` steps are done, and `phase` begins."""
        self._done.add(self._place.phase)
        usual = phase in self._done and phase != "saving"
        limit = self._timeout if usual else LONG * self._timeout
        self._place = Place(step, phase, self._place.beats + 1, time.monotonic(), limit)

    def ask(self) -> None:
        """Before work that all processes do together: whether a signal asks to stop. `beat` has the answer."""
        self._agreement.ask()

    def beat(self, step: int, phase: str) -> bool:
        """`enter`, and whether a signal asks to stop: what `ask` found, the same on all processes."""
        self.enter(step, phase)
        return self._agreement.answer()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        expected = error is None or type(error) in self._codes
        if self._world.size > 1 and not expected:
            if isinstance(error, ConnectionError | dist.DistError | RuntimeError) and any(
                word in f"{type(error).__name__} {error}".lower() for word in BROKEN
            ):
                self._broken = True  # the watch finds out whose fault it is, says so, and ends this process
                time.sleep(5 * GRACE_SECONDS + 2 * self._period)
            else:
                self._blame_this(error)
        self._ended.set()
        self._thread.join()
        if expected:
            self._agreement.answer()
            self._publish(left=True)
            if self._world.first:
                self._write_code(0 if error is None else self._codes[type(error)])
        self.signals.__exit__(kind, error, trace)
        os.close(self._record)

    def _blame_this(self, error: BaseException | None) -> None:
        mistake = isinstance(error, UserError)
        what = error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        message = f"{self._name(self._world.rank)} failed in {doing(*self._place[:2])}: {what}"
        if self._fail([self._world.rank], message, 2 if mistake else LOST) and not (mistake and self._world.first):
            print(f"fastcpt: {message}", file=sys.stderr, flush=True)

    @property
    def names(self) -> list[str]:
        """Of all processes, by rank, with host and number."""
        return [self._name(rank) for rank in range(self._world.size)]

    def _name(self, rank: int) -> str:
        process = self._processes[rank]
        return f"rank {rank} ({process.host}, pid {process.pid})"

    def _write_code(self, code: int) -> None:
        """torchrun makes 1 of any exit code; scripts find it here."""
        with contextlib.suppress(OSError):
            (self._folder / "exit-code").write_text(f"{code}\n")

    # From here on: the thread.

    def _follow(self) -> None:
        last, published, paused = time.monotonic(), 0.0, (0, 0.0)
        while not self._ended.wait(self._tick):
            now, place = time.monotonic(), self._place
            if now - last > 5 * self._tick + 1:  # this process was stopped and goes on: that time does not count
                paused = place.beats, (paused[1] if paused[0] == place.beats else 0.0) + now - last
            last = now
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
                self.signals.received = True  # torchrun was killed: nobody looks after this process any more
            if now - published > self._period or self._broken:
                self._publish()
                published = now
                self._end_with_the_others()
            if self._world.size > 1:
                self._look_for_dead()
            waited = now - place.since - (paused[1] if paused[0] == place.beats else 0.0)
            if waited > place.limit and not self._broken:
                self._hang(place, waited)

    def _publish(self, where: str = "", left: bool = False) -> None:
        place = self._place
        self._ticks += 1
        value = {"step": place.step, "phase": place.phase, "beats": place.beats, "ticks": self._ticks}
        text = json.dumps(value | {"where": where[:700], "left": left})
        os.pwrite(self._record, text.encode()[:RECORD_BYTES].ljust(RECORD_BYTES), 0)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = json.loads((self._ranks / f"rank-{rank}").read_bytes())
        except (OSError, ValueError):  # not yet there, or being written
            return None
        return value

    def _fail(self, ranks: Sequence[int], message: str, code: int, silent: bool = False) -> bool:
        """Tells all processes why the run ends. Only the first reason counts: whether this is it.

        silent: those to blame do not answer, so that they will not end by themselves.
        """
        mine = self._ranks / f".failed-{self._world.rank}"
        try:
            mine.write_text(json.dumps({"ranks": list(ranks), "message": message, "code": code, "silent": silent}))
            os.link(mine, self._ranks / "failed")
        except OSError:
            return False
        return True

    def _look_for_dead(self) -> None:
        dead = [rank for rank, process in enumerate(self._processes) if process.is_dead(self._me)]
        gone = [(rank, self._read(rank) or {}) for rank in dead]
        gone = [(rank, record) for rank, record in gone if not record.get("left")]
        if gone and not (self._ranks / "failed").exists():
            where = " and ".join(
                f"{self._name(rank)} died in {doing(record.get('step', 0), record.get('phase', 'starting'))}"
                for rank, record in gone
            )
            reason = "killed from outside (by hand, or for want of memory), or it ended without a word; see its output"
            self._fail([rank for rank, _ in gone], f"{where}: {reason}", LOST)
        if gone:
            self._end_with_the_others()

    def _end_with_the_others(self) -> None:
        """If a reason to end is known: one says it, and this process ends."""
        try:
            failed = json.loads((self._ranks / "failed").read_bytes())
        except (OSError, ValueError):
            return
        if not self._broken and self._ended.wait(GRACE_SECONDS):  # the main thread is leaving with a reason of its own
            return
        others = [rank for rank in range(self._world.size) if rank not in failed["ranks"]]
        if self._world.rank == min(others, default=0):  # of those to blame, only if there are no others
            self._say(failed)
        if failed["silent"]:  # torchrun would wait 30 s for each, whatever its --shutdown-timeout
            for rank in failed["ranks"]:
                self._processes[rank].kill(self._me)
        os._exit(failed["code"])

    def _say(self, failed: dict[str, Any]) -> None:
        """What happened, and the stacks of those to blame, where they could still write them."""
        print(f"fastcpt: {failed['message']}", file=sys.stderr)
        for rank in failed["ranks"]:
            stacks = self._folder / f"stacks-rank{rank}.txt"
            if stacks.exists():
                print(stacks.read_text(), file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        self._write_code(failed["code"])

    def _hang(self, place: Place, waited: float) -> None:
        """Stacks first; then, when the others have told where they are, who is to blame; then the end."""
        with open(self._folder / f"stacks-rank{self._world.rank}.txt", "w") as file:
            print(f"{self._name(self._world.rank)}, {doing(*place[:2])}, {waited:.0f} s", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        frame = sys._current_frames()[self._main]
        self._publish(f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})")
        before = [self._read(rank) for rank in range(self._world.size)]
        if self._ended.wait(2 * self._period + 2 * self._tick) or self._place is not place:
            return  # it has come on after all
        after = [self._read(rank) for rank in range(self._world.size)]
        ranks, reasons = _culprits(before, after)
        message = "; ".join(
            f"{self._name(rank)} has not finished {doing(*_place(after[rank]))} for {waited:.0f} s: {reason}"
            for rank, reason in zip(ranks, reasons)
        )
        self._fail(ranks, f"{message}; stacks: {self._folder}/stacks-rank*.txt", LOST, silent=reasons[0] == SILENT)
        self._end_with_the_others()


def _place(record: dict[str, Any] | None) -> tuple[int, str]:
    return (record["step"], record["phase"]) if record else (0, "starting")


def _culprits(
    before: Sequence[dict[str, Any] | None], after: Sequence[dict[str, Any] | None]
) -> tuple[list[int], list[str]]:
    """Ranks, and what each is in: those that do not answer, else those that are behind, else those that wait for no one."""
    everyone = range(len(after))
    where = [record["where"] if record and record["where"] else "it does not say where it is" for record in after]
    silent = [rank for rank in everyone if before[rank] is None or before[rank] == after[rank]]
    silent = [rank for rank in silent if not (after[rank] or {}).get("where")]
    if silent:
        return silent, [SILENT] * len(silent)
    beats = [record["beats"] if record else 0 for record in after]
    behind = [rank for rank in everyone if beats[rank] < max(beats)]
    ranks = behind or [rank for rank in everyone if not any(part in where[rank] for part in WAITING)] or list(everyone)
    return ranks, [f"it is in {where[rank]}" for rank in ranks]
