"""Evaluation against float64 done here, one process against two, and the arithmetic of forgetting."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcpt import UserError
from fastcpt.data import evaluation_windows
from fastcpt.evaluation import NamedSet, changes, evaluate, is_due
from fastcpt.lineage import check_ids
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import World
from fastcpt.shards import ShardSet

ARCH = Architecture(2, 24, 3, vocab_size=67)
ALONE = World(0, 1, torch.device("cpu"))
SEQ_LEN = 11


def make_model() -> GPTNeoX:
    model = GPTNeoX(ARCH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory, write_shards: Callable, random_documents: Callable) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("val") / "set", random_documents(3, 25, longest=15), pairs=3)


def direct(shard_set: ShardSet, document_mask: bool, tokens: int) -> tuple[float, float, int]:
    """(loss, bits per byte, tokens): one window at a time, documents told apart by hand, the softmax in float64."""
    model = make_model()
    stream: list[int] = []
    for path in sorted(shard_set.path.glob("*.bin")):
        stream += np.frombuffer(path.read_bytes(), np.uint16).tolist()
    lengths = np.load(shard_set.path / "token_bytes.npy")
    nats, size, count = 0.0, 0, 0
    for window in evaluation_windows(shard_set, SEQ_LEN, tokens).tolist():
        ids = stream[window * SEQ_LEN : (window + 1) * SEQ_LEN + 1]
        documents, document = [], 0
        for token in ids[:-1]:
            documents.append(document)
            document += token == shard_set.eod
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]), documents=torch.tensor([documents]) if document_mask else None)
        for log_probabilities, target in zip(logits[0].double().log_softmax(-1), ids[1:]):
            nats -= log_probabilities[target].item()
            size += int(lengths[target])
            count += 1
    return nats / count, nats / math.log(2) / size, count


# The model's own fp32 logits differ between a batch and a single window by the rounding of sums of 24 to 96 products,
# and cross-entropy rounds to fp32: relative to losses of some nats, 100 u is beyond all of it.
RELATIVE = 100 * 2.0**-24


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 7, 64])
@pytest.mark.parametrize("tokens", [10**9, 13 * SEQ_LEN])
def test_loss_and_bits_per_byte_are_those_of_a_direct_computation(
    shard_set: ShardSet, document_mask: bool, micro_batch: int, tokens: int
) -> None:
    loss, bits_per_byte, count = direct(shard_set, document_mask, tokens)
    named = NamedSet.open("pile", "upstream", shard_set, SEQ_LEN, tokens)
    assert len(named.windows) in (shard_set.num_windows(SEQ_LEN), 13)
    assert len(named.windows) % 3 and len(named.windows) % 7, "a last batch that is not full"
    model = make_model()
    result = evaluate(model, named, SEQ_LEN, micro_batch, document_mask, ALONE)
    assert result["loss"] == pytest.approx(loss, rel=RELATIVE)
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte, rel=RELATIVE)
    assert result["tokens"] == count == len(named.windows) * SEQ_LEN and result["role"] == "upstream"
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_document_mask_matters_here(shard_set: ShardSet) -> None:
    masked, across = direct(shard_set, True, 10**9)[0], direct(shard_set, False, 10**9)[0]
    assert abs(masked - across) > 20 * RELATIVE * across, "or the tests above could not tell them apart"


def test_a_model_that_knows_nothing_pays_the_whole_vocabulary(shard_set: ShardSet) -> None:
    model = make_model()
    with torch.no_grad():
        model.embed_out.weight.zero_()
    named = NamedSet.open("x", "other", shard_set, SEQ_LEN, 10**9)
    result = evaluate(model, named, SEQ_LEN, 5, False, ALONE)
    assert result["loss"] == pytest.approx(math.log(67), rel=1e-6)
    targets = shard_set.windows(named.windows, SEQ_LEN)[:, 1:]
    text_bytes = sum(len(f"{token:x}".rjust(1 + token % 7, "t")) for token in targets.ravel().tolist() if token)
    assert result["bits_per_byte"] == pytest.approx(math.log2(67) * targets.size / text_bytes, rel=1e-6)


SEVERAL = """
import json, sys
import torch
from fastcpt.evaluation import NamedSet, evaluate
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import World, start
from fastcpt.shards import ShardSet

folder, weights, seq_len, micro_batch, *counts = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
world = start("auto")
model = GPTNeoX(Architecture(2, 24, 3, vocab_size=67))
model.load_state_dict(torch.load(weights))
for windows in counts:
    named = NamedSet.open("pile", "upstream", ShardSet(folder), seq_len, windows * seq_len)
    for each in (World(0, 1, world.device), world):
        print(json.dumps(evaluate(model, named, seq_len, micro_batch, True, each)))
"""


def test_two_processes_give_what_one_gives(shard_set: ShardSet, run_ranks: Callable, tmp_path: Path) -> None:
    """13 windows in batches of 3 are uneven shares, and of 2 windows the second process gets none.

    A row's loss is the same on either; the float64 sums of n tokens differ in order alone, by n u.
    """
    torch.save(make_model().state_dict(), tmp_path / "weights.pt")
    counts = (13, 2)
    outputs = run_ranks(SEVERAL, 2, shard_set.path, tmp_path / "weights.pt", SEQ_LEN, 3, *counts)
    first, second = ([json.loads(line) for line in output.splitlines() if line[0] == "{"] for output in outputs)
    assert len(first) == 2 * len(counts)
    assert first == second, "every process knows the same"
    for windows, alone, together in zip(counts, first[::2], first[1::2]):
        relative = windows * SEQ_LEN * 2.0**-52
        assert together["loss"] == pytest.approx(alone["loss"], rel=relative, abs=0.0)
        assert together["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=relative, abs=0.0)
        assert together["tokens"] == alone["tokens"] == windows * SEQ_LEN


def entry(loss: float, role: str) -> dict:
    return {"loss": loss, "role": role, "bits_per_byte": 1.0, "tokens": 1}


def test_forgetting_and_adaptation_are_signed_means_over_their_sets() -> None:
    start = {"pile": 2.5, "books": 3.0, "new": 4.0, "side": 1.0}
    now = {
        "pile": entry(2.75, "upstream"),
        "books": entry(2.875, "upstream"),
        "new": entry(3.25, "downstream"),
        "side": entry(9.0, "other"),
    }
    assert changes(now, start) == {"forgetting": (0.25 - 0.125) / 2, "adaptation": 0.75}
    assert changes({"new": entry(4.5, "downstream")}, start) == {"adaptation": -0.5}
    assert changes({"pile": entry(2.5, "upstream")}, start) == {"forgetting": 0.0}
    assert changes({"side": entry(2.0, "other")}, start) == {} == changes({}, start)


def due(steps: range, **arguments: int) -> list[int]:
    return [step for step in steps if is_due(step, **arguments)]


def test_evaluations_are_due_at_the_ends_at_the_peak_and_denser_in_the_warmup() -> None:
    assert due(range(104), last=103, every=20, warmup_end=0) == [0, 20, 40, 60, 80, 100, 103]
    assert due(range(104), last=103, every=20, warmup_end=23) == [0, 5, 10, 15, 20, 23, 40, 60, 80, 100, 103]
    assert due(range(8), last=7, every=3, warmup_end=4) == [0, 1, 2, 3, 4, 6, 7], "never more than every step"
    assert due(range(8), last=7, every=1000, warmup_end=0) == [0, 7]
    assert due(range(8), last=7, every=1, warmup_end=3) == list(range(8))
    assert due(range(41, 60), last=59, every=10, warmup_end=40) == [50, 59], "a branch that began at step 40"


def test_ids_that_the_model_has_no_row_for_are_refused(shard_set: ShardSet) -> None:
    assert shard_set.vocab_size == 64
    check_ids([shard_set], 64)
    check_ids([shard_set], 50304)
    with pytest.raises(UserError, match=rf"{shard_set.path}: its tokenizer has 64 ids, the model 63 rows"):
        check_ids([shard_set], 63)
