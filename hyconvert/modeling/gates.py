"""How a layer mixes its sparse and its window branch. A new gate is a class here and a name in `GATES`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hyconvert_kernels import merge_branches


class MergeGate(nn.Module):
    """One softmax over both branches, with a learned per-head tilt.

    a = sigmoid(lse_s - lse_w + b_h + u_h.x), out = a out_s + (1 - a) out_w. With b = u = 0 this is exactly softmax
    attention over the union of both branches' keys.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self) -> None:
        """b = u = 0."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        out_w: Tensor,
        lse_w: Tensor,
        out_s: Tensor,
        lse_s: Tensor,
        implementation: str | None = None,
    ) -> Tensor:
        """Mix the branches.

        Args:
            x: [B, T, D] input of the attention layer.
            out_w, out_s: [B, H, T, d] branch outputs.
            lse_w, lse_s: [B, H, T] float32 log-sum-exp of each branch; -inf marks an empty branch.
            implementation: of the kernel, as `hyconvert_kernels.merge_branches` takes it.

        Returns:
            [B, H, T, d].
        """
        logit = self.logit(x).to(lse_w.dtype)
        out: Tensor = merge_branches(out_w, lse_w, out_s, lse_s, logit, implementation=implementation)
        return out

    def logit(self, x: Tensor) -> Tensor:
        """b_h + u_h.x, [B, H, T], from x [B, T, D]."""
        return nn.functional.linear(x, self.weight, self.bias).transpose(1, 2)


class SigmoidGate(nn.Module):
    """The paper's gate: out = sigmoid(U_s x) out_s + sigmoid(U_w x) out_w, per head (arXiv 2602.03560)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * num_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(2 * num_heads))

    def reset_parameters(self) -> None:
        """Both gates half open."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        out_w: Tensor,
        lse_w: Tensor,
        out_s: Tensor,
        lse_s: Tensor,
        implementation: str | None = None,
    ) -> Tensor:
        """Mix the branches; arguments as in `MergeGate.forward` (the log-sum-exps are not used)."""
        gate = torch.sigmoid(nn.functional.linear(x, self.weight, self.bias)).transpose(1, 2).unsqueeze(-1)
        gate_s, gate_w = gate.chunk(2, dim=1)
        return gate_s * out_s + gate_w * out_w


GATES: dict[str, Any] = {"merge": MergeGate, "sigmoid": SigmoidGate}
