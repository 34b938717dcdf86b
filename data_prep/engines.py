"""Where tasks run. An engine takes a function and tasks, both picklable, and yields the results as they are ready."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fastcpt import UserError

T = TypeVar("T")
R = TypeVar("R")


def _start_worker() -> None:
    """In a new worker: no threads of `tokenizers`, there is a worker a core; and an end when the parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_local(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Runs `function` on each task: in this process when `workers` is 1, else in that many others.

    The first error ends it at once: what is under way is stopped. Raises UserError when a worker is killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Forked children of a process with threads (Arrow, gigatoken) can hang; multiprocessing.Pool hangs when one dies.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        waiting = iter(tasks)
        running: set[Future[R]] = set()
        while True:
            # Two a worker keep all of them busy; a queue of everything would be in memory twice.
            while len(running) < 2 * workers and (task := next(waiting, None)) is not None:
                running.add(pool.submit(function, task))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, most likely because memory ran out; "
                "run the same command again to go on from the tasks that are done, perhaps with fewer --workers"
            ) from None
        raise
    pool.shutdown()
