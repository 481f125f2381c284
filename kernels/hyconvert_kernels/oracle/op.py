"""Dispatch of oracle attention."""

from __future__ import annotations

import functools

from ..dispatch import choose
from . import reference


@functools.wraps(reference.oracle_attention)
def oracle_attention(*args, implementation: str | None = None, **kwargs):
    choose("oracle_attention", args[0], implementation)
    return reference.oracle_attention(*args, **kwargs)


@functools.wraps(reference.oracle_attention_topk)
def oracle_attention_topk(*args, implementation: str | None = None, **kwargs):
    choose("oracle_attention_topk", args[0], implementation)
    return reference.oracle_attention_topk(*args, **kwargs)
