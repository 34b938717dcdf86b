"""The formulas of memory against what autograd keeps and what is alive at once."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastcpt import memory
from fastcpt.attention import document_ids
from fastcpt.config import Optim
from fastcpt.execution import Execution
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.optim import AdamW

# Ragged sizes: no dimension divides another, so that no wrong count comes out right.
SEQUENCES, SEQ_LEN = 5, 13


def small(parallel: bool = True, rotary: float = 0.5) -> Architecture:
    return Architecture(3, 24, 3, vocab_size=61, mlp_width=88, rotary_fraction=rotary, parallel_residual=parallel)


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
@pytest.mark.parametrize("mask", [False, True])
def test_the_total_is_the_peak_of_a_step(bf16: bool, mask: bool, alive_bytes: Callable[..., Any]) -> None:
    """Of the second micro-batch: gradients and activations are alive together. The vocabulary is wide against the
    width, as that of a language model is."""
    arch = replace(small(), vocab_size=1999)
    model = GPTNeoX(arch, Execution(torch.bfloat16 if bf16 else torch.float32))
    model.initialise_()
    tokens, targets, documents = inputs(arch, torch.device("cpu"), mask)
    model(tokens, targets, documents).sum().backward()
    there = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), tokens, targets]
    with alive_bytes(there) as alive:
        model(tokens, targets, documents, total=True)[0].backward()
    parts = memory.parts(arch, SEQUENCES, SEQ_LEN, bf16, mask)
    expected = parts["activations"] + parts["casts"] + parts["logits"] - tokens.nbytes - targets.nbytes
    # Below 1%: the losses, their sum and gradients of that size, 3 x 8 bytes a token.
    assert expected <= alive.peak <= expected * 1.01


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
