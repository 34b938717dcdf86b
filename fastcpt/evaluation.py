"""Validation sets by name: loss, exact bits per byte, and from them forgetting and adaptation."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcpt import UserError, lineage, parallel
from fastcpt.config import Count, Train
from fastcpt.data import evaluation_windows
from fastcpt.execution import Execution
from fastcpt.model import GPTNeoX
from fastcpt.parallel import World
from fastcpt.progress import Bar
from fastcpt.shards import ShardSet
from fastcpt.weights import Weights


@dataclass(frozen=True)
class NamedSet:
    """A validation set with its fixed windows (`data.evaluation_windows`)."""

    name: str
    role: str
    shards: ShardSet
    windows: np.ndarray

    @classmethod
    def open(cls, name: str, role: str, shards: ShardSet, seq_len: int, tokens: int) -> "NamedSet":
        return cls(name, role, shards, evaluation_windows(shards, seq_len, tokens))


@torch.no_grad()
def evaluate(
    model: GPTNeoX,
    named: NamedSet,
    seq_len: int,
    micro_batch: int,
    document_mask: bool,
    world: World,
    progress: Callable[[int], None] = lambda windows: None,
    passing: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{"loss" (nats a token), "bits_per_byte", "tokens", "role"} over the set's fixed windows, summed over processes.

    progress gets the number of windows done so far. passing is called before each micro-batch, by all processes equally
    often; what it raises ends the evaluation. Bits per byte is exact: the bytes are those of the target tokens' text, an end-of-document token counting none.
    """
    model.eval()
    # Sums in float64: what one process or several add up differs in nothing that a reader could see.
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    token_bytes = torch.from_numpy(named.shards.token_bytes.astype(np.int64)).to(world.device)
    for start in range(0, len(named.windows), world.size * micro_batch):
        passing()
        first = start + world.rank * micro_batch
        indexes = named.windows[first : first + micro_batch]
        rows = len(indexes)  # none for the last processes at the end: those that hold shards compute together
        # One shape alone, so that a compiled model is compiled once.
        padded = np.resize(indexes if rows else named.windows[:1], micro_batch)
        windows = named.shards.windows(padded, seq_len)
        window_BT = torch.from_numpy(windows.astype(np.int64)).to(world.device)
        tokens_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:].contiguous()
        attend = model.execution.attention
        documents = attend.documents(windows[:, :-1], named.shards.eod, world.device) if document_mask else None
        losses_BT = model(tokens_BT, targets_BT, documents)[:rows]
        targets_BT = targets_BT[:rows]
        totals += torch.stack(
            (
                losses_BT.double().sum(),
                token_bytes[targets_BT].sum().double(),
                losses_BT.new_tensor(losses_BT.numel(), dtype=torch.float64),
            )
        )
        progress(min(start + world.size * micro_batch, len(named.windows)))
    model.train()
    nats, size, tokens = world.sum_(totals).tolist()
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": int(tokens),
        "role": named.role,
    }


def open_sets(
    sets: Iterable[tuple[str, str, str]], seq_len: int, tokens: int | None, micro_batch: int
) -> list[NamedSet]:
    """(name, role, folder) each, with windows of all their tokens or of so many. Raises UserError."""
    for option, value in (("seq-len", seq_len), ("micro-batch", micro_batch), ("tokens", tokens)):
        if value is not None and value < 1:
            raise UserError("option-out-of-range", f"--{option} {value}: must be 1 or more")
    shards = [(name, role, ShardSet(path)) for name, role, path in sets]
    return [NamedSet.open(name, role, each, seq_len, tokens or len(each)) for name, role, each in shards]


def check_sets(weights: Weights, sets: Sequence[NamedSet]) -> None:
    """Raises UserError unless the sets are of the model's tokenizer."""
    shards = [named.shards for named in sets]
    if weights.tokenizer is not None:
        lineage.check_made_with(weights.tokenizer, shards)
    lineage.check_ids(shards, weights.arch.vocab_size)


def evaluate_sets(
    model: GPTNeoX, sets: Sequence[NamedSet], seq_len: int, micro_batch: int, world: World, title: str = ""
) -> dict[str, dict[str, Any]]:
    """{name: `evaluate`} of a model in the precision that training would choose. title: goes before a bar's name."""
    model.execution = Execution.choose(
        Train(tokens=Count(0), batch_tokens=Count(0)), world.device, model.arch.head_width, seq_len, False
    )
    results = {}
    for named in sets:
        with Bar(f"eval {title}{named.name}", len(named.windows)) as bar:
            results[named.name] = evaluate(model, named, seq_len, micro_batch, False, world, bar.update)
    return results


def evaluate_checkpoint(
    source: str, sets: dict[str, str], seq_len: int, tokens: int | None, micro_batch: int, ema: bool = False
) -> dict[str, dict[str, Any]]:
    """What `fastcpt eval` prints: `evaluate` of a checkpoint, a run or a Hugging Face model on {name: shard set}.

    ema: of the moving average of a checkpoint's weights.
    """
    opened = open_sets([(name, "other", path) for name, path in sets.items()], seq_len, tokens, micro_batch)
    world = parallel.start("single")
    weights = Weights.open(source, ema)
    check_sets(weights, opened)
    return evaluate_sets(weights.model(world.device), opened, seq_len, micro_batch, world)


def changes(results: dict[str, dict[str, Any]], start: dict[str, float]) -> dict[str, float]:
    """forgetting = upstream loss now - at step 0; adaptation = downstream loss at step 0 - now; means over their sets."""
    out = {}
    for role, name, sign in (("upstream", "forgetting", 1), ("downstream", "adaptation", -1)):
        deltas = [sign * (entry["loss"] - start[key]) for key, entry in results.items() if entry["role"] == role]
        if deltas:
            out[name] = sum(deltas) / len(deltas)
    return out


def is_due(step: int, last: int, every: int, warmup_end: int) -> bool:
    """At the start, at the peak of the rate, at the end, every `every` steps, and until the peak four times as often."""
    often = max(1, every // 4) if step <= warmup_end else every
    return step in (0, warmup_end, last) or step % often == 0
