"""More tokens for a byte-level BPE: against a learner by brute force, and against `tokenizers`' own trainer."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fastcpt import UserError, demo
from fastcpt.data_prep import encoding, vocabulary
from fastcpt.data_prep.pretokenize import prep
from fastcpt.shards import ShardSet

EOD = "<|endoftext|>"
CHINESE = "中文的词表需要扩展。我们学习新的词语,而不改变旧的编号;中文词语更短。" * 3


def trained(documents: list[str], size: int, path: Path, added: list[str] = []) -> Path:  # noqa: B006
    """By `tokenizers`: Pythia's form, its added tokens after its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=size, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in added])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def english() -> list[str]:
    return demo.texts(150_000)[0]


def by_hand(tokenizer: Tokenizer, texts: list[str], count: int) -> tuple[list[tuple[str, str]], int]:
    """The definition: all pairs are counted anew for every merge."""
    pieces: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            pieces[tuple(token.value for token in tokenizer.model.tokenize(piece))] += 1
    ids = tokenizer.get_vocab()
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        counts: Counter[tuple[str, str]] = Counter()
        for piece, times in pieces.items():
            for pair in itertools.pairwise(piece):
                counts[pair] += times
        best = [pair for pair in counts if counts[pair] >= 2 and "".join(pair) not in ids]
        if not best:
            break
        pair = min(best, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        ids["".join(pair)] = max(ids.values()) + 1
        merges.append(pair)
        merged: Counter[tuple[str, ...]] = Counter()
        for piece, times in pieces.items():
            tokens, rest = [], list(piece)
            while rest:
                joined = tuple(rest[:2]) == pair
                tokens.append("".join(pair) if joined else rest[0])
                rest = rest[2 if joined else 1 :]
            merged[tuple(tokens)] += times
        pieces = merged
    return merges, sum(len(piece) * times for piece, times in pieces.items())


def spelled(tokenizer: vocabulary.Tokenizer, merges: list[tuple[int, int]]) -> list[tuple[str, str]]:
    names = {index: token for token, index in tokenizer.ids.items()}
    for index, (left, right) in enumerate(merges, tokenizer.used):
        names[index] = names[left] + names[right]
    return [(names[left], names[right]) for left, right in merges]


def table(tokenizer: vocabulary.Tokenizer, texts: list[str]) -> vocabulary.Table:
    return vocabulary.Table(Counter(tokenizer.words(texts)), sum(len(text.encode()) for text in texts))


@pytest.mark.parametrize("seed", range(6))
def test_it_learns_what_the_definition_says(seed: int, tmp_path: Path) -> None:
    """Few letters, so that runs, ties and pairs that spell an old token are common."""
    generator = random.Random(seed)
    texts = ["".join(generator.choice("aaab c  d.é中") for _ in range(generator.randrange(1, 200))) for _ in range(20)]
    path = trained(texts[: seed + 1], 262 + 4 * seed, tmp_path / "t.json")
    ours = vocabulary.Tokenizer(path.read_bytes(), "t")
    expected, tokens = by_hand(Tokenizer.from_file(str(path)), texts, 60)
    merges, left = vocabulary.learn(ours, table(ours, texts), 60)
    assert len(expected) >= 40 and spelled(ours, merges) == expected and left == tokens


def test_it_goes_on_as_the_trainer_of_tokenizers(english: list[str], tmp_path: Path) -> None:
    """Stopped after 500 merges and gone on with by us, on the same text: the trainer's next 300, in its order."""
    start = trained(english, 757, tmp_path / "start.json")
    through = json.loads(trained(english, 1057, tmp_path / "through.json").read_text())
    ours = vocabulary.Tokenizer(start.read_bytes(), "start")
    merges, _ = vocabulary.learn(ours, table(ours, english), 300)
    extended = json.loads(ours.extended(merges))
    assert extended["model"]["merges"] == through["model"]["merges"]
    assert extended["model"]["vocab"] == through["model"]["vocab"]


@pytest.fixture(scope="module")
def pythia(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[vocabulary.Tokenizer, bytes]:
    """A tokenizer with runs of spaces as added tokens after its vocabulary, and it extended by Chinese."""
    path = trained(english, 600, tmp_path_factory.mktemp("pythia") / "t.json", ["  ", "    ", "<|padding|>"])
    old = vocabulary.Tokenizer(path.read_bytes(), "t")
    assert old.used == 603
    merges, _ = vocabulary.learn(old, table(old, [CHINESE]), 50)
    return old, old.extended(merges)


def random_texts(count: int) -> list[str]:
    generator = random.Random(3)
    ranges = [(32, 127), (32, 127), (0xA0, 0x250), (0x4E00, 0x4E60), (0x1F300, 0x1F640), (9, 14), (0x300, 0x370)]
    return [
        "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randrange(60)))
        + " " * (i % 9)
        for i in range(count)
    ]


def test_ids_stay_and_new_ones_begin_after_all(pythia: tuple[vocabulary.Tokenizer, bytes]) -> None:
    old, content = pythia
    theirs = Tokenizer.from_str(content.decode())
    before, after = Tokenizer.from_str(json.dumps(old.json)).get_vocab(), theirs.get_vocab()
    assert {token: after[token] for token in before} == before == old.ids
    assert sorted(set(after.values()) - set(before.values())) == list(range(603, 653))
    assert theirs.encode("  a<|padding|>").ids[:1] == [600] and 602 in theirs.encode("  a<|padding|>").ids


def test_random_text_comes_back_and_old_text_is_encoded_as_before(pythia: tuple[vocabulary.Tokenizer, bytes]) -> None:
    old, content = pythia
    theirs, before = Tokenizer.from_str(content.decode()), Tokenizer.from_str(json.dumps(old.json))
    changed = 0
    for text in [*random_texts(3000), CHINESE, CHINESE[5:20] + "  if x:\n    中文 "]:
        ids, old_ids = theirs.encode(text).ids, before.encode(text).ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
        if max(ids, default=0) < old.used:
            assert ids == old_ids
        else:
            changed += 1
            assert len(ids) < len(old_ids)
    assert changed > 20, "no new token was ever used"


def test_the_count_is_that_of_the_new_tokenizer(
    english: list[str], pythia: tuple[vocabulary.Tokenizer, bytes], tmp_path: Path
) -> None:
    """The learner's own account of the text is what `tokenizers`, and `prep`, make of it."""
    old, _ = pythia
    documents = [*english[:40], CHINESE, "  a  b" + EOD + "    c"]
    demo.write_jsonl(tmp_path / "text.jsonl", documents)
    found = vocabulary.count_words(old, [str(tmp_path / "text.jsonl")])
    assert found.size == sum(len(document.encode()) for document in documents)
    merges, tokens = vocabulary.learn(old, found, 100)
    new = tmp_path / "new.json"
    new.write_bytes(old.extended(merges))
    ids, _ = encoding.Reference(json.loads(new.read_bytes())).encode([each.encode() for each in documents])
    assert tokens == len(ids) < found.tokens
    assert max(ids) > old.used
    for backend in ("gigatoken", "tokenizers"):
        prep([str(tmp_path / "text.jsonl")], tokenizer=str(new), output=tmp_path / backend, workers=1, backend=backend, quiet=True)  # type: ignore[arg-type]  # fmt: skip
        shards = ShardSet(tmp_path / backend)
        assert len(shards) == tokens + len(documents) and shards.vocab_size == old.used + 100
        stored = [shards.document(0, index)[:-1] for index in range(len(documents))]
        assert np.concatenate(stored).tolist() == ids.tolist()


def test_a_token_of_another_vocabulary_is_what_the_old_merges_make_of_it(pythia: Any) -> None:
    old, content = pythia
    before = Tokenizer.from_str(json.dumps(old.json))
    new = vocabulary.Tokenizer(content, "new")
    for token, index in new.ids.items():
        if index >= old.used:
            parts = old.split(token)
            assert len(parts) > 1 and "".join(before.id_to_token(part) for part in parts) == token
    assert old.split("中文 x") == before.encode("中文 x").ids  # an added token's text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "not byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level BPE"),
        ({"ignore_merges": True}, "its model has ignore_merges"),
        ({"byte_fallback": True}, "its model has byte_fallback"),
    ],
)
def test_others_are_refused(change: dict[str, Any], message: str, byte_tokenizer: Path) -> None:
    content = json.loads(byte_tokenizer.read_text())
    for key, value in change.items():
        (content if key in content else content["model"])[key] = value
    with pytest.raises(UserError, match=message):
        vocabulary.Tokenizer(json.dumps(content).encode(), "t.json")
