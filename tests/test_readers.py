"""Documents out of files: what is kept byte for byte, and each way in which a file can be wrong, by its place."""

import gzip
import io
import json
import random
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fastcpt import UserError
from fastcpt.data_prep import inputs, readers, streams
from fastcpt.data_prep.documents import Document, Reject
from fastcpt.data_prep.inputs import find_inputs, make_tasks
from fastcpt.data_prep.readers import PieceReader


def read(path: Path, group_key: str | None = None) -> tuple[list[Document], list[Reject]]:
    """All documents and rejects of a file, lines counted in the whole file; checks the exact accounting."""
    good: list[Document] = []
    bad: list[Reject] = []
    lines = 0
    for task in make_tasks(find_inputs([str(path)])):
        for piece in task.pieces:
            reader = PieceReader(piece, "text", group_key)
            items = list(reader)
            assert lines == readers.lines_before(piece)
            good += [item._replace(line=item.line + lines) for item in items if isinstance(item, Document)]
            bad += [item._replace(line=item.line + lines) for item in items if isinstance(item, Reject)]
            count = sum(1 if isinstance(item, Document) else item.documents for item in items)
            assert count == reader.lines - reader.blank
            lines += reader.lines
    return good, bad


def texts(path: Path) -> list[bytes]:
    good, bad = read(path)
    assert bad == []
    return [document.data for document in good]


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def jsonl(count: int, seed: int = 0) -> bytes:
    """Documents of ragged lengths with multi-byte text, a few empty lines and CRLF endings between them."""
    rng = random.Random(seed)
    out = b""
    for number in range(count):
        text = f"{number} " + "".join(rng.choice("ab é日\n\u2028🎉") for _ in range(rng.randrange(12)))
        out += json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5).encode()
        out += rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"])
    return out


OK = b'{"text": "fine"}'
BAD_LINES = {
    "broken": (b'{"text": "x"', "broken JSON", 12),
    "broken after two-byte text": ('{"text": "é" ?}'.encode(), "broken JSON", 14),
    "two values": (b'{"text": "x"} {}', "broken JSON", 14),
    "blanks": (b"  ", "broken JSON", 2),
    "control character": (b'{"text": "a\x00"}', "broken JSON", 11),
    "not a number": (b'{"text": "x", "score": NaN}', "broken JSON", 0),
    "key twice": (b'{"text": "x", "text": "y"}', "broken JSON", 0),
    "too deep": (b'{"text": ' + b"[" * 100_000, "broken JSON", 0),
    "huge number": (b'{"text": "x", "n": ' + b"9" * 10_000 + b"}", "broken JSON", 0),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "invalid UTF-8", 0),
    "invalid UTF-8": (b'{"text": "ab\xff"}', "invalid UTF-8", 12),
    "overlong": (b'{"text": "\xc0\x80"}', "invalid UTF-8", 10),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8", 10),
    "late order mark": (b'\xef\xbb\xbf{"text": "x"}', "broken JSON", 0),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate", 0),
    "list": (b'["text"]', "not an object", 0),
    "string": (b'"text"', "not an object", 0),
    "no key": (b'{"content": "x"}', "missing key", 0),
    "null": (b'{"text": null}', "not a string", 0),
    "number": (b'{"text": 5}', "not a string", 0),
    "object": (b'{"text": {"a": "b"}}', "not a string", 0),
    "empty": (b'{"text": ""}', "empty document", 0),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_bad_line_is_one_reject_at_its_place(tmp_path: Path, name: str, suffix: str) -> None:
    line, reason, at = BAD_LINES[name]
    content = OK + b"\n\r\n" + line + b"\n" + OK + b"\n"
    if suffix == ".jsonl.gz":
        content = gzip.compress(content)
    elif suffix == ".jsonl.zst":
        content = zstandard.compress(content)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    good, bad = read(path)
    assert [(document.data, document.line) for document in good] == [(b"fine", 0), (b"fine", 3)]
    assert [(reject.reason, reject.line, reject.offset) for reject in bad] == [(reason, 2, len(OK) + 3 + at)]


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    wanted = [
        "a\u2028b\u2029c\x85d\x0be\x0cf",
        "\x00 nul \x00",
        " spaces \r\n\t",
        "e\u0301 é",
        "\ufeff mark",
        "<|endoftext|>",
        "\U0010ffff",
    ]
    for ascii_only in (True, False):
        lines = [json.dumps({"text": text}, ensure_ascii=ascii_only).encode() for text in wanted]
        assert texts(write_lines(tmp_path / "a.jsonl", *lines)) == [text.encode() for text in wanted]


def test_order_mark_crlf_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + OK + b"\r\n" + OK)
    good, bad = read(path)
    assert [(document.data, document.offset) for document in good] == [(b"fine", 3), (b"fine", 3 + len(OK) + 2)]
    assert bad == []
    path.write_bytes(b"\xef\xbb\xbf\n" + OK)
    assert texts(path) == [b"fine"]


def test_nested_keys(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        b'{"text": "x", "meta": {"source": "web"}}',
        b'{"text": "y", "meta.source": "books", "meta": {"source": "web"}}',
        b'{"text": "z", "meta": "web"}',
    )
    good, bad = read(path, "meta.source")
    assert [document.group for document in good] == ["web", "books"]
    assert [(reject.reason, reject.line) for reject in bad] == [("missing key", 2)]


def test_only_keys_that_are_asked_for_must_occur_once(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        b'{"text": "0", "meta": {"source": "web"}, "id": 1, "id": 2, "other": {"text": "a", "text": "b"}}',
        b'{"text": "1", "meta": {"source": "web", "source": "books"}}',
        b'{"text": "2", "meta": {"source": "web", "s\\u006furce": "books"}}',
        b'{"text": "3", "meta": {"source": "web"}, "meta": {"source": "web"}}',
        b'{"text": "4", "t\\u0065xt": "x", "meta": {"source": "web"}}',
        b'{"t\\u0065xt": "5", "text\\u0000": "x", "meta": {"sourc\\u0065": "web"}}',
        b'{"text": "6", "meta": {"source": "web"}, "meta.source": "books", "meta.source": "books"}',
        b'{"text": "7", "meta": {"source": "web"}, "n": 1e999, "m": 123456789012345678901234567890}',
    )
    good, bad = read(path, "meta.source")
    assert [(document.data, document.group) for document in good] == [(b"0", "web"), (b"5", "web"), (b"7", "web")]
    assert [(reject.reason, reject.line) for reject in bad] == [("broken JSON", line) for line in (1, 2, 3, 4, 6)]


@pytest.mark.parametrize("key", ["a\0b", "", ".", "a.", "\ud800", "a/b", "~0", "ключ"])
def test_any_key_can_be_asked_for(tmp_path: Path, key: str) -> None:
    record: object = "found"
    for part in reversed(key.split(".")):
        record = {"a": "wrong", part: record}
    path = write_lines(tmp_path / "a.jsonl", json.dumps(record).encode())
    for task in make_tasks(find_inputs([str(path)])):
        assert [item.data for piece in task.pieces for item in PieceReader(piece, key, None)] == [b"found"]


@pytest.mark.parametrize("size", [readers.AT_ONCE_BYTES - 12, readers.AT_ONCE_BYTES - 11])
def test_long_lines_are_read_by_another_parser_alike(tmp_path: Path, size: int) -> None:
    line = json.dumps({"text": "é" * (size // 2) + "x" * (size % 2)}, ensure_ascii=False).encode()
    assert texts(write_lines(tmp_path / "a.jsonl", line)) == [line[10:-2]]


@pytest.mark.parametrize(
    "value", ["", " a", "a ", "a/b", "a\\b", "..\\", "a\0", "a\nb", "x" * 101, "\ud800", 5, None, ["a"]]
)
def test_group_that_is_no_name_is_rejected(tmp_path: Path, value: object) -> None:
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"text": "x", "group": value}).encode())
    good, bad = read(path, "group")
    assert (good, len(bad)) == ([], 1)


@pytest.mark.parametrize("long_line", [1, 4, streams.LONG_LINE])
def test_split_lines_equals_bytes_split_for_any_chunks(monkeypatch: pytest.MonkeyPatch, long_line: int) -> None:
    monkeypatch.setattr(streams, "LONG_LINE", long_line)
    rng = random.Random(1)
    for _ in range(500):
        data = bytes(rng.choice(b"ab\r\n\n") for _ in range(rng.randrange(40)))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
        want, offset = [], 0
        for line in data.split(b"\n"):
            want.append((offset, line))
            offset += len(line) + 1
        found = []
        for start, lines in streams.split_lines(chunks, 0):
            assert not isinstance(lines, streams.Bad)
            for line in lines:
                found.append((start, line))
                start += len(line) + 1
        assert found == (want if want[-1][1] else want[:-1])


def test_every_split_of_a_file_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(12) + b'{"text": "bad"\n' + OK)
    whole = read(path)
    assert len(whole[0]) == 13 and len(whole[1]) == 1
    for size in range(1, path.stat().st_size + 2):
        monkeypatch.setattr(inputs, "TASK_BYTES", size)
        assert read(path) == whole, size


def test_long_lines_are_rejected_without_holding_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 64)
    fits, long = b'{"text": "%s"}' % (b"x" * 988), b'{"text": "%s"}' % (b"x" * 989)
    assert (len(fits), len(long)) == (1000, 1001)
    good, bad = read(write_lines(tmp_path / "a.jsonl", fits, long, OK, long * 9, long))
    assert [document.line for document in good] == [0, 2]
    assert [(reject.reason, reject.line, reject.offset) for reject in bad] == [
        ("too long", 1, 1001),
        ("too long", 3, 2020),
        ("too long", 4, 2020 + 9010),
    ]
    (tmp_path / "b.txt").write_bytes(b"x" * 1001)
    assert read(tmp_path / "b.txt")[1][0].reason == "too long"


def compress(suffix: str, *frames: bytes) -> bytes:
    if suffix == ".jsonl.gz":
        return b"".join(gzip.compress(frame, mtime=0) for frame in frames)
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    return b"".join(compressor.compress(frame) for frame in frames)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_archive_equals_plain_file(tmp_path: Path, suffix: str) -> None:
    content = jsonl(300)
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(content)
    path = tmp_path / f"a{suffix}"
    for cuts in ([], [1000], [10, 11, 5000]):  # frames and members may end anywhere, in a line too
        frames = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)])]
        path.write_bytes(compress(suffix, *frames))
        assert read(path) == read(plain)


def test_zstd_skippable_frames_streams_and_padded_gzip(tmp_path: Path) -> None:
    content = jsonl(50)
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(content)
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:  # no content size in its header
        writer.write(content)
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + buffer.getvalue() + skippable + zstandard.compress(b""))
    assert texts(tmp_path / "a.jsonl.zst") == texts(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content) + bytes(512))
    assert texts(tmp_path / "a.jsonl.gz") == texts(plain)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_every_cut_of_an_archive_is_one_reject(tmp_path: Path, suffix: str) -> None:
    """Whole lines before the cut are kept, the cut is counted once, and no cut passes for the end of the file."""
    frames = [jsonl(40, seed=1), jsonl(40, seed=2)]
    content = compress(suffix, *frames)
    borders = {len(compress(suffix, frames[0])), len(content)}
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    whole, _ = read(path)
    kept = set()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        good, bad = read(path)
        assert good == whole[: len(good)]
        assert [reject.reason for reject in bad] == ([] if size in borders else ["truncated archive"]), size
        if good and bad:
            assert bad[0].offset > good[-1].offset and bad[0].line > good[-1].line
        kept.add(len(good))
    assert len(kept) > 1 and max(kept) >= 40


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_cut_archive_of_many_blocks_keeps_what_others_can_decompress(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(4)
    lines = [json.dumps({"text": rng.randbytes(rng.randrange(1, 2000)).hex()}).encode() for _ in range(400)]
    content = compress(suffix, b"\n".join(lines))
    path = tmp_path / f"a{suffix}"
    for size in rng.sample(range(1, len(content)), 25):
        path.write_bytes(content[:size])
        if suffix == ".jsonl.gz":
            readable = zlib.decompressobj(31).decompress(content[:size])
        else:
            readable = zstandard.ZstdDecompressor().stream_reader(content[:size]).read()
        whole = readable.count(b"\n")
        good, bad = read(path)
        assert [document.data for document in good] == [json.loads(line)["text"].encode() for line in lines[:whole]]
        assert [(r.reason, r.line, r.offset) for r in bad] == [("truncated archive", whole, readable.rfind(b"\n") + 1)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("garbage", [b"garbage, more than a header", b"\x01\x02"])
def test_garbage_after_an_archive_is_a_reject(tmp_path: Path, suffix: str, garbage: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(suffix, jsonl(20)) + garbage)
    good, bad = read(path)
    assert len(good) == 20
    assert [reject.reason in ("damaged archive", "truncated archive") for reject in bad] == [True]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_no_flipped_bit_of_an_archive_goes_unseen(tmp_path: Path, suffix: str) -> None:
    """Both formats carry a checksum of the content: either a reject says so, or the documents are those written."""
    content = compress(suffix, jsonl(40))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    whole = texts(path)
    rng = random.Random(2)
    for _ in range(300):
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        good, bad = read(path)
        assert bad or [document.data for document in good] == whole, bit


def test_zstd_checksum_or_size_is_not_needed(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False)
    path = tmp_path / "a.jsonl.zst"
    content = compressor.compress(jsonl(40))
    path.write_bytes(content)
    assert len(texts(path)) == 40
    path.write_bytes(content[:-1])
    assert read(path)[1][0].reason == "truncated archive"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_compression_bomb_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """256 MB of one line out of a few hundred KB at most: never more than 34 MB at once, then one reject."""
    monkeypatch.setattr(streams, "FREE_EXPANSION_BYTES", 1 << 30)
    size = 256 << 20
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl.zst":
        compressor = zstandard.ZstdCompressor(level=1).compressobj()
        path.write_bytes(b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush())
    else:
        packer = zlib.compressobj(1, wbits=31)
        path.write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush())
    assert path.stat().st_size < size // 200
    chunks = streams.zstd_chunks if suffix == ".jsonl.zst" else streams.gzip_chunks
    with open(path, "rb") as file:
        sizes = [len(chunk) for chunk in chunks(file)]
    assert sum(sizes) == size and max(sizes) <= 34 << 20
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 1 << 20)
    good, bad = read(path)
    assert good == [] and [(reject.reason, reject.line, reject.offset) for reject in bad] == [("too long", 0, 0)]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\x00two\n")
    assert texts(path) == [b"one\r\n\x00two\n"]
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\xff")
    assert [(r.reason, r.line, r.offset) for r in read(path)[1]] == [("invalid UTF-8", 1, 10)]
    path.write_bytes(b"")
    assert [(r.reason, r.line, r.offset) for r in read(path)[1]] == [("empty document", 0, 0)]
    path.write_bytes(b"x")
    assert [r.reason for r in read(path, "group")[1]] == ["missing key"]


PARQUET_TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.string_view()]


@pytest.mark.parametrize("kind", PARQUET_TYPES, ids=str)
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType) -> None:
    values = [f"row {number} é" if number % 5 else None for number in range(23)]
    table = pa.table({"id": list(range(23)), "text": pa.array(values, pa.string()).cast(kind)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4)
    good, bad = read(path)
    assert [(d.data.decode(), d.line) for d in good] == [(value, line) for line, value in enumerate(values) if value]
    assert [(r.reason, r.line) for r in bad] == [("not a string", line) for line in range(0, 23, 5)]
    monkeypatch.setattr(inputs, "TASK_BYTES", 1)
    assert len(make_tasks(find_inputs([str(path)]))) == 6
    assert read(path) == (good, bad)


def test_parquet_traps(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": invalid}), path)
    good, bad = read(path)
    assert [d.data for d in good] == [b"ok"] and [(r.reason, r.line) for r in bad] == [("invalid UTF-8", 1)]
    pq.write_table(pa.table({"text": ["", "x"], "n": [1, 2]}), path)
    assert [r.reason for r in read(path)[1]] == ["empty document"]
    assert [r.reason for r in read(path, "group")[1]] == ["missing key"] * 2
    assert [r.reason for r in read(path, "n")[1]] == ["empty document", "not a string"]
    pq.write_table(pa.table({"content": ["a", "b", "c"]}), path)
    assert [(r.reason, r.line) for r in read(path)[1]] == [("missing key", line) for line in range(3)]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert read(path) == ([], [])
    pq.write_table(pa.table({"text": ["a", "b"], "meta": [{"source": "web"}, None]}), path)
    good, bad = read(path, "meta.source")
    assert [d.group for d in good] == ["web"] and [r.reason for r in bad] == ["not a string"]


def test_damaged_parquet_counts_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(3)
    values = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(30)]
    pq.write_table(pa.table({"text": values}), path, row_group_size=10, use_dictionary=False, write_page_checksum=True)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    good, bad = read(path)
    assert [d.data.decode() for d in good] == values[:10] + values[20:]
    assert [(r.reason, r.line, r.documents) for r in bad] == [("damaged file", 10, 10)]
    path.write_bytes(content[:-10])
    good, bad = read(path)
    assert good == [] and [(r.reason, r.documents) for r in bad] == [("damaged file", 1)]


def test_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", OK, OK)
    (task,) = make_tasks(find_inputs([str(path)]))
    write_lines(path, OK, OK, OK)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while"):
        list(PieceReader(task.pieces[0], "text", None))


def test_inputs_in_name_order_from_files_folders_and_patterns(tmp_path: Path) -> None:
    names = ["b.jsonl", "a/2.txt", "a/1.JSONL.GZ", "a/b/c.parquet", "a/notes.md", "c.jsonl.zst"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    wanted = sorted(set(names) - {"a/notes.md"})
    assert [source.name for source in find_inputs([str(tmp_path)])] == wanted
    shuffled = [str(tmp_path / "c.*"), str(tmp_path / "b.jsonl"), str(tmp_path / "a")]
    assert [source.name for source in find_inputs(shuffled)] == wanted
    assert [source.name for source in find_inputs([str(tmp_path / "**/*.txt")])] == ["2.txt"]


@pytest.mark.parametrize("argument", ["no-such-file.jsonl", "*.txt", "empty", "a.csv"])
def test_inputs_that_name_nothing_are_refused(tmp_path: Path, argument: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(UserError, match=r"no such file|no file|ends in none"):
        find_inputs([str(tmp_path / argument)])


def test_input_named_twice_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", OK)
    with pytest.raises(UserError, match=r"a\.jsonl: named twice"):
        find_inputs([str(path), str(tmp_path)])


def test_tasks_pack_small_files_and_cut_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TASK_BYTES", 100)
    for name, size in {"a.txt": 40, "b.txt": 50, "c.jsonl": 250, "d.txt": 10, "e.jsonl": 0}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    tasks = make_tasks(find_inputs([str(tmp_path)]))
    assert [[(p.source.name, p.start, p.stop) for p in task.pieces] for task in tasks] == [
        [("a.txt", 0, 40), ("b.txt", 0, 50)],
        [("c.jsonl", 0, 100)],
        [("c.jsonl", 100, 200)],
        [("c.jsonl", 200, 250), ("d.txt", 0, 10), ("e.jsonl", 0, 0)],
    ]
