"""Where tasks run: `with local(workers) as engine:` or `with on_ray(address, workers) as engine:`.

An engine takes a function and tasks, all picklable, and yields the results as they are ready, in any order. It draws a
task when it has room for one, so that later tasks may follow from earlier results. The task None says: not before the next
result, or none if nothing is under way.
"""

import itertools
import multiprocessing
import multiprocessing.context
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

from fastcpt import UserError

Engine = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
RAY_RETRIES = 8  # of a task whose node was lost; each task of a long run may meet a few such losses


def _start_worker(environment: dict[str, str]) -> None:
    """In a new worker: no threads of `tokenizers`, there is a worker a core; and an end when the parent is killed."""
    os.environ.clear()  # what the server was started with may be old
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# What every worker needs; gigatoken would import awkward at its first batch.
_MODULES = ["fastcpt.data_prep.tasks", "awkward"]
# Of the process that workers are forked from: nothing is imported from the folder where the command runs, and what a batch
# leaves in memory is there for the next one, not given back to the system page by page.
_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def start_server() -> multiprocessing.context.ForkServerContext:
    """Begins, if nobody has yet, to start the process that workers are forked from. Forked children of a process with
    threads (Arrow, gigatoken) can hang, so this one has none; it imports once what all of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


@contextmanager
def local(workers: int) -> Iterator[Engine]:
    """In this process when `workers` is 1, else in that many others.

    The first error ends all: what is under way is stopped. Raises UserError when a worker is killed.
    """
    pool: ProcessPoolExecutor | None = None
    others = set(multiprocessing.active_children())
    if workers > 1:  # multiprocessing.Pool would hang when a worker dies
        pool = ProcessPoolExecutor(workers, start_server(), _start_worker, (dict(os.environ),))

    def run(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        if pool is None:
            yield from map(function, itertools.takewhile(lambda task: task is not None, tasks))
            return
        waiting = iter(tasks)
        running: set[Future[Any]] = set()
        while True:
            # Two a worker keep all of them busy; a queue of everything would be in memory twice.
            while len(running) < 2 * workers and (task := next(waiting, None)) is not None:
                try:
                    running.add(pool.submit(function, task))
                except (EOFError, OSError) as error:  # as it starts a worker: what that is forked from was killed
                    raise BrokenProcessPool from error
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    try:
        yield run
    except BaseException as error:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "worker-killed",
                "a worker process was killed, most likely because memory ran out; "
                "run the same command again to go on from the tasks that are done, perhaps with fewer --workers",
            ) from None
        raise
    if pool is not None:
        pool.shutdown()


def _on_node(function: Callable[[Any], Any], task: Any) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(task)


@contextmanager
def on_ray(address: str | None, workers: int | None) -> Iterator[Engine]:
    """On a Ray cluster: the one at `address`, else the one that RAY_ADDRESS names or that runs here, else a new one.

    workers: tasks at once, as many as the cluster has CPUs by default. A task of a node that is lost runs again on
    another. All nodes need fastcpt and must see the inputs and the output under the same names.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray-not-installed", "--engine ray: Ray is not installed; pip install 'fastcpt[ray]'") from None
    from ray.exceptions import RayError, RayTaskError

    ours = not ray.is_initialized()
    if ours:
        try:
            if address and "://" not in address and ":" in address:
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=30).close()  # Ray itself would try for minutes
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError("ray-no-answer", f"--ray-address {address}: no cluster answers there: {error}") from None

    def run(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_on_node)
        shared = ray.put(function)
        waiting = iter(tasks)
        running: list[Any] = []
        try:
            while True:
                # Looked up each time: nodes come and go.
                slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
                while len(running) < 2 * slots and (task := next(waiting, None)) is not None:
                    running.append(remote.remote(shared, task))
                if not running:
                    return
                done, running = ray.wait(running)
                for reference in done:
                    yield ray.get(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    try:
        yield run
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, OSError)):
            raise error.cause from None
        raise
    except RayError as error:
        raise UserError(
            "ray-lost",
            f"the Ray cluster lost a task {RAY_RETRIES + 1} times or went away ({type(error).__name__}); "
            "run the same command again to go on from the tasks that are done",
        ) from None
    finally:
        if ours:
            ray.shutdown()
