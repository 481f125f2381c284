"""Triton backward of window attention: causal attention's, over the band of ``window`` keys per query."""

from ..configs import window_grad_kv_tile, window_grad_q_tile
from ..oracle.backward import backward as causal_backward


def backward(q, k, *rest, scale, window):
    """Fill the gradients; arguments as in `oracle.backward.backward`."""
    dim = q.shape[3]
    causal_backward(
        q, k, *rest, scale=scale, window=window,
        q_tile=window_grad_q_tile(q.dtype, dim), kv_tile=window_grad_kv_tile(q.dtype, dim),
    )  # fmt: skip
