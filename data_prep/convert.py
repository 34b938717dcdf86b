"""Token files of other projects (`foreign.py`) into a shard set: `convert` is what `fastcpt convert` runs.

Files are read once, a block at a time; whole documents go on to pairs that are cut where `prep` would cut them, so that
the same documents are the same set, whoever tokenized them. A block, the document that it began and one pair's lengths
are in memory. The set is built in `OUTPUT.partial` and renamed into place at the end; a run that stops starts anew.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fastcpt import UserError
from fastcpt.data_prep import encoding, foreign, merge, pretokenize, store
from fastcpt.data_prep.encoding import Vocabulary
from fastcpt.data_prep.foreign import FORMATS, SEQUENCE_TOKENS, Format, Source, TokenFile
from fastcpt.data_prep.inputs import Input
from fastcpt.data_prep.parts import building_folder, refuse_existing
from fastcpt.data_prep.progress import Meter
from fastcpt.shards import PairWriter, read_manifest

# A longer document is a wrong end-of-document token: it would be in memory as a whole. A pair's index ends at 2^31.
MAX_DOCUMENT_TOKENS = 1 << 28


def convert(
    inputs: list[str],
    *,
    source: Source,
    tokenizer: str,
    output: str | Path,
    eod: str | None = None,
    dtype: str | None = None,
    append_eod: bool = False,
    shard_tokens: int = 1_000_000_000,
    quiet: bool = False,
) -> dict[str, Any]:
    """Copies files, folders and glob patterns of token ids into one shard set. Returns its manifest plus its "path".

    tokenizer: the one that made the ids. eod: the token that ends (llmc: begins) a document. dtype: "uint16" or
    "uint32" of files that do not say (nanogpt, olmo, datatrove). append_eod: a document that ends without the
    end-of-document token gets one; else it is refused. Pre-shuffled Pythia sequences stay as they are.

    Raises UserError with file, byte offset and value for whatever is wrong in an input.
    """
    output = os.path.abspath(output)
    pretokenize.check_arguments(output, None, shard_tokens, 0.0)
    layout = FORMATS[source]
    if dtype is not None and not layout.takes_dtype:
        raise UserError(
            "dtype-not-needed", f"--dtype {dtype}: {source} files say themselves what they hold; leave it out"
        )
    if append_eod and layout.cut == "sequence":
        raise UserError(
            "append-eod-not-possible",
            f"--append-eod: {source} sequences are kept as they were trained on; leave it out",
        )
    refuse_existing(output, [""])
    tokenizer_json = encoding.load_tokenizer(tokenizer)
    vocabulary = encoding.read_vocabulary(tokenizer_json, eod, tokenizer)
    work = f"{output}.partial"
    with store.disk_errors(work):
        files = list(layout.open(foreign.find_files(inputs, source), vocabulary, dtype))
        with pretokenize.owned(work):
            if os.path.exists(store.join(work, "plan.json")):
                raise UserError(
                    "unfinished-prep",
                    f"{work}: an unfinished `fastcpt prep`; finish or remove it, or choose another --output",
                )
            try:
                directory = Path(building_folder(work, output, ""))
                shutil.rmtree(directory.parent, ignore_errors=True)
                directory.mkdir(parents=True)
                pairs = _Pairs(directory, vocabulary.dtype, shard_tokens)
                documents = _Documents(files, layout, vocabulary, tokenizer_json, append_eod, pairs)
                with Meter("convert", sum(file.tokens * file.dtype.itemsize for file in files), quiet) as meter:
                    documents.copy(meter)
                table = merge.ledger(_ledger_inputs(files), documents.records())
                merge.finish_set("", str(directory), pairs.close(), table, tokenizer_json, vocabulary)
                merge.mark_merged(work, [""])
                (path,) = merge.commit(output, work)
            except BaseException:  # there is nothing to go on from
                shutil.rmtree(work, ignore_errors=True)
                raise
    return {**read_manifest(Path(path)), "path": path}


def _ledger_inputs(files: list[TokenFile]) -> list[Input]:
    """Named as `prep` names its inputs: by their path below the folder that all share."""
    paths = [os.path.abspath(file.path) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    statuses = [os.stat(path) for path in paths]
    return [
        Input(Path(path).relative_to(root).as_posix(), path, Path(path).suffix, status.st_size, str(status.st_mtime_ns))
        for path, status in zip(paths, statuses)
    ]


class _Pairs:
    """Documents one after another, cut into pairs by the rule of `merge.cut_spans`."""

    def __init__(self, directory: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory, self._dtype, self._shard_tokens = directory, dtype, shard_tokens
        self._entries: list[dict[str, Any]] = []
        self._writer: PairWriter | None = None

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        ends = np.cumsum(lengths, dtype=np.int64)
        done = 0
        while done < len(ends):
            start = int(ends[done - 1]) if done else 0
            room = self._shard_tokens - (self._writer.tokens if self._writer else 0)
            stop = int(np.searchsorted(ends, start + room, side="right"))
            if stop <= done and self._writer:
                self._finish()
                continue
            stop = max(stop, done + 1)  # a document longer than a pair is one of its own
            if self._writer is None:
                self._writer = PairWriter(self._directory, f"shard-{len(self._entries):05d}", self._dtype)
            self._writer.write(tokens[start : int(ends[stop - 1])], lengths[done:stop])
            done = stop

    def _finish(self) -> None:
        if self._writer:
            self._entries.append(self._writer.close())
        self._writer = None

    def close(self) -> list[dict[str, Any]]:
        self._finish()
        return self._entries


class _Documents:
    """Blocks of tokens -> whole documents, checked, counted by the file that they start in, and written."""

    def __init__(
        self,
        files: list[TokenFile],
        layout: Format,
        vocabulary: Vocabulary,
        tokenizer_json: bytes,
        append_eod: bool,
        pairs: _Pairs,
    ) -> None:
        self._files, self._layout, self._vocabulary, self._pairs = files, layout, vocabulary, pairs
        self._append_eod = append_eod or layout.cut == "before EOD"
        self._force = append_eod
        self._text_bytes = encoding.token_bytes(tokenizer_json, vocabulary)
        self._counts = np.zeros((len(files), 3), np.int64)  # documents, tokens, text bytes
        # The document that is not whole yet: its blocks, and the file and token that it starts at.
        self._begun: list[np.ndarray] = []
        self._begun_at = (0, 0)

    def copy(self, meter: Meter) -> None:
        before = separators = 0  # tokens of the files before; documents that an EOD ended
        for number, file in enumerate(self._files):
            done = 0
            for block in file.blocks():
                self._check_ids(file, block, done)
                ids = block.astype(self._vocabulary.dtype)
                skip = int(self._layout.cut == "before EOD" and before + done == 0 and ids[0] == self._vocabulary.eod)
                ends = self._ends(file, ids, done, before + done)
                separators += len(ends)
                self._add(number, done + skip, ids[skip:], ends[skip:] - skip)
                done += len(block)
                meter.add(block.nbytes, len(block))
            before += file.tokens
            if self._begun and self._layout.cut == "after EOD":
                self._finish_last(file)
        if self._layout.cut == "before EOD" and not separators and not self._force:
            raise UserError("eod-absent", f"{self._files[0].path}: not one {self._eod} in all its tokens; {self._mend}")
        if self._begun:
            self._finish_last(self._files[-1])

    def records(self) -> list[dict[str, Any]]:
        """What `merge.ledger` makes rows of."""
        pieces = [
            {"input": number, "lines": counts[0], "blank": 0, "sets": {"": counts} if counts[0] else {}, "rejects": {}}
            for number, counts in enumerate(self._counts.tolist())
        ]
        return [{"pieces": pieces}]

    @property
    def _eod(self) -> str:
        return f"end-of-document token {self._vocabulary.eod_token!r} (id {self._vocabulary.eod})"

    @property
    def _mend(self) -> str:
        return "name the right token with --eod, get the file whole, or add what lacks with --append-eod"

    def _check_ids(self, file: TokenFile, block: np.ndarray, done: int) -> None:
        size = self._vocabulary.size
        if int(block.max()) < size and int(block.min()) >= 0:
            return
        at = int(np.flatnonzero((block < 0) | (block >= size))[0])
        kind = " or --dtype" if self._layout.takes_dtype else ""
        raise UserError(
            "token-beyond-vocabulary",
            f"{file.path}: byte {file.offset(done + at):,} is id {int(block[at]):,}, the tokenizer has ids 0 to "
            f"{size - 1:,}; check --tokenizer{kind}",
        )

    def _ends(self, file: TokenFile, ids: np.ndarray, done: int, total: int) -> np.ndarray:
        """Where in a block documents end. done, total: the tokens before it in its file and in all files."""
        if self._layout.cut == "sequence":
            return np.arange(SEQUENCE_TOKENS - total % SEQUENCE_TOKENS, len(ids) + 1, SEQUENCE_TOKENS)
        if file.ends is None:
            return np.flatnonzero(ids == self._vocabulary.eod) + 1
        first, last = np.searchsorted(file.ends, (done, done + len(ids)), side="right")
        ends = file.ends[first:last] - done
        if not self._append_eod and len(wrong := np.flatnonzero(ids[ends - 1] != self._vocabulary.eod)):
            at = int(ends[wrong[0]]) - 1
            raise UserError(
                "document-without-eod",
                f"{file.path}: document {first + int(wrong[0]):,} ends at byte {file.offset(done + at):,} with id "
                f"{int(ids[at])}, not the {self._eod}; {self._mend}",
            )
        return ends

    def _add(self, number: int, at: int, ids: np.ndarray, ends: np.ndarray) -> None:
        """ids: from token `at` of file `number` on; ends: in them."""
        done = 0
        if self._begun and len(ends):
            done = int(ends[0])
            self._write(self._begun_at[0], np.concatenate((*self._begun, ids[:done])), None)
            self._begun, ends = [], ends[1:]
        if len(ends):
            self._write(number, ids[done : int(ends[-1])], np.diff(ends, prepend=done))
            done = int(ends[-1])
        if done < len(ids):
            if not self._begun:
                self._begun_at = (number, at + done)
            self._begun.append(ids[done:].copy())
            if sum(map(len, self._begun)) > MAX_DOCUMENT_TOKENS:
                raise UserError(
                    "document-too-long",
                    f"{self._begun_place}: no {self._eod} in {MAX_DOCUMENT_TOKENS:,} tokens; check --eod",
                )

    @property
    def _begun_place(self) -> str:
        number, token = self._begun_at
        return f"{self._files[number].path}: from byte {self._files[number].offset(token):,} on"

    def _finish_last(self, file: TokenFile) -> None:
        """What comes after the last EOD."""
        if not self._append_eod:
            raise UserError(
                "document-without-eod",
                f"{self._begun_place}: {sum(map(len, self._begun)):,} tokens up to the end, the last id "
                f"{int(self._begun[-1][-1])} and not the {self._eod}; {self._mend}",
            )
        self._write(self._begun_at[0], np.concatenate(self._begun), None)
        self._begun = []

    def _write(self, number: int, tokens: np.ndarray, lengths: np.ndarray | None) -> None:
        """Whole documents, one where `lengths` is None, that start in file `number`."""
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        if self._append_eod:
            ends = np.cumsum(lengths)
            lacking = tokens[ends - 1] != self._vocabulary.eod
            if lacking.any():
                tokens = np.insert(tokens, ends[lacking], self._vocabulary.eod)
                lengths = lengths + lacking
        self._pairs.write(tokens, lengths.astype(np.int32))
        self._counts[number] += (len(lengths), len(tokens), int(self._text_bytes[tokens].sum(dtype=np.int64)))
