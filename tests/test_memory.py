"""The formulas of memory against what autograd keeps and what is alive at once."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt import memory, parallel
from fastcpt.attention import Backend, document_ids
from fastcpt.config import Optim
from fastcpt.cpu_attention import cpu_attention
from fastcpt.execution import Execution
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.optim import AdamW

# Ragged sizes: no dimension divides another, so that no wrong count comes out right.
SEQUENCES, SEQ_LEN = 5, 13


def small(parallel_: bool = True, rotary: float = 0.5) -> Architecture:
    return Architecture(3, 24, 3, vocab_size=61, mlp_width=88, rotary_fraction=rotary, parallel_residual=parallel_)


def inputs(
    arch: Architecture, device: torch.device, mask: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, arch.vocab_size, (2, SEQUENCES, SEQ_LEN), generator=generator)
    documents = torch.from_numpy(document_ids(tokens.numpy(), 0)).to(device) if mask else None
    return tokens.clone().to(device), targets.clone().to(device), documents


def saved(model: GPTNeoX, arguments: tuple[Any, ...]) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding each keeps its address from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _graph = model(*arguments, total=True)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [False, True])
def test_activations_are_what_autograd_saves(
    bf16: bool, mask: bool, parallel: bool, rotary: float, blocks: bool
) -> None:
    arch, dtype = small(parallel, rotary), torch.bfloat16 if bf16 else torch.float32
    model = GPTNeoX(arch, Execution(dtype, loss_blocks=blocks))
    model.initialise_()
    parts = memory.parts(arch, SEQUENCES, SEQ_LEN, bf16, mask, loss_blocks=blocks)
    head = dtype.itemsize * SEQUENCES * SEQ_LEN * arch.width + 4 * arch.vocab_size * arch.width
    loss = head if blocks else parts["logits"] // 3 + 4  # cross-entropy keeps the number that it divides by
    assert saved(model, inputs(arch, torch.device("cpu"), mask)) == parts["activations"] + parts["casts"] + loss


@pytest.mark.parametrize("rotary", [0.0, 0.5])
@pytest.mark.parametrize("seq_len", [13, 300])
def test_activations_with_attention_in_blocks(rotary: float, seq_len: int) -> None:
    """13 are two blocks, of 7 rows and 6, 300 three, of at most 128."""
    arch = small(rotary=rotary)
    execution = Execution(torch.bfloat16, attention=Backend("blocks", "", cpu_attention))
    model = GPTNeoX(arch, execution)
    model.initialise_()
    tokens, targets = torch.randint(0, arch.vocab_size, (2, SEQUENCES, seq_len)).unbind()
    parts = memory.parts(arch, SEQUENCES, seq_len, True, False, attention_blocks=True)
    found = saved(model, (tokens.clone(), targets.clone()))
    assert found == parts["activations"] + parts["casts"] + parts["logits"] // 3 + 4


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary", [0.0, 0.5])
@pytest.mark.parametrize("blocks", [False, True])
def test_activations_with_kernels(
    bf16: bool, parallel: bool, rotary: float, blocks: bool, triton_device: torch.device, launches: Counter[str]
) -> None:
    arch, dtype = small(parallel, rotary), torch.bfloat16 if bf16 else torch.float32
    model = GPTNeoX(arch, Execution(dtype, kernels=True, loss_blocks=blocks)).to(triton_device)
    model.initialise_()
    parts = memory.parts(arch, SEQUENCES, SEQ_LEN, bf16, False, kernels=True, loss_blocks=blocks)
    head = dtype.itemsize * SEQUENCES * SEQ_LEN * arch.width + 4 * arch.vocab_size * arch.width
    expected = parts["activations"] + parts["casts"] + (head if blocks else parts["logits"])
    assert saved(model, inputs(arch, triton_device, False)) == expected
    assert launches["layer_norm_forward_kernel"] and launches["bias_gelu_forward_kernel"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("blocks", [False, True])
def test_recomputed_blocks_keep_their_inputs(bf16: bool, parallel: bool, blocks: bool) -> None:
    """The tables of the rotation are held by the block that is to be computed again, and not by autograd."""
    arch, dtype = small(parallel), torch.bfloat16 if bf16 else torch.float32
    model = GPTNeoX(arch, Execution(dtype, loss_blocks=blocks, recompute=True))
    model.initialise_()
    tokens, size, head = SEQUENCES * SEQ_LEN, dtype.itemsize, arch.vocab_size * arch.width
    inputs_ = tokens * (arch.layers * size * arch.width + 8)
    last = tokens * memory.last_bytes(arch, bf16, False, blocks)
    loss = size * tokens * arch.width + 4 * head if blocks else 4 * tokens * arch.vocab_size + 4 + 2 * head * bf16
    assert saved(model, inputs(arch, torch.device("cpu"), False)) == inputs_ + last + loss


def gradients(model: GPTNeoX, arguments: tuple[Any, ...], recompute: bool) -> list[torch.Tensor]:
    """The loss, and the gradient of each parameter."""
    model.execution = replace(model.execution, recompute=recompute)
    model.zero_grad()
    loss, _ = model(*arguments, total=True)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("how", "bf16", "parallel"),
    [
        ("eager", False, True), ("eager", False, False), ("eager", True, True), ("eager", True, False),
        ("kernels", False, True), ("kernels", False, False), ("compiled", False, True),
    ],
)  # fmt: skip
def test_recomputed_blocks_compute_the_same_bits(
    how: str, bf16: bool, parallel: bool, triton_device: torch.device
) -> None:
    """With kernels too, which overwrite their inputs, and compiled, whole, in one graph. In bf16 these two round elsewhere:
    a compiler where it writes, kernels the two gradients of a kept sum before autograd adds them, and not after."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = GPTNeoX(small(parallel), Execution(dtype, kernels=how == "kernels")).to(triton_device)
    model.initialise_(torch.Generator(triton_device).manual_seed(0))
    if how == "compiled":
        model.compile(dynamic=False, fullgraph=True)
    arguments = inputs(small(parallel), triton_device, mask=how == "eager")
    kept, again = (gradients(model, arguments, recompute) for recompute in (False, True))
    assert len(kept) == 1 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("recompute", "vocabulary"), [(False, 1999), (True, 1999), (True, 61)])
def test_the_total_is_the_peak_of_a_step(
    bf16: bool, mask: bool, recompute: bool, vocabulary: int, alive_bytes: Callable[..., Any]
) -> None:
    """Of the second micro-batch: gradients and activations are alive together. The vocabulary is wide against the
    width, as that of a language model is; or, recomputed, narrow, so that a block's backward pass needs the most."""
    arch = replace(small(), vocab_size=vocabulary)
    model = GPTNeoX(arch, Execution(torch.bfloat16 if bf16 else torch.float32, recompute=recompute))
    model.initialise_()
    tokens, targets, documents = inputs(arch, torch.device("cpu"), mask)
    model(tokens, targets, documents).sum().backward()
    before = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), tokens, targets]
    with alive_bytes([*before, documents] if mask else before) as alive:
        model(tokens, targets, documents, total=True)[0].backward()
    parts = memory.parts(arch, SEQUENCES, SEQ_LEN, bf16, mask, recompute=recompute)
    assert bool(parts["logits"]) == (vocabulary == 1999) and bool(parts["recomputed"]) == (vocabulary == 61)
    expected = sum(parts[name] for name in ("activations", "casts", "logits", "recomputed")) - tokens.nbytes
    expected -= targets.nbytes if parts["logits"] else 0
    # Below 1%: the losses, their sum and gradients of that size, 3 x 8 bytes a token.
    assert expected <= alive.peak <= expected * 1.01


STEP = """
import gc, json, os, sys
import torch
from torch.profiler import ProfilerActivity, profile
told = json.loads(sys.argv[1])
os.environ["LOCAL_WORLD_SIZE"] = str(told["machine"])
from fastcpt import config, memory, train
from fastcpt.data import batches

settings = config.parse(told["arguments"])
state = train.setup(settings)
sequences = settings.train.batch_tokens // settings.data.seq_len
peaks = []
for number, windows in enumerate(batches(state.mixture, 0, 4, sequences, state.layout.share, state.world.size)):
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train.train_step(state, windows)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    peaks.append(peak)
shards = {"single": 1, "ddp": 1, "hsdp": told["machine"], "fsdp": state.world.size}[state.layout.kind]
moments = [value.nbytes for entry in state.optimizer.state.values() for key, value in entry.items() if "exp_avg" in key]
print(json.dumps({
    "kind": state.layout.kind, "peaks": peaks[1:], "weights": sum(part.nbytes for part in state.parts.values()),
    "moments": sum(moments), "parts": memory.of(settings, state.model.arch, state.world, shards, state.layout.recompute),
}))
"""


@pytest.mark.parametrize(
    ("kind", "size", "machine", "recompute", "precision"),
    [
        ("ddp", 2, 2, "blocks", "fp32"),
        ("fsdp", 2, 2, "none", "bf16"),
        ("hsdp", 4, 2, "blocks", "fp32"),
    ],
)
def test_what_a_process_takes_in_each_layout(
    kind: str, size: int, machine: int, recompute: str, precision: str, tmp_path: Path, run_ranks: Callable,
    write_shards: Callable, random_documents: Callable,
) -> None:  # fmt: skip
    """Every allocation of a step of two micro-batches, counted by the profiler, beside the formulas.

    A share of a parameter is rounded up to whole rows: a row more a parameter. DDP makes its buckets in the second step.
    gloo's threads let go of the buffers of a communication when they come to it, so that at the peak there may be one
    set of gathered parameters and one of reduced gradients, the embeddings', more or less than by the formulas; of three
    steps the best is taken.
    """
    precision = precision if parallel.has_bf16(torch.device("cpu")) else "fp32"
    write_shards(tmp_path / "a", random_documents(1, 2000))
    (tmp_path / "config.yaml").write_text(json.dumps({
        "model": {"layers": 4, "width": 96, "heads": 4, "vocab_size": 1031},
        "data": {"train": [{"name": "a", "path": str(tmp_path / "a"), "weight": 1}], "seq_len": 64},
        "train": {
            "tokens": 4 * 2 * 4 * 64 * size, "batch_tokens": 2 * 4 * 64 * size, "micro_batch": 4, "compile": False,
            "precision": precision, "recompute": recompute, "loss": "full", "parallel": kind, "attention": "sdpa",
        },
        "optim": {"lr": 1e-3}, "run": {"output": str(tmp_path / "run"), "tensorboard": False},
    }))  # fmt: skip
    told = json.dumps({"machine": machine, "arguments": ["--config", str(tmp_path / "config.yaml")]})
    for printed in run_ranks(STEP, size, told):
        found = json.loads(printed.splitlines()[-1])
        parts = found["parts"]
        assert found["kind"] == kind and (parts["gathered"] > 0) == (kind in ("fsdp", "hsdp"))
        rows = 4 * (1031 + 384) * 52  # bytes: the longest row of a parameter, times the parameters
        assert abs(found["weights"] - parts["weights"]) <= (rows if parts["gathered"] else 0)
        assert found["moments"] == 2 * found["weights"]
        expected = sum(parts.values()) - parts["weights"] - parts["moments"]
        if parts["gathered"]:
            assert min(abs(peak - expected) for peak in found["peaks"]) <= parts["gathered"] + 4 * 2 * 1032 * 96
        else:
            assert found["peaks"][0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_moments_are_exact(moments: torch.dtype) -> None:
    arch = small()
    model = GPTNeoX(arch)
    model.initialise_()
    optimizer = AdamW(model.parameters(), Optim(lr=1e-3), moments=moments)
    model(*inputs(arch, torch.device("cpu"), False)).sum().backward()
    parts = memory.parts(arch, 2, 7, False, False, moments=moments.itemsize)
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert parts["moments"] == sum(state.nbytes for state in states)
