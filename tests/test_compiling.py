"""What a process compiled is taken over by the next, and only where our sources are the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch._dynamo.utils import counters
from torch._inductor.codecache import _precompile_header
from torch._inductor.utils import fresh_cache

from fastcpt.compiling import keep_compiled, warm_up_compiler
from fastcpt.kernels.linear_cross_entropy import linear_cross_entropy_sum


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with (
        torch.compiler.config.patch(cache_key_tag=""),
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=False),
        fresh_cache(),
    ):
        yield
    torch._dynamo.reset()


def compiled(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The gradients, and what torch counted, as in a new process."""
    torch._dynamo.reset()
    counters.clear()
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = torch.compile(lambda *args: linear_cross_entropy_sum(*args), fullgraph=True)(x, weight, targets)
    return list(torch.autograd.grad(loss, (x, weight))), dict(counters["aot_autograd"])


def test_the_graph_of_training_is_taken_over(settings: None) -> None:
    """The step's loss is an autograd.Function, whose graphs torch by itself would trace and partition anew."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 16), torch.randn(32, 16), torch.randint(32, (8,))
    keep_compiled()
    first, cold = compiled(*inputs)
    second, warm = compiled(*inputs)
    assert (cold["autograd_cache_miss"], cold["autograd_cache_saved"]) == (1, 1)
    assert warm["autograd_cache_hit"] == 1 and "autograd_cache_bypass" not in cold | warm
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.compiler.config.cache_key_tag += " of other sources"
    _, changed = compiled(*inputs)
    assert changed["autograd_cache_miss"] == 1 and "autograd_cache_hit" not in changed


def test_the_header_is_the_one_that_kernels_take(settings: None) -> None:
    """What is made on a thread is of use only if torch asks for the same with the first kernel."""
    warm_up_compiler().join()
    before = _precompile_header.cache_info()
    assert before.currsize
    torch.compile(lambda x: x.sin() + 1)(torch.randn(100))
    after = _precompile_header.cache_info()
    assert after.hits > before.hits and after.misses == before.misses
