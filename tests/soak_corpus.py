"""A tokenizer and a corpus for the harnesses: small, of every kind of file, the same for the same randomness."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import zstandard
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

WORDS = ["the ", "of ", "data", "  ", "\n", "é", "日本", "🎉", "don't", "123 ", "\u2028", "<|endoftext|>", "."]


def tokenizer(folder: Path, text: str = "the data of the data") -> Path:
    """Byte-level BPE of the form of GPT-NeoX's, with the first merges that this text asks for."""
    path = folder / "tokenizer.json"
    if not path.exists():
        made = tokenizers.Tokenizer(models.BPE())
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator([text], trainer)
        folder.mkdir(parents=True, exist_ok=True)
        made.save(str(path))
    return path


def write(folder: Path, rng: random.Random, documents: int) -> Path:
    """About `documents` of about 700 bytes in four files, some empty lines, bad ones and duplicates among them."""
    folder.mkdir(parents=True)

    seen = ["the data"]

    def make_text() -> str:
        """One in twenty was there before, in another file perhaps."""
        if rng.random() < 0.95:
            seen.append("".join(rng.choices(WORDS, k=rng.randrange(1, 400))))
            return seen[-1]
        return rng.choice(seen)

    def make(count: int) -> list[dict[str, str]]:
        return [{"text": make_text(), "group": rng.choice("abc")} for _ in range(count)]

    def lines(count: int) -> bytes:
        made = [json.dumps(record).encode() for record in make(count)]
        for _ in range(3):
            made[rng.randrange(count)] = rng.choice([b"", b"{", b'{"text": 5}'])
        return b"\n".join(made)

    share = documents // 5
    (folder / "a.jsonl").write_bytes(lines(2 * share))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(share), mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines(share)))
    pq.write_table(pa.Table.from_pylist(make(share)), folder / "d.parquet", row_group_size=50)
    return folder
