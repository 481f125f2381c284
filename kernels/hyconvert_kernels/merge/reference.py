"""Plain PyTorch merge of the two branches. This is the truth for the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_branches(out_w: Tensor, lse_w: Tensor, out_s: Tensor, lse_s: Tensor, gate_logit: Tensor) -> Tensor:
    """Mix window and sparse branch by their softmax masses: ``a * out_s + (1 - a) * out_w``.

    ``a = sigmoid(lse_s - lse_w + gate_logit)``; with a zero gate this is softmax over the union of both key sets.

    Args:
        out_w, out_s: ``[B,H,T,d]``.
        lse_w, lse_s: ``[B,H,T]``; -inf marks an empty branch, which gets weight exactly 0 and sends no gradient
            (both empty: out_w is returned).
        gate_logit: broadcastable to ``[B,H,T]``, natural-log units.

    Returns:
        ``[B,H,T,d]`` in out_w's dtype.
    """
    dtype = torch.float64 if out_w.dtype == torch.float64 else torch.float32
    no_sparse, no_window = lse_s == -torch.inf, lse_w == -torch.inf
    gap = lse_s.masked_fill(no_sparse, 0) - lse_w.masked_fill(no_window, 0)
    share = torch.sigmoid(gap.to(dtype) + gate_logit.to(dtype))
    share = share.masked_fill(no_window, 1).masked_fill(no_sparse, 0)[..., None]
    return (share * out_s.to(dtype) + (1 - share) * out_w.to(dtype)).to(out_w.dtype)
