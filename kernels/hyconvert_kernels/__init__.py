"""Attention kernels of HySparse layers: Triton on CUDA, plain PyTorch anywhere.

Every op takes ``implementation``: None (Triton for CUDA tensors, the reference elsewhere), "triton" or "reference".
Triton raises ValueError for what it does not support. All attention ops and the merge are differentiable on both paths;
`sparse_decode` runs on the reference where a gradient is wanted. No gradient flows through scores and selections.
"""

from .decode.op import oracle_decode, sparse_decode, window_decode
from .merge.op import merge_branches
from .oracle.op import oracle_attention, oracle_attention_topk
from .sparse.op import block_sparse_attention, tile_union
from .sparse.union import BlockUnion
from .step.op import add_norm, fill_rings, linear, silu_mul, split_heads
from .topk.op import block_topk
from .window.op import merged_window_attention, window_attention

__all__ = [
    "BlockUnion",
    "add_norm",
    "block_sparse_attention",
    "block_topk",
    "fill_rings",
    "linear",
    "merge_branches",
    "merged_window_attention",
    "oracle_attention",
    "oracle_attention_topk",
    "oracle_decode",
    "silu_mul",
    "sparse_decode",
    "split_heads",
    "tile_union",
    "window_attention",
    "window_decode",
]
