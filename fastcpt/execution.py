"""How a model is computed: dtype, kernels, loss and attention, chosen once a run. What is computed is the same."""

from dataclasses import dataclass

import torch

from fastcpt import UserError, parallel
from fastcpt.attention import Backend, choose, sdpa
from fastcpt.config import Train
from fastcpt.kernels import launch


@dataclass(frozen=True)
class Execution:
    """The defaults are plain torch in fp32, which runs anywhere.

    dtype: of activations and matrix products, torch.float32 or torch.bfloat16.
    kernels: our Triton kernels for norms, rotary embedding, GELU, the loss and AdamW.
    loss_blocks: the head's product and the loss in blocks of rows (`kernels/linear_cross_entropy.py`).
    fp8: the blocks' products with weights (`fp8.py`).
    recompute: a block keeps its input alone, and computes the rest again in the backward pass.
    """

    dtype: torch.dtype = torch.float32
    kernels: bool = False
    loss_blocks: bool = False
    recompute: bool = False
    fp8: bool = False
    attention: Backend = Backend("sdpa", "not chosen", sdpa)  # noqa: RUF009

    def __str__(self) -> str:
        kernels, loss = "Triton" if self.kernels else "torch", "in blocks" if self.loss_blocks else "full"
        return f"{'products in fp8, ' if self.fp8 else ''}{kernels} kernels, loss {loss}, attention {self.attention.reason}"

    @classmethod
    def choose(cls, train: Train, device: torch.device, head_width: int, seq_len: int, documents: bool) -> "Execution":
        """What `train.precision`, `kernels`, `loss` and `attention` come to on a device.

        Raises UserError where what is asked for by name cannot run there.
        """
        fp8 = train.precision == "fp8"
        if fp8 and not parallel.has_fp8(device):
            raise UserError(
                "precision-needs-gpu",
                f"train.precision is fp8, which needs an NVIDIA GPU of sm_89 or newer, and this is {device}; use bf16",
            )
        if fp8 and seq_len % 16:
            raise UserError(
                "precision-sizes",
                f"train.precision is fp8, whose products take multiples of 16; data.seq_len is {seq_len}",
            )
        dtype = torch.bfloat16 if train.precision != "fp32" and parallel.has_bf16(device) else torch.float32
        gpu = device.type != "cpu"
        kernels = train.kernels == "triton" or (train.kernels == "auto" and gpu)
        if kernels and not launch.on_triton(torch.empty(0, device=device)):
            raise UserError(
                "kernels-need-gpu", f"train.kernels is triton, which needs a GPU, and this is {device}; use auto"
            )
        # On a GPU blocks save memory and cost time; on CPU they save both.
        loss_blocks = train.loss == "blocks" or (train.loss == "auto" and not gpu)
        if loss_blocks and gpu and not kernels:
            raise UserError(
                "loss-needs-kernels",
                "train.loss is blocks, which needs Triton kernels on a GPU; use train.kernels: auto",
            )
        attention = choose(train.attention, device, head_width, dtype, seq_len, documents)
        return cls(dtype, kernels, loss_blocks, fp8=fp8, attention=attention)
