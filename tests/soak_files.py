"""Damaged files of every kind: read to the end without a crash, in bounded memory and time, every line accounted for.

What is read of a damaged archive is compared with what the gzip module, the zstd command and a decompressor that is fed
byte by byte make of it; each line with `soak_lines.expected`. A parquet file has no checksum of its footer and page
headers, so of a damaged one only the accounting is checked, and that what is undamaged is whole.
"""

import gzip
import io
import json
import random
import subprocess
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import soak_lines
import zstandard

from fastcpt.data_prep import inputs
from fastcpt.data_prep.documents import Document, Reject

UNIT = 1
SECONDS = 60
MEMORY = 1 << 30
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ARCHIVE = ("damaged archive", "truncated archive")
ZEROS = bytes(1 << 12)


def make_texts(rng: random.Random) -> list[str]:
    longest = int(10 ** rng.uniform(0.5, 3.5))
    return [
        "".join(rng.choices("abc é日\n\u2028", k=rng.randrange(1, longest)))
        for _ in range(int(10 ** rng.uniform(0, 2.5)))
    ]


def gzipped(rng: random.Random, parts: list[bytes]) -> bytes:
    end = rng.choice([b"", b"", bytes(rng.randrange(600))])
    return b"".join(gzip.compress(part, rng.randrange(10), mtime=0) for part in parts) + end


def zstandarded(rng: random.Random, parts: list[bytes]) -> bytes:
    out = []
    for part in parts:
        options = {"level": rng.choice([-5, 1, 3, 9]), "write_checksum": rng.random() < 0.5}
        compressor = zstandard.ZstdCompressor(**options, write_content_size=rng.random() < 0.5)
        stream = compressor.compressobj()
        out.append(compressor.compress(part) if rng.random() < 0.5 else stream.compress(part) + stream.flush())
        if rng.random() < 0.1:
            out.append(b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"skips")
    return b"".join(out)


def parquet(rng: random.Random, texts: list[str]) -> bytes:
    columns: dict[str, Any] = {"id": list(range(len(texts))), "text": texts}
    if rng.random() < 0.3:
        columns["text"] = pa.array(texts, pa.large_string())
    file = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=rng.choice([3, 50, 1000]),
        compression=rng.choice(["none", "snappy", "gzip", "zstd"]),
        use_dictionary=rng.random() < 0.5,
        write_page_checksum=rng.random() < 0.7,
        data_page_version=rng.choice(["1.0", "2.0"]),
    )
    return file.getvalue()


def make_file(rng: random.Random, texts: list[str], kind: str) -> bytes:
    if kind == ".parquet":
        return parquet(rng, texts)
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    data = b"\n".join(lines + [b""] * rng.randrange(3))
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
    return data if kind == ".jsonl" else gzipped(rng, parts) if kind == ".jsonl.gz" else zstandarded(rng, parts)


def damaged(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """(kind of damage, the file). May be no damage at all, and says so."""
    at = rng.randrange(len(data) + 1)
    length = int(10 ** rng.uniform(0, 4))
    kind = rng.choice(
        ["flip"] * 4 + ["flips", "cut", "cut", "append", "insert", "zeros", "remove", "repeat", "empty", "none"]
    )
    if kind in ("flip", "flips") and data:
        changed = bytearray(data)
        for _ in range(1 if kind == "flip" else rng.randrange(2, 50)):
            bit = rng.randrange(8 * len(data))
            if kind == "flip" and rng.random() < 0.4:  # near the ends, where headers and footers are
                bit = rng.choice([bit % min(len(data) * 8, 256), max(0, len(data) * 8 - 1 - bit % 2048)])
            changed[bit // 8] ^= 1 << bit % 8
        return kind, bytes(changed)
    garbage = rng.choice([rng.randbytes(length), ZEROS[:length], data[:length], gzip.compress(b"{}\n"), b"\n"])
    return kind, {
        "cut": data[:at],
        "append": data + garbage,
        "insert": data[:at] + garbage + data[at:],
        "zeros": (data[:at] + ZEROS[:length] + data[at + length :])[: len(data)],
        "remove": data[:at] + data[at + length :],
        "repeat": data[:at] + data[max(0, at - length) :],
        "empty": b"",
    }.get(kind, data)


def recovered(data: bytes, kind: str) -> bytes:
    """All that comes out of an archive before its damage, which it must be fed byte by byte to give."""
    stream: Any = None
    out = []
    try:
        for index in range(len(data)):
            byte = data[index : index + 1]
            if stream is None:
                if kind == ".jsonl.gz" and index and byte == b"\0":
                    continue
                stream = zlib.decompressobj(31) if kind == ".jsonl.gz" else zstandard.ZstdDecompressor().decompressobj()
            out.append(stream.decompress(byte))
            if stream.eof:
                stream = None
    except (zlib.error, zstandard.ZstdError):
        pass
    return b"".join(out)


def is_whole(data: bytes, path: Path, kind: str) -> bool | None:
    """Whether an independent decompressor finds an archive whole; None if it cannot say."""
    if kind == ".jsonl.zst":
        done = subprocess.run(["zstd", "-dcq", str(path)], check=False, capture_output=True, timeout=SECONDS)
        other = b"\x1f\x8b\x08" in data or not data  # the command reads gzip too, and takes an empty file
        if other or done.returncode:
            return None if other else False
        try:  # newer versions of the library see damage, where there is no checksum, that older ones do not
            pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
        except OSError:
            return None
        return True
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except (EOFError, OSError, zlib.error):
        return False
    try:  # the gzip module does not look at a header's reserved flags and checksum
        zlib.decompressobj(31).decompress(data[:4096])
    except zlib.error:
        return None
    return len(data) > 0


def check_archive(data: bytes, path: Path, kind: str, items: list[tuple[int, Any]], lines: int, blank: int) -> str:
    """Whole: all lines are as expected. Else: those before the one reject at the end, and the right lines."""
    content, whole = recovered(data, kind), is_whole(data, path, kind)
    rejects = [item for _, item in items if isinstance(item, Reject) and item.reason in ARCHIVE]
    if not rejects:
        assert whole is not False, "damage that an independent decompressor sees went unseen"
        soak_lines.check(content, None, items, lines, blank)
        return "whole"
    assert whole is not True, f"rejected, but an independent decompressor finds nothing wrong: {rejects}"
    assert len(rejects) == 1 and items[-1][1] is rejects[0] and items[-1][0] == lines - 1, rejects
    before = content.split(b"\n")[: lines - 1]
    assert len(before) == lines - 1 <= content.count(b"\n"), "lines that are not there"
    soak_lines.check(b"".join(line + b"\n" for line in before), None, items[:-1], lines - 1, blank)
    return "damage seen"


def prepare(folder: Path, seed: int) -> None:
    pass


def trial(rng: random.Random, folder: Path, prepared: None) -> Counter[str]:
    kind = suffix = rng.choice(SUFFIXES)
    texts = make_texts(rng)
    original = make_file(rng, texts, kind)
    damage, data = damaged(rng, original)
    if rng.random() < 0.2:
        damage, data = f"{damage} twice", damaged(rng, data)[1]
    if rng.random() < 0.05:
        suffix = rng.choice(SUFFIXES)
    path = folder / f"a{suffix}"
    path.write_bytes(data)
    normal, inputs.TASK_BYTES = inputs.TASK_BYTES, rng.choice([inputs.TASK_BYTES, 1000])
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    try:
        items, lines, blank = soak_lines.read(path, None)
    finally:
        inputs.TASK_BYTES = normal
    assert memory("VmHWM") - before < MEMORY, f"{(memory('VmHWM') - before) >> 20} MiB over what there was"
    if suffix == ".jsonl":
        soak_lines.check(data, None, items, lines, blank)
        outcome = "checked by lines"
    elif suffix == ".parquet":
        good = [item.data.decode() for _, item in items if isinstance(item, Document)]
        assert data != original or suffix != kind or good == texts, "undamaged, and not whole"
        assert [line for line, _ in items] == sorted({line for line, _ in items}), "lines that are not in order"
        outcome = (
            "whole" if good == texts else "damage seen" if any(isinstance(i, Reject) for _, i in items) else "unseen"
        )
    else:
        outcome = check_archive(data, path, suffix, items, lines, blank)
    return Counter(files=1, lines=lines) + Counter([f"{suffix}: {outcome}", damage.split()[0]])


def memory(field: str) -> int:
    """VmRSS: what there is, VmHWM: the most there was since it was reset; in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10
