"""Inputs made to exhaust memory or time: each is read in a process of its own, whose peak memory and time are bounded.

The limits: 1 GiB over what the process had before it read anything, and 60 s.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcpt.data_prep.inspect_shards import verify
from fastcpt.integrity import DamagedError, sha256_json
from fastcpt.shards import MANIFEST

SECONDS = 60
MEMORY = 1 << 30
OK = b'{"text": "fine"}\n'
FINE = ["fine", 4]
# Prints {"good": [[start of the text, its bytes]], "bad": [[reason, line, offset, documents]], "lines", "memory"}; the
# limit of the address space keeps a failure of this test from taking the machine with it.
READ = """
import json, resource, sys
from fastcpt.data_prep.inputs import find_inputs, make_tasks
from fastcpt.data_prep.documents import Document
from fastcpt.data_prep.readers import PieceReader

def highest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
good, bad, lines, before = [], [], 0, highest()
for task in make_tasks(find_inputs(sys.argv[1:])):
    for piece in task.pieces:
        reader, documents = PieceReader(piece, "text", None), 0
        for item in reader:
            documents += 1 if isinstance(item, Document) else item.documents
            if isinstance(item, Document):
                good.append([item.data[:8].decode("utf-8", "ignore"), len(item.data)])
            else:
                bad.append([item.reason, lines + item.line, item.offset, item.documents])
        assert documents == reader.lines - reader.blank, (documents, reader.lines, reader.blank)
        lines += reader.lines
print(json.dumps({"good": good, "bad": bad, "lines": lines, "memory": highest() - before}))
"""
PREP = """
import json, sys
from fastcpt.data_prep.pretokenize import prep

def highest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

before = highest()
(manifest,) = prep([sys.argv[1]], tokenizer=sys.argv[2], output=sys.argv[3], workers=1, quiet=True)
print(json.dumps({"documents": manifest["documents"], "text": manifest["text_bytes"], "memory": highest() - before}))
"""


def bounded(code: str, *arguments: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["memory"] < MEMORY, f"{result['memory'] >> 20} MiB over what there was"
    return result


def read(path: Path, content: bytes | None = None) -> tuple[list[list[Any]], list[list[Any]], int]:
    if content is not None:
        path.write_bytes(content)
    result = bounded(READ, path)
    return result["good"], result["bad"], result["lines"]


def frame(*blocks: tuple[bytes, int], window_log: int = 20) -> bytes:
    """A zstd frame by hand: (bytes, 0) is a raw block, (byte, n) are n blocks of 128 KiB of that byte, 4 bytes each."""
    out = []
    for data, times in blocks:
        kind, size = (1, 1 << 17) if times else (0, len(data))
        out += [((kind << 1 | size << 3).to_bytes(3, "little") + data)] * max(1, times)
    out[-1] = bytes((out[-1][0] | 1,)) + out[-1][1:]
    return b"\x28\xb5\x2f\xfd\x00" + bytes(((window_log - 10) << 3,)) + b"".join(out)


BLOCKS_A_GIB = 1 << 13


def test_zstd_bomb_of_one_line(tmp_path: Path) -> None:
    """32 GiB out of 1 MiB: reading ends by the rule of 1,000 to 1; what came before is kept."""
    good, bad, _ = read(tmp_path / "a.jsonl.zst", frame((OK, 0)) + frame((b"x", 32 * BLOCKS_A_GIB)))
    assert good == [FINE] and bad[-1][0] == "compression bomb" and len(bad) <= 2


def test_zstd_bomb_of_empty_lines(tmp_path: Path) -> None:
    good, bad, lines = read(tmp_path / "a.jsonl.zst", frame((OK, 0), (b"\n", 32 * BLOCKS_A_GIB)))
    assert good == [FINE] and [reject[0] for reject in bad] == ["compression bomb"] and lines < 1 << 30


def test_empty_lines_that_are_no_bomb(tmp_path: Path) -> None:
    """Little enough may expand as it likes: all is read."""
    good, bad, lines = read(tmp_path / "a.jsonl.zst", frame((b"\n", BLOCKS_A_GIB // 64), (OK, 0)))
    assert (good, bad, lines) == ([FINE], [], (1 << 24) + 1)


def test_gzip_bomb(tmp_path: Path) -> None:
    """32 GiB out of 33 MB, about the most that gzip can do: members of 64 MiB of zeros, 1,028 to 1."""
    member = gzip.compress(bytes(64 << 20), 9)
    assert (64 << 20) / len(member) > 1000
    good, bad, _ = read(tmp_path / "a.jsonl.gz", gzip.compress(OK) + member * 512)
    assert good == [FINE] and bad[-1][0] == "compression bomb" and len(bad) <= 2


def test_zstd_window_of_2_gib(tmp_path: Path) -> None:
    good, bad, _ = read(tmp_path / "a.jsonl.zst", frame((OK, 0), window_log=31))
    assert good == [] and [reject[0] for reject in bad] == ["damaged archive"]


def test_line_of_1_gb_in_an_archive(tmp_path: Path) -> None:
    """Not a bomb: it shrinks to a 500th."""
    content = frame((OK, 0), (b'{"text": "', 0), *[(b"x", 1), (b"x" * 256, 0)] * (10**9 >> 17), (b'"}\n' + OK, 0))
    good, bad, lines = read(tmp_path / "a.jsonl.zst", content)
    assert (good, bad, lines) == ([FINE, FINE], [["too long", 1, len(OK), 1]], 3)


def test_line_of_4_gib(tmp_path: Path) -> None:
    """In 128 pieces, of which none but the first may read it to its end. A file with a hole takes no place on disk."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(OK)
        file.seek(4 << 30)
        file.write(b"\n" + OK)
    good, bad, lines = read(path)
    assert (good, bad, lines) == ([FINE, FINE], [["too long", 1, len(OK), 1]], 3)


def test_parquet_value_that_many_rows_share(tmp_path: Path) -> None:
    """2 GB of text out of 2 KB: a dictionary holds the value once."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array(["x" * (32 << 20)]))
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", compression="zstd")
    good, bad, _ = read(tmp_path / "a.parquet")
    assert sum(reject[3] for reject in bad) + len(good) == 60
    assert all(document == ["x" * 8, 32 << 20] for document in good)


@pytest.mark.parametrize("inside", [b"[ ]", b'{"a": }', b'[{"text": }]'])
@pytest.mark.parametrize("closed", [True, False])
def test_depth_of_100_000(tmp_path: Path, inside: bytes, closed: bool) -> None:
    start, end = inside.split(b" ")[0], inside.split(b" ")[-1]
    line = b'{"text": "x", "deep": ' + start * 100_000 + b"1" + (end * 100_000 if closed else b"") + b"}\n"
    good, bad, _ = read(tmp_path / "a.jsonl", OK + line + OK)
    assert good == [FINE, FINE] and [reject[:2] for reject in bad] == [["broken JSON", 1]]


@pytest.mark.parametrize("place", ["last", "nowhere"])
def test_a_million_keys(tmp_path: Path, place: str) -> None:
    keys = [b'"key %d": %d' % (number, number) for number in range(1_000_000)]
    if place != "nowhere":
        keys.append(b'"text": "x"')
    good, bad, _ = read(tmp_path / "a.jsonl", b"{" + b", ".join(keys) + b"}\n")
    assert (good, [reject[0] for reject in bad]) == (([["x", 1]], []) if place != "nowhere" else ([], ["missing key"]))


@pytest.mark.parametrize("words", ["The data of the 123 data, don't\n", "日本語の文章は空白で区切られていない。"])
def test_document_of_50_million_characters(tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import soak_corpus

    text = (words * (50_000_000 // len(words) + 1))[:50_000_000]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    # An id a character, as real tokenizers have for scripts that they saw little of.
    tokenizer = soak_corpus.tokenizer(tmp_path / "tokenizer", " ".join(words))
    result = bounded(PREP, tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert (result["documents"], result["text"]) == (1, len(text.encode()))


@pytest.mark.parametrize("start", ["../outside/", "{outside}/", "link/", "./"])
@pytest.mark.parametrize("what", ["pair", "file"])
def test_manifest_that_names_a_file_elsewhere(
    tmp_path: Path, write_shards: Any, random_documents: Any, what: str, start: str
) -> None:
    """Refused before it is opened: what it names is a pipe that would be waited for without end."""
    shards = write_shards(tmp_path / "set", random_documents(0, 20))
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "set" / "link").symlink_to(outside)
    name = start.format(outside=outside) + ("tokenizer.json" if what == "file" else shards.pairs[0]["name"])
    for end in ("tokenizer.json", "shard-00000.bin", "shard-00000.idx", "shard-00000.sums"):
        os.mkfifo(outside / end)
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_bytes())
    del manifest["sha256"]
    if what == "file":
        manifest["files"][name] = manifest["files"].pop("tokenizer.json")
    else:
        manifest["pairs"][0]["name"] = name
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
    with pytest.raises(DamagedError, match=r"manifest\.json: names a file "):
        verify(tmp_path / "set", quiet=True)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "..", "", None, 5, ["a"], {}])
def test_manifest_whose_names_are_none(tmp_path: Path, write_shards: Any, random_documents: Any, name: Any) -> None:
    write_shards(tmp_path / "set", random_documents(0, 20))
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_bytes())
    del manifest["sha256"]
    manifest["pairs"][0]["name"] = name
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
    with pytest.raises(DamagedError, match=r"set"):
        verify(tmp_path / "set", quiet=True)


def test_odd_characters_are_kept_or_dropped_as_documented(tmp_path: Path) -> None:
    """Kept: all of a text, raw or escaped. Dropped: the mark at a file's start, the carriage return at a line's end."""
    odd = "\ufeffa\u2028b\u2029c\x85d\x0be\x1cf\r\n\x00\x7f"
    lines = [json.dumps({"text": odd}, ensure_ascii=ascii).encode() for ascii in (True, False)]
    content = b"\xef\xbb\xbf" + b"\r\n".join(
        [*lines, b"", b"\x00", b'{"text": "a\x00"}', b"\xef\xbb\xbf" + OK.strip(), OK]
    )
    good, bad, count = read(tmp_path / "a.jsonl", content)
    kept = [odd.encode()[:8].decode(errors="ignore"), len(odd.encode())]
    assert good == [kept, kept, FINE]
    assert [reject[:2] for reject in bad] == [["broken JSON", 3], ["broken JSON", 4], ["broken JSON", 5]]
    assert count == 7
