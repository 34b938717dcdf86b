"""Products in 8 bits against exact ones, within what their formats round."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from fastcpt import UserError, fp8, parallel
from fastcpt.config import Count, Train
from fastcpt.execution import Execution
from fastcpt.kernels import launch
from fastcpt.model import Architecture, GPTNeoX

# Of a format: half a unit in the last of its significant bits, and half its smallest number.
ROUNDING = {fp8.FORWARD: (2.0**-4, 2.0**-10), fp8.BACKWARD: (2.0**-3, 2.0**-17)}
BF16, FP32 = 2.0**-8, 2.0**-20  # of the result; of scales, divisions and sums


def spread(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """|x| and how far off its 8 bits may be, float64."""
    relative, absolute = ROUNDING[dtype]
    largest = x.double().abs().max()
    return x.double().abs(), x.double().abs() * relative + absolute * largest / torch.finfo(dtype).max


def check(found: torch.Tensor, a: tuple[torch.Tensor, torch.dtype], b: tuple[torch.Tensor, torch.dtype]) -> None:
    exact = a[0].double() @ b[0].double()
    (x, dx), (y, dy) = spread(*a), spread(*b)
    limit = (x + dx) @ (y + dy) * (1 + FP32) - x @ y
    limit = limit + (BF16 if found.dtype == torch.bfloat16 else 0) * (exact.abs() + limit)
    error = (found.double() - exact).abs()
    assert (error <= limit).all() and error.norm() > 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_products_are_within_rounding(size: float, weight_dtype: torch.dtype) -> None:
    """The sizes are those of gradients, which 8 bits without a scale would not hold."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (size * torch.randn(2, 24, width, generator=generator).bfloat16() for width in (48, 80))
    weight = (torch.randn(80, 48, generator=generator) / size).to(weight_dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = fp8.linear(x, weight)
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, weight_dtype)
    rows, gradient = x.detach().flatten(0, 1), dy.flatten(0, 1)
    check(y.detach().flatten(0, 1), (rows, fp8.FORWARD), (weight.detach().t(), fp8.FORWARD))
    check(x.grad.flatten(0, 1), (gradient, fp8.BACKWARD), (weight.detach(), fp8.FORWARD))
    check(weight.grad, (gradient.t(), fp8.BACKWARD), (rows, fp8.FORWARD))


def test_zeros_are_zeros_and_what_is_not_finite_stays_so() -> None:
    weight = torch.ones(16, 16)
    assert torch.equal(fp8.linear(torch.zeros(16, 16).bfloat16(), weight), torch.zeros(16, 16).bfloat16())
    for value in (torch.inf, torch.nan):
        assert not fp8.linear(torch.full((16, 16), value).bfloat16(), weight).isfinite().any()


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_computes_its_blocks_in_fp8_and_learns_as_in_bf16(recompute: bool) -> None:
    """Four products a block, eight in the backward pass; the head's are not among them."""
    arch = Architecture(2, 64, 2, vocab_size=96)
    tokens_BT = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    results = {}
    for eight in (False, True):
        model = GPTNeoX(arch, Execution(torch.bfloat16, fp8=eight, recompute=recompute))
        model.initialise_(torch.Generator().manual_seed(0))
        with Products() as products:
            loss, _ = model(tokens_BT, tokens_BT, total=True)
            loss.backward()
        assert products.calls["_scaled_mm"] == eight * 2 * (12 + 4 * recompute)
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        results[eight] = loss.item(), torch.cat(gradients)
    assert results[True][0] == pytest.approx(results[False][0], rel=2.0**-8) and results[True][0] != results[False][0]
    assert torch.cosine_similarity(results[True][1], results[False][1], dim=0) > 0.99


def test_compiled_it_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    recorded = AotEagerAndRecordGraphs()
    with torch.device("meta"):
        model = GPTNeoX(Architecture(2, 64, 2, vocab_size=96), Execution(torch.bfloat16, kernels=True, fp8=True))
    model.compile(dynamic=False, fullgraph=True, backend=recorded)
    tokens_BT = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    model(tokens_BT, tokens_BT, total=True)[0].backward()
    counts = [
        sum("_scaled_mm" in str(node.target) for node in graph.graph.nodes)
        for (graph,) in (recorded.fw_graphs, recorded.bw_graphs)
    ]
    assert counts == [2 * 4, 2 * 8]


def test_fp8_takes_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Train(
        tokens=Count(1), batch_tokens=Count(1), precision="fp8", attention="sdpa", kernels="torch", loss="full"
    )

    def choose(seq_len: int = 2048) -> Execution:
        return Execution.choose(settings, torch.device("cuda"), 64, seq_len, False)

    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability < (8, 9):
            with pytest.raises(UserError, match="sm_89 or newer, and this is cuda; use bf16"):
                choose()
        else:
            assert (choose().fp8, choose().dtype) == (True, torch.bfloat16)
            assert str(choose()).startswith("products in fp8, torch kernels")
    with pytest.raises(UserError, match=r"multiples of 16; data.seq_len is 2047"):
        choose(2047)
    assert not parallel.has_fp8(torch.device("cpu"))
