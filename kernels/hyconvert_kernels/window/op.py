"""Dispatch of window attention."""

from __future__ import annotations

import functools

from ..dispatch import choose
from . import reference


@functools.wraps(reference.window_attention)
def window_attention(*args, implementation: str | None = None, **kwargs):
    choose("window_attention", args[0], implementation)
    return reference.window_attention(*args, **kwargs)
