"""Dispatch of the merge of branches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import DTYPES, choose, on_device
from . import reference


def merge_branches(
    out_w: Tensor,
    lse_w: Tensor,
    out_s: Tensor,
    lse_s: Tensor,
    gate_logit: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """See `reference.merge_branches`."""
    problem = None
    if out_w.dtype not in DTYPES or out_s.dtype not in DTYPES:
        problem = f"outputs are {out_w.dtype} and {out_s.dtype}; they must be float32, float16 or bfloat16"
    elif out_w.shape != out_s.shape or lse_w.shape != out_w.shape[:3] or lse_s.shape != out_w.shape[:3]:
        problem = (
            f"shapes {tuple(out_w.shape)}, {tuple(lse_w.shape)}, {tuple(out_s.shape)} and {tuple(lse_s.shape)} "
            "must be [B,H,T,d] and [B,H,T], twice"
        )
    tensors = (out_w, lse_w, out_s, lse_s, gate_logit)
    if choose("merge_branches", tensors, implementation, problem) == "reference":
        return reference.merge_branches(*tensors)
    from . import forward

    gate = gate_logit.to(out_w.device).expand(out_w.shape[:3])
    out = torch.empty_like(out_w, memory_format=torch.contiguous_format)
    if out.numel():
        with on_device(out):
            forward.forward(
                out_w.contiguous(), lse_w.float().contiguous(), out_s.contiguous(), lse_s.float().contiguous(), gate,
                out,
            )  # fmt: skip
    return out
