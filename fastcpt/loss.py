"""The language-model loss behind one signature: hidden states in, fp32 losses out.

Shapes: N tokens, D model width, V vocabulary (padding included: the softmax is over all of it, as transformers and
GPT-NeoX compute it, DESIGN.md D8).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcpt.execution import Execution
from fastcpt.kernels.cross_entropy import cross_entropy
from fastcpt.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum


def token_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, execution: Execution) -> Tensor:
    """-log softmax(x weight^T)[target], (N,) fp32. The product runs in the dtype of x, the softmax in fp32."""
    if execution.loss_blocks:
        return linear_cross_entropy(x_ND, weight_VD, targets_N)
    logits_NV = F.linear(x_ND, weight_VD.to(x_ND.dtype))
    if execution.kernels:
        return cross_entropy(logits_NV, targets_N, inplace=True)
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def summed_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, execution: Execution) -> tuple[Tensor, Tensor]:
    """The sum of `token_losses`, for the backward pass, and themselves, (N,) fp32, without a gradient."""
    if execution.loss_blocks:
        return linear_cross_entropy_sum(x_ND, weight_VD, targets_N)
    losses_N = token_losses(x_ND, weight_VD, targets_N, execution)
    return losses_N.sum(), losses_N.detach()


def sums_by_source(losses_BT: Tensor, sources_B: Tensor, count: int) -> Tensor:
    """(nats, tokens) of each of `count` sources, (count, 2) float64, from the losses of sequences and their sources.

    A pass over the losses, none over the logits. Without atomics: the same sum every time.
    """
    member_SB = (sources_B[None, :] == torch.arange(count, device=sources_B.device)[:, None]).double()
    nats_B = losses_BT.detach().double().sum(1)
    return torch.stack((member_SB @ nats_B, member_SB.sum(1) * losses_BT.shape[1]), dim=1)
