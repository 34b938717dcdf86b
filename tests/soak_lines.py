"""Mutated lines of JSON, read in random divisions of their file, against Python's json with strict rules of its own."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from fastcpt.data_prep import inputs
from fastcpt.data_prep.documents import Document, Reject
from fastcpt.data_prep.readers import PieceReader

UNIT = 5000  # lines a trial, about: a mutation may add a newline or take one away
SECONDS = 120
GROUP_KEYS = (None, "group", "meta.source")
REJECT, BLANK, EITHER = "rejected", "blank", "either"

TEXTS = ["fine", "two words", "é 日本 🎉", "a\u2028b\u2029c\x85d", "\x00 nul", " \r\n\t", "\ufeff", "text", '"text"', "",
         "\\", "/", "\U0010ffff", "x" * 300, "<|endoftext|>", "e\u0301", "\x7f"]  # fmt: skip
TEXT_SPELLINGS = [json.dumps(text, ensure_ascii=ascii) for text in TEXTS for ascii in (True, False)]
TEXT_SPELLINGS += ["".join(f"\\u{ord(c):04X}" for c in "all").join('""'), r'"\/\b\f\n\r\t\"\\"', r'"\ud83c\udf89"']
WRONG = ["null", "5", "-0", "true", "[]", '["a"]', "{}", '{"text": "x"}', "1e5", r'"\ud800"', r'"a\udc00\ud800"', "NaN",
         '"raw\x00nul"', '"raw\ttab"', r'"\x41"', r'"\u12g4"', r'"\u12', '"open', "'x'", "tru", "-Infinity", "Infinity",
         "01", "1.", ".5", "+1", "", "\ufeff1"]  # fmt: skip
NUMBERS = ["1e999", "-1e999", "9" * 30, "9" * 400, "9" * 4300, "9" * 4301, "1." + "3" * 5000, "1e-99999", "-0.0E+00"]
TEXT_NAMES = ['"text"'] * 40 + [r'"te\u0078t"', r'"\u0074ext"', '"Text"', '"text "', '"text\x00"', "text", '""']
GROUPS = ['"web"', '"books"', '"é"', '"\\u0061"'] * 8 + ['"a/b"', '" a"', '""', "null", "5", '"' + "x" * 101 + '"', '"a\\u0000"']  # fmt: skip
SPACES = [" ", "\t", "\r", "  "] * 5 + ["\x0b", "\xa0"]
GARBAGE = [" ", "}", " {}", ",", "\x00", "//", "\ufeff", "]", '"', "\t\r", "\x0c", "null"]


def one_of(rng: random.Random, values: list[str]) -> str:
    return values[int(rng.random() * len(values))]


def structured(rng: random.Random) -> str:
    """An object with what people and programs get wrong about such objects, most often nothing or one thing."""
    fields = []
    for _ in range(1 if rng.random() < 0.95 else rng.randrange(3)):
        value = one_of(rng, TEXT_SPELLINGS if rng.random() < 0.9 else WRONG)
        fields.append((one_of(rng, TEXT_NAMES), value))
    for _ in range(1 if rng.random() < 0.9 else rng.randrange(3)):
        fields.append(('"group"' if rng.random() < 0.95 else r'"\u0067roup"', one_of(rng, GROUPS)))
        source = one_of(rng, GROUPS)
        inner = f'{{"source": {source}}}' if rng.random() < 0.8 else f'{{"source": 1, "source": {source}, "a": {{}}}}'
        fields.append(('"meta"' if rng.random() < 0.9 else '"meta.source"', inner if rng.random() < 0.9 else source))
    if rng.random() < 0.15:
        fields += [(one_of(rng, ['"n"', '"n"', '"o"']), one_of(rng, NUMBERS + WRONG + TEXT_SPELLINGS))] * 2
    if rng.random() < 0.01:
        depth = int(10 ** rng.uniform(0, 3.5))
        start, end = one_of(rng, ["[ ]", '{"a":1 }', '{"text": }', '[{"": }]']).split(" ", 1)
        fields.append(('"deep"', start * depth + ("1" if end[0] == "}" else "") + end * (depth - (rng.random() < 0.1))))
    rng.shuffle(fields)
    space = one_of(rng, SPACES) if rng.random() < 0.3 else ""
    comma = "," if rng.random() < 0.98 else one_of(rng, ["", ",,", ";"])
    line = "{" + comma.join(f"{space}{key}:{space}{value}" for key, value in fields) + space + "}"
    if rng.random() < 0.05:
        line += one_of(rng, GARBAGE)
    if rng.random() < 0.02:
        line = one_of(rng, [*GARBAGE, "[", "x", "\ufeff", " "]) + line
    return line


def mutated(rng: random.Random, line: bytes, others: list[bytes]) -> bytes:
    """A byte flipped, set, put in or taken out; a stretch cut, doubled, or joined with one of another line."""
    kind, at, byte = int(rng.random() * 9), int(rng.random() * len(line)), int(rng.random() * 256)
    if not line or kind == 0:
        return line[:at]
    if kind == 1:
        return line[:at] + bytes((line[at] ^ 1 << byte % 8,)) + line[at + 1 :]
    if kind == 2:
        return line[:at] + bytes((byte,)) + line[at + 1 :]
    if kind == 3:
        return line[:at] + bytes((byte,)) + line[at:]
    if kind == 4:
        return line[:at] + line[at + 1 :]
    if kind == 5:
        return line[:at] + line[at : at + byte % 16] + line[at:]
    if kind == 6:
        return line[:at] + b'"{}[]:,\\u \r\n'[byte % 12 :][:1] + line[at:]
    if kind == 7:
        return line[:at] + others[byte % len(others)][at:]
    return line[:at] + (b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\xe2\x80\xa8", b"\xef\xbb\xbf")[
        byte % 6
    ] + line[at:]  # fmt: skip


def content(rng: random.Random) -> bytes:
    pool = [structured(rng).encode(errors="surrogatepass") for _ in range(UNIT // 8)]
    lines = rng.choices(pool, k=UNIT)
    for index in range(0, UNIT, 3):
        lines[index] = mutated(rng, lines[index], pool)
    for _ in range(20):
        lines[rng.randrange(UNIT)] = rng.choice([b"", b"\r", b" ", b"\r\r", b"\xef\xbb\xbf", b"[]", b'"text"', b"{}"])
    if rng.random() < 0.1:
        depth, inside = int(10 ** rng.uniform(3, 5)), rng.choice([b"[ ]", b'{"a": }', b'{"text": }'])
        start, end = inside.split(b" ")
        lines[rng.randrange(UNIT)] = b'{"text": "x", "deep": ' + start * depth + b"1" + end * depth + b"}"
    start = b"\xef\xbb\xbf" if rng.random() < 0.2 else b""
    return start + rng.choice([b"\n"] * 3 + [b"\r\n"]).join(lines) + (b"\n" if rng.random() < 0.5 else b"")


class Twice(dict[str, Any]):
    """An object in which these keys occur more than once."""

    keys_twice: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = Twice(record)
        twice.keys_twice = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        return twice
    return record


def _constant(name: str) -> None:
    raise ValueError(name)


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def expected(line: bytes, group_key: str | None) -> tuple[bytes, str | None] | str:
    """What a line holds: (text, group), REJECT, BLANK, or EITHER of both where the limit is the parser's own."""
    line = line.removesuffix(b"\r")
    if not line:
        return BLANK
    try:
        record = _STRICT.decode(line.decode())
    except (ValueError, RecursionError):
        return EITHER if nested(line) else REJECT
    if not isinstance(record, dict):
        return REJECT

    def value_of(key: str) -> Any:
        """None also when a key that leads there is twice in its object."""
        value: Any = record
        for part in [key] if key in record else key.split("."):
            value = (
                value.get(part) if isinstance(value, dict) and part not in getattr(value, "keys_twice", ()) else None
            )
        return value

    text = value_of("text")
    if not isinstance(text, str) or not text:
        return REJECT
    group: Any = None
    if group_key is not None:
        group = value_of(group_key)
        if not isinstance(group, str) or not 0 < len(group.encode(errors="replace")) <= 100:
            return REJECT
        if group.strip() != group or "/" in group or "\\" in group or not group.isprintable():
            return REJECT
    try:
        return EITHER if nested(line) else (text.encode(), group)
    except UnicodeEncodeError:
        return REJECT


def nested(line: bytes) -> bool:
    """About as deep as parsers go: how deep depends on who calls them."""
    return len(line) > 1800 and 900 < line.count(b"[") + line.count(b"{") < 1100


def read(path: Path, group_key: str | None) -> tuple[list[tuple[int, Document | Reject]], int, int]:
    """[(line of the file, what was read)], lines and blank lines of all pieces."""
    items: list[tuple[int, Document | Reject]] = []
    lines = blank = 0
    for task in inputs.make_tasks(inputs.find_inputs([str(path)])):
        for piece in task.pieces:
            reader = PieceReader(piece, "text", group_key)
            found = list(reader)
            assert all(isinstance(item, Document) or item.documents > 0 for item in found), found
            count = sum(1 if isinstance(item, Document) else item.documents for item in found)
            assert count == reader.lines - reader.blank, (
                f"{piece}: {count} results, {reader.lines} - {reader.blank} lines"
            )
            items += [(lines + item.line, item) for item in found]
            lines += reader.lines
            blank += reader.blank
    return items, lines, blank


def check(data: bytes, group_key: str | None, items: list[tuple[int, Any]], lines: int, blank: int) -> Counter[str]:
    """Compares what was read with what each line holds; raises AssertionError with the first line that differs."""
    tally: Counter[str] = Counter()
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    split = data[start:].split(b"\n")
    if not split[-1] and (len(split) > 1 or not start):
        split.pop()
    found = dict(items)
    assert len(found) == len(items), "two results for one line"
    offset = start
    for number, line in enumerate(split):
        want, got = expected(line, group_key), found.pop(number, None)
        if isinstance(got, Document):
            right = (want == (got.data, got.group) or want is EITHER) and got.offset == offset
        elif isinstance(got, Reject):
            right = want in (REJECT, EITHER) and got.documents == 1 and offset <= got.offset <= offset + len(line)
            tally[got.reason] += 1
        else:
            right = want is BLANK
        assert right, (
            f"line {number} at {offset}, group key {group_key}: {line[:300]!r} gave {got!r}, expected {want!r}"
        )
        tally["accepted" if isinstance(got, Document) else "blank" if got is None else "rejected"] += 1
        offset += len(line) + 1
    assert not found, f"results for lines that are not there: {found}"
    assert (lines, blank) == (len(split), tally["blank"]), (lines, blank, len(split), tally)
    assert len(items) == lines - blank
    return tally + Counter(lines=lines)


def prepare(folder: Path, seed: int) -> None:
    pass


def trial(rng: random.Random, folder: Path, prepared: None) -> Counter[str]:
    data, group_key = content(rng), rng.choice(GROUP_KEYS)
    path = folder / "a.jsonl"
    path.write_bytes(data)
    whole, inputs.TASK_BYTES = inputs.TASK_BYTES, int(10 ** rng.uniform(3.5, 6.5))
    try:
        return check(data, group_key, *read(path, group_key))
    finally:
        inputs.TASK_BYTES = whole
