"""Token embeddings, whose gradient on a CPU is added up row by row.

torch.compile would write it as atomic additions, of which a CPU makes one number at a time: twice to ten times as slow.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("fastcpt::embedding_gradient", mutates_args=())
def _gradient(gradient_BTD: Tensor, tokens_BT: Tensor, rows: int) -> Tensor:
    gradient_VD = gradient_BTD.new_zeros(rows, gradient_BTD.shape[-1])
    return gradient_VD.index_add_(0, tokens_BT.flatten(), gradient_BTD.flatten(0, -2))


@_gradient.register_fake
def _(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return gradient.new_empty(rows, gradient.shape[-1])


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.rows = len(weight_VD)
        return F.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, gradient_BTD: Tensor) -> tuple[None, Tensor]:
        return None, _gradient(gradient_BTD, *ctx.saved_tensors, ctx.rows)


def embedding(tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the weight -> (B, T, D) in its dtype. tokens_BT: integers."""
    if weight_VD.device.type == "cpu":
        return _Embedding.apply(tokens_BT, weight_VD)
    return F.embedding(tokens_BT, weight_VD)
