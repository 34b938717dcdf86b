"""What a run does beside its model: `fastcpt bench overheads` times the real loop, a process a run.

    python -m fastcpt.benchmarks.bench_overheads [--output FOLDER]

Runs of Pythia-70m from scratch: one step with nothing compiled before and one with what that left, compiled as a whole and
block by block, and some steps with evaluations and checkpoints. `overheads_run.py` puts clocks around the loop's parts. Of a
step, the forward and backward passes and the optimizer's update are the model; all else is outside: waiting for data,
clipping, the log, and whatever Python does in between.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from fastcpt.benchmarks.bench_data import Row, real_set, table
from fastcpt.benchmarks.timing import facts

SAVE_EVERY = 1000  # steps a checkpoint: the default of run.save_every, over which a snapshot is spread
Spans = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Case:
    """A model and its run. steps: of the long run; it logs every log_every, saves in the middle and at the end. regional:
    settings that compile it block by block."""

    name: str = "pythia-70m, 4 x 512"
    settings: tuple[str, ...] = ("--model.preset", "pythia-70m")
    regional: tuple[str, ...] = ("--train.compile", "blocks")
    vocab_size: int = 50_304
    seq_len: int = 512
    batch: int = 4
    steps: int = 40
    log_every: int = 10
    eval_sequences: int = 16


def run(case: Case, folder: Path, name: str, cache: Path, steps: int, settings: Sequence[str] = ()) -> Spans:
    """What the clocks of a run say. cache: where torch keeps what it compiled."""
    tokens = case.batch * case.seq_len
    train = f"[{{name: bench, path: {folder / 'train'}, weight: 1}}]"
    arguments = [
        *case.settings, "--data.train", train, "--data.seq_len", str(case.seq_len), "--optim.lr", "1e-3",
        "--train.tokens", str(steps * tokens), "--train.batch_tokens", str(tokens), "--train.micro_batch", str(case.batch),
        "--run.output", str(folder / name), "--run.log_every", str(case.log_every), *settings,
    ]  # fmt: skip
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    cache.mkdir(exist_ok=True)
    # The second for the header of all kernels, which torch compiles once a machine.
    places = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(cache)}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(log, "w") as output:
        command = [
            sys.executable,
            str(Path(__file__).with_name("overheads_run.py")),
            str(time.time()),
            str(file),
            *arguments,
        ]
        code = subprocess.run(command, check=False, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    assert code == 0, f"{name} ended with code {code}:\n{log.read_text()[-4000:]}"
    found: Spans = json.loads(file.read_text())
    assert len(found["step"]) == steps, f"{name}: {len(found['step'])} steps and not {steps}"
    return found


def starting(case: str, spans: Spans) -> list[Row]:
    """From the command to the end of the first step, and what it went to."""
    start, seconds = spans["step"][0]
    named = ("interpreter", "imports", "configuration", "setup", "loggers")
    parts = {name: spans[name][0][1] for name in named} | {"first step": seconds}
    rows = [Row("command to first step", case, start + seconds, "s")]
    return rows + [Row("command to first step", f"{case}, {name}", value, "s") for name, value in parts.items()]


def within(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    return sum(seconds for start, seconds in spans if begin <= start < end)


def looping(case: Case, spans: Spans) -> list[Row]:
    """Shares of the loop's time from the end of the first log interval to the first checkpoint. That is written beside the
    steps that follow, whose delay has a row of its own."""
    starts = [start for start, _ in spans["step"]]
    saved = spans["snapshot"][0][0]
    begin, end = starts[case.log_every], max(start for start in starts if start < saved)
    assert not within(spans["evaluation"], begin, end)
    whole, step = end - begin, (end - begin) / (starts.index(end) - case.log_every)
    model = sum(within(spans[name], begin, end) for name in ("forward", "backward", "update"))
    parts = {
        "waiting for data": within(spans["data"], begin, end),
        "norm for clipping": within(spans["norm"], begin, end),
    }
    parts |= {"log and all else": whole - model - sum(parts.values())}
    snapshot = statistics.median(seconds for _, seconds in spans["snapshot"])
    usual = statistics.median(seconds for start, seconds in spans["step"] if begin <= start < end)
    delay = max(0.0, sum(seconds - usual for start, seconds in spans["step"] if start > saved))
    shares = {name: 100 * value / whole for name, value in parts.items()}
    shares[f"snapshot every {SAVE_EVERY:,} steps"] = 100 * snapshot / (SAVE_EVERY * step)
    what = "share of a step outside the model"
    rows = [Row(what, f"{case.name}, all", sum(shares.values()), "%", "< 1")]
    rows += [Row(what, f"{case.name}, {name}", share, "%") for name, share in shares.items()]
    rows += [
        Row("step", case.name, step, "s"),
        Row("checkpoint, the loop stands still", case.name, snapshot, "s"),
        Row("checkpoint, steps beside its writing take longer, in all", case.name, delay, "s"),
    ]
    tokens = case.eval_sequences * case.seq_len
    seconds = spans["evaluation"][-1][1]
    rows.append(Row("evaluation", f"{case.name}, a million tokens", seconds / tokens * 1e6, "s"))
    rows.append(Row("evaluation", f"{case.name}, tokens a second to those of training",
                    tokens / seconds / (case.batch * case.seq_len / step), "x"))  # fmt: skip
    return rows


def measured(case: Case, folder: Path) -> list[Row]:
    """All rows; everything is made in `folder`."""
    sizes = {"train": case.steps * case.batch + case.batch, "val": case.eval_sequences}
    for seed, (name, sequences) in enumerate(sizes.items()):
        real_set(folder / name, [sequences * case.seq_len + 1], seed, case.vocab_size)
        np.save(folder / name / "token_bytes.npy", np.full(case.vocab_size, 4, np.uint16))
        (folder / name / "tokenizer.json").write_text("{}")
    rows: list[Row] = []
    for cache, how, extra in (("whole", "", ()), ("regional", "block by block: ", case.regional)):
        for state, when in (("cold", "nothing compiled before"), ("warm", "compiled before")):
            spans = run(case, folder, f"{cache}-{state}", folder / cache, 1, extra)
            rows += starting(f"{how}{when}", spans)
    settings = (
        "--data.val", f"[{{name: bench, path: {folder / 'val'}}}]", "--run.save_every", str(case.steps // 2),
        "--run.eval_tokens", str(case.eval_sequences * case.seq_len),
    )  # fmt: skip
    return rows + looping(case, run(case, folder, "loop", folder / "whole", case.steps, settings))


def main(output: Path | None = None, case: Case | None = None) -> None:
    """Prints a table; writes output/overheads.csv."""
    about = facts(torch.device("cpu"))
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    with tempfile.TemporaryDirectory(prefix="fastcpt-bench-") as name:
        rows = measured(case or Case(), Path(name))
    print(table(rows), flush=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "overheads.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *about], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**asdict(row), "value": f"{row.value:.5g}", **about} for row in rows)
        print(f"written: {output / 'overheads.csv'}", flush=True)


def command(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write FOLDER/overheads.csv")
    main(parser.parse_args(arguments).output)


if __name__ == "__main__":
    command()
