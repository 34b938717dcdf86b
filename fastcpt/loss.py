"""The language-model loss behind one signature: hidden states in, one fp32 loss a token out.

Shapes: N tokens, D model width, V vocabulary (padding included: the softmax is over all of it, as transformers and
GPT-NeoX compute it, DESIGN.md D8).
"""

import torch.nn.functional as F
from torch import Tensor


def token_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(x weight^T)[target], (N,) fp32. The product runs in the dtype of x, the softmax in fp32."""
    logits_NV = F.linear(x_ND, weight_VD.to(x_ND.dtype))
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
