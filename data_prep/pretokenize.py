"""Corpora into shard sets: `prep` is what `fastcpt prep` runs.

plan    inputs in name order -> tasks (`inputs.py`), the same for any number of workers
tasks   each task reads, tokenizes and writes parts and a record (`tasks.py`), on an engine (`engines.py`)
merge   the parts of each set, in task order -> pairs, ledger, manifest (`merge.py`), renamed into place at the end

An unfinished run lives in `OUTPUT.partial`. The same command again goes on from the tasks whose records are there.
"""

import errno
import fcntl
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fastcpt import UserError
from fastcpt.data_prep import encoding, merge
from fastcpt.data_prep.encoding import Backend
from fastcpt.data_prep.engines import run_local
from fastcpt.data_prep.inputs import Input, Task, find_inputs, make_tasks
from fastcpt.data_prep.progress import Meter
from fastcpt.data_prep.tasks import MAX_SETS, Job, finished_record, run_task
from fastcpt.integrity import read_json, sha256_json, write_durably, write_json
from fastcpt.shards import read_manifest


def prep(
    inputs: list[str],
    *,
    tokenizer: str,
    output: str | Path,
    workers: int | None = None,
    text_key: str = "text",
    group_key: str | None = None,
    eod: str | None = None,
    shard_tokens: int = 1_000_000_000,
    val_fraction: float = 0.0,
    on_error: Literal["fail", "skip"] = "fail",
    backend: Backend = "gigatoken",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Tokenizes files, folders and glob patterns into shard sets. Returns the manifest of each set plus its "path".

    workers: processes, one a CPU that this process may use by default. Keys: of JSON objects and parquet columns,
    "meta.source" for nested ones. group_key: one set for each value, `OUTPUT-VALUE`. val_fraction: the share of
    documents, chosen by the hash of their bytes, that goes to `OUTPUT-val`. on_error: "fail" stops at the first
    document that cannot be used, "skip" leaves such documents out and lists them in `ledger.parquet`.

    Raises UserError for whatever the user can mend. Started from a script, that script needs the usual
    `if __name__ == "__main__":`, because worker processes import it.
    """
    output = Path(output)
    _check_arguments(output, workers, shard_tokens, val_fraction)
    work = output.with_name(output.name + ".partial")
    if not (work / "merged.json").exists():
        merge.refuse_existing(output, ["", "val"] if val_fraction else [""])
    tokenizer_json = encoding.load_tokenizer(tokenizer)
    vocabulary = encoding.read_vocabulary(tokenizer_json, eod, tokenizer)
    encoding.make_tools(tokenizer_json, vocabulary, backend)  # refused here rather than in a worker
    sources = find_inputs(inputs)
    tasks = make_tasks(sources)
    job = Job(work, vocabulary, text_key, group_key, val_fraction, on_error, backend)
    workers = workers or len(os.sched_getaffinity(0))
    try:
        with _owned(work):
            _claim(job, sources, tasks, shard_tokens, tokenizer_json)
            try:
                if not (work / "merged.json").exists():
                    records = _run_tasks(tasks, job, workers, quiet)
                    _merge(sources, records, job, output, shard_tokens, tokenizer_json, workers, quiet)
                paths = merge.commit(output, work)
            except UserError:
                if not any(job.folder.glob("*.json")):  # nothing to go on from, and the inputs may be mended now
                    shutil.rmtree(work)
                raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{work}: the disk is full; free some space and run the same command again to go on") from None
    return [{**read_manifest(path), "path": str(path)} for path in paths]


def _check_arguments(output: Path, workers: int | None, shard_tokens: int, val_fraction: float) -> None:
    if not output.name:
        raise UserError(f"--output {output}: has no name of its own; name a new folder")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be 1 or more")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens}: must be 1 or more")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: must be at least 0 and below 1")


@contextmanager
def _owned(work: Path) -> Iterator[None]:
    """One run at a time in a work folder; the system frees the lock of a process that dies."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another run is writing there; wait for it, or choose another --output") from None
        yield


def _claim(job: Job, sources: list[Input], tasks: list[Task], shard_tokens: int, tokenizer_json: bytes) -> None:
    """Makes the work folder this run's, or checks that it is. Raises UserError with what differs."""
    plan: dict[str, Any] = {
        "inputs": {source.name: [source.size, source.mtime_ns] for source in sources},
        "division into tasks": sha256_json([asdict(task) for task in tasks]),
        "tokenizer": job.vocabulary.fingerprint,
        "--eod": job.vocabulary.eod_token,
        "--text-key": job.text_key,
        "--group-key": job.group_key,
        "--val-fraction": job.val_fraction,
        "--shard-tokens": shard_tokens,
        "--tokenizer-backend": job.backend,
    }
    path = job.work / "plan.json"
    if path.exists():
        begun = read_json(path, "the plan of an unfinished run")
        changed = [_difference(key, begun.get(key), plan[key]) for key in plan if begun.get(key) != plan[key]]
        if changed:
            raise UserError(
                f"{job.work}: holds an unfinished run that differs in {changed[0]}; "
                "remove that folder to start anew, or repeat the earlier command to finish it"
            )
        return
    job.folder.mkdir(exist_ok=True)
    write_durably(job.work / "tokenizer.json", tokenizer_json)
    write_json(path, plan)


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        return f"{key} ({names[0]}: {_file(old.get(names[0]))} then, {_file(new.get(names[0]))} now)"
    return f"{key} ({old} then, {new} now)"


def _file(entry: list[int] | None) -> str:
    return f"{entry[0]:,} bytes of mtime {entry[1]}" if entry else "not an input"


def _run_tasks(tasks: list[Task], job: Job, workers: int, quiet: bool) -> list[dict[str, Any]]:
    """The records of all tasks, in task order."""
    records = [finished_record(task, job) for task in tasks]
    with Meter("tokenize", sum(task.weight for task in tasks), quiet) as meter:
        waiting = [task for task, record in zip(tasks, records) if record is None]
        meter.skip(sum(task.weight for task in tasks) - sum(task.weight for task in waiting))
        for record in run_local(functools.partial(run_task, job=job), waiting, workers):
            records[record["task"]] = record
            sets = [counts for piece in record["pieces"] for counts in piece["sets"].values()]
            meter.add(record["bytes"], sum(tokens for _, tokens, _ in sets))
        done = [record for record in records if record is not None]
        assert len(done) == len(tasks)
    if not quiet:
        _summarize(done, meter.speed)
    return done


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
    sources: list[Input],
    records: list[dict[str, Any]],
    job: Job,
    output: Path,
    shard_tokens: int,
    tokenizer_json: bytes,
    workers: int,
    quiet: bool,
) -> None:
    """Builds every set in the work folder."""
    table = merge.ledger(sources, records)
    names = merge.set_names(records, job)
    if not names:
        raise UserError(f"not one document has a usable --group-key {job.group_key}, so there is no set to write")
    if len(names) > MAX_SETS:
        raise UserError(
            f"--group-key {job.group_key}: {len(names):,} sets; choose a key with at most {MAX_SETS:,} values"
        )
    merge.refuse_existing(output, names)
    pairs: list[merge.Pair] = []
    directories = {name: job.work / "sets" / merge.directory_of(output, name).name for name in names}
    for name, directory in directories.items():
        directory.mkdir(parents=True, exist_ok=True)
        pairs += merge.plan_pairs(name, records, job, directory, shard_tokens)
    entries: dict[Path, dict[int, dict[str, Any]]] = {directory: {} for directory in directories.values()}
    with Meter("merge", sum(pair.bytes for pair in pairs), quiet) as meter:
        for pair, entry in run_local(merge.write_pair, pairs, workers):
            entries[pair.directory][pair.index] = entry
            meter.add(pair.bytes)
    for name, directory in directories.items():
        ordered = [entry for _, entry in sorted(entries[directory].items())]
        merge.finish_set(name, directory, ordered, table, tokenizer_json, job.vocabulary)
    merge.mark_merged(job.work, names)
