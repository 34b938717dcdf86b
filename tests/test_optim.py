"""AdamW with folded clipping against torch's own optimizer and clipping, and the skip of non-finite gradients.

Every test runs on both paths: torch's fused kernel, and ours (in Triton's interpreter where there is no GPU).
"""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcpt import UserError, checkpoint, saving
from fastcpt.config import Optim
from fastcpt.optim import AdamW
from fastcpt.parallel import World

# The interpreter computes what `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CONFIG = Optim(lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, clip=1.0)
UNIT = 2.0**-24
SHAPES = [(13, 7), (7,), (5, 3, 2), (1,), (257, 3), (33,)]


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def kernels(request: pytest.FixtureRequest) -> bool:
    """The path; for ours, torch's default device becomes the one where kernels run."""
    if request.param:
        torch.set_default_device(request.getfixturevalue("triton_device"))
        request.addfinalizer(lambda: torch.set_default_device(None))
    return request.param


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = [torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES]
    return [nn.Parameter(value.to(torch.get_default_device(), dtype)) for value in values]


def make_gradients(seed: int) -> list[Tensor]:
    """Norms from far below to far above the clipping limit."""
    generator = torch.Generator("cpu").manual_seed(1000 + seed)
    scale = 10.0 ** (seed % 5 - 3)
    values = [scale * torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES]
    return [value.to(torch.get_default_device()) for value in values]


def give(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.to(parameter.dtype, copy=True)


def theirs(parameters: list[nn.Parameter], config: Optim) -> torch.optim.AdamW:
    """torch's plain loop, not the fused kernel that ours is built on."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        groups, lr=1.0, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay, foreach=False
    )


def rate(step: int) -> float:
    return 1e-2 * (1 + step % 7) / 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
def test_many_steps_equal_torch_adamw_and_clipping(dtype: torch.dtype, decay: float, kernels: bool) -> None:
    """Against torch in the same fp32, and against the truth in float64 from the same fp32 gradients.

    A step does some twenty roundings of terms no larger than the parameter or the rate, so in T steps the two drift
    apart by at most 20 T u (|p| + lr); the moments are sums of rounded products and are off by 20 T u relative to the
    largest gradient that they saw, and its square.
    """
    steps = 10 if kernels else 30  # the interpreter is slow
    config = Optim(lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=decay, clip=1.0)
    ours, reference = make_parameters(), make_parameters(dtype=dtype)
    optimizer, other = AdamW(ours, config, kernels), theirs(reference, config)
    largest = 0.0
    clipped = 0
    for step in range(steps):
        gradients = make_gradients(step)
        give(ours, gradients)
        give(reference, gradients)
        norm, skipped = optimizer.clipped_step(rate(step))
        exact_norm = torch.cat([gradient.double().flatten() for gradient in gradients]).norm().item()
        if exact_norm > config.clip:
            # torch divides by the norm + 1e-6; a limit that much larger makes it divide by the norm.
            nn.utils.clip_grad_norm_(reference, config.clip * (exact_norm + 1e-6) / exact_norm)
            clipped += 1
        largest = max(largest, max(parameter.grad.abs().max().item() for parameter in reference))
        for group in other.param_groups:
            group["lr"] = rate(step)
        other.step()
        assert skipped.item() == 0.0
        assert norm.item() == pytest.approx(exact_norm, rel=sum(g.numel() for g in gradients) * UNIT)
    assert 0 < clipped < steps
    bound = 20 * steps * UNIT
    for mine, their in zip(ours, reference):
        assert ((mine - their).abs() <= bound * (their.abs() + 1e-2)).all()
        state, expected = optimizer.state[mine], other.state[their]
        assert (state["exp_avg"] - expected["exp_avg"]).abs().max() <= bound * largest
        assert (state["exp_avg_sq"] - expected["exp_avg_sq"]).abs().max() <= bound * largest**2
        assert expected["step"].item() == steps
    assert optimizer.updates == steps


def test_one_step_equals_the_formula_of_the_paper(kernels: bool) -> None:
    """Decoupled decay: p - lr (m / sqrt(v) + decay p), the decay in neither moment, of matrices alone."""
    parameters, gradients = make_parameters(), make_gradients(3)
    start = [parameter.detach().double() for parameter in parameters]
    norm = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert norm > 20
    give(parameters, gradients)
    optimizer = AdamW(parameters, CONFIG, kernels)
    optimizer.clipped_step(0.01)
    for parameter, before, gradient in zip(parameters, start, gradients):
        clipped = gradient.double() / norm
        # After bias correction the moments of a first step are the gradient and its square.
        decay = 0.1 * before if before.ndim >= 2 else 0.0
        expected = before - 0.01 * (clipped / (clipped.abs() + 1e-8) + decay)
        assert ((parameter - expected).abs() <= 20 * UNIT * (before.abs() + 0.01)).all()
        state = optimizer.state[parameter]
        # The norm of a thousand values carries the most of it.
        relative = 1000 * UNIT
        torch.testing.assert_close(state["exp_avg"].double(), 0.1 * clipped, rtol=relative, atol=0.0)
        torch.testing.assert_close(state["exp_avg_sq"].double(), 0.05 * clipped**2, rtol=2 * relative, atol=0.0)


@pytest.mark.parametrize(("size", "factor"), [(0.25, 1.0), (1.0, 1.0), (3.0, 2.0), (150.0, 100.0)])
def test_clipping_divides_by_exactly_what_is_too_much(size: float, factor: float, kernels: bool) -> None:
    """With the first decay at 0 the first moment is the clipped gradient itself; all numbers here are exact in fp32."""
    parameter = nn.Parameter(torch.zeros(4, 2))
    optimizer = AdamW([parameter], Optim(lr=1.0, betas=[0.0, 0.95], clip=1.5), kernels)
    parameter.grad = torch.zeros(4, 2)
    parameter.grad[1, 0], parameter.grad[3, 1] = 0.6 * size, -0.8 * size
    given = parameter.grad.clone()
    norm, _ = optimizer.clipped_step(1e-3)
    assert norm.item() == pytest.approx(size, rel=3e-7)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], given / factor, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(bad: float, where: int, kernels: bool) -> None:
    untouched, disturbed = make_parameters(), make_parameters()
    clean, optimizer = AdamW(untouched, CONFIG, kernels), AdamW(disturbed, CONFIG, kernels)
    for step in range(5):
        gradients = make_gradients(step)
        give(untouched, gradients)
        clean.clipped_step(rate(step))
        if step in (0, 3, 4):
            spoilt = make_gradients(50 + step)
            spoilt[where + (0, 3, 4).index(step)].view(-1)[-1] = bad
            give(disturbed, spoilt)
            before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in disturbed])
            norm, skipped = optimizer.clipped_step(1e3)
            assert skipped.item() == 1.0 and not torch.isfinite(norm)
            assert optimizer.updates == step
            for parameter, (value, state) in zip(disturbed, before):
                assert torch.equal(parameter, value)
                assert all(torch.equal(optimizer.state[parameter][key], state[key]) for key in state)
                assert parameter.grad is None, "gradients are freed after a skipped step too"
        give(disturbed, gradients)
        _, skipped = optimizer.clipped_step(rate(step))
        assert skipped.item() == 0.0
    for mine, expected in zip(disturbed, untouched):
        assert torch.equal(mine, expected)
        assert all(torch.equal(optimizer.state[mine][key], value) for key, value in clean.state[expected].items())


def test_finite_gradients_whose_norm_overflows_are_skipped(kernels: bool) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW([parameter], CONFIG, kernels)
    parameter.grad = torch.full((2, 2), 3e38)
    _, skipped = optimizer.clipped_step(0.1)
    assert skipped.item() == 1.0 and torch.equal(parameter, torch.ones(2, 2))


def test_moments_and_their_count_can_be_put_back(kernels: bool) -> None:
    """What a checkpoint restores, parameters, moments and the count, is all there is: both go on to the same bits."""
    first, second = make_parameters(), make_parameters(seed=9)
    running, fresh = AdamW(first, CONFIG, kernels), AdamW(second, CONFIG, kernels)
    for step in range(5):
        give(first, make_gradients(step))
        running.clipped_step(rate(step))
    for mine, other in zip(second, first):
        mine.data.copy_(other.data)
        for key in ("exp_avg", "exp_avg_sq"):
            fresh.state[mine][key].copy_(running.state[other][key])
    assert fresh.updates == 0
    fresh.set_updates(running.updates)
    assert fresh.updates == 5
    for step in range(5, 8):
        for parameters, optimizer in ((first, running), (second, fresh)):
            give(parameters, make_gradients(step))
            optimizer.clipped_step(rate(step))
    assert all(torch.equal(mine, other) for mine, other in zip(second, first))


def test_rate_may_change_at_every_step_and_no_gradient_is_no_update(kernels: bool) -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, CONFIG, kernels)
    before = [parameter.detach().clone() for parameter in parameters]
    give(parameters[1:], make_gradients(0)[1:])
    optimizer.clipped_step(0.0)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before)), "a rate of 0"
    give(parameters[1:], make_gradients(1)[1:])
    optimizer.clipped_step(0.1)
    assert torch.equal(parameters[0], before[0]), "without a gradient a parameter does not even decay"
    assert all(not torch.equal(parameter, value) for parameter, value in zip(parameters[1:], before[1:]))


def test_scale_is_that_of_the_gradients(kernels: bool, launches: Counter[str]) -> None:
    """A step on gradients times 1/1024, exact in fp32, is a step with that scale; the norm is that of the product."""
    one, other = make_parameters(), make_parameters()
    scaled, plain = AdamW(one, CONFIG, kernels), AdamW(other, CONFIG, kernels)
    for step in range(5):
        give(one, [1024 * gradient for gradient in make_gradients(step)])
        give(other, make_gradients(step))
        norms = [scaled.clipped_step(rate(step), 1 / 1024)[0], plain.clipped_step(rate(step))[0]]
        assert norms[0] == norms[1]
    for mine, expected in zip(one, other):
        torch.testing.assert_close(mine, expected, rtol=4 * UNIT, atol=4 * UNIT * 5e-2)
    assert launches["adamw_kernel"] == (10 if kernels else 0)


def run(optimizer: AdamW, steps: range) -> None:
    for step in steps:
        give(optimizer.parameters, make_gradients(step))
        optimizer.clipped_step(rate(step), 0.5)


@pytest.mark.parametrize("first", [False, True], ids=["torch first", "kernels first"])
def test_a_checkpoint_of_one_path_goes_on_with_the_other(
    first: bool, triton_device: torch.device, launches: Counter[str], tmp_path: Path
) -> None:
    """Eight steps, half on each, are eight on either but for their roundings."""
    torch.set_default_device(triton_device)
    try:
        both = {kernels: AdamW(make_parameters(), CONFIG, kernels) for kernels in (False, True)}
        for optimizer in both.values():
            run(optimizer, range(8))
        start, end = AdamW(make_parameters(), CONFIG, first), AdamW(make_parameters(3), CONFIG, not first)
        run(start, range(4))
        world = World(0, 1, triton_device)
        saved = saving.save(tmp_path, 4, tensors(start), {"adam_updates": start.updates}, {}, world)
        checkpoint.load_tensors_(saved, tensors(end), world)
        end.set_updates(checkpoint.read_state(saved)["adam_updates"])
        run(end, range(4, 8))
    finally:
        torch.set_default_device(None)
    assert end.updates == 8 and launches["adamw_kernel"] == 12
    for mine, one, other in zip(end.parameters, both[False].parameters, both[True].parameters):
        for expected in (one, other):
            assert ((mine - expected).abs() <= 20 * 8 * UNIT * (expected.abs() + 1e-2)).all()


def tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """As `state.named_tensors` names them."""
    found = {}
    for index, parameter in enumerate(optimizer.parameters):
        found[f"model.{index}"] = parameter.detach()
        for name in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{index}"] = optimizer.state[parameter][name]
    return found


def test_shards_share_one_norm(kernels: bool) -> None:
    """Two optimizers with half of the parameters each, told each other's sum of squares, step as one with all."""
    whole, parts = make_parameters(), make_parameters()
    together = AdamW(whole, CONFIG, kernels)
    halves = [AdamW(parts[:3], CONFIG, kernels), AdamW(parts[3:], CONFIG, kernels)]
    gradients = make_gradients(4)
    for optimizer, other in zip(halves, ([*gradients[3:]], [*gradients[:3]])):
        outside = torch.cat([gradient.flatten() for gradient in other]).square().sum()
        optimizer.reduce = lambda square, outside=outside: square + outside  # type: ignore[misc]
    give(whole, gradients)
    give(parts, gradients)
    norm, _ = together.clipped_step(1e-2, 0.25)
    for optimizer in halves:
        torch.testing.assert_close(optimizer.clipped_step(1e-2, 0.25)[0], norm)
    for mine, expected in zip(parts, whole):
        torch.testing.assert_close(mine, expected, rtol=UNIT * 8, atol=UNIT * 8)


def test_shards_skip_together(kernels: bool) -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, CONFIG, kernels)
    optimizer.reduce = lambda square: square + torch.inf
    before = copy.deepcopy(parameters)
    give(parameters, make_gradients(0))
    assert optimizer.clipped_step(1.0)[1] == 1 and optimizer.updates == 0
    assert all(torch.equal(mine, other) for mine, other in zip(parameters, before))


def test_all_parameters_may_be_matrices_or_none(kernels: bool) -> None:
    """An empty group, and one tensor in the other."""
    for shape, kept in (((4, 2), 0.99), ((8,), 1.0)):
        parameter = nn.Parameter(torch.ones(shape))
        parameter.grad = torch.zeros(shape)
        AdamW([parameter], CONFIG, kernels).clipped_step(0.1)
        torch.testing.assert_close(parameter.detach(), torch.full(shape, kept))


def test_norm_of_a_large_tensor_is_exact() -> None:
    """On CPU torch's own is off by 1.5 parts in 1000 at 20M elements, and clipping with it."""
    parameter = nn.Parameter(torch.zeros(20_000_000))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    exact = parameter.grad.double().norm()
    norm, _ = AdamW([parameter], CONFIG).clipped_step(1e-3)
    assert abs(norm / exact - 1) < 1e-5


def test_bf16_moments(kernels: bool) -> None:
    """Half the memory; the same to three digits, the same bits every time."""
    optimizers = [AdamW(make_parameters(), CONFIG, kernels, torch.bfloat16) for _ in range(2)]
    full = AdamW(make_parameters(), CONFIG, kernels)
    for optimizer in (*optimizers, full):
        run(optimizer, range(5))
    assert optimizers[0].updates == 5
    for one, other, exact in zip(*(optimizer.parameters for optimizer in (*optimizers, full))):
        assert torch.equal(one, other)
        state = optimizers[0].state[one]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        # Moments are off by 2^-7 at most when they are used, and each step is of the size of the rate.
        assert (one - exact).abs().max() <= 5 * 1e-2 * 0.1


def test_kernels_without_a_gpu_are_refused() -> None:
    with pytest.raises(UserError, match="need a GPU"):
        AdamW(make_parameters(), CONFIG, kernels=True)
    with pytest.raises(UserError, match="bfloat16 moments on meta"):
        AdamW([nn.Parameter(torch.empty(2, device="meta"))], CONFIG, moments=torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"kernels": False}, {"kernels": True}], ids=str)
def test_host_never_waits_for_the_gpu(options: dict[str, Any]) -> None:
    torch.set_default_device("cuda")
    try:
        optimizer = AdamW(make_parameters(), CONFIG, **options)
        gradients = [make_gradients(step) for step in range(4)]
        for step, values in enumerate(gradients):
            give(optimizer.parameters, values)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            optimizer.clipped_step(rate(step), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_default_device(None)
    assert optimizer.updates == 4
