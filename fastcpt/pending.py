"""What is left of a sweep: its runs, each after those that it needs, given to whoever has time."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from fastcpt import checkpoint, lineage
from fastcpt.grid import Job
from fastcpt.progress import Bar, short_time
from fastcpt.schedules import Plan

PREEMPTED, FAILED = 75, 1


def complete(job: Job) -> bool:
    """Whether the run is at its end, evaluated. Raises UserError where its folder holds another run than the file's."""
    steps = checkpoint.steps(job.folder)
    if not steps:
        return False
    state = lineage.read_state(job.folder / "checkpoints" / f"step-{steps[-1]}", lineage.FOR_POSITION)
    lineage.check_resume(job.config, state, state["data"]["fingerprints"])
    return state["step"] >= Plan(**state["plan"]).last_step(job.config.run.stop_at) and not state["unevaluated"]


def tokens_of(job: Job) -> int:
    """That the run trains on, up to where it stops; a branch's steps are counted from its checkpoint, which may be to come."""
    train, stop = job.config.train, job.config.run.stop_at
    whole = not stop or job.config.init.branch
    return train.tokens if whole else min(train.tokens, stop * train.batch_tokens)


def log_of(job: Job, output: Path) -> Path:
    return output / "logs" / f"{job.arm}-seed-{job.seed}.log"


class Pending:
    """The jobs of a grid that are still to do, given to whoever asks, in order, each after those that it needs."""

    def __init__(self, jobs: Sequence[Job], output: Path) -> None:
        self.output = output
        self.done = {job.folder for job in jobs if complete(job)}
        self.failed: dict[Path, str] = {}
        self.stopping = False
        self.left = [job for job in jobs if job.folder not in self.done]
        self._count, self._changed = len(jobs), threading.Condition()

    def take(self) -> Job | None:
        """The next job; waits for one. None where there will be none."""
        with self._changed:
            while True:
                for job in list(self.left):
                    if lost := [folder for folder in job.needs if folder in self.failed]:
                        self.left.remove(job)
                        self.failed[job.folder] = f"not started: {lost[0]} failed"
                ready = [job for job in self.left if self.done.issuperset(job.needs)]
                if self.stopping or not self.left:
                    return None
                if ready:
                    self.left.remove(ready[0])
                    return ready[0]
                self._changed.wait()

    def ended(self, job: Job, code: int, seconds: float, bar: Bar) -> None:
        """bar: of the tokens that were left to train."""
        with self._changed:
            if code == 0:
                self.done.add(job.folder)
                bar.print(f"{len(self.done)} of {self._count}: {job.name} done in {short_time(seconds)}")
            elif code == PREEMPTED or (self.stopping and code == -signal.SIGTERM):  # before it had a step to save
                self.stopping = True
            else:
                why = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
                self.failed[job.folder] = f"{why}; see {log_of(job, self.output)}"
                bar.print(f"{job.name} failed: {self.failed[job.folder]}")
            bar.update(bar.total - sum(map(tokens_of, self.left)), f"{len(self.left)} runs left")
            self._changed.notify_all()

    def stop(self) -> None:
        self.stopping = True
        if self._changed.acquire(timeout=1):
            self._changed.notify_all()
            self._changed.release()
