"""GPT-NeoX, written out: parallel or sequential residual, partial rotary embedding, biases, untied embeddings.

Shapes: B batch, T time, N = B*T, D model width, H heads, C = D/H head width, R rotated part of a head, V vocabulary.

A block hands its outputs on unadded: the norms that read a residual sum make it (`kernels/layer_norm.py`).
`Execution` says whether kernels or plain torch compute; both are called here with the same arguments.

Parameters are fp32 and carry the names of the Hugging Face checkpoint (`hf.py`), the packed projection included: the
rows of `query_key_value` are [q; k; v] of head 0, then of head 1, and so on. Matrices and biases are cast to the
compute dtype where they are used, so that a compiled graph fuses the cast; norms and the rotation run in fp32; the
residual stream is in the compute dtype (DESIGN.md, D7). The architecture is that of GPT-NeoX-20B (arXiv 2204.06745)
as `transformers` defines it.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastcpt import UserError
from fastcpt.config import Model as ModelConfig
from fastcpt.embedding import embedding
from fastcpt.execution import Execution
from fastcpt.fp8 import linear as fp8_linear
from fastcpt.kernels.gelu import bias_gelu
from fastcpt.kernels.layer_norm import layer_norm, layer_norm_reference
from fastcpt.kernels.qkv_rotary import qkv_rotary, qkv_rotary_reference
from fastcpt.loss import summed_losses, token_losses
from fastcpt.parallel import fill_

Addends = tuple[Tensor, ...]


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's tensors do not say about the model that they belong to, and their sizes."""

    layers: int
    width: int
    heads: int
    vocab_size: int = 50304
    mlp_width: int = 0  # 0 means 4 * width
    rotary_fraction: float = 0.25
    gelu: Literal["erf", "tanh"] = "erf"
    parallel_residual: bool = True
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048  # written to exports; the rotary embedding itself has no limit
    old_rows: int = 0  # of both embeddings before the vocabulary was extended; 0: it was not

    def __post_init__(self) -> None:
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        for name in ("layers", "width", "heads", "vocab_size", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError("setting-out-of-range", f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(
                "width-not-multiple-of-heads", f"model.width {self.width} is not a multiple of model.heads {self.heads}"
            )
        if self.rotary_width % 2 or not 0 <= self.rotary_fraction <= 1:
            raise UserError(
                "rotary-fraction",
                f"model.rotary_fraction {self.rotary_fraction} rotates {self.rotary_width} of {self.head_width} values of "
                "a head; it must be an even number, from a fraction of 0 to 1",
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def rotary_width(self) -> int:
        return int(self.head_width * self.rotary_fraction)


# Layers, width, heads, vocabulary of the Pythia suite (arXiv 2304.01373); all else is the default.
PRESETS = {
    "pythia-14m": Architecture(6, 128, 4),
    "pythia-31m": Architecture(6, 256, 8),
    "pythia-70m": Architecture(6, 512, 8),
    "pythia-160m": Architecture(12, 768, 12),
    "pythia-410m": Architecture(24, 1024, 16),
    "pythia-1b": Architecture(16, 2048, 8),
    "pythia-1.4b": Architecture(24, 2048, 16),
    "pythia-2.8b": Architecture(32, 2560, 32),
    "pythia-6.9b": Architecture(32, 4096, 32, vocab_size=50432),
    "pythia-12b": Architecture(36, 5120, 40, vocab_size=50688),
}


def resolve_architecture(config: ModelConfig, source: Architecture | None, where: str) -> Architecture:
    """The architecture that a run trains.

    source: that of the checkpoint named by `where`, or None from scratch. Given fields must agree with it; `gelu` alone
    may differ, because Hugging Face's files say erf of models that were trained with tanh (D9).
    """
    fields = ("layers", "width", "heads", "vocab_size", "mlp_width", "rotary_fraction", "gelu", "parallel_residual")
    given = {name: value for name in fields if (value := getattr(config, name)) is not None}
    preset = None
    if config.preset is not None:
        if config.preset not in PRESETS:
            raise UserError(
                "preset-unknown", f"model.preset {config.preset!r} is unknown; known are {', '.join(PRESETS)}"
            )
        preset = PRESETS[config.preset]
    if source is None:
        if preset is None and not {"layers", "width", "heads", "vocab_size"} <= given.keys():
            raise UserError(
                "model-undescribed", "model: from scratch it takes a preset, or layers, width, heads and vocab_size"
            )
        return replace(preset, **{"mlp_width": 0, **given}) if preset else Architecture(**given)
    sizes = {name: getattr(preset, name) for name in ("layers", "width", "heads", "vocab_size")} if preset else {}
    for name, value in {**sizes, **given}.items():
        if name != "gelu" and value != getattr(source, name):
            raise UserError(
                "model-differs-from-source",
                f"model.{name} is {value}, but {where} has {getattr(source, name)}; remove it from the configuration",
            )
    return replace(source, gelu=config.gelu or source.gelu)


class Linear(nn.Linear):
    """A linear layer whose fp32 parameters are cast to the dtype of its input, or of the product to 8 bits."""

    def forward(self, x: Tensor, fp8: bool = False, biased: bool = True) -> Tensor:
        bias = self.bias.to(x.dtype) if biased and self.bias is not None else None
        if fp8:
            y = fp8_linear(x, self.weight)
            return y if bias is None else y + bias
        return F.linear(x, self.weight.to(x.dtype), bias)


def norms(
    x_BTD: Tensor, addends: Addends, layers: tuple[nn.LayerNorm, ...], execution: Execution
) -> tuple[Tensor, ...]:
    """x plus the addends, and that sum through each of the layers, all in the dtype of x."""
    function = layer_norm if execution.kernels else layer_norm_reference
    return function(x_BTD, addends, [(layer.weight, layer.bias) for layer in layers], layers[0].eps)


def residual_sum(x_BTD: Tensor, addends: Addends, execution: Execution) -> Tensor:
    """x plus the addends as `norms` makes it: with kernels rounded once, else after each."""
    total_BTD = x_BTD.float() if execution.kernels else x_BTD
    for addend_BTD in addends:
        total_BTD = total_BTD + addend_BTD
    return total_BTD.to(x_BTD.dtype)


@torch.library.custom_op("fastcpt::rotary_table", mutates_args=())
def _rotary_table(length: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse_frequencies = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse_frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@_rotary_table.register_fake
def _(length: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(length, width, device=device), torch.empty(length, width, device=device)


def rotary_table(length: int, arch: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, R) fp32 with the frequencies twice over (arXiv 2104.09864, the rotate-half form).

    An operator, which a compiled graph calls once: it would else fuse powers, cosines and sines into each layer's
    rotation, and compute them again for every value of q and k.
    """
    return _rotary_table(length, arch.rotary_width, arch.rotary_base, device)


class Attention(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads = arch.heads
        self.query_key_value = Linear(arch.width, 3 * arch.width)
        self.dense = Linear(arch.width, arch.width)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], documents: Tensor | None, execution: Execution
    ) -> Tensor:
        qkv_BTHC = self.query_key_value(x_BTD, execution.fp8).unflatten(-1, (self.heads, -1))
        rotated = (qkv_rotary if execution.kernels else qkv_rotary_reference)(qkv_BTHC, *rotary)
        return self.dense(execution.attention(*rotated, documents).flatten(-2), execution.fp8)


class MLP(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.approximate = "tanh" if arch.gelu == "tanh" else "none"
        self.dense_h_to_4h = Linear(arch.width, arch.mlp_width)
        self.dense_4h_to_h = Linear(arch.mlp_width, arch.width)

    def forward(self, x_BTD: Tensor, execution: Execution) -> Tensor:
        inner = self.dense_h_to_4h
        if execution.kernels:
            assert inner.bias is not None
            product_BTM = inner(x_BTD, execution.fp8, biased=False)
            return self.dense_4h_to_h(bias_gelu(product_BTM, inner.bias, self.approximate), execution.fp8)
        return self.dense_4h_to_h(F.gelu(inner(x_BTD, execution.fp8), approximate=self.approximate), execution.fp8)


class Block(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.parallel_residual = arch.parallel_residual
        self.input_layernorm = nn.LayerNorm(arch.width, eps=arch.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(arch.width, eps=arch.norm_eps)
        self.attention = Attention(arch)
        self.mlp = MLP(arch)

    def forward(
        self,
        x_BTD: Tensor,
        addends: Addends,
        rotary: tuple[Tensor, Tensor],
        documents: Tensor | None,
        execution: Execution,
    ) -> tuple[Tensor, Addends]:
        """x plus the addends is the block's input; the result, in the same form, its output.

        Recomputed, it hands on the sum, so that one tensor is kept of it, and not three.
        """
        if not execution.recompute:
            return self.compute(x_BTD, addends, rotary, documents, execution)

        def whole(x_BTD: Tensor, *addends: Tensor) -> Tensor:
            x_BTD, addends = self.compute(x_BTD, addends, rotary, documents, execution)
            return residual_sum(x_BTD, addends, execution)

        # Nothing in a block is random.
        return checkpoint(whole, x_BTD, *addends, use_reentrant=False, preserve_rng_state=False), ()

    def compute(
        self,
        x_BTD: Tensor,
        addends: Addends,
        rotary: tuple[Tensor, Tensor],
        documents: Tensor | None,
        execution: Execution,
    ) -> tuple[Tensor, Addends]:
        first, second = self.input_layernorm, self.post_attention_layernorm
        if self.parallel_residual:
            x_BTD, normed_BTD, other_BTD = norms(x_BTD, addends, (first, second), execution)
            attended_BTD = self.attention(normed_BTD, rotary, documents, execution)
            return x_BTD, (attended_BTD, self.mlp(other_BTD, execution))
        x_BTD, normed_BTD = norms(x_BTD, addends, (first,), execution)
        attended_BTD = self.attention(normed_BTD, rotary, documents, execution)
        x_BTD, normed_BTD = norms(x_BTD, (attended_BTD,), (second,), execution)
        return x_BTD, (self.mlp(normed_BTD, execution),)


class GPTNeoX(nn.Module):
    """The language model. Its first parameters mean nothing: call `initialise_`, or load a checkpoint.

    execution: a plain attribute, so that one model can be computed in several ways.
    """

    def __init__(self, arch: Architecture, execution: Execution = Execution()) -> None:  # noqa: B008
        super().__init__()
        self.arch = arch
        self.execution = execution
        self.embed_in = nn.Embedding(arch.vocab_size, arch.width)
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch.layers))
        self.final_layer_norm = nn.LayerNorm(arch.width, eps=arch.norm_eps)
        self.embed_out = Linear(arch.width, arch.vocab_size, bias=False)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, documents: Tensor | None = None, total: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens_BT integer -> logits_BTV in the compute dtype; with targets_BT int64, the losses_BT fp32 instead.

        total: return (the sum of the losses, losses_BT without a gradient), which costs less to train on.
        documents: from `execution.attention.documents`; attention then stays within a document.
        """
        execution = self.execution
        x_BTD = embedding(tokens_BT, self.embed_in.weight).to(execution.dtype)
        rotary = rotary_table(tokens_BT.shape[1], self.arch, tokens_BT.device)
        addends: Addends = ()
        for layer in self.layers:
            x_BTD, addends = layer(x_BTD, addends, rotary, documents, execution)
        _, x_BTD = norms(x_BTD, addends, (self.final_layer_norm,), execution)
        if targets_BT is None:
            return self.embed_out(x_BTD)
        head = (x_BTD.flatten(0, 1), self.embed_out.weight, targets_BT.flatten(), execution)
        if total:
            nats, losses_N = summed_losses(*head)
            return nats, losses_N.view_as(targets_BT)
        return token_losses(*head).view_as(targets_BT)

    @torch.no_grad()
    def initialise_(self, generator: torch.Generator | None = None) -> None:
        """GPT-NeoX's initialisation: "small init" sqrt(2/5D) (arXiv 1910.05895) for matrices, "wang init" 2/(L sqrt D)
        for those that write to the residual stream; biases 0, norms 1."""
        small = math.sqrt(2 / (5 * self.arch.width))
        wang = 2 / (self.arch.layers * math.sqrt(self.arch.width))
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, device=parameter.device)
            if parameter.ndim == 2:
                residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
                value.normal_(0.0, wang if residual else small, generator=generator)
            else:
                value.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            fill_(parameter, value)
