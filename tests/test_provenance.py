"""From a step back to its documents: against the batches that real runs were given, and against documents looked up
in the inputs by their text."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from fastcpt import UserError, checkpoint, provenance, train
from fastcpt.config import Config, Count, Source
from fastcpt.data_prep import inputs
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import ShardSet

SEQ_LEN, BATCH = 16, 6


class Runs:
    """Real runs of a tiny model on two sources, and the windows that each of their steps was given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Any) -> None:
        self.folder, self._tiny_config = folder, tiny_config
        self.batches: dict[tuple[str, int], np.ndarray] = {}
        self.stop_before: int | None = None
        real = train.train_step

        def recording(state: train.State, batch: np.ndarray) -> dict[str, torch.Tensor]:
            if state.step + 1 == self.stop_before:
                raise KeyboardInterrupt
            self.batches[Path(state.config.run.output).name, state.step + 1] = batch
            return real(state, batch)

        monkeypatch.setattr(train, "train_step", recording)
        monkeypatch.setattr(
            "fastcpt.metrics.measured_matmul_rate", lambda *arguments, **options: 1e12
        )  # takes its time

    def config(self, name: str, steps: int, batch: int = BATCH, weights: tuple[float, float] = (0.7, 0.3), **sections: Any) -> Config:  # fmt: skip
        sources = [
            Source(name=source, path=str(self.folder / source), weight=weight)
            for source, weight in zip(("new", "old"), weights)
        ]
        size = batch * SEQ_LEN
        return self._tiny_config(
            self.folder / name,
            data={"train": sources, "seq_len": SEQ_LEN},
            train={"tokens": Count(steps * size), "batch_tokens": Count(size), "compile": False, "precision": "fp32"},
            schedule={"warmup": 0.0},
            **{
                "run": {"output": str(self.folder / name), "save_every": 2, "keep": 9, "tensorboard": False},
                **sections,
            },
        )

    def branch(self, name: str, parent: str, steps: int, **options: Any) -> Config:
        init = {"from_": str(self.folder / parent), "branch": True}
        return self.config(name, steps, init=init, optim={"lr": None}, **options)


@pytest.fixture
def documents(tmp_path: Path, write_shards: Any, random_documents: Any) -> dict[str, list[list[int]]]:
    """{source: its documents, end-of-document token included}, in three pairs each."""
    content = {}
    for seed, name in enumerate(("old", "new")):
        drawn = random_documents(seed, 30)
        write_shards(tmp_path / name, drawn, pairs=3)
        content[name] = [[*document, 0] for document in drawn]
    return content


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Any, documents: Any) -> Runs:
    return Runs(tmp_path, monkeypatch, tiny_config)


def check_step(runs: Runs, documents: dict[str, list[list[int]]], name: str, step: int) -> None:
    """The tokens of the documents that are named, one after another, are those that the step was given."""
    found = provenance.locate(runs.folder / name, step)
    batch = runs.batches[name, step]
    assert len(found.samples) == len(batch)
    for sample, row in zip(found.samples, batch):
        tokens: list[int] = []
        shards = ShardSet(runs.folder / sample.source)
        for part in sample.parts:
            document = documents[sample.source][part.number]
            assert len(document) == part.length and 0 <= part.start < part.stop <= part.length
            pair = [entry["name"] for entry in shards.pairs].index(part.pair)
            assert shards.document(pair, part.document).tolist() == document
            tokens += document[part.start : part.stop]
        assert tokens == row.tolist()


def test_a_steps_documents_are_those_that_it_was_given(runs: Runs, documents: Any) -> None:
    """Run, killed and resumed; then a branch with another mixture and batch, and a branch of that with its mixture.
    A source comes round a second time, in another order."""
    config = runs.config("run", 9)
    runs.stop_before = 6
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    runs.stop_before = None
    check_step(runs, documents, "run", 5)  # after the newest checkpoint, of step 4
    train.train(config)
    train.train(runs.branch("branch", "run", 4, batch=4, weights=(0.25, 0.75)))
    train.train(runs.branch("again", "branch", 3, batch=5, weights=(0.25, 0.75)))
    mixture = provenance.locate(runs.folder / "again", 16).mixture
    seen = mixture.seen(9 * BATCH + 4 * 4 + 3 * 5)
    assert any(seen[shards.fingerprint] > shards.num_windows(SEQ_LEN) for shards in mixture.sets.values())
    for name, steps in (("run", range(1, 10)), ("branch", range(10, 14)), ("again", range(14, 17))):
        for step in steps:
            check_step(runs, documents, name, step)
    samples = [
        sample.number
        for name, step in sorted(runs.batches, key=lambda key: key[1])
        for sample in provenance.locate(runs.folder / name, step).samples
    ]
    assert samples == list(range(9 * BATCH + 4 * 4 + 3 * 5)), "every sample belongs to one step"


def test_a_checkpoint_serves_like_its_run(runs: Runs) -> None:
    train.train(runs.config("run", 4))
    whole = provenance.locate(runs.folder / "run", 3)
    for saved in (2, 4):
        step = provenance.locate(runs.folder / "run" / "checkpoints" / f"step-{saved}", 3)
        assert (step.samples, step.first, step.last, step.saved) == (whole.samples, 1, 4, saved)


@pytest.mark.parametrize("step", [-1, 0, 5])
def test_a_step_outside_of_the_run_is_refused(runs: Runs, step: int) -> None:
    train.train(runs.config("run", 4))
    with pytest.raises(UserError, match=rf"--step {step}: the steps of .*/run are 1 to 4$"):
        provenance.locate(runs.folder / "run", step)


def test_a_branch_names_the_run_that_took_the_earlier_steps(runs: Runs) -> None:
    train.train(runs.config("run", 3))
    train.train(runs.branch("branch", "run", 2))
    with pytest.raises(UserError, match=r"are 4 to 5; it branched off at step 3, ask the run it came from: .*/run$"):
        provenance.locate(runs.folder / "branch", 3)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run with a checkpoint nor a checkpoint"):
        provenance.locate(tmp_path, 1)


def test_a_set_that_moved_is_named_and_found_again(runs: Runs, documents: Any) -> None:
    train.train(runs.config("run", 2))
    (runs.folder / "old").rename(runs.folder / "elsewhere")
    with pytest.raises(
        UserError, match=r"/old: the run .*/run read its source 'old' there, and there is no such folder"
    ):
        provenance.locate(runs.folder / "run", 1)
    moved = runs.config("run", 2)
    sources = [moved.data.train[0], replace(moved.data.train[1], path=str(runs.folder / "elsewhere"))]
    train.train(replace(moved, data=replace(moved.data, train=sources)))  # resumed, already complete
    assert str(runs.folder / "elsewhere") in provenance.trace(runs.folder / "run", 1)


def test_a_set_that_is_another_is_named(runs: Runs, write_shards: Any, random_documents: Any) -> None:
    train.train(runs.config("run", 2))
    (runs.folder / "old").rename(runs.folder / "away")
    write_shards(runs.folder / "old", random_documents(9, 30))
    with pytest.raises(UserError, match=r"/old: not what the run .*/run read as 'old': fingerprint"):
        provenance.locate(runs.folder / "run", 1)


def test_a_damaged_state_is_never_read(runs: Runs) -> None:
    train.train(runs.config("run", 4))
    expected = provenance.locate(runs.folder / "run", 3).samples

    def damage(step: int) -> None:
        path = runs.folder / "run" / "checkpoints" / f"step-{step}" / "state.json"
        path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))

    damage(4)
    step = provenance.locate(runs.folder / "run", 3)
    assert (step.saved, step.samples) == (2, expected)
    damage(2)
    with pytest.raises(UserError, match=r"step-2/state\.json: bytes 0 to"):
        provenance.locate(runs.folder / "run", 3)


def test_an_index_that_ends_early_is_damage(runs: Runs) -> None:
    train.train(runs.config("run", 2))
    for path in runs.folder.glob("*/shard-*.idx"):
        data = bytearray(path.read_bytes())
        count = int.from_bytes(data[18:26], "little")
        start = provenance.HEADER_BYTES + 4 * count
        data[start : start + 8 * count] = np.full(count, 1 << 40, "<i8").tobytes()
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-0000\d\.idx: no document holds token"):
        provenance.locate(runs.folder / "run", 1)


def test_a_checkpoints_format_is_that_of_checkpoints() -> None:
    assert checkpoint.FORMAT == provenance.CHECKPOINT_FORMAT
    assert checkpoint.BLOCK_BYTES == provenance.CHECKPOINT_BLOCK_BYTES
    assert (checkpoint.MANIFEST, checkpoint.STATE) == ("manifest.json", "state.json")


def test_the_text_says_it_all_and_needs_no_torch(runs: Runs, documents: Any) -> None:
    train.train(runs.config("run", 3))
    script = (
        "import sys\nfor name in ('torch', 'pyarrow', 'rich'): sys.modules[name] = None\n"
        "from fastcpt.provenance import trace\nprint(trace(sys.argv[1], 3, 2))\n"
    )
    command = [sys.executable, "-c", script, str(runs.folder / "run")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert text == provenance.trace(str(runs.folder / "run"), 3, text=2) + "\n"
    assert "step         3 of 1 to 3\n" in text and f"samples      {2 * BATCH} to {3 * BATCH - 1}, each 16 + 1" in text
    samples = provenance.locate(runs.folder / "run", 3).samples
    decoder = tokenizers.Tokenizer.from_file(str(runs.folder / "new" / "tokenizer.json"))
    for row, sample in enumerate(samples):
        assert f"sample {sample.number}  {sample.source}, window {sample.window}: tokens" in text
        for part in sample.parts:
            assert f"document {part.number} ({part.pair}: {part.document}), " in text
        decoded = decoder.decode(runs.batches["run", 3][row].tolist(), skip_special_tokens=False)
        assert (decoded in text) == (row < 2)


TOKENIZER = {"tokenizer": "", "workers": 1, "quiet": True, "on_error": "skip"}


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, dict[str, list[str | None]]]:
    """(folder of inputs of all kinds, {input: the text of each line, None for one that is no document})."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(["<|endoftext|>", *alphabet])}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content: dict[str, list[str | None]] = {
        "a.jsonl": ["a0", None, "a1 longer", None, "a2", "a3", "a4"],
        "b.jsonl": [f"b{i}" + "x" * i for i in range(12)],
        "c.jsonl.gz": [f"c{i}" for i in range(5)],
        "d.parquet": [f"d{i}" for i in range(4)],
        "e.txt": ["e0, one document,\nof two lines"],
        "f.jsonl": [None, None],
        "g/h.jsonl": [f"h{i}" for i in range(3)],
    }

    def record(text: str | None) -> str:
        return "{" if text is None else json.dumps({"text": text, "kind": f"kind{len(text) % 2}"})

    (folder / "g").mkdir()
    for name, texts in content.items():
        lines = "".join(record(text) + "\n" for text in texts)
        if name == "a.jsonl":
            lines = lines.replace("{\n", "\n", 1)  # its first bad line is an empty one
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(lines.encode()))
        elif name.endswith(".parquet"):
            rows = [json.loads(record(text)) for text in texts]
            pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=2)
        else:
            (folder / name).write_text(str(texts[0]) if name.endswith(".txt") else lines)
    return folder, content


def check_places(directory: Path, content: dict[str, list[str | None]]) -> int:
    """Every document of a set is where the ledger leads: looked up by its text, which no other has. Returns how many
    have a line."""
    shards = ShardSet(directory)
    decoder = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    where = {text: (name, line) for name, texts in content.items() for line, text in enumerate(texts) if text}
    ledger = provenance._Ledger(shards)
    seen: dict[str, int] = dict.fromkeys(content, 0)
    numbers = ((pair, index) for pair, entry in enumerate(shards.pairs) for index in range(entry["documents"]))
    of_input: dict[str, list[provenance.Place]] = {name: [] for name in content}
    for number, (pair, index) in enumerate(numbers):
        name, line = where[decoder.decode(shards.document(pair, index).tolist()[:-1])]
        place = ledger.find(number)
        assert place is not None and (place.input, place.number) == (name, seen[name])
        assert place.line in (None, line + 1)
        seen[name] += 1
        of_input[name].append(place)
    for name, places in of_input.items():
        whole = len(places) == len(content[name])
        assert all((place.line is not None) == whole for place in places), "a line exactly where all lines are here"
    return sum(place.line is not None for places in of_input.values() for place in places)


@pytest.mark.parametrize("task_bytes", [64, 1 << 20])
@pytest.mark.parametrize(
    ("options", "sets", "with_line"),
    [
        ({}, [""], 25),  # all but those of a.jsonl, which had lines that are no documents
        ({"val_fraction": 0.3}, ["", "-val"], None),
        ({"group_key": "kind"}, ["-kind0", "-kind1"], None),
        ({"group_key": "kind", "val_fraction": 0.3}, ["-kind0", "-kind1", "-kind0-val", "-kind1-val"], None),
    ],
)
def test_documents_are_found_in_their_inputs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus: Any,
    task_bytes: int,
    options: Any,
    sets: Any,
    with_line: Any,
) -> None:
    """Several inputs with rejects and empty lines, cut into many tasks or one, into pairs of a few documents."""
    folder, content = corpus
    monkeypatch.setattr(inputs, "TASK_BYTES", task_bytes)
    if "group_key" in options:  # which a text file has not
        del content["e.txt"]
    arguments = {**TOKENIZER, "tokenizer": str(tmp_path)}
    prep([str(folder)], output=tmp_path / "set", shard_tokens=20, **arguments, **options)
    lines = [check_places(tmp_path / f"set{name}", content) for name in sets]
    assert with_line is None or lines == [with_line]


def test_sets_with_the_same_counts_are_told_apart_by_name_or_not_at_all(tmp_path: Path, corpus: Any) -> None:
    path = tmp_path / "twins.jsonl"
    content: dict[str, list[str | None]] = {path.name: ["left-1", "right1", "left-2", "right2"]}
    records = [{"text": text, "side": text[0]} for text in content[path.name] if text]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prep([str(path)], output=tmp_path / "set", group_key="side", **{**TOKENIZER, "tokenizer": str(tmp_path)})
    for name in ("l", "r"):
        check_places(tmp_path / f"set-{name}", content)
        (tmp_path / f"set-{name}").rename(tmp_path / f"other{name}")
        assert provenance._Ledger(ShardSet(tmp_path / f"other{name}")).find(0) is None


def test_a_ledger_that_was_changed_is_damage(tmp_path: Path, corpus: Any) -> None:
    prep([str(corpus[0] / "b.jsonl")], output=tmp_path / "set", **{**TOKENIZER, "tokenizer": str(tmp_path)})
    path = tmp_path / "set" / "ledger.parquet"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"ledger\.parquet: differs from its hash"):
        provenance._Ledger(ShardSet(tmp_path / "set"))


def test_descriptions_name_the_unit_of_the_input(corpus: Any) -> None:
    def described(name: str, line: int | None) -> str:
        place = provenance.Place(name, 6, line)
        return provenance._describe(provenance.Part("shard-00000", 1, 2, 0, 5, 5, place)).rpartition("; ")[2]

    assert described("a.jsonl.gz", 7) == "a.jsonl.gz, line 7"
    assert described("a.parquet", 7) == "a.parquet, row 7"
    assert described("a.txt", 1) == "a.txt"
    assert described("a.jsonl", None) == "a.jsonl, number 6 of its documents here"
