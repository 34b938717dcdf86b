"""The residual sum and its norms against float64, and against torch's own in the same dtype."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcpt.kernels.layer_norm import layer_norm, layer_norm_reference

DTYPES = [torch.float32, torch.bfloat16]
FORWARD = {"layer_norm_forward_kernel": 1}
BOTH = FORWARD | {"layer_norm_backward_kernel": 1, "column_sums_kernel": 1}
# fp32 roundings of what passes through a sum over a row: a thread adds up to 24 elements, a tree of up to 9 levels adds
# the threads, and numpy in the interpreter does no worse; the rest is the arithmetic around the sums.
TERMS = 40
Norms = list[tuple[Tensor, Tensor]]
Gradients = list[Tensor | None]


class Sample:
    """Inputs, and a gradient for each output: (sum, y_1[, y_2])."""

    def __init__(
        self,
        shape: tuple[int, ...],
        addends: int,
        norms: int,
        dtype: torch.dtype,
        device: torch.device,
        mean: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(math.prod(shape) + 10 * addends + norms)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.x = (random(*shape) + mean).to(dtype)
        self.addends = [random(*shape).to(dtype) for _ in range(addends)]
        self.norms = [(1 + random(shape[-1]) / 2, random(shape[-1])) for _ in range(norms)]
        # Without addends the sum is x, and its gradient is not the operator's business.
        self.gradients: Gradients = [random(*shape).to(dtype) for _ in range(1 + norms)]
        self.gradients[0] = self.gradients[0] if addends else None


def run(
    function: Callable[..., Sequence[Tensor]], x: Tensor, addends: list[Tensor], norms: Norms, gradients: Gradients
) -> tuple[list[Tensor], Gradients]:
    """Outputs, and gradients of x, the addends and each weight and bias; outputs without a gradient are not used."""
    x, *addends = (tensor.detach().requires_grad_() for tensor in (x, *addends))
    norms = [(weight.detach().requires_grad_(), bias.detach().requires_grad_()) for weight, bias in norms]
    outputs = function(x, addends, norms)
    used = [index for index, gradient in enumerate(gradients) if gradient is not None]
    leaves = [x, *addends, *itertools.chain(*norms)]
    found = torch.autograd.grad(
        [outputs[index] for index in used], leaves, [gradients[index] for index in used], allow_unused=True
    )
    return [output.detach() for output in outputs], list(found)


def equal(one: tuple[list[Tensor], Gradients], other: tuple[list[Tensor], Gradients]) -> bool:
    """Whether two results of `run` have the same bits, and none is missing."""
    pairs = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def operator(x: Tensor, addends: list[Tensor], norms: Norms) -> tuple[Tensor, ...]:
    """The operator itself, which on CPU the public function goes past."""
    weights, biases = zip(*norms)
    outputs, _ = torch.ops.fastcpt.layer_norm(x, addends, list(weights), list(biases), 1e-5)
    return tuple(outputs) if addends else (x, *outputs)


def sizes(s: Tensor, norms: Norms, gradients: Gradients) -> tuple[list[Tensor], list[Tensor | None]]:
    """Sizes of the terms of each norm of s, and of the gradients of s and of each weight and bias; all in float64."""
    centred = s - s.mean(-1, keepdim=True)
    rstd = 1 / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    z = centred.abs() * rstd + rstd * s.abs().mean(-1, keepdim=True)  # the second from the mean, a sum over the row
    g, parameters = torch.zeros_like(s), list[Tensor | None]()
    for (weight, _), dy in zip(norms, gradients[1:]):
        g += 0 if dy is None else (weight * dy).abs()
        terms = [None, None] if dy is None else [z * dy.abs(), dy.abs()]
        parameters += [None if each is None else each.reshape(-1, s.shape[-1]).sum(0) for each in terms]
    d_s = rstd * (g + g.mean(-1, keepdim=True) + z * (g * z).mean(-1, keepdim=True))
    d_s += 0 if gradients[0] is None else gradients[0].abs()
    return [z * weight.abs() + bias.abs() for weight, bias in norms], [d_s, *parameters]


def compare(check_budget: Callable[..., float], function: Callable[..., Sequence[Tensor]], sample: Sample) -> None:
    """Norms and gradients are checked from the sum on, as ours rounded it: it is what the next layer sees."""
    (total, *ys), found = run(function, sample.x, sample.addends, sample.norms, sample.gradients)
    assert all(y.dtype == sample.x.dtype and y.shape == sample.x.shape for y in (total, *ys))
    plain_sum = layer_norm_reference(sample.x, sample.addends, [])[0]
    terms = torch.stack([tensor.double() for tensor in (sample.x, *sample.addends)])
    check_budget("layer_norm: sum", total, plain_sum, terms.sum(0), terms=2, scale=terms.abs().sum(0))

    norms = [(weight.double(), bias.double()) for weight, bias in sample.norms]
    gradients = [None if gradient is None else gradient.double() for gradient in sample.gradients]
    (_, *plain_ys), plain = run(layer_norm_reference, total, [], sample.norms, sample.gradients)
    (_, *exact_ys), exact = run(layer_norm_reference, total.double(), [], norms, gradients)
    y_sizes, gradient_sizes = sizes(total.double(), norms, gradients)
    for results in zip(ys, plain_ys, exact_ys, y_sizes, strict=True):
        check_budget("layer_norm: norms", *results[:3], terms=TERMS, scale=results[3])
    count = len(sample.addends)
    for addend in found[1 : 1 + count]:
        assert addend is not None and found[0] is not None and torch.equal(addend, found[0])
    rows = total[..., 0].numel()
    names = ["the sum", *["weights", "biases"] * len(norms)]
    ours = [found[0], *found[1 + count :]]
    for index, (name, *each) in enumerate(zip(names, ours, plain, exact, gradient_sizes, strict=True)):
        assert (each[0] is None) == (each[2] is None)
        if each[0] is not None:
            longest = TERMS + rows if index else TERMS
            check_budget(f"layer_norm: gradient of {name}", *each[:3], terms=longest, scale=each[3])


# The backward pass is 4 programs on rows of 5120 in the interpreter, and 16 on narrower ones of which up to 8 (of 128
# columns) go at once: 129 rows take several turns, and the last one is not full.
FP32 = [(1, 96), (129, 128), (3, 43, 320), (7, 1024), (7, 2560), (2, 4100), (3, 5), (96,)]
BF16 = [(1, 96), (129, 128), (3, 43, 320), (7, 1024), (7, 2560), (7, 5120), (3, 5), (96,)]


@pytest.mark.parametrize(
    "shape, addends, norms, dtype",
    [
        *(((7, 320), addends, norms, dtype) for addends in (0, 1, 2) for norms in (1, 2) for dtype in DTYPES),
        *((shape, 2, 2, torch.float32) for shape in FP32),
        *((shape, 2, 2, torch.bfloat16) for shape in BF16),
    ],
    ids=str,
)
def test_against_float64(
    shape: tuple[int, ...], addends: int, norms: int, dtype: torch.dtype,
    triton_device: torch.device, launches: Counter[str], check_budget: Callable[..., float],
) -> None:  # fmt: skip
    compare(check_budget, layer_norm, Sample(shape, addends, norms, dtype, triton_device))
    assert launches == BOTH


@pytest.mark.parametrize("dtype, mean", [(torch.float32, 100.0), (torch.float32, 3000.0), (torch.bfloat16, 100.0)])
def test_a_large_mean_does_not_cancel(
    dtype: torch.dtype, mean: float, triton_device: torch.device, check_budget: Callable[..., float]
) -> None:
    """mean(s^2) - mean(s)^2 in fp32 would be off by more than the variance at a mean of 3000."""
    compare(check_budget, layer_norm, Sample((3, 1024), 0, 2, dtype, triton_device, mean))


@pytest.mark.parametrize(
    "addends, used",
    [
        *((0, (False, *used)) for used in [(True, False), (False, True)]),
        *((2, used) for used in itertools.product((True, False), repeat=3) if any(used)),
    ],
    ids=str,
)
def test_outputs_that_nobody_uses(
    addends: int, used: tuple[bool, bool, bool],
    triton_device: torch.device, launches: Counter[str], check_budget: Callable[..., float],
) -> None:  # fmt: skip
    """The gradients of their weights are None, and with the sum alone there is nothing to launch."""
    sample = Sample((7, 320), addends, 2, torch.bfloat16, triton_device)
    sample.gradients = [gradient if use else None for gradient, use in zip(sample.gradients, used)]
    compare(check_budget, layer_norm, sample)
    assert launches == (BOTH if any(used[1:]) else FORWARD)


@pytest.mark.parametrize("interpreted", [True, False])
def test_without_addends_the_sum_is_x(interpreted: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    sample = Sample((7, 96), 0, 1, torch.float32, device)
    x = sample.x.requires_grad_()
    total, y = layer_norm(x, [], sample.norms)
    assert total is x
    (alone,) = torch.autograd.grad(y, x, sample.gradients[1], retain_graph=True)
    (both,) = torch.autograd.grad([total * 3, y], x, [torch.ones_like(x), sample.gradients[1]])
    assert torch.equal(both, alone + 3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("other_first", [False, True])
def test_one_gradient_serves_x_and_the_addends(
    other_first: bool, compiled: bool, triton_device: torch.device, launches: Counter[str]
) -> None:
    """It is one tensor until somebody adds to it, and then that of the others must not change."""
    sample = Sample((7, 96), 2, 2, torch.float32, triton_device)
    expected = run(layer_norm, sample.x, sample.addends, sample.norms, sample.gradients)[1][0]
    assert expected is not None
    for place in range(3):
        leaves = [tensor.clone().requires_grad_() for tensor in (sample.x, *sample.addends)]

        def function(*leaves: Tensor, place: int = place) -> tuple[Tensor, ...]:
            x, *addends = (leaf * 1 for leaf in leaves)
            if other_first:  # autograd goes backwards: what was done first comes last
                other = (x, *addends)[place] * 5
            outputs = layer_norm(x, addends, sample.norms)
            return *outputs, other if other_first else (x, *addends)[place] * 5

        torch._dynamo.reset()
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        torch.autograd.backward(call(*leaves), [*sample.gradients, torch.ones_like(sample.x)])
        for index, leaf in enumerate(leaves):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected + 5 if index == place else expected)
    # Leaves themselves: each has its own memory.
    leaves = [tensor.clone().requires_grad_() for tensor in (sample.x, *sample.addends)]
    for time in (1, 2):
        torch.autograd.backward(layer_norm(leaves[0], leaves[1:], sample.norms), sample.gradients)
        for leaf in leaves:
            assert leaf.grad is not None and torch.equal(leaf.grad, time * expected)
    assert len({leaf.grad.data_ptr() for leaf in leaves if leaf.grad is not None}) == 3
    assert launches["layer_norm_backward_kernel"] == 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("addends", [0, 2])
def test_layouts_of_inputs_do_not_matter(addends: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    sample = Sample((6, 5, 96), addends, 2, dtype, triton_device)
    expected = run(layer_norm, sample.x, sample.addends, sample.norms, sample.gradients)

    def sliced(x: Tensor) -> Tensor:
        return F.pad(x, (7, 9), value=torch.nan)[..., 7:-9]

    def skipping(x: Tensor) -> Tensor:
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for layout in (sliced, skipping, transposed):
        norms = [(skipping(weight), skipping(bias)) for weight, bias in sample.norms]
        gradients = [None if gradient is None else layout(gradient) for gradient in sample.gradients]
        found = run(layer_norm, layout(sample.x), [layout(addend) for addend in sample.addends], norms, gradients)
        assert equal(found, expected)
        assert all(y.is_contiguous() for y in found[0][1:])
    one = torch.ones((), dtype=dtype, device=triton_device)
    results = []
    for ones in (one.expand(6, 5, 96), one.repeat(6, 5, 96)):
        gradients = [None if gradient is None else ones for gradient in sample.gradients]
        results.append(run(layer_norm, sample.x, sample.addends, sample.norms, gradients))
    assert equal(*results)


def test_offsets_past_4_gi(triton_device: torch.device, launches: Counter[str]) -> None:
    """Rows 2^30 elements apart: the third begins past 2^31, the fifth at 2^32. Only what is touched takes memory."""
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    far = torch.empty(2**32 + 96, dtype=torch.bfloat16, device=triton_device).as_strided((5, 96), (2**30, 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    for addends in (0, 2):
        sample = Sample((5, 96), addends, 2, torch.bfloat16, triton_device)
        far.copy_(sample.x)
        assert equal(*(run(layer_norm, x, sample.addends, sample.norms, sample.gradients) for x in (sample.x, far)))
    assert launches == {name: 4 for name in BOTH}


def test_bits_repeat(triton_device: torch.device) -> None:
    sample = Sample((129, 96), 2, 2, torch.bfloat16, triton_device)
    assert equal(*(run(layer_norm, sample.x, sample.addends, sample.norms, sample.gradients) for _ in range(2)))


@pytest.mark.parametrize("interpreted", [True, False])
def test_eps(interpreted: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    sample = Sample((7, 96), 1, 1, torch.float32, device)
    results = []
    for function in (layer_norm, layer_norm_reference):
        weight = sample.norms[0][0].clone().requires_grad_()
        y = function(sample.x, sample.addends, [(weight, sample.norms[0][1])], 0.5)[1]
        results.append((y, torch.autograd.grad(y, weight, sample.gradients[1])[0]))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_sum_is_rounded_once(triton_device: torch.device) -> None:
    """1 + 2^-9 + 2^-9 is a number of bf16; after the first addition, rounded, it is 1 again."""
    x = torch.ones(1, 96, dtype=torch.bfloat16, device=triton_device)
    addends = [torch.full_like(x, 2.0**-8)] * 2
    norms = [(torch.ones(96, device=triton_device), torch.zeros(96, device=triton_device))]
    assert (layer_norm(x, addends, norms)[0] == 1 + 2.0**-7).all()
    assert (layer_norm_reference(x, addends, norms)[0] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    sample = Sample((7, 96), 2, 2, dtype, torch.device("cpu"))
    (a, b), (first, second) = sample.addends, sample.norms
    total = sample.x + a + b
    expected = [total, *(F.layer_norm(total.float(), (96,), *norm, 1e-5).to(dtype) for norm in (first, second))]
    for ours, theirs in zip(layer_norm_reference(sample.x, [a, b], [first, second]), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("addends, norms", [(0, 1), (2, 2)])
def test_on_cpu(
    addends: int, norms: int, dtype: torch.dtype, launches: Counter[str], check_budget: Callable[..., float]
) -> None:
    sample = Sample((7, 320), addends, norms, dtype, torch.device("cpu"))
    for function in (layer_norm, operator):
        compare(check_budget, function, sample)
    assert not launches


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators(dtype: torch.dtype, interpreted: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    ops = torch.ops.fastcpt
    for addends, norms in ((0, 1), (1, 2), (2, 2)):
        sample = Sample((2, 3, 16), addends, norms, dtype, device)
        x, *rest = (tensor.requires_grad_() for tensor in (sample.x, *sample.addends))
        weights, biases = ([tensor.requires_grad_() for tensor in column] for column in zip(*sample.norms))
        torch.library.opcheck(ops.layer_norm.default, (x, rest, weights, biases, 1e-5))
        with torch.no_grad():
            outputs, stats = ops.layer_norm(x, rest, weights, biases, 1e-5)
        total = outputs[0] if addends else x.detach()
        weights = [weight.detach() for weight in weights]
        torch.library.opcheck(
            ops.layer_norm_backward.default, (sample.gradients[0], sample.gradients[1:], total, stats, weights)
        )


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled(
    dtype: torch.dtype, interpreted: bool, launches: Counter[str], request: pytest.FixtureRequest
) -> None:
    """Three layers as a model calls them, in one graph without a break; between them all is exact: the same bits."""
    device = request.getfixturevalue("triton_device") if interpreted else torch.device("cpu")
    sample = Sample((2, 3, 96), 0, 2, dtype, device)

    def model(x: Tensor, *parameters: Tensor) -> Tensor:
        norms = list(zip(parameters[::2], parameters[1::2]))
        x, first, second = layer_norm(x, (), norms)
        x, first, second = layer_norm(x, (first * 2, second / 2), norms)
        x, first = layer_norm(x, (first, -second), norms[:1])
        return first

    results = []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        leaves = [leaf.clone().requires_grad_() for leaf in (sample.x, *itertools.chain(*sample.norms))]
        y = call(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, sample.gradients[1])))
        assert launches == ({name: 3 for name in BOTH} if interpreted else {})
        launches.clear()
    for ours, eager in zip(*results, strict=True):
        if interpreted:
            assert torch.equal(ours, eager)
        else:  # inductor fuses the plain path, and keeps in fp32 what plain torch rounds
            assert (ours - eager).norm() <= (2.0**-6 if dtype == torch.bfloat16 else 1e-5) * eager.norm()


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 5, 96, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(96, device="cuda")
        total, y = layer_norm(x, [x, x], [(weight, weight)])
        stats = torch.empty(2, 20, device="cuda")
        d_x, d_parameters = torch.ops.fastcpt.layer_norm_backward(total, [y], total, stats, [weight])
        for tensor in (total, y, d_x):
            assert tensor.shape == x.shape and tensor.dtype == x.dtype and tensor.device.type == "cuda"
        assert d_parameters.shape == (2, 96) and d_parameters.dtype == torch.float32
        assert d_parameters.device.type == "cuda"


def test_no_rows(triton_device: torch.device) -> None:
    sample = Sample((0, 3, 96), 2, 2, torch.float32, triton_device)
    outputs, gradients = run(layer_norm, sample.x, sample.addends, sample.norms, sample.gradients)
    assert all(tensor is not None and tensor.shape == (0, 3, 96) for tensor in (*outputs, *gradients[:3]))
    assert all(tensor is not None and torch.equal(tensor, torch.zeros_like(tensor)) for tensor in gradients[3:])


def test_refused() -> None:
    x, weight = torch.zeros(2, 96), torch.zeros(96)
    cases: list[tuple[list[Tensor], list[Any], str]] = [
        ([x[:1]], [(weight, weight)], r"an addend is torch.float32 \(1, 96\), x is torch.float32 \(2, 96\)"),
        ([x.bfloat16()], [(weight, weight)], "an addend is torch.bfloat16"),
        ([], [(weight, weight[:95])], r"torch.float32 \(95,\); it must be fp32 \(96,\)"),
        ([], [(weight.bfloat16(), weight)], "torch.bfloat16"),
        ([x, x, x], [(weight, weight)], "3 addends and 1 norms"),
        ([], [], "0 addends and 0 norms"),
        ([], [(weight, weight)] * 3, "0 addends and 3 norms"),
    ]
    for addends, norms, message in cases:
        with pytest.raises(ValueError, match=message):
            layer_norm(x, addends, norms)
