"""Causal attention. Which implementation runs is chosen here, once a run, and nowhere else.

    attend = choose("auto", device, head_width=64, dtype=torch.bfloat16, seq_len=2048, documents=True)
    documents = attend.documents(windows[:, :-1], eod, device)
    y_BTHC = attend(q_BTHC, k_BTHC, v_BTHC, documents)

auto takes the first of `preference` that can run, and says why the ones before it cannot. A backend that is asked for
by name and cannot run is an error; none falls back to another.

None but sdpa and blocks has run on a device yet: the others are checked for their arguments, packing and choice alone.

- sdpa    torch's scaled_dot_product_attention, anywhere. Documents need a mask of T x T.
- blocks  `cpu_attention.py`, in bf16 on a CPU, where it is several times as fast as sdpa.
- cudnn   cuDNN through torch: 1.7 to 2.3 times the flash kernel in torch on Hopper (huggingface/transformers#48163).
          The operator is called by name and not through `sdpa_kernel`, under which a compiled graph may take another
          kernel out of its cache (pytorch#185449) and is compiled anew in each process (pytorch#194007).
- flash2, flash3, flash4   Dao-AILab/flash-attention: flash-attn, flash_attn_3 (its folder hopper), flash-attn-4.
- varlen  torch.nn.attention.varlen, torch's own flash-attention 2 with documents.

On a GPU all but sdpa read q, k and v where they lie, views of one packed projection included. Documents are given to
them as the places where each begins, padded with empty documents to a power of two, so that a compiled model meets few
shapes; no token of a batch is outside every document.

Shapes: B batch, T time, N = B*T, H heads, C head width, K documents.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcpt import UserError
from fastcpt.cpu_attention import cpu_attention

Name = Literal["auto", "sdpa", "blocks", "cudnn", "flash2", "flash3", "flash4", "varlen"]
Function = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# The module of each, and of its functions the arguments that are given by name.
_LENGTHS = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
_DENSE = {"causal", "deterministic", "return_attn_probs"}
_FLASH = {"flash_attn_func": _DENSE, "flash_attn_varlen_func": _DENSE | _LENGTHS}
_FORWARD, _BACKWARD = {"causal", "return_lse"} | _LENGTHS, {"causal", "deterministic", "dq", "dk", "dv"} | _LENGTHS
PACKAGES: dict[str, tuple[str, dict[str, set[str]]]] = {
    "flash2": ("flash_attn.flash_attn_interface", _FLASH),
    "flash3": ("flash_attn_interface", _FLASH),
    "flash4": ("flash_attn.cute.interface", {"_flash_attn_fwd": _FORWARD, "_flash_attn_bwd": _BACKWARD}),
    "varlen": ("torch.nn.attention.varlen", {"varlen_attn": {"cu_seq_q", "cu_seq_k", "max_q", "max_k"}}),
}


@dataclass(frozen=True)
class Backend:
    """An attention function with its name and one line, for the log, on why it was chosen."""

    name: str
    reason: str
    function: Function

    def __call__(self, q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, documents: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(C)) v over the positions up to each query's own -> (B, T, H, C), in the dtype of q.

        documents: what `documents` returned for these tokens; a token then sees its own document alone.
        """
        return self.function(q_BTHC, k_BTHC, v_BTHC, documents)

    def documents(self, tokens_BT: np.ndarray, eod: int, device: torch.device) -> Tensor:
        """The documents of a batch in the form that this backend reads, on the device, without waiting for it.

        tokens_BT: token ids of any integer dtype, in host memory. An end-of-document token ends its own document, and
        a row begins a new one.
        """
        make = document_ids if self.name in ("sdpa", "blocks") else document_bounds
        return torch.from_numpy(make(np.asarray(tokens_BT), eod)).to(device, non_blocking=True)


def document_ids(tokens_BT: np.ndarray, eod: int) -> np.ndarray:
    """The number of each token's document within its row, (B, T) int32."""
    ends = (tokens_BT == eod).astype(np.int32)
    return ends.cumsum(axis=1, dtype=np.int32) - ends


def document_bounds(tokens_BT: np.ndarray, eod: int) -> np.ndarray:
    """Where each document of the N tokens begins and, at last, where they end: (K+1,) int32, from 0 to N.

    K is the number of documents rounded up to a power of two; those past the last are empty, at N.
    """
    ends_BT = tokens_BT == eod
    ends_BT[:, -1] = True
    ends = np.flatnonzero(ends_BT) + 1
    bounds = np.full((1 << (len(ends) - 1).bit_length()) + 1, tokens_BT.size, np.int32)
    bounds[0] = 0
    bounds[1 : len(ends) + 1] = ends
    return bounds


@dataclass(frozen=True)
class Setting:
    """What a choice depends on, installed packages apart. capability: of an NVIDIA GPU, (9, 0) for sm_90, or None."""

    capability: tuple[int, int] | None
    head_width: int
    dtype: torch.dtype
    seq_len: int
    documents: bool
    deterministic: bool = False
    cpu: bool = False


def refusal(name: str, setting: Setting) -> str | None:
    """Why a backend cannot run in a setting, were its package installed; None if it can."""
    capability, width = setting.capability, setting.head_width
    if name == "sdpa":
        return None
    if name == "blocks":
        return _dtype_refusal(setting) if setting.cpu else "it is for CPUs"
    if capability is None:
        return "it needs an NVIDIA GPU"
    chip = f"sm_{capability[0]}{capability[1]}"
    majors = {"flash3": (9,), "flash4": (9, 10)}.get(name)
    if capability < (8, 0) or (majors and capability[0] not in majors):
        where = " or ".join(f"sm_{major}x" for major in majors) if majors else "sm_80 or newer"
        return f"it needs {where}, and this GPU is {chip}"
    if why := _dtype_refusal(setting):
        return why
    # Widths with a backward pass: cuDNN up to 128 (pytorch#130494; 256 from 9.22 on), flash4 on sm_100 up to 128, and 256.
    narrow = name == "cudnn" or (name == "flash4" and capability[0] == 10 and width != 256)
    limit = 128 if narrow else 256
    if width % 8 or width > limit:
        return f"it takes head widths that are multiples of 8 up to {limit} on {chip}, and this model's is {width}"
    if name == "varlen" and not setting.documents:
        return "it is for documents, and data.document_mask is off"
    if name == "cudnn" and setting.documents:
        return "it has no document mask"
    if name == "cudnn" and setting.seq_len % 128:
        return f"data.seq_len {setting.seq_len} is no multiple of 128, where cuDNN has been wrong (pytorch#169849)"
    if name == "cudnn" and setting.deterministic:
        return "it is not deterministic"
    return None


def _dtype_refusal(setting: Setting) -> str | None:
    if setting.dtype == torch.bfloat16:
        return None
    return f"it takes bfloat16, and the model computes in {str(setting.dtype).removeprefix('torch.')}"


def preference(setting: Setting) -> tuple[str, ...]:
    """The order in which auto tries: the fastest by published numbers first.

    Hopper: FA3, 371 TFLOP/s (width 64, causal, T = 2048, forward) to cuDNN's 334 (FA3 paper); FA4 is as fast as FA3
    (anemoi-core#959). Blackwell: cuDNN 826 to FA4's 706 (flash-attention#2605). Elsewhere cuDNN is the slower one:
    0.82 times torch's default on A100 (transformers#48163).
    """
    if setting.capability is None:
        return ("blocks", "sdpa") if setting.cpu and setting.dtype == torch.bfloat16 else ("sdpa",)
    chip = {9: ("flash3", "flash4", "cudnn"), 10: ("cudnn", "flash4")}.get(setting.capability[0], ())
    return (*chip, "flash2", *(("varlen",) if setting.documents else ()), "sdpa")


def decide(name: str, setting: Setting, missing: Callable[[str], str | None]) -> tuple[str, str]:
    """(the backend's name, one line on why). missing(name) -> what is not installed, or None; it is asked last.

    Raises UserError when a backend other than auto cannot run.
    """
    if name not in get_args(Name):
        raise UserError(f"train.attention {name!r} is unknown; it is one of {', '.join(get_args(Name))}")
    if name != "auto":
        if why := refusal(name, setting) or missing(name):
            raise UserError(f"train.attention is {name}, but {why}; use auto, which takes what can run")
        return name, f"{name}, as train.attention says"
    passed: list[str] = []
    for candidate in preference(setting):
        why = refusal(candidate, setting) or missing(candidate)
        if why is None:
            return candidate, "; ".join([candidate, *passed])
        passed.append(f"not {candidate}: {why}")
    raise AssertionError("sdpa runs anywhere")


def missing(name: str) -> str | None:
    """What a backend lacks on this machine, or None. Imports its package."""
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    module, functions = PACKAGES.get(name, ("torch", {}))
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    for function, arguments in functions.items():
        known = inspect.signature(getattr(package, function, lambda: None)).parameters.keys()
        if not arguments <= known:
            return f"{function} of the installed {module} takes no {', '.join(sorted(arguments - known))}"
    return None


def choose(
    name: str, device: torch.device, head_width: int, dtype: torch.dtype, seq_len: int, documents: bool
) -> Backend:
    """The backend for a run. name: train.attention. Raises UserError where it cannot run."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if nvidia else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    setting = Setting(capability, head_width, dtype, seq_len, documents, deterministic, cpu=device.type == "cpu")
    chosen, reason = decide(name, setting, missing)
    return Backend(chosen, reason, build(chosen, deterministic))


def build(name: str, deterministic: bool) -> Function:
    """The function of a backend that is installed. deterministic: of the flash packages; torch has its own switch."""
    if name in ("flash2", "flash3"):
        return _flash(importlib.import_module(PACKAGES[name][0]), deterministic)
    if name == "flash4":
        return _flash4(deterministic)
    return {"sdpa": lambda: sdpa, "blocks": lambda: cpu_attention, "cudnn": lambda: cudnn, "varlen": _varlen}[name]()


def sdpa(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    q_BHTC, k_BHTC, v_BHTC = (x.transpose(1, 2) for x in (q_BTHC, k_BTHC, v_BTHC))
    if documents_BT is None:
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
    else:
        positions = torch.arange(q_BTHC.shape[1], device=q_BTHC.device)
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        visible_BTT = same_BTT & (positions[:, None] >= positions[None, :])
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=visible_BTT[:, None])
    return y_BHTC.transpose(1, 2)


def cudnn(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, documents: Tensor | None = None) -> Tensor:
    assert documents is None
    q_BHTC, k_BHTC, v_BHTC = (x.transpose(1, 2) for x in (q_BTHC, k_BTHC, v_BTHC))
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHTC, k_BHTC, v_BHTC, None, compute_log_sumexp=True, is_causal=True
    )
    return results[0].transpose(1, 2)


def _packing(attend: Callable[..., Tensor]) -> Function:
    """The function of attend(q, k, v, bounds, longest), which takes (B, T, H, C), or with bounds (N, H, C): views."""

    def function(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, bounds: Tensor | None = None) -> Tensor:
        longest = q_BTHC.shape[1]
        if bounds is None:
            return attend(q_BTHC, k_BTHC, v_BTHC, None, longest)
        q_NHC, k_NHC, v_NHC = (x.flatten(0, 1) for x in (q_BTHC, k_BTHC, v_BTHC))
        return attend(q_NHC, k_NHC, v_NHC, bounds, longest).unflatten(0, q_BTHC.shape[:2])

    return function


def _lengths(bounds: Tensor | None, longest: int) -> dict[str, Any]:
    if bounds is None:
        return {}
    return {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _flash(package: Any, deterministic: bool) -> Function:
    """flash-attention 2 and 3: their functions are autograd.Functions over registered operators, which compile."""
    dense, varlen = package.flash_attn_func, package.flash_attn_varlen_func
    flags = {"causal": True, "deterministic": deterministic, "return_attn_probs": False}

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int) -> Tensor:
        return (dense if bounds is None else varlen)(q, k, v, **_lengths(bounds, longest), **flags)

    return _packing(attend)


def _varlen() -> Function:
    """torch's own. Its argument for causal attention was is_causal before it was window_size."""
    varlen_attn = importlib.import_module(PACKAGES["varlen"][0]).varlen_attn
    windows = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windows else {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int) -> Tensor:
        assert bounds is not None
        return varlen_attn(q, k, v, cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest, **causal)

    return _packing(attend)


def _flash4(deterministic: bool) -> Function:
    return _packing(lambda q, k, v, bounds, longest: _flash4_forward(q, k, v, bounds, longest, deterministic)[0])


# Flash-attention 4 (4.0.0b36) registers no operators: traced, it would compile its kernels for tensors without data and
# leave no call in the graph. Here its two passes are operators. Inputs are (B, T, H, C) or, with bounds, (N, H, C).


@torch.library.custom_op("fastcpt::flash4_forward", mutates_args=())
def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """(attention like q, its log-sum-exp in fp32: (B, H, T) or (H, N)). deterministic: of the backward pass."""
    package = importlib.import_module(PACKAGES["flash4"][0])
    y, lse, *_ = package._flash_attn_fwd(q, k, v, causal=True, return_lse=True, **_lengths(bounds, longest))
    return y, lse


@_flash4_forward.register_fake
def _flash4_forward_fake(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    *batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("fastcpt::flash4_backward", mutates_args=())
def _flash4_backward(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    package = importlib.import_module(PACKAGES["flash4"][0])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))  # contiguous, as the fake says
    flags = {"causal": True, "deterministic": deterministic, **_lengths(bounds, longest)}
    package._flash_attn_bwd(q, k, v, y, dy, lse, dq=dq, dk=dk, dv=dv, **flags)
    return dq, dk, dv


@_flash4_backward.register_fake
def _flash4_backward_fake(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash4_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, *ctx.flags = inputs
    ctx.save_for_backward(*output, q, k, v, bounds)


def _flash4_gradients(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    return (*_flash4_backward(dy, *ctx.saved_tensors, *ctx.flags), None, None, None)


_flash4_forward.register_autograd(_flash4_gradients, setup_context=_flash4_save)
