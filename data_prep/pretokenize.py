"""Corpora into shard sets: `prep` is what `fastcpt prep` runs.

plan    inputs in name order -> tasks (`inputs.py`), the same for any number of workers
tasks   each task reads, tokenizes and writes parts and a record (`tasks.py`), on an engine (`engines.py`)
merge   the parts of each set, in task order -> pairs, ledger, manifest (`merge.py`), renamed into place at the end

An unfinished run lives in `OUTPUT.partial`. The same command again goes on from the tasks whose records are there.
"""

import fcntl
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastcpt import UserError
from fastcpt.data_prep import dedup, encoding, engines, merge, store
from fastcpt.data_prep.encoding import Backend
from fastcpt.data_prep.engines import Engine
from fastcpt.data_prep.inputs import Input, Task, find_inputs, make_tasks
from fastcpt.data_prep.pairs import Ending, Pairs, Stretch, write
from fastcpt.data_prep.parts import MAX_SETS, Job, building_folder, refuse_existing
from fastcpt.data_prep.progress import Meter
from fastcpt.data_prep.tasks import run_task
from fastcpt.integrity import sha256_json
from fastcpt.shards import MANIFEST

if TYPE_CHECKING:
    import pyarrow as pa


def prep(
    inputs: list[str],
    *,
    tokenizer: str,
    output: str | Path,
    workers: int | None = None,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    text_key: str = "text",
    group_key: str | None = None,
    eod: str | None = None,
    shard_tokens: int = 1_000_000_000,
    val_fraction: float = 0.0,
    dedup: bool = False,
    on_error: Literal["fail", "skip"] = "fail",
    backend: Backend = "gigatoken",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Tokenizes files, folders and glob patterns into shard sets. Returns the manifest of each set plus its "path".

    inputs, output: paths, or URLs of any store that fsspec opens. workers: tasks at once, one a CPU that this process
    may use (that the Ray cluster has) by default. Keys: of JSON objects and parquet columns, "meta.source" for nested
    ones. group_key: one set for each value, `OUTPUT-VALUE`. val_fraction: the share of documents, chosen by the hash of
    their bytes, that goes to `OUTPUT-val`. dedup: of documents with the same text the first in input order is kept.
    on_error: "fail" stops at the first document that cannot be used, "skip" leaves such documents out and lists them in
    `ledger.parquet`.

    Raises UserError for whatever the user can mend. Started from a script, that script needs the usual
    `if __name__ == "__main__":`, because worker processes import it.
    """
    output = str(output)
    check_arguments(output, workers, shard_tokens, val_fraction)
    work = output.rstrip("/") + ".partial"
    if merge.merged(work) is None and not store.is_remote(output):
        refuse_existing(output, ["", "val"] if val_fraction else [""])
    tokenizer_json = encoding.load_tokenizer(tokenizer)
    sources = find_inputs(inputs)
    tasks = make_tasks(sources)
    if engine == "ray":
        where = engines.on_ray(ray_address, workers)
    else:
        where = engines.local(min(workers or len(os.sched_getaffinity(0)), len(tasks)))
    with store.disk_errors(work), where as run:
        vocabulary = encoding.read_vocabulary(tokenizer_json, eod, tokenizer)
        job = Job(work, vocabulary, text_key, group_key, val_fraction, on_error, backend, dedup)
        with owned(work):
            _claim(job, sources, tasks, shard_tokens, tokenizer_json, output)
            try:
                if merge.merged(work) is None:
                    pairs = Pairs(job, output, shard_tokens)
                    with ThreadPoolExecutor(1) as aside:
                        records, table = _run_tasks(
                            tasks, job, run, pairs, lambda records: aside.submit(merge.ledger, sources, records), quiet
                        )
                        _merge(records, table.result(), job, output, tokenizer_json, run, pairs, quiet)
                paths = merge.commit(output, work)
            except UserError:
                # Without a record there is nothing to go on from, and the inputs may be mended now.
                if not store.any_file(job.folder, ".json"):
                    store.remove_folder(work)
                raise
    return [{**_manifest(path), "path": path} for path in paths]


def _manifest(path: str) -> dict[str, Any]:
    data = store.read_bytes(store.join(path, MANIFEST))
    assert data is not None, path
    return json.loads(data)


def check_arguments(output: str, workers: int | None, shard_tokens: int, val_fraction: float) -> None:
    if not store.split(output)[1].strip("."):
        raise UserError("output-name", f"--output {output}: has no name of its own; name a new folder")
    if workers is not None and workers < 1:
        raise UserError("option-out-of-range", f"--workers {workers}: must be 1 or more")
    if shard_tokens < 1:
        raise UserError("option-out-of-range", f"--shard-tokens {shard_tokens}: must be 1 or more")
    if not 0 <= val_fraction < 1:
        raise UserError("option-out-of-range", f"--val-fraction {val_fraction}: must be at least 0 and below 1")


@contextmanager
def owned(work: str) -> Iterator[None]:
    """One run at a time in a work folder; the system frees the lock of a process that dies. A remote store has no locks:
    there two runs of one plan do the same work twice, and another plan is refused."""
    if store.is_remote(work):
        yield
        return
    os.makedirs(work, exist_ok=True)
    with open(store.join(work, "lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "output-in-use", f"{work}: another run is writing there; wait for it, or choose another --output"
            ) from None
        yield


def _claim(
    job: Job, sources: list[Input], tasks: list[Task], shard_tokens: int, tokenizer_json: bytes, output: str
) -> None:
    """Makes the work folder this run's, or checks that it is. Raises UserError with what differs."""
    plan: dict[str, Any] = {
        "inputs": {source.name: [source.size, source.version] for source in sources},
        "division into tasks": sha256_json([asdict(task) for task in tasks]),
        "tokenizer": job.vocabulary.fingerprint,
        "--eod": job.vocabulary.eod_token,
        "--text-key": job.text_key,
        "--group-key": job.group_key,
        "--val-fraction": job.val_fraction,
        "--shard-tokens": shard_tokens,
        "--dedup": job.dedup,
        "--tokenizer-backend": job.backend,
    }
    path = store.join(job.work, "plan.json")
    begun = store.read_bytes(path)
    if begun is not None:
        try:
            old = json.loads(begun)
        except ValueError:
            raise UserError(
                "unfinished-prep-damaged", f"{path}: cut off or changed; remove {job.work} and start anew"
            ) from None
        changed = [_difference(key, old.get(key), plan[key]) for key in plan if old.get(key) != plan[key]]
        if changed:
            raise UserError(
                "unfinished-prep-differs",
                f"{job.work}: holds an unfinished run that differs in {changed[0]}; "
                "remove that folder to start anew, or repeat the earlier command to finish it",
            )
        return
    if store.is_remote(output):  # where sets are built in place: what is there before the run begins is not its own
        refuse_existing(output, ["", "val"] if job.val_fraction else [""])
    else:
        os.makedirs(job.folder, exist_ok=True)
    store.write_bytes(store.join(job.work, "tokenizer.json"), tokenizer_json, durable=True)
    store.write_bytes(path, json.dumps(plan).encode(), durable=True)


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        return f"{key} ({names[0]}: {_file(old.get(names[0]))} then, {_file(new.get(names[0]))} now)"
    return f"{key} ({old} then, {new} now)"


def _file(entry: list[Any] | None) -> str:
    return f"{entry[0]:,} bytes of version {entry[1]}" if entry else "not an input"


def _do(task: Any, job: Job) -> Any:
    return run_task(task, job) if isinstance(task, Task) else write(task)


def _run_tasks(
    tasks: list[Task],
    job: Job,
    engine: Engine,
    pairs: Pairs,
    account: Callable[[list[dict[str, Any]]], Future["pa.Table"]],
    quiet: bool,
) -> tuple[list[dict[str, Any]], Future["pa.Table"]]:
    """The records of all tasks, in task order, and what `account` begins to make of them as soon as they are there.
    Unless there are duplicates to find, what is done is merged meanwhile."""
    done: dict[int, dict[str, Any]] = {}
    merged = 0
    table = None

    def all_tasks() -> Iterator[Any]:
        for task in tasks:
            while pairs.ready:
                yield pairs.ready.popleft()
            yield task
        while True:  # while others still tokenize
            yield pairs.ready.popleft() if pairs.ready else None

    with Meter("tokenize", sum(task.weight for task in tasks), quiet) as meter:
        for result in engine(functools.partial(_do, job=job), all_tasks()):
            if not isinstance(result, dict):
                pairs.done(result)
                continue
            done[result["task"]] = result
            if result.pop("found"):
                meter.skip(result["bytes"])
            else:
                sets = [counts for piece in result["pieces"] for counts in piece["sets"].values()]
                meter.add(result["bytes"], sum(tokens for _, tokens, _ in sets))
            while not job.dedup and merged in done:
                pairs.add(done[merged])
                merged += 1
            if merged == len(tasks):
                pairs.close()
                records = [done[index] for index in range(merged)]
                table = account(records)
    if table is None:
        records = [done[task.index] for task in tasks]
        if job.dedup:
            records = dedup.remove(records, job, engine)
            for record in records:
                pairs.add(record)
            pairs.close()
        table = account(records)
    if not quiet:
        _summarize(records, meter.speed)
    return records, table


def _summarize(records: list[dict[str, Any]], speed: str) -> None:
    pieces = [piece for record in records for piece in record["pieces"]]
    documents, tokens, size = (sum(c[i] for piece in pieces for c in piece["sets"].values()) for i in range(3))
    reasons: dict[str, int] = {}
    for piece in pieces:
        for reason, entry in piece["rejects"].items():
            reasons[reason] = reasons.get(reason, 0) + entry["count"]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    print(
        f"tokenized {documents:,} documents, {tokens:,} tokens, {size:,} bytes of text at {speed}; "
        f"rejected {sum(reasons.values()):,}{f' ({rejected})' if rejected else ''}",
        file=sys.stderr,
    )


def _merge(
    records: list[dict[str, Any]],
    table: "pa.Table",
    job: Job,
    output: str,
    tokenizer_json: bytes,
    engine: Engine,
    pairs: Pairs,
    quiet: bool,
) -> None:
    """Builds every set."""
    names = merge.set_names(records, job)
    if not names:
        raise UserError(
            "no-groups", f"not one document has a usable --group-key {job.group_key}, so there is no set to write"
        )
    if len(names) > MAX_SETS:
        raise UserError(
            "too-many-groups",
            f"--group-key {job.group_key}: {len(names):,} sets; choose a key with at most {MAX_SETS:,} values",
        )
    if not store.is_remote(output):
        refuse_existing(output, names)
    with Meter("merge", sum(task.bytes for task in pairs.ready if not isinstance(task, Ending)), quiet) as meter:
        while waiting := list(pairs.ready):
            pairs.ready.clear()
            for result in engine(write, waiting):
                pairs.done(result)
                if isinstance(result[0], Stretch) or store.is_remote(output):  # else it is the ending of a pair
                    meter.add(result[0].bytes)
    for name in names:
        folder = building_folder(job.work, output, name)
        merge.finish_set(name, folder, pairs.of(folder), table, tokenizer_json, job.vocabulary)
    merge.mark_merged(job.work, names)
