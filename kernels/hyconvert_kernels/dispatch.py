"""Which implementation of an op runs."""

from __future__ import annotations

from torch import Tensor


def choose(op: str, tensor: Tensor, implementation: str | None, problem: str | None = "not written yet") -> str:
    """Return "triton" or "reference".

    Args:
        op: name for the error message.
        tensor: any input; its device decides when ``implementation`` is None.
        implementation: None, "triton" or "reference".
        problem: why Triton cannot run these inputs, or None if it can.

    Raises:
        ValueError: the name is unknown, or Triton is wanted (by name or by device) for inputs it does not support.
    """
    if implementation not in (None, "triton", "reference"):
        raise ValueError(f'{op}: implementation must be None, "triton" or "reference", got {implementation!r}')
    if implementation == "reference" or (implementation is None and tensor.device.type != "cuda"):
        return "reference"
    if problem:
        raise ValueError(f'{op}: no Triton kernel: {problem}; use implementation="reference" for the slow path')
    return "triton"
