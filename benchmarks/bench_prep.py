"""Times `fastcpt prep` against its rivals on the same text, the same files and as many processes.

    fastcpt bench prep --tokenizer FILE [--text FOLDER] [--output FOLDER]

Each run is a fresh process, so that start-up counts and no tokenizer is warm; the files are in the page cache for all.
Before anything is timed, what we and the rivals write of a sample is compared id by id. Ours and the bare tokenizer take
turns; the slow rivals run once. What is done is noted in the work folder: the same command again goes on from there.

A ratio is a rival's seconds for a MB of text over ours: above 1, ours is faster. CPU seconds are of a run's processes
together, the peak is that of the largest of them. 1 MB is 10^6 bytes of text (UTF-8, before JSON).
"""

import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcpt import UserError, __version__
from fastcpt.benchmarks.prep_corpus import FORMATS, Corpus, make_corpus
from fastcpt.benchmarks.timing import facts
from fastcpt.data_prep.encoding import Vocabulary, load_tokenizer, read_vocabulary
from fastcpt.shards import read_manifest

OURS, BARE = "fastcpt prep", "bare"
REPEATS = 3  # of ours and of the bare tokenizer
SAMPLE_MB = 4
# Least ratio to ours; the bare tokenizer's says that ours takes at most 1.5 times as long.
TARGETS = {BARE: 1 / 1.5, "tokenizers": 10.0, "megatron": 10.0, "nanogpt": 1.0, "datatrove": 1.0}
# nanoGPT's tokens are not quite those of the tokenizer: tiktoken has no normalizer and no added tokens.
INEXACT = {"nanogpt"}
# Of the files of a format, what the slow rivals are given; a rate is compared, and .jsonl says the most.
SHARES = {"jsonl": 1.0, "jsonl.zst": 0.25}
# Starts a command and writes its seconds, and the CPU seconds and KiB of memory of all its processes, those that outlive it
# for a moment included (prctl 36: orphans become ours). A process of its own, because the peak of a child counts what its
# parent held when it forked.
LAUNCHER = """
import ctypes, json, os, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
seconds, cpu, peak = None, 0.0, 0
while True:
    try:
        pid, status, usage = os.wait4(-1, 0)
    except ChildProcessError:
        break
    if pid == process.pid:
        seconds, process.returncode = time.perf_counter() - begin, os.waitstatus_to_exitcode(status)
    cpu, peak = cpu + usage.ru_utime + usage.ru_stime, max(peak, usage.ru_maxrss)
with open(sys.argv[1], "w") as file:
    json.dump([seconds, cpu, peak], file)
sys.exit(process.returncode != 0)
"""


@dataclass(frozen=True)
class Done:
    """One run of one implementation. cpu_seconds and peak_mb: of all its processes; of the largest."""

    implementation: str
    form: str
    text_bytes: int
    documents: int
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    versions: str


@dataclass(frozen=True)
class Row:
    """One implementation on one format, medians of its runs. target: the least ratio; met: yes, no, or nothing."""

    implementation: str
    form: str
    runs: int
    text_mb: float
    seconds: float
    mb_per_s: float
    tokens: int
    tokens_per_s: float
    cpu_seconds: float
    peak_mb: float
    ratio_to_ours: float
    target: str
    met: str
    versions: str


@dataclass(frozen=True)
class Bench:
    """What all runs have in common. python: the interpreter that has the rivals."""

    tokenizer: Path
    vocabulary: Vocabulary
    python: str
    workers: int
    work: Path

    def command(self, name: str, files: Sequence[Path], output: Path) -> list[str]:
        inputs = list(map(str, files))
        common = ["--tokenizer", str(self.tokenizer), "--output", str(output), "--workers", str(self.workers)]
        if name == OURS:
            return [sys.executable, "-P", "-m", "fastcpt.cli", "prep", *inputs, *common]
        # uint16 or, as datatrove, 4 bytes without a sign: the same bits as int32 here.
        dtype = "uint16" if self.vocabulary.dtype.itemsize == 2 else "uint32"
        script = Path(__file__).with_name("prep_rivals.py")
        eod = ["--eod", self.vocabulary.eod_token, "--eod-id", str(self.vocabulary.eod), "--dtype", dtype]
        # -P: the folder of the script does not come before the libraries.
        return [self.python, "-P", str(script), name, *inputs, *common, *eod]


def run(bench: Bench, name: str, form: str, files: Sequence[Path], text_bytes: int) -> tuple[Done | None, Path]:
    """Runs an implementation once; None for one that lacks a module, which is said. The output is left for the caller.

    Raises AssertionError when it fails, with the end of what it printed.
    """
    output = bench.work / "output"
    shutil.rmtree(output, ignore_errors=True)
    if name != OURS:
        output.mkdir(parents=True)
    command = bench.command(name, files, output)
    log, usage = bench.work / "printed", bench.work / "usage.json"
    with open(log, "wb") as printed:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(usage)]
        answer = subprocess.run(
            [*launcher, *command], check=False, stdout=printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    text = log.read_text(errors="replace")
    assert answer.returncode == 0, f"{name} failed with {answer.returncode}: {text[-2000:]}"
    seconds, cpu, peak = json.loads(usage.read_text())
    if name == OURS:
        manifest = read_manifest(output)
        said = {key: manifest[key] for key in ("documents", "tokens")} | {"versions": {"fastcpt": __version__}}
    else:
        said = json.loads(text.splitlines()[-1])
    if "missing" in said:
        print(f"{name} is left out: {bench.python} has no module {said['missing']}", flush=True)
        return None, output
    versions = " ".join(f"{package} {version}" for package, version in said["versions"].items())
    done = Done(name, form, text_bytes, said["documents"], said["tokens"], seconds, cpu, peak * 1024 / 1e6, versions)
    return done, output


def written(name: str, output: Path, dtype: np.dtype) -> np.ndarray | None:
    """All ids that an implementation wrote, in order; None for the bare tokenizer, which writes none."""
    paths = sorted(path for path in output.rglob("*") if path.suffix in (".bin", ".ds"))
    return None if name == BARE else np.concatenate([np.fromfile(path, dtype) for path in paths])


def agree(name: str, done: Done, ids: np.ndarray | None, ours: Done, our_ids: np.ndarray | None = None) -> None:
    """Raises AssertionError unless a run gave what ours gave: documents, tokens and, where there are ids, those."""
    assert done.documents == ours.documents, f"{name}: {done.documents} documents, and ours {ours.documents}"
    if name in INEXACT:
        return
    assert done.tokens == ours.tokens, f"{name}: {done.tokens} tokens, and ours {ours.tokens}; it is not timed"
    if ids is not None and our_ids is not None:
        assert np.array_equal(ids, our_ids), f"{name}: other ids than ours; it is not timed"


def check(bench: Bench, corpus: Corpus, names: Sequence[str]) -> list[str]:
    """Compares ids on a sample, in both formats; the names that can run here."""
    found, bench = list(names), replace(bench, workers=1)  # one keeps the order of the files in every implementation
    for form in FORMATS:
        ours, output = run(bench, OURS, form, corpus.files(form), corpus.bytes_of())
        assert ours is not None
        ids = written(OURS, output, bench.vocabulary.dtype)
        for name in list(found):
            done, output = run(bench, name, form, corpus.files(form), corpus.bytes_of())
            if done is None:
                found.remove(name)
                continue
            agree(name, done, written(name, output, bench.vocabulary.dtype), ours, ids)
            how = f"{done.tokens / ours.tokens:.3f} times the tokens of ours" if name in INEXACT else "the same tokens"
            print(f"sample, {form}, {name}: {done.documents} documents, {how}", flush=True)
    return found


class Notes:
    """Runs that are done, so that a bench that was stopped goes on. Another `key` begins anew."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.done: list[Done] = []
        lines = path.read_text().splitlines() if path.exists() else []
        if lines[:1] == [key]:
            self.done = [Done(**json.loads(line)) for line in lines[1:]]
            print(f"{len(self.done)} runs of an earlier start are kept", flush=True)
        else:
            path.write_text(key + "\n")

    def add(self, done: Done) -> None:
        self.done.append(done)
        with open(self.path, "a") as file:
            file.write(json.dumps(asdict(done)) + "\n")

    def of(self, name: str, form: str) -> list[Done]:
        return [done for done in self.done if (done.implementation, done.form) == (name, form)]


def _turns(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(name, how many runs of it there will be then): ours and the bare tokenizer alternate, then the others once."""
    for count in range(1, REPEATS + 1):
        yield from ((name, count) for name in (OURS, BARE) if name in (OURS, *names))
    yield from ((name, 1) for name in names if name != BARE)


def measure(bench: Bench, corpus: Corpus, names: Sequence[str], notes: Notes, share: float) -> None:
    """Runs everything that `notes` lacks. share: of the files, what the slow rivals get, times SHARES of the format."""
    for form in FORMATS:
        for path in corpus.files(form):  # into the page cache
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
        for name, count in _turns(names):
            if len(notes.of(name, form)) >= count:
                continue
            part = 1.0 if name in (OURS, BARE) else share * SHARES[form]
            done, _ = run(bench, name, form, corpus.files(form, part), corpus.bytes_of(part))
            assert done is not None
            if name != OURS and done.text_bytes == corpus.bytes_of():
                agree(name, done, None, notes.of(OURS, form)[0])
            notes.add(done)
            rate = done.text_bytes / 1e6 / done.seconds
            print(
                f"{name}, {form}: {done.text_bytes / 1e6:.0f} MB in {done.seconds:.1f} s, {rate:.1f} MB/s", flush=True
            )


def rows_of(done: Sequence[Done]) -> list[Row]:
    """A row for each implementation and format, in the order of the first runs. Ours must be among each format's."""
    groups: dict[tuple[str, str], list[Done]] = {}
    for each in done:
        groups.setdefault((each.form, each.implementation), []).append(each)

    def pace(runs: Sequence[Done]) -> float:
        """Seconds for a MB of text."""
        return statistics.median(run.seconds / run.text_bytes * 1e6 for run in runs)

    rows = []
    for (form, name), runs in groups.items():
        ratio = pace(runs) / pace(groups[form, OURS])
        target = TARGETS.get(name)
        first = runs[0]
        seconds = statistics.median(run.seconds for run in runs)
        rows.append(Row(
            name, form, len(runs), first.text_bytes / 1e6, seconds, 1 / pace(runs), first.tokens, first.tokens / seconds,
            statistics.median(run.cpu_seconds for run in runs), max(run.peak_mb for run in runs), ratio,
            "" if target is None else f">= {target:.3g}x", "" if target is None else "yes" if ratio >= target else "no",
            first.versions,
        ))  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    lines: list[tuple[str, ...]] = [(
        "", "format", "MB of text", "runs", "seconds", "MB/s", "M tokens", "M tokens/s", "CPU s", "peak MB", "time to ours",
        "target", "met", "versions",
    )]  # fmt: skip
    for row in rows:
        lines.append((
            row.implementation, row.form, f"{row.text_mb:.0f}", str(row.runs), f"{row.seconds:.1f}",
            f"{row.mb_per_s:.1f}", f"{row.tokens / 1e6:.1f}", f"{row.tokens_per_s / 1e6:.2f}", f"{row.cpu_seconds:.1f}",
            f"{row.peak_mb:.0f}", f"{row.ratio_to_ours:.2f}x", row.target, row.met, row.versions,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def write(path: Path, rows: Sequence[Row], about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *about], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            writer.writerow({**values, **about})


def main(
    tokenizer: str,
    text: Path | None = None,
    output: Path | None = None,
    work: Path = Path("bench-prep"),
    rivals_python: str = sys.executable,
    megabytes: float = 1000,
    share: float = 1.0,
    about_text: str | None = None,
    rivals: Sequence[str] | None = None,
) -> list[Row]:
    """Checks, measures, prints the table and writes output/prep.csv.

    text: a folder of text files (None: those of this Python). work: the corpus and the runs that are done; a finished
    bench leaves the corpus. share: of the files, what the slow rivals are given. about_text: what the text is, for the
    record. rivals: of TARGETS (None: all). Raises UserError for a wrong argument, AssertionError at a rival whose tokens differ or which fails.
    """
    if text is None:
        text, about_text = Path(sys.prefix), about_text or "files of this Python and its packages"
    if not text.is_dir():
        raise UserError("folder-missing", f"--text {text}: no such folder; name one with text files")
    if not 0 < share <= 1:
        raise UserError("option-out-of-range", f"--share {share}: must be above 0 and at most 1")
    tokenizer_json = load_tokenizer(tokenizer)
    vocabulary = read_vocabulary(tokenizer_json, None, tokenizer)
    work.mkdir(parents=True, exist_ok=True)
    file = work.resolve() / "tokenizer.json"
    file.write_bytes(tokenizer_json)
    bench = Bench(file, vocabulary, rivals_python, len(os.sched_getaffinity(0)), file.parent)
    specials = [token["content"] for token in json.loads(tokenizer_json)["added_tokens"] if token["special"]]
    what = about_text or text.name
    corpus = make_corpus(text, bench.work / "corpus", megabytes, specials, what)
    sample = make_corpus(text, bench.work / "sample", min(SAMPLE_MB, megabytes), specials, what)
    about = {**facts(torch.device("cpu")), "workers": str(bench.workers), "text": corpus.about}
    print("\n".join(f"{name}: {value}" for name, value in about.items() if value), flush=True)
    asked = {"corpus": corpus.about, "share": share, "python": rivals_python}
    notes = Notes(bench.work / "runs.jsonl", _key(asked, tokenizer_json))
    names = check(bench, sample, list(TARGETS) if rivals is None else rivals)
    measure(bench, corpus, names, notes, share)
    rows = rows_of(notes.done)
    print("\n" + table(rows))
    if output is not None:
        write(output / "prep.csv", rows, about)
        print(f"written: {output / 'prep.csv'}")
    notes.path.unlink()
    shutil.rmtree(bench.work / "output", ignore_errors=True)
    return rows


def _key(arguments: dict[str, Any], tokenizer_json: bytes) -> str:
    """What the runs of an earlier start must share with this one: arguments, corpus, tokenizer and our code."""
    digest = hashlib.sha256(tokenizer_json)
    for path in sorted(Path(__file__).parents[1].glob("data_prep/*.py")):
        digest.update(path.read_bytes())
    return json.dumps({**arguments, "code": digest.hexdigest()}, sort_keys=True)
