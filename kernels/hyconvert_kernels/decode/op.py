"""Dispatch of decoding."""

from __future__ import annotations

import functools

from ..dispatch import choose
from . import reference


@functools.wraps(reference.oracle_decode)
def oracle_decode(*args, implementation: str | None = None, **kwargs):
    choose("oracle_decode", args[0], implementation)
    return reference.oracle_decode(*args, **kwargs)


@functools.wraps(reference.sparse_decode)
def sparse_decode(*args, implementation: str | None = None, **kwargs):
    choose("sparse_decode", args[0], implementation)
    return reference.sparse_decode(*args, **kwargs)
