"""Text into token ids: gigatoken, and `tokenizers` as the reference that it is checked against.

Both read the same `tokenizer.json`, changed in one way: text that spells a special token is text. Padding, truncation
and post-processing are not used.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import tokenizers

from fastcpt import UserError
from fastcpt.data_prep.documents import first_line
from fastcpt.shards import dtype_for, tokenizer_fingerprint

Backend = Literal["gigatoken", "tokenizers"]
# Names of the token that ends a document, the first that a tokenizer has; `--eod` names any other.
EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
    "<|eod|>",
)
CACHE_BYTES = 1 << 30
# The bytes that occur in UTF-8.
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]


@dataclass(frozen=True)
class Vocabulary:
    """What decides how ids are stored. size: the highest id + 1. reserved: ranges [low, high) of ids that no text
    may become: those of the special tokens."""

    fingerprint: str
    size: int
    eod: int
    eod_token: str
    reserved: tuple[tuple[int, int], ...]

    @property
    def dtype(self) -> np.dtype:
        return dtype_for(self.size)

    def manifest(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "vocab_size": self.size,
            "eod": self.eod,
            "eod_token": self.eod_token,
        }


def load_tokenizer(argument: str) -> bytes:
    """The `tokenizer.json` that a path, a folder or a hub id (`name/name[@revision]`) names. Raises UserError."""
    path = Path(argument)
    if path.is_dir():
        path /= "tokenizer.json"
    if path.is_file():
        return path.read_bytes()
    if (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", argument)
        or argument.endswith(".json")
        or (path.parent.is_dir() and path.parent != Path())
    ):
        raise UserError(
            "tokenizer-missing", f"{path}: no such file; give a tokenizer.json, a folder with one, or a hub id"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = argument.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", revision=revision or None)).read_bytes()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            "tokenizer-not-on-hub",
            f"{argument}: neither a file here nor a tokenizer.json that the hub gives ({first_line(error)}); "
            "give the path of a tokenizer.json",
        ) from None


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """That of a shard set. Raises UserError."""
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 (of the library, which has no class of its own for them)
        raise UserError("tokenizer-broken", f"{path}: not a tokenizer.json: {first_line(error)}; restore it") from None


def load_reference(content: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
        raise UserError(
            "tokenizer-broken",
            f"tokenizer.json: the `tokenizers` library cannot load it: {first_line(error)}; give another",
        ) from None


def ids_of(content: dict[str, Any]) -> dict[str, int]:
    """The id of each token, added tokens included."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score]
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}


def read_vocabulary(tokenizer_json: bytes, eod: str | None, source: str) -> Vocabulary:
    """Raises UserError when it is no tokenizer.json, or has no token `eod` (or, if None, none of EOD_NAMES)."""
    try:
        content = json.loads(tokenizer_json)
        ids = ids_of(content)
        special = {token["content"]: token["id"] for token in content.get("added_tokens") or () if token["special"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "tokenizer-broken", f"{source}: not a tokenizer.json: {type(error).__name__} {error}; give another file"
        ) from None
    name = eod if eod is not None else next((name for name in EOD_NAMES if name in ids), None)
    if name is None or name not in ids:
        missing = "no end-of-document token that is known" if name is None else f"no token {name!r}"
        raise UserError(
            "eod-unknown",
            f"{source}: {missing}; name one with --eod; its special tokens: {', '.join(special) or 'none'}",
        )
    if dropout := content["model"].get("dropout"):
        raise UserError(
            "tokenizer-dropout",
            f"{source}: its model has dropout {dropout}, so that ids differ by chance; set it to null",
        )
    return Vocabulary(
        fingerprint=tokenizer_fingerprint(tokenizer_json),
        size=max(ids.values()) + 1,
        eod=ids[name],
        eod_token=name,
        reserved=_ranges({*special.values(), ids[name]}),
    )


def _ranges(ids: set[int]) -> tuple[tuple[int, int], ...]:
    lows = sorted(index for index in ids if index - 1 not in ids)
    highs = sorted(index + 1 for index in ids if index + 1 not in ids)
    return tuple(zip(lows, highs, strict=True))


def _without_extras(content: dict[str, Any], eod_token: str) -> dict[str, Any]:
    """The tokenizer as it is used: no padding, no truncation, and the end-of-document token counted as special."""
    tokens = content.get("added_tokens") or []
    tokens = [{**token, "special": token["special"] or token["content"] == eod_token} for token in tokens]
    return {**content, "truncation": None, "padding": None, "added_tokens": tokens}


def is_byte_level(content: dict[str, Any]) -> bool:
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    return content["model"].get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


@functools.cache
def byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 and up (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def token_bytes(tokenizer_json: bytes, vocabulary: Vocabulary) -> np.ndarray:
    """(vocabulary.size,) uint16: UTF-8 bytes of text that each id stands for; 0 for special tokens and unused ids.

    Exact for byte-level BPE. In other vocabularies "▁" counts as a space and "<0x0A>" as a byte (SentencePiece).
    """
    content = json.loads(tokenizer_json)
    byte_level = is_byte_level(content)
    alphabet = frozenset(byte_of_char())
    sizes = np.zeros(vocabulary.size, np.uint16)

    def size(token: str) -> int:
        if byte_level:
            return len(token) if alphabet.issuperset(token) else len(token.encode())
        return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())

    added = {token["content"] for token in content.get("added_tokens") or ()}
    for token, index in ids_of(content).items():
        sizes[index] = len(token.encode()) if token in added else size(token)
    for low, high in vocabulary.reserved:
        sizes[low:high] = 0
    return sizes


class Encoder(Protocol):
    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """UTF-8 texts -> (ids of all, one after another; number of ids of each (D,) int64). No special tokens added."""
        ...


class Reference:
    """The `tokenizers` library, text that spells a special token kept as text."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._tokenizer = load_reference(content)
        self._tokenizer.encode_special_tokens = True

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        texts = [document.decode() for document in documents]
        rows = [row.ids for row in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter((index for row in rows for index in row), np.uint32, int(counts.sum())), counts


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Gigatoken:
    """gigatoken on the calling thread. It is given the tokenizer without its special tokens, so that none can match.

    It remembers every distinct word that it meets, some 6 GB in 1 GB of random ones, so it is loaded anew (a fifth of a
    second) whenever the process has grown by CACHE_BYTES.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        if not is_byte_level(content):
            raise UserError(
                "tokenizer-not-byte-level",
                "tokenizer.json: not byte-level BPE, all that the fast tokenizer is trusted with; "
                "use --tokenizer-backend tokenizers",
            )
        plain = [token for token in content["added_tokens"] if not token["special"]]
        self._json = json.dumps({**content, "added_tokens": plain})
        self._load()

    def _load(self) -> None:
        import gigatoken

        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(self._json)
        except Exception as error:  # noqa: BLE001 (what it raises is not documented)
            raise UserError(
                "tokenizer-beyond-gigatoken",
                f"tokenizer.json: gigatoken cannot load it ({first_line(error)}); use --tokenizer-backend tokenizers",
            ) from None
        self._limit = _resident_bytes() + CACHE_BYTES

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._tokenizer.encode_batch(documents, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        if _resident_bytes() > self._limit:
            self._load()
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


class Tools(NamedTuple):
    """reference: what `encoder` is checked against; None when it is the reference itself."""

    encoder: Encoder
    reference: Encoder | None
    uncovered: Callable[[bytes], int | None]


@functools.lru_cache(1)
def make_tools(tokenizer_json: bytes, vocabulary: Vocabulary, backend: Backend) -> Tools:
    """Built once per process and kept. Raises UserError when the tokenizer is beyond the backend."""
    content = _without_extras(json.loads(tokenizer_json), vocabulary.eod_token)
    reference, uncovered = Reference(content), _uncovered_byte(content)
    if backend == "tokenizers":
        return Tools(reference, None, uncovered)
    return Tools(Gigatoken(content), reference, uncovered)


def _uncovered_byte(content: dict[str, Any]) -> Callable[[bytes], int | None]:
    """A function from a UTF-8 text to a byte in it that a byte-level vocabulary lacks, or None.

    `tokenizers` would drop it in silence (gigatoken does not load such a vocabulary). One that was trained from the
    whole alphabet lacks none.
    """
    vocab = content["model"].get("vocab") or {}
    lacking = [byte for char, byte in byte_of_char().items() if byte in UTF8_BYTES and char not in vocab]
    if not is_byte_level(content) or not lacking:
        return lambda text: None
    normalizer = load_reference(content).normalizer
    found = re.compile(b"[" + b"".join(b"\\x%02x" % byte for byte in lacking) + b"]")

    def search(text: bytes) -> int | None:
        match = found.search(normalizer.normalize_str(text.decode()).encode() if normalizer else text)
        return match[0][0] if match else None

    return search
