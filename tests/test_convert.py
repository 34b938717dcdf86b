"""`convert`: what comes out is what each project's own layout says, whatever the block size; every fault is named.

Megatron's files are written by megatron-core. The others are written here as their projects document it; those of
datatrove are, byte for byte, what its `TokenizedFile` (0.10.1) wrote for the same documents.
"""

import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastcpt import UserError, cli
from fastcpt.data_prep import convert as module
from fastcpt.data_prep import foreign
from fastcpt.data_prep.convert import convert
from fastcpt.data_prep.foreign import LLMC_MAGICS, SEQUENCE_TOKENS
from fastcpt.data_prep.inspect_shards import verify
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import ShardSet, index_bytes

EOD = 0
VOCAB = 1000
Documents = list[list[int]]


def write_tokenizer(path: Path, vocab_size: int) -> Path:
    vocab = {"<|endoftext|>" if index == EOD else "x" * (index % 5) + f"{index}": index for index in range(vocab_size)}
    content = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    path.write_text(json.dumps({**content, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "1"}}))
    return path


def text_bytes(documents: Documents) -> int:
    return sum(index % 5 + len(str(index)) for document in documents for index in document if index != EOD)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json", VOCAB)


@pytest.fixture(scope="session")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json", 70_000)


@pytest.fixture
def run(tokenizer: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    return functools.partial(convert, tokenizer=str(tokenizer), output=tmp_path / "out", quiet=True)


def ragged(seed: int, count: int = 40, high: int = VOCAB) -> Documents:
    """Documents with their EOD: empty ones, long ones, and the highest id."""
    rng = random.Random(seed)
    lengths = [0, *(rng.choice((0, 1, 2, 9, 70)) for _ in range(count - 2)), 5]
    return [[*(rng.choice((rng.randrange(1, high), high - 1)) for _ in range(length)), EOD] for length in lengths]


def save(path: Path, tokens: Sequence[int] | np.ndarray, dtype: str = "<u2", head: bytes = b"") -> Path:
    path.write_bytes(head + np.array(tokens, dtype).tobytes())
    return path


def save_llmc(path: Path, tokens: Sequence[int], magic: int = 20240520) -> Path:
    """As llm.c's dev/data/data_common.py writes it."""
    version, dtype = LLMC_MAGICS[magic]
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    return save(path, tokens, dtype, header.tobytes())


def save_megatron(prefix: Path, documents: list[Documents], dtype: type = np.uint16) -> Path:
    """By their own builder; a document is a list of sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate([np.array(each, dtype) for each in sequences]), [*map(len, sequences)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def save_datatrove(path: Path, documents: Documents, token_bytes: int = 2) -> Path:
    ends = np.cumsum([len(document) for document in documents])
    save(path, flat(documents), f"<u{token_bytes}")
    Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    Path(f"{path}.metadata").write_text(f"some/tok|{token_bytes}\n{ends[-1]}\n{ends[-1]}.00 T")
    return path


def flat(documents: Documents) -> list[int]:
    return [index for document in documents for index in document]


def read(directory: str | Path) -> Documents:
    shards = ShardSet(directory)
    verify(directory, quiet=True)
    places = [(pair, index) for pair, entry in enumerate(shards.pairs) for index in range(entry["documents"])]
    return [shards.document(*place).tolist() for place in places]


def check(manifest: dict[str, Any], documents: Documents) -> None:
    """The set holds exactly these documents, and counts them rightly."""
    assert read(manifest["path"]) == documents
    assert manifest["documents"] == len(documents) and manifest["tokens"] == len(flat(documents))
    assert manifest["text_bytes"] == text_bytes(documents)
    assert not Path(manifest["path"] + ".partial").exists()


def ledger(manifest: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    rows = pq.read_table(Path(manifest["path"]) / "ledger.parquet").to_pylist()
    return [(row["input"], row["documents"], row["tokens"], row["text_bytes"]) for row in rows]


@pytest.fixture(params=[1, 2, 7, 64, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", request.param)
    return request.param


def test_nanogpt(tmp_path: Path, run: Any, block: int) -> None:
    parts = [ragged(1), ragged(2, 3)]
    for name, part in zip("ab", parts):
        save(tmp_path / f"{name}.bin", flat(part))
    manifest = run([str(tmp_path / "b.bin"), str(tmp_path / "a.bin")], source="nanogpt", shard_tokens=200)
    check(manifest, parts[1] + parts[0])
    rows = [(f"{n}.bin", len(p), len(flat(p)), text_bytes(p)) for n, p in zip("ab", parts)]
    assert ledger(manifest) == rows[::-1]
    assert len(manifest["pairs"]) > 3 and all(pair["tokens"] <= 200 for pair in manifest["pairs"])


@pytest.mark.parametrize("magic", LLMC_MAGICS)
def test_llmc_documents_go_on_from_file_to_file(
    magic: int, tmp_path: Path, large_tokenizer: Path, tokenizer: Path, block: int
) -> None:
    documents = ragged(3, high=VOCAB if magic == 20240520 else 70_000)
    stream = [EOD, *flat(documents)[:-1]]  # the same, the EOD before each document
    cuts = [0, 5, 6, 100, 101, len(stream)]
    assert len(stream) > 200
    (tmp_path / "in").mkdir()
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        save_llmc(tmp_path / "in" / f"fineweb_train_{number:06d}.bin", stream[start:stop], magic)
    which = tokenizer if magic == 20240520 else large_tokenizer
    manifest = convert(
        [str(tmp_path / "in")], source="llmc", tokenizer=str(which), output=tmp_path / "out", quiet=True
    )  # fmt: skip
    check(manifest, documents)
    assert manifest["dtype"] == ("uint16" if magic == 20240520 else "int32")
    lengths = np.array([*map(len, documents)])
    where = np.searchsorted(cuts, 1 + np.cumsum(lengths) - lengths, side="right") - 1  # the file that each starts in
    counts = [[document for document, file in zip(documents, where) if file == each] for each in range(len(cuts) - 1)]
    rows = [(len(part), len(flat(part)), text_bytes(part)) for part in counts]
    assert [row[1:] for row in ledger(manifest)] == rows and (0, 0, 0) in rows


def test_llmc_from_the_middle_of_a_document(tmp_path: Path, run: Any, block: int) -> None:
    """A training set whose first document began in the validation set; cut right before the next document."""
    save_llmc(tmp_path / "a.bin", [8, 9, EOD, 5, EOD])
    check(run([str(tmp_path)], source="llmc"), [[8, 9, EOD], [5, EOD]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_megatron_documents_of_several_sequences(tmp_path: Path, run: Any, dtype: type) -> None:
    first = [[[3, 4], [5, EOD]], [[EOD]], [[7], [8], [9, EOD]]]
    second = [[[1, 2, EOD]]]
    save_megatron(tmp_path / "a_0.5_text_document", first, dtype)
    save_megatron(tmp_path / "b", second, dtype)
    manifest = run([str(tmp_path / "a_0.5_text_document"), str(tmp_path / "b.bin")], source="megatron")
    check(manifest, [flat(document) for document in first + second])
    assert ledger(manifest)[1] == ("b.bin", 1, 3, text_bytes([[1, 2]]))


@pytest.mark.filterwarnings("ignore")
def test_megatron_blocks(tmp_path: Path, run: Any, block: int) -> None:
    documents = ragged(4)
    save_megatron(tmp_path / "a", [[document] for document in documents], np.int32)
    check(run([str(tmp_path)], source="megatron"), documents)


@pytest.mark.filterwarnings("ignore")
def test_our_pairs_convert_into_themselves(tmp_path: Path, run: Any) -> None:
    save(tmp_path / "a.bin", flat(ragged(5)))
    first = run([str(tmp_path / "a.bin")], source="nanogpt", shard_tokens=90)
    again = run([first["path"]], source="megatron", shard_tokens=90, output=tmp_path / "again")
    assert again["fingerprint"] == first["fingerprint"]


def pythia_parts(folder: Path, sequences: int, part_tokens: int) -> np.ndarray:
    tokens = np.random.default_rng(6).integers(0, VOCAB, sequences * SEQUENCE_TOKENS)
    folder.mkdir()
    for number, start in enumerate(range(0, len(tokens), part_tokens)):
        save(folder / f"document-{number:05}-of-00020.bin", tokens[start : start + part_tokens])
    lengths = np.full(sequences, SEQUENCE_TOKENS, np.int32)
    (folder / "document.idx").write_bytes(index_bytes(np.dtype(np.uint16), lengths))
    return tokens.reshape(sequences, SEQUENCE_TOKENS)


@pytest.mark.parametrize("block_tokens", [100, 2049, 5000, 1 << 20])
def test_pythia_sequences_across_parts(
    block_tokens: int, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", block_tokens)
    expected = pythia_parts(tmp_path / "in", 12, 1500)
    parts = [str(path) for path in sorted((tmp_path / "in").glob("*.bin"), reverse=True)]
    check(run(parts, source="pythia", shard_tokens=10_000), expected.tolist())


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_datatrove(tmp_path: Path, run: Any, block: int, token_bytes: int) -> None:
    documents = ragged(7)
    save_datatrove(tmp_path / "00000_tokens.ds", documents, token_bytes)
    save_datatrove(tmp_path / "00001_tokens.ds", documents[:3], 6 - token_bytes)  # each file says its own width
    check(run([str(tmp_path)], source="datatrove"), documents + documents[:3])
    (tmp_path / "00000_tokens.ds.metadata").unlink()
    options = {"source": "datatrove", "output": tmp_path / "o", "dtype": f"uint{8 * token_bytes}"}
    check(run([str(tmp_path / "00000_tokens.ds")], **options), documents)


def test_datatrove_as_it_wrote_it(tmp_path: Path) -> None:
    save_datatrove(tmp_path / "x.ds", [[5, 6, EOD], [7, EOD], [EOD]])
    assert (tmp_path / "x.ds").read_bytes() == b"\x05\x00\x06\x00\x00\x00\x07\x00\x00\x00\x00\x00"
    index = b"\x03\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"
    assert (tmp_path / "x.ds.index").read_bytes() == index
    assert (tmp_path / "x.ds.metadata").read_bytes() == b"some/tok|2\n6\n6.00 T"


def test_olmo(tmp_path: Path, run: Any, large_tokenizer: Path, block: int) -> None:
    documents, large = ragged(8), ragged(9, high=70_000)
    np.memmap(tmp_path / "a.npy", "<u2", "w+", shape=(len(flat(documents)),))[:] = flat(documents)
    check(run([str(tmp_path / "a.npy")], source="olmo"), documents)
    save(tmp_path / "b.npy", flat(large), "<u4")
    check(
        run([str(tmp_path / "b.npy")], source="olmo", tokenizer=str(large_tokenizer), output=tmp_path / "large"), large
    )
    save(tmp_path / "c.npy", flat(documents), "<u4")
    check(run([str(tmp_path / "c.npy")], source="olmo", dtype="uint32", output=tmp_path / "wide"), documents)


def test_the_same_set_as_prep_makes(tmp_path: Path) -> None:
    """The same documents are the same pairs, hashes, text bytes and fingerprint, whoever tokenized them."""
    texts = [f"a line {number} " * (number % 9 + 1) + "é 日本" for number in range(60)]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save(tmp_path / "a.bin", flat([[*made.encode(text).ids, EOD] for text in texts]))
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer.json"), "shard_tokens": 200, "quiet": True}
    (expected,) = prep([str(tmp_path / "a.jsonl")], output=tmp_path / "p", workers=1, **options)
    got = convert([str(tmp_path / "a.bin")], source="nanogpt", output=tmp_path / "c", **options)
    assert len(expected["pairs"]) > 3
    for key in ("fingerprint", "pairs", "text_bytes", "tokens", "documents", "tokenizer", "dtype"):
        assert got[key] == expected[key], key
    assert sorted(got["files"]) == sorted(expected["files"])
    for name in ("tokenizer.json", "token_bytes.npy"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "p" / name).read_bytes()


def test_append_eod(tmp_path: Path, run: Any, block: int) -> None:
    save(tmp_path / "a.bin", [5, 6, EOD, 7, 8])
    save(tmp_path / "b.bin", [9])
    arguments = [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    check(run(arguments, source="nanogpt", append_eod=True), [[5, 6, EOD], [7, 8, EOD], [9, EOD]])
    save_datatrove(tmp_path / "c.ds", [[5, 6], [7, EOD], [8], [EOD]])
    expected = [[5, 6, EOD], [7, EOD], [8, EOD], [EOD]]
    check(run([str(tmp_path)], source="datatrove", append_eod=True, output=tmp_path / "o"), expected)


def damaged(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def put(at: int, value: int, size: int = 4) -> Callable[[bytearray], Any]:
    return lambda data: data.__setitem__(slice(at, at + size), value.to_bytes(size, "little"))


def cut(count: int) -> Callable[[bytearray], Any]:
    return lambda data: data.__delitem__(slice(len(data) - count, None))


DOCUMENTS = [[5, 6, EOD], [7, EOD], [8, 9, 10, EOD]]  # 9 tokens
FAULTS: dict[str, tuple[str, str, Callable[[bytearray], Any], str]] = {
    "odd": ("nanogpt", "a.bin", cut(1), r"a\.bin: 17 bytes, and 1 of them, from byte 16 on.*get it whole"),
    "cut": ("nanogpt", "a.bin", cut(2), r"a\.bin: from byte 10 on: 3 tokens.*last id 10.*'<\|endoftext\|>'.*--append-eod"),
    "empty": ("nanogpt", "a.bin", cut(18), r"a\.bin: 0 bytes"),
    "id": ("nanogpt", "a.bin", put(6, VOCAB, 2), r"a\.bin: byte 6 is id 1,000, .*0 to 999; check --tokenizer or --dtype"),
    "llmc as nanogpt": ("llmc:nanogpt", "a.bin", cut(0), r"a\.bin: byte 0 is 20240520.*--source llmc"),
    "magic": ("llmc", "a.bin", put(0, 20240522), r"a\.bin: byte 0 is 20240522, not 20240520.*check --source"),
    "version": ("llmc", "a.bin", put(4, 2), r"a\.bin: byte 4 is version 2, known is 1"),
    "count": ("llmc", "a.bin", put(8, 10), r"a\.bin: 1,042 bytes, but byte 8 promises 10 tokens, 1,044 bytes"),
    "negative count": ("llmc", "a.bin", put(8, 2**32 - 1), r"byte 8 promises -1 tokens"),
    "short header": ("llmc", "a.bin", cut(1040), r"a\.bin: byte 0 is \d+, not"),
    "header alone": ("llmc", "a.bin", cut(18), r"a\.bin: 1,024 bytes, but byte 8 promises 9 tokens"),
    "llmc id": ("llmc", "a.bin", put(1024 + 4, 60_000, 2), r"a\.bin: byte 1,028 is id 60,000"),
    "idx magic": ("megatron", "a.idx", put(0, 0), r"a\.idx: starts with .*not a Megatron index"),
    "idx code": ("megatron", "a.idx", put(17, 6, 1), r"a\.idx: version 1, dtype code 6; known are"),
    "idx cut": ("megatron", "a.idx", cut(1), r"a\.idx: 101 bytes, its header promises 102"),
    "idx pointer": ("megatron", "a.idx", put(34 + 12 + 8, 8), r"a\.idx: sequence 1 \(byte 38\) has 2 tokens from byte 8"),
    "idx document": ("megatron", "a.idx", put(34 + 36 + 8, 3), r"a\.idx: its documents, from byte 70 on"),
    "idx documents": ("megatron", "a.idx", put(34 + 36 + 24, 4), r"a\.idx: its documents, from byte 70 on"),
    "bin cut": ("megatron", "a.bin", cut(2), r"a\.bin: 16 bytes, its index promises 9 tokens, 18 bytes"),
    "bin long": ("megatron", "a.bin", lambda data: data.extend(b"ab"), r"a\.bin: 20 bytes, its index promises"),
    "no eod": ("megatron", "a.bin", put(8, 4, 2), r"a\.bin: document 1 ends at byte 8 with id 4, not .*--append-eod"),
    "index cut": ("datatrove", "a.ds.index", cut(1), r"a\.ds\.index: 23 bytes, and 7 of them"),
    "index falls": ("datatrove", "a.ds.index", put(8, 2, 8), r"a\.ds\.index: byte 8 ends document 1 at token 2"),
    "index short": ("datatrove", "a.ds.index", cut(8), r"a\.ds: 18 bytes are 9 uint16 tokens, its index ends at 5"),
    "ds odd": ("datatrove", "a.ds", cut(1), r"a\.ds: 17 bytes, and 1 of them"),
    "ds metadata": ("datatrove", "a.ds.metadata", put(9, 51, 1), r"metadata: line 1 is 'some/tok\|3'"),
    "ds no eod": ("datatrove", "a.ds", put(16, 4, 2), r"a\.ds: document 2 ends at byte 16 with id 4, not"),
    "numpy": ("olmo", "a.npy", lambda data: data.__setitem__(slice(0, 6), b"\x93NUMPY"), r"a\.npy: byte 0 is .*\.tofile"),
    "olmo cut": ("olmo", "a.npy", cut(2), r"a\.npy: from byte 10 on: 3 tokens"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written, file, change, message = FAULTS[name]
    written, _, read_as = written.partition(":")
    folder = tmp_path / "in"
    folder.mkdir()
    if written == "llmc":
        save_llmc(folder / "a.bin", [EOD, *flat(DOCUMENTS)[:-1]])
    elif written == "megatron":
        save_megatron(folder / "a", [[document] for document in DOCUMENTS])
    elif written == "datatrove":
        save_datatrove(folder / "a.ds", DOCUMENTS)
    else:
        save(folder / file, flat(DOCUMENTS))
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", 2)
    damaged(folder / file, change)
    with pytest.raises(UserError, match=message):
        run([str(folder)], source=read_as or written)
    assert os.listdir(tmp_path) == ["in"]  # nothing is left behind


def test_wrong_eod_is_seen(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llmc(tmp_path / "a.bin", [4, 5, 6])
    with pytest.raises(UserError, match=r"a\.bin: not one end-of-document token"):
        run([str(tmp_path)], source="llmc")
    monkeypatch.setattr(module, "MAX_DOCUMENT_TOKENS", 5)
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", 2)
    save(tmp_path / "b.bin", [1, EOD, 5, 5, 5, 5, 5, 5, 5, EOD])
    with pytest.raises(
        UserError, match=r"b\.bin: from byte 4 on: no end-of-document token .* in 5 tokens; check --eod"
    ):
        run([str(tmp_path / "b.bin")], source="nanogpt")


def test_negative_and_wide_ids(tmp_path: Path, run: Any) -> None:
    lengths = np.array([3], np.int32)
    (tmp_path / "a.idx").write_bytes(index_bytes(np.dtype(np.int64), lengths))
    for bad in (-1, 2**32 + 5):
        save(tmp_path / "a.bin", [5, bad, EOD], "<i8")
        with pytest.raises(UserError, match=rf"a\.bin: byte 8 is id {bad:,}, the tokenizer has ids 0 to 999"):
            run([str(tmp_path)], source="megatron")


def test_uint32_read_as_uint16_is_refused(tmp_path: Path, run: Any) -> None:
    save(tmp_path / "a.npy", flat(ragged(1)), "<u4")
    with pytest.raises(UserError, match=r"a\.npy: every second uint16.*--dtype uint32"):
        run([str(tmp_path)], source="olmo")
    for tokens, message in (([5, 6, 7, EOD], r"b\.npy: byte 0 is id .*--dtype"), ([5, 6, EOD], r"6 bytes.*--dtype")):
        save(tmp_path / "b.npy", tokens, "<u2")
        with pytest.raises(UserError, match=message):
            run([str(tmp_path / "b.npy")], source="olmo", dtype="uint32")


def test_pythia_faults(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "in"
    pythia_parts(folder, 4, 3000)
    last = max(folder.glob("*.bin"))
    whole, index = last.read_bytes(), (folder / "document.idx").read_bytes()
    last.write_bytes(whole[:-2])
    with pytest.raises(
        UserError, match=r"00002.*: its end cuts a sequence after 2,048 of 2,049 tokens \(from byte 294 on"
    ):
        run([str(folder)], source="pythia")
    last.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"00002.*bytes, and 1 of them"):
        run([str(folder)], source="pythia")
    last.write_bytes(whole)
    for change, message in (
        (put(17, 4, 1), "dtype code 4"),
        (put(34 + 8, 2048), r"byte 42 gives sequence 2 2,048 tokens"),
        (put(18, 3, 8), r"3 sequences \(byte 18\) for parts that hold 4"),
        (cut(90), "it was cut"),
    ):
        (folder / "document.idx").write_bytes(index)
        damaged(folder / "document.idx", change)
        with pytest.raises(UserError, match=message):
            run([str(folder)], source="pythia")
    (folder / "document.idx").write_bytes(index)
    sorted(folder.glob("*.bin"))[1].unlink()
    with pytest.raises(UserError, match=r"part 2 where part 1 should be"):
        run([str(folder)], source="pythia")
    with pytest.raises(UserError, match="--append-eod"):
        run([str(folder)], source="pythia", append_eod=True)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.bin", flat(ragged(1)))
    monkeypatch.setattr(module._Documents, "_check_ids", lambda self, file, block, done: os.truncate(path, 8))
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", 4)
    with pytest.raises(UserError, match=r"a\.bin: ends at byte 8, it had"):
        run([str(path)], source="nanogpt")


def test_what_is_there_is_kept(tmp_path: Path, run: Any) -> None:
    path = save(tmp_path / "a.bin", flat(DOCUMENTS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        run([str(path)], source="nanogpt")
    assert os.listdir(tmp_path / "out") == ["mine"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished `fastcpt prep`"):
        run([str(path)], source="nanogpt")
    assert (tmp_path / "out.partial" / "plan.json").exists()
    (tmp_path / "out.partial" / "plan.json").unlink()
    (tmp_path / "out.partial" / "sets" / "out").mkdir(parents=True)  # a conversion that was killed
    (tmp_path / "out.partial" / "sets" / "out" / "shard-00009.bin").touch()
    check(run([str(path)], source="nanogpt"), DOCUMENTS)
    assert not (tmp_path / "out" / "shard-00009.bin").exists()


def test_a_failed_commit_leaves_no_set(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.bin", flat(DOCUMENTS))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.merge, "write_manifest", full)
    with pytest.raises(UserError, match="the disk is full"):
        run([str(path)], source="nanogpt")
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["a.bin", "a.bin"], "twice"),
        (["a.bin", "--eod", "<none>"], "<none>"),
        (["a.bin", "--shard-tokens", "0"], "--shard-tokens"),
        (["a.bin", "--source", "llmc", "--dtype", "uint16"], "--dtype"),
        (["a.bin", "--source", "datatrove"], "a.bin.index"),
        (["a.bin", "--source", "megatron"], "a.idx"),
        (["a.bin", "--source", "zip"], "zip"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], named: str, tmp_path: Path, tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.bin", flat(DOCUMENTS))
    try:
        code = cli.main(
            ["convert", "--source", "nanogpt", "--tokenizer", str(tokenizer), "--output", "out", *arguments]
        )
    except SystemExit as stopped:  # argparse's own
        code = stopped.code  # type: ignore[assignment]
    assert code == 2 and named in capsys.readouterr().err.strip().splitlines()[-1]
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_command_and_its_help(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.bin", flat(DOCUMENTS))
    output = str(tmp_path / "out")
    arguments = ["--source", "nanogpt", "--tokenizer", str(tokenizer), "--output", output, "--shard-tokens", "1K"]
    assert cli.main(["convert", str(tmp_path / "a.bin"), *arguments]) == 0
    assert capsys.readouterr().out == f"{output}: 3 documents, 9 tokens\n"
    assert read(output) == DOCUMENTS
    script = (
        "import sys\nfor name in ('torch', 'pyarrow', 'tokenizers', 'gigatoken'): sys.modules[name] = None\n"
        "from fastcpt import cli\ncli.main(['convert', '--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "110"},
    )  # fmt: skip
    assert done.returncode == 0 and all(name in done.stdout for name in foreign.FORMATS), done.stderr
    assert len(done.stdout.splitlines()) <= 30 and max(map(len, done.stdout.splitlines())) <= 110


def test_memory_stays_flat(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times the data takes no more memory, beyond the lengths of the documents (about 20 bytes each)."""
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", 15_001)  # most blocks begin a document that they do not end
    peaks = []
    for name, repeats in (("warm", 1), ("a", 1), ("b", 16)):
        tokens = np.tile(np.append(np.full(9_999, 7), EOD), 20 * repeats)
        save(tmp_path / f"{name}.bin", tokens)
        del tokens
        tracemalloc.start()
        run([str(tmp_path / f"{name}.bin")], source="nanogpt", output=tmp_path / name)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "b.bin").stat().st_size == 6_400_000
    assert peaks[2] < peaks[1] + 300_000, peaks
