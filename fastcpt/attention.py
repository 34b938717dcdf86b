"""Causal attention. One function; which implementation runs is chosen here and nowhere else.

Shapes: B batch, T time, H heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the positions up to each query's own -> (B, T, H, C), in the dtype of q.

    documents_BT integer: when given, a token sees its own document alone.
    """
    q_BHTC, k_BHTC, v_BHTC = (x.transpose(1, 2) for x in (q_BTHC, k_BTHC, v_BTHC))
    if documents_BT is None:
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
    else:
        positions = torch.arange(q_BTHC.shape[1], device=q_BTHC.device)
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        visible_BTT = same_BTT & (positions[:, None] >= positions[None, :])
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=visible_BTT[:, None])
    return y_BHTC.transpose(1, 2)
