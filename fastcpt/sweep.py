"""Many runs of one file (`grid.py`): what is missing of them, one after another or several at once, here or on Slurm.

    fastcpt sweep FILE [--jobs N] [--dry-run]
    fastcpt sweep FILE --slurm partition=gpu,gpus_per_node=8,timeout_min=600

Here each of N workers is a process that trains one run after another: imports, and code that was compiled for a run of
the same shapes, serve them all. A run that fails is named and its log kept; those that start from it wait for another
day, all others go on. Every evaluation of every run ends up in one table, results.csv.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastcpt import UserError, grid
from fastcpt.grid import Job
from fastcpt.pending import FAILED, PREEMPTED, Pending, log_of, tokens_of
from fastcpt.progress import Bar, short_count

GRACE_SECONDS = 600  # for workers to save their runs and end, when the sweep is told to stop


class Worker:
    """A process that trains runs: a configuration's path is written to it, an exit code comes back."""

    def __init__(self, number: int, count: int, gpus: Sequence[str]) -> None:
        self._environment = dict(os.environ)
        if gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        self._environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
        self._process: subprocess.Popen[str] | None = None

    def run(self, job: Job, log: Path) -> int:
        """The run's exit code, as `fastcpt train`'s; below 0 the signal that ended the process, as subprocess says it."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "fastcpt.sweep"]
            # A session of its own: what a terminal's Ctrl-C sends to all, `stop` sends once.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment,
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([str(job.file), str(log)]), file=self._process.stdin, flush=True)
            if answer := self._process.stdout.readline():
                return int(answer)
        return self._process.wait()

    def stop(self) -> None:
        """The run under way is saved and ends, the process with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(GRACE_SECONDS)
            self._process.stdout.close()


def serve() -> None:
    """What a worker does: trains the run of each line of its input, into that run's log, and answers with the exit code."""
    import torch

    from fastcpt import train

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        file, log = json.loads(line)
        with open(log, "a", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        try:
            code = train.main(["--config", file])
        except Exception:  # noqa: BLE001 - a bug, or no memory: this run's, and its log says so
            import traceback

            traceback.print_exc()
            code = FAILED
        for flushed in (sys.stdout, sys.stderr):
            flushed.flush()
        print(code, file=answers, flush=True)
        if code == PREEMPTED:
            return
        # Code that was compiled is found again on disk; in memory it would count against dynamo's limit of recompilations.
        torch.compiler.reset()
        gc.unfreeze()
        gc.collect()


@contextlib.contextmanager
def _stopped_by_signals(stop: Any) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C call `stop`, while this is entered."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def here(sweep: Pending, jobs: int | None) -> None:
    """Trains what is left on this machine, `jobs` runs at once; None: one a GPU, or one."""
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(n) for n in range(torch.cuda.device_count())] if shown is None else shown.split(",") if shown else []
    count = jobs or len(gpus) or 1
    workers = [Worker(number, count, gpus) for number in range(count)]
    sweep.output.joinpath("logs").mkdir(parents=True, exist_ok=True)

    def work(worker: Worker, bar: Bar) -> None:
        while (job := sweep.take()) is not None:
            begun = time.monotonic()
            sweep.ended(job, worker.run(job, log_of(job, sweep.output)), time.monotonic() - begun, bar)
        worker.close()

    def stop() -> None:
        sweep.stop()
        for worker in workers:
            worker.stop()

    with Bar("sweep", sum(map(tokens_of, sweep.left))) as bar, _stopped_by_signals(stop):
        threads = [threading.Thread(target=work, args=(worker, bar)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a signal is handled between two waits
                thread.join(1)


def run(file: str, jobs: int | None, slurm: str | None, dry: bool) -> int:
    """What `fastcpt sweep` does. Exit codes: 0 all done; 1 some runs failed; 75 stopped on a signal, run again to go on."""
    if jobs is not None and jobs < 1:
        raise UserError("option-out-of-range", f"--jobs {jobs}: must be 1 or more")
    if slurm is not None:
        from fastcpt import slurm as cluster

        options = cluster.options_of(slurm)
    plan = grid.read(file)
    sweep = Pending(plan.jobs, plan.output)
    tokens = sum(map(tokens_of, sweep.left))
    print(
        f"{file}: {len(plan.jobs)} runs, {len(sweep.done)} complete, {short_count(tokens)} tokens to train", flush=True
    )
    if dry:
        for job in sweep.left:
            after = f", after {', '.join(map(str, job.needs))}" if job.needs else ""
            print(f"{job.name}: {short_count(tokens_of(job))} tokens{after}; fastcpt train --config {job.file}")
        return 0
    if sweep.left:
        if slurm is not None:
            cluster.submit(sweep, options)
        else:
            here(sweep, jobs)
    from fastcpt import results

    print(results.write(plan, sweep.done))
    for job in plan.jobs:
        if job.folder in sweep.failed:
            print(f"{job.name} failed: {sweep.failed[job.folder]}", file=sys.stderr)
    return PREEMPTED if sweep.stopping else FAILED if sweep.failed else 0


if __name__ == "__main__":
    serve()
