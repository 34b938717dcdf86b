"""`prep` from end to end: ids against `tokenizers`, pairs against Megatron's reader, exact accounting, restarts."""

import errno
import functools
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from fastcpt import UserError
from fastcpt.data_prep import encoding, engines, inputs, merge, pairs, parts, pretokenize, store, tasks
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import ShardSet

SPECIAL = ["<|endoftext|>", "<|padding|>"]
BACKENDS = ["gigatoken", "tokenizers"]
PIECES = [
    "the ",
    "of ",
    "data",
    "  ",
    "    ",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "日本",
    "🎉",
    "don't",
    "123",
    "\u2028",
    "\x00",
    ".",
    *SPECIAL,
]


def make_text(rng: random.Random, pieces: int) -> str:
    return "".join(rng.choices(PIECES, k=pieces)) + rng.choice("xyz")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer of the form of GPT-NeoX's: NFC, byte-level BPE, special tokens first, runs of spaces added."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([make_text(rng, 30).replace("<|", "") for _ in range(200)], trainer)
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (4, 3, 2)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def reference(tokenizer_file: Path) -> Callable[[str], list[int]]:
    """Text -> ids with the end of document, from `tokenizers` called directly."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True
    return lambda text: [*tokenizer.encode(text, add_special_tokens=False).ids, 0]


@pytest.fixture
def run(tokenizer_file: Path) -> Callable[..., list[dict[str, Any]]]:
    return functools.partial(prep, tokenizer=str(tokenizer_file), workers=1, quiet=True)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def corpus(folder: Path, seed: int = 0) -> dict[str, list[str]]:
    """One file of each kind. Returns the texts of each, in order."""
    rng = random.Random(seed)
    texts = {name: [make_text(rng, rng.randrange(40)) for _ in range(25)] for name in ("a", "b", "c", "d")}
    texts["e"] = [make_text(rng, 60)]
    lines = {name: "".join(json.dumps({"text": text}) + "\n" for text in texts[name]).encode() for name in texts}
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines["a"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines["b"]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines["c"]))
    pq.write_table(pa.table({"text": texts["d"]}), folder / "d.parquet", row_group_size=7)
    (folder / "e.txt").write_bytes(texts["e"][0].encode())
    return texts


def documents(directory: Path) -> list[list[int]]:
    shards = ShardSet(directory)
    return [
        shards.document(pair, index).tolist()
        for pair, entry in enumerate(shards.pairs)
        for index in range(entry["documents"])
    ]


def tree(directory: Path) -> dict[str, str]:
    """The hash of each file of a set, and those of its sibling sets."""
    folders = [directory, *directory.parent.glob(directory.name + "-*")]
    return {
        folder.name.removeprefix(directory.name) + "/" + file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in folder.iterdir()
    }


def ledger(directory: Path) -> list[dict[str, Any]]:
    return pq.read_table(directory / "ledger.parquet").to_pylist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_those_of_tokenizers_in_name_order(tmp_path: Path, run: Any, reference: Any, backend: str) -> None:
    texts = corpus(tmp_path / "in")
    (manifest,) = run([str(tmp_path / "in")], output=tmp_path / "out", backend=backend)
    wanted = [text for name in sorted(texts) for text in texts[name]]
    assert documents(tmp_path / "out") == [reference(text) for text in wanted]
    assert manifest["documents"] == len(wanted) and manifest["path"] == str(tmp_path / "out")
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in wanted)
    rows = ledger(tmp_path / "out")
    assert [(row["input"], row["documents"]) for row in rows] == [
        ("a.jsonl", 25),
        ("b.jsonl.gz", 25),
        ("c.jsonl.zst", 25),
        ("d.parquet", 25),
        ("e.txt", 1),
    ]
    assert sum(row["tokens"] for row in rows) == manifest["tokens"] == len(ShardSet(tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.filterwarnings("ignore")
def test_megatron_reads_our_pairs(tmp_path: Path, run: Any, reference: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = [text for _, some in sorted(corpus(tmp_path / "in").items()) for text in some]
    (manifest,) = run([str(tmp_path / "in")], output=tmp_path / "out", shard_tokens=500)
    assert len(manifest["pairs"]) > 3
    wanted = iter([reference(text) for text in texts])
    for pair in manifest["pairs"]:
        dataset = IndexedDataset(str(tmp_path / "out" / pair["name"]), mmap=True)
        assert len(dataset) == pair["documents"] and dataset.index.dtype == np.uint16
        assert dataset.document_indices.tolist() == list(range(pair["documents"] + 1))
        for index in range(len(dataset)):
            assert dataset[index].tolist() == next(wanted)
    assert next(wanted, None) is None


@pytest.mark.parametrize("shard_tokens", [1, 60, 500, 10**9])
def test_pairs_are_cut_at_documents(tmp_path: Path, run: Any, monkeypatch: Any, shard_tokens: int) -> None:
    """Against a plain loop: a pair is closed when the next document would pass the limit."""
    corpus(tmp_path / "in")
    monkeypatch.setattr(inputs, "TASK_BYTES", 700)
    monkeypatch.setattr(parts, "WRITE_TOKENS", 50)
    run([str(tmp_path / "in")], output=tmp_path / "one")
    (manifest,) = run([str(tmp_path / "in")], output=tmp_path / "out", shard_tokens=shard_tokens)
    wanted: list[int] = []
    for length in map(len, documents(tmp_path / "one")):
        if wanted and wanted[-1] + length <= shard_tokens:
            wanted[-1] += length
        else:
            wanted.append(length)
    assert [pair["tokens"] for pair in manifest["pairs"]] == wanted
    assert documents(tmp_path / "out") == documents(tmp_path / "one")


def test_same_bytes_for_any_number_of_workers_and_any_division(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path / "in")
    with open(tmp_path / "in" / "a.jsonl", "ab") as file:
        file.write(b'{"text": 1}\n\n{"text": "')
    options = {"output": tmp_path / "out", "shard_tokens": 700, "val_fraction": 0.2, "on_error": "skip"}
    trees = []
    for workers, task_bytes in [(1, 32 << 20), (1, 211), (1, 997), (2, 997), (3, 997)]:
        monkeypatch.setattr(inputs, "TASK_BYTES", task_bytes)
        run([str(tmp_path / "in")], **options, workers=workers)
        trees.append(tree(tmp_path / "out"))
        for path in (tmp_path / "out", tmp_path / "out-val"):
            shutil.rmtree(path)
    assert len(trees[0]) > 12 and all(other == trees[0] for other in trees)


def test_pairs_in_stretches_are_those_in_one(
    tmp_path: Path, run: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stretches end in the middle of documents and of parts, and the last is shorter."""
    rng = random.Random(7)
    texts = [make_text(rng, rng.choice([3, 40, 2000])) for _ in range(160)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr(inputs, "TASK_BYTES", 90_000)
    wanted = [index for text in texts for index in reference(text)]
    for name, tokens, workers in (("one", 16 << 20, 1), ("many", 32 << 10, 1), ("processes", 32 << 10, 2)):
        monkeypatch.setattr(pairs, "STRETCH_TOKENS", tokens)
        (manifest,) = run([str(path)], output=tmp_path / name, shard_tokens=70_001, workers=workers)
        assert np.concatenate([ShardSet(tmp_path / name).windows(np.array([0]), len(wanted) - 1)[0]]).tolist() == wanted
        ShardSet(tmp_path / name).verify()
        assert tree(tmp_path / name) == tree(tmp_path / "one")
    assert [pair["tokens"] > 2 * 32 << 10 for pair in manifest["pairs"]][:2] == [True, True]


def test_validation_depends_on_the_text_alone(tmp_path: Path, run: Any, reference: Any) -> None:
    rng = random.Random(5)
    texts = [make_text(rng, 20) + str(number) for number in range(400)]
    write_jsonl(tmp_path / "one" / "a.jsonl", [{"text": text} for text in texts])
    rng.shuffle(texts)
    for number, start in enumerate(range(0, 400, 100)):
        write_jsonl(
            tmp_path / "many" / f"{number}.jsonl", [{"id": 1, "text": text} for text in texts[start : start + 100]]
        )
    sets = []
    for name in ("one", "many"):
        train, val = run([str(tmp_path / name)], output=tmp_path / f"out-{name}", val_fraction=0.1)
        sets.append([sorted(map(tuple, documents(Path(manifest["path"])))) for manifest in (train, val)])
        assert train["documents"] + val["documents"] == 400
    assert sets[0] == sets[1]
    assert 15 <= len(sets[0][1]) <= 75  # 40 expected, 6 standard deviations
    assert not set(sets[0][0]) & set(sets[0][1])
    assert sorted(sets[0][0] + sets[0][1]) == sorted(tuple(reference(text)) for text in texts)


def test_validation_set_is_there_even_if_empty(tmp_path: Path, run: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    train, val = run([str(path)], output=tmp_path / "out", val_fraction=1e-9)
    assert (train["documents"], val["documents"], val["pairs"]) == (1, 0, [])
    assert len(ShardSet(tmp_path / "out-val")) == 0


def test_one_set_for_each_value_of_a_key(tmp_path: Path, run: Any, reference: Any) -> None:
    values = ["web", "books", "a.b", "web"]
    records = [{"text": f"text {n}", "meta": {"source": values[n % 4]}} for n in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", [*records, {"text": "none"}, {"text": "x", "meta": {"source": "../up"}}])
    with pytest.raises(UserError, match=r"a\.jsonl:201 \(byte \d+\): missing key"):
        run([str(path)], output=tmp_path / "failed", group_key="meta.source")
    sets = run([str(path)], output=tmp_path / "out", group_key="meta.source", val_fraction=0.3, on_error="skip")
    names = [f"out-{value}{end}" for value in ("a.b", "books", "web") for end in ("", "-val")]
    assert [Path(manifest["path"]).name for manifest in sets] == names
    for value in set(values):
        both = documents(tmp_path / f"out-{value}") + documents(tmp_path / f"out-{value}-val")
        assert sorted(both) == sorted(reference(r["text"]) for r in records if r["meta"]["source"] == value)
    assert not (tmp_path / "out").exists()
    reasons = {
        reject["reason"]: reject["count"] for row in ledger(tmp_path / "out-web") for reject in row["rejects"] or ()
    }
    assert reasons == {"missing key": 1, "not a name": 1}


@pytest.mark.parametrize("value", ["val", "web-val"])
def test_group_never_meets_a_validation_set(tmp_path: Path, run: Any, value: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "group": value}])
    with pytest.raises(UserError, match="validation sets"):
        run([str(path)], output=tmp_path / "out", group_key="group", val_fraction=0.5)
    (manifest,) = run([str(path)], output=tmp_path / "free", group_key="group")
    assert manifest["path"] == str(tmp_path / f"free-{value}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", SPECIAL)
def test_text_that_spells_a_special_token_stays_text(
    tmp_path: Path, run: Any, tokenizer_file: Path, special: str, backend: str
) -> None:
    texts = [special, f"a{special}b", f" {special} {special}\n", special * 3]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    run([str(path)], output=tmp_path / "out", backend=backend)
    decoder = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    for ids, text in zip(documents(tmp_path / "out"), texts, strict=True):
        assert ids[-1] == 0 and not {0, 1} & set(ids[:-1])
        assert decoder.decode(ids[:-1], skip_special_tokens=False) == text


def bad_input(folder: Path) -> tuple[Path, list[str], list[tuple[str, int, int]]]:
    """A file with good lines and bad ones between. Returns it, the good texts, and (reason, line, byte) of the bad."""
    lines = {
        b'{"text": "one"}': None,
        b'{"text": "x"': "broken JSON",
        b'{"text": "ab\xff"}': "invalid UTF-8",
        b'{"text": "a\\udc00"}': "lone surrogate",
        b'{"other": "x"}': "missing key",
        b"": None,
        b'{"text": 5}': "not a string",
        b'{"text": ""}': "empty document",
        b'{"text": "two"}': None,
    }
    at = {"broken JSON": 12, "invalid UTF-8": 12}
    bad, offset = [], 0
    for number, (line, reason) in enumerate(lines.items()):
        if reason:
            bad.append((reason, number + 1, offset + at.get(reason, 0)))
        offset += len(line) + 1
    path = folder / "bad.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, ["one", "two"], bad


def test_rejected_documents_are_listed_and_counted(tmp_path: Path, run: Any, reference: Any) -> None:
    path, good, bad = bad_input(tmp_path)
    (manifest,) = run([str(path)], output=tmp_path / "out", on_error="skip")
    assert documents(tmp_path / "out") == [reference(text) for text in good]
    kept, lost = ledger(tmp_path / "out")
    assert (kept["input"], kept["set"], kept["documents"], kept["rejected"]) == ("bad.jsonl", "", 2, 0)
    assert (kept["tokens"], kept["text_bytes"]) == (manifest["tokens"], manifest["text_bytes"])
    assert (lost["set"], lost["documents"], lost["rejected"], lost["blank_lines"]) == (None, 0, len(bad), 1)
    found = [(entry["reason"], entry["count"], *entry["first"][0].values()) for entry in lost["rejects"]]
    assert found == sorted((reason, 1, line, byte) for reason, line, byte in bad)


@pytest.mark.parametrize("task_bytes", [1, 50, 1 << 20])
def test_bad_document_stops_the_run_with_its_place(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, task_bytes: int
) -> None:
    """Each bad line alone among good ones: the line number is right whatever task reads it."""
    monkeypatch.setattr(inputs, "TASK_BYTES", task_bytes)
    source, _, bad = bad_input(tmp_path)
    lines = source.read_bytes().split(b"\n")
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    for case, (reason, line, byte) in enumerate(bad):
        path = tmp_path / f"{case}.jsonl"
        path.write_bytes(b'{"text": "ok"}\n\n' + lines[line - 1] + b'\n{"text": "ok"}\n')
        with pytest.raises(UserError) as caught:
            run([str(path)], output=tmp_path / f"out{case}")
        assert str(caught.value).startswith(f"{path}:3 (byte {16 + byte - starts[line - 1]}): {reason}: ")
        assert "--on-error skip" in str(caught.value)
        assert not (tmp_path / f"out{case}").exists()
        assert (tmp_path / f"out{case}.partial").exists() == (task_bytes < 50)  # kept when a task was finished


def test_a_stopped_run_goes_on_with_skip(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TASK_BYTES", 20)
    path, good, _ = bad_input(tmp_path)
    with pytest.raises(UserError, match="broken JSON"):
        run([str(path)], output=tmp_path / "out")
    (manifest,) = run([str(path)], output=tmp_path / "out", on_error="skip")
    assert manifest["documents"] == len(good)
    run([str(path)], output=tmp_path / "new", on_error="skip")
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


def test_only_so_many_places_are_kept_and_all_are_counted(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "TASK_BYTES", 64)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 100)
    run([str(path)], output=tmp_path / "out", on_error="skip")
    (row,) = ledger(tmp_path / "out")
    (entry,) = row["rejects"]
    assert (row["rejected"], entry["count"]) == (100, 100)
    assert entry["first"] == [{"line": line, "byte": 13 * (line - 1)} for line in range(1, 11)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_archive(tmp_path: Path, run: Any, suffix: str) -> None:
    rng = random.Random(6)
    lines = [json.dumps({"text": rng.randbytes(500).hex()}).encode() + b"\n" for _ in range(500)]
    content = (gzip.compress if suffix == ".jsonl.gz" else zstandard.compress)(b"".join(lines))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+:\d+ \(byte \d+\): truncated archive"):
        run([str(path)], output=tmp_path / "failed")
    (manifest,) = run([str(path)], output=tmp_path / "out", on_error="skip")
    kept = manifest["documents"]
    assert 100 < kept < 500
    (entry,) = ledger(tmp_path / "out")[1]["rejects"]
    place = {"line": kept + 1, "byte": sum(map(len, lines[:kept]))}
    assert entry == {"reason": "truncated archive", "count": 1, "first": [place]}


def test_no_loss_over_random_corpora(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good, bad and empty lines at random, cut into tasks at random: written + rejected = non-empty lines."""
    rng = random.Random(7)
    for case in range(12):
        lines = [
            rng.choice([b'{"text": "good"}', b'{"text": "good"}', b"", b"{", b'{"text": 1}', b"\xff", b'{"text": ""}'])
            for _ in range(60)
        ]
        path = tmp_path / f"{case}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n" * rng.randrange(3))
        monkeypatch.setattr(inputs, "TASK_BYTES", rng.randrange(1, 400))
        (manifest,) = run(
            [str(path)], output=tmp_path / f"out{case}", on_error="skip", shard_tokens=rng.randrange(1, 50)
        )
        rows = ledger(tmp_path / f"out{case}")
        assert manifest["documents"] == lines.count(b'{"text": "good"}')
        assert sum(row["rejected"] for row in rows) == sum(line not in (b"", b'{"text": "good"}') for line in lines)


def test_ids_of_a_set_fit_or_are_refused(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "bad"}])

    def encode(self: Any, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([5, 70_000], np.uint32), np.array([1, 1])

    monkeypatch.setattr(encoding.Gigatoken, "encode", encode)
    monkeypatch.setattr(tasks._Check, "__call__", lambda *arguments: None)
    with pytest.raises(UserError, match=r"a\.jsonl:2 \(byte 17\): the tokenizer gives id 70000"):
        run([str(path)], output=tmp_path / "out")


def test_special_id_out_of_text_is_refused(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "bad"}])
    for special in (0, 1):
        ids = np.array([5, special], np.uint32)
        monkeypatch.setattr(encoding.Gigatoken, "encode", lambda self, texts, ids=ids: (ids, np.array([1, 1])))
        with pytest.raises(UserError, match=rf"a\.jsonl:2 \(byte 17\): the tokenizer gives id {special}"):
            run([str(path)], output=tmp_path / f"out{special}")


def test_large_vocabulary_is_int32(tmp_path: Path, run: Any, tokenizer_file: Path, reference: Any) -> None:
    content = json.loads(tokenizer_file.read_bytes())
    content["model"]["vocab"] |= {f"unused{number}": number for number in range(1000, 70_001)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the data"}])
    (manifest,) = run([str(path)], tokenizer=str(tmp_path), output=tmp_path / "out")
    assert (manifest["dtype"], manifest["tokenizer"]["vocab_size"]) == ("int32", 70_001)
    assert documents(tmp_path / "out") == [reference("the data")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_difference_from_the_reference_stops_the_run(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"the data {number}"} for number in range(40)])
    original = {"gigatoken": encoding.Gigatoken, "tokenizers": encoding.Reference}[backend].encode

    def encode(self: Any, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = original(self, texts)
        ids = ids.copy()
        if len(texts) == 40:
            ids[counts[:17].sum()] ^= 3  # the first token of document 17
        return ids, counts

    monkeypatch.setattr({"gigatoken": encoding.Gigatoken, "tokenizers": encoding.Reference}[backend], "encode", encode)
    if backend == "gigatoken":
        with pytest.raises(UserError, match=r"a\.jsonl:18 \(byte \d+\): gigatoken and the reference"):
            run([str(path)], output=tmp_path / "out", backend=backend)
    else:
        run([str(path)], output=tmp_path / "out", backend=backend)


def test_sample_for_the_reference_grows_with_the_corpus(tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    """The first 32 documents, and more as long as the sample is at most a two-thousandth of the text."""
    checked: list[bytes] = []
    original = encoding.Reference.encode
    monkeypatch.setattr(
        encoding.Reference, "encode", lambda self, texts: checked.extend(texts) or original(self, texts)
    )
    for count in (1000, 100_000):
        checked.clear()
        path = write_jsonl(tmp_path / f"{count}.jsonl", [{"text": f"document {number}"} for number in range(count)])
        run([str(path)], output=tmp_path / f"out{count}")
        assert checked[:32] == [f"document {number}".encode() for number in range(32)]
        size = sum(len(f"document {number}") for number in range(count))
        assert len(checked) == 32 or (32 < len(checked) and sum(map(len, checked)) <= size / 2000)
    assert len(checked) > 32


def test_text_bytes_of_ids_add_up(tokenizer_file: Path, reference: Any) -> None:
    raw = tokenizer_file.read_bytes()
    vocabulary = encoding.read_vocabulary(raw, None, "tokenizer.json")
    sizes = encoding.token_bytes(raw, vocabulary)
    assert sizes.dtype == np.uint16 and sizes.shape == (vocabulary.size,) and sizes[0] == sizes[1] == 0
    rng = random.Random(8)
    characters = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(300):
        text = make_text(rng, 20) + "".join(rng.choices(characters, k=9))
        normal = normalizers.NFC().normalize_str(text)
        assert int(sizes[reference(text)].sum()) == len(normal.encode())


def test_token_bytes_agree_with_gigatoken(tokenizer_file: Path) -> None:
    import gigatoken

    raw = tokenizer_file.read_bytes()
    vocabulary = encoding.read_vocabulary(raw, None, "tokenizer.json")
    vocab = gigatoken.Tokenizer.from_json(raw).vocab
    wanted = [0 if index < 2 else len(vocab[index]) for index in range(vocabulary.size)]
    assert encoding.token_bytes(raw, vocabulary).tolist() == wanted


GROWING = """
import json, sys
import numpy as np
from fastcpt.data_prep import encoding

content = json.load(open(sys.argv[1]))
unbounded = encoding.Gigatoken(content)
encoding.CACHE_BYTES = 8 << 20
bounded, loads = encoding.Gigatoken(content), []
load = bounded._load
bounded._load = lambda: loads.append(1) or load()
rng = np.random.default_rng(0)
for _ in range(6):
    letters = rng.integers(97, 123, 1 << 20, dtype=np.uint8)
    letters[rng.random(1 << 20) < 0.1] = 32
    documents = [letters.tobytes()]
    assert np.array_equal(bounded.encode(documents)[0], unbounded.encode(documents)[0])
print(len(loads))
"""


def test_memory_of_gigatoken_is_bounded(tokenizer_file: Path) -> None:
    """Random words, each of which it would keep for ever; the ids do not change when it is loaded anew. In a process of
    its own: where there is memory to use again, none is seen to grow."""
    command = [sys.executable, "-c", GROWING, str(tokenizer_file)]
    loads = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 1 <= loads < 6


def change(tokenizer_file: Path, **changes: Any) -> bytes:
    return json.dumps(json.loads(tokenizer_file.read_bytes()) | changes).encode()


def test_end_of_document_token(tmp_path: Path, run: Any, tokenizer_file: Path) -> None:
    raw = tokenizer_file.read_bytes()
    assert encoding.read_vocabulary(raw, None, "t").eod_token == "<|endoftext|>"
    assert encoding.read_vocabulary(raw, "<|padding|>", "t").eod == 1
    with pytest.raises(UserError, match=r"t: no token '</s>'; .*--eod.*<\|endoftext\|>, <\|padding\|>"):
        encoding.read_vocabulary(raw, "</s>", "t")
    with pytest.raises(UserError, match=r"t: no end-of-document token.*--eod.*<\|stop\|>, <\|padding\|>"):
        encoding.read_vocabulary(raw.replace(b"<|endoftext|>", b"<|stop|>"), None, "t")
    content = json.loads(raw)
    content["added_tokens"][0]["special"] = False  # it is the end of a document all the same, and no text may become it
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a<|endoftext|>b"}])
    for backend in BACKENDS:
        run([str(path)], tokenizer=str(tmp_path), output=tmp_path / backend, backend=backend)
        assert documents(tmp_path / backend)[0].count(0) == 1


def test_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path, run: Any, tokenizer_file: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]))
    bad = tmp_path / "bad.json"
    options = {"tokenizer": str(bad), "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"bad\.json: no such file"):
        run([path], **options)
    for content in (b"{", b"[]", b"{}", b'{"model": {"vocab": 5}}', b"\xff"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json: not a tokenizer\.json"):
            run([path], **options)
    bad.write_bytes(change(tokenizer_file, pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(UserError, match=r"not byte-level BPE.*--tokenizer-backend tokenizers"):
        run([path], **options)
    (manifest,) = run([path], **options, backend="tokenizers")
    assert manifest["documents"] == 1
    model = json.loads(tokenizer_file.read_bytes())["model"] | {"dropout": 0.1}
    bad.write_bytes(change(tokenizer_file, model=model))
    with pytest.raises(UserError, match=r"bad\.json: .*dropout 0\.1"):
        run([path], tokenizer=str(bad), output=tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


def test_byte_that_the_vocabulary_lacks_is_a_reject(tmp_path: Path, run: Any, tokenizer_file: Path) -> None:
    """gigatoken does not load such a vocabulary, and `tokenizers` would drop the byte in silence."""
    content = json.loads(tokenizer_file.read_bytes())
    content["model"]["merges"], vocab = [], content["model"]["vocab"]
    content["model"]["vocab"] = {token: index for token, index in vocab.items() if len(token) == 1 and token != "Ã"}
    content["model"]["vocab"] |= {token: index for index, token in enumerate(SPECIAL)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "é"}, {"text": "e\u0301"}, {"text": "日"}])
    options = {"tokenizer": str(tmp_path), "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"gigatoken cannot load it .*0xc3.*--tokenizer-backend tokenizers"):
        run([str(path)], **options)
    with pytest.raises(UserError, match=r"a\.jsonl:2 \(byte 17\): no id: the tokenizer has none for byte 0xc3"):
        run([str(path)], **options, backend="tokenizers")
    (manifest,) = run([str(path)], **options, backend="tokenizers", on_error="skip")
    assert manifest["documents"] == 2


def test_set_that_exists_is_refused(tmp_path: Path, run: Any) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]))
    run([path], output=tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"out: exists already"):
        run([path], output=tmp_path / "out")
    (tmp_path / "new-val" / "something").mkdir(parents=True)
    with pytest.raises(UserError, match=r"new-val: exists already"):
        run([path], output=tmp_path / "new", val_fraction=0.5)
    assert tree(tmp_path / "out") == before and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"val_fraction": -0.1}, "--val-fraction -0.1"),
        ({"output": "/"}, "--output /"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, run: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run([str(tmp_path)], **{"output": tmp_path / "out"} | options)


STEPS = [
    *[(tasks, "write_record", call) for call in (1, 2, 5)],
    (tasks.Parts, "write", 3),
    (store.os, "replace", 9),
    (pairs, "write_stretch", 2),
    (pairs, "end_pair", 1),
    (pairs, "end_pair", 3),
    (merge, "finish_set", 1),
    (merge, "write_manifest", 2),
    (merge, "mark_merged", 1),
    (merge.os, "rename", 1),
    (merge.os, "rename", 2),
    (store.shutil, "rmtree", 1),
    (store.shutil, "rmtree", 2),
]


@pytest.mark.parametrize(("module", "name", "call"), STEPS, ids=[f"{name}{call}" for _, name, call in STEPS])
def test_restart_after_an_interruption(
    tmp_path: Path, run: Any, monkeypatch: Any, interrupt: Any, module: Any, name: str, call: int
) -> None:
    """Wherever a run stops, the same command finishes it with the bytes of a run that was never stopped, and nothing
    half-made is ever under the set's name."""
    corpus(tmp_path / "in")
    monkeypatch.setattr(inputs, "TASK_BYTES", 1500)
    options = {"val_fraction": 0.3, "shard_tokens": 600}
    run([str(tmp_path / "in")], output=tmp_path / "whole", **options)
    stopped = interrupt(module, name, call)
    with pytest.raises(stopped):
        run([str(tmp_path / "in")], output=tmp_path / "out", **options)
    for path in (tmp_path / "out", tmp_path / "out-val"):
        if path.exists():
            ShardSet(path).verify()
    run([str(tmp_path / "in")], output=tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_restart_never_overwrites_a_set_that_came_between(tmp_path: Path, run: Any, interrupt: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    stopped = interrupt(merge.os, "rename", 1)
    with pytest.raises(stopped):
        run([str(path)], output=tmp_path / "out")
    (tmp_path / "out" / "something").mkdir(parents=True)
    with pytest.raises(UserError, match="out: exists already"):
        run([str(path)], output=tmp_path / "out")
    (tmp_path / "out" / "something").rmdir()  # an empty folder is no set
    run([str(path)], output=tmp_path / "out")
    ShardSet(tmp_path / "out").verify()


def test_restart_does_not_repeat_finished_tasks(tmp_path: Path, run: Any, monkeypatch: Any, interrupt: Any) -> None:
    corpus(tmp_path / "in")
    monkeypatch.setattr(inputs, "TASK_BYTES", 1500)
    total = len(inputs.make_tasks(inputs.find_inputs([str(tmp_path / "in")])))
    stopped = interrupt(tasks, "write_record", 4)
    with pytest.raises(stopped):
        run([str(tmp_path / "in")], output=tmp_path / "out")
    (tmp_path / "out.partial" / "tasks" / "000001-.tokens").write_bytes(b"cut")  # a record whose parts are not whole
    done: list[int] = []
    original = tasks._documents
    monkeypatch.setattr(tasks, "_documents", lambda task, *rest: done.append(task.index) or original(task, *rest))
    skipped: list[int] = []
    monkeypatch.setattr(pretokenize.Meter, "skip", lambda meter, size: skipped.append(size))
    run([str(tmp_path / "in")], output=tmp_path / "out")
    assert total > 5 and done == [1, *range(3, total)]
    assert len(skipped) == 2  # what was there is no work of this run, and does not count in its speed


@pytest.mark.parametrize(
    ("module", "name", "call", "damage"),
    [
        (pairs, "note_moved", 3, False),
        (pairs, "note_moved", 6, True),
        (pairs, "write_stretch", 4, False),
        (pairs, "write_stretch", 7, True),
        (pairs, "end_pair", 1, True),
        (pairs, "end_pair", 2, False),
        (merge, "finish_set", 1, False),
    ],
    ids=str,
)
def test_parts_make_room_when_their_tokens_are_in_pairs(
    tmp_path: Path, run: Any, monkeypatch: Any, interrupt: Any, module: Any, name: str, call: int, damage: bool
) -> None:
    """A restart finds them there; a task whose tokens are not, after a loss of power, is done again."""
    rng = random.Random(4)
    write_jsonl(tmp_path / "in.jsonl", [{"text": make_text(rng, rng.randrange(3000))} for _ in range(150)])
    monkeypatch.setattr(inputs, "TASK_BYTES", 60_000)
    monkeypatch.setattr(pairs, "STRETCH_TOKENS", 32 << 10)
    options = {"val_fraction": 0.3, "shard_tokens": 90_000}
    run([str(tmp_path / "in.jsonl")], output=tmp_path / "whole", **options)
    with pytest.raises(interrupt(module, name, call)):
        run([str(tmp_path / "in.jsonl")], output=tmp_path / "out", **options)
    work = tmp_path / "out.partial"
    moved = {path.name.removesuffix(".moved"): json.loads(path.read_text()) for path in work.glob("tasks/*.moved")}
    left = {path.name for path in work.glob("tasks/*.tokens")}
    assert moved and not moved.keys() & left
    if name == "finish_set":
        assert not left
    again = set()
    if damage:
        file, start, size, victim = rng.choice(
            [
                (*place, name)
                for name, places in sorted(moved.items())
                for place in places
                if not (
                    work / "tasks" / f"pair-{place[0][-9:-4]}-{name.partition('-')[2].removesuffix('.tokens')}.json"
                ).exists()
            ]
        )
        with open(work / file, "r+b") as shard:
            shard.seek(start + rng.randrange(size))
            byte = shard.read(1)[0]
            shard.seek(-1, 1)
            shard.write(bytes([byte ^ 1]))
        again.add(int(victim[:6]))
    recorded = {int(path.stem) for path in work.glob("tasks/??????.json")}
    done: list[int] = []
    original = tasks._documents
    monkeypatch.setattr(tasks, "_documents", lambda task, *rest: done.append(task.index) or original(task, *rest))
    run([str(tmp_path / "in.jsonl")], output=tmp_path / "out", **options)
    assert set(done) & recorded == again
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_restart_with_something_changed_is_refused(tmp_path: Path, run: Any, interrupt: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    stopped = interrupt(tasks, "write_record", 1)
    with pytest.raises(stopped):
        run([str(path)], output=tmp_path / "out")
    for options, what in [
        ({"eod": "<|padding|>"}, "--eod"),
        ({"text_key": "body"}, "--text-key"),
        ({"val_fraction": 0.5}, "--val-fraction"),
        ({"backend": "tokenizers"}, "--tokenizer-backend"),
        ({"shard_tokens": 5}, "--shard-tokens"),
    ]:
        with pytest.raises(UserError, match=rf"out\.partial: holds an unfinished run that differs in {what}"):
            run([str(path)], output=tmp_path / "out", **options)
    path.write_text('{"text": "longer"}\n')
    with pytest.raises(UserError, match=r"inputs \(a\.jsonl: 14 bytes .* 19 bytes .*remove that folder"):
        run([str(path)], output=tmp_path / "out")


def test_two_runs_never_share_a_folder(tmp_path: Path, run: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pretokenize.owned(str(tmp_path / "out.partial")), pytest.raises(UserError, match="another run is writing"):
        run([str(path)], output=tmp_path / "out")
    run([str(path)], output=tmp_path / "out")


def test_killed_worker_is_reported_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"killed.*memory.*same command again"), engines.local(2) as engine:
        list(engine(signal.raise_signal, [signal.SIGKILL, signal.SIGKILL]))
    assert time.monotonic() - start < 30


def test_killed_server_of_workers_is_reported_and_another_started() -> None:
    with pytest.raises(UserError, match=r"killed.*same command again"), engines.local(2) as engine:
        (server,) = [
            pid for pid in descendants(os.getpid()) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(server, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (server, signal.SIGKILL)).start()
        list(engine(abs, [1, 2]))
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)  # its pipes close before it is seen to have ended
    with engines.local(2) as engine:
        assert sorted(engine(abs, [-1, -2])) == [1, 2]


def test_workers_have_the_environment_of_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in "12":
        monkeypatch.setenv("FASTCPT_TEST", value)
        with engines.local(2) as engine:
            assert list(engine(os.getenv, ["FASTCPT_TEST", "PYTHONSAFEPATH"])).count(value) == 1


def test_error_in_a_worker_stops_the_others_at_once() -> None:
    start = time.monotonic()
    with pytest.raises((TypeError, ValueError)), engines.local(2) as engine:
        list(engine(time.sleep, [600, -1]))
    assert time.monotonic() - start < 30


def descendants(pid: int) -> list[int]:
    """The processes that a process and its children have started."""
    own = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return own + [each for child in own for each in descendants(child)]


def test_kill_at_any_moment_and_run_again(tmp_path: Path, run: Any, tokenizer_file: Path) -> None:
    """SIGKILL to a worker or to the whole run; in the end the bytes are those of an undisturbed run."""
    rng = random.Random(9)
    for name in "abcdef":
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": make_text(rng, 200)} for _ in range(100)])
    code = (
        "import sys; from fastcpt.data_prep import inputs; from fastcpt.data_prep.pretokenize import prep\n"
        "inputs.TASK_BYTES = 10_000\n"
        f"prep([{str(tmp_path / 'in')!r}], tokenizer={str(tokenizer_file)!r}, output={str(tmp_path / 'out')!r},"
        " workers=2, backend='tokenizers', val_fraction=0.1, shard_tokens=20_000)"
    )
    tries = 0
    while not (tmp_path / "out").exists():
        tries += 1
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
        limit = time.monotonic() + 0.2 + 0.2 * tries
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        if process.poll() is None:
            workers = [  # and what they are forked from
                pid for pid in descendants(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            if tries % 2 and workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                _, errors = process.communicate(timeout=30)
                assert b"a worker process was killed" in errors or process.returncode == 0
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    if (tmp_path / "out.partial").exists():
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    run([str(tmp_path / "in")], output=tmp_path / "whole", val_fraction=0.1, shard_tokens=20_000)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert tries > 1


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    code = """
import time
from fastcpt.data_prep.engines import local
with local(2) as engine:
    list(engine(time.sleep, [600, 600]))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    workers: list[int] = []
    limit = time.monotonic() + 60
    while (
        len(workers) < 4 and time.monotonic() < limit
    ):  # two, what they are forked from, the tracker of their resources
        workers = descendants(process.pid)
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    assert workers and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_tokenizer_from_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options))
        if "missing" in arguments[0]:
            raise LocalEntryNotFoundError("offline\nand more")
        return str(tokenizer_file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert encoding.load_tokenizer("EleutherAI/pythia-14m@step143000") == tokenizer_file.read_bytes()
    assert encoding.load_tokenizer("gpt2") == tokenizer_file.read_bytes()
    assert asked == [
        ("EleutherAI/pythia-14m", "tokenizer.json", {"revision": "step143000"}),
        ("gpt2", "tokenizer.json", {"revision": None}),
    ]
    with pytest.raises(UserError, match=r"^some/missing: .*\(offline\); give the path"):
        encoding.load_tokenizer("some/missing")


def test_shards_among_the_inputs_are_not_read(tmp_path: Path, run: Any) -> None:
    write_jsonl(tmp_path / "data" / "a.jsonl", [{"text": "x"}])
    for name in ("one", "two"):
        (manifest,) = run([str(tmp_path / "data")], output=tmp_path / "data" / name)
        assert manifest["documents"] == 1


def test_full_disk_is_an_error_with_a_mend(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Parts, "write", full)
        with pytest.raises(UserError, match=r"out\.partial: the disk is full"):
            run([str(path)], output=tmp_path / "out")
    run([str(path)], output=tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_is_named(number: int) -> None:
    with (
        pytest.raises(UserError, match=r"in/a\.jsonl: .*make it accessible.*same command again"),
        store.disk_errors("w"),
    ):
        raise OSError(number, os.strerror(number), "in/a.jsonl")
    with pytest.raises(OSError), store.disk_errors("w"):
        raise OSError(errno.EBADF, "a bug")


def test_one_line_at_the_end_when_there_is_no_terminal(tmp_path: Path, run: Any, capfd: Any) -> None:
    path, *_ = bad_input(tmp_path)
    run([str(path)], output=tmp_path / "out", on_error="skip", quiet=False)
    out, errors = capfd.readouterr()
    assert out == "" and len(errors.splitlines()) == 1
    assert "2 documents" in errors and "tokens/s" in errors and "1 lone surrogate" in errors
    run([str(path)], output=tmp_path / "quiet", on_error="skip")
    assert capfd.readouterr() == ("", "")
