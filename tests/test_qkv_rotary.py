"""Rotary embedding of a packed projection against float64, and against plain torch in the same dtype."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcpt.kernels.qkv_rotary import (
    qkv_rotary,
    qkv_rotary_backward_kernel,
    qkv_rotary_forward_kernel,
    qkv_rotary_reference,
)

DTYPES = [torch.float32, torch.bfloat16]
ONCE = {"qkv_rotary_forward_kernel": 1, "qkv_rotary_backward_kernel": 1}
# B, T, H, C, R: one token; heads of the presets (32, 64, 80, 128, 256 wide, 4 to 40 of them), ragged sequences of more
# than one program, all of a head turned and almost nothing.
SHAPES = [
    (1, 1, 4, 32, 8),
    (3, 9, 12, 64, 16),
    (2, 33, 5, 80, 20),
    (1, 3, 40, 128, 32),
    (2, 5, 8, 256, 64),
    (2, 67, 4, 64, 64),
    (2, 7, 3, 96, 2),
]


def sample(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """A projection, tables of which no two columns are equal, and gradients of q, k and v."""
    B, T, H, C, R = shape
    generator = torch.Generator().manual_seed(B * T * H * C + R)
    qkv = torch.randn(B, T, H, 3 * C, generator=generator).to(device, dtype)
    angles = torch.randn(T, R, generator=generator) * 10
    gradients = [torch.randn(B, T, H, C, generator=generator).to(device, dtype) for _ in range(3)]
    return qkv, angles.cos().to(device), angles.sin().to(device), gradients


def run(
    function: Callable[..., Any], qkv: Tensor, cos: Tensor, sin: Tensor, gradients: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The parts, packed again, and the gradient of a projection that is not a leaf."""
    leaf = qkv.detach().requires_grad_()
    parts = function(leaf.clone(memory_format=torch.preserve_format), cos, sin)
    assert [part.shape for part in parts] == [gradient.shape for gradient in gradients]
    return torch.cat(parts, dim=-1).detach(), *torch.autograd.grad(parts, leaf, gradients)


def compare(
    check_budget: Callable[..., float],
    function: Callable[..., Any],
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    gradients: list[Tensor],
) -> None:
    plain = run(qkv_rotary_reference, qkv, cos, sin, gradients)
    double = [gradient.double() for gradient in gradients]
    exact = run(qkv_rotary_reference, qkv.double(), cos.double(), sin.double(), double)
    found = run(function, qkv, cos, sin, gradients)
    for name, ours, theirs, true in zip(("q, k, v", "gradient"), found, plain, exact):
        check_budget(f"qkv_rotary: {name}", ours, theirs, true, terms=2)
    width, rotated = qkv.shape[-1] // 3, cos.shape[-1]
    kept = torch.arange(3 * width, device=qkv.device) % width >= rotated
    kept[2 * width :] = True
    for ours, given in zip(found, (qkv, torch.cat(gradients, dim=-1))):
        assert torch.equal(ours[..., kept], given[..., kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(
    triton_device: torch.device,
    launches: Counter[str],
    check_budget: Callable[..., float],
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
) -> None:
    compare(check_budget, qkv_rotary, *sample(shape, dtype, triton_device))
    assert launches == ONCE


def test_parts_are_views_of_what_was_given(triton_device: torch.device, launches: Counter[str]) -> None:
    qkv, cos, sin, _ = sample((2, 5, 3, 80, 20), torch.bfloat16, triton_device)
    expected = qkv_rotary_reference(qkv.clone(), cos, sin)
    for number, (part, wanted) in enumerate(zip(qkv_rotary(qkv, cos, sin), expected)):
        assert part.data_ptr() == qkv.data_ptr() + 2 * 80 * number and part.stride() == (5 * 720, 720, 240, 1)
        torch.testing.assert_close(part, wanted)
    assert launches == {"qkv_rotary_forward_kernel": 1}
    with torch.inference_mode():
        qkv = torch.ones_like(qkv)
        assert qkv_rotary(qkv, cos, sin)[0].data_ptr() == qkv.data_ptr()


def test_nothing_turns(triton_device: torch.device, launches: Counter[str]) -> None:
    qkv, cos, sin, gradients = sample((2, 5, 3, 64, 0), torch.bfloat16, triton_device)
    for function in (qkv_rotary, qkv_rotary_reference):
        found, gradient = run(function, qkv, cos, sin, gradients)
        assert torch.equal(found, qkv) and torch.equal(gradient, torch.cat(gradients, dim=-1))
    assert qkv_rotary(qkv, cos, sin)[0].data_ptr() == qkv.data_ptr() and not launches


def test_no_tokens(triton_device: torch.device) -> None:
    for shape in ((0, 5, 3, 64, 16), (2, 0, 3, 64, 16)):
        found, gradient = run(qkv_rotary, *sample(shape, torch.float32, triton_device))
        assert found.shape == gradient.shape == (*shape[:3], 192)


def test_a_projection_that_is_not_contiguous_is_copied(triton_device: torch.device) -> None:
    qkv, cos, sin, gradients = sample((2, 5, 3, 64, 16), torch.float32, triton_device)
    expected = run(qkv_rotary, qkv, cos, sin, gradients)
    transposed = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    strided = torch.stack((qkv, qkv), dim=-1)[..., 0]
    for given in (transposed, strided):
        assert not given.is_contiguous()
        for found, wanted in zip(run(qkv_rotary, given, cos, sin, gradients), expected):
            assert torch.equal(found, wanted)
        qkv_rotary(given, cos, sin)
        assert torch.equal(given, qkv)
    expanded = qkv[:, :, :1].expand(2, 5, 3, 192)
    for found, wanted in zip(qkv_rotary(expanded, cos, sin), qkv_rotary(expanded.clone(), cos, sin)):
        assert torch.equal(found, wanted)


def test_gradients_of_any_layout(triton_device: torch.device) -> None:
    qkv, cos, sin, gradients = sample((2, 5, 3, 64, 16), torch.bfloat16, triton_device)
    _, expected = run(qkv_rotary, qkv, cos, sin, gradients)
    dq, dk, dv = gradients
    # By head, as a kernel over (B, H, T, C) leaves them; every second value; views of a packed tensor.
    layouts = [
        dq.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((dk, dk), dim=-1)[..., 0],
        torch.cat((dv, dv), dim=-1)[..., 64:],
    ]
    assert not any(layout.is_contiguous() for layout in layouts)
    assert torch.equal(run(qkv_rotary, qkv, cos, sin, layouts)[1], expected)
    ones = torch.ones(64, dtype=torch.bfloat16, device=triton_device)
    broad = [ones.expand(2, 5, 3, 64), ones[:1].expand(2, 5, 3, 64), dv]
    full = [part.contiguous() for part in broad]
    assert torch.equal(run(qkv_rotary, qkv, cos, sin, broad)[1], run(qkv_rotary, qkv, cos, sin, full)[1])


def test_a_part_without_a_gradient(triton_device: torch.device) -> None:
    qkv, cos, sin, gradients = sample((2, 5, 3, 64, 16), torch.float32, triton_device)
    leaf = qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(qkv_rotary(leaf * 1, cos, sin)[1], leaf, gradients[1])
    zero = torch.zeros_like(gradients[0])
    assert torch.equal(gradient, run(qkv_rotary, qkv, cos, sin, [zero, gradients[1], zero])[1])


def project(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, function: Callable[..., Any]
) -> tuple[Tensor, ...]:
    """As in the model: the output of a linear layer, unflattened, which nothing else needs."""
    return function(F.linear(x, weight, bias).unflatten(-1, (3, 192)), cos, sin)


@pytest.mark.parametrize("compiled", [False, True])
def test_behind_a_linear_layer(
    triton_device: torch.device, launches: Counter[str], check_budget: Callable[..., float], compiled: bool
) -> None:
    _, cos, sin, gradients = sample((2, 5, 3, 64, 16), torch.float32, triton_device)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 192), (576, 192), (576,))
    tensors = [torch.randn(shape, generator=generator).div(8).to(triton_device) for shape in shapes]

    def through(convert: Callable[[Tensor], Tensor], run: Any, function: Any) -> tuple[Tensor, ...]:
        leaves = [convert(tensor).requires_grad_() for tensor in tensors]
        parts = run(*leaves, convert(cos), convert(sin), function)
        if function is qkv_rotary:  # no copy, compiled or not
            assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
            assert all(part.stride() == (2880, 576, 192, 1) for part in parts)
        return *parts, *torch.autograd.grad(parts, leaves, [convert(gradient) for gradient in gradients])

    run = torch.compile(project, fullgraph=True, dynamic=False) if compiled else project
    found = through(Tensor.clone, run, qkv_rotary)
    assert launches == ONCE
    plain = through(Tensor.clone, project, qkv_rotary_reference)
    exact = through(Tensor.double, project, qkv_rotary_reference)
    for ours, theirs, true in zip(found, plain, exact):
        check_budget("qkv_rotary: behind a linear layer", ours.detach(), theirs.detach(), true.detach(), terms=32)


@pytest.mark.parametrize("compiled", [False, True])
def test_refused_when_the_projection_is_needed_elsewhere(triton_device: torch.device, compiled: bool) -> None:
    qkv, cos, sin, _ = sample((2, 5, 3, 64, 16), torch.float32, triton_device)
    qkv.requires_grad_()

    def before(qkv: Tensor) -> Tensor:
        packed = qkv * 1
        squares = packed.square().sum()
        return squares + sum(part.sum() for part in qkv_rotary(packed, cos, sin))

    def after(qkv: Tensor) -> Tensor:
        packed = qkv * 1
        return sum(part.sum() for part in qkv_rotary(packed, cos, sin)) + packed.sum()

    def harmless(qkv: Tensor) -> Tensor:
        packed = qkv * 1
        total = packed.sum()
        return sum(part.sum() for part in qkv_rotary(packed, cos, sin)) + total

    # Without code for the arithmetic around it: autograd is traced the same way.
    wrap = partial(torch.compile, backend="aot_eager", fullgraph=True) if compiled else lambda function: function
    with pytest.raises(Exception, match="modified by an inplace operation"):
        wrap(before)(qkv).backward()
    with pytest.raises(RuntimeError, match="used after qkv_rotary had overwritten it"):
        wrap(after)(qkv).backward()
    (found,) = torch.autograd.grad(wrap(harmless)(qkv), qkv)
    (sums,) = torch.autograd.grad(sum(part.sum() for part in qkv_rotary(qkv * 1, cos, sin)), qkv)
    assert torch.equal(found, sums + 1)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        wrap(lambda leaf: qkv_rotary(leaf, cos, sin))(qkv)


def test_bits_repeat(triton_device: torch.device) -> None:
    values = sample((2, 67, 4, 64, 16), torch.bfloat16, triton_device)
    for found, wanted in zip(run(qkv_rotary, *values), run(qkv_rotary, *values)):
        assert torch.equal(found, wanted)


def empty_pages(size: int, device: torch.device) -> Tensor:
    """Memory that is not filled, so that only the pages that are touched take room."""
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(size, dtype=torch.bfloat16, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return memory


def test_offsets_past_4_gi(triton_device: torch.device, check_budget: Callable[..., float]) -> None:
    """Sequences of 2^32 values, of which the kernels are launched on the first token."""
    shape = B, T, H, C, R = 2, 1, 2, 256, 64
    qkv, cos, sin, gradients = sample(shape, torch.bfloat16, triton_device)
    double = [gradient.double() for gradient in gradients]
    exact = run(qkv_rotary_reference, qkv.double(), cos.double(), sin.double(), double)
    heads = 2**32 // (3 * C) + 1  # of one sequence
    memory = empty_pages(heads * 3 * C + H * 3 * C, triton_device)
    packed = memory.as_strided((B, T, H, 3 * C), (heads * 3 * C, H * 3 * C, 3 * C, 1))

    packed.copy_(qkv)
    sizes: dict[str, Any] = {"H": H, "C": C, "R": R, "num_warps": 4}
    qkv_rotary_forward_kernel[(1, B)](packed, cos, sin, 2 * heads, **sizes, ROWS=4, COLUMNS=32)
    check_budget("qkv_rotary: q, k, v", packed.clone(), exact[0].bfloat16(), exact[0], terms=2)
    strides = gradients[0].stride()[:3] * 3
    qkv_rotary_backward_kernel[(1, B)](*gradients, cos, sin, packed, heads, *strides, **sizes, ROWS=2, COLUMNS=256)
    check_budget("qkv_rotary: gradient", packed.clone(), exact[1].bfloat16(), exact[1], terms=2)


def test_strides_past_1_gi(triton_device: torch.device) -> None:
    qkv, cos, sin, gradients = sample((1, 5, 2, 64, 16), torch.bfloat16, triton_device)
    stride = 2**30 + 16
    memory = empty_pages(4 * stride + 384, triton_device)
    apart = [memory[part * 128 :].as_strided((1, 5, 2, 64), (0, stride, 64, 1)) for part in range(3)]
    for gradient, values in zip(apart, gradients):
        gradient.copy_(values)
    assert torch.equal(run(qkv_rotary, qkv, cos, sin, apart)[1], run(qkv_rotary, qkv, cos, sin, gradients)[1])


@pytest.mark.parametrize("interpreted", [True, False])
def test_operators(request: pytest.FixtureRequest, interpreted: bool) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    for dtype in DTYPES:
        qkv, cos, sin, gradients = sample((2, 3, 2, 32, 8), dtype, device)
        torch.library.opcheck(torch.ops.fastcpt.qkv_rotary_.default, (qkv, cos, sin))
        torch.library.opcheck(torch.ops.fastcpt.qkv_rotary_backward.default, (*gradients, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cpu(launches: Counter[str], check_budget: Callable[..., float], dtype: torch.dtype) -> None:
    """The public function, which overwrites nothing there, and the operators, which do as they do elsewhere."""
    qkv, cos, sin, gradients = sample((2, 9, 3, 80, 20), dtype, torch.device("cpu"))
    given = qkv.clone()
    compare(check_budget, qkv_rotary, qkv, cos, sin, gradients)
    qkv_rotary(qkv, cos, sin)
    assert torch.equal(qkv, given)
    packed, gradient = run(qkv_rotary_reference, qkv, cos, sin, gradients)
    torch.ops.fastcpt.qkv_rotary_(given, cos, sin)
    assert torch.equal(given, packed)
    assert torch.equal(torch.ops.fastcpt.qkv_rotary_backward(*gradients, cos, sin), gradient)
    assert not launches


def test_fake_tensors() -> None:
    with FakeTensorMode():
        qkv = torch.empty(2, 3, 4, 192, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(3, 16, device="cuda")
        parts = qkv_rotary(qkv, table, table)
        gradient = torch.ops.fastcpt.qkv_rotary_backward(*parts, table, table)
    for part in parts:
        assert part.shape == (2, 3, 4, 64) and part.stride() == (2304, 768, 192, 1) and part.device.type == "cuda"
    assert gradient.shape == qkv.shape and gradient.dtype == torch.bfloat16 and gradient.is_contiguous()


def test_refused() -> None:
    qkv, table = torch.zeros(2, 3, 4, 192), torch.zeros(3, 16)
    for wrong in (qkv[..., :191], qkv[..., :45]):
        with pytest.raises(ValueError, match="16 values cannot turn"):
            qkv_rotary(wrong, table, table)
    with pytest.raises(ValueError, match="15 values cannot turn"):
        qkv_rotary(qkv, table[:, :15], table[:, :15])
    for wrong in (table[:2], table[:, :14], table.double()):
        with pytest.raises(ValueError, match=r"must be fp32 \(3, 16\)"):
            qkv_rotary(qkv, table, wrong)
