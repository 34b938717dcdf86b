"""The promise: killed at any instant and started again, a run ends exactly as if it had never stopped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcpt.config import Count, Source, ValidationSet, to_yaml

HARNESS = Path(__file__).with_name("crash.py")


@pytest.mark.parametrize(("world", "kills"), [(1, 14), (2, 8)])
def test_kill_9_at_any_moment(
    tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Any, world: int, kills: int
) -> None:
    """See crash.py; a longer form of the same with other seeds is `python tests/crash.py --kills N`."""
    write_shards(tmp_path / "new", random_documents(0, 60))
    write_shards(tmp_path / "val", random_documents(1, 12))
    config = tiny_config(
        data={
            "train": [Source(name="new", path=str(tmp_path / "new"), weight=1.0)],
            "val": [ValidationSet(name="val", path=str(tmp_path / "val"), role="upstream")],
            "seq_len": 16,
        },
        train={"tokens": Count(16 * 96), "batch_tokens": Count(96), "micro_batch": 2, "compile": False},
        run={"log_every": 3, "eval_every": 4, "save_every": 2, "eval_tokens": Count(64), "tensorboard": True},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, str(HARNESS), "--kills", str(kills), "--world", str(world), "--seed", "1", str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=540, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    tally = done.stdout.strip().splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 different" in tally
    inside = int(tally.split(" inside a save")[0].split()[-1])
    assert inside >= kills // 4, tally
