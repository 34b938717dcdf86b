"""What several tests need: small shard sets written by the real writer, small configurations, several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcpt import config as configuration
from fastcpt.shards import PairWriter, ShardSet, tokenizer_fingerprint, write_manifest

EOD = 0


def token_text(token: int) -> str:
    """The text of an id: of 1 to 7 bytes, the end-of-document token of none."""
    return "" if token == EOD else f"{token:x}".rjust(1 + token % 7, "t")


def tokenizer_json(vocab_size: int) -> bytes:
    vocabulary = {f"<{token}>" if token == EOD else token_text(token): token for token in range(vocab_size)}
    content = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    return json.dumps({**content, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}}).encode()


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., ShardSet]:
    """write_shards(folder, documents, pairs=2, vocab_size=64, dtype=np.uint16) -> the set, in about equal pairs.

    documents: lists of ids without the end-of-document token 0, which is appended.
    """

    def write(
        folder: Path, documents: Sequence[Sequence[int]], pairs: int = 2, vocab_size: int = 64, dtype: Any = np.uint16
    ) -> ShardSet:
        folder.mkdir(parents=True)
        content = tokenizer_json(vocab_size)
        (folder / "tokenizer.json").write_bytes(content)
        token_bytes = np.array([len(token_text(token)) for token in range(vocab_size)], np.uint16)
        np.save(folder / "token_bytes.npy", token_bytes)
        entries = []
        for number in range(pairs):
            part = documents[number * len(documents) // pairs : (number + 1) * len(documents) // pairs]
            writer = PairWriter(folder, f"shard-{number:05}", np.dtype(dtype))
            for document in part:
                tokens = np.array([*document, EOD], dtype)
                writer.write(tokens, np.array([len(tokens)], np.int32))
            entries.append(writer.close())
        write_manifest(
            folder,
            tokenizer={
                "fingerprint": tokenizer_fingerprint(content),
                "vocab_size": vocab_size,
                "eod": EOD,
                "eod_token": "<0>",
            },
            dtype=np.dtype(dtype),
            text_bytes=int(sum(token_bytes[list(document)].sum() for document in documents)),
            pairs=entries,
            files=["tokenizer.json", "token_bytes.npy"],
        )
        return ShardSet(folder)

    return write


@pytest.fixture(scope="session")
def random_documents() -> Callable[..., list[list[int]]]:
    """random_documents(seed, count, longest=40, vocab_size=64): ragged, an empty one now and then."""

    def make(seed: int, count: int, longest: int = 40, vocab_size: int = 64) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        lengths = generator.integers(0, longest + 1, count)
        return [generator.integers(1, vocab_size, length).tolist() for length in lengths]

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., configuration.Config]:
    """tiny_config(output, **sections): a run of 5 steps of a tiny model; a section's dict changes its fields."""

    def make(output: Path | str = "run", **sections: dict[str, Any]) -> configuration.Config:
        defaults: dict[str, dict[str, Any]] = {
            "model": {"layers": 2, "width": 24, "heads": 3, "vocab_size": 64},
            "init": {},
            "data": {"train": [configuration.Source(name="new", path="new", weight=1.0)], "seq_len": 16},
            "train": {
                "tokens": configuration.Count(5 * 6 * 16),
                "batch_tokens": configuration.Count(6 * 16),
                "micro_batch": 4,
                "compile": False,
                "precision": "fp32",
            },
            "optim": {"lr": 1e-3},
            "schedule": {},
            "run": {"output": str(output), "tensorboard": False},
        }
        classes = {
            "model": configuration.Model,
            "init": configuration.Init,
            "data": configuration.Data,
            "train": configuration.Train,
            "optim": configuration.Optim,
            "schedule": configuration.Schedule,
            "run": configuration.Run,
        }
        return configuration.Config(
            **{name: cls(**{**defaults[name], **sections.get(name, {})}) for name, cls in classes.items()}
        )

    return make


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """run_ranks(script, size, *arguments) -> what each process printed, of `size` processes in one gloo group.

    The script reads its own rank and the world from the environment, as under torchrun; a store in a file and not on
    a port joins them, so that tests side by side cannot meet.
    """
    join = (
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv.pop(1),"
        " rank=int(os.environ['RANK']), world_size=int(os.environ['WORLD_SIZE']))\n"
    )

    def run(script: str, size: int, *arguments: Any) -> list[str]:
        store = tmp_path / "store"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", join + script, str(store), *map(str, arguments)],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, outputs):
            assert process.returncode == 0, errors
        return [printed for printed, _ in outputs]

    return run
