"""A model with more tokens: what transformers makes of it, what its new rows are, and what that is worth in bits per byte."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcpt import UserError, cli, demo, evaluation, hf, train
from fastcpt.data import evaluation_windows
from fastcpt.data_prep.pretokenize import prep
from fastcpt.extend import EMBEDDINGS, extend
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.shards import ShardSet
from fastcpt.weights import Weights

NEW, ROWS, USED, GROWN = 200, 640, 512, 768


class Trained(NamedTuple):
    """run: of a model of English, with 128 padding rows. exported: it as a Hugging Face model. code: new text."""

    folder: Path
    run: str
    exported: str
    code: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("extend")
    english, code = demo.texts(200_000)
    held_out, english = english[:5], english[5:]
    demo.write_jsonl(folder / "english.jsonl", english)
    demo.write_jsonl(folder / "code.jsonl", code)
    _small_tokenizer(english, folder / "tokenizer.json")
    demo.write_jsonl(folder / "held-out.jsonl", held_out)
    for name in ("english", "held-out", "code"):
        _prep(folder, name, "tokenizer.json", name)
    configuration = {
        "model": {"layers": 2, "width": 64, "heads": 4, "vocab_size": ROWS},
        "data": {"seq_len": 64, "train": [{"name": "english", "path": str(folder / "english"), "weight": 1}]},
        "train": {"tokens": 100 * 1024, "batch_tokens": 1024, "compile": False, "precision": "fp32"},
        "optim": {"lr": 5e-3},
        "run": {"output": str(folder / "run"), "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration))
    assert train.main(["--config", str(folder / "run.yaml")]) == 0
    assert cli.main(["export", str(folder / "run"), "--output", str(folder / "exported")]) == 0
    return Trained(folder, str(folder / "run"), str(folder / "exported"), str(folder / "code.jsonl"))


def _small_tokenizer(documents: list[str], path: Path) -> None:
    """Of few tokens, so that a short training has seen each of them often: R16 is about models that know their tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=USED, special_tokens=[demo.EOD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))


def _prep(folder: Path, text: str, tokenizer: str, output: str) -> None:
    prep(
        [str(folder / f"{text}.jsonl")],
        tokenizer=str(folder / tokenizer),
        output=folder / output,
        workers=1,
        quiet=True,
    )


@pytest.fixture(scope="module")
def extended(trained: Trained) -> Path:
    """By the command, from the checkpoint."""
    output = trained.folder / "extended"
    words = ["extend", trained.run, "--text", trained.code, "--add", str(NEW), "--output", str(output)]
    assert cli.main(words) == 0
    return output


def bits(source: str | Path, shards: Path) -> dict[str, Any]:
    return evaluation.evaluate_checkpoint(str(source), {"set": str(shards)}, 64, None, 32)["set"]


def test_transformers_and_we_compute_the_same(trained: Trained, extended: Path) -> None:
    ours, theirs = hf.load_pretrained(extended), AutoModelForCausalLM.from_pretrained(extended)
    tokenizer = AutoTokenizer.from_pretrained(extended)
    text = Path(trained.code).read_text()[:400]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert (ids >= USED).sum() > 5 and tokenizer.decode(ids[0]) == text
    assert ids[0].tolist() == Tokenizer.from_file(str(extended / "tokenizer.json")).encode(text).ids
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
    assert logits.shape[-1] == GROWN == theirs.config.vocab_size  # 712 ids, to a multiple of 128
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert ours.arch.old_rows == USED == json.loads((extended / "config.json").read_text())["fastcpt_old_rows"]


def test_old_ids_have_the_logits_of_the_old_model(trained: Trained, extended: Path) -> None:
    before, after = hf.load_pretrained(trained.exported), hf.load_pretrained(extended)
    ids = torch.randint(0, USED, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after(ids)[..., :USED], before(ids)[..., :USED], rtol=1e-5, atol=1e-5)


def test_new_rows(trained: Trained, extended: Path) -> None:
    """The mean of the rows of what the old tokenizer makes of a token; padding is the mean of padding."""
    before, after = Weights.open(trained.exported), Weights.open(str(extended))
    old = Tokenizer.from_file(str(trained.folder / "tokenizer.json"))
    new = Tokenizer.from_file(str(extended / "tokenizer.json"))
    for name in hf.shapes(after.arch):
        rows, made = before.tensor(name), after.tensor(name)
        if name not in EMBEDDINGS:
            assert torch.equal(rows, made)
            continue
        assert torch.equal(made[:USED], rows[:USED])
        for index in range(USED, USED + NEW):
            parts = [each.id for each in old.model.tokenize(new.id_to_token(index))]
            assert len(parts) > 1
            torch.testing.assert_close(made[index], torch.stack([rows[part] for part in parts]).mean(0))
        padding = rows[USED:].mean(0).expand(GROWN - USED - NEW, -1)
        torch.testing.assert_close(made[USED + NEW :], padding)


@pytest.mark.parametrize("init", ["mean", "noise"])
def test_other_new_rows(trained: Trained, tmp_path: Path, init: Any) -> None:
    before = Weights.open(trained.exported)
    found = []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / str(number)
        result = extend(trained.exported, str(output), [trained.code], 20, init=init, seed=seed)
        assert (result.tokens, result.rows) == (20, ROWS)  # in the place of padding
        found.append([Weights.open(str(output)).tensor(name) for name in EMBEDDINGS])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for name, rows, other in zip(EMBEDDINGS, found[0], found[2], strict=True):
        old = before.tensor(name)
        assert torch.equal(rows[:USED], old[:USED]) and torch.equal(rows[USED + 20 :], old[USED + 20 :])
        new = rows[USED : USED + 20]
        if init == "mean":
            torch.testing.assert_close(new, old[:USED].mean(0).expand(20, -1))
        else:
            assert not torch.equal(new, other[USED : USED + 20])
            assert float(new.std()) == pytest.approx(float(old[:USED].std()), rel=0.1)  # of 1,280 numbers


def test_a_tokenizer_that_was_extended_elsewhere(trained: Trained, extended: Path, tmp_path: Path) -> None:
    extend(trained.exported, str(tmp_path / "out"), tokenizer=str(extended / "tokenizer.json"))
    ours, theirs = Weights.open(str(tmp_path / "out")), Weights.open(str(extended))
    assert ours.arch == theirs.arch
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in hf.shapes(ours.arch))
    content = json.loads((extended / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["def"], vocabulary["the"] = vocabulary.get("the", 7), vocabulary.get("def", 8)
    (tmp_path / "swapped.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="old ids must stay"):
        extend(trained.exported, str(tmp_path / "no"), tokenizer=str(tmp_path / "swapped.json"))
    with pytest.raises(UserError, match=r"no new token; new tokens must have the ids from 512 on"):
        extend(trained.exported, str(tmp_path / "no"), tokenizer=str(trained.folder / "tokenizer.json"))


def test_the_tokens_a_byte_that_it_prints(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extend", trained.exported, "--text", trained.code, "--add", "50", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    before, _, after = capsys.readouterr().out.split()[:3]
    documents = [json.loads(line)["text"] for line in Path(trained.code).read_text().splitlines()]
    size = sum(len(text.encode()) for text in documents)
    for file, printed in ((trained.folder / "tokenizer.json", before), (tmp_path / "out" / "tokenizer.json", after)):
        tokenizer = Tokenizer.from_file(str(file))
        assert float(printed) == pytest.approx(sum(len(tokenizer.encode(text)) for text in documents) / size, abs=5e-5)
    assert float(after) < float(before)


def test_sub_tokens_start_below_noise_in_bits_per_byte(trained: Trained, extended: Path, tmp_path: Path) -> None:
    """R16, on code that uses the new tokens; paired, over three seeds of the noise. A model that has seen few
    of its tokens (20,000 of text, 4,096 in its vocabulary) had noise ahead by 0.02. Per token the losses are of other units:
    the same text is fewer tokens."""
    _prep(trained.folder, "code", "extended/tokenizer.json", "code-extended")
    shards = trained.folder / "code-extended"
    ours = bits(extended, shards)
    for seed in range(3):
        extend(trained.run, str(tmp_path / str(seed)), [trained.code], NEW, init="noise", seed=seed)
        noise = bits(tmp_path / str(seed), shards)
        assert ours["tokens"] == noise["tokens"]
        assert ours["bits_per_byte"] < noise["bits_per_byte"] - 0.05
    before, after = ShardSet(trained.folder / "code"), ShardSet(shards)
    assert after.manifest["text_bytes"] == before.manifest["text_bytes"] and len(after) < 0.95 * len(before)


def test_text_without_new_tokens_pays_for_new_rows_alone(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ids of the same model: its bits per byte change by the share of the probability that new rows take."""
    (tmp_path / "new.txt").write_text("再见世界 " * 40)
    extend(trained.exported, str(tmp_path / "out"), [str(tmp_path / "new.txt")], 8)
    _prep(trained.folder, "held-out", str(tmp_path / "out" / "tokenizer.json"), "held-out-extended")
    monkeypatch.setattr("fastcpt.parallel.has_bf16", lambda device: False)  # transformers computes in fp32 here
    shards = ShardSet(trained.folder / "held-out")
    before = bits(trained.exported, shards.path)
    after = bits(tmp_path / "out", trained.folder / "held-out-extended")
    assert after["tokens"] == before["tokens"]
    windows = shards.windows(evaluation_windows(shards, 64, len(shards)), 64).astype(np.int64)
    both = [AutoModelForCausalLM.from_pretrained(model) for model in (trained.exported, tmp_path / "out")]
    with torch.no_grad():
        rises = [
            both[1](ids).logits.logsumexp(-1) - both[0](ids).logits.logsumexp(-1)
            for ids in torch.from_numpy(windows[:, :-1]).split(64)
        ]
    rise = float(torch.cat(rises).double().mean())  # nats a token
    assert abs(rise) > 1e-6
    assert after["loss"] - before["loss"] == pytest.approx(rise, abs=1e-6)
    ratio = before["bits_per_byte"] / before["loss"]
    assert after["bits_per_byte"] - before["bits_per_byte"] == pytest.approx(rise * ratio, abs=1e-6)


def test_rows_of_a_model_that_is_no_multiple(byte_tokenizer: Path, tmp_path: Path) -> None:
    """257 rows, no padding, become 320; new padding is the mean of all."""
    model = GPTNeoX(Architecture(1, 16, 2, 257))
    model.initialise_(torch.Generator().manual_seed(0))
    hf.save_pretrained(model, tmp_path / "old", byte_tokenizer)
    (tmp_path / "new.txt").write_text("abc abd " * 9)
    made = extend(str(tmp_path / "old"), str(tmp_path / "new"), [str(tmp_path / "new.txt")], 3)
    assert (made.tokens, made.rows, made.before, made.size) == (3, 320, 72, 72) and made.after < 50
    rows = Weights.open(str(tmp_path / "new")).tensor("embed_out.weight")
    torch.testing.assert_close(rows[260:], model.embed_out.weight.detach().mean(0).expand(60, -1))


def test_too_little_text_is_refused(byte_tokenizer: Path, tmp_path: Path) -> None:
    model = GPTNeoX(Architecture(1, 16, 2, 257))
    model.initialise_()
    hf.save_pretrained(model, tmp_path / "old", byte_tokenizer)
    (tmp_path / "new.txt").write_text("abab")
    with pytest.raises(UserError, match="only 1 pairs that occur twice or more"):
        extend(str(tmp_path / "old"), str(tmp_path / "new"), [str(tmp_path / "new.txt")], 3)
    assert not (tmp_path / "new").exists()
