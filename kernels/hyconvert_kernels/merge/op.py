"""Dispatch of the merge of branches."""

from __future__ import annotations

import functools

from ..dispatch import choose
from . import reference


@functools.wraps(reference.merge_branches)
def merge_branches(*args, implementation: str | None = None, **kwargs):
    choose("merge_branches", args[0], implementation)
    return reference.merge_branches(*args, **kwargs)
