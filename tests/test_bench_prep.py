"""The bench of preparation, without a clock that matters: its corpus, its rivals' ids, its turns and its ratios."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import zstandard
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from fastcpt import UserError, cli
from fastcpt.benchmarks import bench_prep, prep_corpus
from fastcpt.benchmarks.bench_prep import BARE, OURS, Bench, Done, Notes, agree, measure, rows_of
from fastcpt.benchmarks.prep_corpus import FORMATS, Corpus, make_corpus

SCRIPT = Path(bench_prep.__file__).with_name("prep_rivals.py")
SPECIAL = "<|endoftext|>"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files of 0.3 to 200 KB, and some that are no text, too short, special, or there twice."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "deep").mkdir()
    for number in range(60):
        text = "".join(f"line {number} {at} naïve 日本 x = {at * number}\n" for at in range(9 + number * 2))
        (folder / "deep" / f"{number}.txt").write_text(text)
    (folder / "long.py").write_text("".join(f"value_{at} = {at}\n" for at in range(10_000)))
    (folder / "again.txt").write_bytes((folder / "deep" / "7.txt").read_bytes())
    (folder / "special.txt").write_text(f"a{SPECIAL}b\n" * 50)
    (folder / "short.txt").write_text("too short\n")
    (folder / "nul.bin").write_bytes(b"a\0b\n" * 100)
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """A small tokenizer of the form of GPT-NeoX's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(source / "long.py")], trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def records(corpus: Corpus) -> list[dict[str, Any]]:
    return [json.loads(line) for path in corpus.files("jsonl") for line in path.read_bytes().splitlines()]


def test_the_corpus_has_each_text_once_in_both_formats(source: Path, tmp_path: Path, capsys: Any) -> None:
    corpus = make_corpus(source, tmp_path / "a", 0.2, [SPECIAL], "some text")
    found = records(corpus)
    texts = [record["text"] for record in found]
    assert len(texts) == len(set(texts)) == corpus.documents
    assert sum(len(text.encode()) for text in texts) == corpus.bytes_of() >= 200_000
    assert all(prep_corpus.LEAST <= len(text.encode()) < prep_corpus.MOST + 100 for text in texts)
    assert not any(SPECIAL in text or "\0" in text for text in texts)
    assert {record["meta"]["source"] for record in found} >= {"long.py"}
    for plain, packed in zip(corpus.files("jsonl"), corpus.files("jsonl.zst"), strict=True):
        with zstandard.open(packed, "rb") as file:
            assert file.read() == plain.read_bytes()
    assert len(set(corpus.text_bytes)) > 3 and "some text: 0 MB in" in corpus.about
    again = make_corpus(source, tmp_path / "b", 0.2, [SPECIAL], "some text")
    assert records(again) == found and make_corpus(source, tmp_path / "b", 0.2, [SPECIAL], "some text") == again
    assert "less than" not in capsys.readouterr().out
    whole = make_corpus(source, tmp_path / "c", 1, [SPECIAL], "some text")
    assert {record["meta"]["source"] for record in records(whole)} >= {"long.py", "deep/59.txt"}
    assert whole.bytes_of() > corpus.bytes_of() and "less than the 1 MB asked for" in capsys.readouterr().out


def test_a_share_of_the_files(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, tuple(range(1, 25)), 1, "")
    assert corpus.bytes_of() == 300 and len(corpus.files("jsonl")) == 24
    assert [path.name for path in corpus.files("jsonl.zst", 0.25)] == [f"{at:02}.jsonl.zst" for at in range(0, 24, 4)]
    assert corpus.bytes_of(0.25) == 1 + 5 + 9 + 13 + 17 + 21
    assert corpus.chosen(0.001) == [0]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", bench_prep.TARGETS)
def test_rivals_give_the_ids_of_tokenizers(
    name: str, form: str, source: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    if (name, form) == ("megatron", "jsonl.zst"):
        pytest.skip("as .jsonl, and its import takes seconds")
    corpus = make_corpus(source, tmp_path / "corpus", 0.05, [SPECIAL], "")
    (tmp_path / "out").mkdir()
    options = {"tokenizer": tokenizer_file, "output": tmp_path / "out", "workers": 1, "eod": SPECIAL, "eod-id": 0}
    command = [sys.executable, "-P", SCRIPT, name, *corpus.files(form)]
    words = [*command, *(word for key, value in options.items() for word in (f"--{key}", value))]
    done = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, timeout=300)
    said = json.loads(done.stdout.splitlines()[-1])
    if "missing" in said:
        pytest.skip(f"{said['missing']} is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    expected = [[*tokenizer.encode(record["text"]).ids, 0] for record in records(corpus)]
    assert said["documents"] == len(expected) and all(said["versions"].values())
    if name not in bench_prep.INEXACT:
        assert said["tokens"] == sum(map(len, expected))
        ids = bench_prep.written(name, tmp_path / "out", np.dtype(np.uint16))
        assert (ids is None) == (name == BARE)
        if ids is not None:
            assert ids.tolist() == [index for row in expected for index in row]


def done(name: str, form: str = "jsonl", seconds: float = 1.0, megabytes: float = 10, tokens: int = 300) -> Done:
    return Done(name, form, int(megabytes * 1e6), 3, tokens, seconds, 2 * seconds, 50 + seconds, "some 1.0")


def test_ratios_are_of_medians_for_equal_text() -> None:
    runs = [done(OURS, seconds=each) for each in (1, 2, 9)] + [done(BARE, seconds=each) for each in (1.5, 1, 8)]
    runs += [done("tokenizers", seconds=10, megabytes=2.5), done("datatrove", seconds=1.9), done(OURS, "jsonl.zst", 4)]
    rows = {(row.implementation, row.form): row for row in rows_of(runs)}
    ours, bare = rows[OURS, "jsonl"], rows[BARE, "jsonl"]
    assert (ours.seconds, ours.mb_per_s, ours.ratio_to_ours, ours.runs, ours.met) == (2, 5, 1, 3, "")
    assert (ours.cpu_seconds, ours.peak_mb, ours.tokens_per_s) == (4, 59, 150)
    assert (bare.ratio_to_ours, bare.met) == (0.75, "yes")  # ours takes 1.33 times as long, below 1.5
    assert rows_of([done(OURS), done(BARE, seconds=0.66)])[1].met == "no"
    assert (rows["tokenizers", "jsonl"].ratio_to_ours, rows["tokenizers", "jsonl"].met) == (20, "yes")
    assert (rows["datatrove", "jsonl"].ratio_to_ours, rows["datatrove", "jsonl"].met) == (0.95, "no")
    assert rows[OURS, "jsonl.zst"].ratio_to_ours == 1
    assert "1.33" not in bench_prep.table(list(rows.values())) and "20.00x" in bench_prep.table(list(rows.values()))


def test_wrong_results_are_refused() -> None:
    ours, ids = done(OURS), np.arange(300)
    agree("tokenizers", done("tokenizers"), ids, ours, ids)
    agree("nanogpt", done("nanogpt", tokens=290), ids[:290], ours, ids)
    with pytest.raises(AssertionError, match="tokenizers: other ids than ours"):
        agree("tokenizers", done("tokenizers"), ids[::-1], ours, ids)
    with pytest.raises(AssertionError, match="bare: 299 tokens, and ours 300"):
        agree(BARE, done(BARE, tokens=299), None, ours)
    with pytest.raises(AssertionError, match="nanogpt: 4 documents, and ours 3"):
        agree("nanogpt", replace(done("nanogpt"), documents=4), None, ours)


def test_runs_alternate_and_a_stopped_bench_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "00.jsonl").touch()
    corpus = Corpus(tmp_path, (10_000_000,), 3, "")
    called: list[str] = []

    def run(bench: Any, name: str, form: str, files: Any, text_bytes: int) -> tuple[Done, Path]:
        if len(called) == 3:
            called.append("stop")
            raise KeyboardInterrupt
        called.append(name)
        return done(name, form), tmp_path

    monkeypatch.setattr(bench_prep, "FORMATS", ("jsonl",))
    monkeypatch.setattr(bench_prep, "run", run)
    bench: Any = None
    with pytest.raises(KeyboardInterrupt):
        measure(bench, corpus, [BARE, "tokenizers"], Notes(tmp_path / "runs", "key"), 1.0)
    notes = Notes(tmp_path / "runs", "key")
    measure(bench, corpus, [BARE, "tokenizers"], notes, 1.0)
    assert called == [OURS, BARE, OURS, "stop", BARE, OURS, BARE, "tokenizers"]
    assert len(Notes(tmp_path / "runs", "key").done) == len(notes.done) == 7
    assert not Notes(tmp_path / "runs", "another").done


def test_from_end_to_end(
    source: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench_prep, "REPEATS", 1)
    monkeypatch.setattr(bench_prep, "TARGETS", {"tokenizers": 0.0, "datatrove": 0.0})
    words = ["bench", "prep", "--tokenizer", str(tokenizer_file), "--text", str(source), "--megabytes", "0.05"]
    words += ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--about-text", "lines"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "out" / "prep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows if row["implementation"] == OURS] == list(FORMATS)
    for name in ("tokenizers", "datatrove"):
        there = [row for row in rows if row["implementation"] == name]
        assert f"{name} is left out" in printed or [row["met"] for row in there] == ["yes", "yes"]
    assert all(row["text"].startswith("lines: ") and row["device"] and row["date"] for row in rows)
    assert all(float(row["peak_mb"]) > 20 and float(row["cpu_seconds"]) > 0 for row in rows)
    assert not (tmp_path / "work" / "runs.jsonl").exists() and (tmp_path / "work" / "corpus").exists()


def test_a_rival_with_wrong_ids_stops_the_bench(
    source: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("orjson")
    command = Bench.command

    def wrong(self: Bench, name: str, files: Any, output: Path) -> list[str]:
        return [word if word != "0" or name == OURS else "5" for word in command(self, name, files, output)]

    monkeypatch.setattr(Bench, "command", wrong)
    arguments: Any = {"work": tmp_path / "work", "megabytes": 0.05, "rivals": ["tokenizers"]}
    with pytest.raises(AssertionError, match="tokenizers: other ids than ours; it is not timed"):
        bench_prep.main(str(tokenizer_file), source, **arguments)


def test_mistakes_are_said(tokenizer_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["bench", "prep"]) == 2 and "--tokenizer FILE" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--text .*nowhere: no such folder"):
        bench_prep.main(str(tokenizer_file), tmp_path / "nowhere")
    with pytest.raises(UserError, match="--share 0: must be above 0"):
        bench_prep.main(str(tokenizer_file), tmp_path, share=0)
