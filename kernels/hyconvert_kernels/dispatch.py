"""Which implementation of an op runs, and what the Triton kernels refuse."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .fp8 import FP8, fp8_problem

BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(
    op: str, tensors: tuple[Tensor | None, ...], implementation: str | None, problem: str | None = None
) -> str:
    """Return "triton" or "reference".

    Args:
        op: name for the error message.
        tensors: the op's inputs; the first one's device decides when ``implementation`` is None.
        implementation: None, "triton" or "reference".
        problem: why Triton cannot run these inputs, or None if it can.

    Raises:
        ValueError: the name is unknown, or Triton is wanted (by name or by device) for inputs it does not support.
    """
    if implementation not in (None, "triton", "reference"):
        raise ValueError(
            f'{op}: implementation must be None, "triton" or "reference", got {implementation!r}'
        )
    first = tensors[0]
    assert first is not None
    if implementation == "reference" or (implementation is None and first.device.type != "cuda"):
        return "reference"
    problem = device_problem(tensors) or problem
    if problem:
        raise ValueError(
            f'{op}: no Triton kernel: {problem}; use implementation="reference" for the slow path'
        )
    return "triton"


def wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd is on and one of the inputs requires a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def device_problem(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why no Triton kernel can run on these tensors' device, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    devices = [x.device for x in tensors if x is not None and x.ndim]
    device = devices[0]
    if any(other != device for other in devices):
        return f"the inputs lie on several devices ({', '.join(sorted(set(map(str, devices))))})"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        wrong = any(x is not None and x.dtype in (torch.float16, torch.bfloat16) for x in tensors)
        return "Triton's interpreter is not exact on 16-bit floats" if wrong else None
    return f"Triton needs CUDA tensors, and these are on {device.type}"


def attention_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None = None,
    window: int = 1,
    topk: int = 1,
    scaled: bool = False,
) -> str | None:
    """Why the attention kernels cannot run these inputs, or None; with ``scaled``, keys and values have scales.

    Shapes are checked elsewhere.
    """
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; it must be float32, float16 or bfloat16"
    if scaled and k.dtype == v.dtype == FP8:
        if problem := fp8_problem(k.device):
            return problem
    elif k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    dim, ratio = q.shape[3], q.shape[1] // k.shape[1]
    if not 16 <= dim <= 256 or dim % 8:
        return f"head dim {dim}; it must be a multiple of 8 from 16 to 256"
    if ratio > 16:
        return f"{ratio} query heads per KV head; at most 16"
    if block_size is not None and block_size not in BLOCK_SIZES:
        return f"block size {block_size}; it must be 16, 32, 64 or 128"
    if window < 1:
        return f"window {window}; it must be at least 1"
    if not 1 <= topk <= 128:
        return f"top-k {topk}; it must be from 1 to 128"
    if q.shape[0] * k.shape[1] > 65535:
        return f"{q.shape[0]} rows times {k.shape[1]} KV heads; at most 65535"
    return None


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension, which is all that the kernels ask of it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def hopper_kernels(name: str, q: Tensor, *others: Any) -> ModuleType | None:
    """The module ``name`` of kernels for Hopper, if its `fits` takes these; not imported for tensors of a CPU."""
    module = _hopper_module(name) if q.is_cuda else None
    return module if module and module.fits(q, *others) else None


@functools.cache
def _hopper_module(name: str) -> ModuleType | None:
    """None under a Triton without Gluon."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ImportError:
        return None


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the CUDA device of ``x`` current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
