"""Dispatch of block-sparse attention, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device
from ..registration import attention_backward, attention_grads, attention_outputs
from . import reference
from .union import BlockUnion, union_capacity, union_queries


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    block_size: int,
    window: int,
    scale: float,
    union: BlockUnion | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`.

    Args:
        union: what `tile_union` made of the same ``indices``, ``q_offset``, ``start``, block size and window; None
            builds it. Layers that share a source can share it, and if it is ``transposed`` its backward list too. The
            reference does not need it.
    """
    check_inputs(q, k, v, q_offset, start)
    batch, groups, length = q.shape[0], k.shape[1], q.shape[2]
    if indices.ndim != 4 or indices.shape[:3] != (batch, groups, length):
        raise ValueError(f"indices must be [{batch},{groups},{length},K], got {tuple(indices.shape)}")
    topk = max(1, indices.shape[3])
    problem = attention_problem(q, k, v, block_size=block_size, window=window, topk=topk)
    tensors = (q, k, v, indices, q_offset, start)
    if choose("block_sparse_attention", tensors, implementation, problem) == "reference":
        return reference.block_sparse_attention(*tensors, block_size=block_size, window=window, scale=scale)
    if union is None:
        union = tile_union(
            indices, q_offset, start, slots=k.shape[2], block_size=block_size, window=window,
            ratio=q.shape[1] // groups,
        )  # fmt: skip
    return _sparse(q, k, v, *union, q_offset, start, block_size, window, scale)


def tile_union(
    indices: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    slots: int,
    block_size: int,
    window: int,
    ratio: int,
    transposed: bool = False,
    implementation: str | None = "triton",
) -> BlockUnion | None:
    """Union of the selected blocks per tile of queries, by a Triton kernel.

    Args:
        indices, q_offset, start, slots, block_size, window, ratio: as in `union.build_union`.
        transposed: list the tiles of every block too, as the backward wants them; without it each backward does.
        implementation: as for the other ops; None is returned where the reference runs, which needs no union.
    """
    if choose("tile_union", (indices, q_offset, start), implementation) == "reference":
        return None
    if not indices.shape[3]:
        indices = torch.nn.functional.pad(indices, (0, 1), value=-1)
    union = BlockUnion(*_union(indices, q_offset, start, slots, block_size, window, ratio))
    if not transposed:
        return union
    return BlockUnion(*union[:3], *_transposed(*union[:3], q_offset, slots, block_size, window, ratio))


@torch.library.custom_op("hyconvert::tile_union", mutates_args=())
def _union(
    indices: Tensor, q_offset: Tensor, start: Tensor, slots: int, block_size: int, window: int, ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    from . import forward

    outputs = _union_outputs(indices, q_offset, start, slots, block_size, window, ratio)
    if outputs[2].numel():
        with on_device(indices):
            forward.build_union(
                indices.to(torch.int32).contiguous(), q_offset.contiguous(), start.contiguous(), BlockUnion(*outputs),
                block_size=block_size, window=window, ratio=ratio,
            )  # fmt: skip
    return outputs


@_union.register_fake
def _union_outputs(indices, q_offset, start, slots, block_size, window, ratio):
    batch, groups, length, topk = indices.shape
    queries = union_queries(ratio)
    tiles, capacity = -(-length // queries), union_capacity(queries, topk, slots, block_size)
    shape = (batch, groups, tiles, capacity)
    wide = torch.int64 if queries > 32 else torch.int32
    return (
        indices.new_empty(shape, dtype=torch.int32),
        indices.new_empty(shape, dtype=wide),
        indices.new_empty(shape[:3], dtype=torch.int32),
    )


@torch.library.custom_op("hyconvert::transpose_union", mutates_args=())
def _transposed(
    slots: Tensor,
    bits: Tensor,
    counts: Tensor,
    q_offset: Tensor,
    keys: int,
    block_size: int,
    window: int,
    ratio: int,
) -> tuple[Tensor, Tensor]:
    from . import backward

    with on_device(slots):
        return backward.transpose_union(
            BlockUnion(slots, bits, counts), q_offset.contiguous(),
            slots=keys, block_size=block_size, window=window, ratio=ratio,
        )  # fmt: skip


@_transposed.register_fake
def _(slots, bits, counts, q_offset, keys, block_size, window, ratio):
    batch, groups, tiles, capacity = slots.shape
    return slots.new_empty(batch, groups, -(-keys // block_size)), slots.new_empty(
        batch, groups, tiles * capacity
    )


@torch.library.custom_op("hyconvert::block_sparse_attention", mutates_args=())
def _sparse(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, bits: Tensor, counts: Tensor, ends: Tensor | None,
    entries: Tensor | None, q_offset: Tensor, start: Tensor, block_size: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import forward

    out, lse = attention_outputs(q)
    if out.numel():
        with on_device(q):
            forward.forward(
                dense_rows(q), dense_rows(k), dense_rows(v), BlockUnion(slots, bits, counts), q_offset.contiguous(),
                start.contiguous(), out, lse, block_size=block_size, window=window, scale=scale,
            )  # fmt: skip
    return out, lse


@_sparse.register_fake
def _(q, *rest):
    return attention_outputs(q)


@torch.library.custom_op("hyconvert::block_sparse_attention_backward", mutates_args=())
def _sparse_backward(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, bits: Tensor, counts: Tensor, ends: Tensor | None,
    entries: Tensor | None, q_offset: Tensor, start: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    grad_lse: Tensor | None, block_size: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import backward

    grad_q, grad_k, grad_v = attention_grads(q, k)
    with on_device(q):
        q_offset, start = q_offset.contiguous(), start.contiguous()
        if ends is None or entries is None:
            ratio = q.shape[1] // k.shape[1]
            ends, entries = _transposed(slots, bits, counts, q_offset, k.shape[2], block_size, window, ratio)
        backward.backward(
            dense_rows(q), dense_rows(k), dense_rows(v), BlockUnion(slots, bits, counts, ends, entries), q_offset,
            start, out, lse, grad, grad_lse, grad_q, grad_k.zero_(), grad_v.zero_(), block_size=block_size,
            window=window, scale=scale,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


@_sparse_backward.register_fake
def _(q, k, *rest):
    return attention_grads(q, k)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.block_size, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_lse):
    saved, settings = ctx.saved_tensors, (ctx.block_size, ctx.window, ctx.scale)
    return attention_backward(_sparse_backward, saved, saved[10], grad, grad_lse, settings, 13)


_sparse.register_autograd(_differentiate, setup_context=_setup_context)
