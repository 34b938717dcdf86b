"""The text of bench_prep: documents out of a folder of text files, written as .jsonl and as .jsonl.zst.

A document is a file, or a part of one that ends at a newline. The files are taken in the order of a hash of their names,
so that a corpus smaller than the folder is a mixture of all of it. No document occurs twice, and none spells one of the
tokenizer's special tokens, which some rivals would take for that token.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import zstandard

FORMATS = ("jsonl", "jsonl.zst")
FILES = 24  # of unequal sizes: as 1 to 24, in an order that mixes them
LEAST, MOST = 200, 64 << 10  # bytes of a document
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is. text_bytes: UTF-8 bytes of text in each file, the same for every format."""

    folder: Path
    text_bytes: tuple[int, ...]
    documents: int
    about: str

    def files(self, form: str, share: float = 1.0) -> list[Path]:
        """The files of a format, or about `share` of them, evenly spread over the sizes; never none."""
        return [self.folder / form / f"{number:02}.{form}" for number in self.chosen(share)]

    def chosen(self, share: float) -> list[int]:
        count = len(self.text_bytes)
        step = max(1, round(1 / share))
        return list(range(0, count, step)) if step < count else [0]

    def bytes_of(self, share: float = 1.0) -> int:
        return sum(self.text_bytes[number] for number in self.chosen(share))


def documents(folder: Path, specials: list[str]) -> Iterator[tuple[str, str]]:
    """(name of the file below the folder, text), each text once. Files that are not UTF-8 text are passed over."""
    names = [
        os.path.relpath(os.path.join(path, name), folder) for path, folders, found in os.walk(folder) for name in found
    ]
    seen: set[bytes] = set()
    for name in sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text, label = path.read_bytes().decode(), os.fsencode(name).decode()
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            continue
        for part in _parts(text):
            digest = hashlib.sha256(part.encode()).digest()
            if digest not in seen and not any(special in part for special in specials):
                seen.add(digest)
                yield label, part


def _parts(text: str) -> Iterator[str]:
    """Pieces of LEAST to about MOST bytes that end at newlines; a longer line is a piece of its own."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= MOST:
            yield "".join(lines)
            lines, size = [], 0
    if size >= LEAST:
        yield "".join(lines)


def make_corpus(source: Path, folder: Path, megabytes: float, specials: list[str], what: str) -> Corpus:
    """Writes FILES files of each format below `folder`, of `megabytes` (10^6 bytes of text), or what the source has.

    what: a few words that say what the text is. A corpus that is there already, made from the same arguments, is used
    as it is. Raises AssertionError when the source has no text.
    """
    arguments = {"source": str(source.resolve()), "megabytes": megabytes, "specials": specials, "what": what}
    record = folder / "corpus.json"
    if record.exists():
        known = json.loads(record.read_text())
        if known["arguments"] == arguments:
            return Corpus(folder, tuple(known["text_bytes"]), known["documents"], known["about"])
    for form in FORMATS:
        (folder / form).mkdir(parents=True, exist_ok=True)
    shares = [number * 7 % FILES + 1 for number in range(FILES)]
    ends = [megabytes * 1e6 * end / sum(shares) for end in accumulate(shares)]  # of the files, in bytes of text
    entries = documents(source, specials)
    sizes: list[int] = []
    count, kinds, letters = 0, Counter[str](), 0
    for end in ends:
        lines, size = [], 0
        while sum(sizes) + size < end and (entry := next(entries, None)) is not None:
            name, text = entry
            length = len(text.encode())
            # As orjson writes, with which today's corpora are made: other scripts as they are, not as \uXXXX.
            lines.append(json.dumps({"text": text, "meta": {"source": name}}, ensure_ascii=False) + "\n")
            size += length
            letters += len(text)
            kinds[Path(name).suffix or "none"] += length
        if lines:
            content = "".join(lines).encode()
            (folder / "jsonl" / f"{len(sizes):02}.jsonl").write_bytes(content)
            packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content)
            (folder / "jsonl.zst" / f"{len(sizes):02}.jsonl.zst").write_bytes(packed)
            sizes.append(size)
            count += len(lines)
    assert count, f"{source}: no text files"
    if sum(sizes) < megabytes * 1e6 * 0.999:
        print(f"{source} holds {sum(sizes) / 1e6:.0f} MB of distinct text, less than the {megabytes:g} MB asked for")
    common = ", ".join(f"{kind} {bytes_ / sum(sizes):.0%}" for kind, bytes_ in kinds.most_common(6))
    about = (
        f"{what}: {sum(sizes) / 1e6:.0f} MB in {count} documents and {len(sizes)} files, "
        f"{sum(sizes) / letters:.2f} bytes a character, by suffix {common}"
    )
    made = Corpus(folder, tuple(sizes), count, about)
    entry_of = {key: value for key, value in asdict(made).items() if key != "folder"}
    record.write_text(json.dumps({"arguments": arguments, **entry_of}, indent=1))
    return made
