"""Cross-entropy against float64, and against torch's own in the same dtype."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcpt.kernels import launch
from fastcpt.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    cross_entropy_with_lse,
)

FLAGS: list[dict[str, Any]] = [
    {},
    {"z_loss": 1e-2},
    {"columns": 200},
    {"z_loss": 1e-2, "columns": 129, "ignore_index": 5},
]


def sample(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, ignored: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a spread as in training, targets of which about one in five is ignored, a gradient for each loss."""
    generator = torch.Generator().manual_seed(1000 * rows + width)
    logits = torch.randn(rows, width, generator=generator).mul(4).to(dtype).to(device)
    targets = torch.randint(0, min(width, 128), (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.2] = ignored
    return logits, targets.to(device), torch.randn(rows, generator=generator).to(device)


def run(
    function: Callable[..., Tensor], logits: Tensor, targets: Tensor, gradient: Tensor, **flags: Any
) -> tuple[Tensor, Tensor]:
    """Losses and the gradient with respect to logits that are not a leaf, as those of a model."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    losses = function(leaf * 1, targets, **flags)
    losses.backward(gradient)
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def compare(
    check_budget: Callable[..., float],
    ours: Callable[..., Tensor],
    logits: Tensor,
    targets: Tensor,
    gradient: Tensor,
    **flags: Any,
) -> None:
    reference_flags = {key: value for key, value in flags.items() if key != "inplace"}
    plain = run(cross_entropy_reference, logits, targets, gradient, **reference_flags)
    exact = run(cross_entropy_reference, logits.double(), targets, gradient.double(), **reference_flags)
    losses, gradients = run(ours, logits, targets, gradient, **flags)
    assert losses.dtype == torch.float32 and gradients.dtype == logits.dtype
    # In place and with a gradient that is not 1, the gradient is rounded and then multiplied.
    roundings = 2 if flags.get("inplace") else 1
    # A lane adds up to 13 exponentials and a tree of 12 levels adds the lanes; an exponential is off by its own rounding
    # and by that of its argument, which has the size of the largest logit.
    terms, largest = 32, float(logits.double().abs().max())
    check_budget("cross_entropy: loss", losses, plain[0], exact[0], terms=terms)
    check_budget(
        "cross_entropy: gradient",
        gradients,
        plain[1],
        exact[1],
        terms=terms,
        scale=float(gradient.abs().max()) * max(1, largest / terms),
        roundings=roundings,
    )
    ignored = targets == flags.get("ignore_index", -100)
    assert (losses[ignored] == 0).all() and (gradients[ignored] == 0).all()
    if "columns" in flags:
        assert (gradients[:, flags["columns"] :] == 0).all()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, width", [(1, 257), (7, 257), (129, 257), (7, 5000)])
def test_loss_and_gradient(
    rows: int, width: int, dtype: torch.dtype, inplace: bool, flags: dict[str, Any],
    triton_device: torch.device, launches: Counter[str], check_budget: Callable[..., float],
) -> None:  # fmt: skip
    compare(
        check_budget,
        cross_entropy,
        *sample(rows, width, dtype, triton_device, flags.get("ignore_index", -100)),
        inplace=inplace,
        **flags,
    )
    assert launches == {"_forward_kernel": 1, "_scale_kernel" if inplace else "_backward_kernel": 1}


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@pytest.mark.parametrize("width", [50277, 50304])
def test_vocabulary_of_the_real_tokenizer(
    width: int, inplace: bool, triton_device: torch.device, check_budget: Callable[..., float]
) -> None:
    compare(check_budget, cross_entropy, *sample(7, width, torch.bfloat16, triton_device), inplace=inplace)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, width", [(1, 257), (129, 257), (33, 50277)])
def test_blocks_on_cpu(
    rows: int, width: int, dtype: torch.dtype, inplace: bool, flags: dict[str, Any],
    launches: Counter[str], check_budget: Callable[..., float],
) -> None:  # fmt: skip
    compare(
        check_budget,
        cross_entropy,
        *sample(rows, width, dtype, torch.device("cpu"), flags.get("ignore_index", -100)),
        inplace=inplace,
        **flags,
    )
    assert not launches


def test_log_sum_exp(triton_device: torch.device, check_budget: Callable[..., float]) -> None:
    logits, targets, _ = sample(7, 257, torch.bfloat16, triton_device)
    losses, lse = cross_entropy_with_lse(logits.requires_grad_(), targets)
    assert not lse.requires_grad and losses.requires_grad
    kept = targets != -100
    plain, exact = logits.detach().float().logsumexp(-1), logits.detach().double().logsumexp(-1)
    check_budget("cross_entropy: log-sum-exp", lse[kept], plain[kept], exact[kept], terms=257)
    assert (lse[~kept] == 0).all()


@pytest.mark.parametrize("gradient", [0.0, 1.0, -0.25])
def test_in_place_scales_by_the_gradient_of_the_loss(gradient: float, triton_device: torch.device) -> None:
    """A gradient of 1, that of a sum, is not multiplied in; any other is, and no second backward pass can do it twice."""
    logits, targets, _ = sample(7, 257, torch.float32, triton_device)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, targets, inplace=True)
    losses.backward(torch.full_like(losses, gradient), retain_graph=True)
    expected = torch.autograd.grad(cross_entropy_reference(leaf, targets).sum(), leaf)[0] * gradient
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-7)
    if gradient != 1:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.backward(torch.full_like(losses, gradient))


def test_strided_logits(triton_device: torch.device, check_budget: Callable[..., float]) -> None:
    """Rows of a wider matrix, and a transposed one."""
    logits, targets, gradient = sample(7, 600, torch.bfloat16, triton_device)
    compare(check_budget, cross_entropy, logits[:, 100:357], targets, gradient)
    compare(check_budget, cross_entropy, logits[:, :257].T.contiguous().T, targets, gradient)
    wide = logits.clone().requires_grad_()
    cross_entropy((wide * 1)[:, 100:357], targets, inplace=True).backward(gradient)
    expected = run(cross_entropy_reference, logits[:, 100:357], targets, gradient)[1]
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[:, 100:357], expected, rtol=2**-7, atol=1e-6)
    assert (wide.grad[:, :100] == 0).all() and (wide.grad[:, 357:] == 0).all()
    with pytest.raises(ValueError, match="contiguous rows"):
        cross_entropy((wide * 1).T, targets.new_zeros(600), inplace=True)


def test_extreme_logits(triton_device: torch.device) -> None:
    """-inf is a probability of zero; NaN, +inf and a target outside of the vocabulary are seen, not hidden."""
    logits = torch.zeros(6, 9000, device=triton_device)
    logits[0, :8999] = -torch.inf  # the first blocks are empty
    logits[1] = 3e38
    logits[2, 4] = torch.nan
    logits[3, 4] = torch.inf
    targets = torch.tensor([8999, 0, 0, 0, 9000, -1], device=triton_device)
    losses = cross_entropy(logits, targets)
    assert losses[0] == 0 and losses[2:].isnan().all()
    torch.testing.assert_close(losses[1], torch.tensor(9000.0).log().to(losses), rtol=1e-6, atol=0)


def test_offsets_past_32_bits(triton_device: torch.device) -> None:
    """Rows 2^30 elements apart: the third starts past 2^31, the fifth at 2^32. Only what is touched takes memory."""
    if triton_device.type == "cuda":
        pytest.skip("takes 9 GB")
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(2**32 + 257, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    far = storage.as_strided((5, 257), (2**30, 1))
    logits, targets, gradient = sample(5, 257, torch.bfloat16, triton_device)
    targets = targets.clamp_min(0)
    far.copy_(logits)
    assert torch.equal(cross_entropy(far, targets), cross_entropy(logits, targets))
    losses, _ = torch.ops.fastcpt.cross_entropy_(far, targets, -100, 0.0, 257)
    torch.ops.fastcpt.scale_rows_(far, gradient)
    near = logits.clone()
    assert torch.equal(losses, torch.ops.fastcpt.cross_entropy_(near, targets, -100, 0.0, 257)[0])
    torch.ops.fastcpt.scale_rows_(near, gradient)
    assert torch.equal(far, near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("interpreted", [True, False])
def test_operators(dtype: torch.dtype, interpreted: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    logits, targets, gradient = sample(7, 257, dtype, device)
    ops, options = torch.ops.fastcpt, (-100, 1e-2, 200)
    lse = logits.float().logsumexp(-1)
    torch.library.opcheck(ops.cross_entropy, (logits.requires_grad_(), targets, *options))
    logits = logits.detach()
    torch.library.opcheck(ops.cross_entropy_backward, (gradient, logits, targets, lse, *options))
    torch.library.opcheck(ops.cross_entropy_, (logits, targets, *options))
    torch.library.opcheck(ops.scale_rows_, (logits, gradient))


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@pytest.mark.parametrize("interpreted", [True, False])
def test_compiled(inplace: bool, interpreted: bool, launches: Counter[str], request: pytest.FixtureRequest) -> None:
    """One graph without a break, forward and backward, and the same bits."""
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    logits, targets, gradient = sample(7, 257, torch.float32, device)

    def function(x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(x * 2, targets, inplace=inplace, z_loss=1e-3)

    results = []
    for compiled in (False, True):
        leaf = logits.clone().requires_grad_()
        torch._dynamo.reset()
        call = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        losses = call(leaf, targets)
        losses.backward(gradient)
        results.append((losses.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert launches["_forward_kernel"] == (2 if interpreted else 0)


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        logits = torch.empty(70_000, 50304, dtype=torch.bfloat16, device="cuda")
        targets = torch.empty(70_000, dtype=torch.int64, device="cuda")
        losses = cross_entropy(logits, targets)
        assert losses.shape == (70_000,) and losses.dtype == torch.float32 and losses.device.type == "cuda"
        gradients = torch.ops.fastcpt.cross_entropy_backward(losses, logits, targets, losses, -100, 0.0, 50304)
        assert gradients.shape == logits.shape and gradients.dtype == torch.bfloat16


def test_no_rows(triton_device: torch.device) -> None:
    logits = torch.zeros(0, 257, device=triton_device, requires_grad=True)
    cross_entropy(logits * 1, torch.zeros(0, dtype=torch.int64, device=triton_device), inplace=True).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 257)


def test_launch_decides_where() -> None:
    assert not launch.on_triton(torch.empty(1))
    assert launch.on_triton(torch.empty(1, device="meta"))
