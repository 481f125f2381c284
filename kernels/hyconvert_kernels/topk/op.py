"""Dispatch of block selection."""

from __future__ import annotations

import functools

from ..dispatch import choose
from . import reference


@functools.wraps(reference.block_topk)
def block_topk(*args, implementation: str | None = None, **kwargs):
    choose("block_topk", args[0], implementation)
    return reference.block_topk(*args, **kwargs)
