"""A short run of `fastcpt train`, as users start it, on this machine's GPU: data, training, log and checkpoint.

    python -m fastcpt.benchmarks.visit MODEL FOLDER

Writes FOLDER/run_MODEL.jsonl, the run's metrics: tokens/s, MFU, peak memory, and seconds since the start, which the first
line says of compilation and the first steps. Tokens are random. `gpu_visit.sh` calls it.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastcpt.benchmarks.bench_data import real_set
from fastcpt.model import PRESETS

# Tokens of a run: about ten seconds of an H100 by `fastcpt plan`, once compiled.
TOKENS = {"pythia-70m": 12 << 20, "pythia-160m": 6 << 20, "pythia-410m": 2 << 20, "pythia-1.4b": 1 << 20}
BATCH, SEQ_LEN = 1 << 17, 2048  # tokens a step, and a sequence
LINES = 4  # of the log; the first one has the compilation in it


def main(
    name: str, folder: Path, tokens: int | None = None, batch: int = BATCH, seq_len: int = SEQ_LEN,
    settings: Sequence[str] = (),
) -> int:  # fmt: skip
    """The exit code of `fastcpt train`. settings: more of its options."""
    steps = -(-(tokens or TOKENS[name]) // batch)
    with tempfile.TemporaryDirectory() as work:
        shards, run = Path(work) / "shards", Path(work) / "run"
        real_set(shards, [steps * batch + 1], seed=0, vocab_size=PRESETS[name].vocab_size)
        (shards / "tokenizer.json").write_text("{}")
        (Path(work) / "run.yaml").write_text(
            f"model: {{preset: {name}}}\n"
            f"data: {{seq_len: {seq_len}, train: [{{name: random, path: {shards}, weight: 1}}]}}\n"
            f"train: {{tokens: {steps * batch}, batch_tokens: {batch}}}\n"
            "optim: {lr: 1e-3}\n"
            f"run: {{output: {run}, log_every: {max(1, steps // LINES)}, tensorboard: false}}\n"
        )
        command = [sys.executable, "-m", "fastcpt.train", "--config", str(Path(work) / "run.yaml"), *settings]
        code = subprocess.run(command, check=False).returncode
        for metrics in run.glob("metrics.jsonl"):
            shutil.copy(metrics, folder / f"run_{name}.jsonl")
            print(metrics.read_text(), end="")
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
