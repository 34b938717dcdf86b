"""Attention: the choice of a backend over a table, documents against plain loops, and numbers against float64.

No backend but sdpa runs without a GPU. What is shown here for the others is the choice, the arguments against the
installed package, and that documents are packed and unpacked right around a stand-in for their kernels, which knows
nothing of ours but (N, H, C) inputs and the places where documents begin. The GPU tests at the end run the real ones.
"""

import ast
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from fastcpt import UserError
from fastcpt import attention as module
from fastcpt.attention import PACKAGES, Backend, Name, Setting, build, choose, decide, document_bounds, document_ids
from fastcpt.attention import missing as really_missing
from fastcpt.cpu_attention import probabilities

CPU = torch.device("cpu")
EOD = 0
H100 = Setting((9, 0), 64, torch.bfloat16, 2048, documents=False)
KERNELS = ("cudnn", "flash2", "flash3", "flash4", "varlen")
PACKED = ("flash2", "flash3", "flash4", "varlen")  # those that take the places where documents begin


def installed(*names: str) -> Callable[[str], str | None]:
    """A machine with these backends' packages."""
    return lambda name: None if name in (*names, "sdpa") else f"{name} is not there"


# ---------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    "setting, packages, expected",
    [
        # Hopper: FA3, then FA4, then cuDNN, which torch brings along.
        (H100, KERNELS, "flash3"),
        (H100, ("cudnn", "flash2", "flash4"), "flash4"),
        (H100, ("cudnn", "flash2", "varlen"), "cudnn"),
        (replace(H100, head_width=256), ("cudnn", "flash2"), "flash2"),
        (replace(H100, head_width=256), ("cudnn",), "sdpa"),
        (replace(H100, seq_len=1000), ("cudnn",), "sdpa"),
        (replace(H100, deterministic=True), ("cudnn",), "sdpa"),
        (replace(H100, deterministic=True), KERNELS, "flash3"),
        (replace(H100, dtype=torch.float32), KERNELS, "sdpa"),
        (replace(H100, head_width=20), KERNELS, "sdpa"),
        (replace(H100, documents=True), KERNELS, "flash3"),
        (replace(H100, documents=True), ("cudnn", "flash2", "varlen"), "flash2"),
        (replace(H100, documents=True), ("cudnn", "varlen"), "varlen"),
        (replace(H100, documents=True), ("cudnn",), "sdpa"),
        # Blackwell: cuDNN for whole rows, FA4 for documents.
        (replace(H100, capability=(10, 0)), KERNELS, "cudnn"),
        (replace(H100, capability=(10, 0), documents=True), KERNELS, "flash4"),
        (replace(H100, capability=(10, 0), head_width=256), KERNELS, "flash4"),
        (replace(H100, capability=(10, 0), head_width=192, documents=True), KERNELS, "flash2"),
        # Ampere and small cards: flash-attention 2, the package's or torch's own; cuDNN is slower there.
        (replace(H100, capability=(8, 0)), KERNELS, "flash2"),
        (replace(H100, capability=(8, 0)), ("cudnn", "varlen"), "sdpa"),
        (replace(H100, capability=(8, 0), documents=True), ("cudnn", "varlen"), "varlen"),
        (replace(H100, capability=(12, 0)), ("cudnn", "flash3", "flash4"), "sdpa"),
        (replace(H100, capability=(7, 5), documents=True), KERNELS, "sdpa"),
        (replace(H100, capability=None, documents=True), KERNELS, "sdpa"),
    ],
)
def test_auto_takes_the_first_that_can_run(setting: Setting, packages: tuple[str, ...], expected: str) -> None:
    name, reason = decide("auto", setting, installed(*packages))
    assert name == expected and reason.startswith(expected)
    passed = module.preference(setting)[: module.preference(setting).index(expected)]
    for candidate in passed:  # each that was passed over is in the log, with the cause
        assert f"not {candidate}: " in reason
        if module.refusal(candidate, setting) is None:
            assert f"{candidate} is not there" in reason
    assert decide(expected, setting, installed(*packages)) == (expected, f"{expected}, as train.attention says")


def test_the_log_says_what_was_missing() -> None:
    assert decide("auto", replace(H100, head_width=256), installed("cudnn", "flash2"))[1] == (
        "flash2; not flash3: flash3 is not there; not flash4: flash4 is not there; "
        "not cudnn: it takes head widths that are multiples of 8 up to 128 on sm_90, and this model's is 256"
    )
    assert decide("auto", replace(H100, capability=None), installed(*KERNELS)) == ("sdpa", "sdpa")
    assert decide("auto", replace(H100, capability=None, cpu=True), installed("blocks"))[0] == "blocks"


@pytest.mark.parametrize(
    "name, setting, why",
    [
        *[(name, replace(H100, capability=None), "it needs an NVIDIA GPU") for name in KERNELS],
        ("flash2", replace(H100, capability=(7, 5)), "it needs sm_80 or newer, and this GPU is sm_75"),
        ("flash3", replace(H100, capability=(8, 0)), "it needs sm_9x, and this GPU is sm_80"),
        ("flash3", replace(H100, capability=(10, 0)), "it needs sm_9x, and this GPU is sm_100"),
        ("flash4", replace(H100, capability=(8, 9)), "it needs sm_9x or sm_10x, and this GPU is sm_89"),
        *[
            (name, replace(H100, dtype=torch.float32), "it takes bfloat16, and the model computes in float32")
            for name in KERNELS
        ],
        ("flash2", replace(H100, head_width=264), "multiples of 8 up to 256 on sm_90, and this model's is 264"),
        ("flash3", replace(H100, head_width=100), "multiples of 8 up to 256 on sm_90, and this model's is 100"),
        ("flash4", replace(H100, capability=(10, 0), head_width=136), "up to 128 on sm_100, and this model's is 136"),
        ("cudnn", replace(H100, head_width=136), "multiples of 8 up to 128 on sm_90, and this model's is 136"),
        ("cudnn", replace(H100, documents=True), "it has no document mask"),
        ("cudnn", replace(H100, seq_len=2000), "data.seq_len 2000 is no multiple of 128"),
        ("cudnn", replace(H100, deterministic=True), "it is not deterministic"),
        ("varlen", H100, "it is for documents, and data.document_mask is off"),
        ("blocks", H100, "it is for CPUs"),
        (
            "blocks",
            replace(H100, capability=None, cpu=True, dtype=torch.float32),
            "it takes bfloat16, and the model computes in float32",
        ),
    ],
)
def test_what_is_asked_for_and_cannot_run_is_an_error(name: str, setting: Setting, why: str) -> None:
    with pytest.raises(UserError) as error:
        decide(name, setting, installed(*KERNELS))
    assert str(error.value).startswith(f"train.attention is {name}, but ")
    assert why in str(error.value) and str(error.value).endswith("; use auto, which takes what can run")


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_asked_for_and_not_installed_is_an_error(name: str) -> None:
    setting = replace(H100, documents=name != "cudnn")
    with pytest.raises(UserError, match=f"^train.attention is {name}, but {name} is not there; use auto"):
        decide(name, setting, installed())


def test_a_name_that_nothing_has() -> None:
    with pytest.raises(UserError, match="'flash5' is unknown; it is one of auto, sdpa, blocks, cudnn"):
        decide("flash5", H100, installed(*KERNELS))


@pytest.mark.parametrize("name", get_args(Name))
def test_the_choice_on_this_cpu(name: str) -> None:
    if name in ("auto", "sdpa"):
        backend = choose(name, CPU, 20, torch.float32, 16, documents=True)
        assert (backend.name, backend.function) == ("sdpa", module.sdpa)
    if name in ("auto", "blocks"):
        backend = choose(name, CPU, 20, torch.bfloat16, 16, documents=True)
        assert (backend.name, backend.function) == ("blocks", module.cpu_attention)
    elif name != "sdpa":
        with pytest.raises(UserError, match=f"train.attention is {name}, but it needs an NVIDIA GPU; use auto"):
            choose(name, CPU, 64, torch.bfloat16, 2048, documents=True)


# ---------------------------------------------------------------------------------------------------- packages


def test_a_package_that_is_absent_broken_or_of_another_version_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert really_missing("flash3") == (
        "flash_attn_interface cannot be imported (import of flash_attn_interface halted; None in sys.modules)"
    )
    package = types.ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    assert "flash_attn_func of the installed flash_attn_interface takes no causal, " in str(really_missing("flash3"))
    package.flash_attn_func = lambda q, k, v, causal, deterministic: None  # type: ignore[attr-defined]
    assert really_missing("flash3") == (
        "flash_attn_func of the installed flash_attn_interface takes no return_attn_probs"
    )
    assert really_missing("sdpa") is None
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert really_missing("cudnn") == "this torch has no cuDNN"


def test_the_installed_torch_takes_our_arguments() -> None:
    assert really_missing("varlen") is None
    varlen_attn = sys.modules["torch.nn.attention.varlen"].varlen_attn  # type: ignore[attr-defined]
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:3] == ["query", "key", "value"] and {"window_size", "is_causal"} & parameters.keys()
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    assert [argument.name for argument in schema.arguments][:4] == ["query", "key", "value", "attn_bias"]
    assert {"compute_log_sumexp", "is_causal"} <= {argument.name for argument in schema.arguments}
    assert {a.name: a.default_value for a in schema.arguments}["dropout_p"] == 0.0
    assert schema.returns[0].name == "output"


@pytest.mark.parametrize(
    "name, project, path",
    [
        ("flash2", "flash-attn", "flash_attn/flash_attn_interface.py"),
        ("flash3", "flash-attn-3", "flash_attn_interface.py"),
        ("flash4", "flash-attn-4", "flash_attn/cute/interface.py"),
    ],
)
def test_the_installed_package_takes_our_arguments(name: str, project: str, path: str) -> None:
    """Read and not imported: without a GPU none of them can be."""
    try:
        source = distribution(project).locate_file(path).read_text()  # type: ignore[attr-defined]
    except PackageNotFoundError:
        pytest.skip(f"{project} is not installed")
    functions = {node.name: node.args for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert path.removesuffix(".py").replace("/", ".") == PACKAGES[name][0]
    for function, arguments in PACKAGES[name][1].items():
        names = [argument.arg for argument in (*functions[function].args, *functions[function].kwonlyargs)]
        assert arguments <= set(names)
        leading = ["q", "k", "v", "out", "dout", "lse"] if function == "_flash_attn_bwd" else ["q", "k", "v"]
        assert names[: len(leading)] == leading


# ---------------------------------------------------------------------------------------------------- documents


def documents_of(tokens: np.ndarray) -> list[list[int]]:
    """The documents of a batch as lists of positions among all its tokens, by a loop."""
    documents, number = [], 0
    for row in tokens:
        current: list[int] = []
        for token in row:
            current.append(number)
            number += 1
            if token == EOD:
                documents.append(current)
                current = []
        if current:
            documents.append(current)
    return documents


HAND_MADE = [
    [[5, 6, 7, 8], [9, 1, 2, 3]],  # none ends
    [[0, 6, 7, 8], [9, 1, 2, 3]],  # the first token ends one
    [[5, 6, 7, 0], [9, 1, 2, 0]],  # the last of each row does, so that nothing begins there
    [[5, 0, 0, 8], [0, 0, 2, 3]],  # two in a row
    [[0, 0, 0, 0], [0, 0, 0, 0]],  # each its own
    [[5]],
    [[0]],
]


def batches_of_tokens() -> Iterator[np.ndarray]:
    yield from (np.array(rows, np.uint16) for rows in HAND_MADE)
    generator = np.random.default_rng(0)
    for dtype in (np.uint16, np.int32, np.int64):
        for _ in range(20):
            shape = generator.integers(1, 6), generator.integers(1, 40)
            rate = generator.choice([2, 5, 30])
            yield generator.integers(0, rate, shape).astype(dtype)
    yield generator.integers(0, 5, (4, 18)).astype(np.uint16)[1:3, :-1]  # a view, as training takes it


@pytest.mark.parametrize("tokens", [*batches_of_tokens()])
def test_documents_against_a_loop(tokens: np.ndarray) -> None:
    documents, before = documents_of(tokens), tokens.copy()
    bounds = document_bounds(tokens, EOD)
    assert bounds.dtype == np.int32 and bounds.flags.c_contiguous
    filled = len(documents)
    assert bounds[: filled + 1].tolist() == [0, *(document[-1] + 1 for document in documents)]
    padded = len(bounds) - 1
    assert set(bounds[filled:].tolist()) == {tokens.size}  # the rest are empty, and every token is in a document
    assert padded & (padded - 1) == 0 and filled <= padded < 2 * filled

    ids = document_ids(tokens, EOD)
    assert ids.dtype == np.int32 and ids.shape == tokens.shape
    assert [np.flatnonzero(np.diff(row)).tolist() for row in ids] == [
        [column for column in np.flatnonzero(row == EOD).tolist() if column < len(row) - 1] for row in tokens
    ]
    assert (ids[:, 0] == 0).all() and np.diff(ids, axis=1).max(initial=0) <= 1
    np.testing.assert_array_equal(tokens, before)


def test_a_backend_makes_the_documents_that_it_reads() -> None:
    tokens = np.array([[5, 0, 7], [8, 9, 1]], np.uint16)
    assert Backend("sdpa", "", module.sdpa).documents(tokens, EOD, CPU).tolist() == [[0, 0, 1], [0, 0, 0]]
    for name in PACKED:
        bounds = Backend(name, "", module.sdpa).documents(tokens, EOD, CPU)
        assert bounds.dtype == torch.int32 and bounds.tolist() == [0, 2, 3, 6, 6]
    assert Backend("sdpa", "", module.sdpa).documents(torch.tensor([[0, 4]]), EOD, CPU).tolist() == [[0, 1]]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- numbers


def written_out(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhc->bqhc", weights, v)


def visible_pairs(tokens: np.ndarray, documents: bool) -> Tensor:
    """Whether a query sees a key, (B, T, T), by a loop over documents."""
    rows, length = tokens.shape
    visible = torch.zeros(rows, length, length, dtype=torch.bool)
    groups = documents_of(tokens) if documents else [list(range(r * length, (r + 1) * length)) for r in range(rows)]
    for group in groups:
        row, first = divmod(group[0], length)
        here = slice(first, first + len(group))
        visible[row, here, here] = torch.ones(len(group), len(group), dtype=torch.bool).tril()
    return visible


def inputs(tokens: np.ndarray, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the result; the first three are views of one packed projection, as the model's."""
    generator = torch.Generator().manual_seed(tokens.size + width)
    qkv = torch.randn(*tokens.shape, heads, 3 * width, generator=generator).to(device, dtype)
    direction = torch.randn(*tokens.shape, heads, width, generator=generator).to(device, dtype)
    return [*qkv.chunk(3, dim=-1), direction]


def results(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> list[Tensor]:
    """The result and the gradients of q, k, v. All three are views, also of what has the gradient."""
    packed = torch.cat((q, k, v), dim=-1).requires_grad_()
    y = function(*packed.chunk(3, dim=-1))
    y.backward(direction)
    assert packed.grad is not None and y.dtype == q.dtype and y.shape == q.shape
    return [y.detach(), *packed.grad.chunk(3, dim=-1)]


def check_numbers(
    check_budget: Callable[..., float], label: str, ours: list[Tensor], plain: list[Tensor], given: list[Tensor],
    visible: Tensor,
) -> None:  # fmt: skip
    """Results and gradients against float64, within a bound from the roundings of any such kernel.

    With products summed in fp32, a score is off by (C + 2) u sum|q k| / sqrt(C), u = 2^-24, its weight by twice that
    and (T + 4) u, relatively; weights and their gradients are rounded to the dtype once each before they are
    multiplied, as is the result that enters the gradient of a score.
    """
    q, k, v, direction = (x.double() for x in given)
    exact = results(lambda q, k, v: written_out(q, k, v, visible), q, k, v, direction)
    length, width = q.shape[1], q.shape[-1]
    unit, low = 2.0**-24, torch.finfo(ours[0].dtype).eps / 2
    sums = torch.einsum("bqhc,bkhc->bhqk", q.abs(), k.abs()).masked_fill(~visible[:, None], 0)
    score = float(sums.max()) * (width + 2) * unit / math.sqrt(width)
    off = 2 * score + (length + width + 8) * unit
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(width)
    weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
    sizes = torch.einsum("bhqk,bkhc->bqhc", weights, v.abs())
    # dS = P (dP - D), with the size of dP and of D = sum dy y.
    inner = torch.einsum("bqhc,bkhc->bhqk", direction.abs(), v.abs())
    inner = weights * (inner + (direction.abs() * exact[0].abs()).sum(-1).transpose(1, 2)[..., None])
    scales = [
        sizes,
        torch.einsum("bhqk,bkhc->bqhc", inner, k.abs()) / math.sqrt(width),
        torch.einsum("bhqk,bqhc->bkhc", inner, q.abs()) / math.sqrt(width),
        torch.einsum("bhqk,bqhc->bkhc", weights, direction.abs()),
    ]
    for name, mine, theirs, right, scale in zip(("y", "dq", "dk", "dv"), ours, plain, exact, scales):
        rounded = 3 if name in ("dq", "dk") else 1
        if length == 1 and rounded == 3:  # the only key's weight is 1 and has no gradient
            assert (mine.double().abs() <= (off + rounded * low) * scale).all()
        else:
            check_budget(f"{label}: {name}", mine, theirs, right, terms=(off + rounded * low) / unit, scale=scale)


def some_tokens(rows: int, length: int, rate: int = 5) -> np.ndarray:
    return np.random.default_rng(rows * length).integers(0, rate, (rows, length)).astype(np.uint16)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "name, dtype", [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("blocks", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(
    "length, heads, width", [(1, 1, 8), (2, 3, 20), (37, 3, 64), (67, 2, 80), (130, 1, 128), (300, 2, 24)]
)
def test_on_a_cpu_against_float64(
    name: str, length: int, heads: int, width: int, dtype: torch.dtype, documents: bool,
    check_budget: Callable[..., float],
) -> None:  # fmt: skip
    tokens = some_tokens(2, length)
    visible = visible_pairs(tokens, documents)
    given = inputs(tokens, heads, width, dtype, CPU)
    attend = choose(name, CPU, width, dtype, length, documents)
    chosen = attend.documents(tokens, EOD, CPU) if documents else None
    ours = results(lambda q, k, v: attend(q, k, v, chosen), *given)
    plain = results(lambda q, k, v: written_out(q, k, v, visible), *given)
    check_numbers(check_budget, f"attention {name} {str(dtype)[6:]}", ours, plain, given, visible)


def test_the_operator_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 2, 140, 8, generator=generator).to(torch.bfloat16).unbind()
    documents = torch.from_numpy(document_ids(some_tokens(2, 140), EOD))
    for given in (None, documents):
        operator = torch.ops.fastcpt.cpu_attention.default
        torch.library.opcheck(operator, (*(x.clone().requires_grad_() for x in (q, k, v)), given))
        _, kept = operator(q, k, v, given)
        assert len(kept) == 4 * (70 * 70 + 70 * 140)  # rows meet the positions up to their block's end alone
        torch.library.opcheck(torch.ops.fastcpt.cpu_attention_backward.default, (dy, q, k, v, kept))
    assert probabilities(300) == 128 * 128 + 128 * 256 + 44 * 300
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


# --------------------------------------------------------------------------- stand-ins for kernels that need a GPU


def pieces(q: Tensor, bounds: Tensor | None, longest: int) -> list[tuple[Any, ...]]:
    """What a kernel works through, one document or row after another, as indexes; an empty document is nothing."""
    assert q.stride(-1) == 1
    if bounds is None:
        assert q.ndim == 4 and q.shape[1] == longest
        return [(row,) for row in range(len(q))]
    places = bounds.tolist()
    assert q.ndim == 3 and bounds.dtype == torch.int32 and places[0] == 0 and places[-1] == len(q)
    assert all(0 <= end - first <= longest for first, end in pairwise(places))
    return [(slice(first, end),) for first, end in pairwise(places) if end > first]


def weights_of(q_THC: Tensor, k_THC: Tensor) -> Tensor:
    scores = torch.einsum("qhc,khc->hqk", q_THC, k_THC) / math.sqrt(q_THC.shape[-1])
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int) -> Tensor:
    y = torch.full(q.shape, math.nan, dtype=q.dtype)
    for piece in pieces(q, bounds, longest):
        y[piece] = torch.einsum("hqk,khc->qhc", weights_of(q[piece], k[piece]), v[piece])
    return y


def kernel_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.full(q.shape, math.nan, dtype=q.dtype) for _ in range(3))
    for piece in pieces(q, bounds, longest):
        weights = weights_of(q[piece], k[piece])
        d_weights = torch.einsum("qhc,khc->hqk", dy[piece], v[piece])
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        dq[piece] = torch.einsum("hqk,khc->qhc", d_scores, k[piece])
        dk[piece] = torch.einsum("hqk,qhc->khc", d_scores, q[piece])
        dv[piece] = torch.einsum("hqk,qhc->khc", weights, dy[piece])
    return dq, dk, dv


@torch.library.custom_op("fastcpt_tests::attention", mutates_args=())
def opaque(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int) -> Tensor:
    return kernel(q, k, v, bounds, longest)


@torch.library.custom_op("fastcpt_tests::attention_backward", mutates_args=())
def opaque_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel_backward(dy, q, k, v, bounds, longest)


opaque.register_fake(lambda q, *rest: q.new_empty(q.shape))
opaque_backward.register_fake(lambda dy, q, *rest: tuple(q.new_empty(q.shape) for _ in range(3)))


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.longest = inputs
    ctx.save_for_backward(*saved)


opaque.register_autograd(
    lambda ctx, dy: (*opaque_backward(dy, *ctx.saved_tensors, ctx.longest), None, None),
    setup_context=save_inputs,
)


def flash_stand_in() -> types.ModuleType:
    """The two functions of flash-attention 2 and 3, with the arguments by name that are checked above and no others."""
    package = types.ModuleType("stand_in")

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool, return_attn_probs: bool
    ) -> Tensor:
        assert causal and deterministic and not return_attn_probs
        return opaque(q, k, v, None, q.shape[1])

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, causal: bool, deterministic: bool, return_attn_probs: bool,
    ) -> Tensor:  # fmt: skip
        assert causal and deterministic and not return_attn_probs
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return opaque(q, k, v, cu_seqlens_q, max_seqlen_q)

    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return package


def flash4_stand_in() -> types.ModuleType:
    """The two passes of flash-attention 4: they get and give plain tensors, without autograd."""
    package = types.ModuleType("stand_in")

    def log_sum_exp(q: Tensor) -> Tensor:  # any number that is one of these inputs'
        return q.float().sum(-1).transpose(-1, -2).contiguous()

    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool, cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
    ) -> tuple[Tensor, Tensor, None, None, None]:  # fmt: skip
        assert causal and return_lse and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return kernel(q, k, v, cu_seqlens_q, max_seqlen_q or q.shape[1]), log_sum_exp(q), None, None, None

    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, causal: bool,
        deterministic: bool, dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None,
    ) -> None:  # fmt: skip
        assert causal and deterministic and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        longest = max_seqlen_q or q.shape[1]
        assert torch.equal(lse, log_sum_exp(q)) and torch.equal(out, kernel(q, k, v, cu_seqlens_q, longest))
        for target, value in zip((dq, dk, dv), kernel_backward(dout, q, k, v, cu_seqlens_q, longest)):
            target.copy_(value)

    package._flash_attn_fwd, package._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd  # type: ignore[attr-defined]
    return package


@pytest.fixture(params=["flash2", "flash3", "flash4", "varlen", "varlen-2.10"])
def packed_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend that takes documents as the places where they begin, over a stand-in for its kernels."""
    name = request.param.partition("-")[0]
    package = flash4_stand_in() if name == "flash4" else flash_stand_in()
    if name == "varlen":
        package = types.ModuleType("stand_in")

        def now(
            query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
            window_size: tuple[int, int] = (-1, -1),
        ) -> Tensor:  # fmt: skip
            assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
            return opaque(query, key, value, cu_seq_q, max_q)

        def before(
            query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
            is_causal: bool = False,
        ) -> Tensor:  # fmt: skip
            return now(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0 if is_causal else -1))

        package.varlen_attn = before if request.param == "varlen-2.10" else now  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PACKAGES[name][0], package)
    assert really_missing(name) is None
    return Backend(name, "", build(name, deterministic=True))


@pytest.mark.parametrize("tokens", [*batches_of_tokens()][::7])
def test_packed_documents_are_those_of_the_mask(packed_backend: Backend, tokens: np.ndarray) -> None:
    """The packing, padding and unpacking around a kernel, in float64: the same as torch under the mask."""
    given = inputs(tokens, 3, 8, torch.float64, CPU)
    masked = Backend("sdpa", "", module.sdpa)
    for documents in (True, False):
        if packed_backend.name == "varlen" and not documents:
            continue
        numbers = []
        for backend in (packed_backend, masked):
            chosen = backend.documents(tokens, EOD, CPU) if documents else None
            numbers.append(results(lambda q, k, v, f=backend, d=chosen: f(q, k, v, d), *given))
        for ours, expected in zip(*numbers):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_no_copy_is_made_of_views_of_a_packed_projection(packed_backend: Backend) -> None:
    q, k, v, _ = inputs(some_tokens(2, 5), 3, 8, torch.float64, CPU)
    seen: list[Tensor] = []
    attend = module._packing(lambda q, k, v, bounds, longest: seen.extend((q, k, v)) or q)
    for bounds in (None, torch.tensor([0, 5, 10], dtype=torch.int32)):
        attend(q, k, v, bounds)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)] * 2
    assert seen[3].shape == (10, 3, 8) and seen[3].stride() == (3 * 24, 24, 1)


def test_varlen_is_not_called_without_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        build("varlen", False)(*inputs(some_tokens(1, 4), 1, 8, torch.float64, CPU)[:3], None)


class Layer(nn.Module):
    """As the model holds a backend: an attribute of a module."""

    def __init__(self, attend: Backend) -> None:
        super().__init__()
        self.attend = attend
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, qkv: Tensor, documents: Tensor | None) -> Tensor:
        q, k, v = (qkv * self.scale).chunk(3, dim=-1)
        return self.attend(q, k, v, documents).flatten(-2).sin()


def check_compiled(
    attend: Backend, documents: bool, compiler: str = "aot_eager", dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """One graph, forward and backward, with the numbers of eager; a graph more for another number of documents."""
    torch._dynamo.reset()
    layer = Layer(attend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=compiler)
    for tokens in (some_tokens(2, 16), some_tokens(2, 16, rate=40)):
        given = torch.cat(inputs(tokens, 2, 8, dtype, CPU)[:3], dim=-1)
        chosen = attend.documents(tokens, EOD, CPU) if documents else None
        numbers = []
        for forward in (layer, compiled):
            qkv = given.clone().requires_grad_()
            y = forward(qkv, chosen)
            numbers.append([y, *torch.autograd.grad(y.sum(), (qkv, layer.scale))])
        for ours, expected in zip(*numbers):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_packed_backends_compile_without_a_break(packed_backend: Backend) -> None:
    check_compiled(packed_backend, documents=True)
    if packed_backend.name != "varlen":
        check_compiled(packed_backend, documents=False)


@pytest.mark.parametrize("documents", [False, True])
def test_sdpa_and_flash4_compile_to_code(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES["flash4"][0], flash4_stand_in())
    for backend in ("sdpa", "flash4"):
        check_compiled(Backend(backend, "", build(backend, deterministic=True)), documents, "inductor")


@pytest.mark.parametrize("documents", [False, True])
def test_blocks_compile_without_a_break(documents: bool) -> None:
    check_compiled(Backend("blocks", "", build("blocks", True)), documents, dtype=torch.bfloat16, tolerance=2.0**-6)


def test_few_shapes_are_compiled(packed_backend: Backend) -> None:
    """Batches of nine to sixteen documents are one graph, five to eight another: log2(T) + 1 graphs at most."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(packed_backend, fullgraph=True, dynamic=False, backend=counter)
    q, k, v, _ = inputs(some_tokens(2, 16), 2, 8, torch.float32, CPU)
    for count in (9, 12, 16, 10, 5, 8, 9):
        tokens = np.ones((2, 16), np.uint16)
        tokens[0, : count - 2] = EOD
        compiled(q, k, v, packed_backend.documents(tokens, EOD, CPU))
    assert counter.frame_count == 2


def test_the_operator_of_flash4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES["flash4"][0], flash4_stand_in())
    tokens = some_tokens(2, 9)
    given = inputs(tokens, 2, 8, torch.float32, CPU)[:3]
    bounds = torch.from_numpy(document_bounds(tokens, EOD))
    # Heads before time in memory: results are contiguous all the same.
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given]
    packed = [x.flatten(0, 1).requires_grad_() for x in given]
    for arguments in ((*rows, None), (*packed, bounds)):
        torch.library.opcheck(torch.ops.fastcpt.flash4_forward.default, (*arguments, 9, True))
        q, k, v, places = (None if x is None else x.detach() for x in arguments)
        saved = torch.ops.fastcpt.flash4_forward(q, k, v, places, 9, True)
        dy = torch.ones(q.shape)
        torch.library.opcheck(torch.ops.fastcpt.flash4_backward.default, (dy, *saved, q, k, v, places, 9, True))


@pytest.fixture
def cudnn_stand_in() -> Iterator[list[str]]:
    """torch's operator for cuDNN with a CPU implementation, and the passes that were called."""
    calls: list[str] = []

    def rows(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in (q_BHTC, k_BHTC, v_BHTC)]

    def forward(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
        dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert attn_bias is None and compute_log_sumexp and dropout_p == 0 and is_causal and not return_debug_mask
        calls.append("forward")
        y = kernel(*rows(query, key, value), None, query.shape[2]).transpose(1, 2)
        none = torch.empty(0, dtype=torch.int64)
        return y, query.new_zeros(*query.shape[:3], 1, dtype=torch.float32), none, none, 1, 1, none[:0], none[:0], none

    def backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        calls.append("backward")
        found = kernel_backward(grad_out.transpose(1, 2), *rows(query, key, value), None, query.shape[2])
        return tuple(x.transpose(1, 2) for x in found)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")
        yield calls


def test_cudnn_is_called_and_nothing_else(cudnn_stand_in: list[str]) -> None:
    given = inputs(some_tokens(2, 7), 2, 8, torch.float64, CPU)
    ours = results(build("cudnn", False), *given)
    assert cudnn_stand_in == ["forward", "backward"]
    for mine, expected in zip(ours, results(module.sdpa, *given)):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_cudnn_compiles_without_a_break(cudnn_stand_in: list[str]) -> None:
    check_compiled(Backend("cudnn", "", build("cudnn", False)), documents=False)
    assert cudnn_stand_in == ["forward", "backward"] * 4


def test_cudnn_never_falls_back() -> None:
    given = inputs(some_tokens(1, 4), 1, 8, torch.bfloat16, CPU)[:3]
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_cudnn_attention"):
        module.cudnn(*given)
    with pytest.raises(AssertionError):
        module.cudnn(*given, torch.zeros(1, 4))


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rows, length, width", [(2, 256, 64), (3, 384, 80), (1, 200, 128), (2, 128, 256)])
@pytest.mark.parametrize("name", ["sdpa", *KERNELS])
def test_on_a_gpu_against_float64(
    name: str, rows: int, length: int, width: int, documents: bool, check_budget: Callable[..., float]
) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    setting = Setting(torch.cuda.get_device_capability(), width, dtype, length, documents)
    if why := module.refusal(name, setting) or really_missing(name):
        pytest.skip(f"{name}: {why}")
    attend = choose(name, device, width, dtype, length, documents)
    tokens = some_tokens(rows, length, rate=40)
    visible = visible_pairs(tokens, documents).to(device)
    given = inputs(tokens, 3, width, dtype, device)
    chosen = attend.documents(tokens, EOD, device) if documents else None
    plain = results(lambda q, k, v: written_out(q, k, v, visible), *given)
    torch._dynamo.reset()
    for function in (attend, torch.compile(attend, fullgraph=True, dynamic=False)):
        ours = results(lambda q, k, v, f=function: f(q, k, v, chosen), *given)
        check_numbers(check_budget, f"attention {name} bfloat16", ours, plain, given, visible)
