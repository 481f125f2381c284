"""What the kernels for Hopper share: where they run, bulk copies, and Gluon's names in several releases of Triton."""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before Triton 3.7
bulk_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # before Triton 3.8
bulk_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

TESTED = ("3.6",)
"""Triton releases under which the kernels were checked on a GPU; they compile under 3.7 and 3.8 too."""


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers in shared memory, each of which completes by so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def fetch(desc, row, head, first, full, empty, smem, step, STAGES: gl.constexpr):
    """Bring a tile of one head, from slot ``first`` on, to the stage of a step as soon as that is free."""
    stage, phase = step % STAGES, step // STAGES & 1
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    bulk_load(desc, [row, head, first, 0], full.index(stage), smem.index(stage))


@functools.cache
def capable(device: torch.device) -> bool:
    """Whether the kernels for Hopper run on this device under this Triton."""
    release = ".".join(triton.__version__.split(".")[:2])
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) == (9, 0) and release in TESTED


def bulk_strides(x: torch.Tensor) -> list[int] | None:
    """Strides of all but the last dimension of ``x [..., d]`` for bulk copies, or None if those cannot take them.

    A dimension of a single entry gets a stride that fits: it is never used.
    """
    if x.stride(-1) != 1 or x.data_ptr() % 16:
        return None
    pairs = list(zip(x.shape[:-1], x.stride(), strict=False))
    if any(size > 1 and (step <= 0 or step % 8) for size, step in pairs):
        return None
    whole = -(-max(size * max(step, 1) for size, step in zip(x.shape, x.stride(), strict=True)) // 8) * 8
    return [step if size > 1 else whole for size, step in pairs]


def bulk_tiles(x: torch.Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Tiles of ``rows`` slots of one head of ``x [B,H,T,d]``, for bulk copies; rows from T on are zeros.

    A copy of ``x`` stands in for one with other strides than `bulk_strides` takes.
    """
    steps = bulk_strides(x)
    if steps is None:
        x = x.clone(memory_format=torch.contiguous_format)
        steps = bulk_strides(x)
    block = [1, 1, rows, columns or x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), [*steps, 1], block, layout)
