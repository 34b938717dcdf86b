"""Other ways to do what `fastcpt prep` does, each a process of its own. `bench_prep` runs them, by path.

    python prep_rivals.py NAME --tokenizer FILE --output FOLDER --workers N --eod TOKEN --eod-id ID --dtype uint16 FILE ...

The last line that it prints is JSON: documents, tokens (one end-of-document token a document among them) and the
versions used; or the name of a module that is not installed. Nothing here imports fastcpt, so that any interpreter that
has the rivals can run it. `megatron` and `nanogpt` are our code in the way of theirs: the scripts themselves are on no
package index. The others call the rival's own functions.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BATCH_BYTES = 4 << 20
PIECE_BYTES = 32 << 20
tokenizer: Any = None  # of this process
eod_id = 0
dtype = np.dtype(np.uint16)
Piece = tuple[int, str, int, int]  # number, path, first byte, end


def _lines(path: str, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in bytes [start, stop) of a .jsonl; all of a .jsonl.zst, decompressed as a stream."""
    if path.endswith(".zst"):
        import zstandard

        with open(path, "rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
            raw: Any = stream
            yield from io.BufferedReader(raw, 1 << 20)
        return
    with open(path, "rb", 1 << 20) as file:
        at = max(0, start - 1)
        file.seek(at)
        if start:
            at += len(file.readline())
        while at < stop and (line := file.readline()):
            at += len(line)
            yield line


def _pieces(files: list[str]) -> list[Piece]:
    """Parts of a .jsonl, which can be cut, and whole .zst files, which cannot; in order of the files."""
    pieces: list[tuple[str, int, int]] = []
    for path in files:
        size = os.path.getsize(path)
        step = size if path.endswith(".zst") else PIECE_BYTES
        pieces += [(path, start, min(start + step, size)) for start in range(0, size, step)]
    return [(number, *piece) for number, piece in enumerate(pieces)]


def _batches(piece: Piece) -> Iterator[list[str]]:
    import orjson

    batch: list[str] = []
    size = 0
    for line in _lines(*piece[1:]):
        batch.append(orjson.loads(line)["text"])
        size += len(line)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _over_pieces(function: Any, load: Any, arguments: argparse.Namespace) -> tuple[int, int]:
    """Runs function(piece) in worker processes, the largest first; documents and tokens of all."""
    pieces = sorted(_pieces(arguments.files), key=lambda piece: piece[2] - piece[3])
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.workers, context, initializer=load, initargs=(arguments,)) as pool:
        counts = list(pool.map(function, pieces))
    return sum(documents for documents, _ in counts), sum(tokens for _, tokens in counts)


def _load_gigatoken(arguments: argparse.Namespace) -> None:
    global tokenizer
    import gigatoken

    tokenizer = gigatoken.Tokenizer(arguments.tokenizer)


def _count_piece(piece: Piece) -> tuple[int, int]:
    documents = tokens = 0
    for batch in _batches(piece):
        offsets = np.asarray(tokenizer.encode_batch(batch, parallel=False).layout.offsets.data)
        documents += len(batch)
        tokens += int(offsets[-1] - offsets[0]) + len(batch)
    return documents, tokens


def bare(arguments: argparse.Namespace) -> tuple[int, int]:
    """gigatoken alone: what any user of it has to do, and nothing kept."""
    import gigatoken  # noqa: F401 (missing ones are said before processes start)
    import orjson  # noqa: F401

    return _over_pieces(_count_piece, _load_gigatoken, arguments)


def _load_tokenizers(arguments: argparse.Namespace) -> None:
    global tokenizer, eod_id, dtype
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizers.Tokenizer.from_file(arguments.tokenizer)
    eod_id, dtype = arguments.eod_id, np.dtype(arguments.dtype)
    Path(arguments.output).mkdir(exist_ok=True)
    os.chdir(arguments.output)


def _write_piece(piece: Piece) -> tuple[int, int]:
    documents = tokens = 0
    with open(f"{piece[0]:06}.bin", "wb") as file:
        for batch in _batches(piece):
            for row in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.array([*row.ids, eod_id], dtype)
                ids.tofile(file)
                documents += 1
                tokens += len(ids)
    return documents, tokens


def tokenizers_pool(arguments: argparse.Namespace) -> tuple[int, int]:
    """`tokenizers` in a pool of processes, each of which reads, parses with orjson and writes its own .bin."""
    import orjson  # noqa: F401
    import tokenizers  # noqa: F401

    return _over_pieces(_write_piece, _load_tokenizers, arguments)


def _encode_line(line: bytes) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(eod_id)
    return ids, [len(ids)]


def megatron(arguments: argparse.Namespace) -> tuple[int, int]:
    """Megatron's way: one process reads lines and hands them to a pool, takes the ids back in order and builds the pair.

    The builder is megatron-core's. Beside it their script imports more, and loads the tokenizer through transformers.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load_tokenizers(arguments)
    kind = DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder("all.bin", dtype=kind)
    documents = tokens = 0
    with multiprocessing.get_context("fork").Pool(arguments.workers, _load_tokenizers, (arguments,)) as pool:
        lines = (line for path in arguments.files for line in _lines(path, 0, os.path.getsize(path)))
        for ids, lengths in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, lengths)
            documents += 1
            tokens += len(ids)
        pool.close()
        pool.join()
    builder.finalize("all.idx")
    return documents, tokens


def _tiktoken_ranks(path: str) -> dict[bytes, int]:
    """The ids of a byte-level tokenizer.json as ranks, which they are where its merges are in the order of its ids."""
    content = json.loads(Path(path).read_bytes())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    added = {token["content"] for token in content["added_tokens"]}
    return {
        bytes(alphabet[char] for char in token): index
        for token, index in content["model"]["vocab"].items()
        if token not in added
    }


def _load_tiktoken(path: str) -> Any:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's, and GPT-NeoX's

    ranks = _tiktoken_ranks(path)
    return tiktoken.Encoding(name="bench", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def nanogpt(arguments: argparse.Namespace) -> tuple[int, int]:
    """nanoGPT's way: `datasets` maps tiktoken over all rows in processes; one process then copies them to a memmap.

    Without the normalizer and the added tokens, which tiktoken has no place for: not quite the same ids.
    """
    output = Path(arguments.output)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(output / "cache"), HF_DATASETS_CACHE=str(output / "cache"))
    import datasets
    import tiktoken  # noqa: F401

    datasets.disable_progress_bars()
    encoding: list[Any] = []  # of each worker, built when it is first needed

    def process(row: dict[str, Any]) -> dict[str, Any]:
        if not encoding:
            encoding.append(_load_tiktoken(arguments.tokenizer))
        ids = encoding[0].encode_ordinary(row["text"])
        ids.append(arguments.eod_id)
        return {"ids": ids, "len": len(ids)}

    rows = datasets.load_dataset("json", data_files=arguments.files, split="train", num_proc=arguments.workers)
    rows = rows.map(process, remove_columns=rows.column_names, num_proc=arguments.workers)
    total = int(np.sum(rows["len"], dtype=np.uint64))
    out = np.memmap(output / "all.bin", dtype=arguments.dtype, mode="w+", shape=(total,))
    parts, at = min(1024, len(rows)), 0
    for index in range(parts):
        part = rows.shard(num_shards=parts, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()
    return len(rows), total


def datatrove(arguments: argparse.Namespace) -> tuple[int, int]:
    """datatrove's DocumentTokenizer, a task a worker, documents left in their order."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["DATATROVE_COLORIZE_LOGS"] = "0"
    folder, names = os.path.dirname(arguments.files[0]), [os.path.basename(path) for path in arguments.files]
    output = Path(arguments.output)
    output.mkdir(exist_ok=True)
    (output / "names").write_text("\n".join(names))
    step = DocumentTokenizer(
        str(output), arguments.tokenizer, eos_token=arguments.eod, shuffle_documents=False, batch_size=1000
    )
    LocalPipelineExecutor(
        [JsonlReader(folder, paths_file=str(output / "names")), step],
        tasks=arguments.workers, workers=arguments.workers, logging_dir=str(output / "logs"), start_method="fork",
    ).run()  # fmt: skip
    wide = np.dtype(arguments.dtype).itemsize
    tokens = sum(path.stat().st_size for path in output.glob("*.ds")) // wide
    return sum(path.stat().st_size for path in output.glob("*.ds.index")) // 8, tokens


WAYS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bare": (bare, ("gigatoken", "orjson", "zstandard")),
    "tokenizers": (tokenizers_pool, ("tokenizers", "orjson", "zstandard")),
    "megatron": (megatron, ("megatron-core", "tokenizers", "torch")),
    "nanogpt": (nanogpt, ("datasets", "tiktoken")),
    "datatrove": (datatrove, ("datatrove", "tokenizers")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=WAYS)
    parser.add_argument("files", nargs="+")
    for option, kind in (("tokenizer", str), ("output", str), ("workers", int), ("eod", str), ("eod-id", int)):
        parser.add_argument(f"--{option}", type=kind, required=True)
    parser.add_argument("--dtype", default="uint16")
    arguments = parser.parse_args()
    way, packages = WAYS[arguments.name]
    try:
        documents, tokens = way(arguments)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}))
        return
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"documents": documents, "tokens": tokens, "versions": versions}))


if __name__ == "__main__":
    main()
