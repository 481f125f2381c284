"""Dispatch of block-sparse attention."""

from __future__ import annotations

import functools

from ..dispatch import choose
from . import reference


@functools.wraps(reference.block_sparse_attention)
def block_sparse_attention(*args, implementation: str | None = None, **kwargs):
    choose("block_sparse_attention", args[0], implementation)
    return reference.block_sparse_attention(*args, **kwargs)
