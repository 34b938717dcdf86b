"""A model for more tokens: a tokenizer that knows a new language's words, and rows for them in both embeddings.

A Hugging Face model of R rows has ids for the tokens of its tokenizer, [0, U), and padding rows [U, R). New tokens have the
ids from U on: their rows take the place of padding first. Where R rows do not reach, there are as many as the next multiple
of 128, if R is one, else of 64; new padding is the mean of the old padding, or where there was none of all tokens' rows, whose
logit is the mean of theirs and so makes an id that never occurs no likelier than 1/U.

`Architecture.old_rows` is U, so that training can tell old rows from new (`optim.new_rows_lr`).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastcpt import UserError, hf
from fastcpt.data_prep import vocabulary
from fastcpt.data_prep.encoding import load_tokenizer
from fastcpt.weights import Weights

Init = Literal["subtokens", "mean", "noise"]
EMBEDDINGS = ("gpt_neox.embed_in.weight", "embed_out.weight")


@dataclass(frozen=True)
class Extended:
    """tokens: new ones. rows: of both embeddings, padding included. before, after: tokens of the text. size: its bytes,
    0 without text."""

    tokens: int
    rows: int
    before: int = 0
    after: int = 0
    size: int = 0


def extend(
    source: str, output: str, inputs: list[str] | None = None, add: int | None = None, tokenizer: str | None = None,
    init: Init = "subtokens", text_key: str = "text", seed: int = 0,
) -> Extended:  # fmt: skip
    """Writes the model of a checkpoint, a run or a Hugging Face model with more tokens, as a Hugging Face model.

    inputs, add: text, as `fastcpt prep` reads it, that so many merges are learned on; or tokenizer: one that was extended
    elsewhere, by new ids after all old ones. init: new rows are the mean of those of the old tokens that they are made of
    (subtokens), of all old tokens' (mean), or normal with mean 0 and the standard deviation of all old tokens' elements
    (noise). Raises UserError.
    """
    if "://" in output:
        raise UserError("output-remote", f"{output}: a URL; name a folder of this machine")
    if (tokenizer is None) == (add is None) or (add is not None and not inputs):
        raise UserError("option-missing", "extend: give --text INPUT... with --add N, or --tokenizer FILE")
    if add is not None and add < 1:
        raise UserError("option-out-of-range", f"--add {add}: must be 1 or more")
    weights = Weights.open(source)
    if weights.tokenizer is None:
        raise UserError("tokenizer-missing", f"{source}: has no tokenizer.json; put the model's beside it")
    old = vocabulary.Tokenizer(weights.tokenizer.read_bytes(), str(weights.tokenizer))
    if old.used > weights.arch.vocab_size:
        raise UserError(
            "tokenizer-beyond-model",
            f"{weights.tokenizer}: has {old.used:,} ids, the model {weights.arch.vocab_size:,} rows; give the model's tokenizer",
        )
    table = vocabulary.count_words(old, inputs, text_key) if inputs else None
    after = 0
    if tokenizer is None:
        assert table is not None and add is not None
        merges, after = vocabulary.learn(old, table, add)
        if len(merges) < add:
            raise UserError(
                "extend-too-few-pairs",
                f"--add {add}: this text has only {len(merges):,} pairs that occur twice or more; lower it, or give more text",
            )
        content = old.extended(merges)
    else:
        content = load_tokenizer(tokenizer)
    new = vocabulary.Tokenizer(content, tokenizer or "the new tokenizer")
    tokens = _new_tokens(old, new)
    if tokenizer is not None and inputs:
        after = vocabulary.count_words(new, inputs, text_key).tokens
    arch = replace(weights.arch, vocab_size=_rows(weights.arch.vocab_size, new.used), old_rows=old.used)
    parts = [old.split(token) for token in tokens.values()]

    def tensor(name: str) -> Tensor:
        value = weights.tensor(name)
        if name not in EMBEDDINGS:
            return value
        generator = torch.Generator().manual_seed(seed + EMBEDDINGS.index(name))
        real = value[sorted(set(old.ids.values()))]
        made = INITS[init](value, real, parts, generator)
        return with_rows(value, real, old.used, list(tokens), made, arch.vocab_size)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(content)
        hf.save_tensors(tensor, arch, output, file, weights.eod)
    return Extended(len(tokens), arch.vocab_size, *((table.tokens, after, table.size) if table else ()))


def _new_tokens(old: vocabulary.Tokenizer, new: vocabulary.Tokenizer) -> dict[int, str]:
    """{id: token}. Raises UserError unless old tokens have their ids still and new ones come after all of them."""
    for token, index in old.ids.items():
        if new.ids.get(token) != index:
            raise UserError(
                "tokenizer-not-extension",
                f"{new.source}: {token!r} has the id {new.ids.get(token)}, in {old.source} {index}; old ids must stay",
            )
    tokens = {
        index: token for token, index in sorted(new.ids.items(), key=lambda item: item[1]) if token not in old.ids
    }
    if not tokens or min(tokens) < old.used:
        what = f"{tokens[min(tokens)]!r} has the id {min(tokens)}" if tokens else "it has no new token"
        raise UserError(
            "tokenizer-not-extension", f"{new.source}: {what}; new tokens must have the ids from {old.used:,} on"
        )
    return tokens


def _rows(rows: int, used: int) -> int:
    multiple = 64 if rows % 128 else 128
    return max(rows, -(-used // multiple) * multiple)


def _mean_of_parts(rows: Tensor, real: Tensor, parts: list[list[int]], generator: torch.Generator) -> Tensor:
    return torch.stack([rows[ids].mean(0) for ids in parts])


def _mean_of_all(rows: Tensor, real: Tensor, parts: list[list[int]], generator: torch.Generator) -> Tensor:
    return real.mean(0).expand(len(parts), -1)


def _noise(rows: Tensor, real: Tensor, parts: list[list[int]], generator: torch.Generator) -> Tensor:
    return torch.empty(len(parts), rows.shape[1]).normal_(0.0, float(real.std()), generator=generator)


INITS: dict[str, Callable[[Tensor, Tensor, list[list[int]], torch.Generator], Tensor]] = {
    "subtokens": _mean_of_parts, "mean": _mean_of_all, "noise": _noise
}  # fmt: skip


def with_rows(rows: Tensor, real: Tensor, used: int, ids: list[int], made: Tensor, count: int) -> Tensor:
    """(count, D) of (R, D): the rows below `used` as they were, those of `ids` as made, between and beyond them padding."""
    padding = rows[used:]
    out = (padding if len(padding) else real).mean(0).repeat(count, 1)
    out[: len(rows)] = rows
    out[ids] = made
    return out
