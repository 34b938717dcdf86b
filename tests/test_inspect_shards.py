"""What `inspect` says of a set is what is in it; `verify` finds an index that disagrees with its manifest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastcpt import UserError, integrity
from fastcpt.data_prep.inspect_shards import inspect, verify
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import BLOCK_BYTES, MANIFEST, index_bytes

TEXTS = ["first document", "the second, é 日本\nof two lines", "third"]


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    arguments: dict[str, Any] = {"tokenizer": str(tmp_path), "on_error": "skip", "workers": 1, "quiet": True}
    prep([str(tmp_path / "a.jsonl")], output=tmp_path / "set", shard_tokens=1, **arguments)
    return tmp_path / "set"


def test_inspect_says_what_is_there(shard_set: Path) -> None:
    manifest = json.loads((shard_set / MANIFEST).read_bytes())
    lengths = [pair["tokens"] for pair in manifest["pairs"]]
    text = inspect(shard_set)
    for wanted in (
        f"tokens       {sum(lengths):,} in uint16",
        "documents    3",
        f"text         {sum(len(text.encode()) for text in TEXTS)} bytes",
        "'<|endoftext|>' = 0",
        manifest["fingerprint"],
        f"{'50%':<10} {sorted(lengths)[1]}",
        f"{'100%':<10} {max(lengths)}",
        "pairs        3",
        f"shard-00002  {lengths[2]} tokens, 1 documents",
        "rejected     1 documents",
        f"a.jsonl  1 broken JSON, first at 2 (byte {len(json.dumps({'text': TEXTS[0]})) + 2})",
    ):
        assert wanted in text, wanted
    assert TEXTS[2] not in text
    decoded = inspect(shard_set, decode=2)
    assert all(f"{text}<|endoftext|>" in decoded for text in TEXTS[:2]) and TEXTS[2] not in decoded
    assert TEXTS[2] in inspect(shard_set, decode=100)


def test_inspect_of_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json"):
        inspect(tmp_path)


def test_verify_is_silent_about_a_sound_set(shard_set: Path, capfd: Any) -> None:
    verify(shard_set)
    assert capfd.readouterr() == ("", "")


def test_verify_finds_damage(shard_set: Path) -> None:
    path = shard_set / "shard-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.bin: bytes 0 to \d+ differ"):
        verify(shard_set)


@pytest.mark.parametrize(
    "change", [lambda data, n: index_bytes(np.dtype(np.uint16), np.array([n - 1, 1], np.int32)), "dtype", "pointer"]
)
def test_verify_finds_an_index_that_disagrees(shard_set: Path, change: Any) -> None:
    """An index whose hashes were made anew, so that only its content can tell."""
    path = shard_set / "shard-00000.idx"
    data = bytearray(path.read_bytes())
    manifest = json.loads((shard_set / MANIFEST).read_bytes())
    pair = manifest["pairs"][0]
    if change == "dtype":
        data[17] = 3
    elif change == "pointer":
        data[34 + 4] = 2
    else:
        data = bytearray(change(data, pair["tokens"]))
    path.write_bytes(data)
    sums = np.concatenate([integrity.file_hashes(path.with_suffix(end), BLOCK_BYTES) for end in (".bin", ".idx")])
    path.with_suffix(".sums").write_bytes(sums.tobytes())
    pair["idx_bytes"] = len(data)
    pair["sums_sha256"] = integrity.sha256_file(path.with_suffix(".sums"))
    del manifest["sha256"]
    integrity.write_json(shard_set / MANIFEST, manifest | {"sha256": integrity.sha256_json(manifest)})
    with pytest.raises(UserError, match=r"shard-00000\.idx: (holds|its sequences)"):
        verify(shard_set)
