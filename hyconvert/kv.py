"""What the KV cache of a model weighs: the plan's arithmetic, which the caches match to the byte."""

from __future__ import annotations

from typing import Any

from hyconvert.modeling.families import base_window
from hyconvert.plan import Plan


def kv_bytes(
    config: Any,
    tokens: int,
    *,
    plan: Plan | None = None,
    dtype_bytes: int = 2,
    batch: int = 1,
    static: bool = False,
    fp8: bool = False,
) -> list[int]:
    """Bytes that each layer's keys and values take once `tokens` tokens are cached.

    Full and reuse layers hold every token. Sparse and window layers hold the `window - 1` latest ones (the newest
    query brings its own), and the base's own sliding layers the same with the base's window.

    Args:
        config: config of a converted model; or of a base, together with `plan`.
        tokens: tokens cached per sequence; with `static`, the length the cache was made for.
        plan: the plan by which to count; None means the converted model's own.
        dtype_bytes: bytes per number, 2 for bfloat16.
        batch: sequences.
        static: count a preallocated cache, where a window layer has `window` slots from the start.
        fp8: count one byte per number in the layers that hold every token, and four per token and KV head for the scale
            of keys and for that of values, as `Decoder` keeps them with `kv_dtype="fp8"`.

    Returns:
        One number per layer.
    """
    plan = plan or config.get_plan()
    windows = [
        {"full": None, "reuse": None, "sliding": own}.get(layer.kind, plan.window)
        for layer, own in zip(plan.layers, _own_windows(config), strict=True)
    ]
    return _layer_bytes(config, windows, tokens, dtype_bytes, batch, static, fp8)


def base_kv_bytes(
    config: Any, tokens: int, *, dtype_bytes: int = 2, batch: int = 1, static: bool = False, fp8: bool = False
) -> list[int]:
    """The same for the base model before conversion; arguments as in `kv_bytes`."""
    return _layer_bytes(config, _own_windows(config), tokens, dtype_bytes, batch, static, fp8)


def _own_windows(config: Any) -> list[int | None]:
    """Sliding windows of the base's layers, from its own config or from a converted model's."""
    if hasattr(config, "cache_windows"):
        kinds = [layer.kind for layer in config.get_plan().layers]
        return [w if kind == "sliding" else None for w, kind in zip(config.cache_windows, kinds, strict=True)]
    return [base_window(config, layer) for layer in range(config.num_hidden_layers)]


def head_dim(config: Any) -> int:
    """Numbers per head; configs that do not say divide the hidden size by the heads."""
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dim


def _layer_bytes(
    config: Any,
    windows: list[int | None],
    tokens: int,
    dtype_bytes: int,
    batch: int,
    static: bool,
    fp8: bool,
) -> list[int]:
    dim = head_dim(config)
    rows = 2 * config.num_key_value_heads * batch
    near = rows * dim * dtype_bytes
    far = rows * (dim + 4) if fp8 else near
    return [
        far * tokens if window is None else near * min(tokens, window if static else window - 1)
        for window in windows
    ]
