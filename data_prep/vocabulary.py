"""More tokens for a byte-level BPE tokenizer: what it would have learned next, on new text.

Training goes on where it ended: text is split as the tokenizer splits it, each piece is encoded by its merges, and the
pair of tokens that occurs most often becomes a token, again and again (Sennrich et al., arXiv 1508.07909). Counts are exact,
ties go to the pair with the lower ids, no pair crosses the border of a piece, and a pair whose text is a token already is
passed over: a new merge always makes a new token. New merges rank after all old ones, so that text in which none of them
occurs is encoded as before.

A pair never gains places after the younger of its tokens was made; so the places of each are found once, and counts only
fall, which is what lets a heap hold stale ones.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcpt import UserError
from fastcpt.data_prep.documents import Reject
from fastcpt.data_prep.encoding import byte_of_char, ids_of, is_byte_level, load_reference
from fastcpt.data_prep.inputs import Piece, find_inputs, make_tasks
from fastcpt.data_prep.readers import PieceReader
from fastcpt.data_prep.tasks import stop
from fastcpt.progress import Bar

BATCH_BYTES = 4 << 20  # of text that is encoded at once
FEWEST = 2  # times that a pair must occur


class Tokenizer:
    """A `tokenizer.json` as it is used here: text that spells a special token is text."""

    def __init__(self, content: bytes, source: str) -> None:
        """Raises UserError unless it is byte-level BPE whose merges alone decide. source: for errors."""
        self.source = source
        try:
            self.json: dict[str, Any] = json.loads(content)
            self.ids = ids_of(self.json)
            byte_level = is_byte_level(self.json)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "tokenizer-broken", f"{source}: not a tokenizer.json: {type(error).__name__} {error}; give another file"
            ) from None
        model = self.json["model"]
        odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
               if model.get(key)]  # fmt: skip
        if not byte_level or odd:
            what = f"its model has {odd[0]}" if odd else "it is not byte-level BPE"
            raise UserError("tokenizer-not-extendable", f"{source}: {what}; only plain byte-level BPE can be extended")
        self.used = max(self.ids.values()) + 1
        self._tokenizer = load_reference(self.json)
        self._tokenizer.encode_special_tokens = True
        for token, index in self._tokenizer.get_vocab().items():
            if self.ids.get(token) != index:
                raise UserError(
                    "tokenizer-renumbered",
                    f"{source}: says {token!r} has the id {self.ids.get(token)}, `tokenizers` gives it {index}; put added tokens "
                    "into model.vocab too",
                )

    def words(self, texts: list[str]) -> Iterator[bytes]:
        """The ids, uint32, of each piece of the texts within which merges happen."""
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            ids, words = np.array(encoding.ids, np.uint32), np.array(encoding.word_ids, np.int64)
            data = ids.tobytes()
            edges = np.flatnonzero(np.diff(words, prepend=-1, append=-1)) * 4
            yield from (data[start:end] for start, end in zip(edges[:-1].tolist(), edges[1:].tolist()))

    def split(self, token: str) -> list[int]:
        """The ids that a token of another vocabulary is made of in this one."""
        if byte_of_char().keys() >= set(token):
            return [each.id for each in self._tokenizer.model.tokenize(token)]
        return list(self._tokenizer.encode(token, add_special_tokens=False).ids)

    def extended(self, merges: list[tuple[int, int]]) -> bytes:
        """The `tokenizer.json` with more merges, of tokens by their ids, the i-th of which makes the id `used + i`.

        Added tokens become part of the model's vocabulary: the `tokenizers` library would else number them anew, from its
        size on.
        """
        model = self.json["model"]
        spelled = {index: token for token, index in self.ids.items()}
        vocab, old = dict(model["vocab"]), list(model["merges"])
        for token in self.json.get("added_tokens") or ():
            vocab.setdefault(token["content"], token["id"])
        pairs = bool(old) and isinstance(old[0], list)
        for index, (left, right) in enumerate(merges, self.used):
            spelled[index] = spelled[left] + spelled[right]
            vocab[spelled[index]] = index
            old.append([spelled[left], spelled[right]] if pairs else f"{spelled[left]} {spelled[right]}")
        content = {**self.json, "model": {**model, "vocab": vocab, "merges": old}}
        return json.dumps(content, ensure_ascii=False, indent=1).encode()


@dataclass(frozen=True)
class Table:
    """How often each piece occurs, by its ids, uint32. size: bytes of the text."""

    words: Counter[bytes]
    size: int

    @property
    def tokens(self) -> int:
        return sum(len(word) // 4 * count for word, count in self.words.items())


def count_words(tokenizer: Tokenizer, inputs: list[str], text_key: str = "text") -> Table:
    """Of files as `prep` reads them. Raises UserError for a document that cannot be used."""
    tasks = make_tasks(find_inputs(inputs))
    words: Counter[bytes] = Counter()
    size = 0
    with Bar("count", sum(task.weight for task in tasks)) as bar:
        for batch in _batches([piece for task in tasks for piece in task.pieces], text_key):
            words.update(tokenizer.words([document.decode() for document in batch]))
            size += sum(map(len, batch))
            bar.update(min(size, bar.total))
    return Table(words, size)


def _batches(pieces: list[Piece], text_key: str) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    weight = 0
    for piece in pieces:
        for item in PieceReader(piece, text_key, None):
            if isinstance(item, Reject):
                stop(piece, item, "")
            batch.append(item.data)
            weight += len(item.data)
            if weight >= BATCH_BYTES:
                yield batch
                batch, weight = [], 0
    if batch:
        yield batch


class Learner:
    """The pieces as one row of symbols, each linked to its neighbours; the last place, S, is the end of every piece."""

    def __init__(self, table: Table) -> None:
        lengths = np.array([len(word) // 4 for word in table.words], np.int64)
        total = int(lengths.sum())
        self.symbols = np.append(np.frombuffer(b"".join(table.words), np.uint32).astype(np.int64), -1)
        self.weights = np.append(np.repeat(np.array(list(table.words.values()), np.int64), lengths), 0)
        self.next, self.previous = np.arange(1, total + 2), np.arange(-1, total)
        ends = lengths.cumsum()
        self.next[ends - 1], self.next[total] = total, total
        self.previous[ends - lengths] = total
        self.tokens = int(self.weights.sum())
        self.counts: dict[int, int] = {}
        self.places: dict[int, np.ndarray] = {}
        self.heap: list[tuple[int, int]] = []
        for key, count, places in self._pairs(np.arange(total)):
            self._add(key, count, places)

    def _pairs(self, places: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(left << 32 | right, how often, where) of each pair that begins at one of these ascending places."""
        places = places[self.next[places] < len(self.symbols) - 1]
        if not len(places):
            return
        keys = self.symbols[places] << 32 | self.symbols[self.next[places]]
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.add.reduceat(self.weights[places], starts)
        yield from zip(keys[starts].tolist(), counts.tolist(), np.split(places, starts[1:]))

    def _add(self, key: int, count: int, places: np.ndarray) -> None:
        if count >= FEWEST:
            self.counts[key], self.places[key] = count, places
            heapq.heappush(self.heap, (-count, key))

    def best(self) -> tuple[int, int] | None:
        """The pair that occurs most often, now taken out; None if none occurs often enough."""
        while self.heap:
            count, key = heapq.heappop(self.heap)
            now = self.counts[key]
            if now == -count:
                del self.counts[key]
                return key >> 32, key & 0xFFFFFFFF
            if now >= FEWEST:
                heapq.heappush(self.heap, (-now, key))
            else:
                del self.counts[key], self.places[key]
        return None

    def merge(self, left: int, right: int, new: int) -> None:
        """Makes the id `new` of the pair that `best` gave, from the left of each piece on."""
        symbols, following = self.symbols, self.next
        first = self.places.pop(left << 32 | right)
        first = first[(symbols[first] == left) & (symbols[following[first]] == right)]
        if left == right and len(first):  # of a run of pairs that overlap every other one
            starts = np.append(True, following[first[:-1]] != first[1:])
            runs = np.flatnonzero(starts)[np.cumsum(starts) - 1]
            first = first[(np.arange(len(first)) - runs) % 2 == 0]
        second, end = following[first], len(symbols) - 1
        touched = np.unique(np.concatenate((self.previous[first], first, second)))
        for key, count, _ in self._pairs(touched[touched < end]):
            if key in self.counts:
                self.counts[key] -= count
        symbols[first], symbols[second] = new, -2
        following[first] = following[second]
        self.previous[following[first]] = first
        self.tokens -= int(self.weights[first].sum())
        touched = np.unique(np.concatenate((self.previous[first], first)))
        for key, count, places in self._pairs(touched[touched < end]):
            self._add(key, count, places)


def learn(tokenizer: Tokenizer, table: Table, count: int) -> tuple[list[tuple[int, int]], int]:
    """-> (up to `count` merges as `Tokenizer.extended` takes them, tokens of the text with them)."""
    learner = Learner(table)
    spelled = {index: token for token, index in tokenizer.ids.items()}
    taken = set(tokenizer.ids)
    merges: list[tuple[int, int]] = []
    with Bar("learn", count) as bar:
        while len(merges) < count and (pair := learner.best()):
            text = spelled[pair[0]] + spelled[pair[1]]
            if text in taken:
                continue
            taken.add(text)
            new = tokenizer.used + len(merges)
            spelled[new] = text
            learner.merge(*pair, new)
            merges.append(pair)
            bar.update(len(merges))
    return merges, learner.tokens
