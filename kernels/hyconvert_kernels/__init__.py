"""Attention kernels of HySparse layers: Triton on CUDA, plain PyTorch anywhere.

Every op takes ``implementation``: None (Triton for CUDA tensors, the reference elsewhere), "triton" or "reference".
Triton raises ValueError for what it does not support. All attention ops and the merge are differentiable on both paths;
`sparse_decode` runs on the reference where a gradient is wanted. No gradient flows through scores and selections.
"""

from .decode.op import oracle_decode, sparse_decode
from .merge.op import merge_branches
from .oracle.op import oracle_attention, oracle_attention_topk
from .sparse.op import block_sparse_attention, tile_union
from .sparse.union import BlockUnion
from .topk.op import block_topk
from .window.op import window_attention

__all__ = [
    "BlockUnion",
    "block_sparse_attention",
    "block_topk",
    "merge_branches",
    "oracle_attention",
    "oracle_attention_topk",
    "oracle_decode",
    "sparse_decode",
    "tile_union",
    "window_attention",
]
