"""Bias and GELU against float64, and against torch's own in the same dtype."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcpt.kernels.gelu import (
    bias_gelu,
    bias_gelu_backward_kernel,
    bias_gelu_forward_kernel,
    bias_gelu_reference,
)

DTYPES, FORMS = [torch.float32, torch.bfloat16], ["none", "tanh"]
# fp32 roundings of a value: one for the sum, the seven coefficients, t and the exponential.
ROUNDINGS = 10
ONCE = {"bias_gelu_forward_kernel": 1, "bias_gelu_backward_kernel": 1}


def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A product, its bias and a gradient of the output; some values reach GELU's tails."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x, dy = torch.randn(shape, generator=generator) * 2.5, torch.randn(shape, generator=generator)
    return x.to(device, dtype), torch.randn(shape[-1], generator=generator).to(device), dy.to(device, dtype)


def run(
    function: Callable[..., Tensor], x: Tensor, bias: Tensor, dy: Tensor, approximate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of the product and of the bias."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias, approximate)
    return y.detach(), *torch.autograd.grad(y, (x, bias), dy)


def exact(x: Tensor, bias: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    return run(bias_gelu_reference, x.double(), bias.double(), dy.double(), approximate)


def compare(
    check_budget: Callable[..., float],
    function: Callable[..., Tensor],
    x: Tensor,
    bias: Tensor,
    dy: Tensor,
    approximate: str,
    lost: float = 0.0,
) -> None:
    """lost: by how much of itself a term of the bias gradient may be off, beside fp32. Not as much as torch's own in bf16:
    ours are summed before they are rounded."""
    y, dx, d_bias = run(function, x, bias, dy, approximate)
    plain = run(bias_gelu_reference, x, bias, dy, approximate)
    true_y, true_dx, true_d_bias = exact(x, bias, dy, approximate)
    size = dy.double().abs()
    check_budget("gelu: output", y, plain[0], true_y, terms=ROUNDINGS, scale=(x.double() + bias.double()).abs())
    check_budget("gelu: gradient", dx, plain[1], true_dx, terms=ROUNDINGS, scale=size)
    check_budget(
        "gelu: bias gradient",
        d_bias,
        true_d_bias.float(),
        true_d_bias,
        terms=dy[..., 0].numel() + ROUNDINGS + int(lost * 2**24),
        scale=size.flatten(0, -2).sum(0),
    )


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
# 129 rows are two stripes, and 3 x 100 are three; 1024 columns fill a program, 2560 take three.
@pytest.mark.parametrize("shape", [(1, 96), (7, 128), (129, 320), (3, 100, 96), (2, 4, 1024), (7, 2560)])
def test_against_float64(
    triton_device: torch.device,
    launches: Counter[str],
    check_budget: Callable[..., float],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    approximate: str,
) -> None:
    compare(check_budget, bias_gelu, *sample(shape, dtype, triton_device), approximate)
    assert launches == ONCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_inputs_do_not_matter(triton_device: torch.device, dtype: torch.dtype) -> None:
    x, bias, dy = sample((6, 5, 96), dtype, triton_device)
    expected = run(bias_gelu, x, bias, dy, "none")
    strided_x, strided_dy = (torch.empty(5, 6, 192, dtype=dtype, device=triton_device) for _ in range(2))
    strided_x, strided_dy = strided_x.transpose(0, 1)[..., ::2], strided_dy.transpose(0, 1)[..., ::2]
    strided_x.copy_(x)
    strided_dy.copy_(dy)
    strided_bias = torch.stack((bias, bias), dim=-1)[:, 0]
    for found, wanted in zip(run(bias_gelu, strided_x, strided_bias, strided_dy, "none"), expected):
        assert torch.equal(found, wanted)
    ones = torch.ones((), dtype=dtype, device=triton_device)
    expanded = run(bias_gelu, x, bias, ones.expand(6, 5, 96), "none")
    for found, wanted in zip(expanded, run(bias_gelu, x, bias, ones.repeat(6, 5, 96), "none")):
        assert torch.equal(found, wanted)


def test_no_rows(triton_device: torch.device) -> None:
    y, dx, d_bias = run(bias_gelu, *sample((0, 3, 96), torch.float32, triton_device), "none")
    assert y.shape == dx.shape == (0, 3, 96) and torch.equal(d_bias, torch.zeros_like(d_bias))


@pytest.mark.parametrize("approximate", FORMS)
def test_every_z(triton_device: torch.device, approximate: str) -> None:
    """The approximation alone, value by value: its error, and in the left tail that of its leading digits."""
    z = torch.linspace(-14, 14, 28 * 1024, device=triton_device).reshape(-1, 1024)
    zero, one = torch.zeros(1024, device=triton_device), torch.ones_like(z)
    y, dx, _ = run(bias_gelu, z, zero, one, approximate)
    x = z.double()
    if approximate == "tanh":
        true_y = x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    else:
        true_y = x * torch.special.erfc(-x / math.sqrt(2)) / 2  # 1 + erf loses the tail in float64 as well
    assert ((y - true_y).abs() <= 2.0**-21 * x.abs()).all()
    assert ((dx - exact(z, zero, one, approximate)[1]).abs() <= 2.0**-20).all()
    normal = true_y.abs() > 1e-36
    assert true_y[normal].abs().min() < 2e-36
    assert ((y - true_y).abs() <= 2e-5 * true_y.abs())[normal].all()
    plain = bias_gelu_reference(z, zero, approximate)
    assert not ((plain - true_y).abs() <= 1e-2 * true_y.abs())[normal].all()


@pytest.mark.filterwarnings("ignore:overflow")  # z^3, from numpy in the interpreter
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values(triton_device: torch.device, dtype: torch.dtype, approximate: str) -> None:
    x = torch.tensor([[1e3, -1e3, 1e6, -1e6, 1e12, -1e12, 1e18, -1e18]], device=triton_device, dtype=dtype)
    y, dx, _ = run(bias_gelu, x, torch.zeros(8, device=triton_device), torch.ones_like(x), approximate)
    assert torch.equal(y, x.clamp(min=0)) and torch.equal(dx, (x > 0).to(dtype))


def test_bits_repeat(triton_device: torch.device) -> None:
    values = sample((2, 65, 96), torch.float32, triton_device)
    for found, wanted in zip(run(bias_gelu, *values, "none"), run(bias_gelu, *values, "none")):
        assert torch.equal(found, wanted)


def test_offsets_past_4_gi(triton_device: torch.device, check_budget: Callable[..., float]) -> None:
    """Rows of 2^30 + 16 columns, of which the kernels are launched on the first 1024: row 4 begins past 2^32."""
    width, columns = 2**30 + 16, 1024
    torch.use_deterministic_algorithms(False)  # which would fill the memory, of which only a few pages are touched
    memory = torch.empty(4 * width + 2 * columns, dtype=torch.bfloat16, device=triton_device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # x, which the output and then the gradient overwrite, and the gradient of the output beside it.
    x, dy = (memory[start:].as_strided((5, columns), (width, 1)) for start in (0, columns))
    values, bias, gradient = sample((5, columns), torch.bfloat16, triton_device)
    true_y, true_dx, true_d_bias = exact(values, bias, gradient, "none")
    rounded_y, rounded_dx, _ = (result.to(torch.bfloat16) for result in (true_y, true_dx, true_d_bias))
    constants = {"TANH": False, "ROWS": 4, "COLUMNS": columns, "num_warps": 4}

    x.copy_(values)
    bias_gelu_forward_kernel[(2, 1)](x, bias, x, 5, width, **constants)
    check_budget("gelu: output", x.clone(), rounded_y, true_y, terms=ROUNDINGS, scale=4.0)
    x.copy_(values)
    dy.copy_(gradient)
    d_bias = torch.empty(columns, device=triton_device)
    bias_gelu_backward_kernel[(1, 1)](dy, x, bias, x, d_bias, 5, width, STRIPE=128, **constants)
    check_budget("gelu: gradient", x.clone(), rounded_dx, true_dx, terms=ROUNDINGS, scale=4.0)
    check_budget("gelu: bias gradient", d_bias, true_d_bias.float(), true_d_bias, terms=5 + ROUNDINGS, scale=8.0)


@pytest.mark.parametrize("interpreted", [True, False])
def test_operators(request: pytest.FixtureRequest, interpreted: bool) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    for dtype, approximate in zip(DTYPES, FORMS):
        x, bias, dy = sample((2, 3, 16), dtype, device)
        torch.library.opcheck(torch.ops.fastcpt.bias_gelu_backward.default, (dy, x, bias, approximate))
        leaves = (x.requires_grad_(), bias.requires_grad_())
        torch.library.opcheck(torch.ops.fastcpt.bias_gelu.default, (*leaves, approximate))


@pytest.mark.parametrize("approximate", FORMS)
def test_compiled(triton_device: torch.device, launches: Counter[str], approximate: str) -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x @ weight.T, bias, approximate).square().sum()

    x, bias, _ = sample((2, 3, 96), torch.float32, triton_device)
    leaves = [leaf.requires_grad_() for leaf in (x, sample((96, 96), torch.float32, triton_device)[0], bias)]
    expected = torch.autograd.grad(layer(*leaves), leaves)
    launches.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    assert launches == ONCE
    for gradient, wanted in zip(found, expected):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cpu(
    launches: Counter[str], check_budget: Callable[..., float], dtype: torch.dtype, approximate: str
) -> None:
    values = sample((2, 65, 96), dtype, torch.device("cpu"))
    lost = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # x + bias and dx are rounded to bf16, as in the model so far
    for function in (bias_gelu, torch.ops.fastcpt.bias_gelu):
        compare(check_budget, function, *values, approximate, lost)
    assert not launches


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x, bias = torch.empty(2, 3, 96, dtype=torch.bfloat16, device="cuda"), torch.empty(96, device="cuda")
        y = bias_gelu(x, bias)
        dx, d_bias = torch.ops.fastcpt.bias_gelu_backward(y, x, bias, "none")
    assert y.shape == dx.shape == x.shape and y.dtype == dx.dtype == torch.bfloat16 and y.device.type == "cuda"
    assert d_bias.shape == (96,) and d_bias.dtype == torch.float32


def test_refused() -> None:
    x = torch.zeros(2, 96)
    with pytest.raises(ValueError, match="'sigmoid'"):
        bias_gelu(x, torch.zeros(96), "sigmoid")
    with pytest.raises(ValueError, match=r"float32 \(95,\); it must be fp32 \(96,\)"):
        bias_gelu(x, torch.zeros(95))
    with pytest.raises(ValueError, match="bfloat16"):
        bias_gelu(x, torch.zeros(96, dtype=torch.bfloat16))
