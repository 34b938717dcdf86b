"""The head's product and its loss in blocks of rows, against float64 and against the plain way."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcpt.kernels import linear_cross_entropy as module
from fastcpt.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_sum,
)

FLAGS: list[dict[str, Any]] = [{}, {"z_loss": 1e-2, "columns": 200}]


def sample(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + width + vocabulary)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5
    targets = torch.randint(0, 128, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.2] = -100
    return x.to(device), weight.to(device), targets.to(device), torch.randn(rows, generator=generator).to(device)


def run(
    function: Callable[..., Any], x: Tensor, weight: Tensor, targets: Tensor, gradient: Tensor, **flags: Any
) -> list[Tensor]:
    """Losses, dx and dW for a gradient for each loss, or one for their sum."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    result = function(x, weight, targets, **flags)
    losses = result[1] if isinstance(result, tuple) else result
    output = result[0] if isinstance(result, tuple) else (result if gradient.ndim else result.sum())
    output.backward(gradient)
    assert x.grad is not None and weight.grad is not None and losses.dtype in (torch.float32, torch.float64)
    return [losses.detach(), x.grad, weight.grad]


def compare(
    check_budget: Callable[..., float],
    ours: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    gradient: Tensor,
    **flags: Any,
) -> None:
    # The products have the dtype of x: the exact result is that of weights rounded to it.
    rounded = weight.to(x.dtype).double()
    exact = run(linear_cross_entropy_reference, x.double(), rounded, targets, gradient.double(), **flags)
    plain = run(linear_cross_entropy_reference, x, weight, targets, gradient, **flags)
    results = run(ours, x, weight, targets, gradient, **flags)
    bf16 = x.dtype == torch.bfloat16
    for name, got, wanted, truth in zip(("loss", "dx", "dW"), results, plain, exact):
        assert got.dtype == wanted.dtype
        if bf16:
            # Logits and their gradient are rounded to bf16 on either way, but not always to the same side: the whole
            # tensor's error is what can be compared.
            ours_error, plain_error = ((value.double() - truth).norm() / truth.norm() for value in (got, wanted))
            assert ours_error <= 1.1 * plain_error + 2.0**-24, (name, ours_error, plain_error)
        else:
            terms = 32 + {"loss": x.shape[1], "dx": weight.shape[0], "dW": x.shape[0]}[name]
            check_budget(f"linear_cross_entropy: {name}", got, wanted, truth, terms=terms)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("form", ["losses", "sum", "sum of losses"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, width, vocabulary", [(1, 96, 257), (129, 128, 257), (150, 320, 1000)])
@pytest.mark.parametrize("interpreted", [True, False])
def test_losses_and_gradients(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, form: str, flags: dict[str, Any], interpreted: bool,
    launches: Counter[str], check_budget: Callable[..., float], request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In blocks of 64 rows, the last of them shorter."""
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    monkeypatch.setattr(module, "ROWS", 64)
    x, weight, targets, gradient = sample(rows, width, vocabulary, dtype, device)
    function = linear_cross_entropy_sum if form == "sum" else linear_cross_entropy
    compare(check_budget, function, x, weight, targets, gradient if form == "losses" else gradient[0], **flags)
    blocks = -(-rows // 64)
    passes = 1 if form == "sum" else 2
    assert launches["_forward_kernel"] == (blocks * passes if interpreted else 0)
    assert launches["_scale_kernel"] == (blocks if interpreted and form != "sum" else 0)


def test_weights_in_bf16_and_strided_input(check_budget: Callable[..., float]) -> None:
    x, weight, targets, gradient = sample(70, 192, 257, torch.bfloat16, torch.device("cpu"))
    narrow = x[:, ::2]
    for function in (linear_cross_entropy, linear_cross_entropy_sum):
        _, dx, dw = run(
            function,
            narrow,
            weight[:, ::2].bfloat16(),
            targets,
            gradient if function is linear_cross_entropy else gradient[0],
        )
        assert dx.dtype == dw.dtype == torch.bfloat16 and dw.shape == (257, 96)
    compare(check_budget, linear_cross_entropy, x.float()[:, ::2], weight[:, ::2], targets, gradient)


def test_without_gradients_nothing_is_kept() -> None:
    x, weight, targets, _ = sample(70, 96, 257, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        total, losses = linear_cross_entropy_sum(x.requires_grad_(), weight.requires_grad_(), targets)
    torch.testing.assert_close(
        losses, linear_cross_entropy_reference(x, weight, targets).detach(), rtol=1e-5, atol=1e-5
    )
    assert total == losses.sum() and not total.requires_grad
    total, losses = linear_cross_entropy_sum(x, weight, targets)
    assert total.requires_grad and not losses.requires_grad


def test_fewer_rows_where_a_cache_then_holds_them() -> None:
    assert [module.block_rows(columns, cpu=True) for columns in (257, 8192, 8193, 50304)] == [512, 512, 2048, 2048]
    assert module.block_rows(257, cpu=False) == 2048


@pytest.mark.parametrize("gradients", [False, True])
def test_memory_is_one_block_of_logits(gradients: bool, alive_bytes: Callable[..., Any]) -> None:
    """Beside the results, and on CPU a copy of a block when the gradients are not wanted. So small a vocabulary goes in
    blocks of 512 rows."""
    rows, width, vocabulary = 4000, 32, 3000
    x, weight, targets, _ = sample(rows, width, vocabulary, torch.float32, torch.device("cpu"))
    with alive_bytes([x, weight, targets]) as alive:
        module._blocks(x, weight, targets, None, (-100, 0.0, vocabulary), gradients)
    block = 512 * vocabulary * 4
    results = rows * 4 + (rows * width * 4 + vocabulary * width * 4 if gradients else 0)
    limit = results + (1.2 if gradients else 2.2) * block
    assert block <= alive.peak <= limit < rows * vocabulary * 4 / 3, (alive.peak, results, block)


@pytest.mark.parametrize("interpreted", [True, False])
def test_operators(interpreted: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    x, weight, targets, gradient = sample(7, 96, 257, torch.bfloat16, device)
    ops, options = torch.ops.fastcpt, (-100, 1e-2, 200)
    torch.library.opcheck(ops.linear_cross_entropy, (x.requires_grad_(), weight.requires_grad_(), targets, *options))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(ops.linear_cross_entropy_backward, (gradient, x, weight, targets, *options))
    torch.library.opcheck(ops.linear_cross_entropy_sum, (x, weight, targets, *options))


@pytest.mark.parametrize("form", ["losses", "sum"])
@pytest.mark.parametrize("interpreted", [True, False])
def test_compiled(form: str, interpreted: bool, launches: Counter[str], request: pytest.FixtureRequest) -> None:
    """One graph without a break, forward and backward, and the same numbers as without compiling."""
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    x, weight, targets, gradient = sample(70, 96, 257, torch.float32, device)

    def function(x: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return (linear_cross_entropy_sum if form == "sum" else linear_cross_entropy)(x * 2, weight, targets)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    gradient = gradient[0] if form == "sum" else gradient
    for got, wanted in zip(run(compiled, x, weight, targets, gradient), run(function, x, weight, targets, gradient)):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert bool(launches["_forward_kernel"]) == interpreted


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        x = torch.empty(70_000, 1024, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(50304, 1024, device="cuda")
        losses, dx, dw = torch.ops.fastcpt.linear_cross_entropy_sum(
            x, weight, torch.empty(70_000, dtype=torch.int64, device="cuda"), -100, 0.0, 50304
        )
        assert (losses.shape, dx.shape, dw.shape) == ((70_000,), x.shape, weight.shape)
        assert (losses.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
        assert {tensor.device.type for tensor in (losses, dx, dw)} == {"cuda"}
